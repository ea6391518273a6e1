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
from ..runtime import accumulation_dtype, match_layout
from .arguments import ConvArgs, combine_parts, scale_channels, why_not_transformed
from .folded_gains import sample_kernels


def why_not(args: ConvArgs) -> Optional[str]:
    if args.x.device.type not in ('cpu', 'cuda'):
        return f'torchvision.ops.deform_conv2d does not run on {args.x.device.type}'
    return why_not_transformed()


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
    # It casts positions to integers. So huge offsets are kept within the integers, outside of the map as before, and
    # one that is not finite becomes a mask of NaN.
    exact = offset.detach()
    mask = mask + (exact - exact).unflatten(1, (g * k * k, 2)).sum(2)
    limit = float(x.shape[2] + x.shape[3] + out_h * stride[0] + out_w * stride[1] + padding[0] + padding[1]
                  + k * (spacing[0] + spacing[1]))
    offset = torch.nan_to_num(offset, 0.).clamp(-limit, limit)
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


def forward(args: ConvArgs) -> Tensor:
    full = args.to(accumulation_dtype(args.x.dtype))
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
