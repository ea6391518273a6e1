"""Ideal low-pass filters on maps: the frequency bands of FreqSelect (FADC paper, section 3).

The filter at 1/f of the Nyquist frequency keeps, on the shifted spectrum of an axis of n points, the points
`round(n/2 - n/2f) : round(n/2 + n/2f)`, rounding half to even as the released code does, so tiny maps can have empty
masks. Two forms compute the same: a real FFT with the mask made Hermitian, and products with a projection of each axis.
"""
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ..runtime import accumulation_dtype, is_exporting, table_device, without_autocast

__all__ = ['low_pass']


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


def _projections(n: int, factors: List[int], dtype: torch.dtype, device: torch.device) -> List[List[Tensor]]:
    """For each factor real and imaginary part (n, n) of the projection of an axis on the frequencies that pass."""
    home = table_device(device)
    i = torch.arange(n, device=home)
    # modulo n, exact; not by the operator for that, which ONNX does not have for a symbolic n
    phase = (i[:, None] * i).to(torch.float64)
    phase = phase - torch.floor(phase / n) * n
    angle = phase * (2 * torch.pi / n)
    cos, sin = torch.cos(angle), torch.sin(angle)
    out: List[List[Tensor]] = []
    for f in factors:
        keep = _keep(n, f, n, 1, home).to(torch.float64) / n
        real = (cos * keep) @ cos + (sin * keep) @ sin
        imag = (sin * keep) @ cos - (cos * keep) @ sin
        out.append([part.to(dtype).to(device) for part in (real, imag)])
    return out


def _low_pass_matmul(x: Tensor, factors: List[int]) -> List[Tensor]:
    out: List[Tensor] = []
    for rows, cols in zip(*(_projections(n, factors, x.dtype, x.device) for n in x.shape[2:])):
        # imag is antisymmetric: x @ imag is minus the product with its transpose
        out.append(rows[0] @ (x @ cols[0]) + rows[1] @ (x @ cols[1]))
    return out


_FORMS = {'fft': _low_pass_fft, 'matmul': _low_pass_matmul}


@torch.jit.unused
def _eager(x: Tensor, factors: List[int], form: Optional[str]) -> List[Tensor]:
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
        factors: One f >= 1 for each filter.
        form: 'fft', 'matmul' (in operators that every runtime has), or None: matmul while exporting, and on devices
            other than a CPU and CUDA, else FFT.

    Returns:
        A map (B, C, H, W) for each factor, float32 or float64.

    Raises:
        ValueError: There is no such form.
    """
    if torch.jit.is_scripting():
        return _low_pass_fft(x.float() if x.dtype != torch.float64 else x, factors)
    return _eager(x.to(accumulation_dtype(x.dtype)), factors, form)
