"""Neighbourhood attention: the signature, its checks, and the dispatch to a backend.

Papers: `Neighborhood Attention Transformer` - https://arxiv.org/abs/2204.07143, and
`Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001
"""
from typing import Any, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import accumulation_dtype, as_dtype, without_autocast
from ..settings import named_backend
from .arguments import AttentionArgs
from .backends import BACKENDS, choose_backend
from .neighbours import neighbours

__all__ = ['cut', 'filled', 'neighborhood_attention2d', 'neighborhood_mean2d', 'window_means']

IntOrPair = Union[int, Tuple[int, int]]


def _pair(name: str, value: Any) -> Tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in pair):
        raise TypeError(f'{name} must be an integer or a pair of integers, got {value!r}.')
    if any(v < 1 for v in pair):
        raise ValueError(f'{name} must be at least 1, got {value!r}.')
    return pair


def _window(kernel_size: Any, dilation: Any) -> Tuple[Tuple[int, int], Tuple[int, int]]:
    kernel, spacing = _pair('kernel_size', kernel_size), _pair('dilation', dilation)
    if any(n % 2 == 0 for n in kernel):
        raise ValueError(f'kernel_size must be odd, got {kernel_size!r}.')
    return kernel, spacing


def _filled(x: Tensor, rows: int, cols: int) -> Tensor:
    """x (..., H, W, c) with at least so many rows and columns, zeros below and to the right."""
    down, across = rows - x.shape[-3], cols - x.shape[-2]
    if down > 0 or across > 0:
        return F.pad(x, [0, 0, 0, max(across, 0), 0, max(down, 0)])
    return x


_filled_at_any_size = torch.jit.script_if_tracing(_filled)


def _is_traced() -> bool:
    """Whether the call is traced, for maps of all sizes; ONNX's older exporter, which traces too, is for one."""
    return torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export()


def filled(x: Tensor, rows: int, cols: int) -> Tensor:
    """x (..., H, W, c) with at least so many rows and columns; what is traced decides at each call."""
    if not torch.jit.is_scripting():
        if _is_traced():
            return _filled_at_any_size(x, rows, cols)
    return _filled(x, rows, cols)


def cut(y: Tensor, h: int, w: int) -> Tensor:
    """The first rows and columns of y (..., H, W, c), which are mostly all of it."""
    if not torch.jit.is_scripting():
        if not _is_traced() and y.shape[-3] == h and y.shape[-2] == w:
            return y
    return y[..., :h, :w, :]


def _check(q: Tensor, k: Tensor, v: Tensor, kernel: Tuple[int, int], bias: Optional[Tensor], dropout_p: float) -> None:
    for name, t in (('q', q), ('k', k), ('v', v)):
        if not isinstance(t, Tensor):
            raise TypeError(f'{name} must be a tensor of shape (B, heads, H, W, c), got {type(t).__name__}.')
        if t.dim() != 5 or t.shape[2] < 1 or t.shape[3] < 1 or t.shape[4] < 1:
            raise ValueError(f'{name} must have shape (B, heads, H, W, c), got {tuple(t.shape)}.')
        if not t.is_floating_point():
            raise TypeError(f'{name} must have a floating point dtype, got {t.dtype}.')
        if t.shape != q.shape:
            raise ValueError(f'{name} must have the shape of q, {tuple(q.shape)}, got {tuple(t.shape)}.')
        if t.dtype != q.dtype:
            raise TypeError(f'{name} must have the dtype of q, {q.dtype}, got {t.dtype}.')
        if t.device != q.device:
            raise ValueError(f'{name} is on {t.device} and q is on {q.device}, they must be on one device.')
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f'bias must be a tensor of shape (heads, 2*kh - 1, 2*kw - 1), got {type(bias).__name__}.')
        shape = (q.shape[1], 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        if tuple(bias.shape) != shape:
            raise ValueError(f'bias must have shape (heads, 2*kh - 1, 2*kw - 1) = {shape}, got {tuple(bias.shape)}.')
        if bias.dtype not in (q.dtype, torch.float32):
            raise TypeError(f'bias must have the dtype of q, {q.dtype}, or float32, got {bias.dtype}.')
        if bias.device != q.device:
            raise ValueError(f'bias is on {bias.device} and q is on {q.device}, they must be on one device.')
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f'dropout_p must be a number, got {dropout_p!r}.')
    if not 0 <= dropout_p < 1:
        raise ValueError(f'dropout_p must be at least 0 and less than 1, got {dropout_p!r}.')


def neighborhood_attention2d(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel_size: IntOrPair,
        dilation: IntOrPair = 1,
        bias: Optional[Tensor] = None,
        backend: Optional[str] = None,
        *,
        dropout_p: float = 0.,
) -> Tensor:
    """Attention of every position to its neighbours: softmax(q k^T / sqrt(c) + bias) v over a window of keys.

    On each axis the neighbours of a position are `kernel_size` points, `dilation` apart, itself in their middle. Near a
    border the window ends at the border, so every position has the same number of neighbours.

    Args:
        q: Queries (B, heads, H, W, c). A permuted view of a map (B, H, W, heads, c) is read as it is.
        k: Keys, likewise.
        v: Values, likewise.
        kernel_size: Odd size of the window, or one for rows and one for columns.
        dilation: Distance of neighbours, or one for rows and one for columns. A map with fewer than
            kernel_size * dilation rows or columns is padded with zeros below and to the right, which are attended to.
        bias: (heads, 2*kh - 1, 2*kw - 1), in the dtype of q or float32: added to the scores by the distance of key and
            query in points, of which (kh - 1, kw - 1) is none.
        backend: 'windows' (dense products of tiles, on any device), 'written_out' (in operators that every runtime
            has), 'flex' (torch's flex_attention), 'reference' (the definition in float64), or None: 'reference' where
            :class:`set_backend` or the environment variable FADC_TIMM_BACKEND names it, and else a choice.
        dropout_p: Share of the attention weights that is dropped.

    Returns:
        (B, heads, H, W, c) in the dtype of q. Under autocast q, k and v are cast to its dtype first.

    Raises:
        TypeError: An argument is not a tensor or of another dtype than q, or a size is no integer.
        ValueError: A shape, device or number is none of those above, or there is no such backend.
        NotImplementedError: The named backend, or the one that is set, cannot run this call.
    """
    kernel, spacing = _window(kernel_size, dilation)
    if isinstance(q, Tensor) and q.device.type != 'meta' and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
                   for t in (q, k, v))
    _check(q, k, v, kernel, bias, dropout_p)
    h, w = q.shape[2:4]
    q, k, v = (filled(t, kernel[0] * spacing[0], kernel[1] * spacing[1]) for t in (q, k, v))
    args = AttentionArgs(q, k, v, kernel, spacing, bias, dropout_p)
    if backend is None and named_backend() == 'reference':  # the only name that the convolution has too
        backend = 'reference'
    if backend is None:
        backend = choose_backend(args)
    elif backend not in BACKENDS:
        raise ValueError(f'There is no backend {backend!r} of neighbourhood attention, the backends are '
                         f'{", ".join(BACKENDS)}.')
    else:
        reason = BACKENDS[backend].why_not(args)
        if reason:
            raise NotImplementedError(f'The backend {backend!r} cannot run this call: {reason}.')
    with without_autocast(q):
        y = BACKENDS[backend].forward(args)
    return cut(y, h, w)


def neighborhood_mean2d(x: Tensor, kernel_size: IntOrPair, dilation: IntOrPair = 1) -> Tensor:
    """The mean of the neighbours of every position, as :func:`neighborhood_attention2d` has them.

    The mean over a window is that over rows of the mean over columns. Along an axis, k shifted maps are added up, and
    each position takes the sum of its window.

    Args:
        x: Map (B, H, W, C), with at least kernel size times dilation rows and columns.
        kernel_size: Odd size of the window, or one for rows and one for columns.
        dilation: Distance of neighbours, or one for rows and one for columns.

    Returns:
        (B, H, W, C) in the dtype of x.

    Raises:
        TypeError: x has no floating point dtype.
        ValueError: x is no map, or smaller than a window.
    """
    if not x.is_floating_point():
        raise TypeError(f'x must have a floating point dtype, got {x.dtype}.')
    if x.dim() != 4:
        raise ValueError(f'x must be (B, H, W, C), got {tuple(x.shape)}.')
    kernel, spacing = _window(kernel_size, dilation)
    if any(n < k * d for n, k, d in zip(x.shape[1:3], kernel, spacing, strict=True)):
        raise ValueError(f'x (B, H, W, C) must have at least kernel size {kernel} times dilation {spacing} rows and '
                         f'columns, got {tuple(x.shape)}.')
    return window_means(x, list(kernel), list(spacing))


def window_means(x: Tensor, kernel_size: List[int], dilation: List[int]) -> Tensor:
    """See :func:`neighborhood_mean2d`, without its checks; TorchScript can compile it."""
    dtype = x.dtype
    x = as_dtype(x, accumulation_dtype(dtype))  # sums of halves overflow where their mean does not
    for axis in range(1, 3):
        k, d, length = kernel_size[axis - 1], dilation[axis - 1], x.shape[axis]
        sums = x.narrow(axis, 0, length - (k - 1) * d)
        for i in range(1, k):
            sums = sums + x.narrow(axis, i * d, length - (k - 1) * d)
        x = (sums / k).index_select(axis, neighbours(length, k, d, x.device)[0][:, 0])
    return as_dtype(x, dtype)
