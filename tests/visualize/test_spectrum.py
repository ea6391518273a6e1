"""Spectra of features and kernels: against numpy and the definition, and the picture of them."""
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fadc_timm import visualize
from fadc_timm.cli import main
from fadc_timm.layers import FADConv2d
from fadc_timm.visualize import spectrum

pytestmark = pytest.mark.usefixtures('one_thread')
MODEL = 'test_resnet_fadc'


def layer_with_choices(*args, **kwargs):
    layer = FADConv2d(*args, padding=1, **kwargs)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer


def test_feature_spectra_are_numpys():
    layer, x = layer_with_choices(3, 4, 3).eval(), torch.randn(2, 3, 9, 12)
    s, = visualize.collect_spectra(torch.nn.Sequential(layer), x)
    assert (s.name, s.shape, s.bands) == ('0', (3, 9, 12), (2, 4, 8))
    with torch.no_grad():
        selected = layer.freq_select(x)
    for power, features in ((s.features, x), (s.selected, selected)):
        expected = np.abs(np.fft.fft2(features.numpy())) ** 2 / (9 * 12)
        np.testing.assert_allclose(power, np.fft.fftshift(expected.mean((0, 1))), rtol=1e-4, atol=1e-6)
        assert power.sum() == pytest.approx(features.square().sum((2, 3)).mean().item(), rel=1e-5)  # Parseval
    assert np.abs(s.selected / s.features - 1).max() > 0.1


@pytest.mark.parametrize('args', [
    dict(), dict(groups=2), dict(groups=4), dict(kernel_decompose='low'), dict(kernel_size=5)])
def test_kernel_spectra_are_those_of_the_definition(args):
    args = {'kernel_size': 3, **args}
    layer, x = layer_with_choices(4, 4, args.pop('kernel_size'), **args).eval(), torch.randn(2, 4, 8, 8)
    s, = visualize.collect_spectra(layer, x)
    with torch.no_grad():
        low_in, low_out, high_in, high_out = (
            torch.ones(2, 4) if g is None else g for g in layer.ada_kern(layer.freq_select(x)))
        weight, kernels = layer.weight, []
        per_group = weight.shape[1]
        for b in range(2):
            for o in range(4):
                for i in range(per_group):
                    c = o // (4 // layer.groups) * per_group + i
                    w, mean = weight[o, i], weight[o, i].mean()
                    kernels.append(mean * low_in[b, c] * low_out[b, o] + (w - mean) * high_in[b, c] * high_out[b, o])

    def response(kernel):  # on the frequencies -1/2, -7/16 ... 7/16
        return np.abs(np.fft.fftshift(np.fft.fft2(kernel.numpy(), s=(16, 16)))) ** 2

    for power, of in ((s.kernel, weight.detach().flatten(0, 1)), (s.adapted, kernels)):
        expected = np.mean([response(kernel) for kernel in of], axis=0)
        np.testing.assert_allclose(power[:-1:4, :-1:4], expected, rtol=1e-5, atol=1e-7)


def test_profile_and_share_of_a_wave():
    i = np.arange(16)
    wave = np.cos(2 * np.pi * 5 * i / 16)[None] * np.ones((12, 1)) * math.sqrt(2)
    power = spectrum._feature_spectrum(torch.from_numpy(wave[None, None]))
    assert power.sum() == pytest.approx(12 * 16)
    f, values = spectrum.profile(power)
    assert f[0] == 0 and f[-1] == 0.5 and (np.diff(f) > 0).all()
    assert f[values.argmax()] == pytest.approx(5 / 16, abs=1 / 24)  # a ring of a 12th, rounded
    assert visualize.spectrum.high_share(power) == pytest.approx(1)
    slow = torch.cos(2 * math.pi * 2 * torch.arange(16) / 16).expand(1, 1, 8, 16)
    slow = spectrum._feature_spectrum(slow.double())
    assert spectrum.high_share(slow) == pytest.approx(0, abs=1e-9)
    assert math.isnan(spectrum.high_share(np.zeros((4, 4)))) and math.isnan(spectrum.high_share(np.ones((1, 1))))


def test_kernel_profile():
    """A kernel of one tap answers all frequencies alike, a box the low ones best."""
    one = torch.zeros(1, 3, 3)
    one[:, 1, 1] = 2
    f, values = spectrum.profile(spectrum._kernel_spectrum(one), kernel=True)
    np.testing.assert_allclose(values, 4)
    assert f[0] == 0 and f[-1] == 0.5
    box = spectrum.profile(spectrum._kernel_spectrum(torch.ones(1, 3, 3)), kernel=True)[1]
    assert box[0] == pytest.approx(81) and box.argmax() == 0


def test_at_the_start_nothing_changes():
    model = timm.create_model(MODEL)
    for s in visualize.collect_spectra(model, torch.randn(1, 3, 64, 64)):
        np.testing.assert_allclose(s.selected, s.features, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(s.adapted, s.kernel, rtol=1e-5)
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_unchanged_spectra():
    x = torch.randn(1, 4, 12, 15)
    start = visualize.collect_spectra(FADConv2d(4, 4, 3, padding=1), x)
    moved = visualize.collect_spectra(layer_with_choices(4, 4, 3), x)
    off = visualize.collect_spectra(FADConv2d(4, 4, 3, padding=1, freq_select=False, kernel_decompose='none'), x)
    assert visualize.all_unchanged(start) and visualize.all_unchanged(off)
    assert not visualize.all_unchanged(start + moved)
    assert not visualize.all_unchanged([replace(start[0], adapted=moved[0].adapted)])


def figure_of(layer, size=(12, 15)):
    model = torch.nn.Sequential(layer)
    return visualize.spectrum_figure(visualize.collect_spectra(model, torch.randn(1, 4, *size)), 'title', 'note')


def test_before_and_after_share_a_scale():
    fig = figure_of(layer_with_choices(4, 4, 3))
    images = [ax.images[0] for ax in fig.axes if ax.images]
    assert len(images) == 4
    for before, after in (images[:2], images[2:]):
        assert before.get_clim() == after.get_clim()
    labels = {ax.get_xlabel() for ax in fig.axes}
    assert {'u, cycles per pixel', 'log10 of the power', 'max(|u|, |v|), cycles per pixel'} <= labels
    # the pixel of the zero frequency is centred at 0
    left, right, bottom, top = images[0].get_extent()
    assert left + (right - left) * (15 // 2 + 0.5) / 15 == pytest.approx(0, abs=1e-12)
    assert top + (bottom - top) * (12 // 2 + 0.5) / 12 == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize('size', [(1, 1), (1, 9)])
def test_modules_switched_off_and_tiny_maps(size):
    fig = figure_of(FADConv2d(4, 4, 3, padding=1, freq_select=False, kernel_decompose='none'), size)
    assert sum(t.get_text() == 'switched off' for ax in fig.axes for t in ax.texts) == 2
    fig.canvas.draw()


def test_figure_of_none():
    with pytest.raises(ValueError, match='no spectra'):
        visualize.spectrum_figure([])


@pytest.mark.parametrize('count, width', [(1, 559), (2, 1079), (3, 1600), (4, 1974)])
def test_text_stays_inside_and_apart(count, width):
    """And the figure is as wide as its columns."""
    s, = visualize.collect_spectra(layer_with_choices(4, 4, 3), torch.randn(1, 4, 8, 8))
    s.name = 'encoder.stages.2.blocks.26.conv_dw'
    fig = visualize.spectrum_figure([s] * count, 'resnet18_fadc.a2_in1k: power spectra', 'a note of some lines; ' * 12)
    assert round(fig.bbox.width) == width
    assert fig.bbox.width - max(ax.bbox.x1 for ax in fig.axes) == pytest.approx(0.3 * 128)
    renderer = fig.canvas.get_renderer()
    texts = [t for t in fig.texts if t.get_text()]
    for ax in fig.axes:
        texts += [t for t in (ax.title, ax.xaxis.label, ax.yaxis.label) if t.get_text()]
    fig.canvas.draw()
    boxes = [t.get_window_extent(renderer) for t in texts]
    for i, a in enumerate(boxes):
        assert a.x0 >= 0 and a.x1 <= fig.bbox.x1 and a.y0 >= 0 and a.y1 <= fig.bbox.y1
        assert not any(a.overlaps(b) for b in boxes[i + 1:])


def test_command(tmp_path, capsys):
    out = tmp_path / 'a.png'
    assert main(['visualize', '--spectrum', '--size', '96', '--out', str(out)]) == 0
    text = capsys.readouterr().out
    assert "pretrained weights 'bluemarble_climate', in the package" in text and str(out) in text
    assert 'No spectrum' not in text
    rows = [re.split(r'\s{2,}', line) for line in text.splitlines() if line.startswith('layer')][1:]
    assert [row[0] for row in rows] == [
        'layer2.0.conv1', 'layer2.0.conv2', 'layer3.0.conv2', 'layer4.0.conv1', 'layer4.0.conv2']
    # training changed something, AdaKern in some layers by less than a digit
    assert all(row[2] != row[3] for row in rows[:4]) and sum(row[4] != row[5] for row in rows) >= 3
    with Image.open(out) as image:
        assert image.format == 'PNG' and image.width == 1600 and 1200 < image.height < 2000
    assert os.listdir(tmp_path) == ['a.png']


def test_command_chooses_layers(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(visualize, 'spectrum_figure', lambda spectra, *args: drawn.append([s.name for s in spectra]))
    monkeypatch.setattr(visualize, 'save', lambda *args: None)
    args = ['visualize', '--no-pretrained', '--size', '64', '--out', str(tmp_path / 'a.png')]
    assert main([*args, '--spectrum']) == 0
    line = 'No spectrum changes, as before any training of FADC; --pretrained takes weights'
    assert line in capsys.readouterr().out
    assert main([*args, '--spectrum', '--layer', 'layer4.0.conv2', '--layer', 'layer2.0.conv1']) == 0
    assert drawn == [['layer2.0.conv1', 'layer3.0.conv2', 'layer4.0.conv1'], ['layer4.0.conv2', 'layer2.0.conv1']]
    capsys.readouterr()
    for extra, message in (
            (['--layer', 'layer2.0.conv1'], '--layer is for --spectrum'),
            (['--spectrum', '--layer', 'layer2.0.conv'], "no FADC layer is called 'layer2.0.conv'; close matches: la"),
            (['--spectrum', '--layer', 'x'], "called 'x'; the layers: layer2.0.conv1, layer2.0.conv2, layer3")):
        assert main([*args, *extra]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ''
