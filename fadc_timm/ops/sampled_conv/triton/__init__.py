"""Triton backend for CUDA: kernels write the samples as columns, the library multiplies them.

With TRITON_INTERPRET=1 in the environment, Triton interprets its kernels on a CPU, slowly, as in the tests. Triton is
optional: the first call imports it.
"""
from typing import Optional

import torch
from torch import Tensor

from ...runtime import match_layout
from ...triton_support import why_not as why_not_map
from ..arguments import ConvArgs, why_not_transformed
from .call import ACTS
from .operator import call, two_step_conv2d

__all__ = ['ACTS', 'call', 'forward', 'two_step_conv2d', 'why_not', 'why_not_map']

def why_not(args: ConvArgs) -> Optional[str]:
    return why_not_map(args.x) or why_not_transformed()


def _gains(args: ConvArgs, into: Optional[Tensor], out: Optional[Tensor]) -> Optional[Tensor]:
    """The gains of one part side by side (B, C + O), or their product (B, C) if depthwise; None where all are one."""
    if into is None and out is None:
        return None
    if args.is_depthwise:
        return out if into is None else into if out is None else into * out
    b, c, o = *args.x.shape[:2], len(args.weight)
    into, out = (args.x.new_ones((b, n)) if t is None else t for n, t in ((c, into), (o, out)))
    return torch.cat((into, out), dim=1)


def forward(args: ConvArgs) -> Tensor:
    low_in, low_out, high_in, high_out = args.gains
    low, high = _gains(args, low_in, low_out), _gains(args, high_in, high_out)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (low, high))
    y = call(args.x, args.weight, args.bias, args.steps, args.mask, low, high, 0, 1., False, save, *args.geometry())
    return match_layout(y, args.x)
