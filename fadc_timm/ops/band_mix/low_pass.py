"""Ideal low-pass filters on maps: the frequency bands of FreqSelect (FADC paper, section 3).

The filter at 1/f of the Nyquist frequency keeps, on the shifted spectrum of an axis of n points, the points
`round(n/2 - n/2f) : round(n/2 + n/2f)`, rounding half to even as the released code does, so tiny maps can have empty
masks. Two forms compute the same: a real FFT with the mask made Hermitian, and products with the waves of each axis.
"""
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ..onnx_nodes import clamp, matmul, multiply
from ..runtime import (
    accumulation_dtype,
    are_known,
    as_dtype,
    constant,
    is_exporting,
    is_plain_eager,
    literal,
    once_per_graph,
    table_device,
    without_autocast,
)

__all__ = ['edges', 'low_pass', 'low_passes_by_products']


def _round_half_even(a: int, f: int) -> int:
    """round(a / (2*f)) as Python rounds, for a >= 0, in integer arithmetic alone: a may be symbolic."""
    q, m = (a + f) // (2 * f), (a + f) % (2 * f)
    is_half = (2 * f - m) // (2 * f)
    return q - is_half * (q % 2)


def edges(n: int, f: int) -> Tuple[int, int]:
    """The filter at 1/f of Nyquist keeps the frequencies low <= k < high of an axis of n points; maybe none."""
    return _round_half_even(n * (f - 1), f) - n // 2, _round_half_even(n * (f + 1), f) - n // 2


def _keep(n: int, f: int, count: int, sign: int, device: torch.device) -> Tensor:
    """Which of the frequencies sign*0, sign*1 ... sign*(count - 1) of an axis of n points pass: bool (count,)."""
    low, high = edges(n, f)
    # a frequency and the same one a period away, as the shifted axis runs from -(n//2) to n - n//2 - 1
    k = torch.arange(count, device=device) * sign
    return ((k >= low) & (k < high)) | ((k - sign * n >= low) & (k - sign * n < high))


def _low_pass_fft(x: Tensor, factors: List[int]) -> List[Tensor]:
    h, w = x.shape[2], x.shape[3]
    if x.shape[0] == 0 or x.shape[1] == 0:
        return [x * 0 for _ in factors]  # the FFT of torch 2.6 refuses empty maps
    half = w // 2 + 1
    spectrum = torch.fft.rfft2(x)
    out: List[Tensor] = []
    for f in factors:
        mask = (_keep(h, f, h, 1, x.device)[:, None] & _keep(w, f, half, 1, x.device)).to(x.dtype)
        mirrored = (_keep(h, f, h, -1, x.device)[:, None] & _keep(w, f, half, -1, x.device)).to(x.dtype)
        out.append(torch.fft.irfft2(spectrum * ((mask + mirrored) / 2), s=[h, w]))
    return out


def _tables(n: int, factors: Tuple[int, ...], left: bool, dtype: torch.dtype, device: torch.device) -> List[Tensor]:
    """What multiplies maps, on an axis of n points (maybe symbolic), in 2K real waves: cosines, then sines.

    With Z the coefficients of both axes, a filter passes `up[0] @ Z @ back[0] + up[1] @ Z @ back[1]`, where 0 is the
    real and 1 the imaginary part of the projection on the frequencies that pass.

    Returns:
        Analysis and synthesis of F filters: of the height, from the left, (2K, n) and (F, 2, n, 2K); of the width, from
        the right, (n, 2K) and (F, 2, 2K, n).
    """
    home = table_device(device)
    like: Dict[str, Any] = dict(dtype=torch.float64, device=home)

    def numbers(*values: Any) -> Tensor:
        return literal(values, torch.float64, home)

    # The filter keeps from -below to above - 1 periods. In integers this is `edges`, and exact here too.
    twice = numbers(*(((2. * f,),) for f in factors))
    ends = numbers(*(((f + 1.,), (f - 1.,)) for f in factors)) * n / twice
    above_below = (torch.round(ends) - n // 2) * numbers((1.,), (-1.,))
    periods = torch.arange(n // (2 * min(factors)) + 2, **like)
    # Whether m and -m periods pass, (F, 2, K): 0 <= m < above, 1 <= m <= below.
    room = above_below + numbers((0.,), (1.,)) - periods
    passes = clamp(torch.minimum(room, periods + numbers((1.,), (0.,))), 0., 1.)
    # imaginary times imaginary is negative: the width takes the sign
    weights = matmul(numbers((1., 1.), (1., -1.) if left else (-1., 1.)), passes) / n
    turns = multiply(torch.arange(n, **like)[:, None], periods)
    if type(n) is int:  # float64 is fine enough for the others, and not every exporter has the operator
        turns = turns % n
    angles = turns / n * (2 * torch.pi)
    sin, cos = torch.sin(angles), torch.sin(angles + torch.pi / 2)  # not every runtime has a cosine in float64
    waves = torch.cat((cos, sin), 1)
    analysis, synthesis = waves, torch.stack((waves, torch.cat((sin, -cos), 1)))
    synthesis = multiply(synthesis, torch.cat((weights, weights), 2).unsqueeze(2))
    tables = (analysis.t(), synthesis) if left else (analysis, synthesis.transpose(2, 3))
    return [as_dtype(t, dtype).contiguous().to(device) for t in tables]


@constant
def _constant_table(which: int, n: int, factors: Tuple[int, ...], left: bool, *args: Any) -> Tensor:
    """One of :func:`_tables` for a known size; the synthesis as (F*n*2, 2K) and (F, 4K, n)."""
    table = _tables(n, factors, left, *args)[which]
    if which == 0:
        return table
    return table.transpose(1, 2).flatten(0, 2).contiguous() if left else table.flatten(1, 2)


@once_per_graph
def _traced_tables(*args: Any) -> List[Tensor]:
    """:func:`_tables`, the synthesis as (F*2, n, 2K) and (F*2, 2K, n)."""
    analysis, synthesis = _tables(*args)
    return [analysis, synthesis.flatten(0, 1)]


def low_passes_by_products(x: Tensor, factors: List[int]) -> Tensor:
    """Ideal low-pass filters in products with tables alone.

    The tables are constants of the graph that is made, or where sizes are symbolic computed from them, once in a graph.

    Args:
        x: Map (B, C, H, W), float32 or float64.
        factors: One f >= 1 for each of F filters.

    Returns:
        (B, C, F*P, H, W) in the dtype of x. A filter passes the sum of P parts: of one where sizes are known, of two
        where they are not, as putting them side by side would ask about the sizes.
    """
    (b, c, h, w), count = x.shape, len(factors)
    args = tuple(factors), x.dtype, x.device
    if are_known(h, w) and (is_exporting() or is_plain_eager(x)):
        down, up = (_constant_table(i, h, args[0], True, *args[1:]) for i in range(2))
        across, back = (_constant_table(i, w, args[0], False, *args[1:]) for i in range(2))
        return (up @ (down @ (x @ across))).reshape(b, c, count, h, back.shape[1]) @ back
    down, up = _traced_tables(h, args[0], True, *args[1:])
    across, back = _traced_tables(w, args[0], False, *args[1:])
    return matmul(matmul(up, matmul(down, matmul(x, across)).unsqueeze(2)), back)


def _low_pass_matmul(x: Tensor, factors: List[int]) -> List[Tensor]:
    if not factors:
        return []
    return list(low_passes_by_products(x, factors).unflatten(2, (len(factors), -1)).sum(3).unbind(2))


_FORMS = {'fft': _low_pass_fft, 'matmul': _low_pass_matmul}


def check_factors(factors: List[int], least: int) -> None:
    """Raise where the spectrum cannot be split so, at that least number of places."""
    if len(factors) < least or any(isinstance(f, bool) or not isinstance(f, int) or f < 1 for f in factors):
        number = 'one or more integers' if least else 'integers'
        raise ValueError(f'factors must be {number} of at least 1, got {factors!r}.')


@torch.jit.unused
def _eager(x: Tensor, factors: List[int], form: Optional[str]) -> List[Tensor]:
    check_factors(factors, 0)
    if form is None:
        # on a CPU the FFT is faster at every size (scripts/bench/op.py); not every other device has complex numbers
        form = 'matmul' if is_exporting() or x.device.type not in ('cpu', 'cuda', 'meta') else 'fft'
    if form not in _FORMS:
        raise ValueError(f'There is no form {form!r} of the low-pass filter, the forms are {", ".join(_FORMS)}.')
    with without_autocast(x):
        return _FORMS[form](x, factors)


def low_pass(x: Tensor, factors: List[int], form: Optional[str] = None) -> List[Tensor]:
    """Ideal low-pass filters at 1/f of the Nyquist frequency.

    Args:
        x: Map (B, C, H, W). Half dtypes are computed in float32, whatever the autocast.
        factors: One integer f >= 1 for each filter.
        form: 'fft', 'matmul' (in operators that every runtime has), or None: matmul while exporting, and on devices
            other than a CPU and CUDA, else FFT.

    Returns:
        A map (B, C, H, W) for each factor, float32 or float64.

    Raises:
        ValueError: There is no such form, or a factor is none.
    """
    if torch.jit.is_scripting():
        return _low_pass_fft(x.float() if x.dtype != torch.float64 else x, factors)
    return _eager(x.to(accumulation_dtype(x.dtype)), factors, form)
