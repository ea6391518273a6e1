"""The operator on any memory layout: strided views, channels last, and the layout that comes out."""
import pytest
import torch

from fadc_timm.ops import list_backends
from tests.support import cases
from tests.support.op_checks import CASE, check, ids, skip_unless_runs

pytestmark = pytest.mark.usefixtures('one_thread')


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
@pytest.mark.parametrize('case', [
    CASE['everything'], CASE['k5'], CASE['depthwise'], CASE['groups2'], CASE['offset']], ids=ids)
@pytest.mark.parametrize('backend', list_backends())
@pytest.mark.interpreted('everything-sliced', 'depthwise-transposed', 'groups2-expanded', 'offset-transposed')
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
    CASE['depthwise_multiplier'], CASE['dilation_groups2'], CASE['offset'], CASE['offset_groups2'],
    CASE['offset_depthwise']], ids=ids)
@pytest.mark.parametrize('backend', list_backends())
@pytest.mark.interpreted('everything-all', 'depthwise-x', 'offset-all')
def test_channels_last(backend, case, only_x):
    inputs = cases.make_inputs(case, torch.float32)
    skip_unless_runs(case, inputs, backend)
    for name, t in inputs.items():
        if name == 'x' or (t.dim() == 4 and not only_x):
            inputs[name] = t.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    actual = cases.results(case, inputs, backend)
    assert actual['out'].is_contiguous(memory_format=torch.channels_last) and not actual['out'].is_contiguous()
    check(case, inputs, actual, cases.oracle(case, torch.float32), torch.float32)


@pytest.mark.parametrize('name', ['everything', 'depthwise', 'plain', 'offset'])
@pytest.mark.parametrize('backend', list_backends())
@pytest.mark.interpreted('plain')
def test_contiguous_stays_contiguous(backend, name):
    inputs = cases.make_inputs(CASE[name], torch.float32)
    skip_unless_runs(CASE[name], inputs, backend)
    assert cases.call(CASE[name], inputs, backend).is_contiguous()
