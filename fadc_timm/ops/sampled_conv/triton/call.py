"""A call of the Triton backend without its tensors: shapes, strides, bundles of groups, tiles of positions.

A call is made once per set of shapes, strides and dtypes, and kept. So are the launches that follow from it.
"""
import functools
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ...runtime import accumulation_dtype, is_depthwise
from ...triton_support import cdiv, index_type, types_of

__all__ = ['ACTS', 'Call', 'Spec', 'Tile', 'mask_in']

# AdaDR's activations by the kernels' numbers. With number 0 the tensors hold the dilation and the mask themselves.
ACTS = ('none', 'abs', 'relu', 'zero')

# From this number of channels on a matrix product runs well. Narrower groups are bundled.
_MIN_BUNDLE = 32


class Spec(NamedTuple):
    """What determines a call.

    x, steps, weight: Shapes. step_strides, mask_strides: In elements; mask_strides is None if the mask has no tensor of
    its own.
    split: Whether there are gains, for which the kernel is split. act, base, gains_act: See :func:`two_step_conv2d`.
    stride, padding, spacing: Of the rows and of the columns; spacing is empty for dilations.
    workspace: Bytes that the columns may take at a time.
    """
    x: Tuple[int, ...]
    dtype: torch.dtype
    steps: Tuple[int, ...]
    step_strides: Tuple[int, ...]
    mask_strides: Optional[Tuple[int, ...]]
    weight: Tuple[int, ...]
    split: bool
    act: int
    base: float
    gains_act: bool
    stride: Tuple[int, ...]
    padding: Tuple[int, ...]
    spacing: Tuple[int, ...]
    groups: int
    workspace: int


class Tile(NamedTuple):
    """Some samples, or some positions of one sample, whose columns fit into the workspace."""
    first_sample: int
    samples: int
    first: int
    length: int  # positions of each sample

    @property
    def positions(self) -> int:
        return self.samples * self.length


def mask_in(steps: Tensor, mask: Optional[Tensor], groups: int, joint: bool) -> Tensor:
    """The tensor that the kernels read the mask from: that of the steps, if it holds both.

    Without a mask it is that of the steps, and the kernels do not read it as a mask.
    """
    if joint:
        return steps[:, groups:]
    return steps if mask is None else mask


class Call:
    """What the kernels have to know about a call.

    b, c, h, w: Shape of the map. o: Output channels. k: Side of the kernel. out_h, out_w: Size of the output.
    area, positions: Output positions of one sample, and of the batch.
    joint: Whether the tensor of the dilation holds the mask too.
    step_channels: Channels of the tensor of steps that a step group has: its dilation, or its offsets.
    step_groups, step_width: Number of groups of channels with steps of their own, and the channels of each.
    bundles, width, out_width: Number of bundles, and the input and output channels of each. A bundle is some groups
        together, wide enough for a matrix product, with a block-diagonal kernel.
    strides, pixels, constants: Arguments of all kernels that sample.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.b, self.c, self.h, self.w = spec.x
        self.o, self.per_group, self.k, _ = spec.weight
        self.taps = self.k ** 2
        self.out_h, self.out_w = spec.steps[2:]
        self.area = self.out_h * self.out_w
        self.positions = self.b * self.area
        self.split = spec.split
        self.joint = spec.act > 0 and spec.mask_strides is None
        self.has_mask = self.joint or spec.mask_strides is not None
        self.step_channels = 2 * self.taps if spec.spacing else 1
        self.step_groups = spec.steps[1] // (1 + self.taps if self.joint else self.step_channels)
        self.step_width = self.c // self.step_groups
        self.is_depthwise = is_depthwise(self.c, self.o, spec.groups)
        self.wide = accumulation_dtype(spec.dtype)
        self.acc, self.upcast = types_of(spec.dtype)
        self.out_per_group = self.o // spec.groups
        divisors = [m for m in range(1, spec.groups + 1) if spec.groups % m == 0]
        size = next((m for m in divisors if m * min(self.per_group, self.out_per_group) >= _MIN_BUNDLE), spec.groups)
        self.bundles, self.width, self.out_width = spec.groups // size, size * self.per_group, size * self.out_per_group
        first = 0 if spec.spacing else self.k // 2
        mask_strides = spec.step_strides if self.joint else spec.mask_strides or (0,) * 4
        self.strides = *spec.step_strides, *mask_strides
        self.pixels = first - spec.padding[0], first - spec.padding[1], *spec.stride, *(spec.spacing or (0, 0))
        self.constants: Tuple[Any, ...] = (
            self.k, bool(spec.spacing), self.split, self.has_mask, spec.act, spec.act > 0, spec.gains_act, self.acc,
            index_type(self.h * self.w * self.c))

    def channel_blocks(self, block_c: int) -> int:
        """Number of blocks of channels. No block spans two step groups."""
        return self.step_groups * cdiv(self.step_width, block_c)

    def tiles(self, block_p: int) -> List[Tile]:
        """Tiles of whole samples or, if one sample is too large, of blocks of its positions."""
        row_bytes = self.c * (self.taps + self.split) * self.spec.dtype.itemsize
        most = max(self.spec.workspace // row_bytes, block_p)
        if most >= self.area:
            step = most // self.area
            return [Tile(first, min(step, self.b - first), 0, self.area) for first in range(0, self.b, step)]
        step = most // block_p * block_p
        return [Tile(sample, 1, first, min(step, self.area - first))
                for sample in range(self.b) for first in range(0, self.area, step)]


@functools.lru_cache(maxsize=1024)
def call_of(spec: Spec) -> Call:
    """The call, made once."""
    return Call(spec)
