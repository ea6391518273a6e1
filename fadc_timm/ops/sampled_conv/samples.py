"""Samples times a kernel, in torch's operators."""
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..onnx_nodes import matmul
from ..runtime import accumulation_dtype, are_known, as_dtype, constant, is_exporting, makes_onnx, match_layout
from .arguments import ConvArgs, combine_parts, headroom, scale_channels
from .folded_gains import has_small_kernels, sample_kernels

__all__ = ['convolve_samples']


@constant
def _tiny_gain(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to gains, so that none is zero: too little to show.

    One element and no scalar: torch's ONNX exporter drops the addition of a scalar below 1e-8.
    """
    return torch.full((1,), 1e-20, dtype=dtype, device=device)


def convolve_samples(args: ConvArgs, masked_samples: Callable[[Tensor], Tensor]) -> Tensor:
    """The operator from samples of its map.

    With gains it is a product with a kernel for each image where these are small, and elsewhere a 1x1 convolution of
    the samples, and another one of their sum over the taps.

    Args:
        args: The call.
        masked_samples: Makes the samples under the mask from a map (B, C, H, W) in the accumulation dtype: the call's
            map, or that map with its channels scaled. They are (B, C, k*k, H', W'); where :func:`has_small_kernels`,
            also (B, C, k*k, H'*W').

    Returns:
        (B, O, H', W').
    """
    (h, w), taps, dtype = args.out_size, args.kernel_size ** 2, accumulation_dtype(args.x.dtype)
    x, (low_in, _, high_in, _) = as_dtype(args.x, dtype), args.gains
    if has_small_kernels(args):
        kernels = sample_kernels(args.weight, args.gains, args.groups)  # (B, g, O/g, C/g*k*k)
        columns = as_dtype(masked_samples(x), args.x.dtype).reshape(-1, args.groups, kernels.shape[3], h * w)
        if are_known(h, w) or makes_onnx(x):
            y = matmul(kernels, columns)
        else:  # torch's product would ask about symbolic sizes, which only depthwise kernels have here
            y = (kernels.transpose(2, 3) * columns).sum(2)
        y = y.view(-1, len(args.weight), h, w)
        return match_layout(y if args.bias is None else y + args.bias[:, None, None], args.x)
    if high_in is not None and is_exporting():
        # The map is smaller than its samples. Their total has the gain divided out again.
        scale = as_dtype(high_in, dtype) + _tiny_gain(dtype, x.device)
        low_in = (1. if low_in is None else as_dtype(low_in, dtype)) / scale
        x, high_in = scale_channels(x, scale), None
    samples = masked_samples(x)
    # the taps of a channel are channels of their own, in the order of the kernel's
    columns = samples if high_in is None else samples * as_dtype(high_in, dtype)[:, :, None, None, None]
    columns = as_dtype(columns, args.x.dtype).flatten(1, 2)
    mean, kernel = args.split_weight() if args.has_gains else (None, args.weight)
    high = F.conv2d(columns, kernel.reshape(len(kernel), -1, 1, 1), groups=args.groups)
    if mean is None:
        y = high if args.bias is None else high + args.bias[:, None, None]
    else:
        total = scale_channels(samples.sum(2), low_in)
        if args.x.dtype == torch.float16:
            total, mean = total / headroom(taps), mean * headroom(taps)
        y = combine_parts(high, F.conv2d(as_dtype(total, args.x.dtype), mean, groups=args.groups), args)
    return match_layout(y, args.x)
