"""The objective for the dilation map: the power that it is about, its sign, and its gradients."""
import math

import numpy as np
import pytest
import torch
from torch import nn

import fadc_timm
from fadc_timm.layers import FADConv2d
from fadc_timm.losses import (
    DilationRecord,
    dilation_frequency_loss,
    high_frequency_power,
    power_at_outputs,
    record_dilations,
)

pytestmark = pytest.mark.usefixtures('one_thread')


def slow_power(x, window, cutoff):
    """The definition, a window at a time: x (C, H, W) float64."""
    side = window // 2
    padded = np.pad(x, ((0, 0), (side, side), (side, side)), mode='edge')
    f = np.abs(np.fft.fftfreq(window))
    high = np.maximum(f[:, None], f) > cutoff
    out = np.zeros(x.shape[1:])
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            spectrum = np.fft.fft2(padded[:, i:i + window, j:j + window])
            out[i, j] = (np.abs(spectrum[:, high]) ** 2).sum() / len(x) / window ** 4
    return out


def halves(height=24, width=32):
    """(1, 3, H, W): a smooth left half, a checkered right half."""
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    smooth = torch.sin(2 * math.pi * rows / height)
    checks = ((rows + cols) % 2) * 2. - 1
    return torch.where(cols < width // 2, smooth, checks).expand(1, 3, -1, -1).contiguous()


# --- power ---


@pytest.mark.parametrize('window, cutoff, size', [
    (7, 0.25, (9, 11)), (5, 0.25, (6, 4)), (3, 0., (5, 5)), (9, 0.1, (4, 13)), (7, 0.25, (1, 1)), (7, 0.25, (1, 8))])
def test_power_is_that_of_the_fourier_transform_of_windows(window, cutoff, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    out = high_frequency_power(x, window, cutoff)
    expected = np.stack([slow_power(image, window, cutoff)[None] for image in x.numpy()])
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-10, atol=1e-14)  # measured: 3e-14


def test_power_of_groups_and_of_chunks(monkeypatch):
    x = torch.randn(3, 6, 10, 9)
    out = high_frequency_power(x, groups=2)
    torch.testing.assert_close(out[:, 1:], high_frequency_power(x[:, 3:]))
    monkeypatch.setattr(fadc_timm.losses, '_CHUNK_BYTES', 1)
    torch.testing.assert_close(high_frequency_power(x, groups=2), out)


def test_power_of_waves():
    """A wave of amplitude 1 has a mean square of 1/2, all of it or nothing of it above the cutoff."""
    i = torch.arange(70, dtype=torch.float64)
    for k, expected in ((1, 0), (2, 0.5), (3, 0.5)):  # 1/7, 2/7, 3/7 cycles per pixel
        x = torch.cos(2 * math.pi * k * i / 7).expand(1, 1, 70, 70)
        for wave in (x, x.transpose(2, 3)):
            torch.testing.assert_close(
                high_frequency_power(wave)[:, :, 3:-3, 3:-3], torch.full((1, 1, 64, 64), expected, dtype=x.dtype))


def test_power_of_a_constant_does_not_come_from_rounding():
    assert high_frequency_power(torch.full((1, 2, 8, 8), 1e4)).max() < 1e-4  # 1e8 times 1e-12


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_power_of_half_dtypes(dtype, tolerance):
    x = torch.randn(2, 4, 12, 9)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = high_frequency_power(x.to(dtype))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, high_frequency_power(x), rtol=tolerance, atol=tolerance)
    assert high_frequency_power(x.double()).dtype == torch.float64


@pytest.mark.parametrize('args, message', [
    (dict(window=4), 'odd number of pixels, got 4'), (dict(window=True), 'window must be'),
    (dict(window=7, cutoff=0.43), 'below 0.429 cycles'), (dict(cutoff=-0.1), 'cutoff=-0.1'),
    (dict(window=1), 'window of 1 pixels'), (dict(groups=2), 'groups=2 does not divide 3'),
    (dict(x=torch.zeros(3, 8, 8)), r'\[3, 8, 8\]'), (dict(x=torch.zeros(1, 3, 8, 8, dtype=torch.int64)), 'int64'),
])
def test_power_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        high_frequency_power(**{'x': torch.zeros(1, 3, 8, 8), **args})


@pytest.mark.parametrize('args', [
    dict(padding=1), dict(padding=1, stride=2), dict(padding=2, dilation=2), dict(padding=0),
    dict(padding=0, dilation=2), dict(padding=1, stride=2, padding_mode='replicate')])
def test_power_is_taken_where_the_kernel_is_centred(args):
    layer = FADConv2d(1, 1, 3, **args, freq_select=False, kernel_decompose='none', bias=False)
    x = torch.randn(1, 1, 11, 14)
    with torch.no_grad():
        layer.weight.zero_()[:, :, 1, 1] = 1  # the output is the input at the centres
        y = layer(x)
    torch.testing.assert_close(power_at_outputs(x, layer, *y.shape[2:]), y, atol=1e-4, rtol=1e-4)


# --- loss ---


def test_sign_by_descent_on_a_layer():
    """Minimising it lowers the dilation of the textured half and raises that of the smooth half."""
    layer = FADConv2d(3, 4, 3, padding=1, dilation=2)
    x = halves()
    optimizer = torch.optim.SGD(layer.ada_dr.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        with record_dilations(layer) as records:
            layer(x)
        loss = dilation_frequency_loss(records)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    dilation = records[0].dilation[0, 0, 4:-4].mean(0)
    assert abs(losses[0]) < 1e-4 and losses[-1] < -0.2
    assert dilation[20:28].mean() < 2 - 0.02 and dilation[4:12].mean() > 2 + 0.1


def test_value_and_gradient_on_halves():
    power = high_frequency_power(halves())
    dilation = torch.full_like(power, 2).requires_grad_()
    loss = dilation_frequency_loss([DilationRecord('layer', dilation, power)])
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    smooth, textured = dilation.grad[..., :13], dilation.grad[..., 19:]
    assert smooth.max() <= 0 and textured.min() >= 0  # a descent step raises the one and lowers the other
    assert smooth.sum() == pytest.approx(-1, abs=1e-5) and textured.sum() == pytest.approx(1, abs=1e-5)

    moved = dilation.detach() - torch.sign(dilation.grad)
    with torch.no_grad():
        assert dilation_frequency_loss([DilationRecord('layer', moved, power)]).item() == pytest.approx(-2, rel=1e-5)


def test_definition():
    """Means over the quarters, by sorting; over images, groups and layers."""
    records, expected = [], []
    for shape in ((2, 1, 6, 7), (2, 2, 3, 3)):
        dilation, power = torch.rand(shape, dtype=torch.float64) + 1, torch.rand(shape, dtype=torch.float64)
        records.append(DilationRecord('layer', dilation, power))
        values = []
        for d, p in zip(dilation.reshape(-1, shape[2] * shape[3]), power.reshape(-1, shape[2] * shape[3])):
            order, n = p.argsort(), p.numel() // 4
            values.append(d[order[-n:]].mean() - d[order[:n]].mean())
        expected.append(torch.stack(values).mean())
    with torch.no_grad():
        torch.testing.assert_close(dilation_frequency_loss(records), torch.stack(expected).mean())


def test_equal_powers_share_their_places():
    dilation = torch.arange(8.).reshape(1, 1, 2, 4)
    power = torch.tensor([5., 0, 0, 0, 0, 0, 0, 0]).reshape(1, 1, 2, 4)
    with torch.no_grad():
        value = dilation_frequency_loss([DilationRecord('a', dilation, power)])
        # of two places above one is the first position's, the other shared by the seven that also share those below
        assert value.item() == pytest.approx((0 + 4) / 2 - 4)
        assert dilation_frequency_loss([DilationRecord('a', dilation, power * 0)]).item() == pytest.approx(0)
        assert dilation_frequency_loss([DilationRecord('a', dilation, power * torch.nan)]).isnan()
        one = torch.ones(1, 1, 1, 1)
        assert dilation_frequency_loss([DilationRecord('a', one, one)]).item() == 0


def test_limit():
    power = high_frequency_power(halves())
    dilation = torch.full_like(power, 3).requires_grad_()
    dilation_frequency_loss([DilationRecord('layer', dilation, power)], limit=2.5).backward()
    assert dilation.grad.min() == 0 and dilation.grad.sum().item() == pytest.approx(1)


@pytest.mark.parametrize('limit', [0, -5., float('nan')])
def test_wrong_limit(limit):
    records = [DilationRecord('layer', torch.rand(1, 1, 4, 4, requires_grad=True), torch.rand(1, 1, 4, 4))]
    with pytest.raises(ValueError, match=f'limit must be a dilation above 0 or None, got {limit!r}'):
        dilation_frequency_loss(records, limit=limit)


@pytest.mark.parametrize('limit', [None, 1.3])
def test_gradient_with_respect_to_the_dilation(limit):
    powers = [torch.rand(2, 2, 4, 5, dtype=torch.float64), torch.rand(2, 1, 3, 3, dtype=torch.float64)]
    dilations = [(torch.rand_like(p) + 1).requires_grad_() for p in powers]
    assert torch.autograd.gradcheck(
        lambda *ds: dilation_frequency_loss([DilationRecord('a', d, p) for d, p in zip(ds, powers)], limit=limit),
        dilations)


def test_gradient_of_a_network_against_differences():
    """Through the recorder, with respect to parameters of AdaDR and of what is before it, in float64."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), FADConv2d(4, 4, 3, padding=1, stride=2, dilation_groups=2),
        FADConv2d(4, 2, 3, padding=2, dilation=2, padding_mode='replicate')).double().eval()
    for layer in (model[2], model[3]):
        nn.init.normal_(layer.ada_dr.conv.weight, std=0.2)
        nn.init.normal_(layer.freq_select.conv.weight, std=0.2)
    x = torch.randn(2, 2, 9, 12, dtype=torch.float64)

    def value():
        with record_dilations(model) as records:
            model(x)
        return dilation_frequency_loss(records)

    value().backward()
    parameters = [model[0].weight, model[2].ada_dr.conv.weight, model[2].freq_select.conv.weight,
                  model[3].ada_dr.conv.bias, model[2].ada_kern.high.bias]
    for p in parameters:
        direction = torch.randn_like(p)
        expected = (p.grad * direction).sum().item()
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p.add_(direction, alpha=step)
                ends.append(value().item())
                p.sub_(direction, alpha=step)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert parameters[0].grad.abs().max() > 1e-4  # the gradient reaches what AdaDR reads


@pytest.mark.parametrize('records, kwargs, error, message', [
    ([], {}, ValueError, 'no layer with AdaDR ran'),
    ([DilationRecord('layer3.0.conv2', torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 3))], {}, ValueError,
     r'layer3.0.conv2: .*\[1, 1, 2, 2\] and \[1, 1, 2, 3\]'),
    ([DilationRecord('a', torch.ones(0, 1, 2, 2), torch.ones(0, 1, 2, 2))], {}, ValueError, 'not empty'),
    ([DilationRecord('a', torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))], {'share': 0.6}, ValueError, 'got 0.6'),
    ([DilationRecord('a', torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))], {'share': 0}, ValueError, 'got 0'),
])
def test_loss_refuses(records, kwargs, error, message):
    with torch.no_grad(), pytest.raises(error, match=message):
        dilation_frequency_loss(records, **kwargs)
