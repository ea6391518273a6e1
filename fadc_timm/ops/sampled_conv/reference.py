"""The oracle: the definition written out, in float64. Slow, obvious, never chosen automatically."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from ..runtime import match_layout
from .arguments import ConvArgs


def why_not(args: ConvArgs) -> Optional[str]:
    return None if args.x.device.type != 'mps' else 'it computes in float64, which MPS does not have'


def bilinear(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Sample x (B, C, H, W) at real positions rows, cols (B, H', W'), zero outside: (B, C, H', W')."""
    b, c, h, w = x.shape
    y = x.new_zeros(b, c, *rows.shape[1:])
    batch = torch.arange(b, device=x.device)[:, None, None]
    top, left = rows.floor(), cols.floor()
    down, across = rows - top, cols - left  # on a pixel 0, so that the slopes there are those below and to the right
    for dy, row_weight in enumerate((1 - down, down)):
        for dx, col_weight in enumerate((1 - across, across)):
            i, j, weight = top + dy, left + dx, row_weight * col_weight
            inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
            # an outside corner reads pixel 0 and counts nothing, except where no pixel is right
            i, j = torch.where(inside, i, 0), torch.where(inside, j, 0)
            weight = torch.where(inside | weight.isnan(), weight, 0)
            y = y + weight[:, None] * x[batch, :, i.long(), j.long()].permute(0, 3, 1, 2)
    return y


def tap_positions(args: ConvArgs, group: int, i: int, j: int) -> Tuple[Tensor, Tensor]:
    """Rows and columns (B, H', W') at which tap (i, j) reads."""
    k, (out_h, out_w) = args.kernel_size, args.out_size
    rows = torch.arange(out_h, device=args.x.device)[:, None] * args.stride[0] - args.padding[0]
    cols = torch.arange(out_w, device=args.x.device)[None, :] * args.stride[1] - args.padding[1]
    if args.spacing is None:
        r, dilation = k // 2, args.steps[:, group].double()
        return rows + r + dilation * (i - r), cols + r + dilation * (j - r)
    at = 2 * (group * k * k + i * k + j)
    down, across = args.steps[:, at].double(), args.steps[:, at + 1].double()
    return rows + i * args.spacing[0] + down, cols + j * args.spacing[1] + across


def forward(args: ConvArgs) -> Tensor:
    dtype = args.x.dtype
    x, weight = args.x.double(), args.weight.double()
    low_in, low_out, high_in, high_out = (None if g is None else g.double() for g in args.gains)
    b, c, _, _ = x.shape
    o, per_group, k, _ = weight.shape
    groups = args.step_groups

    # W'(b, o, c, k) over all C input channels, zero where o and c are of different convolution groups
    full = torch.zeros(o, c, k, k, dtype=torch.float64, device=x.device)
    for g in range(args.groups):
        rows = slice(g * o // args.groups, (g + 1) * o // args.groups)
        full[rows, g * per_group:(g + 1) * per_group] = weight[rows]
    mean = full.mean(dim=(2, 3), keepdim=True)
    low, high = mean.expand(b, o, c, k, k), (full - mean).expand(b, o, c, k, k)
    if low_in is not None:
        low = low * low_in[:, None, :, None, None]
    if low_out is not None:
        low = low * low_out[:, :, None, None, None]
    if high_in is not None:
        high = high * high_in[:, None, :, None, None]
    if high_out is not None:
        high = high * high_out[:, :, None, None, None]
    kernel = low + high

    y = x.new_zeros(b, o, *args.out_size)
    for g in range(groups):
        channels = slice(g * c // groups, (g + 1) * c // groups)
        for i in range(k):
            for j in range(k):
                sample = bilinear(x[:, channels], *tap_positions(args, g, i, j))
                if args.mask is not None:
                    sample = sample * args.mask[:, g * k * k + i * k + j, None].double()
                y = y + torch.einsum('boc,bchw->bohw', kernel[:, :, channels, i, j], sample)
    if args.bias is not None:
        y = y + args.bias.double()[:, None, None]
    return match_layout(y.to(dtype), args.x)
