"""Gains folded into a kernel for each sample of a batch."""
from typing import Optional

import torch
from torch import Tensor

from ..runtime import are_known, constant, is_exporting
from .arguments import ConvArgs, Gains, split_kernel

__all__ = ['has_small_kernels', 'sample_kernels']


@constant
def _repeats(n: int, times: int, device: torch.device) -> Tensor:
    """0, 0, ..., 1, 1, ...: n numbers, each so many times."""
    return torch.arange(n, device=device).repeat_interleave(times)


def _per_tap(into: Tensor, taps: int) -> Tensor:
    """(B, C) as (B, C*taps)."""
    if is_exporting():  # one node
        return into.index_select(1, _repeats(into.shape[1], taps, into.device))
    return into.repeat_interleave(taps, 1)


def sample_kernels(weight: Tensor, gains: Gains, groups: int) -> Tensor:
    """The kernel of each sample: the gains applied to a kernel.

    Its products are with rows and columns: a product along a short axis of taps takes a runtime four times as long.

    Args:
        weight: Kernel (O, C/groups, k, k).
        gains: (low_in (B, C), low_out (B, O), high_in (B, C), high_out (B, O)), each None for ones, at least one given.
        groups: Convolution groups.

    Returns:
        (B, groups, O/groups, C/groups*k*k), a matrix for the samples of each group.
    """
    def of_part(part: Tensor, into: Optional[Tensor], out: Optional[Tensor]) -> Tensor:
        part = part.flatten(1).unflatten(0, (groups, -1))  # (groups, O/groups, C/groups*k*k)
        if into is not None:
            is_one_channel = into.shape[1] == groups
            into = into if is_one_channel else _per_tap(into, weight.shape[2] * weight.shape[3])
            part = part * into.view(-1, groups, 1, into.shape[1] // groups)
        return part if out is None else part * out.view(-1, groups, part.shape[-2], 1)

    low_in, low_out, high_in, high_out = gains
    mean, rest = split_kernel(weight)
    # of one channel the mean is a number
    mean = mean if weight.shape[1] == 1 else mean.expand_as(rest)
    return of_part(mean, low_in, low_out) + of_part(rest, high_in, high_out)


def has_small_kernels(args: ConvArgs) -> bool:
    """Whether gains are to go into a kernel for each sample, as that is much smaller than the sampled map."""
    if not args.has_gains or args.is_depthwise:
        return args.has_gains
    h, w = args.out_size
    return is_exporting() and are_known(h, w) and 3 * len(args.weight) // args.groups <= h * w
