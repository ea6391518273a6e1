"""Triton backend: one kernel that samples, multiplies and applies AdaKern, and keeps nothing in memory between.

For CUDA; with TRITON_INTERPRET=1 in the environment Triton interprets its kernels on a CPU, slowly, which is what the
tests do. Triton is optional, and imported at the first call.
"""
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ...runtime import match_layout
from ...triton_support import why_not_on
from ..arguments import ConvArgs
from . import launch
from .call import Call

__all__ = ['forward', 'fused_conv2d', 'why_not']


def why_not(case: ConvArgs) -> Optional[str]:
    return why_not_on(case.x.device.type)


@torch.library.custom_op('fadc_timm::fused_conv2d', mutates_args=())
def fused_conv2d(
        x: Tensor,
        dilation: Tensor,
        mask: Optional[Tensor],
        weight: Tensor,
        bias: Optional[Tensor],
        low_in: Optional[Tensor],
        low_out: Optional[Tensor],
        high_in: Optional[Tensor],
        high_out: Optional[Tensor],
        stride: List[int],
        padding: List[int],
        groups: int,
) -> Tensor:
    """Adaptive dilated convolution in one Triton kernel.

    Args:
        x: Map (B, C, H, W), best channels_last; another layout costs one copy.
        dilation: (B, G, H', W'), any strides.
        mask: (B, G*k*k, H', W') or None, any strides.
        weight: (O, C/groups, k, k); where it is depthwise also (B, C, 1, k, k), a kernel for each sample.
        bias: (O,) or None.
        low_in, low_out, high_in, high_out: AdaKern's gains (B, C), (B, O), (B, C), (B, O): all of them or none. They
            are not for depthwise kernels, into which they go beforehand.
        stride: Of the rows and of the columns.
        padding: Of the rows and of the columns, at dilation 1.
        groups: Convolution groups.

    Returns:
        (B, O, H', W'), channels_last.
    """
    y = _empty_output(x, dilation, weight)
    if y.numel():
        call = Call(x, dilation, mask, weight, stride, padding, groups)
        bias, *gains = map(_contiguous, (bias, low_in, low_out, high_in, high_out))
        (launch.depthwise_forward if call.depthwise else launch.dense_forward)(call, bias, gains, y)
    return y.permute(0, 3, 1, 2)


def _contiguous(t: Optional[Tensor]) -> Optional[Tensor]:
    return None if t is None else t.contiguous()


def _empty_output(x: Tensor, dilation: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], *dilation.shape[2:], weight.shape[-4])


@fused_conv2d.register_fake
def _(x, dilation, mask, weight, bias, low_in, low_out, high_in, high_out, stride, padding, groups):
    return _empty_output(x, dilation, weight).permute(0, 3, 1, 2)


@torch.library.custom_op('fadc_timm::fused_conv2d_backward', mutates_args=())
def fused_conv2d_backward(
        grad: Tensor,
        x: Tensor,
        dilation: Tensor,
        mask: Optional[Tensor],
        weight: Tensor,
        low_in: Optional[Tensor],
        low_out: Optional[Tensor],
        high_in: Optional[Tensor],
        high_out: Optional[Tensor],
        need_samples: bool,
        need_kernel: bool,
        stride: List[int],
        padding: List[int],
        groups: int,
) -> List[Tensor]:
    """Gradients of :func:`fused_conv2d` for x, dilation, mask, weight and the gains; empty for those that are None.

    The first three are computed if `need_samples`, the others if `need_kernel`, and are zero else.
    """
    tensors = (x, dilation, mask, weight, low_in, low_out, high_in, high_out)
    grads = [_empty_gradient(t, x, channels_last=t is x) for t in tensors]
    if not grad.numel() or not x.numel():
        return [g.zero_() for g in grads]
    call = Call(x, dilation, mask, weight, stride, padding, groups)
    backward = launch.depthwise_backward if call.depthwise else launch.dense_backward
    gains = [*map(_contiguous, (low_in, low_out, high_in, high_out))]
    results = backward(call, grad.permute(0, 2, 3, 1).contiguous(), gains, need_samples, need_kernel)
    for into, result in zip(grads, results):
        if result is None:
            into.zero_()
        else:
            into.copy_(result)
    return grads


def _empty_gradient(t: Optional[Tensor], like: Tensor, channels_last: bool) -> Tensor:
    if t is None:
        return like.new_empty(0)
    return torch.empty(t.shape, dtype=t.dtype, device=t.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@fused_conv2d_backward.register_fake
def _(grad, x, dilation, mask, weight, low_in, low_out, high_in, high_out, need_samples, need_kernel, stride, padding,
      groups):
    tensors = (x, dilation, mask, weight, low_in, low_out, high_in, high_out)
    return [_empty_gradient(t, x, channels_last=t is x) for t in tensors]


def _setup_context(ctx, inputs, output) -> None:
    x, dilation, mask, weight, _, *gains = inputs[:9]
    ctx.options = inputs[9:]
    ctx.save_for_backward(x, dilation, mask, weight, *gains)


def _backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    needed = ctx.needs_input_grad
    grads = fused_conv2d_backward(
        grad, *ctx.saved_tensors, any(needed[:3]), needed[3] or any(needed[5:9]), *ctx.options)
    grads = [g if n else None for n, g in zip((*needed[:4], *needed[5:9]), grads)]
    return *grads[:4], grad.sum((0, 2, 3)) if needed[4] else None, *grads[4:], None, None, None


fused_conv2d.register_autograd(_backward, setup_context=_setup_context)


def forward(case: ConvArgs) -> Tensor:
    weight, gains = case.weight, case.gains
    if case.has_gains and case.is_depthwise:
        weight, gains = case.sample_kernels(), (None,) * 4
    elif case.has_gains:
        b, c, o = *case.x.shape[:2], len(weight)
        gains = tuple(  # type: ignore[assignment]
            case.x.new_ones(b, n) if g is None else g for n, g in zip((c, o, c, o), gains))
    y = fused_conv2d(case.x, case.dilation, case.mask, weight, case.bias, *gains, *case.geometry())
    return match_layout(y, case.x)
