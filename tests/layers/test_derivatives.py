"""Derivatives other than a gradient: forward-mode ones, and those under the transforms of torch.func."""
import pytest
import timm
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

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
