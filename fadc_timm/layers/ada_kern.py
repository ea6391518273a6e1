"""Adaptive Kernel (AdaKern): reweigh the low and the high frequency part of a kernel by the input.

Paper, section 3: `Frequency-Adaptive Dilated Convolution for Semantic Segmentation` -
https://arxiv.org/abs/2403.05369
"""
from typing import Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['AdaKern']


class AdaKern(nn.Module):
    """Gains for the two parts of a kernel: its mean over the taps (low) and the rest (high).

    `W' = low_out * low_in * mean(W) + high_out * high_in * (W - mean(W))`, with a gain in [0, 2] for each sample and
    input channel, and one for each sample and output channel. The heads start at zero, so all gains start at one.
    Whatever samples the map takes the gains: the module knows nothing of dilation.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_decompose: str = 'both',
            depthwise: bool = False,
            reduction: int = 16,
            min_channels: int = 16,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_channels: Number of input channels of the kernel.
            out_channels: Number of its output channels.
            kernel_decompose: Which parts have gains: 'both', 'low' or 'high'; the other part keeps gain one.
            depthwise: The kernel is depthwise: input gains only.
            reduction: The trunk has in_channels // reduction channels,
            min_channels: but not fewer than these.

        Raises:
            ValueError: There is no such kernel_decompose.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if kernel_decompose not in ('both', 'low', 'high'):
            raise ValueError(f"kernel_decompose must be 'both', 'low' or 'high', got {kernel_decompose!r}.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_decompose = kernel_decompose
        self.depthwise = depthwise
        self.parts = parts = 2 if kernel_decompose == 'both' else 1
        width = max(in_channels // reduction, min_channels)
        # the trunks of both parts read the same vector: one convolution; their heads are its groups, low before high
        self.fc = nn.Conv2d(in_channels, parts * width, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(parts * width, **dd)
        self.act = nn.ReLU()
        self.in_gain = nn.Conv2d(parts * width, parts * in_channels, 1, groups=parts, **dd)
        self.out_gain = None if depthwise else nn.Conv2d(parts * width, parts * out_channels, 1, groups=parts, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to gains of one."""
        nn.init.kaiming_normal_(self.fc.weight, mode='fan_out', nonlinearity='relu')
        self.norm.reset_parameters()
        for head in (self.in_gain, self.out_gain):
            if head is not None:
                for parameter in head.parameters():
                    nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """
        Args:
            x: Map (B, C, H, W), C = in_channels, before any padding.

        Returns:
            (low_in (B, C), low_out (B, O), high_in (B, C), high_out (B, O)), None where a gain is one by construction.
        """
        x = self.fc(x.mean(dim=(2, 3), keepdim=True))
        x = self.act(self.norm(x) if torch.jit.is_scripting() else self._normalize(x))
        first_in, last_in = self._gains(self.in_gain(x), self.in_channels)
        first_out: Optional[Tensor] = None
        last_out: Optional[Tensor] = None
        if self.out_gain is not None:
            first_out, last_out = self._gains(self.out_gain(x), self.out_channels)
        if self.kernel_decompose == 'both':
            return first_in, first_out, last_in, last_out
        if self.kernel_decompose == 'low':
            return first_in, first_out, None, None
        return None, None, first_in, first_out

    @torch.jit.unused
    def _normalize(self, x: Tensor) -> Tensor:
        """The norm, but in training on one value a channel, which has no variance, with the running statistics."""
        norm = self.norm
        synced = isinstance(norm, nn.SyncBatchNorm) and dist.is_initialized() and dist.get_world_size() > 1
        if x.shape[0] > 1 or not norm.training or synced:
            return norm(x)
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0., norm.eps)

    def _gains(self, x: Tensor, channels: int) -> Tuple[Tensor, Tensor]:
        """The gains of the first and of the last part, which are the same one where there is one."""
        gains = 2 * torch.sigmoid(x.flatten(1))
        return gains[:, :channels], gains[:, -channels:]

    def extra_repr(self) -> str:
        return f'{self.in_channels}, {self.out_channels}, kernel_decompose={self.kernel_decompose!r}'
