"""Gather backend: samples looked up in a table of pixels, and a plain convolution over them.

Default on a CPU. Indices and corner weights are shared by all channels of a step group, and the table is read in
rows of channels, so the map is best channels_last; another layout costs one copy.
"""
from typing import Optional

import torch
from torch import Tensor

from ...runtime import match_layout
from ..arguments import NO_GAINS, ConvArgs, why_not_transformed
from ..folded_gains import sample_kernels
from .operator import sampled_conv2d


def why_not(args: ConvArgs) -> Optional[str]:
    return why_not_transformed()


def forward(args: ConvArgs) -> Tensor:
    if args.x.device.type == 'cuda' and args.x.dtype == torch.bfloat16:
        # torch has no gradient of embedding bags' weights for it there
        return forward(args.to(torch.float32)).to(args.x.dtype)
    split = args.has_gains and not args.is_depthwise
    weight = args.weight
    if args.has_gains and args.is_depthwise:
        weight = sample_kernels(weight, args.gains, args.groups).view(-1, *weight.shape)
    gains = args.gains if split else NO_GAINS
    # A graph of torch.jit.trace may be trained, whatever the grad mode in which it was made.
    save = gains[3] is not None and (
        torch.jit.is_tracing() or torch.is_grad_enabled() and gains[3].requires_grad)
    y, _ = sampled_conv2d(args.x, args.steps, args.mask, weight, args.bias, *gains, split, save, *args.geometry())
    return match_layout(y, args.x)
