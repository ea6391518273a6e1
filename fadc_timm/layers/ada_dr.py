"""Adaptive Dilation Rate (AdaDR): a dilation, and a modulation of the taps, for every output position.

Paper, section 3: `Frequency-Adaptive Dilated Convolution for Semantic Segmentation` -
https://arxiv.org/abs/2403.05369
"""
import math
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from .predictor_conv import PredictorConv2d

__all__ = ['DILATION_ACTS', 'AdaDR']

DILATION_ACTS = ('abs', 'relu', 'zero')


class AdaDR(nn.Module):
    """Adaptive Dilation Rate.

    With o = conv(x) and base dilation d, the dilation is `1 + |o| * d` ('abs', the December 2024 release),
    `1 + relu(o) * d` ('relu', April 2024) or `1 + (relu(o + 1) - 1) * d` ('zero', which reaches 1 - d). The modulation
    mask is `2 * sigmoid(conv(x))`, one value per tap. Weights start at zero and the dilation at `d + eps`:
    at d itself the taps lie on pixels, where bilinear sampling has a different slope to either side. The authors' code
    has `1e-4 * d`, at which deep networks leave the function of their base by more than 1e-3.
    """

    def __init__(
            self,
            in_channels: int,
            kernel_size: int = 3,
            stride: int = 1,
            padding: Optional[int] = None,
            dilation: int = 1,
            dilation_groups: int = 1,
            dilation_act: str = 'abs',
            depthwise: bool = False,
            eps: float = 1e-5,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_channels: Number of input channels.
            kernel_size: Kernel size k, of these convolutions and of the one that is to be dilated.
            stride: Stride, of both alike.
            padding: Zero padding of these convolutions, None for k // 2. Negative padding crops.
            dilation: Base dilation d, in pixels.
            dilation_groups: Number of groups of channels with a dilation of their own.
            dilation_act: 'abs', 'relu' or 'zero'.
            depthwise: Predict the mask by a depthwise and a pointwise convolution, as for a depthwise kernel.
            eps: Distance from the base dilation at the start, in pixels.

        Raises:
            ValueError: There is no such dilation_act, the dilation groups do not divide the channels, or eps is not a
                finite number of at least 0.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if dilation_act not in DILATION_ACTS:
            raise ValueError(f'dilation_act must be one of {DILATION_ACTS}, got {dilation_act!r}.')
        if isinstance(dilation_groups, bool) or not isinstance(dilation_groups, int):
            raise ValueError(f'dilation_groups must be an integer, got {dilation_groups!r}.')
        if dilation_groups < 1 or in_channels % dilation_groups:
            raise ValueError(f'dilation_groups={dilation_groups} does not divide in_channels={in_channels}.')
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
            raise ValueError(f'eps must be a finite number and not negative, got {eps!r}.')
        padding = kernel_size // 2 if padding is None else padding
        self.crop = max(-padding, 0)
        self.dilation = dilation
        self.dilation_groups = dilation_groups
        self.dilation_act = dilation_act
        self.depthwise = depthwise
        self.eps = eps
        taps = kernel_size * kernel_size
        conv_args = dict(kernel_size=kernel_size, stride=stride, padding=max(padding, 0), **dd)
        # dilation and mask read the same tensor: one convolution, the dilation first
        self.conv = PredictorConv2d(
            in_channels, dilation_groups * (1 if depthwise else 1 + taps), first=dilation_groups,
            first_bias=(dilation - 1 + eps) / dilation, **conv_args)
        self.mask_dw = nn.Conv2d(in_channels, in_channels, groups=in_channels, bias=False, **conv_args) \
            if depthwise else None
        self.mask_pw = PredictorConv2d(in_channels, dilation_groups * taps, 1, **dd) if depthwise else None

    def reset_parameters(self) -> None:
        """Back to the base dilation and a mask of ones."""
        for conv in (self.conv, self.mask_dw, self.mask_pw):
            if conv is not None:
                conv.reset_parameters()

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """
        Args:
            x: Map (B, C, H, W).

        Returns:
            Dilation in pixels (B, G, H', W'), float32 or float64 as half dtypes are too coarse for positions, and mask
            (B, G*k*k, H', W') in the dtype of the convolution.
        """
        y, mask = self.predict(x)
        o = y
        if mask is None:
            o, mask = torch.split(y, [self.dilation_groups, y.shape[1] - self.dilation_groups], 1)
        if o.dtype != torch.float64 and o.dtype != torch.float32:
            o = o.float()
        # Unlike abs() and relu(), this has a gradient at zero (needed if eps is 0).
        if self.dilation_act == 'abs':
            o = self._abs(o)
        elif self.dilation_act == 'relu':
            o = torch.where(o < 0, torch.zeros_like(o), o)
        else:
            o = (o + 1).relu() - 1
        if self.dilation != 1:
            o = o * self.dilation
        return 1 + o, 2 * torch.sigmoid(mask)

    def _abs(self, o: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if torch.onnx.is_in_onnx_export():  # one node, and no gradients
                return o.abs()
        return torch.where(o < 0, -o, o)

    def predict(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Dilation and mask before their activations.

        Args:
            x: Map (B, C, H, W).

        Returns:
            o (B, G, H', W') and the mask's (B, G*k*k, H', W'); in place of these, where one convolution makes both,
            (B, G + G*k*k, H', W') and None.
        """
        if self.crop > 0:
            x = x[:, :, self.crop:x.shape[2] - self.crop, self.crop:x.shape[3] - self.crop]
        y = self.conv(x)
        mask: Optional[Tensor] = None
        if self.mask_dw is not None and self.mask_pw is not None:
            mask = self.mask_pw(self.mask_dw(x))
        return y, mask

    def extra_repr(self) -> str:
        return f'dilation={self.dilation}, dilation_groups={self.dilation_groups}, dilation_act={self.dilation_act!r}'
