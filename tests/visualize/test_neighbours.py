"""What attention attends to, and its band weights: as numbers against their definition, and on the picture."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fadc_timm import visualize
from fadc_timm.cli import main
from fadc_timm.layers import FADNeighborhoodAttention
from fadc_timm.layers.hooks import watch_layers
from fadc_timm.ops import neighborhood_attention2d
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('target', ['qkv', 'v'])
@pytest.mark.parametrize('size', [(8, 9), (2, 5)], ids=str)
@torch.no_grad()
def test_weights_of_neighbours(size, target):
    """The operator on values that are coordinates reads the mean place of the neighbours under their weights."""
    layer = off_identity(FADNeighborhoodAttention(8, 2, 3, (1, 2), freq_select_for=target)).eval()
    layer.qkv.weight.mul_(4)
    calls = []
    x = torch.randn(2, *size, 8)
    with watch_layers(layer, calls.append):
        layer(x)
    call, = calls
    assert call.x.shape == call.output.shape == (2, 8, *size) and torch.equal(call.x, x.permute(0, 3, 1, 2))
    taps = visualize.taps_of(call)
    assert taps.attends and taps.size == size and taps.mask.shape == (2, 1, *size, 9)
    torch.testing.assert_close(taps.mask.sum(-1), torch.full((2, 1, *size), 9.))
    padded = layer._padded((call.x if target == 'v' else call.selected).permute(0, 2, 3, 1))
    q, k, v = layer._heads(layer.qkv(padded))
    for axis in range(2):
        places = torch.arange(padded.shape[1 + axis]).view((-1, 1) if axis == 0 else (1, -1)).float()
        values = places.expand(padded.shape[1:3])[None, None, :, :, None].expand_as(v)
        read = neighborhood_attention2d(q, k, values, 3, (1, 2), layer.rpb)[:, :, :size[0], :size[1], 0].mean(1)
        torch.testing.assert_close((taps.rest[..., axis] * taps.mask[:, 0]).mean(-1), read, rtol=1e-4, atol=1e-4)


def test_picture():
    """Of each stage the most dilated layer."""
    model = off_identity(timm.create_model('test_dinat_fadc', kernel_decompose='both'), 0.5)
    stages = visualize.summarize(visualize.collect(model, torch.randn(1, 3, 96, 128)))
    assert [s.taps.layer for s in stages] == [
        'stages.1.blocks.0.attn', 'stages.2.blocks.1.attn', 'stages.3.blocks.0.attn']
    assert stages[1].dilation_range == (1, 2) and all(len(s.weights) == 3 for s in stages)
    assert not visualize.all_at_start(stages) and 'offsets' not in visualize.table(stages)
    taps = stages[1].taps  # of a map of 6 x 8 pixels the position (3, 4), with rows and columns 2 apart
    np.testing.assert_allclose(taps.rest[:, 4] * (8, 6) - 0.5, [[4, 3]])
    np.testing.assert_allclose(taps.taps[0] * (8, 6) - 0.5, [[x, y] for y in (1, 3, 5) for x in (2, 4, 6)], atol=1e-5)
    fig = visualize.figure(Image.new('RGB', (128, 96)), stages)
    drawn = [c for ax in fig.axes for c in ax.collections if np.size(c.get_array()) in (9, 18)]
    for stage, dots in zip(stages, drawn, strict=True):
        np.testing.assert_allclose(dots.get_array(), stage.taps.mask.reshape(-1))
    fresh = timm.create_model('test_dinat_fadc')
    assert visualize.all_at_start(visualize.summarize(visualize.collect(fresh, torch.randn(1, 3, 96, 96))))


@pytest.mark.parametrize('size, count', [((8, 16), 2), ((8, 13), 1), ((7, 7), 1)], ids=str)
@torch.no_grad()
def test_windows_that_overlap(size, count):
    """Where one would hide the other, one position is drawn, in the middle."""
    calls = []
    layer = FADNeighborhoodAttention(8, 2, 7).eval()
    with watch_layers(layer, calls.append):
        layer(torch.randn(1, *size, 8))
    taps = visualize.select_taps('attn', visualize.taps_of(calls[0]))
    assert len(taps.taps) == count and len(np.unique(taps.taps.reshape(-1, 2), axis=0)) == count * 49
    if count == 1:
        np.testing.assert_allclose(taps.rest[0, 0] * size[::-1] - 0.5, [size[1] // 2, size[0] // 2], atol=1e-5)


def test_spectra():
    """Of the features; there is no kernel."""
    model = off_identity(timm.create_model('test_dinat_fadc', kernel_decompose='both'), 0.5)
    spectra = visualize.collect_spectra(model, torch.randn(1, 3, 96, 128))
    assert all(s.kernel is None and s.adapted is None and s.selected.shape == s.features.shape for s in spectra)
    assert not visualize.all_unchanged(spectra)
    visualize.spectrum_figure(spectra)
    assert visualize.spectrum_table(spectra).splitlines()[2].endswith('-')


@pytest.mark.parametrize('args', [[], ['--spectrum']], ids=str)
def test_command(args, tmp_path, capsys):
    out = tmp_path / 'a.png'
    assert main(['visualize', '--model', 'test_dinat_fadc', '--size', '96', '--out', str(out), *args]) == 0
    assert 'stages.1' in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.format == 'PNG'
