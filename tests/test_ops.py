"""The operator: every backend against the float64 oracle, the oracle against convolutions, and the contract's edges."""
import functools
import math

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, DTYPES, GAINS, INPUTS, OpCase
from conftest import needs_dynamo
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from fadc_timm.ops import (
    _tiles,
    _torchvision,
    adaptive_dilated_conv2d,
    choose_backend,
    flops,
    list_backends,
    registry,
    set_backend,
)
from fadc_timm.ops.scripted import scripted_conv2d

pytestmark = pytest.mark.usefixtures('one_thread')

BACKEND_NAMES = [name for name in list_backends() if name != 'reference']
CASE = {case.name: case for case in CASES}
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]

# measured, the largest of all backends and gradients: 1.6e-2, 2.2e-3
AUTOCAST = {torch.bfloat16: 2.5e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def no_tf32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def ids(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix('torch.')
    return value.name if isinstance(value, OpCase) else None


def skip_unless_runs(case, inputs, backend):
    reason = cases.why_not(case, inputs, backend)
    if reason:
        pytest.skip(f'{backend}: {reason}')


def check(case, inputs, actual, expected, dtype, names=('out', *INPUTS)):
    errors = {name: cases.error(actual[name], expected[name]) for name in actual if name in names}
    too_large = {n: f'{e:.1e} > {cases.tolerance(n, dtype):.1e}' for n, e in errors.items()
                 if not e <= cases.tolerance(n, dtype)}
    assert not too_large, f'{case}: {too_large}'
    for name, t in inputs.items():
        assert actual[name].dtype == t.dtype and actual[name].shape == t.shape, name


# every backend against the oracle


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES, ids=ids)
@pytest.mark.parametrize('case', CASES, ids=ids)
@pytest.mark.parametrize('backend', BACKEND_NAMES)
def test_output_and_gradients(backend, case, dtype, device):
    inputs = cases.make_inputs(case, dtype, device=device)
    skip_unless_runs(case, inputs, backend)
    actual = cases.results(case, inputs, backend)
    assert actual['out'].dtype == dtype
    check(case, inputs, actual, cases.oracle(case, dtype), dtype)


@pytest.mark.parametrize('dtype, dilation_dtype', [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float64, torch.float32)], ids=ids)
@pytest.mark.parametrize('name', ['everything', 'k5', 'stride2', 'dilation_groups2', 'depthwise'])
@pytest.mark.parametrize('backend', BACKEND_NAMES)
def test_dilation_dtype(backend, name, dtype, dilation_dtype):
    """A dilation in the half dtype, where the test above has float32, and float32 beside float64."""
    case = CASE[name]
    inputs = cases.make_inputs(case, dtype, dilation_dtype)
    skip_unless_runs(case, inputs, backend)
    actual, expected = cases.results(case, inputs, backend), cases.oracle(case, dtype, dilation_dtype)
    check(case, inputs, actual, expected, dtype, {'out', *INPUTS} - {'dilation'})
    assert cases.error(actual['dilation'], expected['dilation']) <= cases.tolerance('dilation', dilation_dtype)


def integers(d):
    return (torch.arange(d.numel()).reshape(d.shape) % 7 - 2).double()


def border(d):
    """The outer row of taps one pixel above the map, in odd columns below: its weight has just become zero."""
    row, column = torch.arange(d.shape[2])[:, None], torch.arange(d.shape[3])
    return torch.where(column % 2 == 0, row + 1., d.shape[2] - row).double().expand(d.shape)


def constant(value):
    return pytest.param(lambda d: torch.full(d.shape, value, dtype=torch.float64), id=f'{value:g}')


# in bfloat16 without gains: with equal taps the kernel less its mean cancels to nothing, which no rounding survives
ON_GRID_CASES = [
    *((name, dtype) for name in ('everything', 'k5', 'groups2', 'depthwise_k7', 'dilation_groups2')
      for dtype in (torch.float32, torch.float64)),
    *((name, torch.bfloat16) for name in ('mask_bias', 'dilation_groups_all', 'depthwise_plain')),
]


@functools.cache
def on_grid(name, dtype, dilation):
    inputs = cases.make_inputs(CASE[name], dtype)
    with torch.no_grad():
        inputs['dilation'].copy_(dilation(inputs['dilation']))
    return inputs, cases.oracle_results(CASE[name], inputs)


@pytest.mark.parametrize('dilation', [
    integers, border, *map(constant, (0., 1., 2., -1., -3., 0.5, 30., 1e30, -1e30, torch.finfo(torch.float32).max))])
@pytest.mark.parametrize('name, dtype', ON_GRID_CASES, ids=ids)
@pytest.mark.parametrize('backend', BACKEND_NAMES)
def test_on_the_grid(backend, name, dtype, dilation):
    """Where the derivative of the dilation jumps, all others are continuous, and its own is finite."""
    inputs, expected = on_grid(name, dtype, dilation)
    skip_unless_runs(CASE[name], inputs, backend)
    actual = cases.results(CASE[name], inputs, backend)
    check(CASE[name], inputs, actual, expected, dtype, {'out', *INPUTS} - {'dilation'})
    assert actual['dilation'].isfinite().all()


@pytest.mark.parametrize('backend', BACKEND_NAMES)
def test_threads(backend):
    """A map that is large enough to be shared by threads."""
    case = OpCase('threads', (4, 16, 20, 20), 16, dilation_groups=2)
    inputs = cases.make_inputs(case, torch.float32)
    skip_unless_runs(case, inputs, backend)
    expected = cases.oracle(case, torch.float32)
    torch.set_num_threads(2)
    check(case, inputs, cases.results(case, inputs, backend), expected, torch.float32)


@pytest.mark.sweep
@pytest.mark.parametrize('seed', range(300))
@pytest.mark.parametrize('backend', BACKEND_NAMES)
def test_random_case(backend, seed):
    case = cases.random_case(seed)
    for dtype in DTYPES:
        inputs = cases.make_inputs(case, dtype)
        skip_unless_runs(case, inputs, backend)
        actual, expected = cases.results(case, inputs, backend), cases.oracle(case, dtype)
        check(case, inputs, actual, expected, dtype, cases.conditioned(case, inputs, expected, dtype))


@pytest.mark.parametrize('name', INPUTS)
@pytest.mark.parametrize('case', [CASE['everything'], CASE['depthwise']], ids=ids)
@pytest.mark.parametrize('backend', BACKEND_NAMES)
def test_one_gradient_alone(backend, case, name):
    """A frozen layer: only one of the arguments requires a gradient."""
    inputs = cases.make_inputs(case, torch.float64)
    skip_unless_runs(case, inputs, backend)
    expected = cases.oracle(case, torch.float64)
    inputs = {n: t.requires_grad_(n == name) for n, t in inputs.items()}
    y = cases.call(case, inputs, backend)
    grad, = torch.autograd.grad(y, inputs[name], cases.output_gradient(case, y))
    assert cases.error(grad, expected[name]) <= cases.tolerance(name, torch.float64)


@pytest.mark.parametrize('name', ['batch0', 'batch0_plain', 'batch0_depthwise'])
@pytest.mark.parametrize('backend', list_backends())
def test_empty_batch(backend, name):
    case = CASE[name]
    inputs = cases.make_inputs(case, torch.float32)
    skip_unless_runs(case, inputs, backend)
    results = cases.results(case, inputs, backend)
    assert results['out'].shape == (0, case.o, 7, 9)
    for name, t in inputs.items():
        assert results[name].shape == t.shape and not results[name].any(), name


@pytest.mark.parametrize('case', [CASE['everything'], CASE['depthwise'], CASE['stride2']], ids=ids)
@pytest.mark.parametrize('backend', list_backends())
def test_no_uninitialised_memory(backend, case):
    """Memory that nothing was written to holds NaN here, so that reading it shows."""
    inputs = cases.make_inputs(case, torch.float32)
    skip_unless_runs(case, inputs, backend)
    torch.use_deterministic_algorithms(True)  # with it torch.empty is filled with NaN
    try:
        assert torch.empty(10).isnan().all()
        actual = cases.results(case, inputs, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    check(case, inputs, actual, cases.oracle(case, torch.float32), torch.float32)


# the oracle


@pytest.mark.parametrize('with_mask', [False, True], ids=['no_mask', 'ones'])
@pytest.mark.parametrize('groups, o', [(1, 6), (2, 6), (4, 4), (4, 8)])
@pytest.mark.parametrize('padding', [0, 2, (3, 1)], ids=str)
@pytest.mark.parametrize('k, stride, dilation', [
    (1, 1, 1), (1, 2, 3), (3, 1, 1), (3, 1, 2), (3, 2, 1), (3, 2, 3), (3, (1, 2), 2), (5, 1, 2), (5, 2, 1), (7, 1, 1),
    (7, 3, 1)])
def test_oracle_is_conv2d(k, stride, dilation, padding, groups, o, with_mask):
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 11, 13), (o, 4 // groups, k, k), (o,)))
    expected = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    b, _, h, w = expected.shape
    pads = (padding, padding) if isinstance(padding, int) else padding
    y = adaptive_dilated_conv2d(
        x, weight, torch.full((b, 1, h, w), float(dilation), dtype=x.dtype),
        torch.ones(b, k * k, h, w, dtype=x.dtype) if with_mask else None, bias, stride=stride,
        padding=tuple(p - k // 2 * (dilation - 1) for p in pads), groups=groups, backend='reference')
    assert cases.error(y, expected) < 1e-14


@pytest.mark.parametrize('use', [*((g,) for g in GAINS), GAINS], ids='_'.join)
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_oracle_gains_make_a_kernel_for_each_sample(groups, use):
    case = OpCase(f'gains_{groups}', (3, 4, 7, 9), 8, groups=groups, use=use)
    inputs = cases.make_inputs(case, torch.float64)
    inputs['dilation'] = torch.full(case.shapes['dilation'], 2., dtype=torch.float64)
    weight = inputs['weight']
    low_in, low_out, high_in, high_out = (
        inputs.get(name, torch.ones(case.shapes[name], dtype=torch.float64)) for name in GAINS)
    samples = []
    for b in range(3):
        kernel = torch.empty_like(weight)
        for o in range(8):
            for i in range(4 // groups):
                c = o // (8 // groups) * (4 // groups) + i
                mean = weight[o, i].mean()
                kernel[o, i] = (low_out[b, o] * low_in[b, c] * mean
                                + high_out[b, o] * high_in[b, c] * (weight[o, i] - mean))
        samples.append(F.conv2d(inputs['x'][b:b + 1], kernel, padding=2, dilation=2, groups=groups))
    assert cases.error(cases.call(case, inputs, 'reference'), torch.cat(samples)) < 1e-14


def test_oracle_samples_a_ramp():
    """Bilinear sampling of a linear function is that function: one tap at a time, at fractional positions."""
    h, w = 9, 8
    rows, cols = (t.double() for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij'))
    ramp = (3 + 2 * rows + 0.3 * cols)[None, None]
    dilation = torch.rand(1, 1, 3, 2, dtype=torch.float64) * 2
    mask = torch.rand(1, 9, 3, 2, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
            weight[0, 0, i, j] = 1
            # centres at rows 2, 4, 6 and columns 2, 5: no tap leaves the map
            y = adaptive_dilated_conv2d(
                ramp, weight, dilation, mask, stride=(2, 3), padding=(-1, -1), backend='reference')[0, 0]
            row = 2 + 2 * torch.arange(3)[:, None] + dilation[0, 0] * (i - 1)
            col = 2 + 3 * torch.arange(2) + dilation[0, 0] * (j - 1)
            assert cases.error(y, (3 + 2 * row + 0.3 * col) * mask[0, 3 * i + j]) < 1e-14


GRADCHECK = [
    OpCase('gradcheck', (2, 2, 2, 3), 2, dilation_groups=2, stride=(1, 2)),
    OpCase('gradcheck_groups', (1, 4, 2, 2), 2, groups=2, use=GAINS),
    OpCase('gradcheck_k5', (1, 1, 2, 3), 1, k=5, use=('mask', 'bias')),
    OpCase('gradcheck_depthwise', (2, 2, 2, 2), 2, groups=2),
    OpCase('gradcheck_depthwise_plain', (1, 4, 2, 2), 4, groups=4, dilation_groups=2, use=('mask',)),
]


@pytest.mark.parametrize('case', GRADCHECK, ids=ids)
@pytest.mark.parametrize('backend', list_backends())
def test_gradcheck(backend, case):
    inputs = cases.make_inputs(case, torch.float64)
    skip_unless_runs(case, inputs, backend)
    torch.autograd.gradcheck(
        lambda *t: cases.call(case, dict(zip(inputs, t)), backend), tuple(inputs.values()),
        fast_mode=backend in ('reference', 'triton'))  # all directions at once, for the slow ones


# layouts


def sliced(t):
    big = t.new_zeros([*t.shape[:-1], 2 * t.shape[-1] + 1]).copy_(t[..., :1].expand(*t.shape[:-1], 2 * t.shape[-1] + 1))
    big[..., 1::2] = t
    return big.requires_grad_(), lambda big: big[..., 1::2]


def transposed(t):
    if t.dim() < 2:
        return sliced(t)
    return t.transpose(-1, -2).contiguous().requires_grad_(), lambda t: t.transpose(-1, -2)


def expanded(t):
    """Memory shared along the first dimension: the batch, but for weight and bias the output channels."""
    return t[:1].clone().requires_grad_(), lambda one: one.expand_as(t)


@pytest.mark.parametrize('view', [sliced, transposed, expanded])
@pytest.mark.parametrize('case', [CASE['everything'], CASE['k5'], CASE['depthwise'], CASE['groups2']], ids=ids)
@pytest.mark.parametrize('backend', list_backends())
def test_non_contiguous(backend, case, view):
    def results(dtype, backend):
        leaves, views = {}, {}
        for name, t in cases.make_inputs(case, torch.float32).items():
            leaves[name], of = view(t.detach().to(dtype))
            views[name] = of(leaves[name])
        assert any(not t.is_contiguous() for t in views.values())
        skip_unless_runs(case, views, backend)
        y = cases.call(case, views, backend)
        grads = torch.autograd.grad(y, list(leaves.values()), cases.output_gradient(case, y))
        return leaves, {'out': y.detach(), **dict(zip(leaves, grads))}

    leaves, actual = results(torch.float32, backend)
    assert actual['out'].is_contiguous()
    check(case, leaves, actual, results(torch.float64, 'reference')[1], torch.float32)


@pytest.mark.parametrize('only_x', [True, False], ids=['x', 'all'])
@pytest.mark.parametrize('case', [
    CASE['everything'], CASE['plain'], CASE['stride2'], CASE['groups2'], CASE['depthwise'], CASE['depthwise_plain'],
    CASE['depthwise_multiplier'], CASE['dilation_groups2']], ids=ids)
@pytest.mark.parametrize('backend', list_backends())
def test_channels_last(backend, case, only_x):
    inputs = cases.make_inputs(case, torch.float32)
    skip_unless_runs(case, inputs, backend)
    for name, t in inputs.items():
        if name == 'x' or (t.dim() == 4 and not only_x):
            inputs[name] = t.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    actual = cases.results(case, inputs, backend)
    assert actual['out'].is_contiguous(memory_format=torch.channels_last) and not actual['out'].is_contiguous()
    check(case, inputs, actual, cases.oracle(case, torch.float32), torch.float32)


@pytest.mark.parametrize('name', ['everything', 'depthwise', 'plain'])
@pytest.mark.parametrize('backend', list_backends())
def test_contiguous_stays_contiguous(backend, name):
    inputs = cases.make_inputs(CASE[name], torch.float32)
    skip_unless_runs(CASE[name], inputs, backend)
    assert cases.call(CASE[name], inputs, backend).is_contiguous()


# autocast


@pytest.mark.parametrize('half_x', [False, True], ids=['float32_x', 'half_x'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize('name', ['everything', 'dilation_large', 'depthwise', 'dilation_groups_across'])
@pytest.mark.parametrize('backend', list_backends())
def test_autocast(backend, name, dtype, half_x):
    """As a convolution under autocast: parameters in float32, activations perhaps in half precision already."""
    case = CASE[name]
    inputs = cases.make_inputs(case, torch.float32)
    if half_x:
        inputs['x'] = inputs['x'].detach().to(dtype).requires_grad_()
    skip_unless_runs(case, inputs, backend)
    with torch.autocast('cpu', dtype):
        actual = cases.results(case, inputs, backend)
    assert actual['out'].dtype == dtype
    # on the inputs as they are, so besides the computation's error there is that of casting them
    expected = cases.oracle_results(case, inputs)
    for name, t in inputs.items():
        assert actual[name].dtype == t.dtype and cases.error(actual[name], expected[name]) <= AUTOCAST[dtype], name
    assert cases.error(actual['out'], expected['out']) <= AUTOCAST[dtype]


@pytest.mark.parametrize('backend', list_backends())
def test_autocast_leaves_float64(backend):
    case = CASE['everything']
    inputs = cases.make_inputs(case, torch.float64)
    skip_unless_runs(case, inputs, backend)
    with torch.autocast('cpu', torch.bfloat16):
        actual = cases.results(case, inputs, backend)
    assert actual['out'].dtype == torch.float64
    check(case, inputs, actual, cases.oracle(case, torch.float64), torch.float64)


# the contract: defaults, choice of the backend, bad input


@pytest.mark.parametrize('name', ['everything', 'plain', 'depthwise'])
def test_backend_none_is_the_chosen_one(name):
    case = CASE[name]
    inputs = cases.make_inputs(case, torch.float32)
    chosen = choose_backend(cases.checked(case, inputs))
    assert chosen != 'reference' and not cases.why_not(case, inputs, chosen)
    assert cases.call(case, inputs, None).equal(cases.call(case, inputs, chosen))


def test_set_backend(monkeypatch):
    """Before the environment, which comes before the device; in a block until its end, and otherwise for good."""
    seen = []
    for name in ('gather', 'grid_sample', 'torchvision', 'reference'):
        monkeypatch.setitem(registry.BACKENDS, name, registry.BACKENDS[name]._replace(
            forward=lambda case, name=name: seen.append(name) or torch.zeros(1)))

    def used(**kwargs):
        adaptive_dilated_conv2d(**valid(), **kwargs)
        return seen.pop()

    assert used() == 'gather'
    monkeypatch.setenv('FADC_TIMM_BACKEND', 'grid_sample')
    assert used() == 'grid_sample'
    with set_backend('torchvision'):
        assert used() == 'torchvision' and used(backend='gather') == 'gather'
        with set_backend(None):
            assert used() == 'grid_sample'
        assert used() == 'torchvision'
    assert used() == 'grid_sample'
    set_backend('reference')
    assert used() == 'reference'
    set_backend(None)
    monkeypatch.setenv('FADC_TIMM_BACKEND', '')
    assert used() == 'gather'


def test_set_backend_that_is_none(monkeypatch):
    with pytest.raises(ValueError, match="'cudnn'.*reference, gather"):
        set_backend('cudnn')
    monkeypatch.setenv('FADC_TIMM_BACKEND', 'cudnn')
    with pytest.raises(ValueError, match="FADC_TIMM_BACKEND is 'cudnn'.*reference, gather"):
        adaptive_dilated_conv2d(**valid())


def test_set_backend_does_not_fall_back():
    with set_backend('torchvision'), pytest.raises(NotImplementedError, match="'torchvision'.*meta"):
        adaptive_dilated_conv2d(**on_meta())


@needs_dynamo
def test_set_backend_is_compiled():
    """Another setting is another graph."""
    torch.compiler.reset()
    kwargs = valid()
    compiled = torch.compile(lambda: adaptive_dilated_conv2d(**kwargs), fullgraph=True, backend='aot_eager')
    expected = adaptive_dilated_conv2d(**kwargs, backend='gather')
    assert torch.equal(compiled(), expected)
    with set_backend('grid_sample'):
        assert torch.equal(compiled(), adaptive_dilated_conv2d(**kwargs, backend='grid_sample'))
    assert torch.equal(compiled(), expected)


@pytest.mark.parametrize('backend', list_backends())
def test_integers_stand_for_pairs(backend):
    case = OpCase('pairs', (2, 4, 7, 9), 6, stride=(2, 2), padding=(1, 1))
    inputs = cases.make_inputs(case, torch.float64)
    skip_unless_runs(case, inputs, backend)
    args = [inputs[name] for name in ('x', 'weight', 'dilation', 'mask', 'bias')]
    y = cases.call(case, {**inputs, **dict.fromkeys(GAINS)}, backend)
    for kwargs in ({'padding': 1}, {'padding': [1, 1], 'gains': [None] * 4}, {}):
        assert adaptive_dilated_conv2d(*args, stride=2, **kwargs, backend=backend).equal(y)
    assert adaptive_dilated_conv2d(*args, stride=[2, 2], backend=backend).equal(y)


def valid():
    """x (2, 4, 5, 7), weight (6, 4, 3, 3), dilation (2, 2, 5, 7), mask (2, 18, 5, 7), bias (6,) and all gains."""
    case = OpCase('valid', (2, 4, 5, 7), 6, dilation_groups=2)
    inputs = {name: t.detach() for name, t in cases.make_inputs(case, torch.float32).items()}
    gains = [inputs.pop(name) for name in GAINS]
    return {**inputs, 'gains': gains}


def gain(i, t):
    """The valid gains with one replaced."""
    gains = valid()['gains']
    gains[i] = t
    return {'gains': gains}


def on_meta():
    return tree_map(lambda t: t.to('meta'), valid())


ones = torch.ones
BAD = {
    'x_no_tensor': ({'x': [[1.]]}, TypeError, ('x must be a tensor', '(B, C, H, W)', 'list')),
    'x_rank3': ({'x': ones(4, 5, 7)}, ValueError, ('(4, 5, 7)', '(B, C, H, W)')),
    'x_rank5': ({'x': ones(2, 4, 1, 5, 7)}, ValueError, ('(2, 4, 1, 5, 7)', '(B, C, H, W)')),
    'x_int': ({'x': ones(2, 4, 5, 7, dtype=torch.int64)}, TypeError, ('int64', 'floating point')),
    'x_complex': ({'x': ones(2, 4, 5, 7, dtype=torch.complex64)}, TypeError, ('complex64', 'floating point')),
    'x_channels': ({'x': ones(2, 5, 5, 7)}, ValueError, ('(6, 4, 3, 3)', '(any, 5, any, any)', '(O, C/groups, k, k)')),
    'x_no_rows': ({'x': ones(2, 4, 0, 7)}, ValueError, ('(2, 4, 0, 7)', 'at least one pixel')),
    'x_batch': ({'x': ones(3, 4, 5, 7)}, ValueError, ('(2, 2, 5, 7)', '(3, any, any, any)', "(B, G, H', W')")),
    'weight_no_tensor': ({'weight': 1.}, TypeError, ('weight must be a tensor', '(O, C/groups, k, k)', 'float')),
    'weight_none': ({'weight': None}, TypeError, ('weight must be a tensor', '(O, C/groups, k, k)', 'NoneType')),
    'weight_rank': ({'weight': ones(6, 4, 3)}, ValueError, ('(6, 4, 3)', '(any, 4, any, any)')),
    'weight_channels': ({'weight': ones(6, 2, 3, 3)}, ValueError, ('(6, 2, 3, 3)', '(any, 4, any, any)')),
    'weight_groups': ({'groups': 2}, ValueError, ('(6, 4, 3, 3)', '(any, 2, any, any)', '(O, C/groups, k, k)')),
    'weight_even': ({'weight': ones(6, 4, 2, 2)}, ValueError, ('(6, 4, 2, 2)', '(O, C/groups, k, k)', 'odd')),
    'weight_not_square': ({'weight': ones(6, 4, 3, 5)}, ValueError, ('(6, 4, 3, 5)', '(O, C/groups, k, k)', 'odd')),
    'weight_dtype': ({'weight': ones(6, 4, 3, 3).double()}, TypeError, ('weight', 'float64', 'float32')),
    'weight_device': ({'weight': ones(6, 4, 3, 3, device='meta')}, ValueError, ('weight', 'meta', 'cpu', 'one device')),
    'groups_zero': ({'groups': 0}, ValueError, ('groups', 'positive integer', '0')),
    'groups_float': ({'groups': 2.}, ValueError, ('groups', 'positive integer', '2.0')),
    'groups_of_x': ({'groups': 3}, ValueError, ('groups=3', 'does not divide', '4 channels', '(2, 4, 5, 7)')),
    'groups_of_weight': ({'groups': 4, 'weight': ones(6, 1, 3, 3)}, ValueError,
                         ('groups=4', 'does not divide', '6 output channels', '(6, 1, 3, 3)')),
    'dilation_number': ({'dilation': 2}, TypeError, ('dilation must be a tensor', "(B, G, H', W')", 'int')),
    'dilation_rank': ({'dilation': ones(2, 5, 7)}, ValueError, ('(2, 5, 7)', '(2, any, any, any)', "(B, G, H', W')")),
    'dilation_batch': ({'dilation': ones(1, 2, 5, 7)}, ValueError, ('(1, 2, 5, 7)', '(2, any, any, any)')),
    'dilation_groups': ({'dilation': ones(2, 3, 5, 7)}, ValueError, ('(2, 3, 5, 7)', '3 groups', '4 channels')),
    'dilation_no_groups': ({'dilation': ones(2, 0, 5, 7)}, ValueError, ('(2, 0, 5, 7)', '0 groups', '4 channels')),
    'dilation_no_columns': ({'dilation': ones(2, 2, 5, 0)}, ValueError, ('(2, 2, 5, 0)', 'at least one position')),
    'dilation_dtype': ({'dilation': ones(2, 2, 5, 7).double()}, TypeError, ('dilation', 'float64', 'float32')),
    'dilation_half': ({'dilation': ones(2, 2, 5, 7).half()}, TypeError, ('dilation', 'float16', 'float32')),
    'dilation_device': ({'dilation': ones(2, 2, 5, 7, device='meta')}, ValueError, ('dilation', 'meta', 'cpu')),
    'mask_number': ({'mask': 1.}, TypeError, ('mask must be a tensor', "(B, G*k*k, H', W')", 'float')),
    'mask_rank': ({'mask': ones(2, 2, 9, 5, 7)}, ValueError,
                  ('(2, 2, 9, 5, 7)', '(2, 18, 5, 7)', "(B, G*k*k, H', W')")),
    'mask_batch': ({'mask': ones(1, 18, 5, 7)}, ValueError, ('(1, 18, 5, 7)', '(2, 18, 5, 7)')),
    'mask_channels': ({'mask': ones(2, 9, 5, 7)}, ValueError, ('(2, 9, 5, 7)', '(2, 18, 5, 7)', "(B, G*k*k, H', W')")),
    'mask_size': ({'mask': ones(2, 18, 5, 6)}, ValueError, ('(2, 18, 5, 6)', '(2, 18, 5, 7)')),
    'mask_dtype': ({'mask': ones(2, 18, 5, 7).bfloat16()}, TypeError, ('mask', 'bfloat16', 'float32')),
    'mask_device': ({'mask': ones(2, 18, 5, 7, device='meta')}, ValueError, ('mask', 'meta', 'cpu')),
    'bias_number': ({'bias': 0.}, TypeError, ('bias must be a tensor', '(O,)', 'float')),
    'bias_size': ({'bias': ones(4)}, ValueError, ('(4,)', '(O,) = (6)')),
    'bias_rank': ({'bias': ones(1, 6, 1, 1)}, ValueError, ('(1, 6, 1, 1)', '(O,) = (6)')),
    'bias_dtype': ({'bias': ones(6).double()}, TypeError, ('bias', 'float64', 'float32')),
    'gains_three': ({'gains': valid()['gains'][:3]}, ValueError, ('four', '(low_in, low_out, high_in, high_out)', '3')),
    'gains_tensor': ({'gains': ones(4, 2, 4)}, TypeError, ('four', '(low_in, low_out, high_in, high_out)', 'Tensor')),
    'gains_number': (gain(1, 2.), TypeError, ('low_out must be a tensor', '(B, O)', 'float')),
    'gains_low_in': (gain(0, ones(2, 6)), ValueError, ('low_in', '(2, 6)', '(B, C) = (2, 4)')),
    'gains_low_out': (gain(1, ones(2, 4)), ValueError, ('low_out', '(2, 4)', '(B, O) = (2, 6)')),
    'gains_high_in_rank': (gain(2, ones(2, 4, 1, 1)), ValueError, ('high_in', '(2, 4, 1, 1)', '(B, C) = (2, 4)')),
    'gains_high_out_batch': (gain(3, ones(1, 6)), ValueError, ('high_out', '(1, 6)', '(B, O) = (2, 6)')),
    'gains_dtype': (gain(3, ones(2, 6).double()), TypeError, ('high_out', 'float64', 'float32')),
    'gains_device': (gain(0, ones(2, 4, device='meta')), ValueError, ('low_in', 'meta', 'cpu')),
    'stride_zero': ({'stride': 0}, ValueError, ('stride', 'at least 1', '0')),
    'stride_float': ({'stride': 1.5}, TypeError, ('stride', 'integer or a pair', '1.5')),
    'stride_three': ({'stride': (1, 1, 1)}, TypeError, ('stride', 'integer or a pair', '(1, 1, 1)')),
    'stride_tensor': ({'stride': torch.tensor(2)}, TypeError, ('stride', 'integer or a pair')),
    'padding_same': ({'padding': 'same'}, TypeError, ('padding', 'integer or a pair', 'same')),
    'padding_half_none': ({'padding': (1, None)}, TypeError, ('padding', 'integer or a pair', '(1, None)')),
    'padding_dict': ({'padding': {}}, TypeError, ('padding', 'integer or a pair', '{}')),
    'backend_unknown': ({'backend': 'cudnn'}, ValueError, ("'cudnn'", *list_backends())),
    'backend_cannot': ({**on_meta(), 'backend': 'torchvision'}, NotImplementedError, ("'torchvision'", 'meta')),
}


@pytest.mark.parametrize('overrides, exception, fragments', BAD.values(), ids=BAD)
def test_bad_input(overrides, exception, fragments):
    with pytest.raises(exception) as raised:
        adaptive_dilated_conv2d(**{**valid(), **overrides})
    message = str(raised.value)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize('name', [
    'x_no_tensor', 'x_int', 'weight_none', 'weight_even', 'dilation_number', 'mask_number', 'gains_three',
    'gains_number'])
def test_bad_input_under_autocast(name):
    """The casts come before the checks and do not stumble over what these will find."""
    with torch.autocast('cpu', torch.bfloat16):
        test_bad_input(*BAD[name])


def test_the_valid_call_is_valid():
    """The bad calls differ from this one in one argument."""
    for backend in (None, *list_backends()):
        assert adaptive_dilated_conv2d(**valid(), backend=backend).shape == (2, 6, 5, 7)


# tracing: shapes decide, values are never looked at


TRACED = [CASE['everything'], CASE['depthwise'], CASE['dilation_groups_across']]


@pytest.mark.parametrize('case', [*TRACED, CASE['stride2'], CASE['out_larger'], CASE['batch0_depthwise']], ids=ids)
@pytest.mark.parametrize('backend', [None, *list_backends()])
def test_meta(backend, case):
    inputs = cases.make_inputs(case, torch.float32, device='meta')
    if backend is not None:
        skip_unless_runs(case, inputs, backend)
    results = cases.results(case, inputs, backend)
    assert results['out'].shape == (case.x[0], case.o, *case.out_size)
    assert all(t.device.type == 'meta' for t in results.values())
    assert all(results[name].shape == t.shape for name, t in inputs.items())


@pytest.mark.parametrize('case', TRACED, ids=ids)
@pytest.mark.parametrize('backend', [None, *list_backends()])
def test_fake_tensors(backend, case):
    real = cases.make_inputs(case, torch.float32)
    with FakeTensorMode():
        inputs = {name: torch.empty(t.shape, requires_grad=True) for name, t in real.items()}
        if backend is not None:
            skip_unless_runs(case, inputs, backend)
        y = cases.call(case, inputs, backend)
        grads = torch.autograd.grad(y, list(inputs.values()), torch.empty_like(y))
    assert y.shape == (case.x[0], case.o, *case.out_size) and y.is_contiguous() and y.device.type == 'cpu'
    assert [g.shape for g in grads] == [t.shape for t in inputs.values()]


@needs_dynamo
@pytest.mark.parametrize('backend, case', [
    ('reference', CASE['k1']), *((name, case) for name in BACKEND_NAMES for case in TRACED)], ids=ids)
def test_compile(backend, case):
    inputs = cases.make_inputs(case, torch.float32)
    skip_unless_runs(case, inputs, backend)
    torch.compiler.reset()
    compiled = torch.compile(cases.call, fullgraph=True, backend='aot_eager')
    y = compiled(case, inputs, backend)
    grads = torch.autograd.grad(y, list(inputs.values()), cases.output_gradient(case, y))
    actual = {'out': y.detach(), **dict(zip(inputs, grads))}
    check(case, inputs, actual, cases.oracle(case, torch.float32), torch.float32)


@needs_dynamo
@pytest.mark.parametrize('backend, groups', [(None, 4), *((name, 1) for name in BACKEND_NAMES)])
def test_compile_any_size(backend, groups):
    """One graph serves every batch and size."""
    # none of the sizes is another's, or 9, the number of taps: the graph would be made for that
    sizes = [OpCase(f'any_size_{i}', (2 + i, 4, 7 + i, 11 + 2 * i), 4, groups=groups) for i in range(3)]
    torch.compiler.reset()
    counter = CompileCounter()

    def run(x, weight, dilation, mask, bias, *gains):
        return adaptive_dilated_conv2d(
            x, weight, dilation, mask, bias, gains=gains, groups=groups, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for case in sizes:
        inputs = cases.make_inputs(case, torch.float32)
        if backend is not None:
            skip_unless_runs(case, inputs, backend)
        expected = cases.oracle(case, torch.float32)['out']
        assert cases.error(compiled(*inputs.values()).detach(), expected) <= cases.tolerance('out', torch.float32)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize('name', ['everything', 'only_mask', 'stride2', 'groups2', 'depthwise', 'dilation_groups2'])
def test_script(name, dtype):
    case = CASE[name]
    inputs = cases.make_inputs(case, dtype)
    y = torch.jit.script(scripted_conv2d)(
        inputs['x'], inputs['weight'], inputs['dilation'], inputs['mask'], inputs.get('bias'),
        tuple(inputs.get(gain) for gain in GAINS), case.stride[0], case.k // 2, case.groups)
    grads = torch.autograd.grad(y, list(inputs.values()), cases.output_gradient(case, y))
    check(case, inputs, {'out': y.detach(), **dict(zip(inputs, grads))}, cases.oracle(case, dtype), dtype)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize('name', ['gains', 'plain', 'batch0', 'dilation_groups_across', 'depthwise', 'stride2'])
def test_opcheck_sampled_conv2d(name, dtype):
    """Schema, fake kernel and autograd formula of the operator behind `gather`."""
    case = CASE[name]
    inputs = cases.make_inputs(case, dtype)
    gains = [inputs.get(name) for name in GAINS]
    split = any(g is not None for g in gains)
    options = ([*case.stride], [case.k // 2] * 2, case.groups)
    operator, backward = torch.ops.fadc_timm.sampled_conv2d, torch.ops.fadc_timm.sampled_conv2d_backward
    # in half precision the graph that is made may round in another order
    tests = {} if dtype == torch.float32 else {'test_utils': ('test_schema', 'test_faketensor')}
    weights = [inputs['weight']]
    if not split:
        weights.append(inputs['weight'].expand(case.x[0], *inputs['weight'].shape))
    for weight in weights:
        args = (inputs['x'], inputs['dilation'], inputs.get('mask'), weight.detach().requires_grad_(),
                inputs.get('bias'), *gains, split, gains[3] is not None, *options)
        torch.library.opcheck(operator, args, **tests)
        x, dilation, mask, weight, bias, *rest = (a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        y, high = operator(x, dilation, mask, weight, bias, *rest)
        rest.pop(5)
        torch.library.opcheck(backward, (torch.randn_like(y), high, x, dilation, mask, weight, *rest), **tests)


@pytest.mark.parametrize('tile', [1, 3000, 30_000])
@pytest.mark.parametrize('name', [
    'everything', 'k7_stride2', 'groups2', 'dilation_groups_across', 'depthwise', 'batch37', 'one_pixel_k7'])
def test_tiles(name, tile, monkeypatch):
    """A tile may be some samples, one, or some rows of one; the result is the same."""
    monkeypatch.setattr(_tiles, '_TILE_BYTES', tile)
    case = CASE[name]
    inputs = cases.make_inputs(case, torch.float64)
    check(case, inputs, cases.results(case, inputs, 'gather'), cases.oracle(case, torch.float64), torch.float64)


@pytest.mark.parametrize('b, parts', [(1, 1), (32, 1), (33, 2), (37, 2), (64, 1), (66, 1), (67, 3)])
def test_torchvision_rounds(b, parts):
    """As few as possible: torchvision takes as many of at most 32 samples at a time as divide the batch."""
    case = OpCase(f'rounds{b}', (b, 2, 3, 3), 2)
    inputs = cases.make_inputs(case, torch.float32)
    counts = []

    def count(*args):
        counts.append(args[0].shape[0])
        return deform_conv2d(*args)

    deform_conv2d = _torchvision.deform_conv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torchvision, 'deform_conv2d', count)
        actual = cases.results(case, inputs, 'torchvision')
    check(case, inputs, actual, cases.oracle(case, torch.float32), torch.float32)
    assert len(counts) == parts * (1 if b == 1 else 2)  # gains: both parts of the kernel, but of one sample its own
    in_rounds = [n // max(i for i in range(1, 33) if n % i == 0) for n in counts]
    assert sum(in_rounds) == -(-b // 32) * (1 if b == 1 else 2)


@pytest.mark.parametrize('o', [3, 40])
def test_split_on_samples_and_on_the_kernel(o):
    """AdaKern's mean is taken off whichever is smaller, 40 kernels or the samples of 2*3*4 positions."""
    case = OpCase(f'split_{o}', (2, 4, 3, 4), o)
    inputs = cases.make_inputs(case, torch.float64)
    check(case, inputs, cases.results(case, inputs, 'gather'), cases.oracle(case, torch.float64), torch.float64)


# FLOPs


FLOP_CASES = [
    CASE['plain'], CASE['mask_bias'], CASE['k7_stride2'], CASE['groups3_of_6'], CASE['dilation_groups_all'],
    CASE['depthwise_plain'], CASE['depthwise_stride2'], CASE['depthwise_multiplier_plain'], CASE['tall_map'],
    CASE['batch1'], CASE['depthwise'], CASE['gains'],
]


def convolution_flops(case):
    """Of the convolution that the operator stands for: two for a multiply-add."""
    b, c, _, _ = case.x
    return 2 * b * case.o * math.prod(case.out_size) * c // case.groups * case.k ** 2


def flops_of(function):
    with FlopCounterMode(display=False) as counter:
        y = function()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    return forward, counter.get_total_flops()


@pytest.mark.parametrize('case', FLOP_CASES, ids=ids)
@pytest.mark.parametrize('backend', BACKEND_NAMES)
def test_flops(backend, case):
    """The convolution's, and twice that backward: once for the samples, once for the weight.

    Sampling is bandwidth, and no counter counts elementwise work. Outside of depthwise convolution the gains split the
    weight in two: the mean kernel costs one more tap where the samples are added up first, and in torchvision all taps
    again. torch's formula for the backward pass of a grouped F.conv2d, which grid_sample calls, ignores the groups.
    """
    inputs = cases.make_inputs(case, torch.float32)
    skip_unless_runs(case, inputs, backend)
    expected = convolution_flops(case)
    if not set(GAINS).isdisjoint(case.use):
        taps = case.k ** 2
        own = 0 if case.groups == case.o else 1
        more = {'torchvision': taps if case.x[0] > 1 else 0, 'gather': own, 'triton': own}.get(backend, 1)
        expected = expected * (taps + more) // taps
    forward, backward = flops_of(lambda: cases.call(case, inputs, backend))
    assert forward == expected
    if backend != 'grid_sample' or case.groups == 1:
        assert backward == 2 * expected


class Operator(torch.nn.Module):
    def __init__(self, case, backend):
        super().__init__()
        self.case, self.backend = case, backend

    def forward(self, *inputs):
        return cases.call(self.case, dict(zip(cases.make_inputs(self.case, torch.float32), inputs)), self.backend)


@pytest.mark.parametrize('case', [c for c in FLOP_CASES if set(GAINS).isdisjoint(c.use)], ids=ids)
@pytest.mark.parametrize('backend', ['gather', 'torchvision', 'grid_sample', 'triton'])
def test_fvcore_flops(backend, case):
    """fvcore counts multiply-adds."""
    analysis = pytest.importorskip('fvcore.nn').FlopCountAnalysis(
        Operator(case, backend), tuple(cases.make_inputs(case, torch.float32).values()))
    analysis.set_op_handle(**flops.fvcore_handlers()).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = analysis.by_operator()
    counts.pop('grid_sampler', None)  # fvcore's own handler counts the sampling, which is no matter of ours
    assert sum(counts.values()) == convolution_flops(case) // 2
