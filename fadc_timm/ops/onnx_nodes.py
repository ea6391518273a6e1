"""Operators of ONNX in the graphs that torch's ONNX exporter makes.

The exporter takes torch's operator `onnx::Name.opsetN` for the node of ONNX that has this name. For some operators
torch finds the shape of the result by running a dozen others on fake tensors: where sizes are symbolic, a tenth of a
second for each call of grid_sample and 20 milliseconds for each product. Ours say their shapes themselves.
"""
from typing import Any, Callable, List, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import are_known, literal, makes_onnx

__all__ = ['clamp', 'grid_sample', 'has_few_pixels', 'matmul', 'multiply']

OPSET = 18  # the one in which the exporter writes, before it converts to the one that is asked for


def _node(name: str, shape: Callable[..., List[int]]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorate a function that computes what a node of ONNX does: its inputs are positional, its attributes are not.

    Args:
        name: Of ONNX's operator.
        shape: The shape of the result, from the same arguments.
    """
    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # The exporter knows such operators from torch 2.8 on. torch has some of its own, and may have this one.
        taken = hasattr(getattr(torch.ops.onnx, name, None), f'opset{OPSET}')
        if taken or not hasattr(torch.onnx, 'ops'):
            return function
        operator = torch.library.custom_op(f'onnx::{name}.opset{OPSET}', function, mutates_args=())
        operator.register_fake(lambda x, *args, **kwargs: x.new_empty(shape(x, *args, **kwargs)))
        return operator

    return decorate


def _broadcast(a: Sequence[int], b: Sequence[int]) -> List[int]:
    """The sizes of a result. Symbolic sizes are no ones, and those that meet are the same."""
    few, many = sorted((list(a), list(b)), key=len)
    few = [1] * (len(many) - len(few)) + few
    return [m if type(n) is int and n == 1 else n for n, m in zip(many, few)]


@_node('Mul', lambda a, b: _broadcast(a.shape, b.shape))
def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return a * b


@_node('MatMul', lambda a, b: [*_broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]])
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@_node('GridSample', lambda x, grid, **attributes: [*x.shape[:2], *grid.shape[1:3]])
def _grid_sample(x: Tensor, grid: Tensor, *, mode: str, padding_mode: str, align_corners: int) -> Tensor:
    return F.grid_sample(x, grid, mode, padding_mode, bool(align_corners))


@_node('Clip', lambda x, low, high: list(x.shape))
def _clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return x.clamp(low, high)


def has_few_pixels(x: Tensor) -> bool:
    """Whether a product with a matrix between all pixels of x (B, C, H, W) is the fastest way from pixels to others.

    On more than 8x8 a product takes a runtime longer than to sample, and than to go through the frequencies.
    """
    h, w = x.shape[2:]
    return makes_onnx(x) and are_known(h, w) and h == w <= 8


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`."""
    return _matmul(a, b) if makes_onnx(a) else a @ b


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """`a * b`, of one dtype."""
    return _multiply(a, b) if makes_onnx(a) else a * b


def grid_sample(x: Tensor, grid: Tensor) -> Tensor:
    """`F.grid_sample`, bilinear, with zeros outside of the map."""
    sample: Any = _grid_sample if makes_onnx(x) else F.grid_sample
    return sample(x, grid, mode='bilinear', padding_mode='zeros', align_corners=False)


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """`x.clamp(low, high)`."""
    if makes_onnx(x):
        return _clip(x, *(literal(bound, x.dtype, x.device) for bound in (low, high)))
    return F.hardtanh(x, low, high)  # the older exporter makes one node of it, and two of clamp
