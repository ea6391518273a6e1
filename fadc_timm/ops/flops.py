"""FLOP formulas, so that counters see the operator as the convolution that it is.

torch's FlopCounterMode counts matrix products and convolutions, so it sees the `gather` and `grid_sample` backends by
itself; the operators without a formula are registered here. fvcore's counter takes :func:`fvcore_handlers`.
"""
from typing import Any, Callable, Dict, List

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch.utils.flop_counter import register_flop_formula

from . import _depthwise  # noqa: F401  registers torch.ops.fadc_timm

__all__ = ['fvcore_handlers']


def _prod(shape) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


@register_flop_formula(torch.ops.torchvision.deform_conv2d)
def _deform_conv2d(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _prod(out_shape) * _prod(weight_shape[1:])


@register_flop_formula(torch.ops.torchvision._deform_conv2d_backward)
def _deform_conv2d_backward(grad_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * _prod(grad_shape) * _prod(weight_shape[1:])


@register_flop_formula(torch.ops.fadc_timm.depthwise_gather)
def _depthwise_gather(table_shape, index_shape, weight_shape, kernel_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _prod(out_shape) * kernel_shape[1]


@register_flop_formula(torch.ops.fadc_timm.depthwise_gather_backward)
def _depthwise_gather_backward(
        grad_shape, table_shape, index_shape, weight_shape, kernel_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * _prod(grad_shape) * kernel_shape[1]


def fvcore_handlers() -> Dict[str, Callable[[List[Any], List[Any]], int]]:
    """Handlers for fvcore: `FlopCountAnalysis(model, x).set_op_handle(**fvcore_handlers())`.

    fvcore's unit is the multiply-add, and it calls a handler with the jit values of an operator's inputs and outputs.
    """
    def shape(value: Any) -> List[int]:
        return value.type().sizes()

    return {
        'torchvision::deform_conv2d': lambda i, o: _prod(shape(o[0])) * _prod(shape(i[1])[1:]),
        'fadc_timm::depthwise_gather': lambda i, o: _prod(shape(o[0])) * shape(i[3])[1],
    }
