"""Which positions of an axis are neighbours."""
from typing import Tuple

import torch
from torch import Tensor

__all__ = ['neighbours']


def neighbours(length: int, kernel_size: int, dilation: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """The window of every position of an axis.

    The positions that leave the same remainder r on division by the dilation are a residue, of
    n = ceil((length - r) / dilation) points. A position attends to `kernel_size` points of its residue: to itself and
    to as many on either side, except near a border, where the window ends at the border.

    Args:
        length: Positions of the axis, at least kernel_size * dilation. It may be symbolic.
        kernel_size: Points of a window, k.
        dilation: Distance of these points.
        device: Of the result.

    Returns:
        Positions (length, k) of the neighbours, and for each its distance in points plus k - 1: the place (length, k)
        in a table of 2k - 1 relative positions.
    """
    position = torch.arange(length, device=device)
    point = torch.div(position, dilation, rounding_mode='floor')
    residue = position - point * dilation
    points = torch.div(length - 1 - residue, dilation, rounding_mode='floor') + 1
    start = torch.minimum((point - kernel_size // 2).clamp(min=0), points - kernel_size)
    window = start[:, None] + torch.arange(kernel_size, device=device)
    return window * dilation + residue[:, None], window - point[:, None] + (kernel_size - 1)
