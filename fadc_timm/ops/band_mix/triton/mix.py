"""The band mix on a GPU, forward and backward: matrix products and launches.

The products write to tensors that they are given. Autocast leaves such products alone.
"""
import functools
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ... import triton_support
from ...runtime import allows_tf32
from ...triton_support import Launch, block, cdiv, types_of
from .tables import Tables, tables_of

__all__ = ['Spec', 'backward', 'forward', 'means_shape', 'spec_of']


class Spec(NamedTuple):
    """What determines the launches of a call.

    x: Shape of the map. bands, groups: M and S of the maps of weights (B, M, S, H, W). maps: Their strides.
    act: Whether the weights are 2 * sigmoid of the maps. tf32: Whether float32 products may use TF32.
    """
    x: Tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bands: int
    groups: int
    maps: Tuple[int, ...]
    factors: Tuple[int, ...]
    act: bool
    tf32: bool


def spec_of(x: Tensor, maps: Tensor, factors: Sequence[int], act: bool) -> Spec:
    tf32 = x.dtype == torch.float32 and x.device.type == 'cuda' and allows_tf32()
    bands, groups = maps.shape[1:3]
    return Spec(tuple(x.shape), x.dtype, x.device, bands, groups, maps.stride(), tuple(factors), act, tf32)


_MOST_W = 64  # columns of a program of `mix`


def _block_w(w: int) -> int:
    return block(w, 16, _MOST_W)


def means_shape(b: int, c: int, h: int, w: int) -> Tuple[int, int, int]:
    """Shape of the tensor that holds what each block of y adds to the mean of y."""
    # as many as of blocks of _block_w(w), without asking about a symbolic width
    return b, h * cdiv(w, _MOST_W), c


class _Launches(NamedTuple):
    rows: Launch
    mix: Launch
    mix_gradient: Launch
    rows_gradient: Launch
    coefficients_gradient: Launch


def _tables(spec: Spec) -> Tables:
    return tables_of(spec.x[2], spec.x[3], spec.factors, spec.dtype, spec.device)


@functools.lru_cache(maxsize=1024)
def _launches(
        spec: Spec,
        count_h: int,
        count_w: int,
        columns: int,
        most: int,
        means: Tuple[int, ...],
) -> _Launches:
    from . import kernels
    (b, c, h, w), half = spec.x, spec.dtype.itemsize == 2
    acc, upcast = types_of(spec.dtype)
    how = acc, 'tf32' if spec.tf32 else 'ieee', upcast
    warps = 4 if half else 8
    # with these blocks, a multiprocessor holds three or four programs of 4 warps of half precision
    block_w, own = _block_w(w), c // spec.groups
    block_c = block(own, 16, 128 if half and block_w < 32 else 64)
    all_c = block(c, 16, 128 if half else 64)
    c_blocks = spec.groups * cdiv(own, block_c)
    sizes = h, w, columns, c, spec.groups, *spec.maps
    # the gradient of the maps is contiguous
    plane = h * w
    grad_maps = spec.bands * spec.groups * plane, spec.groups * plane, plane, w, 1
    axes = h, count_h, count_w, columns, c
    filters, bands = len(spec.factors), (spec.bands, spec.act, *how)
    block_h, block_i, block_j = block(h, 16, 64), block(count_h, 16, 64), block(columns, 16, 64)
    mix_j = min(block_j, 64 if half and block_w == 64 else 32)
    return _Launches(
        Launch(kernels.synthesise_rows, (b * columns, cdiv(c, all_c), cdiv(h, block_h)), axes,
               (*how, block_h, block(count_h, 16, 32), all_c), warps),
        Launch(kernels.mix, (b * h, cdiv(w, block_w), c_blocks), sizes,
               (filters, *bands, block_w, mix_j, block_c), warps),
        Launch(kernels.mix_gradient, (b * h, cdiv(w, block_w), spec.groups), (*sizes, *means, *grad_maps),
               (filters, block(filters + 2, 2, 64), *bands, block_w, mix_j, block_c), warps),
        Launch(kernels.rows_gradient, (b * h, cdiv(columns, block_j), c_blocks), (*sizes, *means),
               (filters, *bands, block_w, min(block_w, 32), block_j, block_c), warps),
        Launch(kernels.synthesise_rows_gradient, (b * count_w, cdiv(c, all_c), cdiv(count_h, block_i)), axes,
               (most, *how, block_h, block_i, all_c), warps))


def _launches_of(spec: Spec, t: Tables, grad_means: Optional[Tensor] = None) -> _Launches:
    means = (0, 0, 0) if grad_means is None else grad_means.stride()
    counts = (table.shape[1] for table in (t.basis_h, t.basis_w, t.columns_basis, t.columns_of))
    return _launches(spec, *counts, means)


def _synthesise_rows(spec: Spec, t: Tables, launches: _Launches, coefficients: Tensor) -> Tensor:
    """Coefficients (B, J, J', C) to rows (B, H, columns, C)."""
    b, c, h, _ = spec.x
    rows = coefficients.new_empty((b, h, t.columns_basis.shape[1], c))
    triton_support.launch(launches.rows, coefficients, t.rows_basis, t.frequency, t.matrix, rows)
    return rows


def forward(spec: Spec, x: Tensor, maps: Tensor, y: Tensor, means: Tensor) -> Tensor:
    """Write y (B, H, W, C) and means from x (B, H, W, C), all contiguous. Returns the coefficients (B, J, J', C)."""
    t = _tables(spec)
    launches = _launches_of(spec, t)
    b, c, h, w = spec.x
    count_h, count_w = t.basis_h.shape[1], t.basis_w.shape[1]
    down = x.new_empty((b, count_h, w * c))
    torch.bmm(t.mean_h.expand(b, -1, -1), x.view(b, h, w * c), out=down)
    coefficients = x.new_empty((b, count_h, count_w, c))
    torch.bmm(t.mean_w.expand(b * count_h, -1, -1), down.view(-1, w, c), out=coefficients.view(-1, count_w, c))
    rows = _synthesise_rows(spec, t, launches, coefficients)
    triton_support.launch(launches.mix, x, maps, rows, t.columns_basis, t.filter_of, y, means)
    return coefficients


def backward(
        spec: Spec,
        grad: Tensor,
        grad_means: Optional[Tensor],
        x: Tensor,
        maps: Tensor,
        coefficients: Tensor,
        grad_x: Tensor,
        grad_maps: Tensor,
) -> None:
    """Write grad_x (B, H, W, C) and grad_maps (B, M, S, H, W). All are contiguous except maps and grad_means."""
    t = _tables(spec)
    launches = _launches_of(spec, t, grad_means)
    b, c, h, w = spec.x
    rows = _synthesise_rows(spec, t, launches, coefficients)
    triton_support.launch(
        launches.mix_gradient, grad, grad_means, x, maps, rows, t.columns_basis, t.filter_of, grad_x, grad_maps)
    # the gradients of the rows take the place of the rows
    triton_support.launch(launches.rows_gradient, grad, grad_means, maps, t.columns_basis, t.filter_of, rows)
    total = torch.empty_like(coefficients)
    triton_support.launch(launches.coefficients_gradient, rows, t.rows_basis, t.columns_of, t.matrix, total)
    count_h, count_w = total.shape[1:3]
    down = x.new_empty((b, count_h, w * c))
    torch.bmm(t.basis_w.expand(b * count_h, -1, -1), total.view(-1, count_w, c), out=down.view(-1, w, c))
    grad_x.view(b, h, w * c).baddbmm_(t.basis_h.expand(b, -1, -1), down)
