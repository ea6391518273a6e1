"""The band mix in Triton as an operator of torch, and its gradient."""
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from ...runtime import without_autocast
from ..low_pass import edges
from .mix import backward, forward, spec_of
from .tables import padded

__all__ = ['mix_bands_triton']


def _empty_map(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op('fadc_timm::mix_bands_triton', mutates_args=())
def mix_bands_triton(x: Tensor, maps: Tensor, factors: List[int], act: bool) -> Tuple[Tensor, Tensor]:
    """`mix_bands` in Triton.

    Args:
        x: Map (B, C, H, W), best channels_last; another layout costs one copy.
        maps: (B, M, S, H, W), any strides and float dtype: the weights of the bands, or if act what these are
            2 * sigmoid of.
        factors: Filters at 1/f of Nyquist, one less than there are bands.
        act: Whether the weights are 2 * sigmoid(maps).

    Returns:
        (B, C, H, W) channels_last, and the map's coefficients (B, J, J', C), which the gradient takes.
    """
    y = _empty_map(x)
    if not x.numel():
        return y, x.new_empty(0)
    with without_autocast(x):
        return y, forward(spec_of(x, maps, factors, act), _nhwc(x), maps, y.permute(0, 2, 3, 1))


def _count(n: int, factors: List[int]) -> int:
    """Frequencies of the tables on an axis of n points."""
    ends = [edges(n, f) for f in factors]
    return padded(max([2 * max(-low, high - 1, 0) + 1 for low, high in ends], default=1))


@mix_bands_triton.register_fake
def _(x, maps, factors, act):
    b, c, h, w = x.shape
    return _empty_map(x), x.new_empty(b, _count(h, factors), _count(w, factors), c)


@torch.library.custom_op('fadc_timm::mix_bands_triton_backward', mutates_args=())
def mix_bands_triton_backward(
        grad: Tensor,
        x: Tensor,
        maps: Tensor,
        coefficients: Tensor,
        factors: List[int],
        act: bool,
) -> Tuple[Tensor, Tensor]:
    """Gradients of :func:`mix_bands_triton` for x and maps. The low-passes are self-adjoint."""
    grad_x, grad_maps = _empty_map(x), torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    if not x.numel():
        return grad_x, grad_maps.zero_()
    spec = spec_of(x, maps, factors, act)
    with without_autocast(x):
        backward(spec, _nhwc(grad), _nhwc(x), maps, coefficients, grad_x.permute(0, 2, 3, 1), grad_maps)
    return grad_x, grad_maps


@mix_bands_triton_backward.register_fake
def _(grad, x, maps, coefficients, factors, act):
    return _empty_map(x), torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)


def _setup_context(ctx, inputs, output) -> None:
    x, maps, ctx.factors, ctx.act = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, maps, output[1])


def _backward(ctx, grad: Optional[Tensor], _: Any):
    if grad is None:
        return None, None, None, None
    return *mix_bands_triton_backward(grad, *ctx.saved_tensors, ctx.factors, ctx.act), None, None


mix_bands_triton.register_autograd(_backward, setup_context=_setup_context)
