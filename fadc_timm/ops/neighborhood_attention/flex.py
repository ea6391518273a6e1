"""Neighbourhood attention by torch's flex_attention, which is compiled to one kernel on CUDA. Not measured yet, so no
call takes it by itself."""
from importlib.util import find_spec
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..kept_tables import KeptTables
from ..runtime import is_transformed
from .arguments import AttentionArgs
from .neighbours import neighbours

__all__ = ['forward', 'why_not']


def why_not(args: AttentionArgs) -> Optional[str]:
    if args.dropout_p:
        return 'it has no dropout'
    if is_transformed():
        return 'it has no forward-mode derivatives and no rules for the transforms of torch.func'
    if args.q.device.type not in ('cpu', 'cuda'):
        return f'it is for CUDA, and q is on {args.q.device.type}'
    if args.q.device.type == 'cpu' and args.q.requires_grad and torch.is_grad_enabled():
        return 'it has gradients on CUDA only'
    if find_spec('torch.nn.attention.flex_attention') is None:
        return f'torch {torch.__version__} has no flex_attention'
    return None


def _residues_first(length: int, dilation: int, device: torch.device) -> Tensor:
    """The positions of an axis, residue by residue, so that a block of them attends to few blocks."""
    return torch.cat([torch.arange(r, length, dilation, device=device) for r in range(dilation)])


class _Plan(NamedTuple):
    """What calls of one size, window and dilation share.

    order, rows, cols: (H*W,) the tokens in their order, and their rows and columns.
    mask: The block mask.
    compiled: flex_attention, compiled for these calls alone.
    """
    order: Tensor
    rows: Tensor
    cols: Tensor
    mask: Any
    compiled: Any


def _compile() -> Any:
    """flex_attention compiled by itself.

    torch compiles a code object eight times. Beyond that flex_attention would compute all scores, neighbours or not.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return flex_attention(*args, **kwargs)

    attention.__code__ = attention.__code__.replace()
    return torch.compile(attention, dynamic=False)


def _make_plan(
        size: Tuple[int, int], kernel: Tuple[int, int], dilation: Tuple[int, int], device: torch.device) -> _Plan:
    from torch.nn.attention.flex_attention import create_block_mask
    orders = [_residues_first(n, d, device) for n, d in zip(size, dilation)]
    rows, cols = (t.flatten() for t in torch.meshgrid(*orders, indexing='ij'))
    firsts = [neighbours(n, k, d, device)[0][:, 0] for n, k, d in zip(size, kernel, dilation)]
    top, left = firsts[0][rows], firsts[1][cols]

    def is_neighbour(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down, across = rows[key] - top[query], cols[key] - left[query]
        return ((down >= 0) & (down < kernel[0] * dilation[0]) & (down % dilation[0] == 0)
                & (across >= 0) & (across < kernel[1] * dilation[1]) & (across % dilation[1] == 0))

    n = size[0] * size[1]
    mask = create_block_mask(is_neighbour, None, None, n, n, device=device)
    return _Plan(rows * size[1] + cols, rows, cols, mask, _compile())


_plan = KeptTables(_make_plan, 64)


def forward(args: AttentionArgs) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention
    (kh, kw), (dh, dw), bias = args.kernel_size, args.dilation, args.bias
    h, w = args.q.shape[2:4]
    order, rows, cols, mask, compiled = _plan((h, w), args.kernel_size, args.dilation, args.q.device)

    def add_bias(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down = (rows[key] - rows[query]).div(dh, rounding_mode='floor') + (kh - 1)
        across = (cols[key] - cols[query]).div(dw, rounding_mode='floor') + (kw - 1)
        # outside of the window the mask decides, and the table has no place
        return score + bias[head, down.clamp(0, 2 * kh - 2), across.clamp(0, 2 * kw - 2)]  # type: ignore[index]

    q, k, v = (t.flatten(2, 3).index_select(2, order) for t in (args.q, args.k, args.v))
    function = compiled if q.is_cuda else flex_attention
    y = function(q, k, v, score_mod=None if bias is None else add_bias, block_mask=mask)
    return y.index_select(2, torch.argsort(order)).unflatten(2, (h, w))
