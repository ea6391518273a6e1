"""The layers in torch: dtypes, autocast, memory layouts, copies, compilers and threads."""
import copy
import itertools
import pickle
import threading

import pytest
import torch
from torch import nn

from fadc_timm import AdaDR, AdaKern, FADConv2d, FreeOffsets, FreqSelect, lift_model
from fadc_timm.layers import FADNeighborhoodAttention, NeighborhoodAttention
from fadc_timm.losses import high_frequency_power
from fadc_timm.ops import list_backends
from fadc_timm.ops.band_mix import functional
from tests.support.cases import DTYPES, error
from tests.support.layer_cases import AT_START, EXACT, FAD_CONV, HALF, SIZES, assert_same, grads, ids, make
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')


# each module alone, on any map in any dtype

MODULES = {
    'FreqSelect': lambda **dd: FreqSelect(4, lowfreq_att=True, **dd),
    'AdaKern': lambda **dd: AdaKern(4, 6, **dd),
    'AdaKern_depthwise': lambda **dd: AdaKern(4, 4, depthwise=True, **dd),
    'AdaDR': lambda **dd: AdaDR(4, 3, **dd),
    'AdaDR_depthwise': lambda **dd: AdaDR(4, 7, depthwise=True, **dd),
    'FreeOffsets': lambda **dd: FreeOffsets(4, 3, **dd),
    'FreeOffsets_depthwise': lambda **dd: FreeOffsets(4, 5, depthwise=True, **dd),
    'FADConv2d': lambda **dd: FADConv2d(4, 6, 3, padding=1, **dd),
    'FADConv2d_deform': lambda **dd: FADConv2d(4, 6, 3, padding=1, sampling='deform', **dd),
    'FADConv2d_depthwise': lambda **dd: FADConv2d(4, 4, 7, padding=3, groups=4, **dd),
    'FADConv2d_replicate': lambda **dd: FADConv2d(4, 6, 5, 2, 2, padding_mode='replicate', **dd),
}
# Relative error against float64 on the same rounded parameters and input; the largest of all modules and sizes.
ROUNDING = {
    torch.float32: 3e-6,  # 1.5e-6
    torch.bfloat16: 0.02,  # 0.011
    torch.float16: 3e-3,  # 1.5e-3
    torch.float64: EXACT,  # 0
}


def as_tuple(y):
    return tuple(t for t in y if t is not None) if isinstance(y, tuple) else (y,)


@pytest.mark.parametrize('dtype', DTYPES, ids=ids)
@pytest.mark.parametrize('name', MODULES)
def test_any_map(name, dtype):
    m = off_identity(MODULES[name](), 0.5).eval().to(dtype)
    exact = copy.deepcopy(m).double()
    for size, memory_format in itertools.product(SIZES, (torch.contiguous_format, torch.channels_last)):
        x = torch.randn(2, 4, *size).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        y, expected = as_tuple(m(x)), as_tuple(exact(x.double()))
        for a, e in zip(y, expected, strict=True):
            # positions are too fine for half dtypes
            fine = name.startswith(('AdaDR', 'FreeOffsets')) and a is y[0]
            assert a.dtype == (torch.float32 if dtype in HALF and fine else dtype)
            assert error(a, e) < ROUNDING[dtype], (size, memory_format)
        for g in torch.autograd.grad(sum(t.float().sum() for t in y), [x, *m.parameters()], allow_unused=True):
            assert g is None or g.isfinite().all(), (size, memory_format)


# dtypes, autocast, layouts


@pytest.mark.parametrize('dtype', HALF, ids=ids)
@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_autocast(cfg, dtype):
    m = off_identity(make(**cfg), 0.5)
    conv = nn.Conv2d(4, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.bias is not None)
    for size in ((10, 9), (40, 36)):
        x = torch.randn(4, 4, *size)
        expected = m(x)
        with torch.autocast('cpu', dtype):
            y, plain = m(x), conv(x)
        assert y.dtype == plain.dtype == dtype and y.shape == expected.shape
        # a plain convolution has 2.9e-3 in bfloat16 and 3.6e-4 in float16, and five of them follow each other here
        assert error(y, expected) < 8 * error(plain, conv(x))  # 5.3 in both
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads(y.float(), m.parameters()))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('norm', ['batchnorm2d', 'layernorm2d'])
def test_half_precision_under_autocast(norm, training):
    """A model in bfloat16 under autocast, as inference scripts run it."""
    m = off_identity(FADConv2d(4, 6, 3, padding=1, ada_kern_norm=norm)).bfloat16().train(training)
    x = torch.randn(2, 4, 8, 7, dtype=torch.bfloat16)
    expected = copy.deepcopy(m).float()(x.float())
    with torch.autocast('cpu', torch.bfloat16):
        y = m(x)
    assert y.dtype == torch.bfloat16 and error(y, expected) < 0.03
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads(y, m.parameters()))


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_layout(cfg, memory_format):
    """Layout in = layout out, and the same values."""
    m = off_identity(make(**cfg))
    x = torch.randn(2, 4, 10, 9)
    expected = m(x)
    m = m.to(memory_format=memory_format)
    y = m(x.contiguous(memory_format=memory_format))
    assert y.is_contiguous(memory_format=memory_format)
    assert error(y, expected) < 2e-6  # 1.1e-6
    x = torch.randn(9, 10, 8, 2).permute(3, 2, 1, 0)[:, ::2]  # dense in no layout
    assert error(m(x), m(x.contiguous())) < 2e-6  # 3.5e-7


@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_meta(cfg):
    m = make(**cfg, device='meta', dtype=torch.bfloat16)
    assert {t.device.type for t in m.state_dict().values()} == {'meta'}
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    x = torch.zeros(2, 4, 10, 9, device='meta', dtype=torch.bfloat16)
    real = make(**cfg)
    y = m(x)
    assert y.shape == real(torch.zeros(2, 4, 10, 9)).shape and y.dtype == torch.bfloat16
    m = m.to_empty(device='cpu')
    m.load_state_dict(real.to(torch.bfloat16).state_dict())
    x = torch.randn(2, 4, 10, 9).bfloat16()
    assert torch.equal(m.eval()(x), real.eval()(x))


# copies, formats, compilers


def test_state_dict():
    """Plain keys for the plain convolution, no buffers but those of a BatchNorm."""
    m = FADConv2d(4, 6, 3)
    assert not dict(FADConv2d(4, 6, 3, ada_kern_norm='layernorm2d').named_buffers())
    assert {n for n, _ in m.named_buffers()} == {
        f'ada_kern.norm.{n}' for n in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert set(m.state_dict()) == {n for n, _ in m.named_buffers()} | {n for n, _ in m.named_parameters()}
    assert {n.partition('.')[0] for n in m.state_dict()} == {'weight', 'bias', 'freq_select', 'ada_kern', 'ada_dr'}
    bare = FADConv2d(4, 6, 3, freq_select=False, kernel_decompose='none', sampling='fixed')
    assert set(bare.state_dict()) == {'weight', 'bias'}


@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_copies(cfg):
    m = off_identity(make(**cfg)).eval()
    x = torch.randn(2, 4, 10, 9)
    expected = m(x)
    loaded = make(**cfg).eval()
    loaded.load_state_dict(m.state_dict())
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), loaded):
        assert torch.equal(copied(x), expected)
        assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in m.parameters()}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_script(cfg, dtype):
    m = off_identity(make(**cfg, dtype=dtype)).eval()
    scripted = torch.jit.script(m)
    for shape in ((2, 4, 10, 9), (1, 4, 37, 33)):
        x = torch.randn(shape, dtype=dtype)
        # 3.7e-6 and 1.9e-15, over eight seeds
        assert error(scripted(x), m(x)) < (5e-6 if dtype == torch.float32 else EXACT)


@pytest.mark.parametrize('cfg, batch', [
    (FAD_CONV[4], 1), (FAD_CONV[9], 2), (FAD_CONV[22], 1),
    *(pytest.param(FAD_CONV[i], 2, marks=pytest.mark.sweep) for i in (6, 19))], ids=ids)
def test_compile(cfg, batch):
    """One graph, forward and backward, in training."""
    m = off_identity(make(**cfg))
    compiled = torch.compile(copy.deepcopy(m), backend='aot_eager', fullgraph=True)
    x = torch.randn(batch, 4, 10, 9, requires_grad=True)
    y, expected = compiled(x), m(x)
    assert_same(
        (y, *grads(y, [x, *compiled.parameters()])), (expected, *grads(expected, [x, *m.parameters()])), 2e-6)  # 0
    assert_same(compiled.state_dict().values(), m.state_dict().values(), 1e-6)  # 0


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:.torch.jit.trace. is deprecated')
@pytest.mark.parametrize('cfg', [
    dict(padding=1), dict(padding=1, groups=4, out_channels=4), dict(padding=1, sampling='deform'),
    dict(padding=2, dilation=2, sampling='fixed', spatial_group=2)], ids=ids)
def test_trace(cfg):
    """torch.jit.trace, as of TensorBoard's add_graph: one graph in either grad mode, which trains."""
    m = off_identity(make(**cfg)).eval()
    x = torch.randn(2, 4, 10, 9)
    graphs = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(m, x)  # which also checks
        graphs.append([(node.kind(), str(node.output().toIValue()) if node.kind() == 'prim::Constant' else None)
                       for node in traced.inlined_graph.nodes()])
        y, expected = traced(x), m(x)
        assert_same((y, *grads(y, list(m.parameters()))), (expected, *grads(expected, list(m.parameters()))), 2e-6)
    assert graphs[0] == graphs[1]


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:.torch.jit.trace. is deprecated')
@pytest.mark.parametrize('backend', [b for b in list_backends() if b != 'triton'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_trace_in_half(dtype, backend):
    """Half precisions compute with numbers that come from shapes."""
    m = off_identity(make(padding=1, backend=backend)).to(dtype).eval()
    traced = torch.jit.trace(m, torch.randn(2, 4, 10, 9, dtype=dtype))
    x = torch.randn(3, 4, 7, 8, dtype=dtype)
    assert torch.equal(traced(x), m(x))


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:.torch.jit.trace. is deprecated')
@pytest.mark.parametrize('side', [6, 12])
@pytest.mark.parametrize('cfg', [None, dict(), dict(freq_select_for='v')], ids=ids)
@torch.no_grad()
def test_trace_of_attention(cfg, side):
    """Traced on a map that is smaller than the window, or not, it takes both."""
    plain = NeighborhoodAttention(16, 4, 5, 2)
    m = (plain if cfg is None else off_identity(
        FADNeighborhoodAttention(16, 4, 5, 2, kernel_decompose='both', **cfg))).eval()
    traced = torch.jit.trace(m, torch.randn(1, side, side, 16))
    for size in ((20, 17), (6, 6), (5, 13), (12, 12)):
        x = torch.randn(2, *size, 16)
        assert_same((traced(x),), (m(x),), 1e-6)  # 0


# what people put on the submodules

@pytest.mark.parametrize('backend', [None, 'triton'])
@pytest.mark.parametrize('cfg', [dict(padding=1), dict(padding=1, groups=4, out_channels=4)], ids=ids)
def test_hooks_see_every_module(cfg, backend):
    """Global hooks, full backward hooks and a forward that is set: each module runs as a module."""
    m = off_identity(make(**cfg, backend=backend))
    x = torch.randn(2, 4, 6, 7, requires_grad=True)
    parameters = [x, *m.parameters()]
    y = m(x)
    expected = [y, *grads(y, parameters)]
    with_parameters = {c for c in m.modules() if next(c.parameters(), None) is not None}
    seen = set()

    def see(module, *args):
        seen.add(module)

    def check(handles):
        y = m(x)
        actual = [y, *grads(y, parameters)]
        for handle in handles:
            handle.remove()
        assert_same(actual, expected, 2e-6)
        assert with_parameters <= seen
        seen.clear()

    check([nn.modules.module.register_module_forward_hook(see)])
    check([c.register_full_backward_hook(see) for c in m.modules()])
    for c in with_parameters - {m}:
        c.forward = lambda *args, c=c, forward=c.forward, **kwargs: (see(c), forward(*args, **kwargs))[1]
    seen.add(m)
    check([])


def test_parametrized_predictor():
    m = off_identity(FADConv2d(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 6, 7)
    with torch.no_grad():
        m.ada_dr.conv.weight.mul_(2)
        expected = m(x)
        m.ada_dr.conv.weight.div_(2)

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(m.ada_dr.conv, 'weight', Twice())
    y = m(x)
    assert_same([y], [expected], 1e-6)
    y.sum().backward()
    assert m.ada_dr.conv.parametrizations.weight.original.grad.norm() > 0


def test_sync_batch_norm():
    m = off_identity(FADConv2d(4, 6, 3, padding=1)).eval()
    x = torch.randn(2, 4, 8, 7)
    expected = m(x)
    m = nn.SyncBatchNorm.convert_sync_batchnorm(m)
    assert isinstance(m.ada_kern.norm, nn.SyncBatchNorm)
    assert torch.equal(m(x), expected)
    assert error(m.train()(x), expected) > 1e-3  # the batch's statistics


def test_inference_mode_then_training():
    """Nothing made under inference mode, where autograd cannot follow, is kept for later."""
    m = off_identity(FADConv2d(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 40, 36)
    with torch.inference_mode():
        expected = m(x)
    y = m(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in m.parameters())
    assert torch.equal(y, expected)


def test_two_threads():
    """The same layer at once on maps of different sizes."""
    m = off_identity(FADConv2d(4, 6, 3, padding=1)).eval()
    xs = [torch.randn(1, 4, *size) for size in ((40, 36), (9, 8), (33, 70), (16, 16))]
    expected = [m(x) for x in xs]
    wrong, start = [], threading.Barrier(4)

    def work(i):
        start.wait()
        for _ in range(5):
            if not torch.equal(m(xs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# Relative error of the high part alone; where the kernel is split in its own dtype it is four times as large.
SPLIT = {torch.bfloat16: 6e-3, torch.float16: 8e-4}  # 3.1e-3, 4.0e-4


@pytest.mark.parametrize('dtype', HALF, ids=ids)
def test_split_of_the_kernel_in_half(dtype):
    """Without AdaDR too, the kernel is split in float32: its rest is small beside its mean here."""
    m = off_identity(FADConv2d(16, 16, 3, padding=1, bias=False, sampling='fixed', freq_select=False), 0.5).eval()
    with torch.no_grad():
        m.weight += 1 - m.weight.mean((2, 3), keepdim=True)
    m = m.to(dtype)
    exact = copy.deepcopy(m).double()
    x = torch.randn(2, 16, 9, 8).to(dtype)
    x -= x.mean((2, 3), keepdim=True)
    gains = tuple(g.double() for g in m.ada_kern(x))
    gains = (torch.zeros_like(gains[0]), *gains[1:])  # the high part alone
    y = m._plain(x, tuple(g.to(dtype) for g in gains), 1)
    assert error(y, exact._plain(x.double(), gains, 1)) < SPLIT[dtype]


@pytest.mark.parametrize('backend', [None, 'torchvision', 'grid_sample', 'reference'])
@pytest.mark.parametrize('cfg', [{}, dict(groups=4), dict(sampling='fixed'), dict(sampling='deform')], ids=str)
def test_backward_under_autocast(cfg, backend):
    """A gradient that is taken inside of the autocast block is the one that is taken outside of it."""
    m, x = off_identity(FADConv2d(4, 4, 3, padding=1, backend=backend, **cfg), 0.5), torch.randn(2, 4, 9, 8)

    def gradients(inside):
        m.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            loss = m(x).float().square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [p.grad for p in m.parameters()]

    for name, a, e in zip(dict(m.named_parameters()), gradients(True), gradients(False), strict=True):
        assert a.dtype == torch.float32 and error(a, e) < 0.1, name  # 0.049, of torch's own linear layers


def test_backend_reaches_freq_select(monkeypatch):
    """'triton' is the band mix's backend too, and 'grid_sample' wants torch's operators; 'gather' leaves it its own."""
    chosen = []
    choose = functional.choose_backend
    monkeypatch.setattr(functional, 'choose_backend', lambda x, backend=None: chosen.append(
        choose(x, backend)) or 'fused')
    x = torch.randn(1, 4, 8, 8)
    for backend in (None, 'gather', 'triton', 'grid_sample'):
        FADConv2d(4, 4, 3, padding=1, sampling='fixed', backend=backend)(x)
    assert chosen == ['fused', 'fused', 'triton', 'written_out']


# subclasses of tensors

class Strict(torch.Tensor):
    """Takes the arguments of torch's documentation and no others, as MONAI's MetaTensor does."""

    def new_empty(self, size, dtype=None, device=None, requires_grad=False):
        return super().new_empty(tuple(size), dtype=dtype, device=device, requires_grad=requires_grad)

    def new_zeros(self, size, dtype=None, device=None, requires_grad=False):
        return super().new_zeros(tuple(size), dtype=dtype, device=device, requires_grad=requires_grad)

    def new_ones(self, size, dtype=None, device=None, requires_grad=False):
        return super().new_ones(tuple(size), dtype=dtype, device=device, requires_grad=requires_grad)

    def clone(self, *, memory_format=torch.preserve_format):
        return super().clone(memory_format=memory_format)


# Triton's interpreter calls `new_empty(0)` itself
@pytest.mark.parametrize('backend', [*(b for b in list_backends() if b != 'triton'), None])
@pytest.mark.parametrize('cfg', [dict(padding=1), dict(padding=1, groups=4, out_channels=4), dict(
    padding=1, spatial_group=2, dilation_groups=2, kernel_decompose='low')], ids=ids)
def test_tensor_subclass(cfg, backend):
    m = off_identity(make(**cfg, backend=backend)).eval()
    x = torch.randn(2, 4, 7, 8)
    y, expected = m(x.as_subclass(Strict)), m(x)
    assert type(y) is Strict and error(y.as_subclass(torch.Tensor), expected) < 1e-6
    actual = grads(y, list(m.parameters()))
    assert_same([g.as_subclass(torch.Tensor) for g in actual], grads(expected, list(m.parameters())), 1e-6)
    power = high_frequency_power(x.as_subclass(Strict))
    assert error(power.as_subclass(torch.Tensor), high_frequency_power(x)) < 1e-6


# what people put behind a layer works in place

@pytest.mark.parametrize('backend', [*list_backends(), None])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize('cfg', [
    dict(padding=1), dict(padding=1, out_channels=1), dict(padding=1, groups=4, out_channels=4, spatial_group=2),
    dict(padding=2, dilation=2, padding_mode='replicate', bias=False), dict(padding=1, sampling='fixed'),
    dict(padding=1, sampling='deform'),
    dict(padding=1, kernel_decompose='none', freq_select=False)], ids=ids)
@pytest.mark.interpreted('padding=1-NHWC', 'groups=4 NCHW')
def test_in_place_behind_a_layer(cfg, memory_format, backend):
    m = off_identity(make(**cfg, backend=backend)).train()
    x = torch.randn(2, 4, 6, 7).contiguous(memory_format=memory_format)
    results = []
    for in_place in (False, True):
        y = m(x)
        y = y.sigmoid_() if in_place else y.sigmoid()
        results.append([y, *grads(y, list(m.parameters()))])
    assert_same(results[1], results[0], 0)


@pytest.mark.parametrize('backend', [*list_backends(), None])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize('shape', [(2, 4, 6, 7), (1, 1, 6, 7), (2, 4, 1, 1), (1, 4, 1, 7)])
@pytest.mark.interpreted('shape0-NHWC')
def test_in_place_behind_freq_select(shape, memory_format, backend):
    m = off_identity(FreqSelect(shape[1]))
    x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    results = []
    for in_place in (False, True):
        y = m(x, backend)
        y = y.relu_() if in_place else y.relu()
        results.append([y, *grads(y, [x, *m.parameters()])])
    assert_same(results[1], results[0], 0)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
def test_in_place_in_a_lifted_network(memory_format):
    """The activations of VGG, AlexNet and SqueezeNet, and of decoders without norms, are in place."""
    model = nn.Sequential(*(
        m for act in (nn.ReLU, nn.SiLU, nn.Hardtanh) for m in (nn.Conv2d(4, 4, 3, padding=1), act(inplace=True))))
    model = model.to(memory_format=memory_format)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=memory_format)
    expected = grads(model(x), list(model.parameters()))
    weights = list(model.parameters())
    assert len(lift_model(model, ('0', '2', '4')).replaced) == 3
    assert_same(grads(model(x), weights), expected, AT_START)
    model(x).sum().backward()
