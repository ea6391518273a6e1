"""Convolution over bilinear samples, as an operator of torch that autograd, torch.compile and FLOP counters can see.

The map is a table of pixels in rows of channels, and a sample is a weighted bag of four of its rows. Samples are made a
tile at a time, multiplied by the kernel and forgotten; the backward pass makes them again. So neither pass holds k*k
values a pixel, and the tile stays in cache.
"""
from typing import Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._table import sampling_table, sampling_table_backward
from .case import accumulation_dtype

__all__ = ['sampled_conv2d']

# Bytes of samples in a tile. Beyond 32 MB glibc maps every buffer anew, and faulting its pages in costs more than
# filling them.
_TILE_BYTES = 8 * 2 ** 20


class _Plan:
    """What both passes share: the sampling table of a call, and the tiles to work in."""

    def __init__(self, x: Tensor, dilation: Tensor, mask: Optional[Tensor], weight: Tensor, stride: List[int],
                 padding: List[int], groups: int) -> None:
        self.b, self.c, self.h, self.w = x.shape
        self.k, self.o, self.groups = weight.shape[-1], weight.shape[1], groups
        self.dilation_groups, self.out_h, self.out_w = dilation.shape[1:]
        self.per_sample = weight.shape[0] > 1
        # a grouped convolution takes the taps as an image, a dense one as the rows of a matrix product
        self.as_image = groups > 1
        accumulate = accumulation_dtype(x.dtype)
        self.table_args = (
            dilation.to(accumulate), None if mask is None else mask.to(accumulate), (self.h, self.w), self.k, stride,
            padding, self.as_image)
        index, sampling = sampling_table(*self.table_args)
        self.index, self.sampling = index, sampling.to(x.dtype)
        self.row_bytes = self.out_w * self.k ** 2 * self.c * x.element_size()

    def rows_of(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) as the table (B*H*W*G, C/G)."""
        return x.permute(0, 2, 3, 1).reshape(-1, self.c // self.dilation_groups)

    def tiles(self) -> Iterator[Tuple[slice, slice]]:
        """Samples and output rows of each tile: several whole samples, or some rows of one."""
        if self.out_h * self.out_w == 0:
            return
        batch = 1 if self.per_sample else max(1, _TILE_BYTES // (self.out_h * self.row_bytes))
        rows = self.out_h if batch > 1 else max(1, _TILE_BYTES // self.row_bytes)
        for start in range(0, self.b, batch):
            for top in range(0, self.out_h, rows):
                yield slice(start, min(start + batch, self.b)), slice(top, min(top + rows, self.out_h))

    def sample(self, table: Tensor, index: Tensor, sampling: Tensor) -> Tensor:
        """Samples of a tile: (b, C, k*h', k*W') channels_last as an image, else (b*h'*W', k*k*C)."""
        bags = F.embedding_bag(index.reshape(-1, 4), table, mode='sum', per_sample_weights=sampling.reshape(-1, 4))
        if self.as_image:
            b, h = index.shape[:2]
            return bags.view(b, h * self.k, self.out_w * self.k, self.c).permute(0, 3, 1, 2)
        return bags.view(-1, self.k ** 2 * self.c)

    def taps_together(self, t: Tensor) -> Tensor:
        """A tile of the table with all taps of a position and dilation group in one bag: (b*h'*W'*G, k*k*4)."""
        t = t.permute(0, 1, 3, 5, 2, 4, 6) if self.as_image else t.permute(0, 1, 2, 5, 3, 4, 6)
        return t.reshape(-1, self.k ** 2 * 4)

    def kernel(self, weight: Tensor, samples: slice) -> Tensor:
        """Kernel of a tile: (O, C/groups, k, k), or for the matrix product (O, k*k*C)."""
        kernel = weight[samples.start if self.per_sample else 0]
        return kernel if self.as_image else kernel.permute(0, 2, 3, 1).reshape(self.o, -1)


def _scaled(x: Tensor, scale: Optional[Tensor]) -> Tensor:
    return x if scale is None else x * scale[:, :, None, None]


@torch.library.custom_op('fadc_timm::sampled_conv2d', mutates_args=())
def sampled_conv2d(
        x: Tensor,
        dilation: Tensor,
        mask: Optional[Tensor],
        weight: Tensor,
        scale: Optional[Tensor],
        with_total: bool,
        stride: List[int],
        padding: List[int],
        groups: int,
) -> Tuple[Tensor, Tensor]:
    """Convolution over bilinear samples at the taps of each output position.

    Args:
        x: Map (B, C, H, W), best channels_last; another layout costs one copy.
        dilation: (B, G, H', W').
        mask: (B, G*k*k, H', W') or None.
        weight: (N, O, C/groups, k, k), a kernel for each sample or, N = 1, one for all.
        scale: Scale of the input channels (B, C) or None.
        with_total: Return the total too.
        stride: Of the rows and of the columns.
        padding: Of the rows and of the columns, at dilation 1.
        groups: Convolution groups.

    Returns:
        The convolution (B, O, H', W') of the scaled map; and its samples added up over the taps, but unscaled,
        (B, C, H', W'), or with no channels where they are not wanted. Both channels_last.
    """
    plan = _Plan(x, dilation, mask, weight, stride, padding, groups)
    y = x.new_empty(plan.b, plan.out_h, plan.out_w, plan.o)
    total = x.new_empty(plan.b, plan.out_h, plan.out_w, plan.c if with_total else 0)
    table = plan.rows_of(_scaled(x, scale))
    unscaled = plan.rows_of(x) if with_total else table
    for samples, rows in plan.tiles():
        index, sampling = plan.index[samples, rows], plan.sampling[samples, rows]
        taps, kernel = plan.sample(table, index, sampling), plan.kernel(weight, samples)
        out = y[samples, rows]
        if plan.as_image:
            out.copy_(F.conv2d(taps, kernel, stride=plan.k, groups=groups).permute(0, 2, 3, 1))
        else:
            torch.mm(taps, kernel.t(), out=out.view(-1, plan.o))
        if with_total:
            out = total[samples, rows]
            out.copy_(F.embedding_bag(
                plan.taps_together(index), unscaled, mode='sum', per_sample_weights=plan.taps_together(sampling),
            ).view(out.shape))
    return y.permute(0, 3, 1, 2), total.permute(0, 3, 1, 2)


@sampled_conv2d.register_fake
def _(x, dilation, mask, weight, scale, with_total, stride, padding, groups):
    b, _, h, w = dilation.shape
    y = x.new_empty(b, h, w, weight.shape[1])
    total = x.new_empty(b, h, w, x.shape[1] if with_total else 0)
    return y.permute(0, 3, 1, 2), total.permute(0, 3, 1, 2)


class _Scatter:
    """The transpose of sampling in a tile: adds each bag's gradient to the rows of the table that it was made of."""

    def __init__(self, plan: _Plan, index: Tensor, sampling: Tensor, samples: slice) -> None:
        rows = plan.h * plan.w * plan.dilation_groups
        self.first, self.count = samples.start * rows, (samples.stop - samples.start) * rows
        row, order = index.flatten().sort(stable=True)
        start = torch.arange(self.first, self.first + self.count + 1, device=row.device, dtype=row.dtype)
        self.offsets = torch.searchsorted(row, start, out_int32=row.dtype == torch.int32)
        self.bag = order.to(row.dtype) // 4
        self.weight = sampling.flatten()[order]

    def add(self, table: Tensor, bags: Tensor, bag_of: Optional[Tensor] = None) -> None:
        """Add to table (rows, C/G) the gradient of bags; bag_of maps the bags of the tile to these."""
        bag = self.bag if bag_of is None else bag_of[self.bag]
        table[self.first:self.first + self.count] += F.embedding_bag(
            bag, bags, self.offsets, mode='sum', per_sample_weights=self.weight, include_last_offset=True)


def _corner_dots(bags: Tensor, table: Tensor, index: Tensor, bag_of: Tensor) -> Tensor:
    """Product of each bag's gradient with each row that it was made of, the gradient of that row's weight."""
    offsets = torch.zeros(1, device=index.device, dtype=index.dtype)  # not read where bag_of is given
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        bags, table, index.reshape(-1), offsets, bag_of, 0, -1).view(index.shape)


@torch.library.custom_op('fadc_timm::sampled_conv2d_backward', mutates_args=())
def sampled_conv2d_backward(
        grad_y: Tensor,
        grad_total: Tensor,
        x: Tensor,
        dilation: Tensor,
        mask: Optional[Tensor],
        weight: Tensor,
        scale: Optional[Tensor],
        with_total: bool,
        stride: List[int],
        padding: List[int],
        groups: int,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`sampled_conv2d` for x, dilation, mask, weight and scale; empty for those that are None."""
    plan = _Plan(x, dilation, mask, weight, stride, padding, groups)
    k, width = plan.k, plan.c // plan.dilation_groups
    grad_y, grad_total = grad_y.permute(0, 2, 3, 1), grad_total.permute(0, 2, 3, 1)
    table = plan.rows_of(_scaled(x, scale))
    unscaled = plan.rows_of(x) if with_total else table
    grad_table = torch.zeros_like(table)
    grad_unscaled = torch.zeros_like(table) if with_total else table
    kernel_shape = weight.shape if plan.as_image else (weight.shape[0], plan.o, k * k * plan.c)
    grad_kernel = x.new_zeros(kernel_shape)
    grad_sampling = torch.empty_like(plan.sampling)
    for samples, rows in plan.tiles():
        index, sampling = plan.index[samples, rows], plan.sampling[samples, rows]
        taps, kernel, grad = plan.sample(table, index, sampling), plan.kernel(weight, samples), grad_y[samples, rows]
        which = samples.start if plan.per_sample else 0
        if plan.as_image:
            bags, into_kernel, _ = torch.ops.aten.convolution_backward(
                grad.permute(0, 3, 1, 2), taps, kernel, None, [k, k], [0, 0], [1, 1], False, [0, 0], groups,
                [True, True, False])
            grad_kernel[which] += into_kernel
            bags = bags.permute(0, 2, 3, 1)
        else:
            grad = grad.reshape(-1, plan.o)
            bags = grad @ kernel
            grad_kernel[which].addmm_(grad.t(), taps)
        bags = bags.reshape(-1, width)
        numbers = torch.arange(index.numel() // 4, device=index.device, dtype=index.dtype).view(index.shape[:-1])
        dots = _corner_dots(bags, table, index, numbers.view(-1, 1).expand(-1, 4).reshape(-1))
        scatter = _Scatter(plan, index, sampling, samples)
        scatter.add(grad_table, bags)
        if with_total:
            bags = grad_total[samples, rows].reshape(-1, width)
            positions = torch.arange(bags.shape[0], device=index.device, dtype=index.dtype)
            shape = [n if i in ((0, 1, 3, 5) if plan.as_image else (0, 1, 2, 5)) else 1
                     for i, n in enumerate(index.shape[:-1])]
            bag_of = positions.view(shape).expand(index.shape[:-1]).reshape(-1)
            dots += _corner_dots(bags, unscaled, index, bag_of[:, None].expand(-1, 4).reshape(-1))
            scatter.add(grad_unscaled, bags, bag_of)
        grad_sampling[samples, rows] = dots
    grad_dilation, grad_mask = sampling_table_backward(grad_sampling.to(plan.table_args[0].dtype), *plan.table_args)

    grad_x = grad_table.view(plan.b, plan.h, plan.w, plan.c).permute(0, 3, 1, 2)
    grad_scale = x.new_empty(0)
    if scale is not None:
        grad_scale = (grad_x * x).sum((2, 3))
        grad_x = _scaled(grad_x, scale)
    if with_total:
        grad_x = grad_x + grad_unscaled.view(plan.b, plan.h, plan.w, plan.c).permute(0, 3, 1, 2)
    if not plan.as_image:
        grad_kernel = grad_kernel.view(-1, plan.o, k, k, plan.c).permute(0, 1, 4, 2, 3)
    return (
        grad_x.contiguous(memory_format=torch.channels_last), grad_dilation.to(dilation.dtype).contiguous(),
        x.new_empty(0) if mask is None or grad_mask is None else grad_mask.to(mask.dtype).contiguous(),
        grad_kernel.contiguous(), grad_scale)


@sampled_conv2d_backward.register_fake
def _(grad_y, grad_total, x, dilation, mask, weight, scale, with_total, stride, padding, groups):
    empty = x.new_empty(0)
    return (
        torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(dilation).contiguous(),
        empty if mask is None else mask.new_empty(mask.shape), weight.new_empty(weight.shape),
        empty.clone() if scale is None else scale.new_empty(scale.shape))


def _setup_context(ctx, inputs, output) -> None:
    x, dilation, mask, weight, scale, *ctx.options = inputs
    ctx.save_for_backward(x, dilation, mask, weight, scale)


def _backward(ctx, grad_y: Tensor, grad_total: Tensor):
    x, dilation, mask, weight, scale = ctx.saved_tensors
    grad_x, grad_dilation, grad_mask, grad_weight, grad_scale = sampled_conv2d_backward(
        grad_y, grad_total, x, dilation, mask, weight, scale, *ctx.options)
    return (grad_x, grad_dilation, None if mask is None else grad_mask, grad_weight,
            None if scale is None else grad_scale, None, None, None, None)


sampled_conv2d.register_autograd(_backward, setup_context=_setup_context)
