"""The operator in TorchScript: through torchvision's kernel, the one that it knows."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from .arguments import scale_channels, split_kernel
from .torchvision import sampled_conv2d


def scripted_conv2d(
        x: Tensor,
        weight: Tensor,
        steps: Tensor,
        mask: Optional[Tensor],
        bias: Optional[Tensor],
        gains: Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]],
        stride: int,
        padding: int,
        groups: int,
        spacing: Optional[int] = None,
) -> Tensor:
    """The operators for tensors that the layer has made, as in :class:`ConvArgs`; half dtypes are computed in float32.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    low_in, low_out, high_in, high_out = gains
    x32, weight, steps = x.to(dtype), weight.to(dtype), steps.to(dtype)
    if mask is not None:
        mask = mask.to(dtype)
    strides, paddings = (stride, stride), (padding, padding)
    spacings: Optional[Tuple[int, int]] = None
    if spacing is not None:
        spacings = (spacing, spacing)
    if low_in is None and low_out is None and high_in is None and high_out is None:
        y = sampled_conv2d(x32, weight, steps, mask, strides, paddings, spacings, groups)
    else:
        mean, rest = split_kernel(weight)
        high = sampled_conv2d(
            scale_channels(x32, high_in), rest, steps, mask, strides, paddings, spacings, groups)
        low = sampled_conv2d(
            scale_channels(x32, low_in), mean.expand_as(weight), steps, mask, strides, paddings, spacings, groups)
        y = scale_channels(high, high_out) + scale_channels(low, low_out)
    if bias is not None:
        y = y + bias[:, None, None]
    return y.to(x.dtype)
