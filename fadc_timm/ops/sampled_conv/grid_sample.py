"""grid_sample backend: one `F.grid_sample` for all taps and one 1x1 convolution, with standard operators alone.

For devices without another backend, and for exporters. Half dtypes are sampled in float32, as coordinates need it.
"""
from typing import Any, Callable, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derivatives import formula_gradients, wants_formula
from ..runtime import accumulation_dtype, is_exporting, is_transformed, match_layout
from .arguments import ConvArgs, combine_parts, scale_channels
from .reference import bilinear


def why_not(args: ConvArgs) -> Optional[str]:
    return None


def _coordinates(args: ConvArgs, axis: int, dtype: torch.dtype) -> List[Tensor]:
    """Where each of the k*k taps reads on an axis (0 rows, 1 columns), as grid_sample wants it: (B, G, H', W') each."""
    k, size, out = args.kernel_size, args.x.shape[2 + axis], args.out_size[axis]
    steps = args.steps.to(dtype)
    pixel = torch.arange(out, device=steps.device, dtype=dtype) * args.stride[axis]
    pixel = pixel if axis else pixel[:, None]

    def coordinate(tap: int, step: Tensor) -> Tensor:
        # beyond -1 and size every weight is zero, and any finite position has an integer floor
        position = (pixel + args.first_pixel(axis, tap) + step).clamp(-1, size)
        # align_corners=False puts the centre of pixel p at (2p + 1) / size - 1, on maps of one pixel too
        return (2 * position + 1) / size - 1

    places = [t % k if axis else t // k for t in range(k * k)]
    if args.spacing is None:
        of_place = [coordinate(i, steps * (i - k // 2)) for i in range(k)]
        return [of_place[i] for i in places]
    steps = steps.unflatten(1, (args.step_groups, k * k, 2))
    steps = steps + 0 * steps  # an infinite step has no place, where clamping would give it one
    return [coordinate(i, steps[:, :, t, axis]) for t, i in enumerate(places)]


def _merge(t: Tensor) -> Tensor:
    """t (B, G, ...) to (B*G, ...). For one group not by a reshape, which would ask about symbolic sizes."""
    return t[:, 0] if t.shape[1] == 1 else t.flatten(0, 1)


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


def forward(args: ConvArgs, sample: Callable[[Tensor, Tensor], Tensor] = _sample) -> Tensor:
    b, c, h, w = args.x.shape
    k, groups, out_h = args.kernel_size, args.step_groups, args.out_size[0]
    dtype = accumulation_dtype(args.x.dtype)
    # one below the other, (B, G, k*k*H', W') each; by cat, as a reshape would ask about symbolic sizes
    rows, cols = (torch.cat(_coordinates(args, axis, dtype), dim=2) for axis in (0, 1))
    grid = torch.stack((cols, rows), dim=-1)

    x = args.x.to(dtype)
    mean, kernel = args.split_weight() if args.has_gains else (None, args.weight)
    if mean is not None:
        x = torch.cat((scale_channels(x, args.gains[2]), scale_channels(x, args.gains[0])), dim=1)
    # the channels of a step group together: (B, n*C, H, W) -> (B*G, n*C/G, H, W)
    n = x.shape[1] // c
    if groups > 1:
        x = x.unflatten(1, (n, groups, -1)).transpose(1, 2).flatten(2, 3)
        x = x.flatten(0, 1)
    samples = sample(x, _merge(grid)).unflatten(2, (k * k, out_h))  # (B*G, n*C/G, k*k, H', W')
    if args.mask is not None:
        samples = samples * _merge(args.mask.to(dtype).unflatten(1, (groups, 1, k * k)))
    if groups > 1:
        samples = samples.unflatten(0, (b, groups)).unflatten(2, (n, -1)).transpose(1, 2).flatten(2, 3).flatten(1, 2)
    samples = samples.to(args.x.dtype)
    # the taps of a channel are channels of their own, in the order of the kernel's
    high = F.conv2d(samples[:, :c].flatten(1, 2), kernel.flatten(1)[:, :, None, None], groups=args.groups)
    if mean is None:
        y = high if args.bias is None else high + args.bias[:, None, None]
    else:
        y = combine_parts(high, F.conv2d(samples[:, c:].sum(2), mean, groups=args.groups), args)
    return match_layout(y, args.x)
