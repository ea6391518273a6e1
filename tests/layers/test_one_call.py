"""A layer in one call, as Triton runs it in eager mode: the same numbers as its parts one by one."""
import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fadc_timm.layers import fad_conv, one_call
from fadc_timm.ops import runtime, set_backend, triton_support
from fadc_timm.ops.recorded import Program, Programs
from tests.support.by_address import launches_by_address
from tests.support.layer_cases import EXACT, assert_same, grads, ids, make
from tests.support.off_identity import off_identity

pytest.importorskip('triton')

pytestmark = pytest.mark.usefixtures('one_thread', 'triton_backend')

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
# Whether kernels get addresses in a replay, as they do on a GPU.
BY_ADDRESS = pytest.mark.parametrize(
    'device, by_address', [('cpu', False), ('cpu', True), pytest.param('cuda', True, marks=pytest.mark.gpu)])
CALLS = 4  # of which the last is replayed, forward and backward
DEPTHWISE = dict(groups=4, out_channels=4)


@pytest.fixture
def triton_backend(skip_unless_triton_runs):
    with set_backend('triton'):
        yield


def layer(device, dtype=torch.float64, **cfg):
    return off_identity(make(**{'padding': 1, **cfg}, dtype=dtype)).to(device)


def image(device, dtype=torch.float64, batch=2, size=(4, 3)):
    x = torch.randn(batch, 4, *size, dtype=torch.float64).to(device, dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def is_one_call(y):
    """Whether autograd sees one function behind an output."""
    return y.grad_fn.name() == '_OneCallBackward'


def by_parts(monkeypatch, run):
    """What `run` returns where the parts are called one by one."""
    with monkeypatch.context() as m:
        m.setattr(fad_conv, 'in_one_call', lambda layer, x: None)
        return run()


def both(m, x, monkeypatch, run=None):
    """Output, gradients and buffers, in one call and part by part, each of a copy of the layer."""
    run, results = run or (lambda m, x: m(x)), []

    def call(m):
        y = run(m, x)
        assert is_one_call(y) == (not results)
        wanted = [p for p in (x, *m.parameters()) if p.requires_grad]
        return [y, *grads(y, wanted), *[b.double() for b in m.buffers()]]

    results.append(call(copy.deepcopy(m)))
    results.append(by_parts(monkeypatch, lambda: call(copy.deepcopy(m))))
    return results


CASES = [
    (dict(bands=(2,)), True),
    (dict(freq_select=False, stride=2, groups=2, dilation_groups=2, kernel_decompose='low', bias=False), True),
    (dict(freq_select=False, **DEPTHWISE, ada_kern_norm='layernorm2d', dilation_groups=2), False),
    (dict(bands=(2,), kernel_decompose='none', spatial_group=2, **DEPTHWISE), False),
    (dict(freq_select=False), False),
]
FURTHER = [cfg for cfg, _ in CASES] + [
    dict(freq_select=False, kernel_decompose='high', dilation=2, padding=2, dilation_act='relu'),
    dict(freq_select=False, kernel_decompose='none', dilation_act='zero'),
    dict(), dict(lowfreq_att=True, spatial_group=4, kernel_size=5, padding=2, stride=2),
    dict(ada_kern_norm='layernorm2d', kernel_decompose='high'), dict(**DEPTHWISE, dilation_act='relu'),
]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('cfg, training', CASES + [
    pytest.param(cfg, training, marks=pytest.mark.sweep)
    for cfg in FURTHER for training in (True, False) if (cfg, training) not in CASES], ids=ids)
def test_output_gradients_and_buffers(cfg, training, device, monkeypatch):
    x = image(device)
    m = layer(device, **cfg).train(training)
    actual, expected = both(m, x, monkeypatch)
    for a, e in zip(actual, expected):
        assert_same([a], [e], EXACT)
    if not training:
        with torch.no_grad():
            assert_same((m(x),), (expected[0],), EXACT)


NORMS = {
    'affine': lambda n: nn.BatchNorm2d(n, affine=False), 'momentum': lambda n: nn.BatchNorm2d(n, momentum=0.7),
    'no_statistics': lambda n: nn.BatchNorm2d(n, track_running_stats=False), 'groups': lambda n: nn.GroupNorm(4, n),
    'plain_groups': lambda n: nn.GroupNorm(2, n, affine=False)}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', [
    'affine', 'no_statistics', 'groups', 'folded',
    *(pytest.param(name, marks=pytest.mark.sweep) for name in ('momentum', 'plain_groups'))])
def test_norms(name, device, monkeypatch):
    m = layer(device, freq_select=False)
    if name == 'folded':
        m.eval().ada_kern.reparameterize()
        m.train().requires_grad_()
    else:
        m.ada_kern.norm = NORMS[name](32).to(device, torch.float64)
    actual, expected = both(m, image(device, batch=3), monkeypatch)
    assert_same(actual, expected, EXACT)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('frozen', ['x', 'conv', 'all_but_one'])
def test_frozen(frozen, device, monkeypatch):
    """Gradients go to what needs one, and to nothing else."""
    m, x = layer(device, freq_select=False), image(device)
    if frozen == 'x':
        x = x.detach()
    elif frozen == 'conv':
        m.weight.requires_grad_(False)
        m.bias.requires_grad_(False)
    else:
        x = x.detach()
        m.requires_grad_(False)
        m.ada_kern.fc.weight.requires_grad_()
    actual, expected = both(m, x, monkeypatch)
    assert_same(actual, expected, EXACT)
    names, launch = [], triton_support.launch

    def named(this, *tensors):
        names.append(this.kernel.fn.__name__)
        launch(this, *tensors)

    monkeypatch.setattr(one_call, 'programs', Programs())  # on a GPU a replay launches by itself
    monkeypatch.setattr(triton_support, 'launch', named)
    m(x).sum().backward()
    assert all((t.grad is not None) == t.requires_grad for t in (x, *m.parameters()))
    assert ('unpack' in names) == m.weight.requires_grad  # nothing is computed for the kernel
    assert names.count('pack') == 1  # the backward pass reads what the forward pass packed


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('cfg, dtype', [
    (dict(bands=(2,)), torch.bfloat16), (dict(freq_select=False, **DEPTHWISE), torch.float16),
    pytest.param(dict(bands=(2,)), torch.float16, marks=pytest.mark.sweep),
    pytest.param(dict(freq_select=False, **DEPTHWISE), torch.bfloat16, marks=pytest.mark.sweep)], ids=ids)
def test_half_precision(cfg, dtype, device, monkeypatch):
    """Under autocast and as a half model, with the predictors' kernels in the call, as on a GPU."""
    monkeypatch.setattr(triton_support, 'is_default_on', lambda device_type: True)
    m, x = layer(device, torch.float32, **cfg), image(device, torch.float32)

    def amp(m, x):
        with torch.autocast(device, dtype):
            return m(x).float() * 1.

    def check(m, x, run):
        results = []
        for way in (lambda f: f(), lambda f: by_parts(monkeypatch, f)):
            y = way(lambda: run(m, x))
            results.append([y, *grads(y, [x, *m.parameters()])])
        for a, e, p in zip(*results, (x, x, *m.parameters())):
            assert a.dtype == e.dtype
            # the difference is where gradients of maps are rounded
            assert_same([a], [e], 8 * torch.finfo(dtype).eps), p.shape

    check(m, x, amp)
    # more samples than two: torch rounds the norm's statistics to half on a CPU, and loses the gradient of two
    check(m.to(dtype), image(device, dtype, 4), lambda m, x: m(x))


@pytest.fixture
def own_programs(monkeypatch):
    """Those of this test alone, of forward passes."""
    monkeypatch.setattr(one_call, 'programs', Programs())

    def found():
        return [p for p in one_call.programs._kept.values() if type(p) is Program]

    return found


def backward_programs(programs):
    return [p for program in programs for p in program.programs._kept.values() if type(p) is Program]


def last_of_many(m, device, monkeypatch, dtype=torch.float64, amp=None, change=None):
    """What a layer computes, forward and backward and without gradients, after some calls; and what a first call does.

    change: What is done to the layer before the last call.
    """
    def run(m, i):
        torch.manual_seed(i)
        x = image(device, dtype, size=(3, 2))
        with torch.autocast(device, amp or torch.bfloat16, enabled=amp is not None):
            y = m(x)
        found = [y, *torch.autograd.grad(
            (y.double() * (i + 1 + torch.arange(y.shape[3], device=device))).sum(),
            [p for p in (x, *m.parameters()) if p.requires_grad])]
        with torch.no_grad(), torch.autocast(device, amp or torch.bfloat16, enabled=amp is not None):
            found.append(m(x))
        return [*found, *[b.double() for b in m.buffers()]]

    for i in range(CALLS - (change is None)):
        run(m, i)
    other = copy.deepcopy(m)
    for layer in (m, other):
        if change is not None:
            change(layer)
    last = run(m, CALLS)
    with monkeypatch.context() as context:
        context.setattr(one_call, 'programs', Programs())
        return last, run(other, CALLS)


@BY_ADDRESS
@pytest.mark.parametrize('cfg, training', [
    (dict(bands=(2,), groups=2, dilation_groups=2), True),
    (dict(freq_select=False, **DEPTHWISE, ada_kern_norm='layernorm2d'), False),
    (dict(bands=(2,), kernel_decompose='low'), False),
    *(pytest.param(cfg, training, marks=pytest.mark.sweep) for cfg in FURTHER for training in (True, False))], ids=ids)
def test_replay(cfg, training, device, by_address, monkeypatch, own_programs):
    """Maps of one size again and again."""
    if device == 'cpu' and by_address:
        launches_by_address(monkeypatch)
    m = layer(device, **cfg).train(training)
    for a, e in zip(*last_of_many(m, device, monkeypatch), strict=True):
        assert_same([a], [e], EXACT)
    assert len(own_programs()) == 2 and len(backward_programs(own_programs())) == 1


@BY_ADDRESS
@pytest.mark.parametrize('cfg, dtype', [
    (dict(bands=(2,)), torch.bfloat16), (dict(freq_select=False, **DEPTHWISE), torch.float16)], ids=ids)
def test_replay_under_autocast(cfg, dtype, device, by_address, monkeypatch, own_programs):
    monkeypatch.setattr(triton_support, 'is_default_on', lambda device_type: True)
    if device == 'cpu' and by_address:
        launches_by_address(monkeypatch)
    m = layer(device, torch.float32, **cfg)
    for a, e in zip(*last_of_many(m, device, monkeypatch, torch.float32, dtype), strict=True):
        assert a.dtype == e.dtype
        if device == 'cpu':
            assert torch.equal(a, e)
        else:  # atomics add in any order
            assert_same([a], [e], 8 * torch.finfo(dtype).eps)
    assert len(own_programs()) == 2 and len(backward_programs(own_programs())) == 1


def put_a_state(m):
    """In place of a module's dictionary, and with it of those of its parameters."""
    fc = nn.Linear(4, 32, bias=False, dtype=torch.float64, device=m.weight.device)
    nn.init.constant_(fc.weight, 0.1)
    m.ada_kern.fc.__setstate__(vars(fc))


CHANGES = {
    'eps': lambda m: setattr(m.ada_kern.norm, 'eps', 0.3),
    'training': lambda m: m.train(),
    'dilation_act': lambda m: setattr(m.ada_dr, 'dilation_act', 'relu'),
    'parameter': lambda m: setattr(m.ada_dr.conv, 'bias', nn.Parameter(m.ada_dr.conv.bias.detach() + 1)),
    'data': lambda m: setattr(m.weight, 'data', m.weight.data.contiguous(memory_format=torch.channels_last)),
    'in_place': lambda m: m.ada_kern.low.weight.data.mul_(2),
    'statistics': lambda m: vars(m.ada_kern.norm)['_buffers'].update(running_mean=m.ada_kern.norm.running_mean + 1),
    'module': lambda m: setattr(m.ada_kern, 'norm', nn.GroupNorm(4, 32).to(m.weight)),
    'no_module': lambda m: setattr(m, 'ada_kern', None),
    'list': lambda m: setattr(m.ada_dr.conv, 'stride', [1, 1]),
    'state': put_a_state,
}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', CHANGES)
def test_changes_between_calls(name, device, monkeypatch):
    """A layer that was replayed sees what is set on its modules."""
    m = layer(device, freq_select=False).eval()
    for a, e in zip(*last_of_many(m, device, monkeypatch, change=CHANGES[name]), strict=True):
        assert_same([a], [e], EXACT)


@pytest.mark.parametrize('device', DEVICES)
def test_changes_before_the_backward_pass(device, monkeypatch, own_programs):
    """Of the strides of parameters, which no version counts; and of biases, whose values are not read."""
    def step(m, x, change=None):
        y = m(x)
        if change is not None:
            change()
        return [y, *grads(y, [x, *m.parameters()])]

    def change():
        m.to(memory_format=torch.channels_last)
        with torch.no_grad():
            m.ada_dr.conv.bias.add_(0.)
            m.ada_kern.low.bias.add_(0.)

    m, x = layer(device, freq_select=False), image(device)
    expected = step(m, x)
    for n in (1, CALLS):  # where the backward pass would be recorded, and where it would be replayed
        for _ in range(n):
            step(m, x)
        assert_same(step(m, x, change), expected, EXACT)
        m.to(memory_format=torch.contiguous_format)
        assert_same(step(m, x), expected, EXACT)
    assert len(backward_programs(own_programs())) == 1


@pytest.mark.parametrize('device', DEVICES)
def test_layers_are_freed(device):
    """Those too that something behind them refers back to; and copies find out for themselves what they are."""
    m, x = layer(device, freq_select=False), image(device).detach()
    with torch.no_grad():
        m(x)
        shallow, deep = copy.copy(m), copy.deepcopy(m)
        assert '_frame' in vars(m) and vars(deep)['_frame'] is None
        assert_same([shallow(x), deep(x)], [m(x), m(x)], EXACT)
    m.register_forward_hook(lambda *_, m=m: m)
    gone = weakref.ref(m)
    del m, shallow
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize('device', DEVICES)
def test_results_of_replays_stay(device, monkeypatch, own_programs):
    """Calls that are open at once, of a layer and of another of its kind; and two backward passes of one call."""
    m, other = layer(device, freq_select=False).train(), layer(device, freq_select=False).train()
    for _ in range(CALLS):
        m(image(device)).sum().backward()
    steps = [(module, image(device)) for module in (m, other, m)]
    copies = copy.deepcopy(m), copy.deepcopy(other)
    expected = []
    for module, (_, x) in zip((*copies, copies[0]), steps):
        y = by_parts(monkeypatch, partial(module, x))
        expected.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    outputs = [module(x) for module, x in steps]
    assert all(is_one_call(y) and y.grad_fn.program is not None for y in outputs)
    for _ in range(2):
        for (module, x), y, e in zip(steps, outputs, expected):
            of_inputs = torch.autograd.grad(y.sum(), [x, *module.parameters()], retain_graph=True)
            assert_same([y, *of_inputs], e, EXACT)


@pytest.mark.parametrize('device', DEVICES)
def test_results_of_replays_are_ordinary(device, own_programs):
    """They can be changed in place, and views of them, which is counted; with gradients and without."""
    m, x = layer(device, freq_select=False), image(device)
    expected = [m(x).relu(), *grads(m(x).relu(), [x, *m.parameters()])]
    for _ in range(CALLS):
        m(x).sum().backward()
    y = m(x)
    assert y.grad_fn.program is not None and y._version == 0
    y[:, :, 1:].add_(1.).sub_(1.)
    y.relu_()
    assert y._version == 3
    assert_same([y, *grads(y, [x, *m.parameters()])], expected, EXACT)
    with torch.no_grad():
        for _ in range(CALLS):
            y = m(x)
        assert len(own_programs()) == 2 and not y.is_inference() and y.relu_()._version == 1
    assert_same([y], expected[:1], EXACT)


@pytest.mark.parametrize('device', DEVICES)
def test_what_is_not_replayed(device, monkeypatch, own_programs):
    """Maps that start anywhere, and calls under deterministic algorithms: the same results."""
    m = layer(device, freq_select=False)
    x = image(device)
    expected = by_parts(monkeypatch, lambda: m(x))
    for _ in range(CALLS):
        y = m(x)
    assert y.grad_fn.program is not None
    memory = torch.zeros(x.numel() + 1, dtype=torch.float64, device=device)
    shifted = memory[1:].as_strided(x.shape, x.stride(), 1).copy_(x.detach()).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        z = m(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert z.grad_fn.program is None
    assert_same([z], [expected], EXACT)
    z = m(shifted)
    assert z.grad_fn.program is None
    assert_same([z], [expected], EXACT)


@pytest.mark.parametrize('device', DEVICES)
def test_two_calls_before_the_backward_pass(device):
    """Between them the running statistics change; and what was saved is there for a second backward pass."""
    m, x = layer(device, freq_select=False).train(), image(device)
    first, second = m(x), m(2 * x.detach())
    assert is_one_call(first) and m.ada_kern.norm.num_batches_tracked == 2
    a, b = (torch.autograd.grad(y.sum(), m.weight, retain_graph=True)[0] for y in (first, second))
    again = torch.autograd.grad(first.sum(), m.weight)[0]
    assert torch.equal(a, again) and not torch.equal(a, b)
    with pytest.raises(NotImplementedError, match='has no second derivatives'):
        torch.autograd.grad(second.sum(), m.weight, create_graph=True)


@pytest.mark.parametrize('device', DEVICES)
def test_statistics_that_change_before_the_backward_pass(device):
    """As elsewhere in torch, it is refused where it reads running statistics that another call updated since."""
    m, x = layer(device, freq_select=False), image(device)
    for _ in range(CALLS):  # until calls are replayed
        y = m.eval()(x)
        m.train()(x)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            y.sum().backward()


@pytest.mark.parametrize('device', DEVICES)
def test_checkpoint_and_saved_tensors(device, monkeypatch):
    m, x = layer(device, freq_select=False, ada_kern_norm='layernorm2d'), image(device)
    monkeypatch.setattr(one_call, 'programs', Programs())  # each of the next calls is in another state of its program
    expected = m(x)
    expected = [expected, *grads(expected, [x, *m.parameters()])]
    for reentrant in (False, True):
        y = checkpoint(m, x, use_reentrant=reentrant)
        y.sum().backward() if reentrant else None
        if not reentrant:
            assert_same([y, *grads(y, [x, *m.parameters()])], expected, EXACT)
    with torch.autograd.graph.save_on_cpu():
        y = m(x)
    assert is_one_call(y)
    assert_same([y, *grads(y, [x, *m.parameters()])], expected, EXACT)


@pytest.mark.parametrize('device', DEVICES)
def test_layout(device):
    m, x = layer(device, freq_select=False), image(device)
    y = m(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    z = m(x.detach().contiguous().requires_grad_())
    assert z.is_contiguous()
    assert_same([z], [y], EXACT)
    y.relu_().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', ['x', 'weight', 'grad'])
@pytest.mark.parametrize('replayed', [False, True])
def test_negated_views(replayed, name, device, monkeypatch):
    """Which torch reads with the other sign: in one call, and part by part."""
    def results(sign):
        tensors = dict(x=x.detach(), weight=m.weight.detach(), grad=torch.ones_like(y))
        if name in tensors:
            tensors[name] = sign(tensors[name])
        wanted = [tensors['x'].requires_grad_(), tensors['weight'].requires_grad_()]
        out = torch.func.functional_call(m, dict(weight=wanted[1]), (wanted[0],))
        return [out, *torch.autograd.grad(out, wanted, tensors['grad'])]

    m, x = layer(device, freq_select=False), image(device)
    for _ in range(CALLS if replayed else 1):
        y = m(x)
        y.sum().backward()
    expected = results(torch.neg)
    assert_same(results(torch._neg_view), expected, EXACT)
    assert_same(by_parts(monkeypatch, lambda: results(torch._neg_view)), expected, EXACT)


def put_a_hook(module):
    return module.register_forward_pre_hook(lambda *_: None).remove


def put_a_forward(module):
    module.forward = type(module).forward.__get__(module)
    return lambda: module.__dict__.pop('forward')


def put_a_class(module):
    kept, module.__class__ = type(module), type('Other', (type(module),), {})
    return lambda: setattr(module, '__class__', kept)


def put_a_parametrization(module):
    if 'weight' not in module._parameters:
        return None
    nn.utils.parametrize.register_parametrization(module, 'weight', nn.Identity())
    return lambda: nn.utils.parametrize.remove_parametrizations(module, 'weight')


def put_a_tensor(module):
    """In place of a parameter, as wrappers that hold the parameters of many modules in one do."""
    kept = module._parameters.pop('weight', None)
    if kept is None:
        return None
    module.weight = kept.detach()

    def undo():
        del module.weight
        module.register_parameter('weight', kept)

    return undo


def put_a_global_hook(_):
    return nn.modules.module.register_module_forward_pre_hook(lambda *_: None).remove


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('put', [
    put_a_hook, put_a_forward, put_a_class, put_a_parametrization, put_a_tensor, put_a_global_hook])
def test_what_is_put_on_a_module(put, device, monkeypatch):
    """The parts are called one by one, with the same results; until it is taken off."""
    m, x = layer(device, bands=(2,), **DEPTHWISE, kernel_decompose='high'), image(device, size=(2, 2))
    calls, one = [], fad_conv.in_one_call
    monkeypatch.setattr(fad_conv, 'in_one_call', lambda m, x: calls.append(one(m, x) is not None))
    monkeypatch.setattr(fad_conv, 'predicted_conv2d', lambda x, *args, **kwargs: x)  # the parts' end, not computed
    with torch.no_grad():
        m._by_kernels(x)
        assert calls == [True]
        for module in m.modules():
            if module is not m:
                undo = put(module)
                if undo is not None:
                    m._by_kernels(x)
                    assert not calls[-1], module
                    undo()
        m._by_kernels(x)
    assert calls[-1]


class Wrapped(nn.Module):
    """A module around another, as adapters are: without the other's attributes."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', [
    'freq_select.conv', 'ada_kern.fc', 'ada_kern.norm', 'ada_kern.act', 'ada_kern.low', 'ada_kern.high', 'ada_dr.conv',
    'ada_dr.mask_dw', 'ada_dr.mask_pw'])
def test_adapters_around_modules(name, device, monkeypatch):
    m, x = layer(device, bands=(2,), **DEPTHWISE), image(device, size=(2, 2)).detach()
    monkeypatch.setattr(fad_conv, 'predicted_conv2d', lambda x, *args, **kwargs: x)  # the parts' end, not computed
    assert fad_conv.in_one_call(m, x) is not None
    m.set_submodule(name, Wrapped(m.get_submodule(name)))
    assert fad_conv.in_one_call(m, x) is None
    if name != 'ada_kern.norm':  # AdaKern asks its norm for what it is
        m(x)


@pytest.mark.parametrize('device', DEVICES)
def test_what_is_rare_is_called_part_by_part(device, monkeypatch):
    """And computes what it did."""
    x = image(device)
    assert is_one_call(layer(device, freq_select=False)(x))
    for cfg in (dict(padding_mode='replicate'), dict(dilation=3)):
        assert not is_one_call(layer(device, freq_select=False, **cfg)(image(device, size=(9, 8))))
    m = layer(device, freq_select=False).train()
    assert not is_one_call(m(x[:1])) and not is_one_call(m(x[:0]))
    assert is_one_call(m.eval()(x[:1])) and not is_one_call(m(x[:0]))
    for change in (dict(momentum=None), dict(track_running_stats=False)):
        m = layer(device, freq_select=False).train()
        vars(m.ada_kern.norm).update(change)
        assert not is_one_call(m(x))
    m.ada_kern.norm = FrozenBatchNormAct2d(32).to(device, torch.float64)
    assert not is_one_call(m(x))
    m = layer(device, freq_select=False)
    m.ada_kern.norm = nn.SyncBatchNorm(32).to(device, torch.float64).eval()
    assert not is_one_call(m(x))


class Looks(TorchFunctionMode):
    """A mode that sees every function of torch, and changes none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_default_device(dtype, device, monkeypatch):
    """It changes nothing, as every tensor is made with its device; other modes have the parts called one by one."""
    monkeypatch.setattr(triton_support, 'is_default_on', lambda device_type: True)
    m, x = layer(device, dtype, bands=(2,)), image(device, dtype, size=(5, 3))

    def step():
        y = m(x)
        return is_one_call(y), [y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])]

    with torch.device('meta'):  # the first call, which makes the tables
        one, found = step()
    assert one
    assert_same(found, step()[1], EXACT if dtype == torch.float64 else 8 * torch.finfo(dtype).eps)
    torch.set_default_device('meta')
    try:
        assert is_one_call(m(x))
        with Looks():
            assert not is_one_call(m(x))
        monkeypatch.setattr(runtime, '_function_modes', None)
        assert not is_one_call(m(x))
    finally:
        torch.set_default_device(None)
    assert is_one_call(m(x))
    with Looks():
        assert not is_one_call(m(x))


@pytest.mark.parametrize('device', DEVICES)
def test_biases_that_are_not_made(device, monkeypatch):
    """A bias where the layer makes none, and none where it makes one: the parts have what modules compute."""
    def by_modules(m):
        assert not is_one_call(m(x))
        with set_backend('reference'):
            assert_same([m(x)], [by_parts(monkeypatch, lambda: m(x))], EXACT)
            return m(x)

    x = image(device)
    m = layer(device, freq_select=False, kernel_size=3, **DEPTHWISE)
    before = m(x)
    assert is_one_call(before)
    m.ada_dr.mask_dw.bias = nn.Parameter(torch.ones(4, dtype=torch.float64, device=device))
    assert_same([m(x)], [by_modules(m)], EXACT)
    assert (m(x) - before).abs().max() > 1e-3
    m = layer(device, freq_select=False)
    m.ada_kern.high.bias = None
    assert_same([m(x)], [by_modules(m)], EXACT)
    for name in ('fc', 'norm'):
        m = layer(device, freq_select=False)
        module = getattr(m.ada_kern, name)
        module.bias = nn.Parameter(torch.ones(32, dtype=torch.float64, device=device)) if name == 'fc' else None
        actual, expected = both(m, x, monkeypatch)
        assert_same(actual, expected, EXACT)
