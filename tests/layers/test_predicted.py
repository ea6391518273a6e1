"""Layers whose predictions the Triton backend activates itself: the same function as by the ordinary path."""
import copy

import pytest
import torch
from torch._dynamo import lookup_backend

from fadc_timm import FreqSelect
from fadc_timm.layers import one_call
from fadc_timm.layers.hooks import watch_layers
from fadc_timm.ops import set_backend, triton_support
from fadc_timm.ops.recorded import Programs
from tests.support.cases import error
from tests.support.layer_cases import EXACT, assert_same, grads, ids, make
from tests.support.off_identity import off_identity

pytest.importorskip('triton')

pytestmark = pytest.mark.usefixtures('one_thread', 'skip_unless_triton_runs')

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]


def sweep(cfg):
    return pytest.param(cfg, marks=pytest.mark.sweep)


DEPTHWISE = dict(groups=4, out_channels=4)
LAYERS = [
    dict(padding=1, freq_select=False),
    dict(padding=2, dilation=2, stride=2, dilation_act='relu', kernel_decompose='low', groups=2, freq_select=False),
    dict(padding=1, dilation_act='zero', kernel_decompose='high', dilation_groups=2, padding_mode='replicate',
         bias=False, freq_select=False),
    dict(padding=1, **DEPTHWISE, freq_select=False, dilation_act='zero'),
    dict(padding=2, dilation=2, stride=2, sampling='deform', groups=2, offset_groups=2, freq_select=False),
    dict(padding=1, sampling='deform', modulated=False, kernel_decompose='low', freq_select=False),
    sweep(dict(padding=1, sampling='deform', padding_mode='replicate', kernel_decompose='high')),
    sweep(dict(padding=1, sampling='deform', **DEPTHWISE)),
    sweep(dict(padding=1, lowfreq_att=True, bands=(2, 4))),
    dict(padding=1), sweep(dict()), sweep(dict(kernel_size=1, kernel_decompose='low')),
    *(sweep(dict(padding='same', dilation=2, dilation_act=act, kernel_decompose=parts, freq_select=False, **shape))
      for act in ('abs', 'relu', 'zero') for parts in ('both', 'low', 'high', 'none')
      for shape in (dict(), dict(groups=2, dilation_groups=2), DEPTHWISE)),
    sweep(dict(padding=1, padding_mode='replicate', stride=2, **DEPTHWISE)),
    sweep(dict(kernel_size=5, padding=4, dilation=2, padding_mode='replicate', stride=2, groups=4, out_channels=8)),
    sweep(dict(kernel_size=5, padding='same', dilation_act='relu', spatial_group=2)),
    sweep(dict(padding=1, dilation=3, kernel_decompose='high', bands=(2, 3))),  # crops
]


def drawn(*shape, device):
    """The same numbers on every device.

    The norm of two images is steep where their means nearly meet: with one in four draws, bfloat16 errs by more than a
    test allows.
    """
    return torch.randn(shape).to(device)


def both_ways(m, x, run=None):
    """Outputs and gradients by the backend for CPUs, and by Triton."""
    results = []
    for backend in ('gather', 'triton'):
        with set_backend(backend):
            assert (m._by_kernels(x) is None) == (backend != 'triton')
            y = (run or m)(x)
        results.append((y, *grads(y, [x, *m.parameters()])))
    return results


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('cfg', LAYERS, ids=ids)
def test_predicted_is_the_ordinary_path(cfg, device):
    m = off_identity(make(**cfg, dtype=torch.float64)).to(device)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, device=device, requires_grad=True)
    expected, actual = both_ways(m, x)
    assert_same(actual, expected, EXACT)
    with torch.no_grad(), set_backend('triton'):
        assert_same((m(x),), expected[:1], EXACT)


@pytest.mark.parametrize('device', DEVICES)
def test_layout(device):
    m = off_identity(make(padding=1, freq_select=False)).to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 6, device=device).to(memory_format=torch.channels_last).requires_grad_()
    expected, actual = both_ways(m, x)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    assert_same(actual, [t.detach().cpu().double() for t in expected], 1e-6)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('part', ['ada_dr', 'ada_kern'])
def test_hooks_are_called(part, device):
    """With what the modules put out: dilations and gains, so by the ordinary path."""
    m = off_identity(make(padding=1, freq_select=False, dtype=torch.float64)).to(device)
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, device=device)
    module, seen = getattr(m, part), []
    with set_backend('triton'):
        expected = m(x)
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
        assert m._by_kernels(x) is None
        assert_same((m(x),), (expected,), EXACT)
        handle.remove()
        assert m._by_kernels(x) is not None
        handle = module.register_forward_pre_hook(lambda *_: seen.append(None))
        assert m._by_kernels(x) is None
        handle.remove()
        handle = module.register_full_backward_hook(lambda *_: None)
        assert m._by_kernels(x) is None
        handle.remove()
        assert_same(seen[0], module(x), EXACT)
        with watch_layers(m, lambda call: seen.append(call.dilation)):
            m(x)
    assert torch.equal(seen[-1], m.ada_dr(x)[0])


def kernels_of(monkeypatch, run):
    """What `run` returns, and the names of AdaKern's kernels that it launches."""
    names, launch = [], triton_support.launch

    def counted(this, *tensors):
        if this.kernel.fn.__module__.endswith('gains.kernels'):
            names.append(this.kernel.fn.__name__)
        launch(this, *tensors)

    with monkeypatch.context() as m:
        m.setattr(one_call, 'programs', Programs())  # on a GPU a replay launches by itself
        m.setattr(triton_support, 'launch', counted)
        return run(), names


WHOLE = ['trunk', 'heads']
NORMED = ['trunk', 'norm', 'heads']  # with a BatchNorm, which is no module's call
INFERENCE = ['trunk_and_heads']


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('cfg', [
    dict(freq_select=False), dict(freq_select=False, kernel_decompose='high', ada_kern_norm='layernorm2d'),
    dict(bands=(2,)), dict(freq_select=False, **DEPTHWISE)], ids=ids)
def test_ada_kern_in_kernels(cfg, device, monkeypatch):
    """Trunk, BatchNorm and heads are a kernel each, forward and backward, and a folded norm is none."""
    m = off_identity(make(padding=1, **cfg, dtype=torch.float64)).to(device)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    for fold in (False, True):
        if fold:
            m.eval().ada_kern.reparameterize()
            m.requires_grad_()
        with set_backend('gather'):
            expected, before = kernels_of(monkeypatch, lambda: (m(x),))
        assert not before
        expected += grads(expected[0], [x, *m.parameters()])
        with set_backend('triton'):
            (y,), names = kernels_of(monkeypatch, lambda: (m(x),))
        called = NORMED if isinstance(m.ada_kern.norm, torch.nn.BatchNorm2d) else WHOLE
        assert names == called
        actual, names = kernels_of(monkeypatch, lambda: (y, *grads(y, [x, *m.parameters()])))  # noqa: B023
        assert names == [f'{name}_gradient' for name in called[::-1]]
        assert_same(actual, expected, EXACT)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('part', [*('fc', 'act'), *(pytest.param(n, marks=pytest.mark.sweep) for n in ('low', 'high'))])
def test_what_is_put_on_ada_kerns_modules(part, device, monkeypatch):
    """Hooks, a forward, a parametrization or another class: the modules run as modules, with the same results."""
    m = off_identity(make(padding=1, freq_select=False, dtype=torch.float64)).to(device).eval()
    x, seen = torch.randn(2, 4, 5, 4, dtype=torch.float64, device=device), []
    module = getattr(m.ada_kern, part)
    with set_backend('triton'), torch.no_grad():
        expected, names = kernels_of(monkeypatch, lambda: m(x))
        assert names == INFERENCE

        def runs_as_module():
            y, names = kernels_of(monkeypatch, lambda: m(x))
            assert not names
            assert_same((y,), (expected,), EXACT)

        for register in (module.register_forward_hook, module.register_forward_pre_hook,
                         module.register_full_backward_hook, torch.nn.modules.module.register_module_forward_hook):
            handle = register(lambda *args: seen.append(args[0]))
            runs_as_module()
            handle.remove()
        assert module in seen
        module.forward = type(module).forward.__get__(module)
        runs_as_module()
        del module.forward
        if part != 'act':
            torch.nn.utils.parametrize.register_parametrization(module, 'weight', torch.nn.Identity())
            runs_as_module()
            torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')
        other = type('Other', (type(module),), {})
        module.__class__, kept = other, type(module)
        runs_as_module()
        module.__class__ = kept
        assert kernels_of(monkeypatch, lambda: m(x))[1] == INFERENCE
        # hooks of the norm are called, as it is a module in any case
        handle = m.ada_kern.norm.register_forward_hook(lambda *_: seen.append('norm'))
        assert kernels_of(monkeypatch, lambda: m(x))[1] == WHOLE and seen[-1] == 'norm'
        handle.remove()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=ids)
def test_half_model(dtype, device, monkeypatch):
    """Its parameters are read as they are."""
    m = off_identity(make(padding=1, bands=(2,))).to(device, dtype)
    exact = copy.deepcopy(m).double()
    x = drawn(2, 4, 5, 4, device=device).to(dtype)
    with set_backend('gather'):
        expected = exact(x.double())
    with set_backend('triton'):
        y, names = kernels_of(monkeypatch, lambda: m(x))
    assert names == NORMED and y.dtype == dtype
    assert error(y.detach(), expected.detach().cpu()) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize('device', ['meta'])
def test_meta(device, monkeypatch):
    """Shapes alone; AdaKern's products are torch's there, which counters know."""
    m = make(padding=1).to(device)
    with set_backend('triton'):
        y, names = kernels_of(monkeypatch, lambda: m(torch.empty(2, 4, 5, 4, device=device)))
    assert y.shape == (2, 6, 5, 4) and not names


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('amp', [pytest.param(False, marks=pytest.mark.sweep), True])
def test_compile(amp, device):
    """Trunk and heads are operators of the graph, under autocast too."""
    m = off_identity(make(padding=1, bands=(2,))).to(device)
    x = drawn(2, 4, 5, 4, device=device).requires_grad_()
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target).removesuffix('.default') for node in graph.graph.nodes)
        return lookup_backend('aot_eager')(graph, inputs)

    torch.compiler.reset()
    with set_backend('triton'), torch.autocast(device, torch.bfloat16, enabled=amp):
        y, expected = torch.compile(m, fullgraph=True, backend=backend)(x), m(x)
    assert [n for n in seen if 'gains' in n] == ['fadc_timm.gains_trunk', 'fadc_timm.gains_heads']
    tolerance = 2e-2 if amp else 1e-5
    assert_same((y, *grads(y, [x, *m.parameters()])), (expected, *grads(expected, [x, *m.parameters()])), tolerance)


@pytest.mark.parametrize('device', DEVICES)
def test_parameters_of_another_dtype_take_the_ordinary_way(device):
    """Which says what is wrong, as torch does."""
    m = off_identity(make(padding=1, freq_select=False)).to(device)
    m.ada_kern.double()
    with set_backend('triton'), pytest.raises(RuntimeError, match='dtype'):
        m(torch.randn(2, 4, 5, 4, device=device))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('batch', [0, 1])
def test_small_batches(batch, device):
    m = off_identity(make(padding=1, freq_select=False, dtype=torch.float64)).to(device).train()
    x = torch.randn(batch, 4, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    expected, actual = both_ways(m, x)
    if batch:
        assert_same(actual, expected, EXACT)
    else:
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('whole', [False, True], ids=['forward', 'all'])
@pytest.mark.parametrize('cfg', [
    dict(padding=1, freq_select=False), sweep(dict(padding=1)), sweep(dict(padding=1, groups=2, dilation_act='relu')),
    sweep(dict(padding=1, **DEPTHWISE, freq_select=False))], ids=ids)
def test_autocast(cfg, whole, device):
    """Inside and outside of the block, the backward pass is that of the same step; parameters keep their dtype."""
    m = off_identity(make(**cfg)).to(device)
    x = drawn(2, 4, 5, 6, device=device).requires_grad_()
    inputs = [x, *m.parameters()]
    exact_y = m.double()(x.double())
    exact = [g.detach() for g in grads(exact_y, m.parameters())]
    m.float()
    with set_backend('triton'):
        with torch.autocast(device, torch.bfloat16):
            assert m._by_kernels(x) is not None
            y = m(x)
            if whole:
                actual = grads(y.float(), inputs)
        if not whole:
            actual = grads(y.float(), inputs)
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in actual)
    assert error(y.detach(), exact_y.detach().cpu()) < 2e-2
    assert_same(actual[1:], [g.cpu() for g in exact], 5e-2)


@pytest.mark.parametrize('device', DEVICES)
def test_autocast_begins_before_freq_select(device):
    """FreqSelect reads and returns autocast's dtype; float64 stays, as in a convolution."""
    m, seen = make(padding=1).to(device), []
    m.freq_select.register_forward_hook(lambda module, args, y: seen.append((args[0].dtype, y.dtype)))
    x = torch.randn(1, 4, 3, 4, device=device)
    with set_backend('triton'), torch.autocast(device, torch.bfloat16):
        assert m(x).dtype == torch.bfloat16
        assert m.double()(x.double()).dtype == torch.float64
    assert seen == [(torch.bfloat16,) * 2, (torch.float64,) * 2]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('cfg', [dict(), sweep(dict(lowfreq_att=True, spatial_group=2))], ids=ids)
def test_freq_select(cfg, device):
    m = off_identity(FreqSelect(4, **cfg, dtype=torch.float64)).to(device)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    inputs = [x, *m.parameters()]
    with set_backend('gather'):
        expected = m(x)
    with set_backend('triton'):
        y = m(x)
    assert_same((y, *grads(y, inputs)), (expected, *grads(expected, inputs)), EXACT)
