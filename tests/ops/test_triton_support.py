"""Whether there is a Triton to be used: what is said where there is none, and what runs in its place."""
import re
import sys
import warnings
from contextlib import contextmanager
from inspect import getsource, signature
from types import SimpleNamespace

import pytest
import torch

from fadc_timm import FADConv2d
from fadc_timm.ops import adaptive_dilated_conv2d, mix_bands, triton_support
from fadc_timm.ops.band_mix.functional import choose_backend as choose_bands
from fadc_timm.ops.sampled_conv import takes_predictions
from fadc_timm.ops.sampled_conv.arguments import NO_GAINS, ConvArgs
from fadc_timm.ops.sampled_conv.backends import choose_backend
from fadc_timm.ops.triton_support import Launch
from tests.support.no_copies import no_copies
from tests.support.processes import python

triton = pytest.importorskip('triton')

pytestmark = pytest.mark.usefixtures('one_thread', 'fresh')


@pytest.fixture
def fresh():
    """The answers, forgotten before and after."""
    def forget():
        for answer in (triton_support.unavailable, triton_support._why_not_on_cuda, triton_support._is_default_on_cuda):
            answer.cache_clear()

    forget()
    yield
    forget()


class BrokenTriton:
    """An import of Triton that raises."""

    def find_spec(self, name, path=None, target=None):
        if name == 'triton':
            raise OSError('libtriton.so: no such symbol')


def missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)


def broken(monkeypatch):
    monkeypatch.delitem(sys.modules, 'triton')
    monkeypatch.setattr(sys, 'meta_path', [BrokenTriton(), *sys.meta_path])


def old(monkeypatch):
    monkeypatch.setattr(triton, '__version__', '3.4.1')


def fails(monkeypatch):
    """On a machine with a GPU on which no kernel can be compiled."""
    def launch(*args):
        raise RuntimeError('ptxas: unsupported architecture')

    monkeypatch.setattr(triton_support, 'launch', launch)
    pretend_gpu(monkeypatch)


def pretend_gpu(monkeypatch):
    """Where the probe can put its tensor, and nothing else."""
    empty = torch.empty

    def empty_somewhere(*args, device=None, **kwargs):
        is_gpu = device is not None and torch.device(device).type == 'cuda'
        return empty(*args, device='cpu' if is_gpu else device, **kwargs)

    monkeypatch.setattr(torch, 'empty', empty_somewhere)
    monkeypatch.setattr(triton_support, 'is_interpreted', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a GPU of 2031')


REASONS = {
    missing: 'Triton is not installed (import of triton halted',
    broken: 'Triton cannot be imported (OSError: libtriton.so: no such symbol)',
    old: 'Triton 3.4.1 is too old, it must be 3.5 or newer',
    fails: 'Triton cannot run a kernel on a GPU of 2031 (RuntimeError: ptxas: unsupported architecture)',
}


def conv_args(groups=1):
    x = torch.zeros(1, 4, 5, 5, device='cuda')
    weight, dilation = x.new_ones(4, 4 // groups, 3, 3), x.new_ones(1, 1, 5, 5)
    return ConvArgs(x, weight, dilation, None, None, NO_GAINS, (1, 1), (1, 1), groups)


@pytest.mark.parametrize('breaks', REASONS)
def test_another_backend_is_the_default(breaks, monkeypatch):
    """With one warning, which names the reason, whatever asks and however often."""
    breaks(monkeypatch)
    with no_copies(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(2):
            assert choose_backend(conv_args()) == 'torchvision' and choose_backend(conv_args(groups=4)) == 'gather'
            assert choose_bands(conv_args().x) == 'fused'
            assert not takes_predictions(conv_args().x, None)
    said = [str(w.message) for w in caught if 'torchvision' in str(w.message)]
    assert len(said) == 1 and said[0].startswith(REASONS[breaks])
    assert said[0].endswith(
        ": on CUDA a slower backend runs in place of 'triton', 'torchvision' or for depthwise kernels 'gather'.")


@pytest.mark.parametrize('breaks', REASONS)
def test_named_backend_says_why_it_cannot_run(breaks, monkeypatch):
    breaks(monkeypatch)
    with no_copies():
        args = conv_args()
        with pytest.raises(NotImplementedError) as raised:
            adaptive_dilated_conv2d(args.x, args.weight, args.steps, backend='triton')
        assert f"The backend 'triton' cannot run this call: {REASONS[breaks]}" in str(raised.value)
        with pytest.raises(NotImplementedError) as raised:
            mix_bands(args.x, args.x.narrow(1, 0, 3).unsqueeze(2), [2, 4, 8], 'triton')
        assert f"backend='triton' cannot mix these bands: {REASONS[breaks]}" in str(raised.value)
        assert not takes_predictions(args.x, 'triton')


@pytest.mark.parametrize('breaks', [missing, broken, old])
def test_a_cpu_needs_no_triton(breaks, monkeypatch):
    breaks(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert FADConv2d(4, 4, 3, padding=1)(torch.randn(1, 4, 5, 5)).shape == (1, 4, 5, 5)
        with pytest.raises(NotImplementedError, match="'triton' cannot "):
            FADConv2d(4, 4, 3, backend='triton')(torch.randn(1, 4, 5, 5))


def test_default_where_it_runs():
    with no_copies():
        assert choose_backend(conv_args()) == choose_backend(conv_args(groups=4)) == 'triton'
        x = conv_args().x
        assert takes_predictions(x, None) and takes_predictions(x, 'triton') and not takes_predictions(x, 'gather')
        assert not takes_predictions(torch.ones(1, 4, 5, 5), None) and not takes_predictions(x.int(), 'triton')


def test_the_probe_runs_once(monkeypatch):
    """On a tensor that there is, even if the first call is one on fake tensors."""
    launched = []
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(triton_support, 'launch', lambda this, *tensors: launched.extend(tensors))
    with no_copies():
        assert all(triton_support.why_not_on('cuda') is None for _ in range(3))
    assert list(map(type, launched)) == [torch.Tensor]


def test_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_support, 'is_interpreted', lambda: False)
    assert triton_support.why_not_on('cpu').startswith('Triton does not run on cpu without TRITON_INTERPRET=1')
    assert triton_support.why_not_on('mps') == 'Triton does not run on mps'
    with pytest.raises(NotImplementedError, match='does not run on cpu.*TRITON_INTERPRET=1'):
        mix_bands(torch.randn(1, 2, 5, 5), torch.rand(1, 3, 1, 5, 5), [2, 4, 8], 'triton')


class Kernel:
    """What `triton.jit` makes, as far as a launch goes."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.calls.append((grid, args, options))
            return self if options else None
        return run


def test_launch_asks_triton_once(monkeypatch):
    """For the dtypes and alignments of the tensors; what was compiled takes the same arguments, tensors by address."""
    monkeypatch.setattr(triton_support, 'is_interpreted', lambda: False)
    monkeypatch.setattr(triton_support, 'current_device', lambda: -1)  # the number of a CPU
    monkeypatch.setattr(triton_support, 'current_stream', lambda device: 0)
    kernel = Kernel()
    this = Launch(kernel, (5, 2), (3, 0.5), (True, 16), num_warps=2)
    x = torch.zeros(16)
    for t in (x, x, x.double(), None, x[1:], x[4:]):
        triton_support.launch(this, x, t)
    compiled = [bool(options) for _, _, options in kernel.calls]
    assert compiled == [True, False, True, True, True, False] and len(this.kept) == 4
    for grid, args, options in kernel.calls:
        assert grid == (5, 2, 1) and args[2:] == (3, 0.5, True, 16)
        assert options in ({}, {'num_warps': 2, 'num_stages': 1})
        assert args[0] is x if options else args[0] == x.data_ptr()


def test_launch_on_the_device_of_the_tensors(monkeypatch):
    """Whatever the current device, which is the same again afterwards."""
    current = [1]
    monkeypatch.setattr(triton_support, 'is_interpreted', lambda: False)
    monkeypatch.setattr(triton_support, 'current_device', lambda: current[-1])
    seen = []

    @contextmanager
    def device(wanted):
        current.append(-1 if wanted == torch.device('cpu') else None)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, 'device', device)
    monkeypatch.setattr(triton_support, 'current_stream', lambda device: 0)
    kernel = Kernel()
    this = Launch(kernel, (1,), (), ())
    for _ in range(2):
        triton_support.launch(this, torch.zeros(16))
        seen.append(list(this.kept))
    assert current == [1] and len(kernel.calls) == 2
    assert seen[-1] == [(torch.float32, -1, 0)]


class CompiledKernel(Kernel):
    """With a launcher, as Triton 3.5 to 3.8 have it: what it is called with is kept in `runs`."""
    function, packed_metadata = 'function', 'metadata'

    def __init__(self):
        super().__init__()
        self.runs = []

    def run(self, *args):
        self.runs.append(args)


def test_launch_again_calls_the_launcher(monkeypatch):
    """On the stream that is current then; but Triton is asked if a launch hook is set."""
    monkeypatch.setattr(triton_support, 'is_interpreted', lambda: False)
    monkeypatch.setattr(triton_support, 'current_device', lambda: -1)
    streams = iter((7, 8, 0, 0, 0, 0, 9))
    monkeypatch.setattr(triton_support, 'current_stream', lambda device: next(streams))
    kernel, x = CompiledKernel(), torch.zeros(16)
    this = Launch(kernel, (5, 2), (3, 0.5), (True, 16))
    for _ in range(3):
        triton_support.launch(this, x, None)
    assert len(kernel.calls) == 1
    assert kernel.runs == [
        (5, 2, 1, stream, 'function', 'metadata', None, None, None, x.data_ptr(), None, 3, 0.5, True, 16)
        for stream in (7, 8)]
    for name in ('launch_enter_hook', 'launch_exit_hook'):
        chain = triton.knobs.HookChain()
        chain.add(print)
        for hook in (print, chain):
            with monkeypatch.context() as patch:
                patch.setattr(triton.knobs.runtime, name, hook)
                triton_support.launch(this, x, None)
    assert len(kernel.calls) == 5 and kernel.calls[-1] == ((5, 2, 1), (x.data_ptr(), None, 3, 0.5, True, 16), {})
    monkeypatch.setattr(triton.knobs.runtime, 'launch_enter_hook', None)
    triton_support.launch(this, x, None)
    assert len(kernel.calls) == 5 and kernel.runs[-1][3] == 9


class Launcher:
    """As Triton's launchers do, it passes arguments on to a function that is in C there."""
    global_scratch_size = profile_scratch_size = 0

    def __init__(self, nested=False):
        self.nested, self.calls = nested, []
        self.launch = lambda *args: self.calls.append(args)

    def __call__(self, x, y, z, stream, function, metadata, *args):
        start = x, y, z, stream, function, False, metadata, *args[:3]
        self.launch(*start, *([args[3:]] if self.nested else args[3:]))


class AllocatingLauncher(Launcher):
    global_scratch_size = 128


class CheckingLauncher(Launcher):
    def __call__(self, x, y, z, stream, *args):
        super().__call__(x, y, z, stream + 0, *args)


@pytest.mark.parametrize('launcher, called', [
    (Launcher(), 0), (Launcher(nested=True), 0), (AllocatingLauncher(), 1), (CheckingLauncher(), 1)],
    ids=['flat', 'nested', 'allocates', 'checks'])
def test_launch_again_calls_what_the_launcher_calls(launcher, called, monkeypatch):
    """If it is known what that is, the launcher itself is called no more."""
    compiled, calls = CompiledKernel(), []
    compiled.run = launcher
    this = Launch(compiled, (5, 2), (3, 0.5), (True, 16))
    relaunch = triton_support._relaunch(this, compiled, 2)
    run = type(launcher).__call__
    run(launcher, 5, 2, 1, 7, 'function', 'metadata', None, None, None, 64, None, 3, 0.5, True, 16)
    monkeypatch.setattr(
        type(launcher), '__call__', lambda self, *args: (calls.append(args), run(self, *args)), raising=True)
    relaunch.at_once(7, 64, None)
    assert len(calls) == called and launcher.calls[0] == launcher.calls[1]


def test_launchers_of_triton(monkeypatch):
    """The launcher of the version of Triton that is installed, with a function in Python."""
    launcher = object.__new__(triton.backends.nvidia.driver.CudaLauncher)
    calls = []
    names = 'global_scratch_size', 'global_scratch_align', 'profile_scratch_size', 'profile_scratch_align'
    vars(launcher).update(
        dict.fromkeys(names, 0), launch=lambda *args: calls.append(args), launch_cooperative_grid=False,
        launch_pdl=True, num_ctas=1, arg_annotations=('a', 'b'), kernel_signature=b'ab', gsan_enabled=False)
    monkeypatch.setattr(triton.runtime, 'driver', SimpleNamespace(active=None))
    compiled = CompiledKernel()
    compiled.run = launcher
    relaunch = triton_support._relaunch(Launch(compiled, (5,), (3,), (True,)), compiled, 2)
    launcher(5, 1, 1, 7, 'function', 'metadata', None, None, None, 64, None, 3, True)
    monkeypatch.setattr(type(launcher), '__call__', lambda *args: 1 / 0)
    relaunch.at_once(7, 64, None)
    assert len(calls) == 2 and calls[0] == calls[1]


def test_compiled_kernels_have_what_a_launch_takes():
    """What `_relaunch` reads, in the version of Triton that is installed."""
    compiled = triton.compiler.CompiledKernel
    assert isinstance(compiled.run, property)
    parameters = list(signature(triton.backends.nvidia.driver.CudaLauncher.__call__).parameters)
    assert parameters[:6] == ['self', 'gridX', 'gridY', 'gridZ', 'stream', 'function']
    called = getsource(compiled.__getitem__)
    assert re.sub(r'\s+', ' ', called).count(
        'self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata, '
        'knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *args)') == 1


@pytest.mark.parametrize('n, low, high, expected', [
    (1, 1, 64, 1), (5, 1, 64, 8), (8, 1, 64, 8), (3, 16, 64, 16), (100, 1, 64, 64)])
def test_block(n, low, high, expected):
    assert triton_support.block(n, low, high) == expected


def test_import_leaves_triton_alone():
    """And everything but its backend runs where there is none."""
    out = python('''
import sys
sys.modules['triton'] = None
import torch
from fadc_timm.ops import mix_bands
print([n for n in sys.modules if n.startswith('fadc_timm') and ('kernels' in n or n.endswith('_math'))])
x, weights = torch.randn(1, 2, 5, 5), torch.rand(1, 3, 1, 5, 5)
mix_bands(x, weights, [2, 4, 8])
try:
    mix_bands(x, weights, [2, 4, 8], 'triton')
except NotImplementedError as e:
    print(e)
''')
    assert out.splitlines()[0] == '[]'
    assert "backend='triton' cannot mix these bands: Triton is not installed" in out
