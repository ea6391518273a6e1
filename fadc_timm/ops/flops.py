"""FLOP formulas, so that counters see the operator as the convolution that it is.

torch's FlopCounterMode counts matrix products and convolutions, so it sees the `gather` and `grid_sample` backends by
itself; the operators without a formula are registered here. fvcore's counter takes :func:`fvcore_handlers`.
"""
from typing import Any, Callable, Dict, List

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch.utils.flop_counter import register_flop_formula

from . import sampled_conv  # noqa: F401  registers torch.ops.fadc_timm
from .band_mix.fused import multiply_adds

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


def _sampled_multiply_adds(y_shape, weight_shape, split) -> int:
    """Of the kernel, and where it is split of its mean, which sees the total over the taps."""
    c, k, _ = weight_shape[-3:]
    return _prod(y_shape) * c * (k * k + split)


@register_flop_formula(torch.ops.fadc_timm.sampled_conv2d)
def _sampled_conv2d(
        x_shape, dilation_shape, mask_shape, weight_shape, bias_shape, low_in_shape, low_out_shape, high_in_shape,
        high_out_shape, split, *args, out_shape=None, **kwargs) -> int:
    return 2 * _sampled_multiply_adds(out_shape[0], weight_shape, split)


@register_flop_formula(torch.ops.fadc_timm.sampled_conv2d_backward)
def _sampled_conv2d_backward(
        grad_shape, high_shape, x_shape, dilation_shape, mask_shape, weight_shape, low_in_shape, low_out_shape,
        high_in_shape, high_out_shape, split, *args, out_shape=None, **kwargs) -> int:
    return 4 * _sampled_multiply_adds(grad_shape, weight_shape, split)


@register_flop_formula(torch.ops.fadc_timm.two_step_conv2d)
def _two_step_conv2d(
        x_shape, weight_shape, bias_shape, dilation_shape, mask_shape, low_shape, high_shape, *args, out_shape=None,
        **kwargs) -> int:
    split = low_shape is not None or high_shape is not None
    return 2 * _sampled_multiply_adds(out_shape[0], weight_shape, split)


@register_flop_formula(torch.ops.fadc_timm.two_step_conv2d_backward)
def _two_step_conv2d_backward(
        grad_shape, high_part_shape, low_part_shape, x_shape, weight_shape, bias_shape, dilation_shape, mask_shape,
        low_shape, high_shape, *args, out_shape=None, **kwargs) -> int:
    split = low_shape is not None or high_shape is not None
    return 4 * _sampled_multiply_adds(grad_shape, weight_shape, split)


@register_flop_formula([torch.ops.fadc_timm.mix_low_passes, torch.ops.fadc_timm.mix_bands_triton])
def _mix_low_passes(x_shape, steps_shape, factors, *args, out_shape=None, **kwargs) -> int:
    return 2 * multiply_adds(x_shape, factors)


@register_flop_formula([torch.ops.fadc_timm.mix_low_passes_backward, torch.ops.fadc_timm.mix_bands_triton_backward])
def _mix_low_passes_backward(
        grad_shape, x_shape, steps_shape, factors, *args, out_shape=None, **kwargs) -> int:
    return 4 * multiply_adds(x_shape, factors)


def fvcore_handlers() -> Dict[str, Callable[[List[Any], List[Any]], int]]:
    """Handlers for fvcore: `FlopCountAnalysis(model, x).set_op_handle(**fvcore_handlers())`.

    fvcore's unit is the multiply-add, and it calls a handler with the jit values of an operator's inputs and outputs.
    """
    def shape(value: Any) -> List[int]:
        return value.type().sizes()

    def integers(value: Any) -> List[int]:
        return [v.toIValue() for v in value.node().inputs()]

    return {
        'torchvision::deform_conv2d': lambda i, o: _prod(shape(o[0])) * _prod(shape(i[1])[1:]),
        'fadc_timm::sampled_conv2d': lambda i, o: _sampled_multiply_adds(shape(o[0]), shape(i[3]), i[9].toIValue()),
        'fadc_timm::two_step_conv2d': lambda i, o: _sampled_multiply_adds(
            shape(o[0]), shape(i[1]), 'TensorType' in (i[5].type().kind(), i[6].type().kind())),
        'fadc_timm::mix_low_passes': lambda i, o: multiply_adds(shape(i[0]), integers(i[2])),
        'fadc_timm::mix_bands_triton': lambda i, o: multiply_adds(shape(i[0]), integers(i[2])),
    }
