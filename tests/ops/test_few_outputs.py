"""The convolution with few outputs in Triton: against torch's in float64, with every gradient.

On a CPU in Triton's interpreter; `pytest -m gpu` runs the same on a GPU, where the kernels are compiled.
"""
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fadc_timm.layers.predictor_conv import PredictorConv2d
from fadc_timm.ops import few_outputs, triton_support
from fadc_timm.ops.few_outputs.operator import few_outputs_conv2d_backward
from tests.support.cases import error
from tests.support.no_copies import no_copies

pytest.importorskip('triton')

pytestmark = pytest.mark.usefixtures('one_thread', 'skip_where_compiled')

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
OPTIONS = (1, 1), (1, 1), (1, 1)


class Case(NamedTuple):
    """shape: (B, C, H, W); kernel: (O, k, k'); then stride, padding, dilation, each of rows and columns."""
    shape: tuple
    kernel: tuple
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    bias: bool = True

    def tensors(self, dtype, device):
        """x, weight and bias, whose values the dtype holds, in double precision."""
        torch.manual_seed(0)
        o, k, k_w = self.kernel
        drawn = torch.randn(self.shape), torch.randn(o, self.shape[1], k, k_w), torch.randn(o)
        x, weight, bias = (t.to(device, dtype).double() for t in drawn)
        return x, weight, bias if self.bias else None

    @property
    def options(self):
        return self.stride, self.padding, self.dilation

    def __str__(self):
        sizes = *self.shape, *self.kernel, *self.stride, *self.padding, *self.dilation, int(self.bias)
        return '_'.join(map(str, sizes))


CASES = [
    Case((1, 1, 1, 1), (1, 1, 1), padding=(0, 0)),
    Case((2, 5, 7, 6), (3, 3, 3)),
    Case((2, 8, 9, 7), (10, 3, 3), stride=(2, 2)),
    Case((1, 6, 5, 8), (1, 7, 7), padding=(3, 3)),
    Case((3, 4, 6, 5), (49, 1, 1), padding=(0, 0)),
    Case((2, 3, 8, 9), (2, 3, 5), stride=(3, 1), padding=(4, 0), dilation=(1, 2), bias=False),
    Case((1, 3, 4, 5), (2, 2, 2), padding=(3, 2)),
    Case((1, 16, 3, 33), (27, 3, 3), stride=(1, 2)),
    Case((2, 3, 6, 5), (2, 5, 1), padding=(2, 0)),
    Case((5, 33, 12, 11), (4, 3, 3), padding=(2, 2), dilation=(2, 2))]

# largest error measured, relative to the largest number
TOLERANCES = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def results(f, tensors, options, dtype=torch.float64):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = f(*leaves, *options)
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).cos().bfloat16()
    wanted = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('count', [1, 2, 3])
def test_pack(count, device):
    """Tap k of output o in row k*O + o, and zeros behind, for each weight; in one launch."""
    kernels = [(3, 5, 3, 3), (1, 70, 2, 4), (49, 40, 1, 1)][:count]
    weights = [torch.randn(kernel, device=device) for kernel in kernels]
    weights[-1] = weights[-1].to(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        for weight, taps in zip(weights, few_outputs.pack(weights, dtype), strict=True):
            rows = weight.permute(2, 3, 0, 1).flatten(0, 2)
            assert torch.equal(taps[:len(rows)], rows.to(dtype)) and not taps[len(rows):].any()
            assert taps.shape[0] % 8 == 0 and taps.shape[0] - len(rows) < 8


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_values_and_gradients(case, dtype, device):
    tensors = case.tensors(dtype, device)
    expected = results(F.conv2d, tensors, case.options)
    found = results(few_outputs.call, [None if t is None else t.to(dtype) for t in tensors], case.options)
    assert found[0].dtype == dtype and found[0].is_contiguous(memory_format=torch.channels_last)
    for value, want in zip(found, expected, strict=True):
        assert value.dtype == dtype and error(value, want) < TOLERANCES[dtype]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_parameters_in_float32_and_layouts(layout, device):
    """As under autocast: a half map and float32 parameters, each in any layout; the gradient comes in any strides."""
    case = CASES[2]
    x, weight, bias = case.tensors(torch.float16, device)
    expected = results(F.conv2d, (x, weight, bias), case.options)
    odd = weight.float().transpose(2, 3).contiguous().transpose(2, 3)
    for w in (weight.float().to(memory_format=layout), odd):
        leaves = [t.detach().requires_grad_() for t in (x.half().to(memory_format=layout), w, bias.float())]
        y = few_outputs.call(*leaves, *case.options)
        grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).view(y.shape).cos().bfloat16()
        for stored in (grad.half(), grad.half().transpose(1, 3).contiguous().transpose(1, 3)):
            grads = torch.autograd.grad(y, leaves, stored, retain_graph=True)
            for t, g, want in zip(leaves, grads, expected[1:]):
                assert g.dtype == t.dtype and error(g, want) < 1e-3


@pytest.mark.parametrize('device', DEVICES)
def test_no_images(device):
    x, weight, bias = CASES[1].tensors(torch.float64, device)
    y, *grads = results(few_outputs.call, (x[:0], weight, bias), OPTIONS)
    assert y.shape == (0, 3, 7, 6) and [g.shape for g in grads] == [(0, 5, 7, 6), weight.shape, bias.shape]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize('device', DEVICES)
def test_taps_of_one_column(device):
    """A transposed row is contiguous for torch, whatever the stride of its only column."""
    x, weight, bias = Case((2, 3, 6, 5), (2, 1, 5)).tensors(torch.float64, device)
    weight = weight.transpose(2, 3)
    assert weight.is_contiguous() and weight.stride(3) != 1
    options = (1, 1), (2, 0), (1, 1)
    found, expected = (results(f, (x, weight, bias), options) for f in (few_outputs.call, F.conv2d))
    for value, want in zip(found, expected, strict=True):
        assert error(value, want) < 1e-14


@pytest.mark.parametrize('device', DEVICES)
def test_bias_that_is_a_view(device):
    x, weight = torch.randn(1, 4, 5, 5, device=device), torch.randn(3, 4, 3, 3, device=device)
    bias = torch.randn(6, device=device)[::2].requires_grad_()
    y = few_outputs.call(x, weight, bias, (1, 1), (1, 1), (1, 1))
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=1), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 25.))


@pytest.mark.parametrize('device', DEVICES)
def test_wrong_channels(device):
    x, weight = torch.randn(1, 6, 5, 5, device=device), torch.randn(3, 4, 3, 3, device=device)
    with pytest.raises(ValueError, match='4 channels'):
        few_outputs.call(x, weight, None, (1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize('device', DEVICES)
def test_second_derivatives(device):
    """Those of torch's convolution."""
    tensors = CASES[1].tensors(torch.float64, device)
    found = []
    for f in (few_outputs.call, F.conv2d):
        leaves = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(f(*leaves, *OPTIONS).square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for a, b in zip(*found, strict=True):
        assert error(a, b) < 1e-13


@pytest.mark.parametrize('device', DEVICES)
def test_compiled(device):
    """One graph, of the same values; FLOPs are those of the convolution."""
    torch.compiler.reset()
    case = CASES[2]
    tensors = case.tensors(torch.float64, device)
    compiled = torch.compile(few_outputs.call, backend='aot_eager', fullgraph=True)
    expected = results(F.conv2d, tensors, case.options)
    for value, want in zip(results(compiled, tensors, case.options), expected, strict=True):
        assert error(value, want) < 1e-14
    totals = []
    for f in (few_outputs.call, F.conv2d):
        with FlopCounterMode(display=False) as counter:
            results(f, tensors, case.options)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize('device', DEVICES)
def test_operator_is_right_for_torch(device):
    x, weight, bias = (t.requires_grad_() for t in CASES[1].tensors(torch.float64, device))
    for images in (x, x.detach()[:0].requires_grad_()):
        torch.library.opcheck(few_outputs.few_outputs_conv2d, (images, weight, bias, [1, 1], [1, 1], [1, 1]))


def test_nothing_is_copied_to_the_device(monkeypatch):
    """So that a CUDA graph can hold a step."""
    launches = []
    monkeypatch.setattr(triton_support, 'launch', lambda this, *tensors: launches.append(this))
    with no_copies():
        for dtype in (torch.float16, torch.float32):
            x = torch.empty(2, 8, 9, 7, dtype=dtype, device='cuda')
            weight, bias = torch.empty(10, 8, 3, 3, device='cuda'), torch.empty(10, device='cuda')
            y, taps = few_outputs.few_outputs_conv2d._init_fn(x, weight, bias, *OPTIONS)
            few_outputs_conv2d_backward._init_fn(y, taps, x, weight, bias, *OPTIONS)
    assert len(launches) == 2 * 4


@pytest.mark.parametrize('device', DEVICES)
def test_gradient_added_to_another(device):
    x, weight, bias = Case((2, 5, 4, 3), (3, 3, 3)).tensors(torch.float64, device)
    x = x.to(memory_format=torch.channels_last)
    y, taps = few_outputs.forward(x, weight, bias, *OPTIONS)
    other = torch.randn_like(x)
    expected, *same = few_outputs.gradient(y, taps, x, weight, bias, *OPTIONS)
    into = other.clone()
    actual, *others = few_outputs.gradient(y, taps, x, weight, bias, *OPTIONS, into)
    assert actual is into and error(actual, expected + other) < 1e-14
    assert all(map(torch.equal, others, same))
    assert few_outputs.gradient(y[:0], taps, x[:0], weight, bias, *OPTIONS, into)[0] is into


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case', [
    CASES[2], CASES[6], CASES[2]._replace(bias=False), CASES[6]._replace(bias=False)], ids=str)
def test_shares_in_the_gradient_of_the_bias(case, device, monkeypatch):
    """As many as there are blocks of positions, be these fewer than the pixels (stride) or more (padding)."""
    tensors, launched, launch = {}, {}, triton_support.launch

    def record(this, *given):
        name = this.kernel.fn.__name__
        tensors[name], launched[name] = given, this
        launch(this, *given)

    monkeypatch.setattr(triton_support, 'launch', record)
    x, weight, bias = case.tensors(torch.float64, device)
    y, taps = few_outputs.forward(x, weight, bias, *case.options)
    grad = torch.randint(-9, 9, y.shape, dtype=torch.float64, device=device)
    found = few_outputs.gradient(grad, taps, x, weight, bias, *case.options)
    shares, grid = tensors['spread'][2], launched['spread'].grid
    assert tensors['unpack'][1] is shares
    if bias is None:
        assert shares is None
    else:
        block = 2048 // 64 if case is CASES[2] else 2048 // 16
        assert len(shares) == -(-grad[:, 0].numel() // block) == launched['unpack'].numbers[3]
        assert len(shares) <= grid[0] and (len(shares) < grid[0] or case is not CASES[2])
        assert torch.equal(found[2], grad.sum((0, 2, 3)))  # of whole numbers, so exact
    expected = torch.autograd.grad(
        F.conv2d(x.requires_grad_(), weight.requires_grad_(), bias, *case.options), (x, weight), grad)
    for value, want in zip(found, expected):
        assert error(value, want) < 1e-14


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('added', [False, True])
def test_autocast_changes_no_product(added, device):
    """Neither those that write to a tensor nor the others, in a gradient that is taken under autocast."""
    x, weight, bias = (t.float() for t in CASES[2].tensors(torch.float32, device))
    x = x.to(memory_format=torch.channels_last)

    def run():
        y, taps = few_outputs.forward(x, weight, bias, *CASES[2].options)
        return y, *few_outputs.gradient(
            y, taps, x, weight, bias, *CASES[2].options, x.clone() if added else None)

    expected = run()
    with torch.autocast(device, torch.bfloat16):
        assert all(map(torch.equal, run(), expected))


def test_where_it_is_taken(monkeypatch):
    """In half precision, where Triton is the default, with few products; a layer computes the same there."""
    monkeypatch.setattr(triton_support, 'is_default_on', lambda device_type: device_type == 'cpu')
    torch.manual_seed(0)
    conv = PredictorConv2d(6, 3, 3, padding=1)
    torch.nn.init.normal_(conv.weight)
    x = torch.randn(2, 6, 5, 7)
    many = torch.empty(few_outputs.MOST_PRODUCTS // 9 + 1, 6, 3, 3)
    with torch.autocast('cpu', torch.bfloat16):
        assert few_outputs.suits(x, conv.weight, torch.bfloat16)
        assert not few_outputs.suits(x, conv.weight, torch.float32)
        assert not few_outputs.suits(x, many, torch.bfloat16)
        assert not few_outputs.suits(x, conv.weight.to('meta'), torch.bfloat16)
    assert few_outputs.suits(x.bfloat16(), conv.weight.bfloat16(), torch.bfloat16)
    with pytest.raises(RuntimeError):  # as torch's convolution does
        conv(x.bfloat16())
    expected = F.conv2d(x.bfloat16().double(), conv.weight.bfloat16().double(), conv.bias.double(), padding=1)
    with torch.autocast('cpu', torch.bfloat16), torch.profiler.profile() as prof:
        y = conv(x)
    assert y.dtype == torch.bfloat16 and error(y, expected) < 8e-3
    assert not any('conv' in event.key for event in prof.key_averages())
    # float64 stays, as in torch's convolution
    with torch.autocast('cpu', torch.bfloat16):
        y = conv.double()(x.double())
    assert y.dtype == torch.float64 and error(y, F.conv2d(x.double(), conv.weight, conv.bias, padding=1)) < 1e-14
