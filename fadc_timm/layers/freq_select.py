"""Frequency Selection (FreqSelect): reweigh the frequency bands of a feature map at every position.

Paper, section 3: `Frequency-Adaptive Dilated Convolution for Semantic Segmentation` -
https://arxiv.org/abs/2403.05369
"""
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from ..ops.band_mix import choose_backend, mix_bands, mix_exported_bands, mix_predicted_bands
from ..ops.runtime import is_exporting
from .predictor_conv import PredictorConv2d

__all__ = ['FreqSelect']


class FreqSelect(nn.Module):
    """Frequency Selection.

    The map is split at 1/f of the Nyquist frequency for each f of `bands`; each band is weighted by a map
    `2 * sigmoid(conv(x))` in [0, 2]. The convolution starts at zero, so the module starts as the identity.
    """

    def __init__(
            self,
            in_channels: int,
            bands: Tuple[int, ...] = (2, 4, 8),
            lowfreq_att: bool = False,
            spatial_group: int = 1,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_channels: Number of channels.
            bands: Where the spectrum is split, as fractions 1/f of the Nyquist frequency, from high to low.
            lowfreq_att: Weigh the lowest band too, else it passes unweighted.
            spatial_group: Number of channel groups with weight maps of their own, above 64 one per channel.

        Raises:
            ValueError: A band is not an integer above 1, the groups do not divide the channels, or an option is of
                another type.
        """
        super().__init__()
        if not isinstance(bands, (tuple, list)) or not bands or any(
                isinstance(f, bool) or not isinstance(f, int) or f < 2 for f in bands):
            raise ValueError(f'bands must be a tuple of integers of at least 2 (f is 1/f of Nyquist), got {bands!r}.')
        if not isinstance(lowfreq_att, bool):
            raise ValueError(f'lowfreq_att must be true or false, got {lowfreq_att!r}.')
        if isinstance(spatial_group, bool) or not isinstance(spatial_group, int):
            raise ValueError(f'spatial_group must be an integer, got {spatial_group!r}.')
        groups = in_channels if spatial_group > 64 else spatial_group
        if groups < 1 or in_channels % groups:
            raise ValueError(f'spatial_group={spatial_group} does not divide in_channels={in_channels}.')
        self.in_channels = in_channels
        self.bands = tuple(bands)
        self.lowfreq_att = lowfreq_att
        self.spatial_group = groups
        self.num_maps = len(bands) + int(lowfreq_att)
        # all maps read the same tensor: one convolution, its outputs group by group
        self.conv = PredictorConv2d(
            in_channels, groups * self.num_maps, 3, padding=1, groups=groups, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Back to the identity."""
        self.conv.reset_parameters()

    def band_weights(self, x: Tensor) -> Tensor:
        """Weights of the bands at every position.

        Args:
            x: Map (B, C, H, W).

        Returns:
            (B, M, S, H, W) in [0, 2], 1 is the identity: M bands from high to low frequency, S spatial groups.
        """
        return 2 * torch.sigmoid(self._maps(x))

    def _maps(self, x: Tensor) -> Tensor:
        """The maps (B, M, S, H, W); the weights are 2 * sigmoid of them."""
        b, _, h, w = x.shape
        return self.conv(x).reshape(b, self.spatial_group, self.num_maps, h, w).transpose(1, 2)

    def forward(self, x: Tensor, backend: Optional[str] = None) -> Tensor:
        """x (B, C, H, W), any size and real dtype, to the same shape and dtype. backend: as in :meth:`mix`."""
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(f'FreqSelect wants (B, {self.in_channels}, H, W), got {list(x.shape)}.')
        if torch.jit.is_scripting():
            return mix_bands(x, self.band_weights(x), list(self.bands))
        return self.mix(x, backend)[0]

    @torch.jit.unused
    def mix(self, x: Tensor, backend: Optional[str] = None) -> Tuple[Tensor, Optional[Tensor]]:
        """Mix the bands.

        Args:
            x: Map (B, C, H, W).
            backend: The convolution's backend: 'triton' goes for the band mix too, and with 'grid_sample' and
                'reference' it is in torch's operators; None to choose.

        Returns:
            What :meth:`forward` returns, and numbers (B, n, C) whose sum over n is its mean, if the backend makes
            them on the way, or None.
        """
        if is_exporting() and choose_backend(x, backend) == 'written_out':
            return mix_exported_bands(x, self.conv(x), list(self.bands), self.spatial_group), None
        return mix_predicted_bands(x, self._maps(x), list(self.bands), backend)

    def extra_repr(self) -> str:
        return f'bands={self.bands}, lowfreq_att={self.lowfreq_att}, spatial_group={self.spatial_group}'
