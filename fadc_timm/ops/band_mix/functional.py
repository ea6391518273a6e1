"""Mixing of frequency bands: the signature, and the choice of a backend (FADC paper, section 3, FreqSelect)."""
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ..runtime import accumulation_dtype, is_exporting, is_transformed, match_layout, without_autocast
from ..settings import named_backend
from ..triton_support import is_default_on
from . import fused, triton
from .low_pass import check_factors, low_pass

__all__ = ['BACKENDS', 'choose_backend', 'mix_bands', 'mix_predicted_bands']


def _written_out(x: Tensor, steps: Tensor, factors: List[int]) -> Tensor:
    b, c, h, w = x.shape
    groups = steps.shape[2]
    y = x.reshape(b, groups, c // groups, h, w) * steps[:, 0, :, None]
    for i, low in enumerate(low_pass(x, factors)):
        y = y + low.reshape(b, groups, c // groups, h, w) * steps[:, i + 1, :, None]
    return y.reshape(b, c, h, w)


BACKENDS = ['fused', 'written_out', 'triton']


def choose_backend(x: Tensor, backend: Optional[str] = None) -> str:
    """The backend that `backend=None` takes: Triton's if it is set, and on CUDA if it can run.

    'written_out' while exporting, in transforms of torch.func, and where the convolution's backend is one of those that
    have all of torch's derivatives.

    Args:
        x: Map (B, C, H, W).
        backend: Name of the convolution's backend, which comes before the one that is set.
    """
    name = named_backend() if backend is None else backend
    if name == 'triton':
        return 'triton'
    if is_exporting() or is_transformed() or name in ('reference', 'grid_sample'):
        return 'written_out'
    return 'triton' if name is None and is_default_on(x.device.type) and triton.why_not(x) is None else 'fused'


def _exact(x: Tensor, weights: Tensor, factors: List[int]) -> Tuple[Tensor, Tensor]:
    """x in the dtype to compute in, and what each of x and its low-passes is multiplied by (B, 1 + M, S, H, W)."""
    exact = x.to(accumulation_dtype(x.dtype)) if not torch.jit.is_scripting() else (
        x.float() if x.dtype != torch.float64 else x)
    weights = weights.to(exact.dtype)
    if weights.shape[1] == len(factors):
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)
    # A_1 x + (A_2 - A_1) L_1 + (A_3 - A_2) L_2 + (1 - A_3) L_3: exactly x where every A is one
    return exact, torch.cat([weights[:, :1], weights[:, 1:] - weights[:, :-1]], dim=1)


@torch.jit.unused
def _eager(x: Tensor, weights: Tensor, factors: List[int], backend: Optional[str]) -> Tensor:
    if backend is None:
        backend = choose_backend(x)
    if backend not in BACKENDS:
        raise ValueError(f'There is no backend {backend!r} of the band mix, the backends are {", ".join(BACKENDS)}.')
    if backend != 'written_out' and is_transformed():
        raise NotImplementedError(
            f'The backend {backend!r} cannot mix these bands: it has no forward-mode derivatives and no rules for the '
            "transforms of torch.func; 'written_out' has.")
    if backend == 'triton':
        return triton.forward(x, weights, factors)
    exact, steps = _exact(x, weights, factors)
    with without_autocast(x):
        return fused.forward(exact, steps, factors) if backend == 'fused' else _written_out(exact, steps, factors)


@torch.jit.unused
def _check(x: Tensor, weights: Tensor, factors: List[int]) -> None:
    if not x.is_floating_point():
        raise TypeError(f'x must have a floating point dtype, got {x.dtype}.')
    check_factors(factors, 1)
    bands = len(factors)
    if x.dim() != 4 or weights.dim() != 5 or weights.shape[1] not in (bands, bands + 1) or (
            weights.shape[2] < 1 or x.shape[1] % weights.shape[2]):
        raise ValueError(
            f'x must be (B, C, H, W) and weights (B, M, S, H, W), M {bands} or {bands + 1} for {bands} factors and S a '
            f'divisor of C; got {tuple(x.shape)} and {tuple(weights.shape)}.')
    # while a graph is made, sizes may be symbolic, about which it must not ask
    if not is_exporting() and not torch.compiler.is_compiling() and (
            x.shape[0] != weights.shape[0] or x.shape[2:] != weights.shape[3:]):
        raise ValueError(f'x (B, C, H, W) and weights (B, M, S, H, W) must have the same B, H and W, got '
                         f'{tuple(x.shape)} and {tuple(weights.shape)}.')


def mix_bands(x: Tensor, weights: Tensor, factors: List[int], backend: Optional[str] = None) -> Tensor:
    """Split a map at 1/f of the Nyquist frequency for each factor, weigh each band at every position, and add up.

    FADC paper, section 3 (FreqSelect).

    Args:
        x: Map (B, C, H, W). Half dtypes are computed in float32, whatever the autocast.
        weights: (B, M, S, H, W): M bands from high to low frequency, S groups of channels. There is one band more than
            factors; without weights for the last, the lowest, it passes unweighted.
        factors: Where the spectrum is split, f >= 1, from high to low.
        backend: 'fused', 'written_out' (in operators that every runtime has), 'triton' (for CUDA; the matrix products
            of half dtypes accumulate in float32, see `triton/__init__.py`), or None: :func:`choose_backend`.

    Returns:
        (B, C, H, W) in the dtype and memory format of x.

    Raises:
        TypeError: x has no floating point dtype.
        ValueError: There is no such backend, the shapes of x and weights do not fit, or a factor is no integer above 0,
            or there is none.
        NotImplementedError: 'triton' cannot run: Triton is missing or too old, or the device or dtype is not for it.
    """
    if torch.jit.is_scripting():
        exact, steps = _exact(x, weights, factors)
        return match_layout(_written_out(exact, steps, factors).to(x.dtype), x)
    _check(x, weights, factors)
    return match_layout(_eager(x, weights, factors, backend).to(x.dtype), x)


def mix_predicted_bands(
        x: Tensor,
        maps: Tensor,
        factors: List[int],
        backend: Optional[str] = None,
) -> Tuple[Tensor, Optional[Tensor]]:
    """:func:`mix_bands` with the weights 2 * sigmoid(maps).

    Args:
        x: Map (B, C, H, W).
        maps: (B, M, S, H, W), what a layer predicts.
        factors: Where the spectrum is split, f >= 1, from high to low.
        backend: Name of the convolution's backend, or None: see :func:`choose_backend`.

    Returns:
        (B, C, H, W) in the dtype and memory format of x, and numbers (B, n, C) whose sum over n is its mean, in float32
        or float64, where the backend makes them on the way, or None.
    """
    chosen = choose_backend(x, backend)
    if chosen == 'triton' and triton.why_not(x) is None and not is_transformed():
        y, means = triton.call(x, maps, factors, True)
        return match_layout(y, x), means
    return mix_bands(x, 2 * torch.sigmoid(maps), factors, chosen), None
