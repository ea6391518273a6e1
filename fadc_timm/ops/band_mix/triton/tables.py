"""Tables of a band mix on a GPU: bases of both axes, and the columns that each filter keeps."""
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kept_tables import KeptTables, prepare
from ..frequencies import frequencies

__all__ = ['Tables', 'padded', 'prepare_tables', 'tables_of']


class Tables(NamedTuple):
    """The tables that the kernels read, for some filters and maps of one size.

    basis_h (H, J), basis_w (W, J'): cosines and sines of both axes, with columns of zeros up to a multiple of 8, as the
        library's products are slow without them. mean_h, mean_w: their transposes, divided by H and by W.
    rows_basis (matrices, H, J): the synthesis along the height, one matrix per filter and per coupling.
    columns_basis (W, columns): the synthesis along the width.
    frequency, matrix, filter_of (columns,): each column's frequency, its matrix in rows_basis, and its filter.
    columns_of (J', most): the columns of each frequency, then -1.
    """
    basis_h: Tensor
    basis_w: Tensor
    mean_h: Tensor
    mean_w: Tensor
    rows_basis: Tensor
    columns_basis: Tensor
    frequency: Tensor
    matrix: Tensor
    filter_of: Tensor
    columns_of: Tensor


def padded(count: int) -> int:
    """Width of a table with `count` frequencies: the next multiple of 8."""
    return -(-count // 8) * 8


def _swapped(pair: Tensor) -> Tensor:
    """From a cosine and a sine (n, 2): the negated sine and the cosine."""
    return torch.stack((-pair[:, 1], pair[:, 0]), dim=1)


def _make_tables(h: int, w: int, factors: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tables:
    rows, cols = (frequencies(n, factors, device) for n in (h, w))
    basis_h, basis_w = (F.pad(f.basis, (0, padded(f.basis.shape[1]) - f.basis.shape[1])) for f in (rows, cols))
    count_h, count_w = basis_h.shape[1], basis_w.shape[1]
    matrices: List[Tensor] = []
    parts: List[Tensor] = []
    columns: List[Tuple[range, int, int]] = []  # of each part: their frequencies, matrix and filter
    for f in range(len(factors)):
        keep_h, keep_w = len(rows.kept[f]), len(cols.kept[f])
        full = torch.zeros(h, count_h, dtype=torch.float64, device=device)
        full[:, :keep_h] = rows.basis[:, :keep_h] * rows.kept[f]
        parts.append(cols.basis[:, :keep_w] * cols.kept[f])
        columns.append((range(keep_w), len(matrices), f))
        matrices.append(full)
        (k, side), (k2, side2) = rows.one_sided[f], cols.one_sided[f]
        if side * side2:
            # Both axes keep one of +k and -k, so two of the four products of exponentials pass. They couple cos cos
            # with sin sin, and cos sin with sin cos; the sides determine the sign.
            coupled = torch.zeros_like(full)
            coupled[:, 2 * k - 1:2 * k + 1] = _swapped(rows.basis[:, 2 * k - 1:2 * k + 1])
            parts.append(-side * side2 * _swapped(cols.basis[:, 2 * k2 - 1:2 * k2 + 1]))
            columns.append((range(2 * k2 - 1, 2 * k2 + 1), len(matrices), f))
            matrices.append(coupled)
    # made on the device, as a CUDA graph cannot capture a copy from the host
    like: Dict[str, Any] = dict(dtype=torch.int32, device=device)
    frequency = torch.cat([torch.arange(own.start, own.stop, **like) for own, _, _ in columns])
    matrix = torch.cat([torch.full((len(own),), i, **like) for own, i, _ in columns])
    filter_of = torch.cat([torch.full((len(own),), f, **like) for own, _, f in columns])
    count, most = len(frequency), max(sum(j in own for own, _, _ in columns) for j in range(count_w))
    is_own = frequency == torch.arange(count_w, **like)[:, None]
    columns_of = torch.where(is_own, torch.arange(count, **like), count).sort(1).values[:, :most]
    columns_of = torch.where(columns_of < count, columns_of, -1)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype).contiguous()

    return Tables(
        cast(basis_h), cast(basis_w), cast(basis_h / h).t(), cast(basis_w / w).t(), cast(torch.stack(matrices)),
        cast(torch.cat(parts, dim=1)), frequency, matrix, filter_of, columns_of.contiguous())


tables_of = KeptTables(_make_tables)


def prepare_tables(x: Tensor, factors: List[int]) -> None:
    """Make the tables for a map while torch makes a graph of a call, if it knows the map's height and width.

    Args:
        x: A fake map (B, C, H, W).
        factors: Of the filters.
    """
    prepare(x, x.shape[2:], lambda: tables_of(x.shape[2], x.shape[3], tuple(factors), x.dtype, x.device))
