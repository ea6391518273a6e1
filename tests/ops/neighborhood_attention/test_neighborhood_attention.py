"""Neighbourhood attention: every backend against the definition, with every gradient, at odd sizes."""
import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fadc_timm.ops import neighborhood_attention2d, neighborhood_mean2d, set_backend
from fadc_timm.ops.neighborhood_attention import backends, flex, neighbours, reference, tiles, windows
from fadc_timm.ops.neighborhood_attention.arguments import AttentionArgs
from tests.support.cases import error
from tests.support.marks import needs_is_exporting
from tests.support.no_copies import no_copies

pytestmark = pytest.mark.usefixtures('one_thread')

# size, kernel size, dilation, bias
CASES = {
    'whole_map': ((7, 7), 7, 1, True),
    'plain': ((13, 10), 7, 1, True),
    'one_tile_more': ((9, 15), 5, 1, True),
    'dilated': ((16, 21), 5, 3, True),
    'per_axis': ((11, 18), 3, (1, 5), True),
    'rectangular': ((12, 17), (3, 7), (4, 2), True),
    'no_bias': ((10, 14), 5, 2, False),
    'one_point': ((4, 5), 1, 2, True),
    'smaller_than_window': ((3, 8), 5, (1, 2), True),
    'much_smaller': ((1, 2), 3, 2, False),
}
TILED = ('windows', 'written_out')


def make_inputs(size, kernel_size, has_bias=True, b=2, heads=2, c=4, dtype=torch.float64, requires_grad=True):
    """q, k, v as a layer has them, views of one projection, and bias."""
    torch.manual_seed(0)
    kh, kw = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    projection = torch.randn(b, *size, 3, heads, c, dtype=dtype) * 1.5
    tensors = [*projection.permute(3, 0, 4, 1, 2, 5)]
    if has_bias:
        tensors.append(torch.randn(heads, 2 * kh - 1, 2 * kw - 1, dtype=dtype))
    return [t.requires_grad_(requires_grad) for t in tensors]


def run(tensors, kernel_size, dilation, backend, **kwargs):
    """Output, and the gradients of all tensors."""
    q, k, v, *bias = tensors
    y = neighborhood_attention2d(q, k, v, kernel_size, dilation, bias[0] if bias else None, backend, **kwargs)
    cotangent = torch.linspace(-2, 3, y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, tensors, cotangent)


def check(results, expected, tolerance):
    for a, e in zip(results, expected, strict=True):
        assert a.shape == e.shape and error(a.double(), e.double()) <= tolerance


@functools.cache
def defined(case):
    """Inputs that float32 holds, and the definition's output and gradients."""
    size, kernel_size, dilation, has_bias = CASES[case]
    tensors = [t.detach().double().requires_grad_() for t in make_inputs(
        size, kernel_size, has_bias, dtype=torch.float32)]
    return tensors, run(tensors, kernel_size, dilation, 'reference')


# largest error measured, outputs and gradients: 6.6e-16, 2.9e-7
TOLERANCES = {torch.float64: 3e-15, torch.float32: 1.5e-6}


@pytest.mark.parametrize('case, dtype', [
    *((case, torch.float64) for case in CASES),
    *((case, torch.float32) for case in ('plain', 'rectangular', 'smaller_than_window'))], ids=str)
@pytest.mark.parametrize('backend', TILED)
def test_definition(case, backend, dtype):
    _, kernel_size, dilation, _ = CASES[case]
    exact, expected = defined(case)
    tensors = [t.detach().to(dtype).requires_grad_() for t in exact]
    check(run(tensors, kernel_size, dilation, backend), expected, TOLERANCES[dtype])


@pytest.mark.parametrize('case', [
    'rectangular', *(pytest.param(c, marks=pytest.mark.sweep) for c in ('plain', 'no_bias'))])
def test_flex(case):
    size, kernel_size, dilation, has_bias = CASES[case]
    q, k, v, *bias = make_inputs(size, kernel_size, has_bias, dtype=torch.float32, requires_grad=False)
    args = q, k, v, kernel_size, dilation, bias[0] if bias else None
    expected = neighborhood_attention2d(*args, 'reference')
    assert error(neighborhood_attention2d(*args, 'flex'), expected) < 2e-6


def test_flex_is_compiled_for_each_size(monkeypatch):
    """Also beyond torch's limit of eight for one function, from where on it would compute all scores."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend))
    for side in range(3, 13):
        q = torch.randn(1, 1, side, side, 4)
        args = AttentionArgs(q, q, q, (3, 3), (1, 1), None)
        plan = flex._make_plan((side, side), (3, 3), (1, 1), q.device)
        with torch.no_grad():
            expected = flex.forward(args)
            q, k, v = (t.flatten(2, 3)[:, :, plan.order] for t in (q, q, q))
            y = plan.compiled(q, k, v, score_mod=None, block_mask=plan.mask)
        assert error(y[:, :, plan.order.argsort()].unflatten(2, (side, side)), expected) < 2e-6
        assert len(graphs) == side - 2


def test_reference_is_attention():
    """Where one window is the whole map, this is plain attention."""
    q, k, v = make_inputs((5, 5), 5, False)
    expected = F.scaled_dot_product_attention(*(t.flatten(2, 3) for t in (q, k, v))).unflatten(2, (5, 5))
    assert error(neighborhood_attention2d(q, k, v, 5, backend='reference'), expected) < 1e-14


@pytest.mark.parametrize('length, k, d', [(7, 7, 1), (12, 3, 1), (23, 5, 3), (24, 3, 7)])
def test_neighbours(length, k, d):
    positions, places = neighbours(length, k, d, torch.device('cpu'))
    for i in range(length):
        assert tuple(positions[i].tolist()) == reference.window(i, length, k, d)
        assert [(p - i) // d + k - 1 for p in positions[i].tolist()] == places[i].tolist()


@pytest.mark.parametrize('side', range(1, 9))
@pytest.mark.parametrize('length, k, d', [(21, 5, 1), (22, 3, 3), (19, 5, 2)])
def test_segments(length, k, d, side):
    """Every position is a query once, and its block has its window at its places; so have the tables of a device."""
    seen = []
    for s in tiles.segments(length, k, d, side):
        args = s.queries, s.keys, s.first_query - s.first_key, k
        places, selection = windows._make_tables(*args, torch.float64, torch.device('cpu'))
        assert places.tolist() == [list(row) for row in s.places]
        assert torch.equal(selection, F.one_hot(places.flatten() + 1, 2 * k).double()[:, 1:].t())
        for residue in range(s.first_residue, s.first_residue + s.residues):
            for tile in range(s.tiles):
                for i in range(s.queries):
                    query = residue + d * (s.first_query + tile * s.queries + i)
                    keys = [residue + d * (s.first_key + tile * s.queries + j) for j in range(s.keys)]
                    kept = {key: p for key, p in zip(keys, s.places[i]) if p >= 0}
                    assert kept == {key: (key - query) // d + k - 1 for key in reference.window(query, length, k, d)}
                    seen.append(query)
    assert sorted(seen) == list(range(length))


@pytest.mark.parametrize('memory', [1, 5000, 10 ** 6])
@pytest.mark.parametrize('sides', [(2, 3), (3, 4), (5, 2)], ids=str)
def test_tiles(sides, memory, monkeypatch):
    """Any tiles, and any number of them at a time, give the same."""
    tensors = make_inputs((14, 19), 5, b=3)
    expected = run(tensors, 5, (1, 2), 'written_out')
    monkeypatch.setattr(windows, 'tile_sides', lambda *args: sides)
    monkeypatch.setattr(windows, '_CPU_BYTES', memory)
    check(run(tensors, 5, (1, 2), 'windows'), expected, 5e-15)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_memory(monkeypatch):
    """No buffer is larger than the map, whatever the batch and the window; 49 windows of it would be."""
    monkeypatch.setattr(windows, '_CPU_BYTES', 2 ** 16)
    q, k, v, bias = make_inputs((28, 28), 7, b=4, c=16, dtype=torch.float32, requires_grad=False)
    with Largest() as largest:
        y = windows._forward(q, k, v, bias, [7, 7], [1, 1])
        windows._gradient(y, q, k, v, bias, [7, 7], [1, 1])
    assert largest.elements <= q.untyped_storage().nbytes() // 4


@pytest.mark.parametrize('backend', TILED)
# largest error measured, on all cases: 6.1e-3, 6.3e-4
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)], ids=str)
def test_half_precision(dtype, tolerance, backend):
    """Computed in float32 and rounded once; under autocast likewise."""
    tensors = make_inputs((12, 11), 5, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = run(exact, 5, 2, 'reference')
    check(run(tensors, 5, 2, backend), expected, tolerance)
    if dtype == torch.bfloat16:
        with torch.autocast('cpu', dtype):
            y = neighborhood_attention2d(*(t.float() for t in tensors[:3]), 5, 2, tensors[3].float(), backend)
        assert y.dtype == dtype and error(y.double(), expected[0]) < tolerance


def test_layouts():
    q, k, v, bias = make_inputs((9, 12), 3)
    expected = run([q, k, v, bias], 3, 2, 'reference')
    contiguous = [t.detach().contiguous().requires_grad_() for t in (q, k, v, bias)]
    check(run(contiguous, 3, 2, 'windows'), expected, 5e-15)
    y = neighborhood_attention2d(*contiguous[:3], 3, 2, contiguous[3])
    assert y.permute(0, 2, 3, 1, 4).is_contiguous()  # a map (B, H, W, C) as layers have it
    sliced = [F.pad(t.detach(), (1, 2, 0, 0, 1, 1))[..., 1:-1, :, 1:-2].requires_grad_() for t in contiguous[:3]]
    check(run([*sliced, contiguous[3]], 3, 2, 'windows'), expected, 5e-15)


@pytest.mark.parametrize('alone', range(4))
def test_one_gradient_alone(alone):
    tensors = make_inputs((8, 9), 3, requires_grad=False)
    expected = run([t.clone().requires_grad_() for t in tensors], 3, 2, 'reference')[1 + alone]
    tensors[alone].requires_grad_()
    y = neighborhood_attention2d(*tensors[:3], 3, 2, tensors[3])
    cotangent = torch.linspace(-2, 3, y.numel(), dtype=torch.float64).cos().view(y.shape)
    assert error(torch.autograd.grad(y, tensors[alone], cotangent)[0], expected) < 5e-15


def test_empty():
    q, k, v, bias = make_inputs((8, 9), 3, b=0)
    y, *grads = run([q, k, v, bias], 3, 2, 'windows')
    assert y.shape == q.shape and torch.equal(grads[3], torch.zeros_like(bias))


def test_derivatives():
    """First and second ones, forward-mode ones, and per sample."""
    tensors = make_inputs((4, 3), 3, b=1, c=1, heads=1)
    torch.autograd.gradcheck(lambda *t: neighborhood_attention2d(*t[:3], 3, 1, t[3]), tensors)
    torch.autograd.gradgradcheck(lambda *t: neighborhood_attention2d(*t[:3], 3, 1, t[3]), tensors)
    torch.autograd.gradcheck(
        lambda *t: neighborhood_attention2d(*t[:3], 3, 1, t[3]), tensors, check_forward_ad=True,
        check_backward_ad=False)
    q, k, v, bias = (t.detach() for t in tensors)
    y = torch.func.vmap(lambda q: neighborhood_attention2d(q, k, v, 3, 1, bias))(torch.stack([q, 2 * q]))
    assert error(y[1], neighborhood_attention2d(2 * q, k, v, 3, 1, bias)) < 1e-14


@pytest.mark.parametrize('has_bias', [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_opcheck(has_bias):
    q, k, v, *bias = make_inputs((8, 9), 3, has_bias, dtype=torch.float32)
    args = q, k, v, bias[0] if bias else None, [3, 3], [2, 1]
    torch.library.opcheck(windows.neighborhood_windows, args)
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(windows.neighborhood_windows_backward, (torch.randn_like(q), *args))


@pytest.mark.parametrize('has_bias', [True, False])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
def test_nothing_is_copied_to_the_device(dtype, has_bias, monkeypatch):
    """So that a CUDA graph can hold both passes, the tables included."""
    monkeypatch.setattr(windows._tables_of, 'kept', {})  # what is fake is not to be kept
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    with no_copies():
        q, k, v = (torch.empty(2, 2, 13, 16, 4, dtype=dtype, device='cuda') for _ in range(3))
        bias = torch.empty(2, 9, 9, dtype=dtype, device='cuda') if has_bias else None
        args = q, k, v, bias, [5, 5], [1, 3]
        windows.neighborhood_windows_backward._init_fn(windows.neighborhood_windows._init_fn(*args), *args)
    assert not windows._tables_of.kept


@pytest.mark.gpu
@pytest.mark.parametrize('warm', [True, False], ids=['warm', 'cold'])
def test_cuda_graph(warm):
    """A captured graph follows its inputs, and what it makes while it is captured is not used outside of it."""
    tensors = [t.detach().cuda().requires_grad_() for t in make_inputs((13, 16), 5, dtype=torch.float32)]

    def step():
        y = neighborhood_attention2d(*tensors[:3], 5, (1, 3), tensors[3], 'windows')
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    step()
    if not warm:
        windows._tables_of.kept.clear()
        windows._tables_of.captured.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    step()
    with torch.no_grad():
        for t in tensors:
            t.normal_()
    windows._tables_of.kept.clear()  # what the graph reads is kept nevertheless
    graph.replay()
    check(captured, step(), TOLERANCES[torch.float32])


@pytest.mark.parametrize('has_bias', [True, False])
@pytest.mark.parametrize('symbolic', [None, 0, 3])
def test_tables_are_made_with_the_graph(symbolic, has_bias, monkeypatch):
    """The first run of a graph may be one in which nothing may be kept: see `prepare`. Of known sizes alone."""
    kept = {}
    monkeypatch.setattr(windows._tables_of, 'kept', kept)
    tensors = make_inputs((13, 16), 5, has_bias, dtype=torch.float16, requires_grad=False)
    tensors = [t.contiguous() for t in tensors] + [None] * (not has_bias)
    sizes = [DimDynamic.DYNAMIC if i == symbolic else DimDynamic.STATIC for i in range(5)]
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = [t if t is None else mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(
            sizes if t.dim() == 5 else [DimDynamic.STATIC] * 3)) for t in tensors]
        windows.neighborhood_windows(*fakes, [5, 5], [1, 3])
    assert bool(kept) == (symbolic is None)
    assert not any(isinstance(t, FakeTensor) for tables in kept.values() for t in tables)
    if kept:
        monkeypatch.setattr(windows._tables_of, 'make', None)
        y = windows.neighborhood_windows(*tensors, [5, 5], [1, 3])
        windows.neighborhood_windows_backward(y, *tensors, [5, 5], [1, 3])


@pytest.fixture
def ran(monkeypatch):
    """Names of the backends that run, in order."""
    names = []
    for name, backend in backends.BACKENDS.items():
        monkeypatch.setitem(backends.BACKENDS, name, backend._replace(
            forward=lambda args, name=name, forward=backend.forward: names.append(name) or forward(args)))
    return names


def test_set_backend(ran, monkeypatch):
    """Of the names of the convolution, attention has 'reference'; the others leave it its own choice."""
    tensors = make_inputs((3, 4), 3, requires_grad=False)
    q, k, v, bias = tensors
    with set_backend('reference'):
        neighborhood_attention2d(q, k, v, 3, 1, bias)
        neighborhood_attention2d(q, k, v, 3, 1, bias, 'windows')
        with pytest.raises(NotImplementedError, match="'reference' cannot run this call: it has no dropout"):
            neighborhood_attention2d(q, k, v, 3, 1, bias, dropout_p=0.5)
        torch.export.export(Attention(), (*make_inputs((6, 4), 3, requires_grad=False),))
    monkeypatch.setenv('FADC_TIMM_BACKEND', 'reference')
    neighborhood_attention2d(q, k, v, 3, 1, bias)
    monkeypatch.setenv('FADC_TIMM_BACKEND', 'gather')
    neighborhood_attention2d(q, k, v, 3, 1, bias)
    assert ran == ['reference', 'windows', 'reference', 'reference', 'windows']


@pytest.mark.parametrize('name', ['flex', 'windows'])
def test_set_backend_of_attention_alone(name, monkeypatch):
    with pytest.raises(ValueError, match=f"no backend {name!r} of the convolution.*{name!r} is a backend of neighb"):
        set_backend(name)
    monkeypatch.setenv('FADC_TIMM_BACKEND', name)
    with pytest.raises(ValueError, match=f"FADC_TIMM_BACKEND is {name!r}.*create_model take it as backend="):
        neighborhood_attention2d(*make_inputs((3, 4), 3)[:3], 3)


def test_set_backend_is_compiled():
    """Another setting is another graph."""
    torch.compiler.reset()
    tensors = make_inputs((6, 4), 3, dtype=torch.float32, requires_grad=False)
    compiled = torch.compile(Attention(), fullgraph=True, backend='aot_eager')
    chosen, exact = (
        neighborhood_attention2d(*tensors[:3], 3, (2, 1), tensors[3], name) for name in ('windows', 'reference'))
    assert torch.equal(compiled(*tensors), chosen) and not torch.equal(chosen, exact)
    with set_backend('reference'):
        assert torch.equal(compiled(*tensors), exact)


def test_compile_any_size():
    torch.compiler.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(neighborhood_attention2d, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for size in ((20, 24), (13, 18), (16, 33)):
        # contiguous: strides of views have symbols of their own, which torch ties to sizes of the same number
        tensors = [t.detach().contiguous().requires_grad_() for t in make_inputs(size, 5)]
        y = compiled(*tensors[:3], 5, (2, 1), tensors[3])
        expected = neighborhood_attention2d(*tensors[:3], 5, (2, 1), tensors[3])
        assert error(y, expected) < 5e-15
        grads, wanted = (torch.autograd.grad(t.square().sum(), tensors) for t in (y, expected))
        check(grads, wanted, 5e-15)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1  # as many as after the first


class Attention(torch.nn.Module):
    def forward(self, q, k, v, bias):
        return neighborhood_attention2d(q, k, v, 3, (2, 1), bias)


@needs_is_exporting
def test_export():
    """In operators of torch alone, at any size that is not smaller than the window."""
    tensors = make_inputs((12, 15), 3, dtype=torch.float32, requires_grad=False)
    rows, cols = torch.export.Dim('rows', min=6, max=64), torch.export.Dim('cols', min=4, max=64)
    map_dims = {2: rows, 3: cols}
    program = torch.export.export(
        Attention(), tuple(tensors), dynamic_shapes=dict(q=map_dims, k=map_dims, v=map_dims, bias=None))
    assert 'fadc_timm' not in str(program.graph)
    for size in ((12, 15), (7, 11)):
        tensors = make_inputs(size, 3, dtype=torch.float32, requires_grad=False)
        assert error(program.module()(*tensors), neighborhood_attention2d(*tensors[:3], 3, (2, 1), tensors[3])) < 2e-6


def test_flops():
    """Those of the windows, whatever the tiles compute beside them; twice as many backward."""
    tensors = make_inputs((16, 12), 5)
    b, heads, h, w, c = tensors[0].shape
    for backend in TILED:
        with FlopCounterMode(display=False) as counter:
            y = neighborhood_attention2d(*tensors[:3], 5, 1, tensors[3], backend)
        assert counter.get_total_flops() == 2 * 2 * b * heads * h * w * c * 25
    with FlopCounterMode(display=False) as counter:
        y = neighborhood_attention2d(*tensors[:3], 5, 1, tensors[3])
        y.backward(torch.ones_like(y))
    assert counter.get_total_flops() == 3 * 2 * 2 * b * heads * h * w * c * 25


@pytest.mark.parametrize('size, k, d', [((7, 7), 7, 1), ((12, 17), 5, 2), ((11, 18), (3, 5), (1, 3))], ids=str)
def test_mean(size, k, d):
    """It is attention with equal weights."""
    v = make_inputs(size, k, False)[2]
    expected = neighborhood_attention2d(torch.zeros_like(v), v, v, k, d, backend='reference')
    y = neighborhood_mean2d(v.permute(0, 2, 3, 1, 4).flatten(3), k, d)
    assert error(y, expected.permute(0, 2, 3, 1, 4).flatten(3)) < 1e-14
    with pytest.raises(ValueError, match=r'at least kernel size'):
        neighborhood_mean2d(torch.zeros(1, 2, 20, 3), k, d)
    with pytest.raises(ValueError, match=r'must be \(B, H, W, C\), got \(7, 7, 9\)'):
        neighborhood_mean2d(torch.zeros(7, 7, 9), 3)
    with pytest.raises(TypeError, match='floating point dtype, got torch.int64'):
        neighborhood_mean2d(torch.arange(49).view(1, 7, 7, 1), 3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_mean_in_half_precision(dtype):
    """Sums of halves would overflow, and lose digits."""
    x = torch.full((1, 14, 15, 2), 1e4) + torch.randn(1, 14, 15, 2)
    y = neighborhood_mean2d(x.to(dtype), 13)
    assert y.dtype == dtype and error(y, neighborhood_mean2d(x.to(dtype).double(), 13)) < torch.finfo(dtype).eps


def test_dropout():
    """It keeps the mean, and only the backends that have it take it."""
    q, k, v = make_inputs((8, 8), 5, False, c=1)
    torch.manual_seed(0)
    ones = torch.ones_like(v)
    y = neighborhood_attention2d(q, k, ones, 5, dropout_p=0.25)
    assert abs(y.mean().item() - 1) < 0.05 and y.std() > 0.05
    for backend in ('windows', 'flex', 'reference'):
        with pytest.raises(NotImplementedError, match=f'{backend}.*no dropout'):
            neighborhood_attention2d(q, k, v, 5, backend=backend, dropout_p=0.25)


@pytest.mark.parametrize('backend', ['windows', 'written_out', 'reference'])
def test_no_heads(backend):
    q, bias = torch.zeros(2, 0, 9, 8, 4), torch.zeros(0, 5, 5)
    assert neighborhood_attention2d(q, q, q, 3, bias=bias, backend=backend).shape == q.shape


@pytest.mark.parametrize('change, exception, message', [
    (dict(q=[1]), TypeError, 'q must be a tensor.*list'),
    (dict(q=torch.zeros(2, 2, 8, 8)), ValueError, r'q must have shape \(B, heads, H, W, c\), got \(2, 2, 8, 8\)'),
    (dict(k=torch.zeros(2, 2, 8, 9, 4)), ValueError, r'k must have the shape of q.*\(2, 2, 8, 9, 4\)'),
    (dict(v=torch.zeros(2, 2, 8, 8, 4).half()), TypeError, 'v must have the dtype of q, torch.float32'),
    (dict(q=torch.zeros(2, 2, 8, 8, 4).int()), TypeError, 'q must have a floating point dtype'),
    (dict(v=torch.zeros(2, 2, 8, 8, 4, device='meta')), ValueError, 'v is on meta and q is on cpu'),
    (dict(kernel_size=4), ValueError, 'kernel_size must be odd, got 4'),
    (dict(kernel_size=2.5), TypeError, 'kernel_size must be an integer or a pair.*2.5'),
    (dict(dilation=0), ValueError, 'dilation must be at least 1, got 0'),
    (dict(dilation=(1, 2, 3)), TypeError, r'dilation must be an integer or a pair.*\(1, 2, 3\)'),
    (dict(bias=torch.zeros(2, 3, 3)), ValueError, r'bias must have shape.*= \(2, 5, 5\), got \(2, 3, 3\)'),
    (dict(bias=torch.zeros(2, 5, 5).half()), TypeError, 'bias must have the dtype of q, torch.float32'),
    (dict(backend='natten'), ValueError, "no backend 'natten'.*reference, windows"),
    (dict(dropout_p=1.), ValueError, 'dropout_p must be'),
    (dict(dropout_p='a'), TypeError, "dropout_p must be a number, got 'a'"),
], ids=str)
def test_bad_input(change, exception, message):
    q = torch.zeros(2, 2, 8, 8, 4)
    with pytest.raises(exception, match=message):
        neighborhood_attention2d(**{**dict(q=q, k=q, v=q, kernel_size=3), **change})
