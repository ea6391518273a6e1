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
    split = case.has_gains and not case.is_depthwise
    weight = case.sample_kernels() if case.has_gains and case.is_depthwise else case.weight
    gains = case.gains if split else NO_GAINS
    save = torch.is_grad_enabled() and gains[3] is not None and gains[3].requires_grad
    y, _ = sampled_conv2d(case.x, case.dilation, case.mask, weight, case.bias, *gains, split, save, *case.geometry())
    return match_layout(y, case.x)
