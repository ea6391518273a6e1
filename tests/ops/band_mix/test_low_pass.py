"""The ideal low-pass filters against the released code's definition: complex FFT, shifted box mask, real part."""
import math
from fractions import Fraction

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fadc_timm.ops import low_pass
from fadc_timm.ops.band_mix.low_pass import _round_half_even
from tests.support.marks import asks_about_sizes

pytestmark = pytest.mark.usefixtures('one_thread')

FORMS = ['fft', 'matmul']
SIDES = [*range(1, 10), 14, 28, 33]
FACTORS = [2, 4, 8, 1, 3, 6, 16]


def released(x, f):
    """The filter as FADC's authors wrote it, in double precision."""
    h, w = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.double()), dim=(-2, -1))
    mask = torch.zeros(h, w, dtype=torch.float64)
    rows = slice(round(h / 2 - h / (2 * f)), round(h / 2 + h / (2 * f)))
    mask[rows, round(w / 2 - w / (2 * f)):round(w / 2 + w / (2 * f))] = 1
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))).real


def is_empty(n, f):
    return round(n / 2 - n / (2 * f)) == round(n / 2 + n / (2 * f))


def relative_error(actual, expected, x):
    """Relative to the map: what passes of it may be little, or nothing."""
    return ((actual.double() - expected).norm() / x.double().norm()).item()


# measured on all these sides and factors, both forms: 1.7e-7, 5.9e-16
TOLERANCES = {torch.float32: 5e-7, torch.float64: 2e-15}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('h', SIDES)
@pytest.mark.parametrize('form', FORMS)
def test_released_definition(form, h, dtype):
    generator = torch.Generator().manual_seed(h)
    for w in SIDES:
        x = torch.randn(2, 3, h, w, generator=generator, dtype=dtype)
        lows = low_pass(x, FACTORS, form)
        assert len(lows) == len(FACTORS)
        for low, f in zip(lows, FACTORS):
            assert low.dtype == dtype and low.shape == x.shape
            error = relative_error(low, released(x, f), x)
            assert error <= TOLERANCES[dtype], f'{h}x{w} at 1/{f}: {error:.1e}'


@pytest.mark.sweep
@pytest.mark.parametrize('h', range(1, 65))
@pytest.mark.parametrize('form', FORMS)
def test_released_definition_everywhere(form, h):
    """Of the tolerance, half is the error of the complex FFT itself where a side is a large prime (2.5e-15 at 53)."""
    generator = torch.Generator().manual_seed(h)
    for w in range(1, 65):
        x = torch.randn(1, 1, h, w, generator=generator, dtype=torch.float64)
        for low, f in zip(low_pass(x, FACTORS, form), FACTORS):
            assert relative_error(low, released(x, f), x) <= 5e-15, f'{h}x{w} at 1/{f}'


@pytest.mark.parametrize('size', [(8, 8), (14, 9), (28, 28), (56, 40)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_default_form(dtype, size):
    """Half precision is computed in float32, and stays so; autocast changes nothing."""
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    for form in (None, *FORMS):
        for low, f in zip(low_pass(x, [2, 4, 8], form), [2, 4, 8]):
            assert low.dtype == computed
            assert relative_error(low, released(x, f), x) <= TOLERANCES[computed]
    with torch.autocast('cpu', torch.bfloat16):
        low, = low_pass(x, [2])
    assert low.dtype == computed and relative_error(low, released(x, 2), x) <= TOLERANCES[computed]


@pytest.mark.parametrize('form', FORMS)
def test_empty_masks(form):
    """Nothing passes, which is zeros and no NaN: side 8 at 1/8 and side 4 at 1/4, as in the released code."""
    assert is_empty(8, 8) and is_empty(4, 4) and not is_empty(8, 4)
    for h, w, f in ((8, 8, 8), (4, 4, 4), (8, 33, 8), (33, 8, 8), (4, 9, 4)):
        x = torch.randn(1, 2, h, w, requires_grad=True)
        low, = low_pass(x, [f], form)
        assert is_empty(h, f) or is_empty(w, f)
        assert torch.equal(low, torch.zeros_like(x))
        grad, = torch.autograd.grad(low, x, torch.randn_like(low))
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize('form', FORMS)
def test_constant_map_passes(form):
    """Where the mask is not empty the mean is in it."""
    for n in SIDES:
        for low, f in zip(low_pass(torch.full((1, 1, n, n), 3., dtype=torch.float64), FACTORS, form), FACTORS):
            expected = 0. if is_empty(n, f) else 3.
            assert (low - expected).abs().max() < 1e-14, f'{n} at 1/{f}'


@pytest.mark.parametrize('form', FORMS)
def test_order_and_repetition_of_factors(form):
    x = torch.randn(1, 2, 12, 9)
    two, four = low_pass(x, [2, 4], form)
    assert all(map(torch.equal, low_pass(x, [4, 2, 4], form), [four, two, four]))
    assert low_pass(x, [], form) == []


@pytest.mark.parametrize('form', FORMS)
def test_empty_batch(form):
    x = torch.randn(0, 3, 9, 14, requires_grad=True)
    low, = low_pass(x, [2], form)
    grad, = torch.autograd.grad(low.sum(), x)
    assert low.shape == grad.shape == x.shape


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('layout', ['channels_last', 'transposed', 'sliced'])
def test_non_contiguous(layout, form):
    x = torch.randn(2, 6, 10, 9)
    x = {'channels_last': x.contiguous(memory_format=torch.channels_last), 'transposed': x.transpose(2, 3),
         'sliced': x[:, ::2, 1:, ::2]}[layout]
    for low, f in zip(low_pass(x, [2, 4], form), [2, 4]):
        assert relative_error(low, released(x, f), x) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize('size', [(4, 4), (5, 3), (1, 7), (8, 2)], ids=str)
@pytest.mark.parametrize('form', FORMS)
def test_gradcheck(form, size):
    x = torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: tuple(low_pass(x, [2, 4, 3], form)), x)


def test_round_half_even():
    for f in (*range(1, 34), 64, 100, 128):
        for a in (*range(2000), 10 ** 6, 10 ** 6 + f, (10 ** 6 + 1) * f):
            assert _round_half_even(a, f) == round(Fraction(a, 2 * f)), (a, f)
            if math.log2(f).is_integer():
                assert _round_half_even(a, f) == round(a / (2 * f)), (a, f)


def test_mask_edges_are_those_of_floating_point():
    """The released code rounds n/2 -+ n/2f in floating point: no side and factor at hand rounds differently for it."""
    for n in range(1, 1025):
        for f in range(1, 33):
            assert _round_half_even(n * (f - 1), f) == round(n / 2 - n / (2 * f)), (n, f)
            assert _round_half_even(n * (f + 1), f) == round(n / 2 + n / (2 * f)), (n, f)


@pytest.mark.parametrize('form', ['dct', '', 'FFT'])
def test_unknown_form(form):
    with pytest.raises(ValueError, match=f"'{form}'.*fft, matmul"):
        low_pass(torch.randn(1, 1, 4, 4), [2], form)


# tracing: sizes may be symbolic


def skip_unless_traceable(form):
    if form != 'matmul' and not hasattr(torch.compiler, 'is_exporting'):
        pytest.skip('torch before 2.7 cannot trace an FFT of symbolic size')


@pytest.mark.parametrize('form', [None, *FORMS])
def test_export_any_size(form):
    skip_unless_traceable(form)
    if form != 'fft' and asks_about_sizes:
        pytest.skip('torch 2.11 limits the sizes')

    class LowPass(torch.nn.Module):
        def forward(self, x):
            return low_pass(x, [2, 4, 8], form)

    sizes = {i: torch.export.Dim(name, max=512) for i, name in ((0, 'batch'), (2, 'height'), (3, 'width'))}
    exported = torch.export.export(LowPass(), (torch.randn(2, 3, 20, 24),), dynamic_shapes=(sizes,)).module()
    for shape in ((2, 3, 20, 24), (3, 3, 9, 14), (5, 3, 8, 33), (2, 3, 4, 64)):
        x = torch.randn(shape)
        for low, f in zip(exported(x), [2, 4, 8]):
            assert relative_error(low, released(x, f), x) <= TOLERANCES[torch.float32], (shape, f)


@pytest.mark.parametrize('form', FORMS)
def test_compile_any_size(form):
    skip_unless_traceable(form)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(low_pass, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 3, 20, 24), (3, 5, 9, 14), (5, 4, 8, 33)):
        x = torch.randn(shape)
        for low, f in zip(compiled(x, [2, 4, 8], form), [2, 4, 8]):
            assert relative_error(low, released(x, f), x) <= TOLERANCES[torch.float32]
    assert counter.frame_count == 1


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')
def test_script():
    scripted = torch.jit.script(low_pass)
    x = torch.randn(2, 3, 14, 9)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for low, f in zip(scripted(x.to(dtype), [2, 4]), [2, 4]):
            computed = torch.float64 if dtype == torch.float64 else torch.float32
            assert low.dtype == computed and relative_error(low, released(x.to(dtype), f), x) <= TOLERANCES[computed]


@pytest.mark.parametrize('factors', [[1.5], [2, 0], [True]], ids=str)
def test_factors_that_are_none(factors):
    with pytest.raises(ValueError, match=r'factors must be integers of at least 1, got \['):
        low_pass(torch.zeros(1, 1, 4, 4), factors)
