"""The band mix in few nodes of a graph for other runtimes.

Where sizes are known, it is the fused operator's way: analysis, projections, and a last product along the rows that
applies the steps, so that no low-pass is stored. Its tables are constants. On few pixels it is one product with the mix
of the bands' matrices. Where sizes are symbolic, the low-passes are products with tables that the graph computes.
"""
from functools import lru_cache
from typing import List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..onnx_nodes import has_few_pixels, matmul, multiply
from ..runtime import (
    accumulation_dtype,
    are_known,
    as_dtype,
    constant,
    fold_groups,
    unfold_groups,
    without_autocast,
)
from .frequencies import Frequencies, frequencies
from .low_pass import edges, low_pass, low_passes_by_products

__all__ = ['mix_exported_bands']


class _Part(NamedTuple):
    """What a filter passes: the real part of the height's projection times that of the width's.

    Where the filter is one-sided on both axes, the imaginary parts too: the cosine and the sine of one frequency.
    """
    filter: int
    imaginary: bool
    waves: Tuple[int, ...]  # of the width, columns of the basis


@lru_cache(maxsize=256)
def _parts(n: int, m: int, factors: Tuple[int, ...]) -> List[_Part]:
    """The parts of all filters on maps of n times m pixels, in the order in which the products make them."""
    parts = []
    for i, f in enumerate(factors):
        (low, high), (left, right) = edges(n, f), edges(m, f)
        parts.append(_Part(i, False, tuple(range(2 * max(-left, right - 1, 0) + 1))))
        if high > low and right > left and low + high != 1 and left + right != 1:
            k = max(-left, right - 1)
            parts.append(_Part(i, True, (2 * k - 1, 2 * k)))
    return parts


def _turned(filters: Frequencies, i: int) -> Tensor:
    """What the imaginary part of a one-sided projection makes of its cosine and sine: (n, 2)."""
    k, side = filters.one_sided[i]
    cos, sin = filters.basis[:, 2 * k - 1], filters.basis[:, 2 * k]
    return torch.stack((sin, -cos), 1) * (side / len(filters.basis))


@constant
def _table(name: str, n: int, m: int, factors: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table for maps of n times m pixels.

    Args:
        name: 'analysis' (m, J): waves of the width. 'projections' (n*N, n): those of the height, N per row, the real
            parts and the imaginary parts of `_parts`. 'places' (R,): which of the N*J coefficients of a row pass.
            'rows' (m, R): the waves of these.
    """
    rows, cols = (frequencies(size, factors, device) for size in (n, m))
    parts = _parts(n, m, factors)
    if name == 'analysis':
        table = cols.basis
    elif name == 'places':
        at = [j + p * cols.basis.shape[1] for p, part in enumerate(parts) for j in part.waves]
        return torch.tensor(at, device=device)
    elif name == 'projections':
        table = torch.stack([
            _turned(rows, i) @ rows.basis[:, 2 * rows.one_sided[i][0] - 1:][:, :2].t() if imaginary
            else (rows.basis[:, :len(rows.kept[i])] * (rows.kept[i] / n)) @ rows.basis[:, :len(rows.kept[i])].t()
            for i, imaginary, _ in parts], 1).flatten(0, 1)
    else:
        table = torch.cat([
            -_turned(cols, i) if imaginary else cols.basis[:, :len(waves)] * (cols.kept[i] / m)
            for i, imaginary, waves in parts], 1)
    return table.to(dtype).to(device).contiguous()


@constant
def _step_kernel(
        bias: bool, of: Tuple[int, ...], bands: int, filters: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of :func:`_steps`."""
    if bias:
        table = torch.tensor([float(i == bands == filters) for i in of])
    else:
        table = torch.tensor([[2. * ((j == i) - (j == i - 1)) for j in range(bands)] for i in of])[:, :, None, None]
    return table.to(dtype).to(device)


def _steps(maps: Tensor, of: List[int], filters: int) -> Tensor:
    """What multiplies the map, which is 0, and its low-passes, 1 and up: (B, len(of), H, W).

    The steps are twice the differences of the sigmoids (B, M, H, W); the last is 1 - that where no weight is given.
    """
    call = tuple(of), maps.shape[1], filters, maps.dtype, maps.device
    return F.conv2d(maps, _step_kernel(False, *call), _step_kernel(True, *call))


def _of_known_size(x: Tensor, maps: Tensor, factors: List[int]) -> Tensor:
    c, h, w = x.shape[1:]
    parts = _parts(h, w, tuple(factors))
    analysis, projections, places, rows = (
        _table(name, h, w, tuple(factors), x.dtype, x.device) for name in ('analysis', 'projections', 'places', 'rows'))
    steps = _steps(maps, [part.filter + 1 for part in parts for _ in part.waves], len(factors))
    waves = projections @ (x @ analysis).permute(0, 2, 3, 1).flatten(2)  # (B, H*N, J*C)
    waves = waves.view(-1, h, len(parts) * analysis.shape[1], c).index_select(2, places)  # (B, H, R, C)
    y = ((steps.permute(0, 2, 3, 1) * rows) @ waves).permute(0, 3, 1, 2)
    return x * _steps(maps, [0], len(factors)) + y


@constant
def _bands(
        weighted: bool,
        n: int,
        m: int,
        factors: Tuple[int, ...],
        bands: int,
        dtype: torch.dtype,
        device: torch.device,
) -> Tensor:
    """The matrix (n*m, n*m), from the left of which a map is multiplied, of each weighted band, twice; or of the rest.

    Returns:
        (bands, n*m, n*m) or, not weighted, (n*m, n*m).
    """
    pixels = torch.eye(n * m, dtype=torch.float64).view(1, -1, n, m)
    lows = torch.cat([pixels, *low_pass(pixels, list(factors), 'fft')]).flatten(2)
    table = 2 * torch.cat([lows[:-1] - lows[1:], lows[-1:]])[:bands] if weighted else lows[-1]
    return table.to(dtype).to(device)


def _of_few_pixels(x: Tensor, maps: Tensor, factors: List[int]) -> Tensor:
    (h, w), bands = x.shape[2:], maps.shape[1]
    call = h, w, tuple(factors), bands, x.dtype, x.device
    mix = multiply(maps.reshape(-1, bands, 1, h * w), _bands(True, *call)).sum(1)
    if bands == len(factors):  # the lowest band has no weight
        mix = mix + _bands(False, *call)
    return matmul(x.flatten(2), mix).view(x.shape)


def _of_any_size(x: Tensor, maps: Tensor, factors: List[int]) -> Tensor:
    lows, filters = low_passes_by_products(x, factors), len(factors)
    steps = _steps(maps, [1 + i for i in range(filters) for _ in range(lows.shape[2] // filters)], filters)
    return x * _steps(maps, [0], filters) + multiply(lows, steps.unsqueeze(1)).sum(2)


def mix_exported_bands(x: Tensor, maps: Tensor, factors: List[int], groups: int) -> Tensor:
    """:func:`mix_bands` with the weights 2 * sigmoid(maps), in few nodes of a graph for other runtimes.

    Args:
        x: Map (B, C, H, W).
        maps: (B, S*M, H, W): M bands from high to low frequency, for each of S groups of channels.
        factors: Where the spectrum is split, f >= 1, from high to low.
        groups: S.

    Returns:
        (B, C, H, W) in the dtype of x.
    """
    dtype = accumulation_dtype(x.dtype)
    exact, maps = as_dtype(x, dtype), torch.sigmoid(as_dtype(maps, dtype))
    exact, maps = (fold_groups(t, groups) for t in (exact, maps))
    mix = _of_few_pixels if has_few_pixels(x) else _of_known_size if are_known(*x.shape[2:]) else _of_any_size
    with without_autocast(x):
        y = mix(exact, maps, factors)
    return as_dtype(unfold_groups(y, groups), x.dtype)
