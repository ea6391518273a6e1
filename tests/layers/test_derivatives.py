"""Derivatives other than a gradient: forward-mode ones, second ones, and under the transforms of torch.func."""
import pytest
import timm
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from fadc_timm import AdaDR, AdaKern, FADConv2d, FreqSelect
from fadc_timm.ops import adaptive_dilated_conv2d, list_backends, mix_bands, set_backend
from tests.support.layer_cases import FAD_CONV, ids, make
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')
TRANSFORMABLE = ('grid_sample', 'reference')


def tensors_like(tensors):
    return tuple(torch.randn_like(t) for t in tensors)


def assert_adjoint(function, inputs, rtol=1e-9):
    """Forward-mode derivatives of both kinds are the transposes of the gradient, taken as always."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    tangents = tensors_like(inputs)
    y = function(*inputs)
    cotangent = torch.randn_like(y)
    grads = torch.autograd.grad(y, inputs, cotangent, allow_unused=True)
    expected = sum((t * g).sum() for t, g in zip(tangents, grads, strict=True) if g is not None)
    inputs = tuple(t.detach() for t in inputs)
    primal, pushed = jvp(function, inputs, tangents)
    torch.testing.assert_close(primal, y.detach(), rtol=1e-10, atol=1e-10)
    assert expected.abs() > 1e-3
    torch.testing.assert_close((pushed * cotangent).sum(), expected, rtol=rtol, atol=rtol)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(inputs, tangents)]
        dual = forward_ad.unpack_dual(function(*duals))
    torch.testing.assert_close(dual.tangent, pushed, rtol=1e-10, atol=1e-10)


def of_module(module):
    """A function of the input and of all parameters, and these."""
    names = [name for name, _ in module.named_parameters()]
    parameters = [p.detach() for p in module.parameters()]

    def function(x, *values):
        return functional_call(module, dict(zip(names, values)), (x,))

    return function, parameters


@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_forward_mode_of_a_layer(cfg):
    m = off_identity(make(**cfg)).double().eval()
    function, parameters = of_module(m)
    assert_adjoint(function, [torch.randn(2, 4, 9, 12, dtype=torch.float64), *parameters])


@pytest.mark.parametrize('module', [
    FreqSelect(4, lowfreq_att=True), FreqSelect(4, spatial_group=2), AdaKern(4, 6), AdaDR(4, 3)],
    ids=lambda m: type(m).__name__)
def test_forward_mode_of_a_module(module):
    function, parameters = of_module(off_identity(module).double().eval())

    def first(*values):
        y = function(*values)
        return torch.cat([t.flatten(1) for t in y], 1) if isinstance(y, tuple) else y

    assert_adjoint(first, [torch.randn(2, 4, 9, 12, dtype=torch.float64), *parameters])


@pytest.mark.parametrize('name', ['test_resnet_fadc', 'test_convnext_fadc'])
def test_forward_mode_of_a_network(name):
    """In float32, as people take it: a derivative, where a part that drops tangents gives another number."""
    m = off_identity(timm.create_model(name, pretrained=False)).eval()
    x, direction = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)

    def logit(x):
        return m(x)[0, 0]

    x.requires_grad_()
    expected = (torch.autograd.grad(logit(x), x)[0] * direction).sum()
    _, pushed = jvp(logit, (x.detach(),), (direction,))
    torch.testing.assert_close(pushed, expected, rtol=2e-3, atol=1e-5)


def arguments():
    torch.manual_seed(0)
    dd = dict(dtype=torch.float64)
    return (torch.randn(2, 4, 7, 8, **dd), torch.randn(6, 4, 3, 3, **dd), 1 + torch.rand(2, 2, 7, 8, **dd),
            torch.rand(2, 18, 7, 8, **dd), torch.randn(6, **dd), *(torch.rand(2, n, **dd) for n in (4, 6, 4, 6)))


def operator(backend=None):
    return lambda x, weight, dilation, mask, bias, *gains: adaptive_dilated_conv2d(
        x, weight, dilation, mask, bias, gains=gains, backend=backend)


def test_forward_mode_of_the_operator():
    assert_adjoint(operator(), arguments())


@pytest.mark.parametrize('backend', list_backends())
def test_a_named_backend_is_right_or_refuses(backend):
    if backend in TRANSFORMABLE:
        assert_adjoint(operator(backend), arguments())
        return
    inputs = [t.float() for t in arguments()]
    match = f"'{backend}' cannot run this call: .*forward-mode derivatives.*'grid_sample' and 'reference' have"
    for call in (operator(backend), lambda *args: with_set_backend(backend, *args)):
        with pytest.raises(NotImplementedError, match=match):
            jvp(call, tuple(inputs), tensors_like(inputs))
        with pytest.raises(NotImplementedError, match=match), forward_ad.dual_level():
            call(*[forward_ad.make_dual(t, torch.ones_like(t)) for t in inputs])


def with_set_backend(backend, *args):
    with set_backend(backend):
        return operator()(*args)


@pytest.mark.parametrize('backend', ['fused', 'triton'])
def test_a_named_band_mix_refuses(backend):
    x, weights = torch.randn(1, 4, 8, 9), torch.rand(1, 3, 2, 8, 9)
    with pytest.raises(NotImplementedError, match='written_out'):
        jvp(lambda x: mix_bands(x, weights, [2, 4, 8], backend), (x,), (x,))


def test_backends_of_torch_reach_freq_select():
    from fadc_timm.ops import band_mix
    x = torch.randn(1, 4, 8, 9)
    assert band_mix.choose_backend(x) == 'fused'
    for backend in TRANSFORMABLE:
        with set_backend(backend):
            assert band_mix.choose_backend(x) == 'written_out'
        assert band_mix.choose_backend(x, backend) == 'written_out'
    m = off_identity(FADConv2d(4, 4, 3, padding=1, backend='reference')).eval()
    torch.testing.assert_close(m(x), off_identity_copy(m)(x), rtol=1e-4, atol=1e-5)


def off_identity_copy(m):
    """The same layer with the backends that are chosen by themselves."""
    other = FADConv2d(4, 4, 3, padding=1).eval()
    other.load_state_dict(m.state_dict())
    return other


# second derivatives

def second(function, inputs, *directions):
    """Gradients of a directional derivative of the gradient."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = function(*inputs)
    grads = torch.autograd.grad(y, inputs, torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y),
                                create_graph=True, allow_unused=True)
    pushed = sum((g * d).sum() for g, d in zip(grads, directions) if g is not None)
    return [g.detach() for g in grads if g is not None], torch.autograd.grad(pushed, inputs, allow_unused=True)


@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_second_derivatives_of_a_layer(cfg):
    """Gradient penalties: those of the definition, in torch's own operators."""
    m = off_identity(make(**cfg)).double().eval()
    function, parameters = of_module(m)
    inputs = [torch.randn(2, 4, 7, 8, dtype=torch.float64), *parameters]
    directions = tensors_like(inputs)
    results = {}
    for backend in (None, 'reference', 'grid_sample'):
        with set_backend(backend):
            results[backend] = second(function, inputs, *directions)
    first, again = results['reference']
    assert sum(g.abs().sum() for g in again if g is not None) > 1e-3
    for backend in (None, 'grid_sample'):
        for a, e in zip((*results[backend][0], *results[backend][1]), (*first, *again), strict=True):
            if e is None or a is None:
                assert e is a or (e if a is None else a).abs().max() == 0
            else:
                torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('backend', [
    None, 'gather', 'grid_sample', pytest.param('reference', marks=pytest.mark.sweep)])
def test_second_derivatives_numerically(backend):
    x, weight, dilation, mask, bias, *gains = arguments()
    inputs = [x[:1, :2, :3, :4], weight[:2, :2], dilation[:1, :, :3, :4], mask[:1, :, :3, :4], bias[:2],
              *(g[:1, :2] for g in gains)]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(operator(backend), inputs, fast_mode=True)


def test_second_derivatives_where_one_input_made_another():
    """The gradient for x does not contain what flows through the dilation, which was computed from x."""
    x, weight = torch.randn(1, 2, 4, 5, dtype=torch.float64), torch.randn(2, 2, 3, 3, dtype=torch.float64)

    def function(x, weight, backend=None):
        dilation = 1.3 + x[:, :1].sigmoid()
        return adaptive_dilated_conv2d(x, weight, dilation, backend=backend)

    directions = tensors_like((x, weight))
    results = [second(lambda *args, b=b: function(*args, b), (x, weight), *directions) for b in (None, 'reference')]
    for a, e in zip(*results):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize('backend', ['torchvision', 'triton'])
def test_backends_without_second_derivatives_say_so(backend):
    inputs = [t.float().requires_grad_() for t in arguments()]
    y = operator(backend)(*inputs)
    torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    with pytest.raises(NotImplementedError, match=f"'{backend}' has no second derivatives.*set_backend.'grid_sample'"):
        torch.autograd.grad(y.sum(), inputs, create_graph=True)
    if backend == 'triton':
        x = torch.randn(1, 4, 8, 9, requires_grad=True)
        for y in (mix_bands(x, torch.rand(1, 3, 2, 8, 9), [2, 4, 8], backend), FADConv2d(4, 4, 3, backend=backend)(x)):
            with pytest.raises(NotImplementedError, match='no second derivatives'):
                torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize('name', ['test_resnet_fadc', 'test_convnext_fadc'])
def test_gradient_penalty_of_a_network(name):
    """Both ways to the same Hessian-vector product: reverse over reverse, and forward over reverse."""
    m = off_identity(timm.create_model(name, pretrained=False)).double().eval()
    x, v = (torch.randn(1, 3, 32, 32, dtype=torch.float64) for _ in range(2))

    def loss(x):
        return m(x).square().mean()

    _, expected = torch.autograd.functional.hvp(loss, x, v)
    _, pushed = jvp(grad(loss), (x,), (v,))
    assert expected.abs().max() > 0
    torch.testing.assert_close(pushed, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


# transforms of torch.func

@pytest.mark.parametrize('name', ['test_resnet_fadc', 'test_convnext_fadc'])
def test_gradients_per_sample(name):
    """What Opacus and influence functions take: vmap of grad, with functional_call."""
    m = off_identity(timm.create_model(name, pretrained=False)).eval()
    parameters = {k: p.detach() for k, p in m.named_parameters()}
    x = torch.randn(3, 3, 32, 32)

    def loss(parameters, x):
        return functional_call(m, parameters, (x[None],)).square().mean()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        m.zero_grad()
        loss(dict(m.named_parameters()), x[i]).backward()
        for k, p in m.named_parameters():
            torch.testing.assert_close(each[k][i], p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max().item() + 1e-7)


@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_ensemble_of_layers(cfg):
    members = [off_identity(make(**cfg)).eval() for _ in range(2)]
    x = torch.randn(2, 4, 7, 8)
    stacked = {k: torch.stack([m.state_dict()[k] for m in members]) for k in members[0].state_dict()}
    together = vmap(lambda state: functional_call(members[0], state, (x,)))(stacked)
    for a, m in zip(together, members, strict=True):
        torch.testing.assert_close(a, m(x), rtol=1e-4, atol=1e-4)


def test_many_gradients_at_once():
    """jacobian(vectorize=True) is vmap over the backward pass."""
    m = off_identity(FADConv2d(2, 2, 3, padding=1)).double().eval()
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    one, many = (torch.autograd.functional.jacobian(m, x, vectorize=v) for v in (False, True))
    torch.testing.assert_close(many, one)
