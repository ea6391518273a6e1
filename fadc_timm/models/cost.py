"""What a model costs, counted on the meta device (nothing is computed or allocated), or from a table of such counts."""
import csv
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Dict, NamedTuple, Tuple

import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..ops.flops import OPERATORS
from ..ops.settings import set_backend

__all__ = ['TABLE', 'Cost', 'listed_cost', 'model_cost', 'module_cost']

# Made by `python -m scripts.checks.cost_table` for the models and tags of one version of timm.
TABLE = Path(__file__).parents[1] / 'data' / 'costs.csv'


class Cost(NamedTuple):
    """Cost of a model for one image.

    params: Parameters in millions.
    gmacs: Multiply-adds of convolutions and matrix products, in 1e9.
    activations: Elements that convolutions and linear layers put out, in millions, as in timm's model cards; on other
        devices than meta some convolutions are products that put out more.
    """
    params: float
    gmacs: float
    activations: float


class _Activations(TorchDispatchMode):
    """Counts the elements that convolutions and matrix products put out, and those of our operators that are such."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        aten = torch.ops.aten
        products = (
            aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
        # how many of an operator's results are counted
        self.counted = {
            **dict.fromkeys(products, 1), **{operator.forward.default: operator.activations for operator in OPERATORS}}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        self.total += sum(y.numel() for y in outputs[:self.counted.get(func, 0)])
        return out


@cache
def _table() -> Dict[Tuple[str, int, str], Cost]:
    with TABLE.open(newline='') as file:
        return {(row['architecture'], int(row['classes']), row['input']): Cost(
            int(row['params']) / 1e6, int(row['macs']) / 1e9, int(row['activations']) / 1e6)
            for row in csv.DictReader(file)}


def listed_cost(arch: str, num_classes: int, input_size: Tuple[int, ...]) -> Cost:
    """The cost of a model from the table; counted, in about a second, where the table lacks it.

    The table is that of one version of timm, so models and tags that another version adds are counted.

    Args:
        arch: Name of an architecture, FADC or plain.
        num_classes: Number of classes.
        input_size: (C, H, W).
    """
    listed = _table().get((arch, num_classes, 'x'.join(map(str, input_size))))
    return listed if listed is not None else model_cost(arch, num_classes, tuple(input_size))


@cache
def model_cost(arch: str, num_classes: int, input_size: Tuple[int, ...], **kwargs: Any) -> Cost:
    """Count the cost of a model.

    Args:
        arch: Name of an architecture, FADC or plain.
        num_classes: Number of classes.
        input_size: (C, H, W).
        **kwargs: More arguments of `timm.create_model`, hashable ones.
    """
    return module_cost(timm.create_model(arch, num_classes=num_classes, device='meta', **kwargs).eval(), input_size)


def module_cost(model: nn.Module, input_size: Tuple[int, ...], device: str = 'meta') -> Cost:
    """Count the cost of a module.

    Args:
        model: Takes one tensor; in eval mode.
        input_size: (C, H, W).
        device: Where the model is.
    """
    x = torch.zeros(1, *input_size, device=device)
    # every backend counts the same, and this one runs on meta
    with torch.no_grad(), set_backend('gather') if device == 'meta' else nullcontext():
        with FlopCounterMode(display=False) as counter:
            model(x)
        with _Activations() as activations:
            model(x)
    params = sum(p.numel() for p in model.parameters())
    return Cost(params / 1e6, counter.get_total_flops() / 2e9, activations.total / 1e6)
