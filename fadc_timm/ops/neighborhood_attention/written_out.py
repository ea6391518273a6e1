"""Neighbourhood attention in operators that every runtime has, for any size, symbolic ones too.

Keys and values are gathered one row of the windows at a time, so no buffer holds all kh * kw neighbours.
"""
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import accumulation_dtype, without_autocast
from .arguments import AttentionArgs
from .neighbours import neighbours

__all__ = ['attention', 'attention_weights', 'forward', 'why_not']


def _gather(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """x (B, heads, H, W, c) at a row (H,) of the windows and all of their columns (W, kw): (B, heads, H, W, kw, c)."""
    w, kw = cols.shape[0], cols.shape[1]
    x = x.index_select(2, rows).index_select(3, cols.flatten())
    return x.reshape(x.shape[0], x.shape[1], x.shape[2], w, kw, x.shape[4])


def attention_weights(
        q: Tensor,
        k: Tensor,
        kernel_size: List[int],
        dilation: List[int],
        bias: Optional[Tensor],
) -> Tensor:
    """What every position gives its neighbours: (B, heads, H, W, kh*kw), row by row of the window, of sum 1."""
    kh, kw = kernel_size[0], kernel_size[1]
    rows, row_places = neighbours(q.shape[2], kh, dilation[0], q.device)
    cols, col_places = neighbours(q.shape[3], kw, dilation[1], q.device)
    query = (q * q.shape[4] ** -0.5).unsqueeze(-1)
    scores: List[Tensor] = []
    for i in range(kh):
        score = (_gather(k, rows[:, i], cols) @ query).squeeze(-1)
        if bias is not None:
            of_row = bias.index_select(1, row_places[:, i]).index_select(2, col_places.flatten())
            score = score + of_row.reshape(of_row.shape[0], of_row.shape[1], col_places.shape[0], kw).to(score.dtype)
        scores.append(score)
    return torch.cat(scores, dim=-1).softmax(dim=-1)


def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel_size: List[int],
        dilation: List[int],
        bias: Optional[Tensor],
        dropout_p: float = 0.,
) -> Tensor:
    """See :func:`neighborhood_attention2d`. H and W are at least kernel size times dilation."""
    weights = attention_weights(q, k, kernel_size, dilation, bias)
    if dropout_p > 0.:
        weights = F.dropout(weights, dropout_p)
    kh, kw = kernel_size[0], kernel_size[1]
    rows, _ = neighbours(q.shape[2], kh, dilation[0], q.device)
    cols, _ = neighbours(q.shape[3], kw, dilation[1], q.device)
    y = torch.zeros_like(q)
    for i in range(kh):
        of_row = weights[..., i * kw:(i + 1) * kw].unsqueeze(-2)
        y = y + (of_row @ _gather(v, rows[:, i], cols)).squeeze(-2)
    return y


def why_not(args: AttentionArgs) -> Optional[str]:
    return None


def forward(args: AttentionArgs) -> Tensor:
    dtype = args.q.dtype
    q, k, v = (t.to(accumulation_dtype(dtype)) for t in (args.q, args.k, args.v))
    with without_autocast(q):
        y = attention(q, k, v, list(args.kernel_size), list(args.dilation), args.bias, args.dropout_p)
    return y.to(dtype)
