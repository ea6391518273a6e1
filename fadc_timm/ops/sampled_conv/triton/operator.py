"""The Triton backend as an operator of torch, and its gradient."""
from functools import partial
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ... import settings
from ...derivatives import refuse_more
from ...runtime import contiguous_weight, empty_map, form_of_call, in_a_row, is_depthwise, nhwc
from . import dense, depthwise
from .call import Call, Spec, call_of

__all__ = ['call', 'forward', 'gradient', 'two_step_conv2d']


def _empty_output(x: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
    return empty_map(x, (x.shape[0], weight.shape[0], *steps.shape[2:]))


def _filled(x: Tensor, results: Sequence[Optional[Tensor]]) -> List[Tensor]:
    """Results of an operator of torch, which has no None: empty tensors in its place."""
    return [x.new_empty((0,)) if t is None else t for t in results]


def _spec(x, weight, steps, mask, low, high, act, base, gains_act, stride, padding, spacing, groups) -> Spec:
    return Spec(
        tuple(x.shape), x.dtype, tuple(steps.shape), steps.stride(), None if mask is None else mask.stride(),
        tuple(weight.shape), low is not None or high is not None, act, base, gains_act, tuple(stride), tuple(padding),
        tuple(spacing), groups, settings.workspace_bytes())


def _forward(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        steps: Tensor,
        mask: Optional[Tensor],
        low: Optional[Tensor],
        high: Optional[Tensor],
        act: int,
        base: float,
        gains_act: bool,
        save: bool,
        stride: List[int],
        padding: List[int],
        spacing: List[int],
        groups: int,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Adaptive dilated convolution in Triton, with the activations of AdaDR and AdaKern in the kernels that read them.

    Args:
        x: Map (B, C, H, W), best channels_last; another layout costs one copy.
        weight: (O, C/groups, k, k), in the dtype of x or float32.
        bias: (O,) or None.
        steps: Dilations (B, G, H', W'), or with spacing offsets (B, G*k*k*2, H', W'), see :class:`ConvArgs`; any
            strides, half or float32. If act is not 0, the output of AdaDR's convolution, to which the kernels apply the
            activation; if mask is None too, it also holds the channels of the mask, after those of the dilation:
            (B, G + G*k*k, H', W').
        mask: (B, G*k*k, H', W') or None, any strides. If act is not 0, the kernels take 2 * sigmoid of it.
        low, high: AdaKern's gains (B, C + O), first for the input channels, then for the output channels; or None if
            all are one. If the operator is depthwise, their product (B, C).
        act: The activation of the dilation: 0 none, 1 `1 + |o| * base`, 2 `1 + relu(o) * base`,
            3 `1 + (relu(o + 1) - 1) * base`.
        base: Base dilation.
        gains_act: Whether the kernels take 2 * sigmoid of low and high.
        save: Whether the gains need gradients: then the second and third result are made.
        stride: Of the rows and of the columns.
        padding: Of the rows and of the columns, of dilations at dilation 1.
        spacing: Of the rows and of the columns of taps that offsets move; empty for dilations.
        groups: Convolution groups.

    Returns:
        The output (B, O, H', W') channels_last; and its high and its low part before the output gains (B*H'*W', O),
        which are empty unless they were asked for.
    """
    y, *parts = forward(
        x, weight, bias, steps, mask, low, high, act, base, gains_act, save, stride, padding, spacing, groups)[:3]
    high_part, low_part = _filled(x, parts)
    return y, high_part, low_part


def forward(
        x, weight, bias, steps, mask, low, high, act, base, gains_act, save, stride, padding, spacing, groups,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """:func:`_forward`, with None for empty results; and the weight and its mean as they are multiplied by."""
    y = _empty_output(x, weight, steps)
    if not y.numel():
        return y, None, None, None, None
    bias, low, high = in_a_row(bias, low, high)
    call = call_of(_spec(x, weight, steps, mask, low, high, act, base, gains_act, stride, padding, spacing, groups))
    tensors = nhwc(x), weight, bias, steps, mask, low, high, y.permute(0, 2, 3, 1)
    if call.is_depthwise:
        return y, None, None, *depthwise.forward(call, *tensors)
    return y, *dense.forward(call, *tensors, save)


two_step_conv2d = torch.library.custom_op('fadc_timm::two_step_conv2d', _forward, mutates_args=())


@two_step_conv2d.register_fake
def _(x, weight, bias, steps, mask, low, high, act, base, gains_act, save, stride, padding, spacing, groups):
    y = _empty_output(x, weight, steps)
    split = (low is not None or high is not None) and not is_depthwise(x.shape[1], weight.shape[0], groups)
    if not (save and split) or x.shape[0] == 0:
        return y, x.new_empty((0,)), x.new_empty((0,))
    part = x.new_empty((x.shape[0] * steps.shape[2] * steps.shape[3], weight.shape[0]))
    return y, part, torch.empty_like(part)


def _gradient(
        grad: Tensor,
        high_part: Tensor,
        low_part: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        steps: Tensor,
        mask: Optional[Tensor],
        low: Optional[Tensor],
        high: Optional[Tensor],
        act: int,
        base: float,
        gains_act: bool,
        stride: List[int],
        padding: List[int],
        spacing: List[int],
        groups: int,
) -> List[Tensor]:
    """Gradients of :func:`two_step_conv2d` for x, weight, bias, steps, mask, low and high; empty for None.

    Without the two parts of the output, the gradients of low and high are right for the input channels only.
    """
    return _filled(x, gradient(
        grad, high_part, low_part, x, weight, bias, steps, mask, low, high, act, base, gains_act, stride, padding,
        spacing, groups))


def gradient(
        grad, high_part, low_part, x, weight, bias, steps, mask, low, high, act, base, gains_act, stride, padding,
        spacing, groups, wants_weight=True, packed=(None, None),
) -> List[Optional[Tensor]]:
    """:func:`_gradient`, with None for empty tensors, which the two parts may be too.

    wants_weight: Whether the gradient of the weight is wanted, else it is None. It is a third of the products.
    packed: The last two results of :func:`forward`, or twice None.
    """
    tensors = x, weight, bias, steps, mask, low, high
    if not grad.numel() or not x.numel():
        return [None if t is None else like.zero_() for t, like in zip(tensors, _gradients(*tensors))]
    bias, low, high = in_a_row(bias, low, high)
    call = call_of(_spec(x, weight, steps, mask, low, high, act, base, gains_act, stride, padding, spacing, groups))
    fixed = torch.are_deterministic_algorithms_enabled()
    scale = _scale(call, grad, weight, mask, low, high) if fixed else None
    into = torch.zeros(
        x.shape[0], x.shape[2], x.shape[3], x.shape[1], dtype=torch.int64 if fixed else call.wide, device=x.device)
    if call.is_depthwise:
        grads = depthwise.backward(
            call, nhwc(grad), nhwc(x), weight, packed, bias, steps, mask, low, high, into, scale)
    else:
        parts = (None, None) if high_part is None or not high_part.numel() else (high_part, low_part)
        grads = dense.backward(
            call, nhwc(grad), parts, nhwc(x), weight, packed, bias, steps, mask, low, high, into, scale, wants_weight)
    grad_x = (into if scale is None else into / scale).to(x.dtype).permute(0, 3, 1, 2)
    if bias is not None and grads[1] is not None:
        grads[1] = grads[1].to(bias.dtype)
    return [grad_x, *grads]


two_step_conv2d_backward = torch.library.custom_op(
    'fadc_timm::two_step_conv2d_backward', _gradient, mutates_args=())


def _scale(
        call: Call,
        grad: Tensor,
        weight: Tensor,
        mask: Optional[Tensor],
        low: Optional[Tensor],
        high: Optional[Tensor],
) -> Tensor:
    """The scale of fixed-point gradients: with it, no sum over a sample's positions and taps overflows int64."""
    # a tap of a kernel split into mean and rest is at most three times the largest number of the kernel
    largest = grad.abs().amax().double() * (3 * weight.double().abs().amax((1, 2, 3)).sum())
    if call.spec.act:
        largest = largest * 2
    elif mask is not None:
        largest = largest * mask.abs().amax()
    for t in (low, high):
        if t is not None:
            # input and output gains, each at most 2 after the activation
            largest = largest * (4. if call.spec.gains_act else t.abs().amax().double().clamp(min=1) ** 2)
    return 2. ** 62 / (largest.clamp(min=1e-300) * (call.area * call.taps))


def _gradients(x, weight, bias, steps, mask, low, high) -> List[Tensor]:
    """Tensors for the gradients, not filled."""
    return [
        empty_map(x), torch.empty_like(contiguous_weight(weight)),
        x.new_empty((0,)) if bias is None else torch.empty_like(bias), empty_map(steps),
        x.new_empty((0,)) if mask is None else empty_map(mask),
        *(x.new_empty((0,)) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
          for t in (low, high))]


@two_step_conv2d_backward.register_fake
def _(grad, high_part, low_part, x, weight, bias, steps, mask, low, high, act, base, gains_act, stride, padding,
      spacing, groups):
    return _gradients(x, weight, bias, steps, mask, low, high)


def _setup_context(ctx, inputs, output) -> None:
    """output: The results of :func:`_forward` or of :func:`forward`."""
    *tensors, act, base, gains_act, _, stride, padding, spacing, groups = inputs
    ctx.options = act, base, gains_act, stride, padding, spacing, groups
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2], *tensors)


def _backward_with(gradient: Any, ctx: Any, grad: Optional[Tensor]):
    if grad is None:
        return (None,) * 15
    refuse_more('triton', grad)
    grads = gradient(grad.resolve_neg(), *ctx.saved_tensors, *ctx.options)
    return *[g if n else None for g, n in zip(grads, ctx.needs_input_grad)], *(None,) * 8


def _backward(ctx, grad: Optional[Tensor], *_):
    return _backward_with(two_step_conv2d_backward, ctx, grad)


two_step_conv2d.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator for eager calls: autograd alone sees it, which is faster than a registered operator."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[:1]

    @staticmethod
    def backward(ctx, grad: Optional[Tensor]):
        return _backward_with(partial(gradient, wants_weight=ctx.needs_input_grad[1]), ctx, grad)


def call(*args: Any) -> Tensor:
    """The first result of :func:`two_step_conv2d`; the arguments are the same."""
    return form_of_call(two_step_conv2d, _Eager, forward, args[:7])(*args)[0]
