"""Gather backend: the map as a table of pixels, each tap a weighted bag of its four bilinear corners, then one GEMM.

Default on a CPU. Indices and corner weights are shared by all channels of a dilation group, and the table is read in
rows of channels, so the map is best channels_last; another layout costs one copy.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._depthwise import depthwise_gather
from .case import Case, accumulation_dtype, combine_parts, match_layout, scale_channels, tap_positions


def why_not(case: Case) -> Optional[str]:
    return None


def _corners(position: Tensor, size: int) -> Tuple[Tensor, Tensor]:
    """Both neighbours of each position (...) on an axis: index (..., 2) in [0, size) and bilinear weight (..., 2)."""
    floor = position.floor()
    frac = position - floor
    index = floor.long()[..., None] + torch.arange(2, device=position.device)
    weight = torch.stack((1 - frac, frac), dim=-1) * ((index >= 0) & (index < size))
    return index.clamp(0, max(size - 1, 0)), weight


def sampling_table(case: Case) -> Tuple[Tensor, Tensor]:
    """Where every tap reads, and with what weight.

    Returns:
        Rows of the table (B, H', W', k, k, G, 4), int64: pixel ((b*H + y)*W + x)*G + g for the four corners; and their
        weights, bilinear times mask, same shape.
    """
    x, k, groups = case.x, case.kernel_size, case.dilation_groups
    b, _, h, w = x.shape
    out_h, out_w = case.dilation.shape[2:]
    d = case.dilation.to(accumulation_dtype(x.dtype))
    row, row_weight = _corners(tap_positions(d, k, h, case.stride[0], case.padding[0], 2), h)
    col, col_weight = _corners(tap_positions(d, k, w, case.stride[1], case.padding[1], 3), w)
    row = row + torch.arange(b, device=x.device)[:, None, None, None, None, None] * h
    col = col * groups + torch.arange(groups, device=x.device)[:, None]
    # (B, H', W', k, 1, G, 2, 1) against (B, H', W', 1, k, G, 1, 2)
    index = (row * (w * groups))[:, :, :, :, None, :, :, None] + col[:, :, :, None, :, :, None, :]
    weight = row_weight[:, :, :, :, None, :, :, None] * col_weight[:, :, :, None, :, :, None, :]
    if case.mask is not None:
        mask = case.mask.to(weight.dtype).reshape(b, groups, k, k, out_h, out_w).permute(0, 4, 5, 2, 3, 1)
        weight = weight * mask[..., None, None]
    return index.flatten(-2), weight.flatten(-2).to(x.dtype)


def _bags(x: Tensor, index: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Weighted sums of rows of x (B, C, H, W) seen as (B*H*W*G, C/G), a bag per row of index: (bags, C/G)."""
    table = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1] // groups)
    return F.embedding_bag(index, table, mode='sum', per_sample_weights=weight)


def _matmul(samples: Tensor, weight: Tensor, groups: int) -> Tensor:
    """samples (P, taps, C) times weight (O, C/groups, taps): (P, O)."""
    p, taps, c = samples.shape
    o = weight.shape[0]
    if groups == 1:
        return samples.reshape(p, taps * c) @ weight.permute(2, 1, 0).reshape(taps * c, o)
    cg = c // groups
    a = samples.view(p, taps, groups, cg).permute(2, 0, 1, 3).reshape(groups, p, taps * cg)
    m = weight.reshape(groups, o // groups, cg, taps).permute(0, 3, 2, 1).reshape(groups, taps * cg, o // groups)
    return torch.bmm(a, m).transpose(0, 1).reshape(p, o)


def _depthwise(case: Case, index: Tensor, weight: Tensor) -> Tensor:
    """(B, H', W', C). The gains go into a kernel per sample: for k*k taps a channel that is nothing."""
    x, groups, taps = case.x, case.dilation_groups, case.kernel_size ** 2
    b, c = x.shape[:2]
    if case.has_gains:
        low_in, low_out, high_in, high_out = (torch.ones_like(x[:, :, 0, 0]) if g is None else g for g in case.gains)
        mean, rest = (part.reshape(1, c, -1) for part in case.split_weight())
        kernel = (low_in * low_out)[:, :, None] * mean + (high_in * high_out)[:, :, None] * rest
    else:
        kernel = case.weight.reshape(1, c, taps)
    out_h, out_w = index.shape[1:3]
    y = depthwise_gather(
        x.permute(0, 2, 3, 1).reshape(-1, c // groups),
        index.flatten(3, 4).transpose(3, 4).reshape(-1, taps, 4),
        weight.flatten(3, 4).transpose(3, 4).reshape(-1, taps, 4),
        kernel.transpose(1, 2).contiguous())
    y = y.view(b, out_h, out_w, c)
    return y if case.bias is None else y + case.bias


def forward(case: Case) -> Tensor:
    x, groups, taps = case.x, case.dilation_groups, case.kernel_size ** 2
    b, c = x.shape[:2]
    out_h, out_w = case.dilation.shape[2:]
    index, weight = sampling_table(case)
    if case.is_depthwise:
        return match_layout(_depthwise(case, index, weight).permute(0, 3, 1, 2), x)

    def samples(x: Tensor) -> Tensor:
        return _bags(x, index.reshape(-1, 4), weight.reshape(-1, 4), groups).view(b * out_h * out_w, taps, c)

    def summed_samples(x: Tensor) -> Tensor:
        rows, row_weights = (t.flatten(3, 4).transpose(3, 4).reshape(-1, taps * 4) for t in (index, weight))
        return _bags(x, rows, row_weights, groups).view(b * out_h * out_w, 1, c)

    def to_map(y: Tensor) -> Tensor:
        return y.view(b, out_h, out_w, case.weight.shape[0]).permute(0, 3, 1, 2)

    if not case.has_gains:
        y = to_map(_matmul(samples(x), case.weight.flatten(2), case.groups))
        if case.bias is not None:
            y = y + case.bias[:, None, None]
    else:
        # the gains commute with sampling, and the mean kernel sees only the sum over the taps
        mean, rest = case.split_weight()
        high = _matmul(samples(scale_channels(x, case.gains[2])), rest.flatten(2), case.groups)
        low = _matmul(summed_samples(scale_channels(x, case.gains[0])), mean.flatten(2), case.groups)
        y = combine_parts(to_map(high), to_map(low), case)
    return match_layout(y, x)
