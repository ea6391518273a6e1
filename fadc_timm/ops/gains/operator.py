"""AdaKern's trunk, norm and heads in Triton, and their gradients. Trunk and heads are operators of torch.

Parameters and maps of any float dtype are read as they are. All sums are in float32, or float64 where a tensor is, and
autocast changes nothing. The caller asks whether Triton can run (`triton_support.why_not_on`).
"""
import functools
from ctypes import c_float
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import triton_support
from ..derivatives import refuse_more
from ..runtime import accumulation_dtype, form_of_call, in_a_row
from ..triton_support import Launch, block, cdiv, is_interpreted, types_of

__all__ = [
    'gains_heads', 'gains_heads_backward', 'gains_trunk', 'gains_trunk_backward', 'heads', 'heads_forward',
    'heads_gradient', 'norm_forward', 'norm_gradient', 'trunk', 'trunk_and_heads', 'trunk_forward', 'trunk_gradient']

_Shape = Tuple[int, ...]


def _accumulated(a: Tensor, b: Tensor) -> torch.dtype:
    """The dtype that products of a and b are added up in."""
    return accumulation_dtype(torch.promote_types(a.dtype, b.dtype))


def _shapes(tensors: Sequence[Optional[Tensor]]) -> Tuple[Optional[_Shape], ...]:
    return tuple([None if t is None else t.shape for t in tensors])


# the trunk


@functools.lru_cache(maxsize=1024)
def _trunk_launch(
        means: _Shape, weight: _Shape, bias: Optional[_Shape], dtype: torch.dtype) -> Launch:
    if len(means) != 3 or len(weight) != 2 or weight[1] != means[2] or bias not in (None, weight[:1]):
        raise ValueError(
            f'The trunk wants means (B, n, C), weight (O, C) and bias (O,) or None, got {list(means)}, {list(weight)} '
            f'and {None if bias is None else list(bias)}.')
    from . import kernels
    (b, parts, channels), outputs = means, weight[0]
    block_c, block_o = block(channels, 16, 128), 16
    return Launch(kernels.trunk, (b, cdiv(outputs, block_o)), (parts, channels, outputs),
                  (types_of(dtype)[0], is_interpreted(), block(parts, 1, 32), block_c, block_o))


@functools.lru_cache(maxsize=1024)
def _trunk_gradient_launch(batch: int, weight: _Shape, dtype: torch.dtype) -> Launch:
    from . import kernels
    outputs, channels = weight
    block_c = block(channels, 16, 128)
    return Launch(kernels.trunk_gradient, (outputs + batch, cdiv(channels, block_c)), (batch, channels, outputs),
                  (types_of(dtype)[0], is_interpreted(), 32, block_c))


def trunk_forward(means: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """The linear layer of the sum of some vectors, and the sum.

    Args:
        means: (B, n, C), of which the sum over n is the mean of a map.
        weight: (O, C).
        bias: (O,) or None.

    Returns:
        `means.sum(1) @ weight.T + bias` (B, O) in the dtype of weight; the sum (B, C) in float32 or float64.

    Raises:
        ValueError: The shapes do not fit.
    """
    dtype, batch = _accumulated(means, weight), means.shape[0]
    launch = _trunk_launch(means.shape, weight.shape, None if bias is None else bias.shape, dtype)
    y = weight.new_empty((batch, weight.shape[0]))
    mean = torch.empty((batch, means.shape[2]), dtype=dtype, device=means.device)
    if batch:
        triton_support.launch(launch, *in_a_row(means, weight, bias), y, mean)
    return y, mean


gains_trunk = torch.library.custom_op('fadc_timm::gains_trunk', trunk_forward, mutates_args=())


@gains_trunk.register_fake
def _(means, weight, bias):
    batch, _, channels = means.shape
    return weight.new_empty((batch, weight.shape[0])), means.new_empty(
        (batch, channels), dtype=_accumulated(means, weight))


def trunk_gradient(
        grad: Tensor, mean: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`gains_trunk` for the sum (B, C), weight and bias; empty for no bias."""
    grad_mean, grad_weight, grad_bias = _of_trunk(grad, mean, weight, bias)
    triton_support.launch(
        _trunk_gradient_launch(mean.shape[0], weight.shape, mean.dtype), *in_a_row(grad, mean, weight), grad_mean,
        grad_weight, None if bias is None else grad_bias)
    return grad_mean, grad_weight, grad_bias


gains_trunk_backward = torch.library.custom_op('fadc_timm::gains_trunk_backward', trunk_gradient, mutates_args=())


@gains_trunk_backward.register_fake
def _of_trunk(grad, mean, weight, bias):
    return (torch.empty_like(mean), weight.new_empty(weight.shape),
            weight.new_empty((0,) if bias is None else bias.shape))


def _trunk_context(ctx: Any, inputs: Any, output: Any) -> None:
    means, weight, bias = inputs
    ctx.parts = means.shape[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight, bias)


def _trunk_backward_with(gradient: Any, ctx: Any, grad: Optional[Tensor]):
    if grad is None:
        return None, None, None
    refuse_more('triton', grad)
    mean, weight, bias = ctx.saved_tensors
    grad_mean, grad_weight, grad_bias = gradient(grad.resolve_neg(), mean, weight, bias)
    return grad_mean[:, None].expand(-1, ctx.parts, -1), grad_weight, None if bias is None else grad_bias


gains_trunk.register_autograd(
    lambda ctx, grad, _: _trunk_backward_with(gains_trunk_backward, ctx, grad), setup_context=_trunk_context)


class _EagerTrunk(torch.autograd.Function):
    """The trunk for eager calls: autograd alone sees it, which is faster than a registered operator."""

    @staticmethod
    def forward(ctx, *inputs):
        output = trunk_forward(*inputs)
        _trunk_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    def backward(ctx, grad: Optional[Tensor], _: Any):
        return _trunk_backward_with(trunk_gradient, ctx, grad)


def trunk(means: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """The first result of :func:`gains_trunk`."""
    tensors = means, weight, bias
    return form_of_call(gains_trunk, _EagerTrunk, trunk_forward, tensors)(*tensors)[0]


# the norm


@functools.lru_cache(maxsize=1024)
def _norm_launch(
        x: _Shape,
        shapes: Tuple[Optional[_Shape], ...],
        dtype: torch.dtype,
        eps: float,
        momentum: Optional[float],
) -> Launch:
    """Of the forward pass, or where momentum is None of the backward pass."""
    if len(x) != 2 or any(shape not in (None, x[1:]) for shape in shapes) or (shapes[2] is None) != (shapes[3] is None):
        raise ValueError(
            'The norm wants x (B, K), weight (K,) and bias (K,) or None, and both running statistics (K,) or neither; '
            f'got {", ".join(str(None if s is None else list(s)) for s in (x, *shapes))}.')
    from . import kernels
    batch, channels = x
    block_b, block_k = block(batch, 16, 128), 16
    grid, constants = (cdiv(channels, block_k),), (eps, types_of(dtype)[0], is_interpreted(), block_b, block_k)
    if momentum is None:
        return Launch(kernels.norm_gradient, grid, (batch, channels), constants)
    single = c_float(momentum).value  # numbers of a launch are float32
    return Launch(kernels.norm, grid, (batch, channels, single, momentum - single), constants)


def norm_forward(
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        running_mean: Optional[Tensor],
        running_var: Optional[Tensor],
        batch_statistics: bool,
        momentum: float,
        eps: float,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """A BatchNorm, as `torch.native_batch_norm` computes it.

    With batch_statistics the running statistics are updated, and autograd is not told that they change.

    Args:
        x: (B, K), at least two samples where the statistics are those of the batch.
        weight, bias, running_mean, running_var: (K,) or None.
        batch_statistics: Whether the statistics are those of the batch; else they are the running ones.
        momentum: Share of the batch's statistics in the new running ones.
        eps: Added to the variance.

    Returns:
        (B, K) in the dtype of x; mean and inverse deviation (K,) of the batch in float32 or float64, or None.

    Raises:
        ValueError: The shapes do not fit.
    """
    statistics = running_mean, running_var
    dtype = accumulation_dtype(x.dtype)
    launch = _norm_launch(x.shape, _shapes((weight, bias, *statistics)), dtype, eps, momentum)
    y, mean, rstd = x.new_empty(x.shape), None, None
    if batch_statistics:
        mean, rstd = (x.new_empty(x.shape[1:], dtype=dtype) for _ in range(2))
    found = in_a_row(*statistics)
    triton_support.launch(launch, *in_a_row(x, weight, bias), *found, y, mean, rstd)
    if batch_statistics:
        for running, updated in zip(statistics, found):
            if running is not None and running is not updated:
                running.copy_(updated)
    return y, mean, rstd


def norm_gradient(
        grad: Tensor,
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        running_mean: Optional[Tensor],
        running_var: Optional[Tensor],
        mean: Optional[Tensor],
        rstd: Optional[Tensor],
        eps: float,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """Gradients of :func:`norm_forward` for x, weight and bias; None for what is None.

    Args:
        grad: (B, K).
        x, weight, bias, running_mean, running_var, eps: As there. Of the bias only shape and dtype are read. The
            running statistics may be None where the batch's were taken.
        mean, rstd: As returned there.
    """
    launch = _norm_launch(
        x.shape, _shapes((weight, bias, running_mean, running_var)), accumulation_dtype(x.dtype), eps, None)
    of_x = x.new_empty(x.shape)
    of_weight, of_bias = (None if p is None else p.new_empty(p.shape) for p in (weight, bias))
    triton_support.launch(
        launch, *in_a_row(grad, x, weight, running_mean, running_var), mean, rstd, of_x, of_weight, of_bias)
    return of_x, of_weight, of_bias


# the heads


@functools.lru_cache(maxsize=1024)
def _heads_launch(x: _Shape, shapes: Tuple[Optional[_Shape], ...], dtype: torch.dtype) -> Launch:
    weight, bias, *others = shapes
    parts = 1 if others == [None, None] else 2
    if (len(x) != 2 or weight is None or len(weight) != 2 or x[1] != parts * weight[1] or bias != weight[:1]
            or (parts == 2 and others != [weight, bias])):
        raise ValueError(
            'The heads want x (B, parts * K), and for each of one or two parts a weight (O, K) and a bias (O,); got '
            f'{", ".join(str(None if s is None else list(s)) for s in (x, *shapes))}.')
    from . import kernels
    outputs, width = weight
    block_o = block(outputs, 16, 128)
    return Launch(kernels.heads, (x[0], cdiv(outputs, block_o), parts), (x[1], width, outputs),
                  (types_of(dtype)[0], is_interpreted(), block_o, block(width, 16, 32)))


@functools.lru_cache(maxsize=1024)
def _heads_gradient_launch(x: _Shape, weight: _Shape, dtype: torch.dtype) -> Launch:
    from . import kernels
    (batch, inputs), (outputs, width) = x, weight
    block_o, block_k = 32, block(width, 16, 32)
    return Launch(kernels.heads_gradient, (cdiv(outputs, block_o) + batch, cdiv(width, block_k), inputs // width),
                  (batch, inputs, width, outputs),
                  (types_of(dtype)[0], is_interpreted(), block_o, 32, block(outputs, 16, 128), block_k))


def heads_forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_2: Optional[Tensor],
        bias_2: Optional[Tensor],
) -> Tuple[Tensor, Tensor]:
    """The linear layers of one or two parts of a vector, each after ReLU.

    Args:
        x: (B, K) or, with two parts, (B, 2 * K).
        weight: (O, K), of the first part.
        bias: (O,).
        weight_2: (O, K), of the second part, or None.
        bias_2: (O,) or None.

    Returns:
        `relu(x[:, :K]) @ weight.T + bias` (B, O) in the dtype of weight; that of the second part, or an empty tensor.

    Raises:
        ValueError: The shapes do not fit.
    """
    parameters = weight, bias, weight_2, bias_2
    launch = _heads_launch(x.shape, _shapes(parameters), _accumulated(x, weight))
    y, y_2 = _of_heads(x, *parameters)
    if x.shape[0]:
        triton_support.launch(launch, *in_a_row(x, *parameters), y, None if weight_2 is None else y_2)
    return y, y_2


gains_heads = torch.library.custom_op('fadc_timm::gains_heads', heads_forward, mutates_args=())


@gains_heads.register_fake
def _of_heads(x, weight, bias, weight_2, bias_2):
    shape = x.shape[0], weight.shape[0]
    return weight.new_empty(shape), weight.new_empty((0,)) if weight_2 is None else weight_2.new_empty(shape)


def heads_gradient(
        grad: Tensor,
        grad_2: Optional[Tensor],
        x: Tensor,
        weight: Tensor,
        weight_2: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gains_heads` for x and the parameters; empty for a part that there is not."""
    grads = grad_x, grad_weight, grad_bias, grad_weight_2, grad_bias_2 = _of_heads_gradient(
        grad, grad_2, x, weight, weight_2)
    triton_support.launch(
        _heads_gradient_launch(x.shape, weight.shape, _accumulated(x, weight)),
        *in_a_row(x, grad, grad_2, weight, weight_2), grad_x, grad_weight, grad_bias,
        None if weight_2 is None else grad_weight_2, None if weight_2 is None else grad_bias_2)
    return grads


gains_heads_backward = torch.library.custom_op('fadc_timm::gains_heads_backward', heads_gradient, mutates_args=())


@gains_heads_backward.register_fake
def _of_heads_gradient(grad, grad_2, x, weight, weight_2):
    own = weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])
    if weight_2 is None:
        return x.new_empty(x.shape), *own, weight.new_empty((0,)), weight.new_empty((0,))
    return x.new_empty(x.shape), *own, weight_2.new_empty(weight_2.shape), weight_2.new_empty(weight_2.shape[:1])


def _heads_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, weight_2, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, weight_2)


def _heads_backward_with(gradient: Any, ctx: Any, grad: Optional[Tensor], grad_2: Optional[Tensor]):
    if grad is None and grad_2 is None:
        return (None,) * 5
    refuse_more('triton', grad, grad_2)
    grad, grad_2 = (None if g is None else g.resolve_neg() for g in (grad, grad_2))
    x, weight, weight_2 = ctx.saved_tensors
    if weight_2 is None:
        return *gradient(grad, None, x, weight, None)[:3], None, None
    grads = [weight.new_zeros((x.shape[0], weight.shape[0])) if g is None else g for g in (grad, grad_2)]
    return gradient(*grads, x, weight, weight_2)


gains_heads.register_autograd(
    lambda ctx, *grads: _heads_backward_with(gains_heads_backward, ctx, *grads), setup_context=_heads_context)


class _EagerHeads(torch.autograd.Function):
    """The heads for eager calls, as the trunk."""

    @staticmethod
    def forward(ctx, *inputs):
        output = heads_forward(*inputs)
        _heads_context(ctx, inputs, output)
        if inputs[3] is None:
            ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]):
        return _heads_backward_with(heads_gradient, ctx, *grads)


def heads(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_2: Optional[Tensor] = None,
        bias_2: Optional[Tensor] = None,
) -> Tuple[Tensor, Optional[Tensor]]:
    """The results of :func:`gains_heads`; None for a second part that there is not."""
    tensors = x, weight, bias, weight_2, bias_2
    y, y_2 = form_of_call(gains_heads, _EagerHeads, heads_forward, tensors)(*tensors)
    return y, None if weight_2 is None else y_2


# both, in inference


@functools.lru_cache(maxsize=1024)
def _trunk_and_heads_launch(
        means: _Shape,
        fc_weight: _Shape,
        fc_bias: Optional[_Shape],
        norm: Tuple[Optional[_Shape], ...],
        shapes: Tuple[Optional[_Shape], ...],
        dtype: torch.dtype,
        eps: float,
) -> Launch:
    # the two launches that this one takes the place of, for what they say of the shapes
    _trunk_launch(means, fc_weight, fc_bias, dtype)
    grid = _heads_launch((means[0], fc_weight[0]), shapes, dtype).grid
    if any(shape not in (None, fc_weight[:1]) for shape in norm):
        raise ValueError(f'The norm wants {fc_weight[0]} channels, got {norm}.')
    from . import kernels
    (b, n, channels), (outputs, inputs) = means, shapes[0] or ()
    block_n, block_k = block(n, 1, 32), block(inputs, 16, 128)
    most = 2048 if dtype == torch.float64 else 4096  # elements that registers hold
    block_c = block(channels, 16, min(256, most // max(block_n, block_k)))
    block_o = block(outputs, 16, min(256, most // block_k))
    # Each span computes the trunk's channels again: there are as many as fill a GPU, and 8 at most.
    spans = min(max(512 // max(b * grid[2], 1), 1), 8)
    span = cdiv(cdiv(outputs, spans), block_o) * block_o
    return Launch(kernels.trunk_and_heads, (b, cdiv(outputs, span), grid[2]), (n, channels, inputs, outputs, span),
                  (eps, types_of(dtype)[0], is_interpreted(), inputs > block_k, block_n, block_c, block_k, block_o), 8)


def trunk_and_heads(
        means: Tensor,
        fc_weight: Tensor,
        fc_bias: Optional[Tensor],
        norm: Tuple[Optional[Tensor], ...],
        eps: float,
        weight: Tensor,
        bias: Tensor,
        weight_2: Optional[Tensor],
        bias_2: Optional[Tensor],
) -> Tuple[Tensor, Optional[Tensor]]:
    """The heads of the trunk, behind a BatchNorm of fixed statistics or none, in one launch and without gradients.

    Args:
        means, fc_weight, fc_bias: means, weight and bias of :func:`trunk_forward`; O is K or, with two parts, 2 * K.
        norm: Mean, variance, weight and bias of the BatchNorm, (2 * K,) or (K,). The last two may be None, and all of
            them, for no norm.
        eps: Of the BatchNorm.
        weight, bias, weight_2, bias_2: As in :func:`heads_forward`.

    Returns:
        (B, O) in the dtype of weight; that of the second part, or None.

    Raises:
        ValueError: The shapes do not fit.
    """
    parameters = weight, bias, weight_2, bias_2
    launch = _trunk_and_heads_launch(
        means.shape, fc_weight.shape, None if fc_bias is None else fc_bias.shape, _shapes(norm), _shapes(parameters),
        _accumulated(means, weight), eps)
    shape = means.shape[0], weight.shape[0]
    y, y_2 = weight.new_empty(shape), None if weight_2 is None else weight.new_empty(shape)
    if shape[0]:
        triton_support.launch(launch, *in_a_row(means, fc_weight, fc_bias, *norm, *parameters), y, y_2)
    return y, y_2
