"""The convolutions that predict: FreqSelect's maps, AdaDR's dilation and mask. They start at zero."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import few_outputs
from ..ops.runtime import are_known, constant, convolution_dtype, is_exporting, is_transformed, under_autocast

__all__ = ['PredictorConv2d']

MOST = 4  # outputs; with more, oneDNN's convolution is the faster one
BLOCK = 16  # outputs that a runtime's convolution computes together, however few are wanted


@constant
def _one_hot(outputs: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A kernel (O, O*k, 1, k) that adds up k maps for each output, each moved by its place."""
    maps = torch.eye(outputs * k, dtype=dtype, device=device).view(outputs, k, -1)
    return maps.transpose(1, 2).unsqueeze(2).contiguous()


class PredictorConv2d(nn.Conv2d):
    """An `nn.Conv2d` that with few outputs multiplies once for all taps, then shifts and adds.

    Libraries compute a block of 8, 16 or 32 outputs however few are wanted. On a GPU half precisions go this way, see
    ops/few_outputs. On a CPU the convolution of oneDNN still computes half precisions, and every convolution that is
    strided, dilated, grouped or padded beyond its kernel.
    """

    def __init__(self, *args: Any, first: int = 0, first_bias: float = 0., **kwargs: Any) -> None:
        """
        Args:
            *args: As those of `nn.Conv2d`.
            first: Number of outputs, the first ones, whose bias does not start at zero.
            first_bias: Their bias at the start.
            **kwargs: As those of `nn.Conv2d`.
        """
        self.first, self.first_bias = first, first_bias  # read by reset_parameters, which nn.Conv2d calls
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Back to zeros and the biases of the start."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
            nn.init.constant_(self.bias[:self.first], self.first_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) to (B, O, H', W')."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        return self._eager(x)

    @torch.jit.unused
    def _eager(self, x: Tensor) -> Tensor:
        if self.groups == 1 and self.padding_mode == 'zeros' and not isinstance(self.padding, str):
            if few_outputs.suits(x, self.weight, convolution_dtype(x)):
                return few_outputs.call(
                    under_autocast(x), self.weight, self.bias, self.stride, self.padding, self.dilation)
        exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled('cpu')
        if is_exporting() and exact and self._fills_a_block(x):
            return self._by_columns(x)
        if x.device.type != 'cpu' or not exact or is_exporting() or is_transformed() or not self._has_products():
            return self._conv_forward(x, self.weight, self.bias)
        (k, k_cols), (p, p_cols) = self.kernel_size, (int(n) for n in self.padding)
        h, w = x.shape[2:]
        size = out_h, out_w = h + 2 * p - k + 1, w + 2 * p_cols - k_cols + 1
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2) if channels_last else x.flatten(2)
        if torch.compiler.is_compiling():
            taps = self.weight.permute(2, 3, 0, 1).reshape(-1, self.in_channels)
            maps = (taps @ pixels).unflatten(1, (k * k_cols, -1)).unflatten(3, (h, w))
            maps = F.pad(maps.unflatten(1, (k, k_cols)), (p_cols, p_cols, p, p)).contiguous()
            # The sum of maps[:, i, j, :, y + i, x + j] over i and j. Inductor makes this form one loop, and F.fold
            # a scatter.
            strides = [maps.stride(n) for n in range(6)]
            y = maps.as_strided(
                (x.shape[0], k, k_cols, self.out_channels, out_h, out_w),
                (strides[0], strides[1] + strides[4], strides[2] + strides[5], *strides[3:])).sum((1, 2))
        else:
            # F.fold moves a tap to the pixels that it reaches, a convolution reads from them
            taps = self.weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, self.in_channels)
            y = F.fold(taps @ pixels, size, (k, k_cols), padding=(k - 1 - p, k_cols - 1 - p_cols))
        assert isinstance(y, Tensor)
        return y if self.bias is None else y + self.bias[:, None, None]

    def _has_products(self) -> bool:
        return (
            self.out_channels <= MOST and self.groups == 1 and self.stride == self.dilation == (1, 1)
            and self.padding_mode == 'zeros'
            and all(isinstance(p, int) and p < k for p, k in zip(self.padding, self.kernel_size)))

    def _fills_a_block(self, x: Tensor) -> bool:
        columns = self.kernel_size[1]
        if self.out_channels > 1 and not are_known(*x.shape[2:]):
            return False  # a node of symbolic sizes takes torch's exporter tens of milliseconds
        return (self.groups == 1 < columns and self.out_channels * columns <= BLOCK and self.padding_mode == 'zeros'
                and not isinstance(self.padding, str))

    def _by_columns(self, x: Tensor) -> Tensor:
        """Each output from one map per column of the kernel: as many outputs as a runtime computes anyway."""
        (s, s_cols), (p, p_cols), (d, d_cols) = self.stride, (int(n) for n in self.padding), self.dilation
        columns = self.weight.permute(0, 3, 1, 2).reshape(-1, self.in_channels, self.kernel_size[0], 1)
        maps = F.conv2d(x, columns, None, (s, 1), (p, 0), (d, 1))
        moves = _one_hot(self.out_channels, self.kernel_size[1], x.dtype, x.device)
        return F.conv2d(maps, moves, self.bias, (1, s_cols), (0, p_cols), (1, d_cols))
