"""The operator: every backend against the float64 oracle, output and every gradient, in every precision."""
import functools

import pytest
import torch

from fadc_timm.ops import list_backends, triton_support
from fadc_timm.ops.sampled_conv import torchvision
from fadc_timm.ops.sampled_conv.gather import tiles
from tests.support import cases
from tests.support.cases import CASES, DTYPES, GAINS, INPUTS, SOURCES, OpCase
from tests.support.op_checks import BACKEND_NAMES, CASE, check, ids, skip_unless_runs

pytestmark = pytest.mark.usefixtures('one_thread')

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]

# measured, the largest of all backends and gradients: 1.6e-2, 2.2e-3
AUTOCAST = {torch.bfloat16: 2.5e-2, torch.float16: 4e-3}


# The cases in half precision for the backends that sample in float32 whatever the dtype.
CORE = {'plain', 'everything', 'k5', 'stride2', 'groups2', 'dilation_groups2', 'depthwise', 'depthwise_k7', 'mask_bias',
        'gains', 'batch1', 'tall_map', 'offset', 'offset_plain', 'offset_rectangular', 'offset_depthwise'}
CALLS = [
    (backend, case, dtype) for backend in BACKEND_NAMES for case in CASES for dtype in DTYPES
    if backend not in ('torchvision', 'grid_sample') or dtype.itemsize > 2 or case.name in CORE]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('backend, case, dtype', CALLS, ids=ids)
def test_output_and_gradients(backend, case, dtype, device):
    inputs = cases.make_inputs(case, dtype, device=device)
    skip_unless_runs(case, inputs, backend)
    actual = cases.results(case, inputs, backend)
    assert actual['out'].dtype == dtype
    check(case, inputs, actual, cases.oracle(case, dtype), dtype)


@pytest.mark.parametrize('dtype, steps_dtype', [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float64, torch.float32)], ids=ids)
@pytest.mark.parametrize('name', [
    'everything', 'k5', 'stride2', 'dilation_groups2', 'depthwise', 'offset', 'offset_depthwise'])
@pytest.mark.parametrize('backend', BACKEND_NAMES)
@pytest.mark.interpreted('everything bfloat16-bfloat16', 'depthwise float64-float32', 'offset-float16')
def test_steps_dtype(backend, name, dtype, steps_dtype):
    """Dilations and offsets in the half dtype, where the test above has float32, and float32 beside float64."""
    case = CASE[name]
    inputs = cases.make_inputs(case, dtype, steps_dtype)
    skip_unless_runs(case, inputs, backend)
    actual, expected = cases.results(case, inputs, backend), cases.oracle(case, dtype, steps_dtype)
    check(case, inputs, actual, expected, dtype, {'out', *INPUTS} - {case.source})
    assert cases.error(actual[case.source], expected[case.source]) <= cases.tolerance(case.source, steps_dtype)


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
    *((name, dtype) for name in (
        'everything', 'k5', 'groups2', 'depthwise_k7', 'dilation_groups2', 'offset', 'offset_rectangular',
        'offset_depthwise_k7')
      for dtype in (torch.float32, torch.float64)),
    *((name, torch.bfloat16) for name in ('mask_bias', 'dilation_groups_all', 'depthwise_plain', 'offset_mask')),
]


@functools.cache
def on_grid(name, dtype, positions):
    inputs = cases.make_inputs(CASE[name], dtype)
    source = inputs[CASE[name].source]
    with torch.no_grad():
        source.copy_(positions(source))
    return inputs, cases.oracle_results(CASE[name], inputs)


@pytest.mark.parametrize('positions', [
    integers, border, *map(constant, (0., 1., 0.5, -1e30, torch.finfo(torch.float32).max))])
@pytest.mark.parametrize('name, dtype', ON_GRID_CASES, ids=ids)
@pytest.mark.parametrize('backend', BACKEND_NAMES)
@pytest.mark.interpreted(
    'everything float32-border', 'everything float32-0', 'everything float32-1e+30', 'k5-float32-3.4',
    'offset-float32-border')
def test_on_the_grid(backend, name, dtype, positions):
    """Where the derivative of dilation or offset jumps, all others are continuous, and its own is finite."""
    inputs, expected = on_grid(name, dtype, positions)
    skip_unless_runs(CASE[name], inputs, backend)
    actual = cases.results(CASE[name], inputs, backend)
    check(CASE[name], inputs, actual, expected, dtype, {'out', *INPUTS} - {*SOURCES})
    assert actual[CASE[name].source].isfinite().all()


@pytest.mark.parametrize('positions', [integers, border, constant(0.)])
@pytest.mark.parametrize('name', ['everything', 'groups2', 'depthwise', 'offset', 'offset_k5', 'offset_depthwise'])
@pytest.mark.parametrize('backend', [name for name in BACKEND_NAMES if name != 'grid_sample'])
@pytest.mark.interpreted('offset-0', 'offset_depthwise-0')
def test_slope_on_a_pixel(backend, name, positions):
    """Of the two slopes there, the one below and to the right. So it is where training of an offset starts, at 0.

    `grid_sample` scales the positions to -1..1, after which rounding decides.
    """
    case = CASE[name]
    inputs, expected = on_grid(name, torch.float64, positions)
    skip_unless_runs(case, inputs, backend)
    actual = cases.results(case, inputs, backend)
    assert cases.error(actual[case.source], expected[case.source]) <= cases.tolerance(case.source, torch.float64)


@pytest.mark.parametrize('backend', BACKEND_NAMES)
@pytest.mark.interpreted()
def test_threads(backend):
    """A map that is large enough to be shared by threads."""
    case = OpCase('threads', (4, 16, 20, 20), 16, dilation_groups=2)
    inputs = cases.make_inputs(case, torch.float32)
    skip_unless_runs(case, inputs, backend)
    expected = cases.oracle(case, torch.float32)
    torch.set_num_threads(2)
    check(case, inputs, cases.results(case, inputs, backend), expected, torch.float32)


@pytest.mark.parametrize('offsets, seed, dtypes', [
    *((True, seed, [DTYPES[seed % 4]]) for seed in range(30)),
    *(pytest.param(offsets, seed, DTYPES, marks=pytest.mark.sweep) for offsets in (False, True)
      for seed in range(300))])
@pytest.mark.parametrize('backend', BACKEND_NAMES)
@pytest.mark.interpreted()
def test_random_case(backend, offsets, seed, dtypes):
    case = cases.random_case(seed, offsets)
    if backend == 'triton' and triton_support.is_interpreted():
        dtypes = [DTYPES[seed % 4]]  # the interpreter takes 5 s for each
    for dtype in dtypes:
        inputs = cases.make_inputs(case, dtype)
        skip_unless_runs(case, inputs, backend)
        actual, expected = cases.results(case, inputs, backend), cases.oracle(case, dtype)
        check(case, inputs, actual, expected, dtype, cases.conditioned(case, inputs, expected, dtype))


@pytest.mark.parametrize('case, name', [
    (CASE[of], name) for of in ('everything', 'depthwise', 'offset', 'offset_depthwise') for name in CASE[of].shapes],
    ids=ids)
@pytest.mark.parametrize('backend', BACKEND_NAMES)
@pytest.mark.interpreted('everything-x', 'everything-high_out', 'depthwise-dilation', 'offset-offset')
def test_one_gradient_alone(backend, case, name):
    """A frozen layer: only one of the arguments requires a gradient."""
    inputs = cases.make_inputs(case, torch.float64)
    skip_unless_runs(case, inputs, backend)
    expected = cases.oracle(case, torch.float64)
    inputs = {n: t.requires_grad_(n == name) for n, t in inputs.items()}
    y = cases.call(case, inputs, backend)
    grad, = torch.autograd.grad(y, inputs[name], cases.output_gradient(case, y))
    assert cases.error(grad, expected[name]) <= cases.tolerance(name, torch.float64)


@pytest.mark.parametrize('name', ['batch0', 'batch0_plain', 'batch0_depthwise', 'offset_batch0'])
@pytest.mark.parametrize('backend', list_backends())
def test_empty_batch(backend, name):
    case = CASE[name]
    inputs = cases.make_inputs(case, torch.float32)
    skip_unless_runs(case, inputs, backend)
    results = cases.results(case, inputs, backend)
    assert results['out'].shape == (0, case.o, 7, 9)
    for name, t in inputs.items():
        assert results[name].shape == t.shape and not results[name].any(), name


@pytest.mark.parametrize('case', [CASE['everything'], CASE['depthwise'], CASE['stride2'], CASE['offset']], ids=ids)
@pytest.mark.parametrize('backend', list_backends())
@pytest.mark.interpreted()  # test_deterministic is that too
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


GRADCHECK = [
    OpCase('gradcheck', (2, 2, 2, 3), 2, dilation_groups=2, stride=(1, 2)),
    OpCase('gradcheck_groups', (1, 4, 2, 2), 2, groups=2, use=GAINS),
    OpCase('gradcheck_k5', (1, 1, 2, 3), 1, k=5, use=('mask', 'bias')),
    OpCase('gradcheck_depthwise', (2, 2, 2, 2), 2, groups=2),
    OpCase('gradcheck_depthwise_plain', (1, 4, 2, 2), 4, groups=4, dilation_groups=2, use=('mask',)),
    OpCase('gradcheck_offset', (2, 2, 2, 3), 2, dilation_groups=2, stride=(1, 2), spacing=(1, 1)),
    OpCase('gradcheck_offset_k2', (1, 4, 2, 2), 2, k=2, groups=2, spacing=(1, 2), use=('mask', 'bias')),
    OpCase('gradcheck_offset_depthwise', (2, 2, 2, 2), 2, groups=2, spacing=(1, 1)),
]


@pytest.mark.parametrize('case', GRADCHECK, ids=ids)
@pytest.mark.parametrize('backend', list_backends())
@pytest.mark.interpreted()
def test_gradcheck(backend, case):
    inputs = cases.make_inputs(case, torch.float64)
    skip_unless_runs(case, inputs, backend)
    torch.autograd.gradcheck(
        lambda *t: cases.call(case, dict(zip(inputs, t)), backend), tuple(inputs.values()),
        fast_mode=backend in ('reference', 'triton'))  # all directions at once, for the slow ones


# autocast


@pytest.mark.parametrize('half_x', [False, True], ids=['float32_x', 'half_x'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize('name', [
    'everything', 'dilation_large', 'depthwise', 'dilation_groups_across', 'offset', 'offset_depthwise'])
@pytest.mark.parametrize('backend', list_backends())
@pytest.mark.interpreted('everything bfloat16-float32_x', 'depthwise bfloat16-half_x', 'offset-bfloat16-float32_x')
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


# how the backends divide the work


@pytest.mark.parametrize('tile', [1, 3000, 30_000])
@pytest.mark.parametrize('name', [
    'everything', 'k7_stride2', 'groups2', 'dilation_groups_across', 'depthwise', 'batch37', 'one_pixel_k7', 'offset',
    'offset_rectangular', 'offset_batch37'])
def test_tiles(name, tile, monkeypatch):
    """A tile may be some samples, one, or some rows of one; the result is the same."""
    monkeypatch.setattr(tiles, '_TILE_BYTES', tile)
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

    deform_conv2d = torchvision.deform_conv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision, 'deform_conv2d', count)
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
