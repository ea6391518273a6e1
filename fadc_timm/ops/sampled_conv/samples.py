"""Samples times a kernel, in torch's operators."""
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import accumulation_dtype, as_dtype, constant, is_exporting, match_layout
from .arguments import ConvArgs, combine_parts, headroom, scale_channels

__all__ = ['multiply_samples']


@constant
def _tiny_gain(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to gains, so that none is zero: too little to show.

    One element and no scalar: torch's ONNX exporter drops the addition of a scalar below 1e-8.
    """
    return torch.full((1,), 1e-20, dtype=dtype, device=device)


def multiply_samples(args: ConvArgs, masked_samples: Callable[[Tensor], Tensor]) -> Tensor:
    """The operator from samples of its map: a 1x1 convolution, and with gains another one of their sum over the taps.

    Args:
        args: The call.
        masked_samples: Makes the samples under the mask (B, C, k*k, H', W') from a map (B, C, H, W) in the
            accumulation dtype: the call's map, or that map with its channels scaled.

    Returns:
        (B, O, H', W').
    """
    taps, dtype = args.kernel_size ** 2, accumulation_dtype(args.x.dtype)
    x, (low_in, _, high_in, _) = as_dtype(args.x, dtype), args.gains
    split = args.has_gains and not args.is_depthwise
    if split and high_in is not None and is_exporting():
        # The map is smaller than its samples. Their total has the gain divided out again.
        scale = as_dtype(high_in, dtype) + _tiny_gain(dtype, x.device)
        low_in = (1. if low_in is None else as_dtype(low_in, dtype)) / scale
        x, high_in = scale_channels(x, scale), None
    samples = masked_samples(x)
    # the taps of a channel are channels of their own, in the order of the kernel's
    columns = samples if high_in is None or not split else samples * as_dtype(high_in, dtype)[:, :, None, None, None]
    columns = as_dtype(columns, args.x.dtype).flatten(1, 2)
    mean, kernel = args.split_weight() if split else (None, args.weight)
    high = F.conv2d(columns, kernel.reshape(len(kernel), -1, 1, 1), groups=args.groups)
    if mean is None:
        y = high if args.bias is None else high + args.bias[:, None, None]
    else:
        total = scale_channels(samples.sum(2), low_in)
        if args.x.dtype == torch.float16:
            total, mean = total / headroom(taps), mean * headroom(taps)
        y = combine_parts(high, F.conv2d(as_dtype(total, args.x.dtype), mean, groups=args.groups), args)
    return match_layout(y, args.x)
