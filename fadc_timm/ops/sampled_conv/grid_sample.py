"""grid_sample backend: one `F.grid_sample` for all taps and one 1x1 convolution, with standard operators alone.

For devices without another backend, and for exporters. Half dtypes are sampled in float32, as coordinates need it.
"""
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derivatives import formula_gradients, wants_formula
from ..runtime import (
    accumulation_dtype,
    constant,
    is_exporting,
    is_plain_eager,
    is_transformed,
    match_layout,
    table_device,
)
from .arguments import ConvArgs, combine_parts, sample_kernels, scale_channels
from .reference import bilinear


def why_not(args: ConvArgs) -> Optional[str]:
    return None


def _along(axis: int, values: List[float], like: Dict[str, Any]) -> Tensor:
    """n values on an axis of the map (0 rows, 1 columns) as pairs (n, 2) in the order of a grid, columns first."""
    return torch.tensor([[0., v] if axis == 0 else [v, 0.] for v in values], **like)


def _coordinates(
        size: Sequence[int],
        out_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        spacing: Optional[Sequence[int]],
        k: int,
        which: int,
        dtype: torch.dtype,
        device: torch.device,
) -> Tensor:
    """Parts of a grid, as F.grid_sample wants it: align_corners=False puts the centre of pixel p at (2p + 1)/size - 1.

    which: 0 for the coordinates of the pixels from which the taps of the positions start, (1 or k*k, H', W', 2); 1 for
    what they are moved by, times the steps: (k*k, 1, 1, 2) for dilations, (2,) for offsets, columns first. Sizes may be
    symbolic.
    """
    like = dict(dtype=dtype, device=device)
    parts = []
    for axis, (n, out, s, p) in enumerate(zip(size, out_size, stride, padding)):
        places = [t // k if axis == 0 else t % k for t in range(k * k)]
        if which == 1:
            of_tap = [2.] if spacing else [2. * (i - k // 2) for i in places]
            part = _along(axis, of_tap, like) / n
            parts.append(part[0] if spacing else part[:, None, None])
            continue
        first = k // 2 - p if spacing is None else -p
        pixels = (torch.arange(out, **like) * (2 * s) + (2 * first + 1)) / n - 1
        pixels = (pixels[:, None, None] if axis == 0 else pixels[:, None]) * _along(axis, [1.], like)[0]
        if spacing:
            pixels = pixels + (_along(axis, [2. * i * spacing[axis] for i in places], like) / n)[:, None, None]
        parts.append(pixels)
    coordinates = parts[0] + parts[1]
    return coordinates if which == 1 or spacing else coordinates[None]


@constant
def _constant_coordinates(*args: Any) -> Tensor:
    *geometry, dtype, device = args
    return _coordinates(*geometry, torch.float64, table_device(device)).to(dtype).to(device)


def _grid(args: ConvArgs, dtype: torch.dtype) -> Tensor:
    """Where the taps read: (B*G, k*k*H', W', 2), one tap below the other."""
    k, taps, (h, w) = args.kernel_size, args.kernel_size ** 2, args.out_size
    size = args.x.shape[2], args.x.shape[3]
    known = all(type(n) is int for n in (*size, h, w)) and (is_exporting() or is_plain_eager(args.x))
    base, moves = ((_constant_coordinates if known else _coordinates)(
        size, (h, w), args.stride, args.padding, args.spacing, k, which, dtype, args.x.device) for which in range(2))
    steps, n = args.steps.to(dtype), args.x.shape[0] * args.step_groups
    if args.spacing is None:
        steps = steps.reshape(n, 1, h, w, 1)
    else:
        steps = steps + 0 * steps  # an infinite step has no place, where clamping would give it one
        steps = steps.reshape(n, taps, 2, h, w).permute(0, 1, 3, 4, 2).flip(-1)
    # Beyond -2 and 2 every weight is zero on maps of all sizes, and any finite position has an integer floor.
    return (steps * moves + base).clamp(-2, 2).reshape(n, taps * h, w, 2)


def _grid_sample(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, mode='bilinear', padding_mode='zeros', align_corners=False)


def _written_out(x: Tensor, grid: Tensor) -> Tensor:
    """:func:`_grid_sample` in operators that have every derivative."""
    cols, rows = (((grid[..., i] + 1) * n - 1) / 2 for i, n in enumerate((x.shape[3], x.shape[2])))
    return bilinear(x, rows, cols)


class _GridSample(torch.autograd.Function):
    """:func:`_grid_sample` with second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(x, grid)
        return _grid_sample(x, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if wants_formula(grad):
            return tuple(formula_gradients(_written_out, ctx.saved_tensors, grad))
        return torch.ops.aten.grid_sampler_2d_backward(
            grad, *ctx.saved_tensors, 0, 0, False, list(ctx.needs_input_grad))


def _sample(x: Tensor, grid: Tensor) -> Tensor:
    """x (N, C, H, W) at the coordinates (N, H', W', 2) of `_coordinates`: (N, C, H', W')."""
    if is_transformed():
        return _written_out(x, grid)
    if is_exporting() or torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return _grid_sample(x, grid)
    return _GridSample.apply(x, grid)


def differentiable(args: ConvArgs) -> Tensor:
    """:func:`forward` in operators that have every derivative."""
    return forward(args, _written_out)


# The least high input gain that samples are made with: far below any gain that counts, and no overflow of its inverse.
_LEAST = 1e-12


def forward(args: ConvArgs, sample: Callable[[Tensor, Tensor], Tensor] = _sample) -> Tensor:
    b, c, _, _ = args.x.shape
    (out_h, out_w), taps, groups = args.out_size, args.kernel_size ** 2, args.step_groups
    dtype = accumulation_dtype(args.x.dtype)
    x, (low_in, _, high_in, _) = args.x.to(dtype), args.gains
    split = args.has_gains and not args.is_depthwise
    if split and high_in is not None:
        # The samples of both parts are those of one map: the total gets back the gain that the map was scaled by.
        high_in = high_in.to(dtype).clamp(min=_LEAST)
        x, low_in = scale_channels(x, high_in), (1. if low_in is None else low_in.to(dtype)) / high_in
    if groups > 1:
        x = x.reshape(b * groups, c // groups, *x.shape[2:])
    samples = sample(x, _grid(args, dtype))  # (B*G, C/G, k*k*H', W')
    if args.mask is not None:
        samples = samples * args.mask.to(dtype).reshape(b * groups, 1, taps * out_h, out_w)
    if args.is_depthwise:
        kernel = sample_kernels(args.weight, args.gains, args.groups) if args.has_gains else args.weight
        y = kernel.to(dtype).flatten(-2) @ samples.reshape(b, c, taps, out_h * out_w)
        y = y.reshape(b, c, out_h, out_w).to(args.x.dtype)
        return match_layout(y if args.bias is None else y + args.bias[:, None, None], args.x)
    mean, kernel = args.split_weight() if split else (None, args.weight)
    # the taps of a channel are channels of their own, in the order of the kernel's
    columns = samples.reshape(b, c * taps, out_h, out_w).to(args.x.dtype)
    high = F.conv2d(columns, kernel.reshape(len(kernel), -1, 1, 1), groups=args.groups)
    if mean is None:
        y = high if args.bias is None else high + args.bias[:, None, None]
    else:
        total = samples.reshape(b, c, taps, out_h, out_w).sum(2)
        low = F.conv2d(scale_channels(total, low_in).to(args.x.dtype), mean, groups=args.groups)
        y = combine_parts(high, low, args)
    return match_layout(y, args.x)
