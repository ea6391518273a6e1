"""The dense and grouped operator in two steps: kernels write samples as columns, the library multiplies them.

The products write to tensors that they are given, and autocast leaves such products alone; except for those that are
the gradient of the kernel.
"""
import functools
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ... import triton_support
from ...runtime import contiguous_weight, wide_product
from ...triton_support import Launch, block, cdiv
from ..arguments import headroom
from .call import Call, Tile, mask_in
from .sums import gains_gradient, sampling_gradient

__all__ = ['backward', 'blocks', 'forward']

# Positions and channels of a program, and its warps, for half dtypes: the fastest of ten on an H200.
_COLUMNS = 4, 128, 2
_SCATTER = 8, 32, 2
# Positions of a program in the interpreter, whose time is proportional to the number of programs.
_INTERPRETED = 32
# A program of `spread` adds up the gradients of the output gains over this many positions of one sample.
_SPREAD = 128


class _Launches(NamedTuple):
    """The launches of a call. columns and scatter have one per tile."""
    tiles: List[Tile]
    pack: Launch
    columns: List[Launch]
    combine: Launch
    spread: Launch
    scatter: List[Launch]
    unpack: Launch
    scatter_blocks: Tuple[int, int]  # of channels, and of a sample's positions


def blocks(call: Call, sizes: Tuple[int, int, int]) -> Tuple[int, int, int]:
    """Positions and channels of a program, and its warps, from those for half dtypes."""
    positions, channels, warps = sizes
    if triton_support.is_interpreted():
        positions = _INTERPRETED
    wide = call.spec.dtype.itemsize // 2
    return positions, block(call.step_width, 16, max(channels // wide, 16)), warps


@functools.lru_cache(maxsize=1024)
def _launches(call: Call, weight_strides: Tuple[int, ...], fixed: bool) -> _Launches:
    from . import dense_kernels as kernels
    spec = call.spec
    columns_p, columns_c, columns_warps = blocks(call, _COLUMNS)
    scatter_p, scatter_c, scatter_warps = blocks(call, _SCATTER)
    tiles = call.tiles(max(columns_p, scatter_p))
    gains_b = call.c + call.o
    taps_up = headroom(call.taps)
    # in both memory formats the taps of a kernel are one axis
    groups = (call.per_group, call.out_per_group, call.width, call.out_width, *weight_strides[:2], weight_strides[3])
    kernel = call.taps, taps_up, call.split, call.acc, call.upcast
    pack_c, unpack_c = (block(n, 1, max(2048 // taps_up, 1)) for n in (call.width, call.per_group))
    chunks = cdiv(call.area, scatter_p)
    columns, scatter = [], []
    for tile in tiles:
        place = tile.first_sample, tile.first, tile.length, call.h, call.w
        channels = *call.strides, call.c, gains_b, call.width, call.step_width
        columns.append(Launch(
            kernels.columns, (tile.samples * cdiv(tile.length, columns_p), call.channel_blocks(columns_c)),
            (*place, call.out_w, *call.pixels, *channels, spec.base),
            (*call.constants, taps_up, call.upcast, columns_p, columns_c), columns_warps))
        scatter.append(Launch(
            kernels.scatter_columns, (tile.samples * cdiv(tile.length, scatter_p), call.channel_blocks(scatter_c)),
            (*place, call.out_h, call.out_w, *call.pixels, *channels, call.positions,
             tile.first_sample * chunks + tile.first // scatter_p, spec.base),
            (*call.constants, taps_up, fixed, scatter_p, scatter_c), scatter_warps))
    block_o = block(call.o, 16, 64)
    return _Launches(
        tiles=tiles,
        pack=Launch(kernels.pack, (call.o, cdiv(call.width, pack_c)), groups, (*kernel, pack_c)),
        columns=columns,
        combine=Launch(
            kernels.combine, (cdiv(call.positions * call.o, 1024),),
            (call.area, call.c, call.o, gains_b, call.positions * call.o),
            (spec.gains_act, call.acc, call.upcast, 1024)),
        spread=Launch(
            kernels.spread, (call.b * cdiv(call.area, _SPREAD), cdiv(call.o, block_o)),
            (call.area, _SPREAD, call.c, call.o, gains_b), (spec.gains_act, call.acc, call.upcast, 16, block_o)),
        scatter=scatter,
        unpack=Launch(kernels.unpack, (call.o, cdiv(call.per_group, unpack_c)), groups, (*kernel, unpack_c)),
        scatter_blocks=(call.channel_blocks(scatter_c), chunks))


def _pack(call: Call, launches: _Launches, weight: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
    """The kernel split for the products: its rest (bundles, out_width, K*K*width) and mean (bundles, out_width, width).

    Of one bundle they are matrices. Without gains there is no mean, and the rest is the whole kernel.
    """
    rows = (call.o,) if call.bundles == 1 else (call.bundles, call.out_width)
    rest = weight.new_empty((*rows, call.taps * call.width), dtype=call.spec.dtype)
    mean = weight.new_empty((*rows, call.width), dtype=call.spec.dtype) if call.split else None
    triton_support.launch(launches.pack, weight, rest, mean)
    return rest, mean


def _workspace(call: Call, launches: _Launches, like: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
    """Columns (positions, K*K*C) and totals (positions, C) of the largest tile."""
    most = max(tile.positions for tile in launches.tiles)
    return like.new_empty((most, call.taps * call.c)), like.new_empty((most, call.c)) if call.split else None


def _rows(t: Tensor, start: int, count: int) -> Tensor:
    """Some rows of a matrix, which are mostly all of it."""
    return t if t.shape[0] == count else t[start:start + count]


def _by_bundle(call: Call, t: Tensor) -> Tensor:
    """(positions, bundles * n) as (bundles, positions, n)."""
    rows, columns = t.shape
    return t.view(rows, call.bundles, columns // call.bundles).transpose(0, 1)


def _product(call: Call, columns: Tensor, kernel: Tensor, out: Tensor) -> None:
    """columns (positions, bundles*K) times kernel (bundles, out_width, K) or (O, K), into out (positions, O)."""
    if call.bundles == 1:
        torch.mm(columns, kernel.t(), out=out)
    else:
        torch.bmm(_by_bundle(call, columns), kernel.transpose(1, 2), out=_by_bundle(call, out))


def _columns_gradient(call: Call, grad: Tensor, kernel: Tensor, out: Tensor) -> None:
    """The gradient of the columns of :func:`_product`, into out."""
    if call.bundles == 1:
        torch.mm(grad, kernel, out=out)
    else:
        torch.bmm(_by_bundle(call, grad), kernel, out=_by_bundle(call, out))


def _kernel_gradient(call: Call, grad: Tensor, columns: Tensor, into: Optional[Tensor]) -> Tensor:
    """The gradient of the kernel of :func:`_product`, in the dtype that sums have; added to `into`, if there is one."""
    if call.bundles == 1:
        product = wide_product(grad.t(), columns)
    else:
        product = wide_product(_by_bundle(call, grad).transpose(1, 2), _by_bundle(call, columns))
    return product if into is None else into.add_(product)


def _spoil(scale: Optional[Tensor], product: Tensor) -> None:
    """Make a scale NaN, in place, if a product is not finite: the whole numbers that are added up have no NaN."""
    if scale is not None:
        scale += 0 * product.abs().amax()


def forward(
        call: Call,
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        steps: Tensor,
        mask: Optional[Tensor],
        low: Optional[Tensor],
        high: Optional[Tensor],
        y: Tensor,
        save: bool,
) -> Tuple[Optional[Tensor], Optional[Tensor], Tensor, Optional[Tensor]]:
    """Write y (B, H', W', O) from x (B, H, W, C), both contiguous.

    Returns:
        If save and there are gains, the high and the low part of the output (positions, O) before the output gains,
        otherwise twice None; and rest and mean of the kernel, as :func:`_pack` gives them.
    """
    save = save and call.split
    weight = contiguous_weight(weight)
    launches = _launches(call, weight.stride(), False)
    rest, mean = _pack(call, launches, weight)
    cols, totals = _workspace(call, launches, x)
    y = y.view(call.positions, call.o)
    high_part = torch.empty_like(y) if save else y
    low_part = torch.empty_like(y) if call.split else y
    mask = mask_in(steps, mask, call.step_groups, call.joint)
    start = 0
    for tile, columns in zip(launches.tiles, launches.columns):
        n = tile.positions
        triton_support.launch(columns, x, steps, mask, low, high, cols, totals)
        _product(call, _rows(cols, 0, n), rest, _rows(high_part, start, n))
        if mean is not None and totals is not None:
            _product(call, _rows(totals, 0, n), mean, _rows(low_part, start, n))
        start += n
    if call.split:
        triton_support.launch(launches.combine, high_part, low_part, low, high, bias, y)
    elif bias is not None:
        y += bias
    return *((high_part, low_part) if save else (None, None)), rest, mean


def backward(
        call: Call,
        grad: Tensor,
        parts: Tuple[Optional[Tensor], Optional[Tensor]],
        x: Tensor,
        weight: Tensor,
        packed: Tuple[Optional[Tensor], Optional[Tensor]],
        bias: Optional[Tensor],
        steps: Tensor,
        mask: Optional[Tensor],
        low: Optional[Tensor],
        high: Optional[Tensor],
        grad_x: Tensor,
        scale: Optional[Tensor],
        wants_weight: bool,
) -> List[Optional[Tensor]]:
    """Gradients of weight (if wanted), bias, steps, mask, low and high from grad (B, H', W', O) contiguous.

    The gradient of x is added to grad_x (B, H, W, C), as whole multiples of 1/scale if there is a scale. packed: What
    :func:`forward` made of the weight, or twice None.
    """
    weight = contiguous_weight(weight)
    launches = _launches(call, weight.stride(), scale is not None)
    rest, mean = packed
    if rest is None:
        rest, mean = _pack(call, launches, weight)
    cols, totals = _workspace(call, launches, x)
    grad = grad.view(call.positions, call.o)
    channel_blocks, chunks = launches.scatter_blocks

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=call.wide, device=x.device)

    sampling = empty(channel_blocks, call.taps + call.step_channels, call.positions)
    of_input = of_output = None
    grad_high = grad_low = grad
    if call.split:
        grad_high, grad_low = torch.empty_like(grad), torch.empty_like(grad)
        of_input = empty(call.b, chunks, 2, call.c)
        of_output = empty(call.b, cdiv(call.area, _SPREAD), 3, call.o)
        triton_support.launch(launches.spread, grad, *parts, low, high, grad_high, grad_low, of_output)
    masks = mask_in(steps, mask, call.step_groups, call.joint)
    grad_rest = grad_mean = None
    start = 0
    for tile, columns, scatter in zip(launches.tiles, launches.columns, launches.scatter):
        n = tile.positions
        triton_support.launch(columns, x, steps, masks, low, high, cols, totals)
        # the gradients of the columns take the place of the columns
        g, of_tile = _rows(grad_high, start, n), _rows(cols, 0, n)
        if wants_weight:
            grad_rest = _kernel_gradient(call, g, of_tile, grad_rest)
        _columns_gradient(call, g, rest, of_tile)
        _spoil(scale, of_tile)
        if mean is not None and totals is not None:
            g, of_tile = _rows(grad_low, start, n), _rows(totals, 0, n)
            if wants_weight:
                grad_mean = _kernel_gradient(call, g, of_tile, grad_mean)
            _columns_gradient(call, g, mean, of_tile)
            _spoil(scale, of_tile)
        triton_support.launch(
            scatter, x, steps, masks, low, high, cols, totals, grad_x, sampling, of_input, scale)
        start += n
    grad_weight = grad_bias = None
    if grad_rest is not None:
        grad_weight = torch.empty_like(weight)
        triton_support.launch(launches.unpack, grad_rest, grad_mean, grad_weight)
    if bias is not None:
        grad_bias = grad.sum(0) if of_output is None else of_output[:, :, 2].sum((0, 1))
    return [
        grad_weight, grad_bias, *sampling_gradient(call, sampling, steps, mask),
        *gains_gradient(call, of_input, of_output, low, high)]
