"""The band mix in Triton as an operator of torch, and its gradient."""
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ...derivatives import refuse_more
from ...runtime import accumulation_dtype, empty_map, form_of_call, nhwc
from ..low_pass import edges
from . import mix
from .tables import padded, prepare_tables

__all__ = ['call', 'forward', 'gradient', 'mix_bands_triton']


def _empty_means(x: Tensor) -> Tensor:
    return torch.empty(mix.means_shape(*x.shape), dtype=accumulation_dtype(x.dtype), device=x.device)


def forward(x: Tensor, maps: Tensor, factors: Sequence[int], act: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """`mix_bands` in Triton.

    Args:
        x: Map (B, C, H, W), best channels_last; another layout costs one copy.
        maps: (B, M, S, H, W), any strides and float dtype: the weights of the bands; see act.
        factors: The filters pass 1/f of Nyquist. There is one filter less than there are bands.
        act: Whether the weights are 2 * sigmoid(maps).

    Returns:
        The mix (B, C, H, W) channels_last; what each block of the mix adds to its mean (B, blocks, C), float32 or
        float64; and the coefficients of x (B, J, J', C), which the backward pass reads.
    """
    y, means = empty_map(x), _empty_means(x)
    if not x.numel():
        return y, means, _empty_coefficients(x, factors)
    coefficients = mix.forward(mix.spec_of(x, maps, factors, act), nhwc(x), maps, y.permute(0, 2, 3, 1), means)
    return y, means, coefficients


mix_bands_triton = torch.library.custom_op('fadc_timm::mix_bands_triton', forward, mutates_args=())


def _count(n: int, factors: Sequence[int]) -> int:
    """Number of frequencies that the tables have on an axis of n points."""
    ends = [edges(n, f) for f in factors]
    return padded(max([2 * max(-low, high - 1, 0) + 1 for low, high in ends], default=1))


def _empty_coefficients(x: Tensor, factors: Sequence[int]) -> Tensor:
    b, c, h, w = x.shape
    return x.new_empty((b, _count(h, factors), _count(w, factors), c))


@mix_bands_triton.register_fake
def _(x, maps, factors, act):
    prepare_tables(x, factors)
    return empty_map(x), _empty_means(x), _empty_coefficients(x, factors)


def gradient(
        grad: Tensor,
        grad_means: Optional[Tensor],
        x: Tensor,
        maps: Tensor,
        coefficients: Tensor,
        factors: Sequence[int],
        act: bool,
) -> Tuple[Tensor, Tensor]:
    """Gradients of :func:`mix_bands_triton` for x and maps. The low-passes are self-adjoint."""
    grad_x, grad_maps = empty_map(x), torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    if not x.numel():
        return grad_x, grad_maps.zero_()
    mix.backward(mix.spec_of(x, maps, factors, act), nhwc(grad), grad_means, nhwc(x), maps, coefficients,
                 grad_x.permute(0, 2, 3, 1), grad_maps)
    return grad_x, grad_maps


mix_bands_triton_backward = torch.library.custom_op(
    'fadc_timm::mix_bands_triton_backward', gradient, mutates_args=())


@mix_bands_triton_backward.register_fake
def _(grad, grad_means, x, maps, coefficients, factors, act):
    return empty_map(x), torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)


def _setup_context(ctx, inputs, output) -> None:
    x, maps, ctx.factors, ctx.act = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, maps, output[2])


def _backward_with(gradient: Any, ctx: Any, grad: Optional[Tensor], grad_means: Optional[Tensor]):
    x, maps, coefficients = ctx.saved_tensors
    if grad is None and grad_means is None:
        return None, None, None, None
    refuse_more('triton', grad, grad_means)
    grad = torch.zeros_like(x) if grad is None else grad.resolve_neg()
    grad_means = None if grad_means is None else grad_means.resolve_neg()
    return *gradient(grad, grad_means, x, maps, coefficients, ctx.factors, ctx.act), None, None


def _backward(ctx, grad: Optional[Tensor], grad_means: Optional[Tensor], _: Any):
    return _backward_with(mix_bands_triton_backward, ctx, grad, grad_means)


mix_bands_triton.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator for eager calls: autograd alone sees it, which is faster than a registered operator."""

    @staticmethod
    def forward(ctx, x, maps, factors, act):
        output = forward(x, maps, factors, act)
        _setup_context(ctx, (x, maps, factors, act), output)
        return output[:2]

    @staticmethod
    def backward(ctx, grad: Optional[Tensor], grad_means: Optional[Tensor]):
        return _backward_with(gradient, ctx, grad, grad_means)


def call(x: Tensor, maps: Tensor, factors: Sequence[int], act: bool) -> Tuple[Tensor, Tensor]:
    """The first two results of :func:`mix_bands_triton`."""
    return form_of_call(mix_bands_triton, _Eager, forward, (x, maps))(x, maps, factors, act)[:2]
