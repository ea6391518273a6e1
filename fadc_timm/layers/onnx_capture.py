"""A layer as torch's ONNX exporter captures it: one operator.

The exporter runs a network on fake tensors three times: to capture it, to see which operators write into their
arguments, and to decompose it. An operator takes milliseconds each time, or tens of them where sizes are symbolic. In
eval mode a layer writes into nothing: the first two runs see one operator that has only a shape, and the third run
writes it out.
"""
from typing import Any, Dict, List, MutableMapping
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from ..ops.runtime import makes_onnx, writes_out

__all__ = ['captures_whole', 'whole_layer']

# torch 2.11 loses the constants of operators that are decomposed
_KEEPS_CONSTANTS = TorchVersion(torch.__version__) >= '2.14'

# The layers of the graphs that are being made, by the number that stands for one there: its id.
_layers: MutableMapping[int, Any] = WeakValueDictionary()


class _Parts(nn.Module):
    """A module that calls the parts of a layer one by one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.by_parts(x)

    def tensors(self) -> Dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


@writes_out
def _write_out(x: Tensor, tensors: List[Tensor], layer: int) -> Tensor:
    """The output of a layer whose parameters and buffers are these."""
    parts = _Parts(_layers[layer])
    return torch.func.functional_call(parts, dict(zip(parts.tensors(), tensors)), (x,))


def _shape(x: Tensor, tensors: List[Tensor], layer: int) -> Tensor:
    """A fake tensor of the plain convolution's shape, which is that of the output."""
    parts = _Parts(_layers[layer])
    conv, weight = parts.layer, dict(zip(parts.tensors(), tensors))['layer.weight']
    return F.conv2d(x, weight, None, conv.stride, conv.inner_padding + conv.outer_padding, conv.dilation, conv.groups)


_operator = torch.library.custom_op('fadc_timm::whole_layer', _write_out, mutates_args=())
_operator.register_fake(_shape)
# torch finds the shape of an operator that has a decomposition by running that, unless it has an entry of this type too
torch._decomp.register_decomposition(torch.ops.fadc_timm.whole_layer.default, type='meta')(_shape)
torch._decomp.register_decomposition(torch.ops.fadc_timm.whole_layer.default)(_write_out)


def captures_whole(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is to be one operator: the exporter captures it in eval mode, and will decompose it.

    Not under autocast, which may be off when the exporter decomposes, and not where the weight is parametrized.
    """
    return (_KEEPS_CONSTANTS and makes_onnx() and layer._parameters.get('weight') is not None
            and not any(m.training for m in layer.modules()) and not torch.is_autocast_enabled(x.device.type))


def whole_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer.by_parts(x)` in one operator."""
    _layers[id(layer)] = layer
    return _operator(x, list(_Parts(layer).tensors().values()), id(layer))
