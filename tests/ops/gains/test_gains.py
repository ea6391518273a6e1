"""AdaKern's trunk, norm and heads in Triton: against torch in float64, with every gradient.

On a CPU in Triton's interpreter; `pytest -m gpu` runs the same on a GPU, where the kernels are compiled.
"""
from typing import NamedTuple, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fadc_timm.ops import gains, triton_support
from fadc_timm.ops.gains import operator
from tests.support.cases import error
from tests.support.no_copies import no_copies

pytest.importorskip('triton')

pytestmark = pytest.mark.usefixtures('one_thread', 'skip_where_compiled')

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Case(NamedTuple):
    """b samples, n parts of a mean, c channels, a trunk of width channels per part, and o outputs of a head."""
    b: int = 3
    n: int = 4
    c: int = 12
    width: int = 5
    o: int = 7
    parts: int = 2
    bias: bool = False

    def __str__(self):
        return f'b{self.b}-n{self.n}-c{self.c}-w{self.width}-o{self.o}-p{self.parts}{"-bias" * self.bias}'

    def trunk(self, dtype=torch.float64, device='cpu', means_dtype: Optional[torch.dtype] = None):
        """means, weight and bias, whose values the dtype holds."""
        outputs = self.parts * self.width
        shapes = (self.b, self.n, self.c), (outputs, self.c), *(((outputs,),) if self.bias else ())
        means, *others = draw(*shapes, dtype=dtype, device=device)
        return means.detach().to(means_dtype or dtype).requires_grad_(), *others

    def heads(self, dtype=torch.float64, device='cpu'):
        """x and, per part, weight and bias. A quarter of x is exactly zero."""
        own = (self.o, self.width), (self.o,)
        x, *others = draw((self.b, self.parts * self.width), *own * self.parts, dtype=dtype, device=device)
        x = torch.where(torch.arange(x.numel(), device=device).view(x.shape) % 4 == 1, 0, x.detach())
        return x.requires_grad_(), *others


CASES = [
    Case(), Case(1, 1, 1, 1, 1, 1), Case(1, 33, 40, 3, 20), Case(2, 130, 17, 16, 19, 1, bias=True),
    Case(130, 2, 5, 17, 33), Case(33, 1, 129, 4, 130, bias=True), Case(2, 3, 16, 66, 3)]


def draw(*shapes, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
            for shape in shapes]


def trunk_definition(means, weight, bias=None):
    return F.linear(means.sum(1), weight, bias)


def heads_definition(x, *parameters):
    parts = torch.relu(x).chunk(len(parameters) // 2, 1)
    return [F.linear(part, *pair) for part, pair in zip(parts, zip(parameters[::2], parameters[1::2]))]


def called_heads(*tensors):
    return [y for y in gains.heads(*tensors) if y is not None]


def results(function, tensors):
    """Outputs, and the gradients of a projection of them that is the same in every dtype."""
    ys = function(*tensors)
    ys = [ys] if isinstance(ys, torch.Tensor) else ys
    cotangents = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).cos().bfloat16()
                  for y in ys]
    return [*ys, *torch.autograd.grad(ys, tensors, [t.to(y.dtype) for t, y in zip(cotangents, ys)])]


def check(actual, tensors, definition, tolerance):
    """Each result is near that of the definition in float64, in the shape, and every gradient in its tensor's dtype."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = results(definition, exact)
    assert [t.shape for t in actual] == [t.shape for t in expected]
    assert [t.dtype for t in actual[-len(tensors):]] == [t.dtype for t in tensors]
    for a, e in zip(actual, expected):
        assert error(a.detach(), e.detach().cpu()) <= tolerance


# Largest error measured, relative to the largest number: 5.5e-16, 2.4e-7, 3.5e-4, 2.1e-3. Halves are rounded once.
TOLERANCES = {torch.float64: 2e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EXACT = [pytest.param(case, dtype, marks=() if dtype == torch.float64 or i == 0 else pytest.mark.sweep)
         for dtype in DTYPES for i, case in enumerate(CASES)]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case, dtype', EXACT, ids=str)
def test_trunk(case, dtype, device):
    tensors = case.trunk(dtype, device)
    actual = results(gains.trunk, tensors)
    assert actual[0].dtype == dtype
    check(actual, tensors, trunk_definition, TOLERANCES[dtype])
    with torch.no_grad():
        assert torch.equal(gains.trunk(*tensors), actual[0])


# Cases and norms in the interpreter: every norm for the first case, and every case with one.
NORMED = [pytest.param(case, dtype, norm, marks=() if dtype == torch.float64 and (norm == 'affine' or i == 0)
                       or (dtype, norm, i) == (torch.bfloat16, 'affine', 0) else pytest.mark.sweep)
          for dtype in DTYPES for norm in ('affine', 'plain', None) for i, case in enumerate((
              *CASES, Case(33, 3, 300, 64, 700, bias=True), Case(2, 2, 20, 130, 48)))]


def norm_of(kind, channels, device, dtype):
    """A BatchNorm whose numbers are those of no other, values that the dtype holds, or None."""
    if kind is None:
        return None
    norm = nn.BatchNorm1d(channels, 0.1, affine=kind == 'affine', dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in (*norm.parameters(), norm.running_mean):
            t.uniform_(-1, 1, generator=generator)
        norm.running_var.uniform_(0.01, 2, generator=generator)
    return norm.to(device, dtype)


def tensors_of(norm):
    return (None,) * 4 if norm is None else (norm.running_mean, norm.running_var, norm.weight, norm.bias)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case, dtype, kind', NORMED, ids=str)
def test_trunk_and_heads(case, dtype, kind, device):
    """With a BatchNorm of fixed statistics between them, and without."""
    means, fc_weight, *fc_bias = case.trunk(dtype, device)
    fc_bias = fc_bias[0] if fc_bias else None
    _, *heads = case.heads(dtype, device)
    norm = norm_of(kind, fc_weight.shape[0], device, dtype)
    with torch.no_grad():
        padded = heads + [None] * (4 - len(heads))
        actual = gains.trunk_and_heads(means, fc_weight, fc_bias, tensors_of(norm), 0.1, *padded)
        y = trunk_definition(*[None if t is None else t.double() for t in (means, fc_weight, fc_bias)])
        y = y if norm is None else norm.double()(y)
        expected = heads_definition(y, *[t.double() for t in heads])
    assert case.parts == 2 or actual[1] is None
    for a, e in zip(actual, expected):
        assert a.dtype == dtype and a.shape == e.shape
        assert error(a, e.cpu()) < 2 * TOLERANCES[dtype]


@pytest.mark.filterwarnings('ignore:invalid value:RuntimeWarning')
@pytest.mark.parametrize('device', DEVICES)
def test_trunk_and_heads_not_a_number(device):
    """NaN goes to all outputs of its sample, or of its channel's part, and nowhere else; infinity as in torch."""
    case = Case(3, 2, 5, 3, 4)
    means, fc_weight = case.trunk(device=device)
    _, *heads = case.heads(device=device)
    with torch.no_grad():
        means[0, 1, 2] = float('nan')
        means[1, 0, 0] = float('inf')
        fc_weight[1, 3] = float('nan')
        actual = gains.trunk_and_heads(means, fc_weight, None, (None,) * 4, 0., *heads)
        expected = heads_definition(trunk_definition(means, fc_weight), *heads)
    assert expected[0].isnan().all() and expected[1].isfinite()[2].all()
    for a, e in zip(actual, expected):
        assert torch.equal(a.isnan(), e.isnan()) and error(a[2].nan_to_num(), e[2].nan_to_num().cpu()) <= 2e-15


def test_trunk_and_heads_shapes():
    def call(channels=4, norm=6, width=3):
        some = torch.empty(norm)
        return gains.trunk_and_heads(
            torch.empty(2, 3, 4), torch.empty(6, channels), None, (some, some, None, None), 0., torch.empty(5, width),
            torch.empty(5), torch.empty(5, width), torch.empty(5))

    for options, message in (
            (dict(channels=5), r'The trunk wants .*\[6, 5\]'), (dict(width=4), r'The heads want .*\[2, 6\], \[5, 4\]'),
            (dict(norm=5), r'The norm wants 6 channels')):
        with pytest.raises(ValueError, match=message):
            call(**options)


class Normed(NamedTuple):
    """A trunk (b, k) and its BatchNorm: statistics of the batch or fixed ones, running ones or none, affine or not."""
    b: int
    k: int
    batch_statistics: bool = True
    running: bool = True
    affine: bool = True
    momentum: float = 0.1

    def __str__(self):
        flags = 'batch_statistics', 'running', 'affine'
        return f'b{self.b}-k{self.k}' + ''.join(f'-{name}' for name in flags if getattr(self, name))

    def tensors(self, dtype, device):
        """x, a gradient of the output, and weight, bias and running statistics or None, values that the dtype holds."""
        x, grad, *others = draw(
            (self.b, self.k), (self.b, self.k), *((self.k,),) * 4, dtype=dtype, device=device)
        weight, bias, mean, var = (t.detach() for t in others)
        parameters = (weight, bias) if self.affine else (None, None)
        return (x.detach(), grad.detach(), *parameters,
                *((mean, var.abs() + 0.1) if self.running else (None, None)))


def normed(case, x, grad, *parts, eps=0.01):
    """The kernels' output, running statistics behind it, and gradients."""
    weight, bias, running_mean, running_var = [None if t is None else t.clone() for t in parts]
    y, mean, rstd = gains.norm_forward(
        x, weight, bias, running_mean, running_var, case.batch_statistics, case.momentum, eps)
    if case.batch_statistics:
        assert mean.dtype == rstd.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    else:
        assert mean is None and rstd is None
    after = running_mean, running_var
    if case.batch_statistics:  # the next call changes them before the backward pass
        running_mean = running_var = None
    return [y, *after, *gains.norm_gradient(grad, x, weight, bias, running_mean, running_var, mean, rstd, eps)]


def normed_by_torch(case, x, grad, *parts, eps=0.01):
    weight, bias, running_mean, running_var = [None if t is None else t.clone() for t in parts]
    leaves = [t if t is None else t.requires_grad_() for t in (x.clone(), weight, bias)]
    y = F.batch_norm(
        leaves[0], running_mean, running_var, *leaves[1:], case.batch_statistics, case.momentum, eps)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
    return [y.detach(), running_mean, running_var, *grads, *(None,) * (3 - len(grads))]


def as_double(tensors):
    return [None if t is None else t.double() for t in tensors]


NORMS = [Normed(33, 5), Normed(2, 1), Normed(2, 48, running=False), Normed(33, 130, affine=False, momentum=0.7),
         Normed(700, 48), Normed(1, 5, False), Normed(2, 48, False, affine=False), Normed(700, 130, False)]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case, dtype', [
    pytest.param(case, dtype, marks=() if dtype == torch.float64 or i in (0, 5) else pytest.mark.sweep)
    for dtype in DTYPES for i, case in enumerate(NORMS)], ids=str)
def test_norm(case, dtype, device):
    """Output, running statistics and gradients."""
    tensors = case.tensors(dtype, device)
    eps = 1. if case.b == 2 else 0.01  # of two samples the gradient is a difference of near numbers where eps is small
    actual = normed(case, *tensors, eps=eps)
    expected = normed_by_torch(case, *as_double(tensors), eps=eps)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert a.dtype == dtype and a.shape == e.shape
            assert error(a, e.cpu()) <= 2 * TOLERANCES[dtype]
    if case.running:
        assert torch.equal(actual[1], tensors[4]) != case.batch_statistics


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('running', [True, False])
def test_norm_of_a_common_offset(running, device):
    """float32 as accurate as torch's, where all samples are far from zero."""
    case = Normed(64, 5, running=running)
    x, *others = case.tensors(torch.float32, device)
    x += 1000
    exact = normed_by_torch(case, x.double(), *as_double(others))
    actual, torchs = normed(case, x, *others), normed_by_torch(case, x, *others)
    for a, t, e in zip(actual, torchs, exact):
        if a is not None:
            assert error(a, e.cpu()) <= max(2 * error(t, e.cpu()), 1e-6)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('batch_statistics', [True, False])
def test_norm_not_a_number(batch_statistics, device):
    """As in torch: all of the channel with the statistics of the batch, the sample alone with fixed ones."""
    case = Normed(3, 4, batch_statistics)
    x, *others = case.tensors(torch.float64, device)
    x[1, 2] = float('nan')
    for a, e in zip(normed(case, x, *others), normed_by_torch(case, x, *others)):
        assert torch.equal(a.isnan(), e.isnan())
        assert error(a.nan_to_num(), e.nan_to_num().cpu()) <= 2e-15


@pytest.mark.parametrize('device', DEVICES)
def test_norm_of_any_layout_and_dtype(device):
    """Running statistics that are parts of others are updated in place; a half trunk has parameters of float32."""
    case = Normed(9, 5)
    x, grad, weight, bias, mean, var = case.tensors(torch.float64, device)
    both = torch.stack([mean, var], 1)
    y, *_ = gains.norm_forward(
        x.t().contiguous().t(), weight, bias, both[:, 0], both[:, 1], True, case.momentum, 0.01)
    expected = normed_by_torch(case, x, grad, weight, bias, mean, var)
    for a, e in zip((y, both[:, 0], both[:, 1]), expected):
        assert error(a, e.cpu()) <= 2e-15
    halves = *[t.bfloat16() for t in (x, grad)], *[t.float() for t in (weight, bias, mean, var)]
    for i, (a, e) in enumerate(zip(normed(case, *halves), normed_by_torch(case, *as_double(halves)))):
        assert a.dtype == (torch.bfloat16 if i in (0, 3) else torch.float32)
        assert error(a, e.cpu()) <= TOLERANCES[a.dtype]


@pytest.mark.parametrize('shapes', [
    ((2, 3, 1), (3,), (3,), (3,), (3,)), ((2, 3), (2,), (3,), (3,), (3,)), ((2, 3), None, None, (3,), None)], ids=str)
def test_norm_shapes(shapes):
    with pytest.raises(ValueError, match=r'The norm wants x \(B, K\).* got \[2, 3'):
        gains.norm_forward(*[None if s is None else torch.empty(s) for s in shapes], True, 0.1, 0.)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case, dtype', EXACT, ids=str)
def test_heads(case, dtype, device):
    tensors = case.heads(dtype, device)
    actual = results(called_heads, tensors)
    assert {y.dtype for y in actual} == {dtype} and len(actual) == case.parts + len(tensors)
    check(actual, tensors, heads_definition, TOLERANCES[dtype])
    with torch.no_grad():
        assert all(map(torch.equal, called_heads(*tensors), actual))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_parameters_of_an_exact_mean(dtype, device):
    """A half model: FreqSelect's parts of the mean are float32."""
    tensors = Case(bias=True).trunk(dtype, device, torch.float32)
    actual = results(gains.trunk, tensors)
    assert actual[0].dtype == dtype
    check(actual, tensors, trunk_definition, TOLERANCES[dtype])


@pytest.mark.parametrize('device', DEVICES)
def test_autocast_changes_nothing(device):
    tensors, more = Case().trunk(torch.float32, device), Case().heads(torch.float32, device)
    expected = results(gains.trunk, tensors), results(called_heads, more)
    with torch.autocast(device, torch.bfloat16):
        actual = results(gains.trunk, tensors), results(called_heads, more)
    for a, e in zip(actual, expected):
        assert all(map(torch.equal, a, e))


@pytest.mark.parametrize('device', DEVICES)
def test_layouts(device):
    """Slices, transposed parameters and expanded gradients are read as what they say."""
    def strided(t):
        return t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_()

    case = Case(bias=True)
    for function, definition, tensors in (
            (gains.trunk, trunk_definition, case.trunk(device=device)),
            (called_heads, heads_definition, case.heads(device=device))):
        tensors = [strided(t) for t in tensors]
        assert not tensors[0].is_contiguous() and not tensors[-1].is_contiguous()
        check(results(function, tensors), tensors, definition, 2e-15)
        ys, expected = function(*tensors), definition(*tensors)
        sums = [sum(y.sum() for y in (ys if isinstance(ys, list) else [ys])) for ys in (ys, expected)]
        for a, e in zip(*(torch.autograd.grad(s, tensors) for s in sums)):
            assert error(a, e.cpu()) <= 2e-15


@pytest.mark.parametrize('device', DEVICES)
def test_the_gradient_of_the_parts_is_not_copied(device):
    """Each of the n parts has the same gradient: one row per sample, which the band mix's gradient reads n times."""
    means, weight = Case(2, 50, 8).trunk(device=device)
    seen = []
    aliased = means.view_as(means)
    aliased.register_hook(lambda grad: seen.append(grad.stride()))
    gains.trunk(aliased, weight).sum().backward()
    assert seen == [(8, 0, 1)]


@pytest.mark.parametrize('device', DEVICES)
def test_empty_batch(device):
    for function, tensors in (
            (gains.trunk, Case(0, bias=True).trunk(device=device)), (called_heads, Case(0).heads(device=device))):
        actual = results(function, tensors)
        assert all(t.shape[0] == 0 for t in actual[:-len(tensors) + 1])
        assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(actual[-len(tensors):], tensors))


@pytest.mark.parametrize('device', DEVICES)
def test_no_uninitialised_memory(device):
    """Memory that nothing was written to holds NaN here, so that reading it shows; and twice the same is the same."""
    case = Case(33, 3, 17, 18, 35, bias=True)
    more = case.trunk(torch.float32, device), case.heads(torch.float32, device)
    torch.use_deterministic_algorithms(True)  # with it torch.empty is filled with NaN
    try:
        assert torch.empty(10).isnan().all()
        actual, again = ([results(f, t) for f, t in zip((gains.trunk, called_heads), more)] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(actual, again):
        assert all(map(torch.equal, a, b)) and all(t.isfinite().all() for t in a)


@pytest.mark.parametrize('device', DEVICES)
def test_not_a_number(device):
    """As through torch's ReLU: NaN stays NaN, and has a gradient."""
    tensors = Case(2, width=2, o=3, parts=1).heads(device=device)
    with torch.no_grad():
        tensors[0][0, 0] = float('nan')
    for a, e in zip(results(called_heads, tensors), results(heads_definition, tensors)):
        assert torch.equal(a.isnan(), e.isnan()) and error(a.nan_to_num(), e.nan_to_num().cpu()) <= 2e-15


@pytest.mark.parametrize('device', DEVICES)
def test_one_head_alone_is_differentiated(device):
    tensors = Case().heads(device=device)
    for i in (0, 1):
        actual = torch.autograd.grad(gains.heads(*tensors)[i].sum(), tensors)
        expected = torch.autograd.grad(heads_definition(*tensors)[i].sum(), tensors, allow_unused=True)
        for a, e in zip(actual, expected):
            assert a.count_nonzero() == 0 if e is None else error(a, e.cpu()) <= 2e-15


@pytest.mark.parametrize('device', DEVICES)
def test_frozen_parameters_and_frozen_map(device):
    case = Case(bias=True)
    for function, tensors in ((gains.trunk, case.trunk(device=device)), (called_heads, case.heads(device=device))):
        expected = results(function, tensors)[-len(tensors):]
        for i, grad in enumerate(expected):
            only = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors)]
            ys = function(*only)
            ys = ys if isinstance(ys, list) else [ys]
            cotangents = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).view(y.shape).cos()
                          .bfloat16().to(y.dtype) for y in ys]
            torch.autograd.backward(ys, cotangents)
            assert torch.equal(only[i].grad, grad) and all(t.grad is None for t in only if t is not only[i])


def test_second_derivatives_are_refused():
    if not triton_support.is_interpreted():
        pytest.skip('the kernels are compiled here')
    for function, tensors in ((gains.trunk, Case().trunk()), (called_heads, Case().heads())):
        y = function(*tensors)
        with pytest.raises(NotImplementedError, match="'triton' has no second derivatives"):
            torch.autograd.grad(sum(t.square().sum() for t in y), tensors, create_graph=True)


@pytest.mark.parametrize('shapes, message', [
    (((2, 3, 4), (5, 3)), r'means \(B, n, C\).*got \[2, 3, 4\], \[5, 3\] and None'),
    (((2, 4), (5, 4)), r'got \[2, 4\]'),
    (((2, 3, 4), (5, 4), (4,)), r'and \[4\]')], ids=['channels', 'no parts', 'bias'])
def test_trunk_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        gains.trunk(*(torch.empty(s) for s in shapes))


@pytest.mark.parametrize('shapes, message', [
    (((2, 8), (5, 4), (5,)), r'x \(B, parts \* K\).*got \[2, 8\], \[5, 4\], \[5\], None, None'),
    (((2, 8), (5, 4), (5,), (6, 4), (6,)), r'\[6, 4\], \[6\]'),
    (((2, 4), (5, 4), (4,)), r'\[4\], None, None')], ids=['width', 'other outputs', 'bias'])
def test_heads_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        gains.heads(*(torch.empty(s) for s in shapes))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('parts', [1, 2])
def test_opcheck(parts, device):
    case = Case(2, parts=parts, bias=parts == 1)
    means, weight, *bias = case.trunk(torch.float32, device)
    torch.library.opcheck(operator.gains_trunk, (means, weight, bias[0] if bias else None))
    x, *parameters = case.heads(torch.float32, device)
    parameters += [None] * (4 - len(parameters))
    torch.library.opcheck(operator.gains_heads, (x, *parameters))
    with torch.no_grad():
        y, mean = operator.gains_trunk(means, weight, None)
        torch.library.opcheck(operator.gains_trunk_backward, (y, mean, weight, bias[0] if bias else None))
        y, y_2 = operator.gains_heads(x, *parameters)
        torch.library.opcheck(operator.gains_heads_backward, (
            y, y_2 if parts == 2 else None, x, parameters[0], parameters[2]))


@pytest.mark.parametrize('device', DEVICES)
def test_compile(device):
    """With the gradient in the graph, for any batch."""
    def both(means, weight, *parameters):
        return gains.heads(gains.trunk(means, weight), *parameters)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend='inductor' if device == 'cuda' else 'aot_eager')
    for b in (3, 5):
        tensors = *Case(b).trunk(device=device), *Case(b).heads(device=device)[1:]
        for a, e in zip(results(compiled, tensors), results(both, tensors)):
            assert error(a.detach(), e.detach().cpu()) <= 2e-15


@pytest.mark.gpu
@pytest.mark.parametrize('device', ['cuda'])
def test_cuda_graph(device):
    """A captured graph follows its inputs."""
    tensors = Case().heads(torch.float32, device)
    results(called_heads, tensors)  # the kernels are compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = called_heads(*tensors)
        grads = torch.autograd.grad(ys, tensors, [torch.ones_like(y) for y in ys])
    with torch.no_grad():
        tensors[0].normal_()
    graph.replay()
    expected = heads_definition(*tensors)
    for a, e in zip((*ys, *grads), (*expected, *torch.autograd.grad(sum(y.sum() for y in expected), tensors))):
        assert error(a.detach(), e.detach().cpu()) <= 1e-6


def test_few_launches_and_no_copies(monkeypatch):
    """One kernel per pass for the trunk, the norm and both heads, one in inference; a CUDA graph can hold them."""
    launches = []
    monkeypatch.setattr(triton_support, 'launch', lambda this, *tensors: launches.append(this))
    with no_copies():
        for dtype in (torch.float16, torch.float32):
            means, weight = torch.empty(2, 3, 8, device='cuda'), torch.empty(32, 8, dtype=dtype, device='cuda')
            y, mean = operator.gains_trunk._init_fn(means, weight, None)
            some = torch.empty(32, dtype=dtype, device='cuda')
            for batch_statistics in (True, False):
                _, *saved = gains.norm_forward(y, some, some, some, some, batch_statistics, 0.1, 0.)
                gains.norm_gradient(y, y, some, some, some, some, *saved, 0.)
            operator.gains_trunk_backward._init_fn(y, mean, weight, None)
            weight, bias = (torch.empty(s, dtype=dtype, device='cuda') for s in ((12, 16), (12,)))
            ys = operator.gains_heads._init_fn(y, weight, bias, weight, bias)
            operator.gains_heads_backward._init_fn(*ys, y, weight, weight)
            fc_weight = torch.empty(32, 8, dtype=dtype, device='cuda')
            gains.trunk_and_heads(means, fc_weight, None, (some,) * 4, 0., weight, bias, weight, bias)
    assert len(launches) == 2 * 9


@pytest.mark.parametrize('parts', [1, 2])
def test_flops(parts):
    """Those of torch's linear layers, forward and backward."""
    def of(function, tensors):
        tensors = [t.detach().to('meta').requires_grad_() for t in tensors]
        with FlopCounterMode(display=False) as counter:
            results(function, tensors)
        return counter.get_total_flops()

    case = Case(parts=parts)
    assert of(gains.trunk, case.trunk()) == of(trunk_definition, case.trunk()) > 0
    assert of(called_heads, case.heads()) == of(heads_definition, case.heads()) > 0
