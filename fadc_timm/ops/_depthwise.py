"""The depthwise gather as an operator of torch, which autograd, torch.compile and FLOP counters can see.

No buffer over the taps is kept: each tap is sampled, weighted and added, and sampled again in the backward pass.
"""
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['depthwise_gather']


def _sample(table: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of four rows of the table each: rows, weight (bags, 4) to (bags, C)."""
    return F.embedding_bag(rows, table, mode='sum', per_sample_weights=weight)


@torch.library.custom_op('fadc_timm::depthwise_gather', mutates_args=())
def depthwise_gather(table: Tensor, index: Tensor, weight: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise convolution over gathered taps.

    Args:
        table: Pixels (N*G, C/G), rows of the channels of a dilation group.
        index: Rows of the table (P*G, taps, 4), int64, P output positions over the whole batch.
        weight: Weights of these rows (P*G, taps, 4), in the dtype of table.
        kernel: Kernel (B, taps, C) for each sample, or (1, taps, C), in the dtype of table.

    Returns:
        (P, C), contiguous.
    """
    b, taps, c = kernel.shape
    p = index.shape[0] * table.shape[1] // c
    if p == 0:
        return table.new_zeros(0, c)
    y = table.new_zeros(b, p // b, c)
    for t in range(taps):
        sample = _sample(table, index[:, t], weight[:, t])
        y.addcmul_(sample.reshape(b, p // b, c), kernel[:, t, None])
    return y.view(p, c)


@depthwise_gather.register_fake
def _(table: Tensor, index: Tensor, weight: Tensor, kernel: Tensor) -> Tensor:
    c = kernel.shape[2]
    return table.new_empty(index.shape[0] * table.shape[1] // c, c)


@torch.library.custom_op('fadc_timm::depthwise_gather_backward', mutates_args=())
def depthwise_gather_backward(
        grad: Tensor,
        table: Tensor,
        index: Tensor,
        weight: Tensor,
        kernel: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`depthwise_gather` for table, weight and kernel; grad is (P, C)."""
    b, taps, c = kernel.shape
    grad_table, grad_weight, grad_kernel = (torch.zeros_like(t) for t in (table, weight, kernel))
    p = grad.shape[0]
    if p == 0:
        return grad_table, grad_weight, grad_kernel
    grad = grad.reshape(b, p // b, c)
    bag_of = torch.arange(index.shape[0] * 4, device=index.device) // 4
    bag_size = torch.full_like(index[:, 0, 0], 4)
    for t in range(taps):
        rows, row_weight = index[:, t], weight[:, t]
        sample = _sample(table, rows, row_weight)
        grad_kernel[:, t] = (grad * sample.reshape(b, p // b, c)).sum(1)
        grad_sample = (grad * kernel[:, t, None]).reshape(-1, table.shape[1])
        grad_table += torch.ops.aten._embedding_bag_dense_backward(
            grad_sample, rows.reshape(-1), bag_of, bag_size, bag_size, table.shape[0], False, 0,
            row_weight.reshape(-1), -1)
        grad_weight[:, t] = (table[rows] @ grad_sample[:, :, None])[:, :, 0]
    return grad_table, grad_weight, grad_kernel


@depthwise_gather_backward.register_fake
def _(
        grad: Tensor,
        table: Tensor,
        index: Tensor,
        weight: Tensor,
        kernel: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(weight), torch.empty_like(kernel)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    table, index, weight, kernel = ctx.saved_tensors
    grad_table, grad_weight, grad_kernel = depthwise_gather_backward(grad, table, index, weight, kernel)
    return grad_table, None, grad_weight, grad_kernel


depthwise_gather.register_autograd(_backward, setup_context=_setup_context)
