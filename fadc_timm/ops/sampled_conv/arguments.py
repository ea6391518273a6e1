"""The checked arguments of one call, as every backend receives them."""
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..runtime import accumulation_dtype, as_dtype, is_depthwise, is_exporting, is_transformed

Gains = Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]

NO_GAINS: Gains = (None, None, None, None)


def why_not_transformed() -> Optional[str]:
    """Why kernels that have only gradients cannot run now, or None."""
    if is_transformed():
        return ("it has no forward-mode derivatives and no rules for the transforms of torch.func; the backends "
                "'grid_sample' and 'reference' have")
    return None


def split_kernel(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """A kernel (O, C/groups, k, k) as its mean over the taps (O, C/groups, 1, 1) and the rest, in its dtype.

    The rest may be small beside the kernel, so half precisions are split in float32 and then rounded.
    """
    exact = as_dtype(weight, accumulation_dtype(weight.dtype))
    mean = exact.mean(dim=(2, 3), keepdim=True)
    return as_dtype(mean, weight.dtype), as_dtype(exact - mean, weight.dtype)


def headroom(taps: int) -> int:
    """What totals of samples over the taps are divided by, and the kernel's mean is multiplied by.

    The range of float16 is then that of a sample, as in a plain convolution. A power of two rounds nothing.
    """
    return 1 << (int(taps) - 1).bit_length()  # a tensor, where it comes from a shape in torch.jit.trace


def step_groups(steps: Tensor, kernel_size: int, spacing: Optional[Sequence[int]]) -> int:
    """Number of groups of channels with steps of their own, for steps and spacing as in :class:`ConvArgs`."""
    return steps.shape[1] // (2 * kernel_size ** 2) if spacing else steps.shape[1]


@dataclass(eq=False)
class ConvArgs:
    """Arguments of :func:`adaptive_dilated_conv2d` or :func:`deform_conv2d` after checking.

    Shapes: x (B, C, H, W), weight (O, C/groups, k, k), mask (B, G*k*k, H', W') or None, bias (O,) or None, gains
    ``(low_in (B, C), low_out (B, O), high_in (B, C), high_out (B, O))``, each None for ones.

    `steps` and `spacing` say where the taps read. A tap of output position p reads, on each axis, at the pixel
    `p * stride + first_pixel` plus a step, a real number.

    * Without `spacing`, steps holds dilations (B, G, H', W'). All taps of a position start from one pixel. The step of
      a tap is the dilation times its place, counted from the centre of the kernel.
    * With `spacing`, steps holds offsets (B, G*k*k*2, H', W'), a row and a column for each tap. The taps start from a
      convolution's pixels, `spacing` apart. The step of a tap is its offset.

    No named tuple, whose properties dynamo does not know in torch 2.8 and earlier.
    """
    x: Tensor
    weight: Tensor
    steps: Tensor
    mask: Optional[Tensor]
    bias: Optional[Tensor]
    gains: Gains
    stride: Tuple[int, int]
    padding: Tuple[int, int]  # at dilation 1, maybe negative; with `spacing` that of the convolution
    groups: int
    spacing: Optional[Tuple[int, int]] = None  # the dilation of the convolution whose taps the offsets move

    @property
    def kernel_size(self) -> int:
        return self.weight.shape[-1]

    @property
    def step_groups(self) -> int:
        return step_groups(self.steps, self.kernel_size, self.spacing)

    @property
    def out_size(self) -> Tuple[int, int]:
        h, w = self.steps.shape[2:]
        return h, w

    @property
    def has_gains(self) -> bool:
        return any(g is not None for g in self.gains)

    @property
    def is_depthwise(self) -> bool:
        return is_depthwise(self.x.shape[1], self.weight.shape[0], self.groups)

    def to(self, dtype: torch.dtype) -> 'ConvArgs':
        """The call in another dtype."""
        x, weight, steps = (t.to(dtype) for t in (self.x, self.weight, self.steps))
        mask, bias, low_in, low_out, high_in, high_out = (
            None if t is None else t.to(dtype) for t in (self.mask, self.bias, *self.gains))
        return ConvArgs(
            x, weight, steps, mask, bias, (low_in, low_out, high_in, high_out), self.stride, self.padding, self.groups,
            self.spacing)

    def first_pixel(self, axis: int, tap: int) -> int:
        """The pixel on an axis (0 rows, 1 columns) from which a row or column of taps of output position 0 starts."""
        if self.spacing is None:
            return self.kernel_size // 2 - self.padding[axis]
        return tap * self.spacing[axis] - self.padding[axis]

    def geometry(self) -> Tuple[List[int], List[int], List[int], int]:
        """Stride, padding, spacing (empty for none) and groups as arguments of an operator of torch."""
        # in torch.jit.trace what comes from a shape is a tensor, which is no element of a list of integers
        integer = int if torch.jit.is_tracing() else (lambda n: n)
        stride, padding, spacing = ([integer(n) for n in pair] for pair in (
            self.stride, self.padding, self.spacing or ()))
        return stride, padding, spacing, self.groups

    def split_weight(self) -> Tuple[Tensor, Tensor]:
        """AdaKern's parts: the mean over the taps (O, C/groups, 1, 1) and the rest (O, C/groups, k, k)."""
        return split_kernel(self.weight)


def scale_channels(x: Tensor, gain: Optional[Tensor]) -> Tensor:
    """Multiply the channels of x (B, C, H, W) by a gain (B, C), or by one."""
    if gain is None:
        return x
    if not torch.jit.is_scripting():
        if is_exporting():
            return x * gain.view(-1, gain.shape[1], 1, 1)  # one node
    return x * gain[:, :, None, None]


def combine_parts(high: Tensor, low: Tensor, args: ConvArgs) -> Tensor:
    """Output gains and bias on the two parts (B, O, H', W')."""
    y = scale_channels(high, args.gains[3]) + scale_channels(low, args.gains[1])
    return y if args.bias is None else y + args.bias[:, None, None]
