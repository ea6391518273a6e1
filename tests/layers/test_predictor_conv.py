"""The convolution of few outputs against torch's: values, gradients, compiled and scripted."""
import pytest
import torch
from torch import nn

from fadc_timm.layers.predictor_conv import PredictorConv2d
from tests.support.cases import error
from tests.support.marks import needs_is_exporting

pytestmark = pytest.mark.usefixtures('one_thread')


def pair(*args, **kwargs):
    """The convolution in float64, which starts at zero, and torch's, both with torch's parameters."""
    conv, plain = (cls(*args, **kwargs, dtype=torch.float64) for cls in (PredictorConv2d, nn.Conv2d))
    conv.load_state_dict(plain.state_dict())
    return conv, plain


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('k, padding', [(1, 0), (3, 1), (3, 0), (3, 2), (3, 4), (5, 3), (7, 3), ((3, 5), (0, 4))])
@pytest.mark.parametrize('outputs', [1, 4, 5])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_predictor_conv(layout, outputs, k, padding, bias):
    """The convolution, whatever way it is computed, and its gradients."""
    torch.manual_seed(0)
    conv, plain = pair(6, outputs, k, padding=padding, bias=bias)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    y, expected = conv(x), plain(x)
    assert y.shape == expected.shape and error(y, expected) < 1e-13
    grad = torch.randn_like(y)
    for g, e in zip(*(torch.autograd.grad(t, [x, *m.parameters()], grad) for t, m in ((y, conv), (expected, plain))),
                    strict=True):
        assert error(g, e) < 1e-13


@pytest.mark.parametrize('changed', [dict(padding_mode='circular'), dict(dilation=(2, 2), padding=(2, 2))])
def test_predictor_conv_that_is_changed(changed):
    """It follows its attributes, as every convolution of torch does."""
    conv, plain = pair(4, 2, 3, padding=1)
    for name, value in changed.items():
        for m in (conv, plain):
            setattr(m, name, value)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    assert error(conv(x), plain(x)) < 1e-13


@pytest.mark.parametrize('size', [(1, 1), (2, 9), (7, 8)])
def test_predictor_conv_compiled(size):
    """The form for inductor, on maps smaller than the kernel too."""
    torch.compiler.reset()
    conv, plain = pair(4, 1, 7, padding=3)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    y, expected = torch.compile(conv, backend='aot_eager', fullgraph=True)(x), plain(x)
    assert error(y, expected) < 1e-13
    grad = torch.randn_like(y)
    for g, e in zip(*(torch.autograd.grad(t, [x, *m.parameters()], grad) for t, m in ((y, conv), (expected, plain))),
                    strict=True):
        assert error(g, e) < 1e-13


@needs_is_exporting
@pytest.mark.parametrize('outputs', [1, 3])
@pytest.mark.parametrize('k, stride, padding, dilation', [(3, 1, 1, 1), (5, 2, 3, 1), ((5, 3), (1, 2), (0, 4), (2, 1))])
def test_predictor_conv_exported(k, stride, padding, dilation, outputs):
    """Few outputs, from a map each per column of the kernel; with a kernel too wide for that one convolution."""
    for width, convolutions in ((k, 2), ((k[0] if isinstance(k, tuple) else k, 17), 1)):
        conv, plain = pair(4, outputs, width, stride, padding, dilation)
        x = torch.randn(2, 4, 13, 26, dtype=torch.float64)
        exported = torch.export.export(conv.eval(), (x,))
        assert sum('conv2d' in str(node.target) for node in exported.graph.nodes) == convolutions
        assert error(exported.module()(x), plain(x)) < 1e-13


@pytest.mark.parametrize('outputs, groups', [(1, 1), (3, 1), (6, 1), (6, 2)])
def test_predictor_conv_scripted(outputs, groups):
    conv, plain = pair(4, outputs, 3, padding=1, groups=groups)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    assert error(torch.jit.script(conv)(x), plain(x)) < 1e-13
