"""FADC ConvNeXt: timm's ConvNeXt family with depthwise FADC in place of the 7x7 convolutions of stages 2 to 4.

Papers:
* `Frequency-Adaptive Dilated Convolution for Semantic Segmentation` - https://arxiv.org/abs/2403.05369
* `A ConvNet for the 2020s` - https://arxiv.org/abs/2201.03545
* `ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders` - https://arxiv.org/abs/2301.00808
"""
from timm.models import register_model
from timm.models.convnext import ConvNeXt
from timm.models.convnext import checkpoint_filter_fn as base_filter_fn
from torch import nn

from ._adapt import LoadsBase, adapt_checkpoint
from ._family import Family, StateDict, derive_default_cfgs, derive_entrypoints

__all__ = ['FADCConvNeXt']


class FADCConvNeXt(LoadsBase, ConvNeXt):
    """A ConvNeXt with depthwise FADConv2d in its stages."""


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """A checkpoint of timm's ConvNeXt, in any of the formats that timm knows, or of its FADC model."""
    return adapt_checkpoint(state_dict, model, base_filter_fn)


_CITATION = '''@inproceedings{liu2022convnet,
  title     = {A ConvNet for the 2020s},
  author    = {Liu, Zhuang and Mao, Hanzi and Wu, Chao-Yuan and Feichtenhofer, Christoph and Darrell, Trevor and
               Xie, Saining},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}'''

_family = Family(
    module='convnext',
    base_cls=ConvNeXt,
    fadc_cls=FADCConvNeXt,
    stages=('stages.0', 'stages.1', 'stages.2', 'stages.3'),
    checkpoint_filter_fn=checkpoint_filter_fn,
    feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
    place='in place of the 7x7 depthwise convolutions',
    citation=_CITATION,
    headless_tags=('fcmae',),
    head_norm='head.norm',
)

default_cfgs = derive_default_cfgs(_family)

for _entrypoint in derive_entrypoints(_family):
    globals()[_entrypoint.__name__] = register_model(_entrypoint)
