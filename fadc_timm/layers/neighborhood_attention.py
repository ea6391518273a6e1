"""Neighbourhood attention, and the same with FreqSelect and AdaKern.

Papers: `Neighborhood Attention Transformer` - https://arxiv.org/abs/2204.07143,
`Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001, and
`Frequency-Adaptive Dilated Convolution for Semantic Segmentation` - https://arxiv.org/abs/2403.05369
"""
from inspect import signature
from typing import Any, Optional, Tuple, Union

import torch
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..ops.neighborhood_attention import BACKENDS, neighborhood_attention2d
from ..ops.neighborhood_attention.functional import cut, filled, window_means
from ..ops.neighborhood_attention.written_out import attention, attention_weights
from .ada_kern import AdaKern, NormLayer
from .fad_conv import reset_parts
from .freq_select import FreqSelect
from .own_hooks import why_not_taken_over

__all__ = ['ATTENTION_OPTIONS', 'FADNeighborhoodAttention', 'NeighborhoodAttention']


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every position to the window around it, with a relative position bias.

    A map with fewer than kernel_size * dilation rows or columns is padded with zeros below and to the right before the
    projections, as the authors do: positions there are attended to, with the projections' biases as keys and values.
    In graphs of torch.fx, of timm's feature extractors too, it is a leaf.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            kernel_size: int = 7,
            dilation: Union[int, Tuple[int, int]] = 1,
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            backend: Optional[str] = None,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Number of channels.
            num_heads: Number of heads.
            kernel_size: Odd size of the window.
            dilation: Distance of neighbours, or one for rows and one for columns.
            qkv_bias: Add a bias to queries, keys and values.
            attn_drop: Share of the attention weights that training drops.
            proj_drop: Share of the output that training drops.
            backend: Backend of the operator, None to choose.

        Raises:
            ValueError: The heads do not divide the channels, a size is none, or there is no such backend.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'num_heads={num_heads} does not divide dim={dim}.')
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be an odd integer, got {kernel_size!r}.')
        pair = tuple(dilation) if isinstance(dilation, (tuple, list)) else (dilation, dilation)
        if len(pair) != 2 or any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in pair):
            raise ValueError(f'dilation must be an integer of at least 1, or two of them, got {dilation!r}.')
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f'backend must be None or one of {", ".join(BACKENDS)}, got {backend!r}.')
        if not 0 <= attn_drop < 1:
            raise ValueError(f'attn_drop must be at least 0 and less than 1, got {attn_drop!r}.')
        self.dim = dim
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = pair
        self.attn_drop = attn_drop
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the relative position bias anew. The projections have a method of their own."""
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) to the same shape."""
        if not torch.jit.is_scripting():
            tracer: Any = getattr(x, 'tracer', None)
            if tracer is not None:  # a proxy of torch.fx, and what follows branches on sizes
                return tracer.create_proxy('call_module', tracer.path_of_module(self), (x,), {})
        if x.dim() != 4 or x.shape[3] != self.dim or x.shape[1] < 1 or x.shape[2] < 1:
            raise ValueError(f'NeighborhoodAttention wants (B, H, W, {self.dim}), got {list(x.shape)}.')
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        return self._attend(x, None, None, None)

    def _attend(self, x: Tensor, values: Optional[Tensor], low: Optional[Tensor], high: Optional[Tensor]) -> Tensor:
        """Attention of x (B, H, W, C) to itself, or to values of another map; under gains (B, C), None for ones."""
        h, w = x.shape[1], x.shape[2]
        x = self._padded(x)
        if values is not None:
            values = self._padded(values)
        q, k, v = self._heads(self.qkv(x))
        if values is not None:
            v = self._heads(self.qkv(values))[2]
        y = self._from_heads(self._operator(q, k, v))
        if low is not None or high is not None:
            # softmax sums to one over the window, so the low part of its weights is uniform
            mean = window_means(
                self._from_heads(v), [self.kernel_size, self.kernel_size], [self.dilation[0], self.dilation[1]])
            low = torch.ones_like(high) if low is None and high is not None else low
            high = torch.ones_like(low) if high is None and low is not None else high
            assert low is not None and high is not None
            y = y * high[:, None, None].to(y.dtype) + mean * (low - high)[:, None, None].to(y.dtype)
        return self.proj_drop(self.proj(cut(y, h, w)))

    def _padded(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) with as many rows and columns as a window spans, at least."""
        return filled(x, self.kernel_size * self.dilation[0], self.kernel_size * self.dilation[1])

    @torch.jit.unused
    def attention_weights(self, x: Tensor) -> Tensor:
        """What each head attends to, for x (B, H, W, C) as the projections get it.

        Args:
            x: Of a FADNeighborhoodAttention, FreqSelect's output, except with `freq_select_for='v'`.

        Returns:
            (B, heads, H, W, k*k), row by row of the window, of sum 1.
        """
        h, w = x.shape[1], x.shape[2]
        q, k, _ = self._heads(self.qkv(self._padded(x)))
        kernel, dilation = [self.kernel_size, self.kernel_size], [self.dilation[0], self.dilation[1]]
        return attention_weights(q, k, kernel, dilation, self.rpb)[:, :, :h, :w]

    def _heads(self, qkv: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Projections (B, H, W, 3*C) as queries, keys and values (B, heads, H, W, c)."""
        # the gradient of chunks is one concatenation in the layout of qkv
        parts = qkv.chunk(3, dim=-1)
        return self._into_heads(parts[0]), self._into_heads(parts[1]), self._into_heads(parts[2])

    def _into_heads(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to a view (B, heads, H, W, c)."""
        b, h, w, c = x.shape
        return x.reshape(b, h, w, self.num_heads, c // self.num_heads).permute(0, 3, 1, 2, 4)

    def _from_heads(self, x: Tensor) -> Tensor:
        """(B, heads, H, W, c) to (B, H, W, C)."""
        return x.permute(0, 2, 3, 1, 4).flatten(3)

    def _operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout_p = self.attn_drop if self.training else 0.
        if torch.jit.is_scripting():
            return attention(
                q, k, v, [self.kernel_size, self.kernel_size], [self.dilation[0], self.dilation[1]], self.rpb,
                dropout_p)
        return self._eager(q, k, v, dropout_p)

    @torch.jit.unused
    def _eager(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        return neighborhood_attention2d(
            q, k, v, self.kernel_size, self.dilation, self.rpb, self.backend, dropout_p=dropout_p)

    def extra_repr(self) -> str:
        return f'{self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}'


@register_notrace_module
class FADNeighborhoodAttention(NeighborhoodAttention):
    """Neighbourhood attention whose input's spectrum, and whose weights, adapt to the input.

    FreqSelect comes before the projections. AdaKern splits the attention weights A of a position as it splits a kernel,
    into their mean and the rest. As they sum to one, the mean is the same everywhere, and
    `y = high * (A v) + (low - high) * mean(v)`, with a gain in [0, 2] for each sample and value channel, and the mean
    over the window. This form of AdaKern is derived, not the paper's, so it is off by default. Dropout of the attention
    weights comes after the split. At the start the output is that of the plain attention, whose parameters have the
    same names.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            kernel_size: int = 7,
            dilation: Union[int, Tuple[int, int]] = 1,
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            freq_select: bool = True,
            freq_select_for: str = 'qkv',
            bands: Tuple[int, ...] = (2, 4, 8),
            lowfreq_att: bool = False,
            spatial_group: int = 1,
            kernel_decompose: str = 'none',
            ada_kern_norm: NormLayer = 'layernorm2d',
            backend: Optional[str] = None,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Number of channels.
            num_heads: Number of heads.
            kernel_size: Odd size of the window.
            dilation: Distance of neighbours, or one for rows and one for columns.
            qkv_bias: Add a bias to queries, keys and values.
            attn_drop: Share of the attention weights that training drops.
            proj_drop: Share of the output that training drops.
            freq_select: Use FreqSelect.
            freq_select_for: What is projected from its output: 'qkv', or 'v' for the values alone.
            bands: FreqSelect's split frequencies, fractions 1/f of Nyquist.
            lowfreq_att: FreqSelect weighs the lowest band too.
            spatial_group: FreqSelect's groups of channels, above 64 one per channel.
            kernel_decompose: The parts of the attention weights with AdaKern's gains: 'both', 'low', 'high' or 'none'.
            ada_kern_norm: AdaKern's norm: 'layernorm2d' (per image), 'batchnorm2d', or see :class:`AdaKern`.
            backend: Backend of the operator, None to choose.

        Raises:
            ValueError: A value is outside of what is said above; the message names it.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, num_heads, kernel_size, dilation, qkv_bias, attn_drop, proj_drop, backend, **dd)
        if not isinstance(freq_select, bool):
            raise ValueError(f'freq_select must be true or false, got {freq_select!r}.')
        if freq_select_for not in ('qkv', 'v'):
            raise ValueError(f"freq_select_for must be 'qkv' or 'v', got {freq_select_for!r}.")
        self.freq_select_for = freq_select_for
        self.freq_select = FreqSelect(dim, bands, lowfreq_att, spatial_group, **dd) if freq_select else None
        # gains of the value channels alone, as of the input channels of a depthwise kernel
        self.ada_kern = None
        if kernel_decompose != 'none':
            self.ada_kern = AdaKern(dim, dim, kernel_decompose, depthwise=True, norm_layer=ada_kern_norm, **dd)

    @classmethod
    def from_attention(cls, attn: NeighborhoodAttention, **cfg: Any) -> 'FADNeighborhoodAttention':
        """Take over a plain attention: its arguments, its parameters (the objects themselves), and its mode.

        Args:
            attn: An attention of exactly the class `NeighborhoodAttention`.
            **cfg: The arguments that `NeighborhoodAttention` lacks, and backend.

        Raises:
            TypeError: attn is of another class, whose forward may compute something else.
            ValueError: An option has a value that is none of its own, or attn has hooks or methods that were set on
                it, which would be lost.
        """
        if type(attn) is not NeighborhoodAttention:
            raise TypeError(
                f'from_attention takes a NeighborhoodAttention, got {type(attn).__module__}.{type(attn).__name__}.')
        lost = why_not_taken_over(attn)
        if lost is not None:
            raise ValueError(f'The attention {lost}.')
        args = dict(
            dim=attn.dim, num_heads=attn.num_heads, kernel_size=attn.kernel_size, dilation=attn.dilation,
            qkv_bias=attn.qkv.bias is not None, attn_drop=attn.attn_drop, proj_drop=attn.proj_drop.p,
            backend=attn.backend, device=attn.rpb.device, dtype=attn.rpb.dtype)
        new = cls(**{**args, **cfg})
        new.qkv, new.rpb, new.proj, new.proj_drop = attn.qkv, attn.rpb, attn.proj, attn.proj_drop
        return new.train(attn.training)

    def reset_fadc_parameters(self) -> None:
        """Make FreqSelect and AdaKern the identity again; all others stay."""
        reset_parts(self)

    def _forward(self, x: Tensor) -> Tensor:
        selected = x
        if self.freq_select is not None:
            # a view (B, C, H, W), channels_last in memory, so FreqSelect copies nothing
            selected = self.freq_select(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        low: Optional[Tensor] = None
        high: Optional[Tensor] = None
        if self.ada_kern is not None:
            gains = self.ada_kern(selected.permute(0, 3, 1, 2))
            low, high = gains[0], gains[2]
        if self.freq_select_for == 'v':
            return self._attend(x, selected, low, high)
        return self._attend(selected, None, low, high)


# Arguments of FADNeighborhoodAttention that a model passes to all of its layers.
ATTENTION_OPTIONS = tuple(
    name for name in signature(FADNeighborhoodAttention).parameters
    if name == 'backend' or name not in signature(NeighborhoodAttention).parameters)
