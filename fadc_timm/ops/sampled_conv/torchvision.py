"""torchvision backend: its `deform_conv2d`, for which a dilation is expanded to offsets.

The gains stay outside of it: they commute with sampling, so that no weight is made per sample and the batch is not
folded into groups; it takes two calls, one for each part of the kernel. One sample alone has one kernel, and one call.

torchvision has no bfloat16, and computes positions in the dtype of the map. In float16 that puts the relative error of
the output at 0.0014 on a map of 7x7, 0.0030 on 14x14 and 0.012 on 56x56, where with positions in float32 it is 0.0002
(a convolution of 16 channels at dilations of 1 to 4). So both half dtypes are computed in float32.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

from ..derivatives import once
from ..onnx_nodes import has_few_pixels, multiply
from ..runtime import (
    accumulation_dtype,
    are_known,
    as_dtype,
    constant,
    is_exporting,
    literal,
    makes_onnx,
    match_layout,
)
from . import grid_sample
from .arguments import ConvArgs, combine_parts, scale_channels, why_not_transformed
from .folded_gains import has_small_kernels, sample_kernels
from .samples import convolve_samples


def why_not(args: ConvArgs) -> Optional[str]:
    if args.x.device.type not in ('cpu', 'cuda'):
        return f'torchvision.ops.deform_conv2d does not run on {args.x.device.type}'
    return why_not_transformed()


def _readable(offset: Tensor, mask: Tensor, limit: float) -> Tuple[Tensor, Tensor]:
    """Offsets and a mask that torchvision's kernels can read, which cast positions to integers.

    Huge offsets are kept within the limit, an integer outside of the map. One that is not finite becomes a mask of NaN.
    """
    exact = offset.detach()
    mask = mask + (exact - exact).unflatten(1, (mask.shape[1], 2)).sum(2)
    return torch.nan_to_num(offset, 0.).clamp(-limit, limit), mask


def deform_conv2d(
        x: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Optional[Tensor],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        spacing: Tuple[int, int],
        groups: int,
) -> Tensor:
    """torchvision's operator, safe for offsets of any value. Arguments as in :func:`sampled_conv2d`."""
    b, n, out_h, out_w = offset.shape
    k = weight.shape[3]
    g = n // (2 * k * k)
    if mask is None:
        mask = torch.ones(b, g * k * k, out_h, out_w, device=x.device, dtype=x.dtype)
    limit = float(x.shape[2] + x.shape[3] + out_h * stride[0] + out_w * stride[1] + padding[0] + padding[1]
                  + k * (spacing[0] + spacing[1]))
    offset, mask = _readable(offset, mask, limit)
    return torch.ops.torchvision.deform_conv2d(
        x, weight, offset, mask, torch.zeros(weight.shape[0], device=x.device, dtype=x.dtype),
        stride[0], stride[1], padding[0], padding[1], spacing[0], spacing[1], groups, g, True)


def _dilated_conv2d(
        x: Tensor,
        weight: Tensor,
        dilation: Tensor,
        mask: Optional[Tensor],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        groups: int,
) -> Tensor:
    b, g, out_h, out_w = dilation.shape
    k = weight.shape[3]
    # negative padding, and an output size other than its formula's, go into the offsets and the padding of the result
    pad_h, pad_w = max(padding[0], 0), max(padding[1], 0)
    tap = torch.arange(k, device=x.device, dtype=x.dtype) - k // 2
    taps = torch.stack((tap[:, None].expand(k, k), tap[None, :].expand(k, k)), dim=-1)  # (k, k, 2)
    shift = torch.tensor([pad_h - padding[0], pad_w - padding[1]], device=x.device, dtype=x.dtype)
    # the offset of a huge dilation is to be finite too, and that of an infinite one is not
    limit = float(x.shape[2] + x.shape[3] + out_h * stride[0] + out_w * stride[1] + abs(padding[0]) + abs(padding[1])
                  + k)
    exact = dilation.detach()
    dilation = dilation.clamp(-limit, limit) + (exact - exact)
    offset = (dilation[:, :, None, None, None] - 1) * taps[:, :, :, None, None] + shift[:, None, None]
    offset = offset.reshape(b, g * k * k * 2, out_h, out_w)
    full_h = (x.shape[2] + 2 * pad_h - k) // stride[0] + 1
    full_w = (x.shape[3] + 2 * pad_w - k) // stride[1] + 1
    grow_h, grow_w = max(out_h - full_h, 0) * stride[0], max(out_w - full_w, 0) * stride[1]
    if grow_h > 0 or grow_w > 0:
        x = F.pad(x, [0, grow_w, 0, grow_h])
    more_h = (x.shape[2] + 2 * pad_h - k) // stride[0] + 1 - out_h
    more_w = (x.shape[3] + 2 * pad_w - k) // stride[1] + 1 - out_w
    if more_h > 0 or more_w > 0:
        offset = F.pad(offset, [0, more_w, 0, more_h])
        mask = None if mask is None else F.pad(mask, [0, more_w, 0, more_h])
    y = deform_conv2d(x, weight, offset, mask, stride, (pad_h, pad_w), (1, 1), groups)
    return y[:, :, :out_h, :out_w]


def sampled_conv2d(
        x: Tensor,
        weight: Tensor,
        steps: Tensor,
        mask: Optional[Tensor],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        spacing: Optional[Tuple[int, int]],
        groups: int,
) -> Tensor:
    """The operator without gains and bias, float32 or float64, scriptable. Arguments as in :class:`ConvArgs`."""
    if spacing is None:
        return _dilated_conv2d(x, weight, steps, mask, stride, padding, groups)
    return deform_conv2d(x, weight, steps, mask, stride, padding, spacing, groups)


# torchvision processes as many samples at a time as the largest divisor of the batch size up to this number.
_PARALLEL = 32


def _at_a_time(b: int) -> int:
    """Samples to pass to it at a time, so that it makes no more rounds than it has to: of 37 it would make 37."""
    rounds = max(-(-b // _PARALLEL), 1)
    divisor = max(n for n in range(1, _PARALLEL + 1) if b % n == 0)
    return b if b <= rounds * divisor else -(-b // rounds)


def _is_convolution(args: ConvArgs) -> bool:
    """Whether padding and output size are a convolution's, as those of every layer without negative padding are."""
    sizes = (1 + (n + 2 * p - d * (args.kernel_size - 1) - 1) // s for n, p, d, s in zip(
        args.x.shape[2:], args.padding, args.spacing or (1, 1), args.stride))
    return min(args.padding) >= 0 and all(n == m for n, m in zip(sizes, args.out_size))


def _exported_offsets(args: ConvArgs) -> Tensor:
    """What moves the taps of a convolution (B, G*k*k*2, H', W'), in few nodes of a graph."""
    if args.spacing is not None:
        return args.steps
    k, groups = args.kernel_size, args.step_groups
    taps = literal(tuple(((float(v),),) for i in range(k) for j in range(k) for v in (i - k // 2, j - k // 2)),
                   args.steps.dtype, args.steps.device)
    offset = args.steps if groups == 1 else args.steps.unsqueeze(2)
    offset = multiply(offset, taps) - taps
    return offset if groups == 1 else offset.flatten(1, 2)


_FAR = 1e9  # pixels, an integer of 32 bits and outside of every map


@constant
def _copies(channels: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A kernel (C*k*k, 1, k, k), of C groups, that makes a channel of each tap."""
    return torch.eye(k * k, dtype=dtype, device=device).view(k * k, 1, k, k).repeat(channels, 1, 1, 1)


def _exported(args: ConvArgs) -> Tensor:
    """:func:`forward` in few nodes of a graph, with one call of torchvision's operator.

    In an ONNX file the operator is DeformConv, which opset 19 has first.
    """
    x, mask, offset, groups = args.x, args.mask, _exported_offsets(args), args.groups
    b = x.shape[0]
    folds = has_small_kernels(args) and are_known(b) and b > 0
    if mask is None:
        mask = offset.new_ones(1).expand(b, offset.shape[1] // 2, *args.out_size)
    if not makes_onnx(x):  # a program that runs torchvision's kernels
        offset, mask = _readable(offset, mask, _FAR)

    def conv(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
        spacing = args.spacing or (1, 1)
        return torch.ops.torchvision.deform_conv2d(
            x, weight, offset, mask, x.new_zeros(len(weight)), *args.stride, *args.padding, *spacing, groups,
            offset.shape[1] // (2 * args.kernel_size ** 2), True)

    if not args.has_gains:
        y = conv(x, args.weight, offset, mask, groups)
    elif folds:
        # each image is a group of channels, with a kernel of its own
        weight = sample_kernels(args.weight, args.gains, groups).view(-1, *args.weight.shape[1:])
        x, offset, mask = (t if b == 1 else t.flatten(0, 1).unsqueeze(0) for t in (x, offset, mask))
        y = conv(x, weight, offset, mask, b * groups).view(b, len(args.weight), *args.out_size)
    elif args.is_depthwise:
        # both parts of a channel's kernel at once: the rest, and ones under the mean
        mean, rest = args.split_weight()
        weight = torch.stack((rest, torch.ones_like(rest)), 1).flatten(0, 1)  # (C*2, 1, k, k)
        high, low = conv(x, weight, offset, mask, groups).unflatten(1, (-1, 2)).unbind(2)
        return combine_parts(scale_channels(high, args.gains[2]), scale_channels(low * mean[:, 0], args.gains[0]), args)
    else:
        channels, k = x.shape[1], args.kernel_size
        copies = _copies(channels, k, x.dtype, x.device)
        return convolve_samples(
            args, lambda x: conv(x, copies, offset, mask, channels).view(b, channels, k * k, *args.out_size))
    return y if args.bias is None else y + args.bias[:, None, None]


def forward(args: ConvArgs) -> Tensor:
    if has_few_pixels(args.x):
        return grid_sample.forward(args)  # which does not sample
    full = args.to(accumulation_dtype(args.x.dtype))
    if is_exporting() and _is_convolution(args):  # else in torch's operators too, some dozens more
        return as_dtype(_exported(full), args.x.dtype)
    low_in, _, high_in, _ = full.gains
    b = full.x.shape[0]

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        x, options = x.contiguous(), (full.stride, full.padding, full.spacing, full.groups)
        n = b if torch.compiler.is_compiling() else _at_a_time(b)
        if n == b:
            return sampled_conv2d(x, weight, full.steps, full.mask, *options)
        masks = [None] * b if full.mask is None else full.mask.split(n)
        return torch.cat([
            sampled_conv2d(xs, weight, ps, ms, *options)
            for xs, ps, ms in zip(x.split(n), full.steps.split(n), masks)])

    if full.has_gains and b != 1:
        mean, rest = full.split_weight()
        y = combine_parts(
            conv(scale_channels(full.x, high_in), rest),
            conv(scale_channels(full.x, low_in), mean.expand_as(rest).contiguous()), full)
    else:
        weight = full.weight
        if full.has_gains:
            weight = sample_kernels(weight, full.gains, full.groups).view(weight.shape)
        y = conv(full.x, weight)
        if full.bias is not None:
            y = y + full.bias[:, None, None]
    return once(match_layout(y.to(args.x.dtype), args.x), 'torchvision')
