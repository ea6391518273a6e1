"""Convolutions with few outputs: those that predict FreqSelect's maps, and the dilation of a depthwise kernel."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.runtime import is_exporting

__all__ = ['convolve']

MOST = 4  # outputs; with more, oneDNN's convolution is the faster one


def _is_plain(conv: nn.Conv2d) -> bool:
    return (type(conv) is nn.Conv2d and not conv._forward_hooks and not conv._forward_pre_hooks
            and conv.out_channels <= MOST and conv.groups == 1 and conv.stride == conv.dilation == (1, 1)
            and conv.padding_mode == 'zeros'
            and all(isinstance(p, int) and p < k for p, k in zip(conv.padding, conv.kernel_size)))


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)` for x (B, C, H, W). On a CPU, where its outputs are few: one product for all taps, which then move.

    oneDNN computes a block of 8 or 16 outputs however few are wanted. Half precisions, and a convolution that is not
    plain (hooked, quantised, strided, dilated, grouped, padded beyond its kernel), are left to the module.
    """
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled('cpu')
    if x.device.type != 'cpu' or not exact or not _is_plain(conv) or is_exporting():
        return conv(x)
    (k, k_cols), (p, p_cols) = conv.kernel_size, (int(n) for n in conv.padding)
    h, w = x.shape[2:]
    size = out_h, out_w = h + 2 * p - k + 1, w + 2 * p_cols - k_cols + 1
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2) if channels_last else x.flatten(2)
    if torch.compiler.is_compiling():
        taps = conv.weight.permute(2, 3, 0, 1).reshape(-1, conv.in_channels)
        maps = (taps @ pixels).unflatten(1, (k * k_cols, -1)).unflatten(3, (h, w))
        maps = F.pad(maps.unflatten(1, (k, k_cols)), (p_cols, p_cols, p, p)).contiguous()
        # maps[:, i, j, :, y + i, x + j] over i and j, in a single loop of inductor's, which makes a scatter of F.fold
        strides = [maps.stride(n) for n in range(6)]
        y = maps.as_strided(
            (x.shape[0], k, k_cols, conv.out_channels, out_h, out_w),
            (strides[0], strides[1] + strides[4], strides[2] + strides[5], *strides[3:])).sum((1, 2))
    else:
        # F.fold moves a tap to the pixels that it reaches, a convolution reads from them
        taps = conv.weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, conv.in_channels)
        y = F.fold(taps @ pixels, size, (k, k_cols), padding=(k - 1 - p, k_cols - 1 - p_cols))
    assert isinstance(y, Tensor)
    return y if conv.bias is None else y + conv.bias[:, None, None]
