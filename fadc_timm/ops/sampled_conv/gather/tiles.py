"""Sampling tile by tile: a tile's samples, their products with a kernel, and the transposes of both.

The map is a table of pixels in rows of channels, and a sample is a weighted bag of four of its rows.
"""
import math
from typing import Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import accumulation_dtype
from ..arguments import headroom, step_groups
from .table import SamplingTable

__all__ = ['Scatter', 'Tile', 'Tiling', 'bags_of_total', 'corner_dots']

# Bytes of samples in a tile: few enough to stay in cache, and not fewer, as each tile has a fixed cost. Beyond 32 MB
# glibc gives every buffer back to the system when it is freed, and faulting new pages in costs more than filling them.
_TILE_BYTES = 8 * 2 ** 20


class Tile:
    """Some rows of the output, in samples that share a table: b samples, n rows."""

    def __init__(self, tiling: 'Tiling', samples: slice, rows: slice) -> None:
        self.tiling, self.samples, self.rows = tiling, samples, rows
        self.index, self.sampling = tiling.index[samples, rows], tiling.sampling[samples, rows]
        self.b, self.n = self.index.shape[:2]

    def of(self, t: Tensor) -> Tensor:
        """The tile's part of t (B, H', W', ...)."""
        return t[self.samples, self.rows]

    def sample(self, table: Tensor) -> Tensor:
        """Samples of all taps: (b, n, W', k, k, C), or as an image (b, n, k, W', k, C)."""
        bags = F.embedding_bag(
            self.index.reshape(-1, 4), table, mode='sum', per_sample_weights=self.sampling.reshape(-1, 4))
        return bags.view(*self.index.shape[:5], self.tiling.c)

    def total(self, table: Tensor) -> Tensor:
        """Samples added up over the taps, divided by `tiling.headroom`: (b, n, W', C)."""
        order = (0, 1, 3, 5, 2, 4, 6) if self.tiling.as_image else (0, 1, 2, 5, 3, 4, 6)
        index, sampling = (t.permute(order).reshape(-1, 4 * self.tiling.k ** 2)
                           for t in (self.index, self.sampling / self.tiling.headroom))
        return F.embedding_bag(index, table, mode='sum', per_sample_weights=sampling).view(
            self.b, self.n, self.tiling.out_w, self.tiling.c)

    def convolve(self, taps: Tensor, kernel: Tensor) -> Tensor:
        """Samples times kernel (O, C/groups, k, k): (b, n, W', O)."""
        if self.tiling.as_image:
            y = F.conv2d(self._image(taps), kernel, stride=kernel.shape[-1], groups=self.tiling.groups)
            return y.permute(0, 2, 3, 1)
        rows = _as_rows(kernel)
        return _matmul(taps.view(-1, rows.shape[1]), rows).view(self.b, self.n, -1, len(rows))

    def convolve_backward(self, grad: Tensor, taps: Tensor, kernel: Tensor) -> Tuple[Tensor, Tensor]:
        """Gradients of the taps and of the kernel, in their shapes, from that of the product (b, n, W', O).

        The first may take the place of the taps.
        """
        k = kernel.shape[-1]
        if self.tiling.groups == len(kernel) == self.tiling.c and self.tiling.as_image and taps.dim() == 6:
            # depthwise: two products by element, for which oneDNN takes tenfold
            into_rows = [(taps[:, :, i] * grad[:, :, :, None]).sum((0, 1, 2)) for i in range(k)]
            by_tap = kernel[:, 0].permute(1, 2, 0).contiguous()
            torch.mul(grad[:, :, None, :, None], by_tap[:, None], out=taps)
            return taps, torch.stack(into_rows).permute(2, 0, 1)[:, None]
        if self.tiling.as_image:
            into_taps, into_kernel, _ = torch.ops.aten.convolution_backward(
                grad.permute(0, 3, 1, 2), self._image(taps), kernel, None, [k, k], [0, 0], [1, 1], False, [0, 0],
                self.tiling.groups, [True, True, False])
            # CUDA's float64 convolutions are contiguous, whatever they are given
            return into_taps.permute(0, 2, 3, 1).contiguous().view(taps.shape), into_kernel
        grad = grad.reshape(-1, len(kernel))
        into_kernel = _matmul(grad.t(), taps.view(len(grad), -1).t()).view(len(kernel), k, k, -1)
        return _matmul(grad, _as_rows(kernel).t()).view(taps.shape), into_kernel.permute(0, 3, 1, 2)

    def _image(self, taps: Tensor) -> Tensor:
        """Taps as an image, or a total as it is, channels_last: (b, C, n*k, W'*k)."""
        return (taps.flatten(3, 4).flatten(1, 2) if taps.dim() == 6 else taps).permute(0, 3, 1, 2)


def _as_rows(kernel: Tensor) -> Tensor:
    """kernel (O, C, k, k) as (O, k*k*C), a view where the kernel is channels_last."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T, by oneDNN where torch has it: on CPUs that are not Intel's its products are faster than MKL's."""
    if a.device.type == 'cpu' and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, 'none', [], '')
    return a @ b.t()


class Tiling:
    """The sampling table of a call, and the tiles to work in."""

    def __init__(
            self,
            x: Tensor,
            steps: Tensor,
            mask: Optional[Tensor],
            kernel_size: int,
            stride: List[int],
            padding: List[int],
            spacing: List[int],
            groups: int,
            single: bool,
    ) -> None:
        """Arguments as those of the operator; single: no samples share a table."""
        self.b, self.c, self.h, self.w = x.shape
        self.k, self.groups, self.headroom = kernel_size, groups, headroom(kernel_size ** 2)
        self.totals_per_mean = kernel_size ** 2 / self.headroom  # a total, divided by it, is a mean over the taps
        self.step_groups = step_groups(steps, kernel_size, spacing)
        self.out_h, self.out_w = steps.shape[2:]
        # a grouped convolution takes the taps as an image, a dense one as the rows of a matrix product
        self.as_image = groups > 1
        row_bytes = self.out_w * kernel_size ** 2 * self.c * x.element_size()
        tile_rows = max(1, _TILE_BYTES // max(1, row_bytes))
        self.batch = 1 if single else max(1, tile_rows // self.out_h)
        # tiles of equal height, rather than a small one at the end
        self.tile_rows = -(-self.out_h // -(-self.out_h // tile_rows))
        dtype = accumulation_dtype(x.dtype)
        self._table = SamplingTable(
            steps.to(dtype).contiguous(), None if mask is None else mask.to(dtype).contiguous(), (self.h, self.w),
            kernel_size, stride, padding, spacing, self.as_image, self.batch)
        self.index, self.sampling = self._table.index, self._table.weight.to(x.dtype)

    def table(self, x: Tensor) -> Tensor:
        """x (b, H, W, C) as a table (b*H*W*G, C/G)."""
        return x.view(-1, self.c // self.step_groups)

    def batches(self) -> Iterator[slice]:
        """Samples that share a table."""
        starts = range(0, self.b if self.out_w * self.c else 0, self.batch)
        return (slice(start, min(start + self.batch, self.b)) for start in starts)

    def tiles(self, samples: slice) -> Iterator[Tile]:
        starts = range(0, self.out_h, self.tile_rows)
        return (Tile(self, samples, slice(top, min(top + self.tile_rows, self.out_h))) for top in starts)

    def backward(self, grad_sampling: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Gradients of steps and mask, float32 or float64, from those of the table's weights."""
        return self._table.backward(grad_sampling.to(self._table.weight.dtype))


class Scatter:
    """The transpose of sampling a tile: adds each bag's gradient to the rows of the table that it was made of."""

    def __init__(self, tile: Tile, table: Tensor) -> None:
        row, order = tile.index.flatten().sort(stable=True)
        first = torch.arange(len(table) + 1, device=row.device, dtype=row.dtype)
        self.first = torch.searchsorted(row, first, out_int32=row.dtype == torch.int32)
        self.bag = order.to(row.dtype) // 4
        self.sampling = tile.sampling.flatten()[order]

    def add(self, grad_table: Tensor, bags: Tensor, bag_of: Optional[Tensor] = None) -> None:
        """Add to grad_table (rows, C/G) the gradient of bags (any, C/G), of which the tile's are bag_of or 0, 1, ..."""
        bag = self.bag if bag_of is None else bag_of[self.bag]
        grad_table += F.embedding_bag(
            bag, bags, self.first, mode='sum', per_sample_weights=self.sampling, include_last_offset=True)


def corner_dots(tile: Tile, table: Tensor, bags: Tensor, bag_of: Optional[Tensor] = None) -> Tensor:
    """Product of each bag's gradient (any, C/G) with each row that it is made of: the gradient of the row's weight."""
    index = tile.index
    if bag_of is None:
        bag_of = torch.arange(index.numel() // 4, device=index.device, dtype=index.dtype)
    unread = torch.zeros(1, device=index.device, dtype=index.dtype)  # offsets, which bag_of stands for
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        bags, table, index.reshape(-1), unread, bag_of.repeat_interleave(4), 0, -1).view(index.shape)


def bags_of_total(tile: Tile) -> Tensor:
    """For each bag of :meth:`Tile.sample` its position and step group: the bag of :meth:`Tile.total`."""
    *shape, _ = tile.index.shape
    kept = (0, 1, 3, 5) if tile.tiling.as_image else (0, 1, 2, 5)
    numbered = [n if i in kept else 1 for i, n in enumerate(shape)]
    count = math.prod(numbered)
    numbers = torch.arange(count, device=tile.index.device, dtype=tile.index.dtype)
    return numbers.view(numbered).expand(shape).reshape(-1)
