"""FADC ResNet: timm's ResNet family with FADC in place of the 3x3 convolutions of stages 2 to 4.

Also with deformable convolution there (`<base>_dcn`), and with AdaKern and FreqSelect around it (`<base>_dcn_fadc`).

Papers:
* `Frequency-Adaptive Dilated Convolution for Semantic Segmentation` - https://arxiv.org/abs/2403.05369
* `Deformable ConvNets v2: More Deformable, Better Results` - https://arxiv.org/abs/1811.11168
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385, and those of timm's resnet.py
"""
from pathlib import Path
from typing import Any, Dict

import torch
from timm.models import PretrainedCfg, register_model
from timm.models.resnet import ResNet
from torch import nn

from ..layers import FADConv2d
from ._adapt import LoadsBase, adapt_checkpoint
from ._family import DCN, DCN_FADC, FADC, Family, StateDict, derive_default_cfgs, derive_entrypoints

__all__ = ['FADCResNet']


class FADCResNet(LoadsBase, ResNet):
    """A ResNet with FADConv2d in its stages."""

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialize as ResNet does, then make FADC the identity again."""
        super().init_weights(zero_init_last=zero_init_last)
        for m in self.modules():
            if isinstance(m, FADConv2d):
                m.reset_fadc_parameters()


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """A checkpoint of timm's ResNet or of its FADC model."""
    return adapt_checkpoint(state_dict, model)


def _cfg(**kwargs: Any) -> PretrainedCfg:
    defaults: Dict[str, Any] = dict(
        input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=1.0, interpolation='bicubic',
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv='conv1.0', classifier='fc', license='apache-2.0')
    return PretrainedCfg(**{**defaults, **kwargs})


_CITATION = '''@inproceedings{he2016deep,
  title     = {Deep Residual Learning for Image Recognition},
  author    = {He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian},
  booktitle = {Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2016}
}'''

_family = Family(
    module='resnet',
    base_cls=ResNet,
    fadc_cls=FADCResNet,
    stages=('layer1', 'layer2', 'layer3', 'layer4'),
    checkpoint_filter_fn=checkpoint_filter_fn,
    feature_cfg={},
    place='in place of the 3x3 convolutions',
    citation=_CITATION,
    variants=(FADC, DCN, DCN_FADC),
)

_WEIGHTS = Path(__file__).parent.parent / 'weights'

default_cfgs = derive_default_cfgs(_family, own={
    'test_resnet_fadc': {
        'bluemarble_climate': _cfg(
            file=str(_WEIGHTS / 'test_resnet_fadc.bluemarble_climate.safetensors'),
            num_classes=6,
            label_names=('ocean', 'tropical', 'arid', 'temperate', 'continental', 'polar'),
            description='Climate of the centre of a tile of NASA Blue Marble, trained from scratch.'),
    },
})

for _entrypoint in derive_entrypoints(_family):
    globals()[_entrypoint.__name__] = register_model(_entrypoint)
