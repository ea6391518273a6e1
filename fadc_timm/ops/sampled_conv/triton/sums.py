"""The gradients of steps, mask and gains: sums of the shares that the programs of a backward pass wrote."""
import functools
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ... import triton_support
from ...runtime import empty_map
from ...triton_support import MOST_ELEMENTS, Launch, block, cdiv
from .call import Call, mask_in

__all__ = ['gains_gradient', 'sampling_gradient']

# Chunks that a program of `gains_gradient` reads at once.
_CHUNKS = 64


@functools.lru_cache(maxsize=1024)
def _sampling_launch(
        call: Call, parts: int, step_strides: Tuple[int, ...], mask_strides: Tuple[int, ...]) -> Launch:
    from . import dense_kernels
    spec = call.spec
    rows = block(call.taps + call.step_channels, 1, MOST_ELEMENTS)
    positions = block(call.positions, 1, max(1024 // rows, 1))
    return Launch(
        dense_kernels.sampling_gradient, (cdiv(call.positions, positions), call.step_groups),
        (call.positions, call.out_h, call.out_w, parts // call.step_groups, *call.strides, *step_strides,
         *mask_strides, spec.base),
        (call.taps, call.step_channels, call.has_mask, spec.act, spec.act > 0, call.acc, call.upcast, positions, rows))


def sampling_gradient(
        call: Call, sampling: Tensor, steps: Tensor, mask: Optional[Tensor]) -> List[Optional[Tensor]]:
    """Gradients of the tensors steps and mask, from sampling (blocks of channels, K*K + S, positions)."""
    grad_steps, grad_mask = empty_map(steps), None if mask is None else empty_map(mask)
    masks, grad_masks = (mask_in(*pair, call.step_groups, call.joint)
                         for pair in ((steps, mask), (grad_steps, grad_mask)))
    triton_support.launch(
        _sampling_launch(call, sampling.shape[0], grad_steps.stride(), grad_masks.stride()), sampling, steps,
        masks, grad_steps, grad_masks)
    return [grad_steps, grad_mask]


@functools.lru_cache(maxsize=1024)
def _gains_launch(call: Call, chunks: int, out_chunks: int) -> Launch:
    from . import dense_kernels
    return Launch(
        dense_kernels.gains_gradient, (call.b, cdiv(call.c + call.o, 32)),
        (chunks, out_chunks, call.c, call.o, call.c + call.o),
        (call.spec.gains_act, call.acc, call.upcast, block(max(chunks, out_chunks), 1, _CHUNKS), 32))


def gains_gradient(
        call: Call,
        of_input: Optional[Tensor],
        of_output: Optional[Tensor],
        low: Optional[Tensor],
        high: Optional[Tensor],
) -> List[Optional[Tensor]]:
    """Gradients of low and high (B, C + O), from the shares of chunks of positions.

    of_input (B, chunks, 2, C), of_output (B, chunks, 3, O).
    """
    grads = [None if t is None else torch.empty_like(t) for t in (low, high)]
    if of_input is not None and of_output is not None:
        triton_support.launch(_gains_launch(call, of_input.shape[1], of_output.shape[1]), of_input, of_output,
                              low, high, *grads)
    return grads
