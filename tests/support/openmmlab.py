"""mmcv's deformable convolutions on torchvision's operator, and backbones with them under mmdetection's names.

Where mmcv is not installed, they stand in for it.
"""
import json
import sys
import types
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from torch import nn
from torchvision.ops import deform_conv2d

VECTORS = Path(__file__).parents[1] / 'data' / 'dcn_vectors'
TOLERANCE = 2e-5  # relative, of features and of the input's gradient


def modulated_deform_conv2d(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    assert x.shape[1] == groups * weight.shape[1] and offset.shape[1] == 2 * deform_groups * weight[0, 0].numel()
    return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)


class ModulatedDeformConv2dPack(nn.Conv2d):
    """`type='DCNv2'`."""
    channels = 3

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 deform_groups=1, bias=True):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.deform_groups = deform_groups
        self.conv_offset = nn.Conv2d(
            in_channels, self.channels * deform_groups * self.kernel_size[0] * self.kernel_size[1],
            self.kernel_size, self.stride, self.padding, self.dilation)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x):
        first, second, mask = self.conv_offset(x).chunk(3, dim=1)
        return modulated_deform_conv2d(
            x, torch.cat((first, second), dim=1), mask.sigmoid(), self.weight, self.bias, self.stride, self.padding,
            self.dilation, self.groups, self.deform_groups)


class DeformConv2dPack(ModulatedDeformConv2dPack):
    """`type='DCN'`, version 1."""
    channels = 2

    def forward(self, x):
        return modulated_deform_conv2d(
            x, self.conv_offset(x), None, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            self.deform_groups)


class Registry:
    """MODELS of mmengine."""

    def __init__(self):
        self.modules = {}

    def register_module(self, name):
        return lambda cls: self.modules.setdefault(name, cls)


def stand_in(monkeypatch):
    """Modules that a page imports from mmcv and mmengine."""
    mmcv, ops, mmengine, registry = (
        types.ModuleType(name) for name in ('mmcv', 'mmcv.ops', 'mmengine', 'mmengine.registry'))
    ops.ModulatedDeformConv2dPack, ops.modulated_deform_conv2d = ModulatedDeformConv2dPack, modulated_deform_conv2d
    registry.MODELS = Registry()
    for module in (mmcv, ops, mmengine, registry):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return registry.MODELS


@torch.no_grad()
def backbone(base, deform_groups=1, modulated=True, **kwargs):
    """A network of timm with deformable convolutions as conv2 in its stages 2 to 4, as mmdetection has them."""
    torch.manual_seed(0)
    model = timm.create_model(base, num_classes=0, **kwargs)
    cls = ModulatedDeformConv2dPack if modulated else DeformConv2dPack
    for name, conv in list(model.named_modules()):
        if name.startswith(('layer2', 'layer3', 'layer4')) and name.endswith('.conv2'):
            new = cls(
                conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                conv.groups, deform_groups, bias=conv.bias is not None)
            for p in new.conv_offset.parameters():
                nn.init.normal_(p, std=0.5 / p[0].numel() ** 0.5)
            model.get_submodule(name.rpartition('.')[0]).conv2 = new
    return model


def checkpoint(model, **more):
    """A network as mmdetection saves a detector with it; a deep stem is one Sequential there."""
    state = {}
    for key, value in model.state_dict().items():
        if isinstance(model.conv1, nn.Sequential):
            key = f'stem.{key.removeprefix("conv1.")}' if key.startswith('conv1.') else key
            key = f'stem.7.{key.removeprefix("bn1.")}' if key.startswith('bn1.') else key
        state[f'backbone.{key}'] = value
    return dict(state_dict={**state, 'rpn_head.rpn_conv.weight': torch.zeros(3)}, meta=dict(epoch=12), **more)


def vector():
    """The backbone's arguments, state dict and tensors in data/dcn_vectors."""
    with safe_open(VECTORS / 'dcnv2_backbone.safetensors', 'pt') as f:
        meta, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  not iterable
    kwargs = {**json.loads(meta['timm_resnet_kwargs']), 'offset_groups': int(meta['deform_groups'])}
    return kwargs, {k: v for k, v in tensors.items() if k.startswith('backbone.')}, tensors


def features(model, x):
    """The four stages of a ResNet."""
    return model.forward_intermediates(x, intermediates_only=True)[1:]


def close(a, b):
    with torch.no_grad():
        return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm())
