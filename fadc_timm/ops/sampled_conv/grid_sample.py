"""grid_sample backend: one `F.grid_sample` for all taps and one 1x1 convolution, with standard operators alone.

For devices without another backend, and for exporters. Half dtypes are sampled in float32, as coordinates need it.
"""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derivatives import formula_gradients, wants_formula
from ..onnx_nodes import clamp, grid_sample, has_few_pixels, matmul, multiply
from ..runtime import (
    are_known,
    as_dtype,
    constant,
    fold_groups,
    is_exporting,
    is_transformed,
    literal,
    once_per_graph,
    table_device,
    unfold_groups,
)
from .arguments import ConvArgs
from .folded_gains import has_small_kernels
from .reference import bilinear
from .samples import convolve_samples


def why_not(args: ConvArgs) -> Optional[str]:
    return None


def _coordinates(
        size: Tuple[int, int],
        out_size: Tuple[int, int],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        spacing: Optional[Tuple[int, int]],
        k: int,
        dtype: torch.dtype,
        device: torch.device,
) -> List[Tensor]:
    """Parts of a grid: positions are `start + moves * steps` in pixels, of which `sizes` says how many there are.

    Returns:
        start (k*k*2, H', W'), moves (k*k*2, 1, 1), sizes (k*k*2, 1, 1): per tap a column, then a row. Sizes may be
        symbolic.
    """
    like: Dict[str, Any] = dict(dtype=dtype, device=table_device(device))

    def vector(columns: Sequence[float], rows: Sequence[float]) -> Tensor:
        return literal(tuple(((v,),) for pair in zip(columns, rows) for v in pair), dtype, table_device(device))

    taps = k * k
    places = [t % k for t in range(taps)], [t // k for t in range(taps)]
    ones, zeros = [1.] * taps, [0.] * taps
    sizes = vector(ones, zeros) * size[1] + vector(zeros, ones) * size[0]
    rows, cols = (torch.arange(n, **like) for n in out_size)
    pixels = multiply(cols, vector([stride[1] * v for v in ones], zeros))
    pixels = pixels + multiply(rows[:, None], vector(zeros, [stride[0] * v for v in ones]))
    first = [[k // 2 - p if spacing is None else i * spacing[axis] - p for i in places[1 - axis]]
             for axis, p in ((1, padding[1]), (0, padding[0]))]
    if any(map(any, first)):
        pixels = pixels + vector(*first)
    moves = vector(ones, ones)
    if spacing is None:
        moves = vector(*([float(i - k // 2) for i in along] for along in places))
    return [t if t.device == device else t.to(device) for t in (pixels, moves, sizes)]


def _scaled(*args: Any) -> List[Tensor]:
    """start and moves as F.grid_sample wants them: see :func:`_grid`."""
    start, moves, sizes = _coordinates(*args)
    return [(2 * start + 1) / sizes - 1, 2 * moves / sizes]


@constant
def _constant_coordinates(which: int, *args: Any) -> Tensor:
    *geometry, dtype, device = args
    return _scaled(*geometry, torch.float64, table_device(device))[which].to(dtype).to(device)


_traced_coordinates = once_per_graph(_scaled)


def _geometry(args: ConvArgs, dtype: torch.dtype) -> Tuple[Any, ...]:
    """The arguments of :func:`_coordinates`."""
    size = args.x.shape[2], args.x.shape[3]
    return size, args.out_size, args.stride, args.padding, args.spacing, args.kernel_size, dtype, args.x.device


def _grid(args: ConvArgs, dtype: torch.dtype) -> Tensor:
    """Where the taps read: (B*G, k*k, H'*W', 2)."""
    taps, call = args.kernel_size ** 2, _geometry(args, dtype)
    size, out_size = call[:2]
    steps = fold_groups(as_dtype(args.steps, dtype), args.step_groups)
    if args.spacing is not None:
        steps = steps.unflatten(1, (taps, 2)).flip(2).flatten(1, 2)  # columns before rows
        steps = steps + 0 * steps  # an infinite step has no place, where clamping would give it one
    # align_corners=False puts the centre of pixel p at (2p + 1)/size - 1, on maps of one pixel too
    if not is_exporting():
        start, moves, sizes = _coordinates(*call)
        grid = (2 * (steps * moves + start) + 1) / sizes - 1
    else:  # in few nodes, at the price of a rounding
        start, moves = (_constant_coordinates(i, *call) for i in range(2)) if are_known(*size, *out_size) \
            else _traced_coordinates(*call)
        grid = multiply(steps, moves) + start
    # Beyond -2 and 2 every weight is zero on maps of all sizes, and any finite position has an integer floor.
    grid = clamp(grid, -2., 2.)  # (B*G, k*k*2, H', W')
    return grid.reshape(grid.shape[0], taps, 2, out_size[0] * out_size[1]).permute(0, 1, 3, 2)


def _written_out(x: Tensor, grid: Tensor) -> Tensor:
    """:func:`grid_sample` in operators that have every derivative."""
    cols, rows = (((grid[..., i] + 1) * n - 1) / 2 for i, n in enumerate((x.shape[3], x.shape[2])))
    return bilinear(x, rows, cols)


class _GridSample(torch.autograd.Function):
    """:func:`grid_sample` with second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(x, grid)
        return grid_sample(x, grid)

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
        return grid_sample(x, grid)
    return _GridSample.apply(x, grid)


def differentiable(args: ConvArgs) -> Tensor:
    """:func:`forward` in operators that have every derivative."""
    return forward(args, _written_out)


def _masked_samples(args: ConvArgs, x: Tensor, sample: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of a map x (B, C, H, W), the samples under the mask, as :func:`convolve_samples` wants them."""
    samples = sample(fold_groups(x, args.step_groups), _grid(args, x.dtype))  # (B*G, C/G, k*k, H'*W')
    mask = None if args.mask is None else fold_groups(as_dtype(args.mask, x.dtype), args.step_groups)
    if not has_small_kernels(args):
        samples = samples.view(*samples.shape[:3], *args.out_size)
        mask = None if mask is None else mask.unsqueeze(1)
    elif mask is not None:
        mask = mask.reshape(mask.shape[0], 1, samples.shape[2], samples.shape[3])
    return unfold_groups(samples if mask is None else multiply(samples, mask), args.step_groups)


@constant
def _constant_distances(which: int, *args: Any) -> Tensor:
    """How far the taps are from the rows (0 of the axis of 2) and from the columns (1) of a map of n times n pixels.

    Returns:
        Of 0, start less each row and column (1, 2, n, k*k, H'*W'); of 1, moves (1, 2, 1, k*k, 1).
    """
    *geometry, dtype, device = args
    home = table_device(device)
    exact: Any = *geometry, torch.float64, home
    table = _coordinates(*exact)[which]
    table = table.unflatten(0, (-1, 2)).flatten(2).transpose(0, 1).flip(0)[None, :, None]  # rows before columns
    if which == 0:
        table = table - torch.arange(geometry[0][0], device=home)[:, None, None]
    return table.to(dtype).to(device)


def _samples_of_few_pixels(args: ConvArgs, x: Tensor) -> Tensor:
    """:func:`_masked_samples` of a map x (B, C, n, n), as (B, C, k*k, H', W'): x times a matrix of bilinear weights.

    The weight of a row is `max(1 - distance, 0)`, and so is that of a column.
    """
    n, taps, (h, w), call = x.shape[2], args.kernel_size ** 2, args.out_size, _geometry(args, x.dtype)
    steps = as_dtype(args.steps, x.dtype)
    if args.spacing is None:
        steps = multiply(steps.reshape(-1, 1, 1, 1, h * w), _constant_distances(1, *call))
    else:
        steps = steps.reshape(-1, taps, 2, h * w).transpose(1, 2).unsqueeze(2)
    near = F.relu(1 - (steps + _constant_distances(0, *call)).abs())  # (B*G, 2, n, k*k, H'*W')
    rows, cols = near.split(1, 1)
    if args.mask is not None:
        rows = multiply(rows, as_dtype(args.mask, x.dtype).reshape(-1, 1, 1, taps, h * w))
    weights = multiply(rows.transpose(1, 2), cols).reshape(-1, n * n, taps * h * w)
    samples = matmul(x.reshape(-1, x.shape[1] // args.step_groups, n * n), weights)
    return samples.view(-1, x.shape[1], taps, h, w)


def forward(args: ConvArgs, sample: Callable[[Tensor, Tensor], Tensor] = _sample) -> Tensor:
    if has_few_pixels(args.x):
        return convolve_samples(args, lambda x: _samples_of_few_pixels(args, x))
    return convolve_samples(args, lambda x: _masked_samples(args, x, sample))
