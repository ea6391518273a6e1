"""Gather backend: samples looked up in a table of pixels, and a plain convolution over them.

Default on a CPU. Indices and corner weights are shared by all channels of a dilation group, and the table is read in
rows of channels, so the map is best channels_last; another layout costs one copy.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ._sampled_conv import sampled_conv2d
from .case import Case, combine_parts, match_layout


def why_not(case: Case) -> Optional[str]:
    return None


def _depthwise_kernels(case: Case) -> Tensor:
    """(N, C, 1, k, k): all gains are a channel's own, so they go into a kernel for each sample, which is small."""
    if not case.has_gains:
        return case.weight[None]
    low_in, low_out, high_in, high_out = (
        torch.ones_like(case.x[:, :, 0, 0]) if g is None else g for g in case.gains)
    mean, rest = case.split_weight()
    return (low_in * low_out)[:, :, None, None, None] * mean + (high_in * high_out)[:, :, None, None, None] * rest


def forward(case: Case) -> Tensor:
    x = case.x
    # in torch.jit.trace what comes from a shape is a tensor, which is no element of a list of integers
    integer = int if torch.jit.is_tracing() else (lambda n: n)
    options = ([integer(s) for s in case.stride], [integer(p) for p in case.padding], case.groups)
    if case.is_depthwise or not case.has_gains:
        kernels = _depthwise_kernels(case) if case.is_depthwise else case.weight[None]
        y, _ = sampled_conv2d(x, case.dilation, case.mask, kernels, None, False, *options)
        if case.bias is not None:
            y = y + case.bias[:, None, None]
        return match_layout(y, x)
    # the gains commute with sampling, and the mean kernel sees only the total of the samples
    mean, rest = case.split_weight()
    high, total = sampled_conv2d(x, case.dilation, case.mask, rest[None], case.gains[2], True, *options)
    low_in = case.gains[0]
    low = F.conv2d(total if low_in is None else total * low_in[:, :, None, None], mean, groups=case.groups)
    return match_layout(combine_parts(high, low, case), x)
