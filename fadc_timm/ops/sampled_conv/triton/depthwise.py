"""The depthwise operator: a kernel that packs the weight, one forward, and backward five and sums."""
import functools
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ... import triton_support
from ...runtime import contiguous_weight
from ...triton_support import MOST_ELEMENTS, Launch, block, cdiv
from .call import Call, mask_in
from .dense import blocks
from .sums import sampling_gradient

__all__ = ['backward', 'forward']

# Positions and channels of a program, and its warps, for half dtypes: the fastest of ten on an H200, for stages 2 to 4
# of ConvNeXt-T at 64x224.
_FORWARD = 8, 32, 1
_BACKWARD = 4, 64, 2
_PRODUCTS = 16, 64, 4


class _Launches(NamedTuple):
    pack: Launch
    forward: Launch
    backward: Launch
    products: Launch
    kernel: Launch
    unpack: Launch
    channel_blocks: int  # of backward


@functools.lru_cache(maxsize=1024)
def _launches(call: Call, has_bias: bool, fixed: bool) -> _Launches:
    from . import depthwise_kernels as kernels
    spec = call.spec
    size = call.h, call.w, call.out_h, call.out_w, *call.pixels, *call.strides, call.c, call.step_width
    p, c, warps = blocks(call, _FORWARD)
    bp, bc, back_warps = blocks(call, _BACKWARD)
    pp, pc, products_warps = blocks(call, _PRODUCTS)
    k, has_offsets, _, has_mask, act, mask_act, _, acc, index = call.constants
    rows, taps_up = call.taps + has_bias, block(call.taps, 1, MOST_ELEMENTS)
    return _Launches(
        Launch(kernels.pack, (cdiv(call.c, 32),), (call.c,), (call.taps, taps_up, call.split, acc, 32)),
        Launch(kernels.forward, (call.b * cdiv(call.area, p), call.channel_blocks(c)), (*size, spec.base),
               (*call.constants, has_bias, call.upcast, p, c), warps),
        Launch(kernels.backward, (call.b * cdiv(call.area, bp), call.channel_blocks(bc)),
               (*size, call.positions, spec.base), (*call.constants, fixed, bp, bc), back_warps),
        Launch(kernels.products, (call.b, rows, call.channel_blocks(pc)), (*size, spec.base),
               (k, has_offsets, has_mask, act, mask_act, acc, index, pp, pc), products_warps),
        Launch(kernels.kernel_gradient, (call.b, cdiv(call.c, 32)), (call.c, rows),
               (call.taps, taps_up, spec.gains_act, acc, call.upcast, 32)),
        Launch(kernels.unpack, (rows, cdiv(call.c, 128)), (call.b, call.c),
               (call.taps, acc, call.upcast, block(call.b, 1, 16), 128)),
        call.channel_blocks(bc))


def _pack(call: Call, launches: _Launches, weight: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
    """The kernel (K*K, C), and if there are gains its mean over the taps (C,)."""
    kernel = weight.new_empty((call.taps, call.c), dtype=call.wide)
    mean = weight.new_empty((call.c,), dtype=call.wide) if call.split else None
    triton_support.launch(launches.pack, weight, kernel, mean)
    return kernel, mean


def forward(
        call: Call,
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        steps: Tensor,
        mask: Optional[Tensor],
        low: Optional[Tensor],
        high: Optional[Tensor],
        y: Tensor,
) -> Tuple[Tensor, Optional[Tensor]]:
    """Write y (B, H', W', C) from x (B, H, W, C), both contiguous; low and high are (B, C).

    Returns:
        The kernel and its mean, as :func:`_pack` gives them.
    """
    weight, launches = contiguous_weight(weight), _launches(call, bias is not None, False)
    masks, kernel = mask_in(steps, mask, call.step_groups, call.joint), _pack(call, launches, weight)
    triton_support.launch(launches.forward, x, steps, masks, low, high, *kernel, bias, y)
    return kernel


def backward(
        call: Call,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        packed: Tuple[Optional[Tensor], Optional[Tensor]],
        bias: Optional[Tensor],
        steps: Tensor,
        mask: Optional[Tensor],
        low: Optional[Tensor],
        high: Optional[Tensor],
        grad_x: Tensor,
        scale: Optional[Tensor],
) -> List[Optional[Tensor]]:
    """Gradients of weight, bias, steps, mask, low and high; arguments as in `dense.backward`."""
    weight, launches = contiguous_weight(weight), _launches(call, bias is not None, scale is not None)
    kernel, mean = packed
    if kernel is None:
        kernel, mean = _pack(call, launches, weight)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=call.wide, device=x.device)

    sampling = empty(launches.channel_blocks, call.taps + call.step_channels, call.positions)
    sums = empty(call.b, call.taps + (bias is not None), call.c)
    masks = mask_in(steps, mask, call.step_groups, call.joint)
    triton_support.launch(
        launches.backward, grad, x, steps, masks, low, high, kernel, mean, grad_x, sampling, scale)
    triton_support.launch(launches.products, grad, x, steps, masks, sums)
    grads = [None if t is None else torch.empty_like(t) for t in (low, high)]
    if call.split:
        triton_support.launch(launches.kernel, sums, kernel, mean, low, high, *grads)
    grad_weight, grad_bias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    triton_support.launch(launches.unpack, sums, grad_weight, grad_bias)
    return [grad_weight, grad_bias, *sampling_gradient(call, sampling, steps, mask), *grads]
