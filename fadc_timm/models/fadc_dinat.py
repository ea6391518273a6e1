"""FADC DiNAT: NAT and DiNAT with FreqSelect before the attention of stages 2 to 4, and AdaKern in it if asked for.

Papers:
* `Frequency-Adaptive Dilated Convolution for Semantic Segmentation` - https://arxiv.org/abs/2403.05369
* `Neighborhood Attention Transformer` - https://arxiv.org/abs/2204.07143
* `Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001
"""
import torch
from timm.models import register_model
from torch import nn

from ..layers import FADNeighborhoodAttention
from ..layers.neighborhood_attention import ATTENTION_OPTIONS
from ._adapt import LoadsBase, adapt_checkpoint
from ._family import FADC_ATTENTION, Family, StateDict, derive_default_cfgs, derive_entrypoints
from .dinat import DiNAT
from .dinat import checkpoint_filter_fn as base_filter_fn

__all__ = ['FADCDiNAT']


class FADCDiNAT(LoadsBase, DiNAT):
    """A DiNAT with FADNeighborhoodAttention in its stages."""

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all parameters as DiNAT does, then make FADC the identity again."""
        super().init_weights(needs_reset)
        for m in self.modules():
            if isinstance(m, FADNeighborhoodAttention):
                m.reset_fadc_parameters()


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """A checkpoint of NAT or DiNAT, in any of the formats that they load, or of their FADC model."""
    return adapt_checkpoint(state_dict, model, base_filter_fn)


_CITATION = '''@article{hassani2022dilated,
  title   = {Dilated Neighborhood Attention Transformer},
  author  = {Hassani, Ali and Shi, Humphrey},
  journal = {arXiv preprint arXiv:2209.15001},
  year    = {2022}
}'''

_family = Family(
    module='dinat',
    base_cls=DiNAT,
    fadc_cls=FADCDiNAT,
    stages=('stages.0', 'stages.1', 'stages.2', 'stages.3'),
    checkpoint_filter_fn=checkpoint_filter_fn,
    feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
    place='in the neighbourhood attention',
    citation=_CITATION,
    head_norm='norm',
    variants=(FADC_ATTENTION,),
    options=ATTENTION_OPTIONS,
    owner='Our',
)

default_cfgs = derive_default_cfgs(_family)

for _entrypoint in derive_entrypoints(_family):
    globals()[_entrypoint.__name__] = register_model(_entrypoint)
