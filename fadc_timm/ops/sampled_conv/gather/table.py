"""Which pixels the taps read, and with what weight: bilinear sampling as rows of a table, and its gradient.

Each tap reads at a pixel plus a step, so the step alone decides between which two pixels of an axis, and with what
weights. The taps of a square kernel under one scalar dilation are separable: steps, neighbours and weights are made for
each axis, k of them instead of k*k. Everything is laid out with the output positions innermost, where elementwise work
runs at full width, and brought into the order of the table at the end.
"""
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ...kept_tables import KeptTables
from ..arguments import step_groups

__all__ = ['SamplingTable']


# Larger steps are clamped to this, so that they fit into int32. They point outside of any map before and after.
_FAR = 2. ** 30


class _Axis(NamedTuple):
    """The two neighbours of each tap on an axis: (k, k, 2, B, G, H', W'), with 1 for k where all taps are alike."""
    pixel: Tensor  # clamped into the map
    weight: Tensor  # 0 outside of it
    inside: Tensor  # 1 or 0, in the dtype of weight


def _make_line(
        n: int, step: int, start: int, shape: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """start, start + step, ...: n of them, in this shape. Small and wanted at every call, so kept."""
    return (torch.arange(n, dtype=dtype, device=device) * step + start).view(shape)


def _make_first_rows(b: int, batch: int, pixels: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where each sample's groups start in its table of pixels: (B, G, 1, 1)."""
    samples = torch.arange(b, dtype=dtype, device=device) % batch * (pixels * groups)
    return (samples[:, None] + torch.arange(groups, dtype=dtype, device=device))[:, :, None, None]


_line, _first_rows = KeptTables(_make_line), KeptTables(_make_first_rows)


def _tap_steps(steps: Tensor, kernel_size: int, spacing: List[int]) -> Tensor:
    """The steps of the taps on both axes: (1, k, B, G, H', W') for dilations, (2, k*k, B, G, H', W') for offsets."""
    if not spacing:
        places = _line(kernel_size, 1, -(kernel_size // 2), (1, -1, 1, 1, 1, 1), steps.dtype, steps.device)
        near = steps.clamp(-_FAR, _FAR) + (steps - steps)  # what is not finite is NaN, not far
        return near * places
    groups = step_groups(steps, kernel_size, spacing)
    return steps.unflatten(1, (groups, kernel_size ** 2, 2)).permute(3, 2, 0, 1, 4, 5)


def _axes(
        steps: Tensor,
        size: Tuple[int, int],
        kernel_size: int,
        stride: List[int],
        padding: List[int],
        spacing: List[int],
        dtype: torch.dtype,
) -> Tuple[_Axis, _Axis]:
    k, device = kernel_size, steps.device
    step = _tap_steps(steps, k, spacing)
    floor = step.floor()
    fraction = step - floor  # of a step that is not finite NaN
    step_pixels = floor.clamp_(-_FAR, _FAR).to(dtype)
    first = step_pixels.new_empty((2, *step.shape[1:]))
    for axis, shape in enumerate(((-1, 1), (-1,))):
        out = steps.shape[2 + axis]
        if spacing:
            pixels = _line(out, stride[axis], -padding[axis], shape, dtype, device)
            taps = _line(k, spacing[axis], 0, ((-1, 1), (1, -1))[axis], dtype, device).expand(k, k).reshape(-1)
            pixels = pixels + taps[:, None, None, None, None]
        else:
            pixels = _line(out, stride[axis], k // 2 - padding[axis], shape, dtype, device)
        torch.add(step_pixels[axis if spacing else 0], pixels, out=first[axis])
    index = torch.stack((first, first + 1), dim=2)
    pixel = index.clamp(min=0)
    for axis, n in enumerate(size):
        pixel[axis].clamp_(max=n - 1)
    inside = (pixel == index).to(steps.dtype)
    weight = torch.stack((1 - fraction, fraction), dim=2) * inside

    def of_axis(t: Tensor, axis: int) -> Tensor:
        return t[axis].unflatten(0, (k, k) if spacing else ((1, k) if axis else (k, 1)))

    row, col = (_Axis(*(of_axis(t, axis) for t in (pixel, weight, inside))) for axis in (0, 1))
    return row, col


def _by_tap(mask: Tensor, kernel_size: int, groups: int) -> Tensor:
    """mask (B, G*k*k, H', W') as (k, k, B, G, H', W')."""
    return mask.unflatten(1, (groups, kernel_size, kernel_size)).permute(2, 3, 0, 1, 4, 5)


def _step_gradient(grad: Tensor, inside: Tensor) -> Tensor:
    """The gradient of steps from that of the weights of their two neighbours (..., 2, B, G, H', W')."""
    # the first neighbour's weight falls where the step grows, the second's rises
    first, second = (grad * inside).unbind(-5)
    return second - first


class SamplingTable:
    """Where every tap reads, and with what weight.

    index: Rows of the table of pixels, ((b % batch * H + y)*W + x)*G + g, int32 (int64 where there are too many), four
        corners per tap: (B, H', W', k, k, G, 4), or as an image (B, H', k, W', k, G, 4).
    weight: Their weights, bilinear times mask, of the same shape and in the dtype of steps.
    """

    def __init__(
            self,
            steps: Tensor,
            mask: Optional[Tensor],
            size: Tuple[int, int],
            kernel_size: int,
            stride: List[int],
            padding: List[int],
            spacing: List[int],
            as_image: bool,
            batch: int,
    ) -> None:
        """
        Args:
            steps: Dilations (B, G, H', W') or with spacing offsets (B, G*k*k*2, H', W'), float32 or float64.
            mask: (B, G*k*k, H', W') in the dtype of steps, or None.
            size: Height and width of the map that is read.
            kernel_size: k.
            stride: Of the rows and of the columns.
            padding: Of the rows and of the columns, of dilations at dilation 1.
            spacing: Of the rows and of the columns of taps that offsets move; empty for dilations.
            as_image: The taps of a position stand as k rows and k columns in an image, else one after another.
            batch: How many samples in a row share a table.
        """
        h, w = size
        groups = step_groups(steps, kernel_size, spacing)
        dtype = torch.int32 if batch * h * w * groups < 2 ** 31 else torch.int64
        self._axes = row, col = _axes(steps, size, kernel_size, stride, padding, spacing, dtype)
        self._mask, self._spacing, self._as_image = mask, spacing, as_image
        first = _first_rows(len(steps), batch, h * w, groups, dtype, steps.device)
        rows, cols = row.pixel * (w * groups) + first, col.pixel * groups if groups > 1 else col.pixel
        index = rows[:, :, :, None] + cols[:, :, None]  # (k, k, 2, 2, B, G, H', W')
        weight = row.weight[:, :, :, None] * col.weight[:, :, None]
        if mask is not None:
            weight *= _by_tap(mask, kernel_size, groups)[:, :, None, None]
        order = (4, 6, 0, 7, 1, 5, 2, 3) if as_image else (4, 6, 7, 0, 1, 5, 2, 3)
        self.index = index.permute(order).flatten(6).contiguous()
        self.weight = weight.permute(order).flatten(6).contiguous()

    def backward(self, grad: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Gradients for steps and mask from that of `weight`, which has its shape and dtype."""
        mask, (row, col) = self._mask, self._axes
        groups = row.weight.shape[4]
        order = (2, 4, 6, 7, 0, 5, 1, 3) if self._as_image else (3, 4, 6, 7, 0, 5, 1, 2)
        grad = grad.unflatten(-1, (2, 2)).permute(order).contiguous()  # (k, k, 2, 2, B, G, H', W')
        kernel_size = len(grad)
        by_row = (grad * col.weight[:, :, None]).sum(3)  # (k, k, 2, B, G, H', W')
        by_col = (grad * row.weight[:, :, :, None]).sum(2)
        grad_mask = None
        if mask is not None:
            grad_mask = (by_row * row.weight).sum(2)  # (k, k, B, G, H', W')
            grad_mask = grad_mask.permute(2, 3, 0, 1, 4, 5).reshape(mask.shape)
            taps = _by_tap(mask, kernel_size, groups)[:, :, None]
            by_row *= taps
            by_col *= taps
        if self._spacing:
            steps = torch.stack([_step_gradient(by_row, row.inside), _step_gradient(by_col, col.inside)])
            return steps.permute(3, 4, 1, 2, 0, 5, 6).flatten(1, 4), grad_mask
        steps = _step_gradient(by_row.sum(1), row.inside[:, 0]) + _step_gradient(by_col.sum(0), col.inside[0])
        distance = _line(kernel_size, 1, -(kernel_size // 2), (-1,), grad.dtype, grad.device)
        return torch.tensordot(distance, steps, 1), grad_mask
