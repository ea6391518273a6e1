"""Modulated deformable convolution (DCNv2) in place of a plain convolution, for comparison with FADC.

Paper: `Deformable ConvNets v2: More Deformable, Better Results` - https://arxiv.org/abs/1811.11168
"""
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from fadc_timm.ops.runtime import without_autocast


class DeformConv2d(nn.Conv2d):
    """A convolution with an offset and a modulation for each tap and position, predicted by a convolution.

    `weight` and `bias` are those of the plain convolution. The predicting convolution starts at zero, and the mask is
    `2 * sigmoid(o)`, so it starts as the convolution that it replaces.
    """

    def __init__(self, *args, **kwargs) -> None:
        """Arguments of `nn.Conv2d`."""
        super().__init__(*args, **kwargs)
        if self.padding_mode != 'zeros' or isinstance(self.padding, str):
            raise ValueError(
                f'DeformConv2d pads with zeros, a number of pixels; got {self.padding_mode}, {self.padding}')
        self.taps = self.kernel_size[0] * self.kernel_size[1]
        self.steps: dict[str, Any] = dict(stride=self.stride, padding=self.padding, dilation=self.dilation)
        size: Any = self.kernel_size
        self.offset = nn.Conv2d(
            self.in_channels, 3 * self.taps, size, **self.steps, device=self.weight.device, dtype=self.weight.dtype)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> 'DeformConv2d':
        """Take over a plain convolution: its arguments and its parameters, the objects themselves."""
        arguments: Any = (
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode)
        new = cls(*arguments, device=conv.weight.device, dtype=conv.weight.dtype)
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) to (B, O, H', W')."""
        o = self.offset(x)
        offset, mask = o[:, :2 * self.taps], 2 * torch.sigmoid(o[:, 2 * self.taps:])
        # positions want float32, and torchvision's operator one dtype for all: the autocast ends here
        with without_autocast(x):
            dtype = self.weight.dtype
            y = deform_conv2d(
                x.to(dtype), offset.to(dtype), self.weight, self.bias, mask=mask.to(dtype), **self.steps)
        return y.to(o.dtype)
