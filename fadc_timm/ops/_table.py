"""Which pixels the taps read, and with what weight: bilinear sampling as rows of a table, and its gradient.

The taps of a square kernel under one scalar dilation are separable, so positions, corners and weights are made for each
axis, k of them instead of k*k. Everything is laid out with the output positions innermost, where elementwise work runs
at full width, and brought into the order of the table at the end.
"""
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

__all__ = ['SamplingTable']


class _Axis(NamedTuple):
    """The two neighbours of each tap on one axis: (k, 2, B, G, H', W')."""
    pixel: Tensor  # clamped into the map
    weight: Tensor  # 0 outside of it
    slope: Tensor  # derivative of the weight by the position


def _axis(
        dilation: Tensor,
        axis: int,
        kernel_size: int,
        size: int,
        stride: int,
        padding: int,
        dtype: torch.dtype,
) -> _Axis:
    r = kernel_size // 2
    centre = torch.arange(dilation.shape[axis], device=dilation.device, dtype=dilation.dtype) * stride + (r - padding)
    taps = torch.arange(-r, r + 1, device=dilation.device, dtype=dilation.dtype)
    position = torch.addcmul(centre[:, None] if axis == 2 else centre, taps[:, None, None, None, None], dilation)
    # beyond -2 and size there is nothing either, and there any finite position has an integer floor
    position.clamp_(-2, size)
    floor = position.floor()
    index = floor.to(dtype)[:, None] + torch.arange(2, device=dilation.device, dtype=dtype).view(2, 1, 1, 1, 1)
    inside = ((index >= 0) & (index < size)).to(dilation.dtype)
    fraction = position.sub_(floor)
    weight = torch.stack((1 - fraction, fraction), dim=1).mul_(inside)
    inside[:, 0].neg_()
    return _Axis(index.clamp_(0, size - 1), weight, inside)


def _by_tap(mask: Tensor, kernel_size: int, groups: int) -> Tensor:
    """mask (B, G*k*k, H', W') as (k, k, B, G, H', W')."""
    return mask.unflatten(1, (groups, kernel_size, kernel_size)).permute(2, 3, 0, 1, 4, 5)


class SamplingTable:
    """Where every tap reads, and with what weight.

    index: Rows of the table of pixels, ((b % batch * H + y)*W + x)*G + g, int32 (int64 where there are too many), four
        corners a tap: (B, H', W', k, k, G, 4), or as an image (B, H', k, W', k, G, 4).
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
        self._row = row = _axis(dilation, 2, kernel_size, h, stride[0], padding[0], dtype)
        self._col = col = _axis(dilation, 3, kernel_size, w, stride[1], padding[1], dtype)
        self._mask, self._as_image = mask, as_image
        first = torch.arange(b, device=dilation.device, dtype=dtype) % batch * (h * w * groups)
        first = (first[:, None] + torch.arange(groups, device=dilation.device, dtype=dtype))[:, :, None, None]
        # (k, 1, 2, 1, B, G, H', W') with (1, k, 1, 2, B, G, H', W')
        index = (row.pixel * (w * groups) + first)[:, None, :, None] + (col.pixel * groups)[None, :, None]
        weight = row.weight[:, None, :, None] * col.weight[None, :, None]
        if mask is not None:
            weight *= _by_tap(mask, kernel_size, groups)[:, :, None, None]
        order = (4, 6, 0, 7, 1, 5, 2, 3) if as_image else (4, 6, 7, 0, 1, 5, 2, 3)
        self.index = index.permute(order).flatten(6).contiguous()
        self.weight = weight.permute(order).flatten(6).contiguous()

    def backward(self, grad: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Gradients for dilation and mask from that of `weight`, which has its shape and dtype."""
        row, col, mask = self._row, self._col, self._mask
        kernel_size, _, _, groups = row.weight.shape[:4]
        order = (2, 4, 6, 7, 0, 5, 1, 3) if self._as_image else (3, 4, 6, 7, 0, 5, 1, 2)
        grad = grad.unflatten(-1, (2, 2)).permute(order).contiguous()  # (k, k, 2, 2, B, G, H', W')
        by_row = (grad * col.weight[None, :, None]).sum(3)  # (k, k, 2, B, G, H', W')
        by_col = (grad * row.weight[:, None, :, None]).sum(2)
        grad_mask = None
        if mask is not None:
            grad_mask = (by_row * row.weight[:, None]).sum(2)  # (k, k, B, G, H', W')
            grad_mask = grad_mask.permute(2, 3, 0, 1, 4, 5).reshape(mask.shape)
            taps = _by_tap(mask, kernel_size, groups)[:, :, None]
            by_row *= taps
            by_col *= taps
        distance = torch.arange(kernel_size, device=grad.device, dtype=grad.dtype) - kernel_size // 2
        by_row = (by_row.sum(1) * row.slope).sum(1)  # (k, B, G, H', W')
        by_col = (by_col.sum(0) * col.slope).sum(1)
        return torch.tensordot(distance, by_row + by_col, 1), grad_mask
