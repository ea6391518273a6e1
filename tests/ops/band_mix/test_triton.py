"""FreqSelect's band mix in Triton: against the definition, with every gradient.

On a CPU in Triton's interpreter; `pytest -m gpu` runs the same on a GPU, where the kernels are compiled.
"""
from typing import NamedTuple, Tuple

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils.flop_counter import FlopCounterMode

from fadc_timm.ops import mix_bands, set_backend, triton_support
from fadc_timm.ops.band_mix import mix_predicted_bands
from fadc_timm.ops.band_mix.functional import BACKENDS, choose_backend
from fadc_timm.ops.band_mix.fused import multiply_adds
from fadc_timm.ops.band_mix.triton import mix_bands_triton, tables
from fadc_timm.ops.band_mix.triton.operator import mix_bands_triton_backward
from tests.support.band_cases import check, definition, make_inputs
from tests.support.no_copies import no_copies
from tests.support.processes import python

pytest.importorskip('triton')

pytestmark = pytest.mark.usefixtures('one_thread', 'skip_where_compiled')

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
SIDES = [*range(1, 10), 12, 14, 28, 33, 64, 65, 70]


class Case(NamedTuple):
    h: int
    w: int
    count: int = 3
    groups: int = 1
    channels: int = 4
    factors: Tuple[int, ...] = (2, 4, 8)

    def inputs(self, dtype, device='cpu'):
        """x and weights, whose values the dtype holds, in double precision."""
        x, weights = make_inputs(self.h, self.w, self.count, self.groups, torch.float64, c=self.channels)
        return [t.detach().to(dtype).double().to(device) for t in (x, weights)]

    def __str__(self):
        factors = '' if self.factors == (2, 4, 8) else f'-f{"_".join(map(str, self.factors))}'
        return f'{self.h}x{self.w}-m{self.count}-s{self.groups}-c{self.channels}{factors}'


CASES = [
    Case(1, 1), Case(1, 7, 4), Case(2, 3), Case(3, 5, channels=1), Case(4, 4, 4), Case(5, 2),
    Case(6, 4, 4, 2),
    Case(6, 9, factors=(2,), count=1), Case(7, 7, 4, channels=5), Case(8, 8), Case(9, 12, 5, factors=(3, 1, 16, 2)),
    Case(14, 14, 3, 2, 6), Case(12, 8, 4, 4), Case(14, 9, channels=67), Case(28, 28, 4), Case(28, 33), Case(33, 6),
    Case(2, 2, 1, factors=(8,)),  # whose filter passes nothing
    Case(64, 14), Case(14, 64, 4), Case(65, 8), Case(9, 70, 4, 2), Case(65, 70, 2, channels=1, factors=(8,))]
FEW = CASES[2], CASES[3], CASES[7], Case(6, 4, 4, 2), Case(2, 2, 1, factors=(8,))
EXACT = [
    pytest.param(case, dtype, marks=() if case in few else pytest.mark.sweep)
    for dtype, few in ((torch.float64, FEW), (torch.float32, FEW[::3])) for case in CASES]


def results(f, x, weights, *args):
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = f(x, weights, *args)
    # whatever the dtype the same
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).cos().bfloat16()
    return y.detach(), *torch.autograd.grad(y, (x, weights), grad.to(y.dtype))


# largest error measured in the interpreter, relative to the largest number: 1.5e-7, 5.6e-16
TOLERANCES = {torch.float32: 5e-7, torch.float64: 2e-15}


def tolerance(case, dtype):
    """A GPU adds up one number after another, and the error of such a sum grows as the root of its length.

    On an H200 it is 5.8e-7 for float32 at 14x64 pixels, where numpy's sums of the interpreter have 1.5e-7.
    """
    return TOLERANCES[dtype] * max(1., max(case.h, case.w) / 16) ** 0.5


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case, dtype', EXACT, ids=str)
def test_definition(case, dtype, device):
    x, weights = case.inputs(dtype, device)
    actual = results(mix_bands, x.to(dtype), weights.to(dtype), list(case.factors), 'triton')
    assert all(t.dtype == dtype for t in actual)
    check(actual, results(definition, x, weights, case.factors), tolerance(case, dtype))


@pytest.mark.sweep
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('h', SIDES)
def test_definition_everywhere(h, dtype):
    device = 'cpu' if triton_support.is_interpreted() else 'cuda'
    for w in SIDES:
        test_definition(Case(h, w, 3 + w % 2), dtype, device)


# root mean square of the errors of output, gradient of x and gradient of the weights, as a multiple of that of rounding
# the exact result once: bases, coefficients and rows are rounded too. Measured, the largest of all cases: 1.91, 1.71,
# 8.4. The last is a sum over channels: what the rounded bases leak of a mean is the same in all of them, so it adds up
# where noise does not.
TIMES_ROUNDED = 2.5, 2.2, 10.


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('case', [Case(5, 4, channels=16), *(pytest.param(case, marks=pytest.mark.sweep) for case in (
    Case(7, 7, 4, channels=16), Case(14, 9, 3, 2, 16), Case(28, 28, 4), Case(65, 8)))], ids=str)
def test_half_precision(case, dtype, device):
    """Accumulated in float32; autocast changes nothing."""
    x, weights = case.inputs(dtype, device)
    x = (x + 1).to(dtype).double()  # a map with a mean, as after a ReLU
    expected = results(definition, x, weights, case.factors)
    with torch.autocast(device, torch.bfloat16):
        actual = results(mix_bands, x.to(dtype), weights.to(dtype), list(case.factors), 'triton')
    for a, e, limit in zip(actual, expected, TIMES_ROUNDED, strict=True):
        assert a.dtype == dtype
        rounding = (e.to(dtype).double() - e).square().mean().sqrt()
        assert (a.double() - e).square().mean().sqrt() <= limit * rounding


@pytest.mark.parametrize('device', DEVICES)
def test_half_map_under_exact_weights(device):
    x, weights = Case(4, 5).inputs(torch.float16, device)
    actual = results(mix_bands, x.half(), weights.float(), [2, 4, 8], 'triton')
    assert [t.dtype for t in actual] == [torch.float16, torch.float16, torch.float32]
    check(actual, results(definition, x, weights, [2, 4, 8]), 1e-3)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ones_are_the_identity(dtype, device):
    for n in (1, 7) if device == 'cpu' else (1, 4, 7, 14, 33):
        x = torch.randn(2, 5, n, n, device=device).to(dtype)
        assert torch.equal(mix_bands(x, x.new_ones(2, 3, 1, n, n), [2, 4, 8], 'triton'), x)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('layout', [
    'channels_last', 'sliced', *(pytest.param(name, marks=pytest.mark.sweep) for name in (
        'contiguous', 'transposed', 'expanded'))])
def test_layout(layout, device):
    def arrange(t):
        return {'contiguous': lambda: t, 'channels_last': lambda: t.contiguous(memory_format=torch.channels_last),
                'transposed': lambda: t.transpose(2, 3), 'sliced': lambda: t[:, ::2, 1:, ::2],
                'expanded': lambda: t[:1].expand_as(t)}[layout]()

    x, weights = Case(6, 6, 3, 2, 8).inputs(torch.float64, device)
    x = arrange(x)
    # as FreqSelect has them, of a convolution in channels_last
    weights = weights.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    weights = weights.unflatten(1, (2, 3)).transpose(1, 2)[..., :x.shape[2], :x.shape[3]]
    y = mix_bands(x, weights, [2, 4, 8], 'triton')
    channels_last = layout == 'channels_last'
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    check([y], [definition(x, weights, [2, 4, 8])], 2e-15)
    grad = arrange(torch.randn(2, 8, 6, 6, dtype=torch.float64, device=device))
    leaves = [t.detach().requires_grad_() for t in (x, weights)]
    expected = torch.autograd.grad(definition(*leaves, [2, 4, 8]), leaves, grad)
    _, _, coefficients = mix_bands_triton(x, weights, [2, 4, 8], False)
    check(mix_bands_triton_backward(grad, None, x, weights, coefficients, [2, 4, 8], False), expected, 2e-15)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('shape', [(0, 4, 9, 7), (2, 0, 9, 7), (0, 4, 70, 7)], ids=str)
def test_empty(shape, device):
    x, weights = torch.randn(shape, device=device), torch.rand(shape[0], 3, 1, *shape[2:], device=device)
    y, grad_x, grad_weights = results(mix_bands, x, weights, [2, 4, 8], 'triton')
    assert y.shape == grad_x.shape == shape and torch.equal(grad_weights, torch.zeros_like(weights))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case', [
    Case(4, 6, 4, channels=3), pytest.param(Case(66, 3, factors=(8,), count=1), marks=pytest.mark.sweep)], ids=str)
def test_no_uninitialised_memory(case, device):
    """Memory that nothing was written to holds NaN here, so that reading it shows; and twice the same is the same."""
    x, weights = case.inputs(torch.float32, device)
    torch.use_deterministic_algorithms(True)  # with it torch.empty is filled with NaN
    try:
        assert torch.empty(10).isnan().all()
        actual = results(mix_bands, x.float(), weights.float(), list(case.factors), 'triton')
        again = results(mix_bands, x.float(), weights.float(), list(case.factors), 'triton')
    finally:
        torch.use_deterministic_algorithms(False)
    check(actual, results(definition, x, weights, list(case.factors)), TOLERANCES[torch.float32])
    assert all(map(torch.equal, actual, again))


@pytest.mark.sweep
def test_gradcheck():
    device = 'cpu' if triton_support.is_interpreted() else 'cuda'
    x, weights = (t.requires_grad_() for t in Case(5, 4, 3, channels=2).inputs(torch.float64, device))
    torch.autograd.gradcheck(
        lambda x, weights: mix_bands(x, weights, [2, 4, 8], 'triton'), (x, weights), fast_mode=True)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype, act', [
    (torch.float32, False), (torch.bfloat16, True), pytest.param(torch.float32, True, marks=pytest.mark.sweep),
    pytest.param(torch.bfloat16, False, marks=pytest.mark.sweep)], ids=str)
def test_opcheck(dtype, act, device):
    # in half precision the graph that is made may add up in another order
    tests = {} if dtype == torch.float32 else {'test_utils': ('test_schema', 'test_faketensor')}
    x, weights = (t.to(dtype) for t in Case(3, 4, 2, factors=(2,)).inputs(dtype, device))
    x = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        mix_bands_triton, (x.detach().requires_grad_(), weights.detach().requires_grad_(), [2], act), **tests)
    y, means, coefficients = mix_bands_triton(x, weights, [2], act)
    for grad_means in (torch.randn_like(means), None):
        torch.library.opcheck(mix_bands_triton_backward, (
            torch.randn_like(y), grad_means, x, weights, coefficients, [2], act), **tests)


def predicted(x, maps, factors):
    """The map, and one row more with its mean times a number of each channel, which has a gradient of its own."""
    with set_backend('triton'):
        y, means = mix_predicted_bands(x, maps, factors)
    mean = means.sum(1)
    assert mean.shape == x.shape[:2] and mean.dtype == torch.promote_types(x.dtype, torch.float32)
    return with_mean(y, mean)


def with_mean(y, mean):
    row = (mean * torch.arange(1, y.shape[1] + 1, device=y.device)).to(y.dtype)[:, :, None, None]
    return torch.cat((y, row.expand(-1, -1, 1, y.shape[3])), 2)


def predicted_definition(x, maps, factors):
    y = definition(x, 2 * torch.sigmoid(maps), factors)
    return with_mean(y, y.mean((2, 3)))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case', [
    Case(4, 5, 4, 2), pytest.param(Case(14, 9, 4, 4, 8), marks=pytest.mark.sweep)], ids=str)
def test_predicted(case, device):
    """The weights are 2 * sigmoid of what is given, in the kernels."""
    x, maps = case.inputs(torch.float64, device)
    maps = 4 * maps - 4
    actual = results(predicted, x, maps, list(case.factors))
    expected = results(predicted_definition, x, maps, case.factors)
    check(actual, expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_predicted_in_other_dtypes(dtype, device):
    x, maps = Case(3, 5, channels=16).inputs(dtype, device)
    actual = results(predicted, x.to(dtype), maps.to(dtype), [2, 4, 8])
    expected = results(predicted_definition, x, maps, [2, 4, 8])
    assert all(t.dtype == dtype for t in actual)
    check(actual, expected, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize('device', DEVICES)
def test_compile_any_size(device):
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(mix_bands, fullgraph=True, dynamic=True, backend=counter)
    for i, size in enumerate(((5, 6), (3, 7), (8, 13))):
        case = Case(*size, channels=4 + i)
        x, weights = case.inputs(torch.float64, device)
        check(results(compiled, x, weights, [2, 4, 8], 'triton'), results(definition, x, weights, [2, 4, 8]), 2e-15)
    assert counter.frame_count == 1


@pytest.mark.parametrize('device', DEVICES)
def test_compile(device):
    """With the gradient in the graph."""
    torch.compiler.reset()
    compiled = torch.compile(mix_bands, fullgraph=True, backend='inductor' if device == 'cuda' else 'aot_eager')
    x, weights = Case(5, 6).inputs(torch.float32, device)
    x = x.contiguous(memory_format=torch.channels_last)
    actual = results(compiled, x.float(), weights.float(), [2, 4, 8], 'triton')
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    check(actual, results(definition, x, weights, [2, 4, 8]), TOLERANCES[torch.float32])


def forget_tables():
    for kept in (tables.tables_of.kept, tables.tables_of.captured):
        kept.clear()


@pytest.mark.gpu
@pytest.mark.parametrize('device', ['cuda'])
@pytest.mark.parametrize('warm', [True, False], ids=['warm', 'cold'])
@pytest.mark.parametrize('size', [(14, 14), (70, 9)], ids=str)
def test_cuda_graph(size, warm, device):
    """A captured graph follows its inputs, and what it makes while it is captured is not used outside of it."""
    x, weights = (t.float().requires_grad_() for t in Case(*size).inputs(torch.float32, device))
    forget_tables()
    mix_bands(x, weights, [2, 4, 8], 'triton').sum().backward()  # the kernels are compiled
    if not warm:
        forget_tables()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mix_bands(x, weights, [2, 4, 8], 'triton')
        grads = torch.autograd.grad(y, (x, weights), torch.ones_like(y))
    eager = mix_bands(x, weights, [2, 4, 8], 'triton')
    check([eager], [definition(x, weights, [2, 4, 8])], TOLERANCES[torch.float32])
    with torch.no_grad():
        x.normal_()
    graph.replay()
    expected = definition(x.double(), weights.double(), [2, 4, 8])
    check([y, *grads], [expected, *torch.autograd.grad(expected.sum(), (x, weights))], TOLERANCES[torch.float32])


@pytest.mark.parametrize('size', [(7, 7), (8, 12), (1, 1)], ids=str)
def test_nothing_is_copied_to_the_device(size, monkeypatch):
    """Neither by the tables nor by the operators, so that a CUDA graph can hold all of it."""
    launches = []
    monkeypatch.setattr(triton_support, 'launch', lambda this, *tensors: launches.append(this))
    monkeypatch.setattr(tables.tables_of, 'kept', {})  # what is fake is not to be kept
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    with no_copies():
        tables._make_tables(*size, (2, 3, 4, 8), torch.float16, torch.device('cuda'))
        for dtype in (torch.float16, torch.float32):
            x = torch.empty(2, 4, *size, dtype=dtype, device='cuda')
            maps = torch.empty(2, 3, 1, *size, dtype=dtype, device='cuda')
            y, means, coefficients = mix_bands_triton._init_fn(x, maps, [2, 4, 8], True)
            mix_bands_triton_backward._init_fn(y, means, x, maps, coefficients, [2, 4, 8], True)
    assert len(launches) == 2 * 6  # forward two, backward four


@pytest.mark.parametrize('batch', ['static', 'dynamic'])
def test_tables_are_made_with_the_graph(batch, monkeypatch):
    """The first run of a graph may be one in which nothing may be kept: see `prepare`."""
    monkeypatch.setattr(tables.tables_of, 'kept', {})
    env = ShapeEnv()
    x, maps = torch.randn(2, 4, 6, 5), torch.randn(2, 3, 1, 6, 5)
    dynamic = [DimDynamic.DYNAMIC if batch == 'dynamic' else DimDynamic.STATIC, *[DimDynamic.STATIC] * 4]
    with FakeTensorMode(shape_env=env) as mode:
        fakes = [mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic[:t.dim()])) for t in (x, maps)]
        mix_bands_triton(*fakes, [2, 4], True)
    made, = tables.tables_of.kept.values()
    assert not any(isinstance(t, FakeTensor) for t in made)
    monkeypatch.setattr(tables.tables_of, 'make', None)
    mix_bands_triton(x, maps, [2, 4], True)


@pytest.mark.parametrize('setting', ['allow_tf32', 'fp32_precision'])
def test_tf32_is_read(setting):
    """Whichever of torch's two settings was made, the older of which cannot be read after the newer one."""
    if not hasattr(torch.backends.cuda.matmul, setting):
        pytest.skip('torch has this setting from 2.9 on')
    said = python(f"""
import torch
from torch._subclasses import FakeTensorMode
from fadc_timm.ops.band_mix.triton import mix
with FakeTensorMode():
    x, maps = torch.empty(2, 8, 8, 8, device='cuda'), torch.empty(2, 3, 1, 8, 8, device='cuda')
for value in {'(False, True)' if setting == 'allow_tf32' else "('ieee', 'tf32')"}:
    torch.backends.cuda.matmul.{setting} = value
    print(mix.spec_of(x, maps, [2, 4, 8], True).tf32)
""")
    assert said.split() == ['False', 'True']


def test_meta():
    x, weights = torch.empty(2, 4, 9, 7, device='meta'), torch.empty(2, 3, 1, 9, 7, device='meta')
    y, grad_x, grad_weights = results(mix_bands, x, weights, [2, 4, 8], 'triton')
    assert y.shape == grad_x.shape == x.shape and grad_weights.shape == weights.shape


def test_flops():
    """Those of the backend for CPUs: what a padded table does more is not counted."""
    x, weights = (t.to('meta').requires_grad_() for t in Case(12, 10, 4).inputs(torch.float32))
    with FlopCounterMode(display=False) as counter:
        y = mix_bands(x, weights, [2, 4, 8], 'triton')
        y.backward(y.detach())
    assert counter.get_total_flops() == 6 * multiply_adds(x.shape, [2, 4, 8])


# where it is chosen, and where it cannot run


def test_chosen_where_it_is_the_default(monkeypatch):
    x = torch.empty(2, 4, 5, 5, device='meta')
    assert 'triton' in BACKENDS and choose_backend(x) == 'fused'
    with set_backend('triton'):
        assert choose_backend(x) == 'triton'
    with no_copies():
        x = torch.empty(2, 4, 5, 5, device='cuda')
        assert choose_backend(x) == 'triton' and choose_backend(x.int()) == 'fused'
        with set_backend('gather'):
            assert choose_backend(x) == 'fused'


def test_named_form_says_why_it_cannot_run(monkeypatch):
    x, weights = (t.float() for t in Case(4, 4).inputs(torch.float32))
    monkeypatch.setattr(triton_support, 'is_interpreted', lambda: False)
    with pytest.raises(NotImplementedError, match="backend='triton'.*does not run on cpu.*TRITON_INTERPRET=1"):
        mix_bands(x, weights, [2, 4, 8], 'triton')
    monkeypatch.setattr(triton_support, 'unavailable', lambda: 'Triton is not installed (no module)')
    with pytest.raises(NotImplementedError, match="backend='triton'.*not installed"):
        mix_bands(x, weights, [2, 4, 8], 'triton')
