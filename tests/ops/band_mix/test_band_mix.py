"""FreqSelect's mix of bands: the fused backend against the definition, with every gradient, at every size."""
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fadc_timm.ops import mix_bands
from fadc_timm.ops.band_mix import fused, mix_exported_bands
from fadc_timm.ops.band_mix.fused import mix_low_passes, mix_low_passes_backward, multiply_adds
from tests.support.band_cases import check, definition, make_inputs

pytestmark = pytest.mark.usefixtures('one_thread')

BACKENDS = ['fused', 'written_out']
SIDES = [*range(1, 10), 12, 14, 28, 33]
FACTORS = [[2, 4, 8], [2], [3, 1, 16, 2]]


def results(f, x, weights, *args):
    y = f(x, weights, *args)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return y.detach(), *torch.autograd.grad(y, (x, weights), grad)


# largest error measured, relative to the largest number: 4.0e-7, 1.1e-15
TOLERANCES = {torch.float32: 1e-6, torch.float64: 2e-15}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('h', SIDES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_definition(backend, h, dtype):
    for w in SIDES:
        for factors in FACTORS:
            x, weights = make_inputs(h, w, len(factors) + w % 2, dtype=dtype)
            expected = results(definition, x.detach().double().requires_grad_(),
                               weights.detach().double().requires_grad_(), factors)
            check(results(mix_bands, x, weights, factors, backend), expected, TOLERANCES[dtype])


def exported_form(x, maps, factors):
    b, count, groups, h, w = maps.shape
    return mix_exported_bands(x, maps.transpose(1, 2).reshape(b, groups * count, h, w), factors, groups)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('h', SIDES)
def test_exported_form(h, groups):
    """In few nodes, at known sizes; tests/integrations/test_export.py has symbolic ones."""
    for w in SIDES:
        for factors in FACTORS:
            x, maps = make_inputs(h, w, len(factors) + w % 2, groups)
            expected = results(lambda x, maps, f: definition(x, 2 * torch.sigmoid(maps), f), x, maps, factors)
            check(results(exported_form, x, maps, factors), expected, 4e-15)


@pytest.mark.parametrize('tile', [1, 3000, 20_000])
def test_tiles(tile, monkeypatch):
    """A tile may be some samples, one, or some rows of one."""
    x, weights = make_inputs(13, 11, 3, b=5)
    expected = results(mix_bands, x, weights, [2, 4, 8])
    monkeypatch.setattr(fused, '_TILE_BYTES', tile)
    check(results(mix_bands, x, weights, [2, 4, 8]), expected, 1e-15)


@pytest.mark.parametrize('groups', [2, 4])
@pytest.mark.parametrize('backend', BACKENDS)
def test_groups(backend, groups):
    x, weights = make_inputs(9, 14, 4, groups)
    check(results(mix_bands, x, weights, [2, 4, 8], backend), results(definition, x, weights, [2, 4, 8]), 2e-15)


@pytest.mark.parametrize('backend', BACKENDS)
def test_ones_are_the_identity(backend):
    for n in SIDES:
        x, _ = make_inputs(n, n, 3, dtype=torch.float32)
        assert torch.equal(mix_bands(x, torch.ones(2, 3, 1, n, n), [2, 4, 8], backend), x)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'transposed', 'sliced'])
def test_layout(layout, backend):
    x, weights = make_inputs(10, 10, 3)
    x = {'contiguous': x, 'channels_last': x.contiguous(memory_format=torch.channels_last),
         'transposed': x.transpose(2, 3), 'sliced': x[:, ::2, 1:, ::2]}[layout]
    weights = weights[..., :x.shape[2], :x.shape[3]]
    y = mix_bands(x, weights, [2, 4], backend)
    check([y], [definition(x, weights, [2, 4])], 2e-15)
    assert y.is_contiguous(memory_format=torch.channels_last if layout == 'channels_last' else torch.contiguous_format)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, backend):
    """Computed in float32 and rounded once; autocast changes nothing."""
    x, weights = make_inputs(14, 9, 3, dtype=dtype)
    expected = definition(x, weights, [2, 4, 8]).to(dtype)
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            y = mix_bands(x, weights, [2, 4, 8], backend)
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('shape', [(0, 4, 9, 7), (2, 0, 9, 7)], ids=str)
def test_empty(backend, shape):
    x, weights = torch.randn(shape, requires_grad=True), torch.rand(shape[0], 3, 1, *shape[2:], requires_grad=True)
    y, grad_x, grad_weights = results(mix_bands, x, weights, [2, 4, 8], backend)
    assert y.shape == grad_x.shape == shape and torch.equal(grad_weights, torch.zeros_like(weights))


@pytest.mark.parametrize('size', [(5, 3), (1, 7), (8, 2)], ids=str)
def test_gradcheck(size):
    x, weights = make_inputs(*size, 2, b=1, c=2)
    torch.autograd.gradcheck(lambda x, weights: mix_bands(x, weights, [2, 4]), (x, weights))


@pytest.mark.parametrize('size', [(8, 12), (7, 7), (4, 4)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype, size):
    x, weights = make_inputs(*size, 4, dtype=dtype)
    torch.library.opcheck(mix_low_passes, (x, weights.detach()[:, :, 0].requires_grad_(), [2, 4, 8]))
    x, steps = x.detach(), weights.detach()[:, :, 0]
    torch.library.opcheck(mix_low_passes_backward, (torch.randn_like(x), x, steps, [2, 4, 8]))


class Products(TorchDispatchMode):
    """Counts batched products, those in place too, which torch's counter leaves out."""

    def __init__(self):
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm_.default):
            a, b = args[-2:]
            self.multiply_adds += a.numel() * b.shape[2]
        return func(*args, **(kwargs or {}))


def test_compile_any_size():
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(mix_bands, fullgraph=True, dynamic=True, backend=counter)
    for i, size in enumerate(((20, 24), (9, 14), (8, 33))):
        x, weights = make_inputs(*size, 3, b=2 + i, c=4 + i)
        check(results(compiled, x, weights, [2, 4, 8]), results(definition, x, weights, [2, 4, 8]), 2e-15)
    assert counter.frame_count == 1


def test_flops():
    """The formula counts the matrix products that are made."""
    x, weights = make_inputs(12, 10, 4)
    with FlopCounterMode(display=False) as counter:
        y = mix_bands(x, weights, [2, 4, 8])
        y.backward(y.detach())
    assert counter.get_total_flops() == 6 * multiply_adds(x.shape, [2, 4, 8])
    made = Products()
    with made, torch.no_grad():
        mix_low_passes._init_fn(x, weights[:, :, 0], [2, 4, 8])
    assert made.multiply_adds == multiply_adds(x.shape, [2, 4, 8])


def test_unknown_backend():
    with pytest.raises(ValueError, match="'fft'.*fused, written_out"):
        mix_bands(*make_inputs(4, 4, 2), [2, 4], 'fft')


@pytest.mark.parametrize('backend', ['fused', 'written_out', 'triton'])
@pytest.mark.parametrize('weights, factors, message', [
    ((2, 5, 1, 9, 10), [2, 4, 8], 'M 3 or 4 for 3 factors'), ((2, 2, 1, 9, 10), [2, 4, 8], 'M 3 or 4 for 3 factors'),
    ((2, 3, 3, 9, 10), [2, 4, 8], 'S a divisor of C'),
    ((2, 3, 9, 10), [2, 4, 8], r'got \(2, 4, 9, 10\) and \(2, 3, 9, 10\)'),
    ((3, 3, 1, 9, 10), [2, 4, 8], 'the same B, H and W'), ((2, 3, 1, 1, 1), [2, 4, 8], 'the same B, H and W'),
    *(((2, 1, 1, 9, 10), factors, 'factors must be one or more integers of at least 1')
      for factors in ([0], [-2], [2.5], [True], [])),
], ids=str)
def test_bad_input(weights, factors, message, backend):
    """Each backend would drop, stretch or truncate something else."""
    x, weights = torch.ones(2, 4, 9, 10), torch.ones(weights)
    with pytest.raises(ValueError, match=message):
        mix_bands(x, weights, factors, backend)
    with pytest.raises(TypeError, match='floating point dtype, got torch.int64'):
        mix_bands(x.long(), weights, factors, backend)
