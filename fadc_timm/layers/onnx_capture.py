"""A layer as torch's ONNX exporter captures it: one operator.

The exporter runs a network on fake tensors three times: to capture it, to see which operators write into their
arguments, and to decompose it. An operator takes milliseconds each time, or tens of them where sizes are symbolic. In
eval mode a layer writes into nothing: the first two runs see one operator that has only a shape, and the third run
writes it out.
"""
import itertools
import random
from collections import OrderedDict
from typing import Any, Dict, List

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from ..ops.runtime import is_transformed, makes_onnx, writes_out
from ..ops.settings import named_backend
from .own_hooks import does_more, has_global_hooks

__all__ = ['captures_whole', 'whole_layer']

# torch 2.11 loses the constants of operators that are decomposed
_KEEPS_CONSTANTS = TorchVersion(torch.__version__) >= '2.14'

# The latest captured layers, as they were then, by the number that stands for one in a graph.
_captured: 'OrderedDict[int, _Parts]' = OrderedDict()
# a graph that another process reads finds none there
_numbers = itertools.count(random.SystemRandom().getrandbits(48))
_MOST = 4096  # a few kilobytes each


def _without_tensors(module: nn.Module) -> nn.Module:
    """A module as it is now, with its parts; in place of its parameters and buffers there is one empty tensor."""
    copied = module.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    for name in ('_parameters', '_buffers'):
        copied.__dict__[name] = {n: None if t is None else _EMPTY for n, t in module.__dict__[name].items()}
    copied.__dict__['_modules'] = {n: None if m is None else _without_tensors(m) for n, m in module._modules.items()}
    return copied


_EMPTY = torch.empty(0)


class _Parts(nn.Module):
    """A module that calls the parts of a layer one by one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.by_parts(x)

    def tensors(self) -> Dict[str, Tensor]:
        """Of this module by name, also those that it has twice."""
        named = *self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)
        return dict(named)


def _find(layer: int) -> _Parts:
    if layer not in _captured:
        raise RuntimeError(
            f'The captured layer {layer} is not in this process, or more than {_MOST} were captured after it: the '
            "programs of torch's ONNX exporter are for the export alone. Save the ONNX file, or use torch.export.")
    return _captured[layer]


@writes_out
def _write_out(x: Tensor, tensors: List[Tensor], layer: int) -> Tensor:
    """The output of a layer whose parameters and buffers are these."""
    parts = _find(layer)
    return torch.func.functional_call(parts, dict(zip(parts.tensors(), tensors)), (x,), tie_weights=False)


def _shape(x: Tensor, tensors: List[Tensor], layer: int) -> Tensor:
    """A fake tensor of the plain convolution's shape, which is that of the output."""
    parts = _find(layer)
    conv, weight = parts.layer, dict(zip(parts.tensors(), tensors))['layer.weight']
    return F.conv2d(x, weight, None, conv.stride, conv.inner_padding + conv.outer_padding, conv.dilation, conv.groups)


_operator = torch.library.custom_op('fadc_timm::whole_layer', _write_out, mutates_args=())
_operator.register_fake(_shape)
# torch finds the shape of an operator that has a decomposition by running that, unless it has an entry of this type too
torch._decomp.register_decomposition(torch.ops.fadc_timm.whole_layer.default, type='meta')(_shape)
torch._decomp.register_decomposition(torch.ops.fadc_timm.whole_layer.default)(_write_out)


def captures_whole(layer: Any, x: Tensor) -> bool:
    """Whether a layer is to be one operator: the exporter captures it in eval mode, and will decompose it.

    Not under autocast, which may be off when the exporter decomposes; not where the weight is parametrized, or where
    hooks want what the parts compute; and not with backends that write into their results.
    """
    if not (_KEEPS_CONSTANTS and makes_onnx(x)):
        return False
    name = named_backend() if layer.backend is None else layer.backend
    if name == 'torchvision' and layer.inner_padding < 0 and layer.sampling == 'dilation':
        return False  # the operator detaches steps in place then, which a decomposition may not
    return (name in (None, 'grid_sample', 'torchvision') and layer._parameters.get('weight') is not None
            and not any(m.training or (m is not layer and does_more(m)) for m in layer.modules())
            and not (has_global_hooks() or is_transformed() or torch.is_autocast_enabled(x.device.type)))


def whole_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer.by_parts(x)` in one operator."""
    number = next(_numbers)
    _captured[number] = _Parts(_without_tensors(layer))
    while len(_captured) > _MOST:
        _captured.popitem(last=False)
    return _operator(x, list(_Parts(layer).tensors().values()), number)
