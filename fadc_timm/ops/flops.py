"""FLOP formulas, so that counters see the operator as the convolution that it is.

torch's FlopCounterMode counts matrix products and convolutions, so it sees the `grid_sample` backend by itself.
`OPERATORS` is the one table of the operators that no counter knows: torch's counter, fvcore's (which takes
:func:`fvcore_handlers`) and models/cost.py read it.
"""
import copy
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from . import few_outputs, gains, sampled_conv  # noqa: F401  register torch.ops.fadc_timm
from .band_mix.fused import multiply_adds
from .neighborhood_attention import windows
from .runtime import is_depthwise
from .settings import set_backend

__all__ = ['OPERATORS', 'Operator', 'fvcore_handlers', 'layer_multiply_adds', 'ptflops_hook', 'thop_hook']

# The arguments of a call by their names in the operator's schema, with shapes in the place of tensors. 'y' is the shape
# of the first result; in the backward pass that of its gradient.
Arguments = Dict[str, Any]


class Operator(NamedTuple):
    """An operator and what it costs.

    forward, backward: The operator and its gradient, which has arguments of the same names.
    multiply_adds: Of the forward pass; the backward pass takes twice as many.
    activations: How many of its results, the first ones, count as activations, as those of convolutions and linear
        layers do.
    """
    forward: Any
    backward: Any
    multiply_adds: Callable[[Arguments], int]
    activations: int


def _prod(shape) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


def _sampled(call: Arguments, split: bool) -> int:
    """Multiply-adds with the kernel, and where it is split with its mean, which sees the total over the taps."""
    c, k, _ = call['weight'][-3:]
    return _prod(call['y']) * c * (k * k + split)


def _convolution(call: Arguments) -> int:
    return _prod(call['y']) * _prod(call['weight'][1:])


def _two_step(call: Arguments) -> int:
    """As :func:`_sampled`. A depthwise kernel is not split."""
    depthwise = is_depthwise(call['x'][1], call['weight'][0], call['groups'])
    return _sampled(call, not depthwise and (call['low'] is not None or call['high'] is not None))


OPERATORS = (
    Operator(
        torch.ops.torchvision.deform_conv2d, torch.ops.torchvision._deform_conv2d_backward,
        lambda call: _sampled(call, False), activations=1),
    Operator(
        torch.ops.fadc_timm.sampled_conv2d, torch.ops.fadc_timm.sampled_conv2d_backward,
        lambda call: _sampled(call, call['split']), activations=1),
    Operator(
        torch.ops.fadc_timm.two_step_conv2d, torch.ops.fadc_timm.two_step_conv2d_backward,
        _two_step, activations=1),
    Operator(
        torch.ops.fadc_timm.few_outputs_conv2d, torch.ops.fadc_timm.few_outputs_conv2d_backward,
        _convolution, activations=1),
    Operator(
        torch.ops.fadc_timm.mix_low_passes, torch.ops.fadc_timm.mix_low_passes_backward,
        lambda call: multiply_adds(call['x'], call['factors']), activations=0),
    Operator(
        torch.ops.fadc_timm.mix_bands_triton, torch.ops.fadc_timm.mix_bands_triton_backward,
        lambda call: multiply_adds(call['x'], call['factors']), activations=0),
    Operator(
        torch.ops.fadc_timm.gains_trunk, torch.ops.fadc_timm.gains_trunk_backward,
        lambda call: _prod(call['y']) * call['weight'][1], activations=1),
    Operator(
        torch.ops.fadc_timm.gains_heads, torch.ops.fadc_timm.gains_heads_backward,
        lambda call: _prod(call['y']) * call['weight'][1] * (1 if call['weight_2'] is None else 2), activations=2),
    Operator(
        torch.ops.fadc_timm.neighborhood_windows, torch.ops.fadc_timm.neighborhood_windows_backward,
        lambda call: windows.multiply_adds(call['q'], call['kernel_size']), activations=0),
)


def _bind(op: Any, values: Any) -> Arguments:
    return dict(zip((a.name for a in op.default._schema.arguments), values))


def _register(operator: Operator) -> None:
    def forward(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        y = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
        return 2 * operator.multiply_adds({**_bind(operator.forward, args), **kwargs, 'y': y})

    def backward(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        call = {**_bind(operator.backward, args), **kwargs}
        return 4 * operator.multiply_adds({**call, 'y': call['grad']})

    register_flop_formula(operator.forward)(forward)
    register_flop_formula(operator.backward)(backward)


for _operator in OPERATORS:
    _register(_operator)


def _of_jit(value: Any) -> Any:
    """A jit value as a formula takes it: a tensor's shape, the integers of a list, or a constant."""
    if value.type().kind() == 'TensorType':
        return value.type().sizes()
    if value.node().kind() == 'prim::ListConstruct':
        return [v.toIValue() for v in value.node().inputs()]
    return value.toIValue()


def _fvcore_handler(operator: Operator) -> Callable[[List[Any], List[Any]], int]:
    return lambda inputs, outputs: operator.multiply_adds(
        {**_bind(operator.forward, map(_of_jit, inputs)), 'y': _of_jit(outputs[0])})


def fvcore_handlers() -> Dict[str, Callable[[List[Any], List[Any]], int]]:
    """Handlers for fvcore: `FlopCountAnalysis(model, x).set_op_handle(**fvcore_handlers())`.

    fvcore's unit is the multiply-add, and it calls a handler with the jit values of an operator's inputs and outputs.
    """
    return {operator.forward._qualified_op_name: _fvcore_handler(operator) for operator in OPERATORS}


def layer_multiply_adds(layer: nn.Module, x: Tensor) -> int:
    """Multiply-adds of a layer and all that is in it, for an input of the shape of x, by torch's FlopCounterMode."""
    twin = copy.deepcopy(layer)
    for m in twin.modules():
        if 'backend' in m.__dict__:
            m.__dict__['backend'] = None
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
    twin = twin.to('meta')
    # every backend counts the same, and this one runs on meta
    with torch.no_grad(), set_backend('gather'), FlopCounterMode(display=False) as counter:
        twin(torch.empty(x.shape, dtype=x.dtype, device='meta'))
    return counter.get_total_flops() // 2


def thop_hook(layer: Any, inputs: Tuple[Tensor, ...], output: Tensor) -> None:
    """For thop: `thop.profile(model, inputs=(x,), custom_ops={fadc_timm.FADConv2d: thop_hook})`."""
    layer.total_ops += layer_multiply_adds(layer, inputs[0])


def ptflops_hook(layer: Any, inputs: Tuple[Tensor, ...], output: Tensor) -> None:
    """For ptflops: `get_model_complexity_info(..., custom_modules_hooks={fadc_timm.FADConv2d: ptflops_hook})`."""
    layer.__flops__ += layer_multiply_adds(layer, inputs[0])
