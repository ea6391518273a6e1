"""What is Triton's own: launches, addresses, registration, and what it says where it cannot run.

Its results are tested with those of the other backends, in ops/sampled_conv/test_backends.py.
"""
import copy
import sys

import pytest
import timm
import torch

from tests.support import cases
from tests.support.cases import CASES, GAINS, OpCase
from tests.support.processes import python

pytest.importorskip('triton')

import triton
import triton.language as tl

from fadc_timm.ops import adaptive_dilated_conv2d, set_backend, triton_support
from fadc_timm.ops.sampled_conv.triton import launch
from fadc_timm.ops.sampled_conv.triton.call import Call
from fadc_timm.ops.sampled_conv.triton.sampling import offset

pytestmark = pytest.mark.usefixtures('one_thread')

CASE = {case.name: case for case in CASES}
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def skip_unless_runs(request):
    """On a machine with a GPU kernels are not interpreted, and run there alone."""
    if 'device' in request.fixturenames:
        reason = triton_support.why_not_on(request.getfixturevalue('device'))
        if reason:
            pytest.skip(reason)


@pytest.fixture
def fresh():
    """The answers to whether there is a Triton, forgotten before and after."""
    triton_support.unavailable.cache_clear()
    yield
    triton_support.unavailable.cache_clear()


def errors(case, device, dtype=torch.float32):
    inputs = cases.make_inputs(case, dtype, device=device)
    actual, expected = cases.results(case, inputs, 'triton'), cases.oracle(case, dtype)
    return {name: cases.error(t, expected[name]) / cases.tolerance(name, dtype) for name, t in actual.items()}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('positions', [16, 256])
@pytest.mark.parametrize('case', [
    OpCase('blocks', (3, 4, 5, 4), 6, dilation_groups=2), OpCase('blocks_stride2', (2, 4, 7, 6), 6, stride=(2, 2)),
    OpCase('blocks_depthwise', (3, 4, 5, 4), 4, groups=4)], ids=lambda case: case.name)
def test_blocks_of_positions(case, positions, device, monkeypatch):
    """Blocks that end within samples and that hold several."""
    monkeypatch.setattr(launch, '_BLOCK_P', dict.fromkeys(launch._BLOCK_P, positions))
    assert max(errors(case, device).values()) <= 1


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case', [
    OpCase('wide', (1, 40, 5, 6), 70),  # several blocks of channels on either side
    OpCase('wide_groups', (1, 72, 4, 5), 36, groups=2, dilation_groups=4),  # groups that share no boundary
    OpCase('wide_bundle', (1, 48, 4, 5), 24, groups=12, dilation_groups=3),
    OpCase('wide_depthwise', (1, 150, 4, 5), 150, groups=150, dilation_groups=3),
], ids=lambda case: case.name)
def test_blocks_of_channels(case, device):
    assert max(errors(case, device).values()) <= 1


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('programs', [1, 20_000])
def test_splits(programs, device, monkeypatch):
    """The kernel's gradient in one part, or a part for each piece of a sample."""
    case = OpCase('splits', (2, 4, 19, 17), 6)
    monkeypatch.setattr(launch, '_PROGRAMS', programs)
    assert max(errors(case, device).values()) <= 1


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', ['everything', 'depthwise'])
def test_deterministic(name, device):
    """In whole numbers the order of the additions does not matter: the same bits, and as exact as in float."""
    inputs = cases.make_inputs(CASE[name], torch.float32, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (cases.results(CASE[name], inputs, 'triton') for _ in range(2))
        largest = max(errors(CASE[name], device).values())
    finally:
        torch.use_deterministic_algorithms(False)
    assert largest <= 1 and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.filterwarnings('ignore:invalid value encountered')
@pytest.mark.parametrize('device', DEVICES)
def test_deterministic_gradients_of_zero_and_of_infinity(device):
    inputs = cases.make_inputs(CASE['plain'], torch.float32, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        y = cases.call(CASE['plain'], inputs, 'triton')
        for value in (0., float('inf')):
            grad, = torch.autograd.grad(y, inputs['x'], torch.full_like(y, value), retain_graph=True)
            assert not grad.any() if value == 0 else not grad.isfinite().any()
    finally:
        torch.use_deterministic_algorithms(False)


@triton.jit
def _offsets(b, row, col, out, stride_b, stride_h, stride_w, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, offset(tl.load(b + i), tl.load(row + i), tl.load(col + i), stride_b, stride_h, stride_w))


@pytest.mark.parametrize('device', DEVICES)
def test_offsets_beyond_int32(device):
    """Of a map of 64 samples, 2**15 by 2**14 pixels and 768 channels, 2.6e13 elements, which nobody has to allocate."""
    h, w, c = 2 ** 15, 2 ** 14, 768
    pixels = torch.tensor([[0, 0, 0], [0, h - 1, w - 1], [63, 0, 3], [63, h - 1, w - 1]], dtype=torch.int32)
    out = torch.empty(4, dtype=torch.int64, device=device)
    _offsets[1,](*(t.contiguous().to(device) for t in pixels.unbind(1)), out, h * w * c, w * c, c, 4)
    assert out.tolist() == [(b * h * w + i * w + j) * c for b, i, j in pixels.tolist()]
    assert out[-1] == 64 * h * w * c - c


def test_positions_beyond_int32():
    """A launch says how wide positions have to be; nothing is allocated on the meta device."""
    def index(b):
        x = torch.empty(b, 1, 2 ** 10, 2 ** 10, device='meta')
        call = Call(x, x, None, torch.empty(1, 1, 3, 3, device='meta'), [1, 1], [1, 1], 1)
        return call.index(64)

    assert index(2 ** 11 - 1) == tl.int32 and index(2 ** 11) == tl.int64


@pytest.mark.parametrize('case', [
    OpCase('check', (1, 2, 2, 3), 2), OpCase('check_batch0', (0, 2, 2, 3), 2),
    OpCase('check_plain', (2, 2, 2, 3), 3, use=()),
    OpCase('check_groups', (1, 4, 3, 2), 2, groups=2, dilation_groups=2, stride=(2, 1), use=('mask',)),
    OpCase('check_depthwise', (1, 2, 2, 3), 2, groups=2, use=('mask', 'bias')),
], ids=lambda case: case.name)
@pytest.mark.parametrize('device', DEVICES)
def test_opcheck(device, case):
    inputs = cases.make_inputs(case, torch.float32, device=device)
    gains = [inputs.get(gain) for gain in GAINS]
    options = [*case.stride], [case.k // 2] * 2, case.groups
    args = (inputs['x'], inputs['dilation'], inputs.get('mask'), inputs['weight'], inputs.get('bias'), *gains)
    torch.library.opcheck(torch.ops.fadc_timm.fused_conv2d, (*args, *options))
    x, dilation, mask, weight, _, *gains = (None if t is None else t.detach() for t in args)
    y = torch.ops.fadc_timm.fused_conv2d(x, dilation, mask, weight, None, *gains, *options)
    torch.library.opcheck(torch.ops.fadc_timm.fused_conv2d_backward, (
        torch.randn_like(y), x, dilation, mask, weight, *gains, True, True, *options))


# relative, of the logits and of all gradients; on a GPU the convolutions around differ too, with the random weights
NETWORK = {'cpu': 1e-5, 'cuda': 1e-3}


@pytest.mark.parametrize('name, device', [
    ('test_resnet_fadc', 'cpu'),
    pytest.param('test_convnext_fadc', 'cpu', marks=pytest.mark.sweep),
    *(pytest.param(name, 'cuda', marks=pytest.mark.gpu) for name in ('test_resnet_fadc', 'test_convnext_fadc'))])
def test_network(name, device):
    """Operator and FreqSelect of a whole network, in a training step, against the CPU's default."""
    model = timm.create_model(name, num_classes=10)
    x = torch.randn(2, 3, 32, 32)

    def step(model, x):
        y = model.train()(x)
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        return y, torch.cat([g.flatten() for g in grads])

    expected = step(copy.deepcopy(model), x)
    with set_backend('triton'), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        actual = step(model.to(device), x.to(device))
    for a, b in zip(actual, expected):
        assert cases.error(a.detach(), b.detach().double()) < NETWORK[device]


@pytest.mark.gpu
@pytest.mark.parametrize('name', ['everything', 'depthwise'])
def test_cuda_graph(name):
    """Forward and backward can be captured: nothing waits for the device, and nothing is chosen by values."""
    case = CASE[name]
    inputs = cases.make_inputs(case, torch.float32, device='cuda')
    expected = cases.results(case, inputs, 'triton')
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            cases.results(case, inputs, 'triton')
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cases.results(case, inputs, 'triton')
    graph.replay()
    torch.cuda.synchronize()
    for n, t in captured.items():
        assert cases.error(t, expected[n].cpu().double()) <= cases.tolerance(n, torch.float32), n


def test_no_copy_of_a_channels_last_map():
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    call = Call(x, torch.ones(2, 1, 5, 6), None, torch.randn(4, 8, 3, 3), [1, 1], [1, 1], 1)
    assert call.x.data_ptr() == x.data_ptr()


# where it cannot run


def run(**kwargs):
    x = torch.randn(1, 4, 5, 5)
    return adaptive_dilated_conv2d(x, torch.randn(4, 4, 3, 3), torch.ones(1, 1, 5, 5), **kwargs)


def test_no_triton(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)
    with pytest.raises(NotImplementedError, match="'triton' cannot run.*not installed"):
        run(backend='triton')
    assert run().shape == (1, 4, 5, 5)


def test_old_triton(fresh, monkeypatch):
    monkeypatch.setattr(triton, '__version__', '3.3.1')
    with pytest.raises(NotImplementedError, match=r'Triton 3\.3\.1 is too old.*3\.5'):
        run(backend='triton')


def test_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_support, 'is_interpreted', lambda: False)
    with pytest.raises(NotImplementedError, match='does not run on cpu.*TRITON_INTERPRET=1'):
        run(backend='triton')


def test_import_leaves_triton_alone():
    """And works where there is none."""
    out = python('import sys; sys.modules["triton"] = None; import fadc_timm.ops\n'
                 'folder = "fadc_timm.ops.sampled_conv.triton."\n'
                 'print(*sorted(n.removeprefix(folder) for n in sys.modules if n.startswith(folder)))\n'
                 'print("fadc_timm.ops.band_mix.triton.kernels" in sys.modules)')
    assert out.split() == ['call', 'launch', 'False']


@pytest.mark.parametrize('only', [
    'no mask', 'one pixel', pytest.param('', marks=pytest.mark.sweep)], ids=['no mask', 'one pixel', 'all'])
def test_kernels_compile_for_a_gpu(only):
    """The interpreter takes programs that the compiler does not; without a GPU they can still be compiled for one."""
    out = python(f'import sys; sys.argv = ["", "--variants", "--only", {only!r}]\n'
                 'from scripts.checks import inspect_kernels; inspect_kernels.main()')
    for kernel in ('dense forward', 'dense backward_samples', 'dense backward_kernel', 'depthwise forward',
                   'depthwise backward'):
        assert f', {kernel}, ' in out
