"""Which pixels the taps read, and with what weight: bilinear sampling as rows of a table, and its gradient.

The taps of a square kernel under one scalar dilation are separable, so positions, corners and weights are made for each
axis, k of them instead of k*k. Everything is laid out with the output positions innermost, where elementwise work runs
at full width, and brought into the order of the table at the end.
"""
from functools import lru_cache
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

__all__ = ['SamplingTable']


class _Axes(NamedTuple):
    """The two neighbours of each tap on the rows' axis and on the columns': (2, k, 2, B, G, H', W')."""
    pixel: Tensor  # clamped into the map
    weight: Tensor  # 0 outside of it
    inside: Tensor  # 1 or 0, in the dtype of weight


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _line(n: int, step: int, start: int, shape: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """start, start + step, ...: n of them, in this shape. Small and wanted at every call, so kept."""
    return (torch.arange(n, dtype=dtype, device=device) * step + start).view(shape)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _first_rows(b: int, batch: int, pixels: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where each sample's groups start in its table of pixels: (B, G, 1, 1)."""
    samples = torch.arange(b, dtype=dtype, device=device) % batch * (pixels * groups)
    return (samples[:, None] + torch.arange(groups, dtype=dtype, device=device))[:, :, None, None]


def _axes(
        dilation: Tensor,
        size: Tuple[int, int],
        kernel_size: int,
        stride: List[int],
        padding: List[int],
        dtype: torch.dtype,
) -> _Axes:
    like = dilation.dtype, dilation.device
    r = kernel_size // 2
    taps = _line(kernel_size, 1, -r, (-1, 1, 1, 1, 1), *like)
    position = dilation.new_empty((2, kernel_size, *dilation.shape))
    for axis, shape in enumerate(((-1, 1), (-1,))):
        centre = _line(dilation.shape[2 + axis], stride[axis], r - padding[axis], shape, *like)
        torch.addcmul(centre, taps, dilation, out=position[axis])
    # beyond -2 and the map there is nothing either, and there any finite position has an integer floor
    position.clamp_(-2, max(size))
    floor = position.floor()
    index = floor.to(dtype)[:, :, None] + _line(2, 1, 0, (2, 1, 1, 1, 1), dtype, dilation.device)
    pixel = index.clamp(min=0)
    for axis, n in enumerate(size):
        pixel[axis].clamp_(max=n - 1)
    inside = (pixel == index).to(dilation.dtype)
    fraction = position.sub_(floor)
    return _Axes(pixel, torch.stack((1 - fraction, fraction), dim=2).mul_(inside), inside)


def _by_tap(mask: Tensor, kernel_size: int, groups: int) -> Tensor:
    """mask (B, G*k*k, H', W') as (k, k, B, G, H', W')."""
    return mask.unflatten(1, (groups, kernel_size, kernel_size)).permute(2, 3, 0, 1, 4, 5)


class SamplingTable:
    """Where every tap reads, and with what weight.

    index: Rows of the table of pixels, ((b % batch * H + y)*W + x)*G + g, int32 (int64 where there are too many), four
        corners per tap: (B, H', W', k, k, G, 4), or as an image (B, H', k, W', k, G, 4).
    weight: Their weights, bilinear times mask, of the same shape and in the dtype of dilation.
    """

    def __init__(
            self,
            dilation: Tensor,
            mask: Optional[Tensor],
            size: Tuple[int, int],
            kernel_size: int,
            stride: List[int],
            padding: List[int],
            as_image: bool,
            batch: int,
    ) -> None:
        """
        Args:
            dilation: (B, G, H', W'), float32 or float64.
            mask: (B, G*k*k, H', W') in the dtype of dilation, or None.
            size: Height and width of the map that is read.
            kernel_size: k.
            stride: Of the rows and of the columns.
            padding: Of the rows and of the columns, at dilation 1.
            as_image: The taps of a position stand as k rows and k columns in an image, else one after another.
            batch: How many samples in a row share a table.
        """
        b, groups = dilation.shape[:2]
        h, w = size
        dtype = torch.int32 if batch * h * w * groups < 2 ** 31 else torch.int64
        self._axes = axes = _axes(dilation, size, kernel_size, stride, padding, dtype)
        self._mask, self._as_image = mask, as_image
        row, col = axes.pixel
        row = row * (w * groups) + _first_rows(b, batch, h * w, groups, dtype, dilation.device)
        # (k, 1, 2, 1, B, G, H', W') with (1, k, 1, 2, B, G, H', W')
        index = row[:, None, :, None] + (col * groups if groups > 1 else col)[None, :, None]
        row, col = axes.weight
        weight = row[:, None, :, None] * col[None, :, None]
        if mask is not None:
            weight *= _by_tap(mask, kernel_size, groups)[:, :, None, None]
        order = (4, 6, 0, 7, 1, 5, 2, 3) if as_image else (4, 6, 7, 0, 1, 5, 2, 3)
        self.index = index.permute(order).flatten(6).contiguous()
        self.weight = weight.permute(order).flatten(6).contiguous()

    def backward(self, grad: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Gradients for dilation and mask from that of `weight`, which has its shape and dtype."""
        mask, (row, col) = self._mask, self._axes.weight
        kernel_size, _, _, groups = row.shape[:4]
        order = (2, 4, 6, 7, 0, 5, 1, 3) if self._as_image else (3, 4, 6, 7, 0, 5, 1, 2)
        grad = grad.unflatten(-1, (2, 2)).permute(order).contiguous()  # (k, k, 2, 2, B, G, H', W')
        by_row = (grad * col[None, :, None]).sum(3)  # (k, k, 2, B, G, H', W')
        by_col = (grad * row[:, None, :, None]).sum(2)
        grad_mask = None
        if mask is not None:
            grad_mask = (by_row * row[:, None]).sum(2)  # (k, k, B, G, H', W')
            grad_mask = grad_mask.permute(2, 3, 0, 1, 4, 5).reshape(mask.shape)
            taps = _by_tap(mask, kernel_size, groups)[:, :, None]
            by_row *= taps
            by_col *= taps
        # the first neighbour's weight falls where the position grows, the second's rises
        slope = torch.cat((-self._axes.inside[:, :, :1], self._axes.inside[:, :, 1:]), dim=2)
        by_row = (by_row.sum(1) * slope[0]).sum(1)  # (k, B, G, H', W')
        by_col = (by_col.sum(0) * slope[1]).sum(1)
        distance = _line(kernel_size, 1, -(kernel_size // 2), (-1,), grad.dtype, grad.device)
        return torch.tensordot(distance, by_row + by_col, 1), grad_mask
