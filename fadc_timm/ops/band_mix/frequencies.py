"""The real frequencies of one axis, 1, cos 1, sin 1, cos 2, sin 2, ..., and which of them ideal low-passes keep."""
from typing import List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from ..runtime import table_device
from .low_pass import edges

__all__ = ['Frequencies', 'frequencies']


class Frequencies(NamedTuple):
    """The filters along one axis of n points, on the device of their tables: see :func:`table_device`.

    basis: (n, J) of the widest filter, float64. The filter's matrix is basis @ diag(kept / n) @ basis.T.
    kept: (J_f,) per filter, for the first J_f columns of the basis: how many of +k and -k the filter keeps, 0, 1 or 2.
    one_sided: Per filter (k, sign) if the filter keeps only +k or only -k; (0, 0) otherwise.
    """
    basis: Tensor
    kept: List[Tensor]
    one_sided: List[Tuple[int, int]]


def frequencies(n: int, factors: Sequence[int], device: torch.device) -> Frequencies:
    """Of the filters at 1/f of Nyquist on an axis of n points, for maps on a device."""
    device = table_device(device)
    ends = [edges(n, f) for f in factors]
    # one at least, with nothing in it where the filter is empty
    counts = [2 * max(-low, high - 1, 0) + 1 for low, high in ends]
    j = torch.arange(max(counts, default=1), device=device)
    frequency = (j + 1) // 2
    angle = (torch.arange(n, device=device)[:, None] * frequency % n).double() * (2 * torch.pi / n)
    basis = torch.where((j % 2 == 0) & (j > 0), torch.sin(angle), torch.cos(angle))
    kept, one_sided = [], []
    for (low, high), count in zip(ends, counts):
        k = frequency[:count]
        kept.append(((k >= low) & (k < high)).double() + ((-k >= low) & (-k < high) & (k > 0)).double())
        one_sided.append((max(-low, high - 1), low + high - 1) if high > low else (0, 0))
    return Frequencies(basis, kept, one_sided)
