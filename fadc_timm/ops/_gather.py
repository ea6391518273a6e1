"""Gather backend: samples looked up in a table of pixels, and a plain convolution over them.

Default on a CPU. Indices and corner weights are shared by all channels of a dilation group, and the table is read in
rows of channels, so the map is best channels_last; another layout costs one copy.
"""
from typing import Optional

import torch
from torch import Tensor

from ._sampled_conv import sampled_conv2d
from .case import NO_GAINS, Case, match_layout


def why_not(case: Case) -> Optional[str]:
    return None


def forward(case: Case) -> Tensor:
    # in torch.jit.trace what comes from a shape is a tensor, which is no element of a list of integers
    integer = int if torch.jit.is_tracing() else (lambda n: n)
    options = ([integer(s) for s in case.stride], [integer(p) for p in case.padding], case.groups)
    split = case.has_gains and not case.is_depthwise
    weight = case.sample_kernels() if case.has_gains and case.is_depthwise else case.weight
    gains = case.gains if split else NO_GAINS
    save = torch.is_grad_enabled() and gains[3] is not None and gains[3].requires_grad
    y, _ = sampled_conv2d(case.x, case.dilation, case.mask, weight, case.bias, *gains, split, save, *options)
    return match_layout(y, case.x)
