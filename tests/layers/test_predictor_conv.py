"""Convolutions of few outputs, computed in another way: values, gradients, hooks, also compiled."""
import pytest
import torch
from torch import nn

from fadc_timm.layers.predictor_conv import convolve
from tests.support.cases import error

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('k, padding', [(1, 0), (3, 1), (3, 0), (3, 2), (3, 4), (5, 3), (7, 3), ((3, 5), (0, 4))])
@pytest.mark.parametrize('outputs', [1, 4, 5])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_predictor_conv(layout, outputs, k, padding, bias):
    """The convolution, whatever way it is computed, and its gradients."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, outputs, k, padding=padding, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    y, expected = convolve(conv, x), conv(x)
    assert y.shape == expected.shape and error(y, expected) < 1e-13
    grad = torch.randn_like(y)
    for g, e in zip(*(torch.autograd.grad(t, [x, *conv.parameters()], grad) for t in (y, expected)), strict=True):
        assert error(g, e) < 1e-13


@pytest.mark.parametrize('size', [(1, 1), (2, 9), (7, 8)])
def test_predictor_conv_compiled(size):
    """The form for inductor, on maps smaller than the kernel too."""
    torch.compiler.reset()
    conv = nn.Conv2d(4, 1, 7, padding=3, dtype=torch.float64)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    y, expected = torch.compile(convolve, backend='aot_eager', fullgraph=True)(conv, x), conv(x)
    assert error(y, expected) < 1e-13
    grad = torch.randn_like(y)
    for g, e in zip(*(torch.autograd.grad(t, [x, *conv.parameters()], grad) for t in (y, expected)), strict=True):
        assert error(g, e) < 1e-13


def test_predictor_conv_calls_hooks():
    conv, calls = nn.Conv2d(6, 1, 3), []
    conv.register_forward_hook(lambda *_: calls.append(1))
    convolve(conv, torch.randn(1, 6, 5, 5))
    assert calls == [1]
