"""The operator in TorchScript: through torchvision's kernel, the one that it knows."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from .arguments import scale_channels, split_kernel
from .torchvision import deform_conv2d


def scripted_conv2d(
        x: Tensor,
        weight: Tensor,
        dilation: Tensor,
        mask: Tensor,
        bias: Optional[Tensor],
        gains: Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]],
        stride: int,
        padding: int,
        groups: int,
) -> Tensor:
    """The operator for tensors that the layer has made, shapes as there; half dtypes are computed in float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    low_in, low_out, high_in, high_out = gains
    x32, weight, dilation, mask = x.to(dtype), weight.to(dtype), dilation.to(dtype), mask.to(dtype)
    if low_in is None and low_out is None and high_in is None and high_out is None:
        y = deform_conv2d(x32, weight, dilation, mask, stride, stride, padding, padding, groups)
    else:
        mean, rest = split_kernel(weight)
        high = deform_conv2d(
            scale_channels(x32, high_in), rest, dilation, mask, stride, stride, padding, padding, groups)
        low = deform_conv2d(
            scale_channels(x32, low_in), mean.expand_as(weight), dilation, mask, stride, stride, padding, padding,
            groups)
        y = scale_channels(high, high_out) + scale_channels(low, low_out)
    if bias is not None:
        y = y + bias[:, None, None]
    return y.to(x.dtype)
