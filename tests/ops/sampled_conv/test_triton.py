"""What is Triton's own: blocks, tiles and bundles, whole numbers, addresses, registration, graphs.

Its results are tested with those of the other backends too, in test_backends.py.
"""
import copy

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fadc_timm.ops import adaptive_dilated_conv2d, deform_conv2d, set_backend, settings, triton_support
from fadc_timm.ops.sampled_conv.triton import ACTS, dense, depthwise, operator, sums, two_step_conv2d
from fadc_timm.ops.sampled_conv.triton.call import Call, Spec
from fadc_timm.ops.sampled_conv.triton.operator import two_step_conv2d_backward
from tests.support import cases, predicted_cases
from tests.support.cases import CASES, DTYPES, OpCase
from tests.support.no_copies import no_copies
from tests.support.op_checks import check, ids

triton = pytest.importorskip('triton')
import triton.language as tl  # noqa: E402

from fadc_timm.ops.sampled_conv.triton.dense_kernels import place  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')

CASE = {case.name: case for case in CASES}
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]


def sweep(*values):
    return pytest.param(*values, marks=pytest.mark.sweep)


@pytest.fixture(autouse=True)
def skip_unless_runs(request):
    """On a machine with a GPU kernels are not interpreted, and run there alone."""
    if 'device' in request.fixturenames:
        reason = triton_support.why_not_on(request.getfixturevalue('device'))
        if reason:
            pytest.skip(reason)


def forget_launches():
    for launches in (dense._launches, depthwise._launches, sums._sampling_launch, sums._gains_launch):
        launches.cache_clear()


@pytest.fixture
def blocks(monkeypatch):
    """Set the positions of a program, whatever the device; launches are kept by shape, and forgotten here."""
    def choose(positions):
        for module, name in ((dense, '_COLUMNS'), (dense, '_SCATTER'), (depthwise, '_FORWARD'),
                             (depthwise, '_BACKWARD'), (depthwise, '_PRODUCTS')):
            monkeypatch.setattr(module, name, (positions, *getattr(module, name)[1:]))
        monkeypatch.setattr(dense, '_INTERPRETED', positions)
        monkeypatch.setattr(dense, '_SPREAD', 2 * positions)
        monkeypatch.setattr(sums, '_CHUNKS', 1)
        forget_launches()

    yield choose
    forget_launches()


def check_triton(case, device, dtype=torch.float32):
    inputs = cases.make_inputs(case, dtype, device=device)
    check(case, inputs, cases.results(case, inputs, 'triton'), cases.oracle(case, dtype), dtype)


# how the work is divided


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('positions', [4, sweep(8), sweep(64)])
@pytest.mark.parametrize('case', [
    OpCase('blocks', (2, 4, 3, 2), 6),
    sweep(OpCase('blocks_stride2', (2, 4, 7, 6), 6, stride=(2, 2), dilation_groups=2)),
    OpCase('blocks_depthwise', (2, 4, 3, 2), 4, groups=4),
    OpCase('blocks_offset', (2, 4, 3, 2), 6, spacing=(1, 1), dilation_groups=2)], ids=ids)
def test_blocks_of_positions(case, positions, device, blocks):
    """Blocks that end within a sample, and one that is larger than it."""
    blocks(positions)
    check_triton(case, device)


def tiles_of(case, workspace, block_p, dtype=torch.float32):
    inputs = cases.make_inputs(case, dtype, device='meta')
    strides = [t.stride() for t in (inputs['dilation'], inputs['mask'])]
    spec = Spec(case.x, dtype, tuple(inputs['dilation'].shape), *strides, tuple(inputs['weight'].shape), True, 0, 1.,
                False, case.stride, (case.k // 2,) * 2, (), case.groups, workspace)
    return [(t.first_sample, t.samples, t.first, t.length) for t in Call(spec).tiles(block_p)]


TILED = OpCase('tiled', (3, 4, 7, 5), 6)  # 35 positions a sample, of 160 bytes each in float32


def test_tiles():
    """Every position in one tile, whole samples where they fit, and else blocks of one."""
    assert tiles_of(TILED, 2 ** 28, 32) == [(0, 3, 0, 35)]
    assert tiles_of(TILED, 80 * 160, 32) == [(0, 2, 0, 35), (2, 1, 0, 35)]
    assert tiles_of(TILED, 36 * 160, 32) == [(0, 1, 0, 35), (1, 1, 0, 35), (2, 1, 0, 35)]
    assert tiles_of(TILED, 1, 16) == [(b, 1, first, n) for b in range(3) for first, n in ((0, 16), (16, 16), (32, 3))]
    assert tiles_of(TILED, 28 * 160, 8) == [(b, 1, first, n) for b in range(3) for first, n in ((0, 24), (24, 11))]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(
    'positions, workspace', [(16, 1), (16, 80 * 160), sweep(8, 28 * 160)], ids=['block', 'samples', 'blocks'])
@pytest.mark.parametrize('case', [
    TILED, *(pytest.param(case, marks=pytest.mark.sweep) for case in (
        OpCase('tiled_plain', (3, 4, 7, 5), 6, use=()), OpCase('tiled_groups', (3, 4, 7, 5), 6, groups=2),
        OpCase('tiled_dilation_groups', (3, 4, 7, 5), 6, stride=(1, 2), dilation_groups=2),
        OpCase('tiled_offset', (3, 4, 7, 5), 6, stride=(1, 2), dilation_groups=2, spacing=(1, 1))))], ids=ids)
def test_small_workspace(case, positions, workspace, device, blocks, monkeypatch):
    """A sample is cut into several tiles, or a batch is; sums over tiles are the sums over all."""
    blocks(positions)
    monkeypatch.setattr(settings, 'workspace_bytes', lambda: workspace)
    check_triton(case, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, sweep(torch.float16)], ids=ids)
def test_small_workspace_in_half_precision(dtype, device, blocks, monkeypatch):
    blocks(16)
    monkeypatch.setattr(settings, 'workspace_bytes', lambda: 1)
    check_triton(TILED, device, dtype)


@pytest.mark.parametrize('device', DEVICES)
def test_sums_over_tiles_are_not_rounded(device, blocks, monkeypatch):
    """Each tile's share of the kernel's gradient is a half, and their sum is rounded once."""
    blocks(16)
    monkeypatch.setattr(settings, 'workspace_bytes', lambda: 1)
    torch.manual_seed(0)
    shapes = (1, 8, 24, 24), (4, 8, 3, 3), (1, 4, 24, 24)
    x, weight, grad = (torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes)
    weight.requires_grad_()
    d = 1 + torch.rand(1, 1, 24, 24, device=device)
    grad += 0.5
    y = adaptive_dilated_conv2d(x, weight, d, padding=1, backend='triton')
    exact = weight.detach().double().requires_grad_()
    expected = adaptive_dilated_conv2d(x.double(), exact, d.double(), padding=1, backend='reference')
    ours, = torch.autograd.grad(y, weight, grad)
    theirs, = torch.autograd.grad(expected, exact, grad.double())
    assert (ours - theirs).norm() < 4e-3 * theirs.norm()


@pytest.mark.parametrize('device', DEVICES)
def test_kernels_of_many_taps(device):
    """Offsets of 38 x 38 taps are more rows than a block has by default."""
    taps = 38 ** 2
    offset = torch.zeros(1, 2 * taps, 1, 1, device=device)
    sampling = torch.arange(3. * taps, device=device)[None, :, None]
    spec = Spec((1, 1, 2, 2), torch.float32, tuple(offset.shape), offset.stride(), None, (1, 1, 38, 38), False, 0, 1.,
                False, (1, 1), (19, 19), (1, 1), 1, 2 ** 28)
    grad, _ = sums.sampling_gradient(Call(spec), sampling, offset, None)
    assert torch.equal(grad.flatten(), sampling[0, taps:, 0])


def test_workspace_setting(monkeypatch):
    monkeypatch.setenv('FADC_TIMM_WORKSPACE_MB', '3')
    inputs = cases.make_inputs(TILED, torch.float32, device='meta')
    spec = operator._spec(
        inputs['x'], inputs['weight'], inputs['dilation'], None, None, None, 0, 1., False, [1, 1], [1, 1], [], 1)
    assert spec.workspace == 3 * 2 ** 20 and spec.mask_strides is None and not spec.split


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case, bundles', [
    (OpCase('wide', (1, 130, 3, 4), 70), 1),  # several blocks of channels on either side
    (OpCase('wide_groups', (2, 72, 3, 3), 66, groups=2), 2),  # as wide as a product has to be: no bundles
    sweep(OpCase('wide_groups_tiled', (2, 72, 3, 3), 66, groups=2, dilation_groups=3), 2),
    (OpCase('bundles', (1, 64, 3, 4), 64, groups=8, dilation_groups=2), 2),  # of four groups
    sweep(OpCase('bundles_across', (1, 96, 3, 3), 48, groups=12, dilation_groups=2), 1),  # narrow on the output's side
    sweep(OpCase('bundles_plain', (2, 64, 4, 3), 128, groups=4, use=('mask', 'bias')), 2),
    (OpCase('bundles_offset', (1, 64, 3, 4), 64, groups=8, dilation_groups=2, spacing=(1, 1)), 2),
    sweep(OpCase('bundles_across_dilation_groups', (1, 96, 3, 4), 96, groups=6, dilation_groups=2), 3),
], ids=ids)
def test_blocks_of_channels(case, bundles, device):
    inputs = cases.make_inputs(case, torch.float32, device='meta')
    spec = operator._spec(inputs['x'], inputs['weight'], inputs[case.source], inputs['mask'], None, None, 0, 1., False,
                          [1, 1], [1, 1], [*(case.spacing or ())], case.groups)
    call = Call(spec)
    assert call.bundles == bundles and (call.width * bundles, call.out_width * bundles) == (case.x[1], case.o)
    check_triton(case, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case', [
    OpCase('depthwise_wide', (1, 70, 3, 4), 70, groups=70, use=('mask', 'low_in', 'high_in')),
    sweep(OpCase('depthwise_wide_dilation_groups', (1, 150, 4, 5), 150, groups=150, dilation_groups=3))], ids=ids)
def test_blocks_of_channels_depthwise(case, device):
    check_triton(case, device)


# what a layer predicts


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('act, dtype, case, joint', [
    ('abs', torch.float32, CASE['everything'], True), ('zero', torch.bfloat16, CASE['everything'], True),
    ('relu', torch.float16, CASE['depthwise_input_gains'], False),
    *(sweep(act, dtype, CASE[name], joint) for act in ACTS[1:] for dtype in DTYPES for name, joint in (
        ('everything', True), ('stride2', True), ('k5', True), ('mask_bias', True), ('dilation_groups2', True),
        ('groups2', True), ('everything', False), ('depthwise_plain', False), ('depthwise_input_gains', False),
        ('depthwise_dilation_groups', False)))], ids=ids)
def test_predicted(act, dtype, case, joint, device):
    """The activations are in the kernels; the dilation is float32 inside of them, whatever the dtype."""
    inputs = predicted_cases.make_inputs(case, act, dtype, device, joint)
    actual = predicted_cases.results(predicted_cases.call, case, inputs, act)
    exact = {name: t.detach().cpu().double().requires_grad_() for name, t in inputs.items()}
    expected = predicted_cases.results(predicted_cases.definition, case, exact, act)
    assert actual['out'].dtype == dtype
    assert all(actual[name].dtype == t.dtype for name, t in inputs.items())
    errors = {name: cases.error(t, expected[name]) / cases.TOLERANCES[dtype][predicted_cases.NAMES.get(name, name)]
              for name, t in actual.items()}
    assert max(errors.values()) <= 1, errors


# whole numbers


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case, dtype', [
    (CASE['everything'], torch.float32), (CASE['depthwise'], torch.float32), (CASE['offset'], torch.float32),
    sweep(CASE['groups2'], torch.float64), sweep(CASE['offset_depthwise'], torch.float32),
    sweep(CASE['plain'], torch.float16), sweep(CASE['depthwise_plain'], torch.bfloat16)], ids=ids)
def test_deterministic(case, dtype, device, deterministic, monkeypatch):
    """In whole numbers the order of the additions does not matter: the same bits, and as exact as in float."""
    monkeypatch.setattr(settings, 'workspace_bytes', lambda: 1)
    inputs = cases.make_inputs(case, dtype, device=device)
    first, second = (cases.results(case, inputs, 'triton') for _ in range(2))
    check(case, inputs, first, cases.oracle(case, dtype), dtype)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize('device', DEVICES)
def test_deterministic_predictions(device, deterministic):
    inputs = predicted_cases.make_inputs(CASE['groups2'], 'abs', torch.float32, device)
    first, second = (predicted_cases.results(predicted_cases.call, CASE['groups2'], inputs, 'abs') for _ in range(2))
    exact = {name: t.detach().cpu().double().requires_grad_() for name, t in inputs.items()}
    expected = predicted_cases.results(predicted_cases.definition, CASE['groups2'], exact, 'abs')
    assert cases.error(first['x'], expected['x']) <= cases.tolerance('x', torch.float32)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.filterwarnings('ignore:invalid value encountered')
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', ['plain', 'depthwise_plain'])
def test_deterministic_gradients_of_zero_and_of_infinity(name, device, deterministic):
    case = CASE[name]
    inputs = cases.make_inputs(case, torch.float32, device=device)
    y = cases.call(case, inputs, 'triton')
    for value in (0., float('inf'), float('nan')):
        grad, = torch.autograd.grad(y, inputs['x'], torch.full_like(y, value), retain_graph=True)
        assert not grad.any() if value == 0 else not grad.isfinite().any()


@pytest.mark.filterwarnings('ignore:overflow encountered', 'ignore:invalid value encountered')
@pytest.mark.parametrize('device', DEVICES)
def test_deterministic_gradients_that_overflow(device, deterministic):
    """The gradients of the columns leave float16, where those of the output do not."""
    x = torch.randn(1, 16, 4, 4, dtype=torch.float16, device=device, requires_grad=True)
    weight, d = x.new_ones(16, 16, 3, 3), torch.full((1, 1, 4, 4), 1.5, device=device)
    y = adaptive_dilated_conv2d(x, weight, d, padding=1, backend='triton')
    grad, = torch.autograd.grad(y, x, torch.full_like(y, 3e4))
    assert not grad.isfinite().any()


# addresses


@triton.jit
def _places(programs, sample, q, row, first_sample, first, count, PROGRAMS: tl.constexpr, BLOCK_P: tl.constexpr):
    for n in tl.static_range(PROGRAMS):
        b, within, of_tile, alive = place(tl.load(programs + n), first_sample, first, count, BLOCK_P)
        at = n * BLOCK_P + tl.arange(0, BLOCK_P)
        tl.store(sample + n, b)
        tl.store(q + at, tl.where(alive, within, -1))
        tl.store(row + at, of_tile)


@pytest.mark.parametrize('device', DEVICES)
def test_places_beyond_int32(device):
    """Of a tile of many samples with 16 blocks of positions each: its last position is beyond 2**31."""
    count, block_p = 2 ** 20 - 5, 2 ** 16
    programs = [0, 15, 16, 16 * 5000 + 15]
    given = torch.tensor(programs, dtype=torch.int32, device=device)
    sample, q, row = (torch.empty(len(programs) * n, dtype=torch.int64, device=device) for n in (1, block_p, block_p))
    _places[1,](given, sample, q, row, 7, 3, count, len(programs), block_p)
    assert sample.tolist() == [7, 7, 8, 5007]
    for n, program in enumerate(programs):
        place = program % 16 * block_p + torch.arange(block_p)
        rows = row.view(-1, block_p)[n].cpu()
        assert torch.equal(rows, program // 16 * count + place)
        assert torch.equal(q.view(-1, block_p)[n].cpu(), torch.where(place < count, 3 + place, -1))
    assert row[-1] > 2 ** 32


def test_pixels_beyond_int32():
    """How wide the number of a pixel's element has to be within a sample."""
    def index(h):
        shape = 1, 64, h, 2 ** 10
        spec = Spec(shape, torch.float16, (1, 1, 3, 3), (9, 9, 3, 1), None, (64, 64, 3, 3), False, 0, 1., False, (1, 1),
                    (1, 1), (), 1, 1)
        return Call(spec).constants[-1]

    assert index(2 ** 15 - 1) == tl.int32 and index(2 ** 15) == tl.int64


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('name', ['mask', 'offset'])
def test_channels_beyond_int32(name, groups, device):
    """Those of masks and offsets lie far apart on large contiguous maps: the last ones beyond 2**31 elements."""
    dtype = torch.float16
    x = torch.randn(1, 4, 3, 3, device=device, dtype=dtype)
    weight = torch.randn(4, 4 // groups, 3, 3, device=device, dtype=dtype)
    near = {'mask': torch.rand(1, 36, 3, 3, device=device, dtype=dtype),
            'offset': torch.randn(1, 72, 3, 3, device=device, dtype=dtype)}
    channels = near[name].shape[1]
    apart = 2 ** 31 // (channels * 3 // 4) + 1  # so that the last step group begins there
    storage = torch.empty((channels - 1) * apart + 9, device=device, dtype=dtype)  # most of it is never touched
    far = {**near, name: storage.as_strided(near[name].shape, (len(storage), apart, 3, 1)).copy_(near[name])}

    def results(tensors):
        mask, offset = (tensors[key].detach().requires_grad_() for key in ('mask', 'offset'))
        y = deform_conv2d(x, weight, offset, mask, padding=1, groups=groups, backend='triton')
        return y, *torch.autograd.grad(y.float().square().sum(), (mask, offset))

    for a, b in zip(results(far), results(near), strict=True):
        assert torch.equal(a, b)


# the operator of torch


def operator_inputs(case, device, dtype=torch.float32, act=0):
    """What two_step_conv2d takes, of which the tensors are leaves."""
    if act:
        depthwise = 1 < case.groups == case.x[1]
        named = predicted_cases.make_inputs(case, ACTS[act], dtype, device, joint=not depthwise)
        tensors = [named.get(name) for name in ('x', 'weight', 'bias', 'o', 'mask', 'low', 'high')]
    else:
        inputs = cases.make_inputs(case, dtype, device=device)
        low, high = (None if f'{part}_in' not in inputs else torch.cat(
            [inputs[f'{part}_{side}'].detach() for side in ('in', 'out')], 1) for part in ('low', 'high'))
        if low is not None and 1 < case.groups == case.x[1]:
            low, high = low[:, :case.x[1]].contiguous(), high[:, :case.x[1]].contiguous()
        tensors = [
            inputs['x'], inputs['weight'], inputs.get('bias'), inputs[case.source], inputs.get('mask'), low, high]
        tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    return tensors, [act, float(predicted_cases.BASE), act > 0], [
        [*case.stride], [case.k // 2] * 2, [*(case.spacing or ())], case.groups]


OPERATOR = [
    (OpCase('check', (1, 2, 2, 3), 2), 0), (OpCase('check_act', (1, 2, 2, 3), 2), 1),
    (OpCase('check_batch0', (0, 2, 2, 3), 2), 0), (OpCase('check_plain', (2, 2, 2, 3), 3, use=()), 0),
    (OpCase('check_groups', (1, 4, 3, 2), 2, groups=2, dilation_groups=2, stride=(2, 1), use=('mask',)), 0),
    (OpCase('check_depthwise', (1, 2, 2, 3), 2, groups=2), 2),
    (OpCase('check_offset', (1, 2, 2, 3), 2, spacing=(1, 1)), 0),
    (OpCase('check_offset_depthwise', (1, 2, 2, 3), 2, groups=2, spacing=(1, 1)), 0),
]


@pytest.mark.parametrize('save', [True, sweep(False)])
@pytest.mark.parametrize('case, act', [
    OPERATOR[0], OPERATOR[-1], *(sweep(*of) for of in OPERATOR[1:-1])], ids=ids)
@pytest.mark.parametrize('device', DEVICES)
def test_opcheck(device, case, act, save):
    tensors, activations, options = operator_inputs(case, device, act=act)
    tests = {} if save else {'test_utils': ('test_schema', 'test_faketensor')}  # gains have no gradients without it
    torch.library.opcheck(two_step_conv2d, (*tensors, *activations, save, *options), **tests)
    tensors = [None if t is None else t.detach() for t in tensors]
    y, *parts = two_step_conv2d(*tensors, *activations, save, *options)
    torch.library.opcheck(two_step_conv2d_backward, (
        torch.randn_like(y), *parts, *tensors, *activations, *options), **tests)


def recorded(monkeypatch):
    """The launches from now on, each with its tensors; none of them runs."""
    found = []
    monkeypatch.setattr(triton_support, 'launch', lambda this, *tensors: found.append((this, tensors)))
    return found


def run_operator(tensors, activations, options, save=True):
    """Forward and backward, the code of the operators itself."""
    y, *parts = two_step_conv2d._init_fn(*tensors, *activations, save, *options)
    return two_step_conv2d_backward._init_fn(torch.empty_like(y), *parts, *tensors, *activations, *options)


@pytest.mark.parametrize('name', ['everything', 'depthwise', 'groups2', 'offset', 'offset_depthwise'])
def test_no_copy_of_a_channels_last_map(name, monkeypatch):
    (x, *rest), activations, options = operator_inputs(CASE[name], 'cpu')
    x = x.detach().contiguous(memory_format=torch.channels_last)
    rest = [None if t is None else t.detach() for t in rest]
    launches = recorded(monkeypatch)
    grads = run_operator([x, *rest], activations, options)
    sampling = [tensors for this, tensors in launches if this.kernel.fn.__name__ in (
        'columns', 'scatter_columns', 'forward', 'backward')]
    assert len(sampling) >= 2
    assert all(any(t is not None and t.data_ptr() == x.data_ptr() for t in tensors) for tensors in sampling)
    assert grads[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('case, act', OPERATOR, ids=ids)
@pytest.mark.parametrize('fixed', [False, True], ids=['', 'deterministic'])
def test_nothing_is_copied_to_the_device(case, act, fixed, monkeypatch):
    """So that a CUDA graph can hold all of it; on a GPU test_cuda_graph tries."""
    launches = recorded(monkeypatch)
    tensors, activations, options = operator_inputs(case, 'cpu', torch.float16, act=act)
    shapes = [None if t is None else (t.shape, t.dtype) for t in tensors]
    with no_copies():
        torch.use_deterministic_algorithms(fixed)
        try:
            run_operator([None if s is None else torch.empty(s[0], dtype=s[1], device='cuda') for s in shapes],
                         activations, options)
        finally:
            torch.use_deterministic_algorithms(False)
    assert launches or case.x[0] == 0


class WideElements(TorchDispatchMode):
    """Elements of the largest float32 tensor that an operator returns."""
    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
                self.most = max(self.most, t.numel())
        return out


@pytest.mark.parametrize('workspace', [2 ** 28, 1], ids=['', 'tiles'])
@pytest.mark.parametrize('groups', [1, 2])
def test_gradient_of_the_kernel_is_rounded_once(groups, workspace, monkeypatch):
    """The library leaves its product in float32 on a GPU, and reads the columns as they are."""
    monkeypatch.setattr(settings, 'workspace_bytes', lambda: workspace)
    launches = recorded(monkeypatch)
    case = OpCase('wide', (2, 32 * groups, 12, 12), 32 * groups, groups=groups)
    tensors, activations, options = operator_inputs(case, 'cpu', torch.float16)
    with no_copies(), WideElements() as wide:
        run_operator([None if t is None else torch.empty(t.shape, dtype=t.dtype, device='cuda') for t in tensors],
                     activations, options)
    (rest, mean, weight), = [tensors for this, tensors in launches if this.kernel.fn.__name__ == 'unpack']
    assert (rest.dtype, mean.dtype, weight.dtype) == (torch.float32, torch.float32, torch.float16)
    assert rest.numel() == weight.numel() == 9 * mean.numel()
    assert wide.most < tensors[0].numel() * 9  # the columns


def test_copies_to_the_device_are_seen():
    def fails(f):
        with no_copies():
            x = torch.empty(3, device='cuda')
            with pytest.raises((AssertionError, RuntimeError)):
                f(x)

    fails(lambda x: torch.tensor([1, 2], device='cuda'))
    fails(lambda x: x.new_tensor([1., 2.]))
    fails(lambda x: torch.ones(3).to(x.device))
    fails(lambda x: x.copy_(torch.ones(3)))
    fails(lambda x: x[torch.tensor([0, 1])])
    fails(lambda x: x.sum().item())


# networks


# relative, of the logits and of all gradients; on a GPU the convolutions around differ too, with the random weights
NETWORK = {'cpu': 1e-5, 'cuda': 1e-3}


def step(model, x, dtype=None, whole=False):
    """Logits and gradients of a step. Under autocast if there is a dtype, the backward pass too if whole."""
    autocast = torch.autocast(x.device.type, dtype, enabled=dtype is not None)
    with autocast:
        y = model.train()(x)
        if whole:
            grads = torch.autograd.grad(y.float().square().sum(), list(model.parameters()))
    if not whole:
        grads = torch.autograd.grad(y.float().square().sum(), list(model.parameters()))
    return y, torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize('name, device', [
    sweep('test_resnet_fadc', 'cpu'), sweep('test_convnext_fadc', 'cpu'),
    *(pytest.param(name, 'cuda', marks=pytest.mark.gpu) for name in ('test_resnet_fadc', 'test_convnext_fadc'))])
def test_network(name, device):
    """Operator and FreqSelect of a whole network, in a training step, against the CPU's default."""
    model = timm.create_model(name, num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    expected = step(copy.deepcopy(model), x)
    with set_backend('triton'):
        actual = step(model.to(device), x.to(device))
    for a, b in zip(actual, expected):
        assert cases.error(a.detach(), b.detach().double()) < NETWORK[device]


@pytest.mark.parametrize('name, device, dtype', [
    sweep('test_resnet_fadc', 'cpu', torch.bfloat16), sweep('test_convnext_fadc', 'cpu', torch.bfloat16),
    *(pytest.param(name, 'cuda', dtype, marks=pytest.mark.gpu) for name in ('test_resnet_fadc', 'test_convnext_fadc')
      for dtype in (torch.float16, torch.bfloat16))], ids=ids)
@pytest.mark.parametrize('whole', [False, True], ids=['forward', 'all'])
def test_network_under_autocast(name, device, dtype, whole):
    """No farther from the exact step than twice the default backend is, which has the same autocast around."""
    model = timm.create_model(name, num_classes=10).to(device)
    x = torch.randn(2, 3, 32, 32, device=device)
    exact = step(copy.deepcopy(model).double(), x.double())
    default = step(copy.deepcopy(model), x, dtype, whole)
    with set_backend('triton'):
        actual = step(model, x, dtype, whole)
    for a, d, e in zip(actual, default, exact):
        assert cases.error(a.detach(), e.detach().cpu()) < 2 * cases.error(d.detach(), e.detach().cpu())


# CUDA graphs


def capture(run):
    """A graph of run, whose kernels are compiled before, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


@pytest.mark.gpu
@pytest.mark.parametrize('warm', [True, False], ids=['warm', 'cold'])
@pytest.mark.parametrize('name', ['everything', 'depthwise', 'groups2', 'offset', 'offset_depthwise'])
def test_cuda_graph(name, warm):
    """Forward and backward can be captured: nothing waits for the device, and nothing is chosen by values."""
    case = CASE[name]
    inputs = cases.make_inputs(case, torch.float32, device='cuda')
    expected = cases.results(case, inputs, 'triton')

    def run():
        if not warm and torch.cuda.is_current_stream_capturing():
            forget_launches()
        return cases.results(case, inputs, 'triton')

    graph, captured = capture(run)
    graph.replay()
    torch.cuda.synchronize()
    for n, t in captured.items():
        assert cases.error(t, expected[n].cpu().double()) <= cases.tolerance(n, torch.float32), n


@pytest.mark.gpu
@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
@pytest.mark.parametrize('warm', [True, False], ids=['warm', 'cold'])
@pytest.mark.parametrize('name', ['test_resnet_fadc', 'test_convnext_fadc'])
def test_cuda_graph_of_a_network(name, warm, training):
    """It follows its input; and what is made while it is captured is not used outside of it."""
    from fadc_timm.ops.band_mix.triton import tables
    model = timm.create_model(name, num_classes=10).cuda().train(training)
    x = torch.randn(2, 3, 64, 64, device='cuda')

    def run():
        if not warm and torch.cuda.is_current_stream_capturing():
            forget_launches()
            tables.tables_of.kept.clear()
            tables.tables_of.captured.clear()
        if training:
            return step(model, x)
        with torch.no_grad():
            return model(x),

    graph, captured = capture(run)
    x.normal_()
    graph.replay()
    for a, e in zip(captured, run()):
        assert cases.error(a.detach(), e.detach().cpu().double()) < NETWORK['cuda']
