"""Free offsets: where each tap of a deformable convolution samples, and a modulation of the taps.

Papers:
* `Deformable Convolutional Networks` - https://arxiv.org/abs/1703.06211
* `Deformable ConvNets v2: More Deformable, Better Results` - https://arxiv.org/abs/1811.11168
"""
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from .predictor_conv import PredictorConv2d

__all__ = ['FreeOffsets']


class FreeOffsets(nn.Module):
    """Offsets and modulation of a deformable convolution, in the place that AdaDR has in FADC.

    At every output position each tap has an offset (y, x) of its own, in pixels, from its place in the dilated kernel.
    The modulation mask is `2 * sigmoid(conv(x))`, one value per tap, as in deformable convolution v2; without it this
    is version 1. The convolution starts at zero: offsets of zero and a mask of ones, with which the deformable
    convolution is the plain convolution exactly. For a depthwise kernel a depthwise convolution comes first, and a
    pointwise one predicts from it: a dense k x k convolution would cost far more than the kernel itself.

    At offset zero a tap lies on a pixel, where bilinear sampling has a different slope to either side. The operator
    takes the slope towards higher coordinates: the derivative by an offset of zero is the value of the next pixel
    (below, or to the right) minus that of the pixel itself. It is not zero, so the offsets learn from the first step.
    """

    def __init__(
            self,
            in_channels: int,
            kernel_size: int = 3,
            stride: int = 1,
            padding: Optional[int] = None,
            dilation: int = 1,
            offset_groups: int = 1,
            modulated: bool = True,
            depthwise: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_channels: Number of input channels.
            kernel_size: Kernel size k, of this convolution and of the deformable one, as are the next three.
            stride: Stride.
            padding: Zero padding, None for what keeps the size at stride 1: `dilation * (k // 2)`.
            dilation: Dilation, in pixels.
            offset_groups: Number of groups of channels with offsets and a mask of their own.
            modulated: Predict a mask too (version 2).
            depthwise: Predict by a depthwise and a pointwise convolution, as for a depthwise kernel.

        Raises:
            ValueError: The offset groups do not divide the channels, or modulated is not true or false.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if isinstance(offset_groups, bool) or not isinstance(offset_groups, int):
            raise ValueError(f'offset_groups must be an integer, got {offset_groups!r}.')
        if offset_groups < 1 or in_channels % offset_groups:
            raise ValueError(f'offset_groups={offset_groups} does not divide in_channels={in_channels}.')
        if not isinstance(modulated, bool):
            raise ValueError(f'modulated must be true or false, got {modulated!r}.')
        self.dilation = dilation
        self.offset_groups = offset_groups
        self.modulated = modulated
        taps = offset_groups * kernel_size * kernel_size
        self.num_offsets = 2 * taps
        outputs = self.num_offsets + (taps if modulated else 0)
        conv_args = dict(
            kernel_size=kernel_size, stride=stride, dilation=dilation,
            padding=dilation * (kernel_size // 2) if padding is None else padding, **dd)
        self.dw = nn.Conv2d(in_channels, in_channels, groups=in_channels, bias=False, **conv_args) \
            if depthwise else None
        # offsets and mask read the same tensor: one convolution, the offsets first, as mmcv's conv_offset has them
        self.conv = PredictorConv2d(in_channels, outputs, 1, **dd) if depthwise \
            else PredictorConv2d(in_channels, outputs, **conv_args)

    def reset_parameters(self) -> None:
        """Back to offsets of zero and a mask of ones."""
        for conv in (self.dw, self.conv):
            if conv is not None:
                conv.reset_parameters()

    def forward(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """
        Args:
            x: Map (B, C, H, W).

        Returns:
            Offsets in pixels (B, G*2*k*k, H', W'), (y, x) interleaved per tap in row-major order within an offset
            group, float32 or float64 as half dtypes are too coarse for positions; and the mask (B, G*k*k, H', W') in
            the dtype of the convolution, or None if this is not modulated.
        """
        if self.dw is not None:
            x = self.dw(x)
        y = self.conv(x)
        offset = y[:, :self.num_offsets]
        offset = offset if offset.dtype == torch.float64 else offset.float()
        mask: Optional[Tensor] = None
        if self.modulated:
            mask = 2 * torch.sigmoid(y[:, self.num_offsets:])
        return offset, mask

    def extra_repr(self) -> str:
        return f'dilation={self.dilation}, offset_groups={self.offset_groups}, modulated={self.modulated}'
