"""The band mix in few nodes of a graph for other runtimes.

Where sizes are known, it is the fused operator's way: analysis, projections, and a last product along the rows that
applies the steps, so that no low-pass is stored. Its tables are constants. Where sizes are symbolic, the low-passes are
products with tables that the graph computes.
"""
from typing import Any, Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import accumulation_dtype, as_dtype, constant, without_autocast
from .frequencies import Frequencies, frequencies
from .low_pass import low_passes_by_products

__all__ = ['mix_exported_bands']


def _waves(n: int, m: int, factors: Tuple[int, ...], device: torch.device) -> Tuple[Frequencies, Frequencies, List]:
    """The filters of both axes, and what they pass, in the order in which the products make it.

    The last list has (filter, is it the imaginary part, the coefficients of the width that enter). A filter passes the
    real part of the height's projection times that of the width's. Where it is one-sided on both axes, it passes the
    imaginary parts too: the cosine and the sine of one frequency.
    """
    rows, cols = frequencies(n, factors, device), frequencies(m, factors, device)
    parts: List[Tuple[int, bool, List[int]]] = []
    for i, kept in enumerate(cols.kept):
        parts.append((i, False, list(range(len(kept)))))
        if rows.one_sided[i][1] * cols.one_sided[i][1] != 0:
            k = cols.one_sided[i][0]
            parts.append((i, True, [2 * k - 1, 2 * k]))
    return rows, cols, parts


def _row_waves(n: int, m: int, factors: Tuple[int, ...]) -> List[int]:
    """Of which filter each column of the table `rows` of :func:`_table` is."""
    return [i for i, _, taken in _waves(n, m, factors, torch.device('cpu'))[2] for _ in taken]


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
            parts and the imaginary parts of `_waves`. 'places' (R,): which of the N*J coefficients of a row pass.
            'rows' (m, R): the waves of these.
    """
    rows, cols, parts = _waves(n, m, factors, device)
    if name == 'analysis':
        table = cols.basis
    elif name == 'places':
        at = [j + p * cols.basis.shape[1] for p, (_, _, taken) in enumerate(parts) for j in taken]
        return torch.tensor(at, device=device)
    elif name == 'projections':
        table = torch.stack([
            _turned(rows, i) @ rows.basis[:, 2 * rows.one_sided[i][0] - 1:][:, :2].t() if imaginary
            else (rows.basis[:, :len(rows.kept[i])] * (rows.kept[i] / n)) @ rows.basis[:, :len(rows.kept[i])].t()
            for i, imaginary, _ in parts], 1).flatten(0, 1)
    else:
        table = torch.cat([
            -_turned(cols, i) if imaginary else cols.basis[:, :len(taken)] * (cols.kept[i] / m)
            for i, imaginary, taken in parts], 1)
    return table.to(dtype).to(device).contiguous()


def _steps(maps: Tensor, of: List[int], count: int) -> Tensor:
    """What multiplies the map (0) and its low-passes 1...count, from the sigmoids (B, M, H, W): (B, len(of), H, W).

    The steps are twice the differences of the sigmoids; the last is 1 - that where no weight is given.
    """
    bands = maps.shape[1]
    like: Dict[str, Any] = dict(dtype=maps.dtype, device=maps.device)
    product = [[2. * ((j == i) - (j == i - 1)) for j in range(bands)] for i in of]
    more = [float(i == bands == count) for i in of]
    return F.conv2d(maps, torch.tensor(product, **like)[:, :, None, None], torch.tensor(more, **like))


def _of_known_size(x: Tensor, maps: Tensor, factors: List[int]) -> Tensor:
    c, h, w = x.shape[1:]
    analysis, projections, places, rows = (
        _table(name, h, w, tuple(factors), x.dtype, x.device) for name in ('analysis', 'projections', 'places', 'rows'))
    first, steps = _steps(maps, [0, *(1 + i for i in _row_waves(h, w, tuple(factors)))], len(factors)).split(
        [1, len(places)], 1)
    waves = projections @ (x @ analysis).permute(0, 2, 3, 1).flatten(2)  # (B, H*N, J*C)
    waves = waves.view(-1, h, len(projections) // h * analysis.shape[1], c).index_select(2, places)  # (B, H, R, C)
    return x * first + ((steps.permute(0, 2, 3, 1) * rows) @ waves).permute(0, 3, 1, 2)


def _of_any_size(x: Tensor, maps: Tensor, factors: List[int]) -> Tensor:
    lows, count = low_passes_by_products(x, factors), len(factors)
    of = [1 + i for i in range(count) for _ in range(lows.shape[2] // count)]
    first, steps = _steps(maps, [0, *of], count).split([1, len(of)], 1)
    return x * first + (lows * steps.unsqueeze(1)).sum(2)


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
    if groups > 1:
        exact, maps = (t.unflatten(1, (groups, -1)).flatten(0, 1) for t in (exact, maps))
    mix = _of_known_size if all(type(n) is int for n in x.shape[2:]) else _of_any_size
    with without_autocast(x):
        y = mix(exact, maps, factors)
    if groups > 1:
        y = y.unflatten(0, (-1, groups)).flatten(1, 2)
    return as_dtype(y, x.dtype)
