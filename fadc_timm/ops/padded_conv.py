"""A convolution with few outputs on tensor cores: one launch pads weight and bias with zeros to a multiple of 8."""
import functools
from typing import Any, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_support
from .runtime import is_plain_eager
from .triton_support import Launch, cdiv

__all__ = ['padded_conv2d', 'wants_padding']

_MULTIPLE = 8


def wants_padding(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether :func:`padded_conv2d` is the way to convolve x in this dtype.

    Without it, cuDNN pads too if the number of outputs is no multiple of 8, but pads each map, in several launches.
    """
    return (triton_support.is_default_on(x.device.type) and dtype in (torch.float16, torch.bfloat16)
            and weight.shape[0] % _MULTIPLE != 0 and is_plain_eager(x, weight)
            and (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)))


@functools.lru_cache(maxsize=256)
def _launch(shape: Tuple[int, ...], strides: Tuple[int, ...], padded: int, upcast: bool) -> Launch:
    from .triton_math import pad_outputs
    outputs, channels, k, _ = shape
    return Launch(
        pad_outputs, (cdiv(padded * channels * k * k, 1024),),
        (outputs, channels, padded, strides[0], strides[1], strides[3]), (k * k, upcast, 1024))


class _PadOutputs(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        padded = cdiv(len(weight), _MULTIPLE) * _MULTIPLE
        out = torch.empty(padded, *weight.shape[1:], dtype=dtype, device=weight.device,
                          memory_format=torch.channels_last)
        out_bias = torch.empty(padded, dtype=dtype, device=weight.device)
        upcast = triton_support.types_of(dtype)[1]
        triton_support.launch(
            _launch(tuple(weight.shape), weight.stride(), padded, upcast), weight, bias, out, out_bias)
        ctx.outputs, ctx.dtypes = len(weight), (weight.dtype, bias.dtype)
        return out, out_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor):
        return (*(g[:ctx.outputs].to(dtype) for g, dtype in zip((grad_weight, grad_bias), ctx.dtypes)), None)


def padded_conv2d(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, *options: Any) -> Tensor:
    """F.conv2d of x in a dtype, with outputs padded to a multiple of 8.

    Args:
        x: Map (B, C, H, W).
        weight: (O, C/groups, k, k).
        bias: (O,).
        dtype: The dtype of the products and of the result.
        *options: stride, padding, dilation, groups; groups must be 1.

    Returns:
        (B, O, H', W'), a view of a map with more channels.
    """
    padded_weight, padded_bias = _PadOutputs.apply(weight, bias, dtype)
    return F.conv2d(x.to(dtype), padded_weight, padded_bias, *options)[:, :len(weight)]
