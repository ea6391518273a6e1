"""The oracle: the definition written out, in float64. Slow, obvious, never chosen automatically."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from .arguments import AttentionArgs


def why_not(args: AttentionArgs) -> Optional[str]:
    if args.dropout_p:
        return 'it has no dropout'
    return None if args.q.device.type != 'mps' else 'it computes in float64, which MPS does not have'


def window(position: int, length: int, kernel_size: int, dilation: int) -> Tuple[int, ...]:
    """The positions that a position of an axis attends to."""
    residue = range(position % dilation, length, dilation)
    start = min(max(position // dilation - kernel_size // 2, 0), len(residue) - kernel_size)
    return tuple(residue[start:start + kernel_size])


def forward(args: AttentionArgs) -> Tensor:
    q, k, v = (t.double() for t in (args.q, args.k, args.v))
    bias = None if args.bias is None else args.bias.double()
    (kh, kw), (dh, dw) = args.kernel_size, args.dilation
    h, w, c = q.shape[2:]
    rows_of_outputs = []
    for y in range(h):
        outputs = []
        for x in range(w):
            places = [(i, j) for i in window(y, h, kh, dh) for j in window(x, w, kw, dw)]
            keys = torch.stack([k[:, :, i, j] for i, j in places], dim=2)  # (B, heads, kh*kw, c)
            values = torch.stack([v[:, :, i, j] for i, j in places], dim=2)
            scores = (keys @ q[:, :, y, x, :, None]).squeeze(-1) / c ** 0.5
            if bias is not None:
                scores = scores + torch.stack(
                    [bias[:, (i - y) // dh + kh - 1, (j - x) // dw + kw - 1] for i, j in places], dim=1)
            outputs.append((scores.softmax(-1)[:, :, None] @ values).squeeze(2))
        rows_of_outputs.append(torch.stack(outputs, dim=2))
    return torch.stack(rows_of_outputs, dim=2).to(args.q.dtype)
