"""Where the taps of deformable layers lie: as numbers against their definition, and on the picture."""
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fadc_timm import FADConv2d, visualize
from fadc_timm.cli import main
from fadc_timm.layers.hooks import watch_layers
from fadc_timm.ops import deform_conv2d
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')


def calls_of(model, x):
    calls = []
    with torch.no_grad(), watch_layers(model, calls.append):
        model(x)
    return calls


@pytest.mark.parametrize('cfg', [
    dict(padding=1), dict(padding=2, dilation=2, stride=2, offset_groups=2), dict(kernel_size=5, modulated=False),
    dict(padding=2, dilation=2, padding_mode='replicate'), dict(kernel_size=1)], ids=str)
def test_taps_are_where_the_layer_reads(cfg):
    """On a map of its own rows or columns a mean kernel reads the mean place of the taps."""
    cfg = {**dict(kernel_size=3, freq_select=False, kernel_decompose='none', sampling='deform'), **cfg}
    layer = off_identity(FADConv2d(4, 4, **cfg), 0.2)
    k, groups = layer.kernel_size[0], layer.free_offsets.offset_groups
    x = torch.randn(2, 4, 14, 12)
    call, = calls_of(layer, x)
    taps = visualize.taps_of(call)
    assert taps.size == (14, 12) and taps.offset.shape[:2] == (2, groups)
    assert taps.mask.shape == taps.offset.shape[:-1] and (call.mask is not None or bool((taps.mask == 1).all()))
    # a map of its own rows, far from zero, so that what lies outside of the map shows
    rows = torch.arange(14.).view(1, 1, 14, 1).expand(1, groups, 14, 12) + 1000
    cols = torch.arange(12.).view(1, 1, 1, 12).expand(1, groups, 14, 12) + 1000
    args = dict(stride=layer.stride[0], dilation=layer.dilation[0],
                padding=layer.inner_padding + layer.outer_padding, groups=groups)
    for axis, coordinates in enumerate((rows, cols)):
        kernel = torch.full((groups, 1, k, k), k ** -2.)
        read = deform_conv2d(coordinates.repeat(2, 1, 1, 1), kernel, call.offset, **args)
        places = (taps.rest + taps.offset)[..., axis].mean(-1) + 1000
        inside = ((taps.rest + taps.offset >= 0) & (
            taps.rest + taps.offset <= torch.tensor([13., 11.]))).flatten(-2).all(-1)
        assert inside.float().mean() > 0.2
        torch.testing.assert_close(read[inside], places[inside], rtol=0, atol=1e-3)


def test_selected_taps():
    model = off_identity(timm.create_model('test_resnet_dcn'), 0.5).eval()
    x = torch.randn(2, 3, 64, 96)
    records = {r.name: r for r in visualize.collect(model, x)}
    record = records['layer3.0.conv2']
    stages = {s.name: s for s in visualize.summarize(list(records.values()), index=1)}
    assert list(stages) == ['layer2', 'layer3', 'layer4']
    taps = stages['layer3'].taps
    assert taps.layer == [n for n in records if n.startswith('layer3')][-1]
    assert taps.rest.shape == taps.taps.shape == (6, 9, 2) and taps.mask.shape == (6, 9)
    all_taps, stride = records[taps.layer].taps, model.get_submodule(taps.layer).stride[0]
    height, width = all_taps.size
    assert (height, width) == (4 * stride, 6 * stride)
    # of an output of 4 x 6 pixels rows 1 and 3, columns 1, 3 and 5
    centres = [[(c * stride + 0.5) / width, (r * stride + 0.5) / height] for r in (1, 3) for c in (1, 3, 5)]
    np.testing.assert_allclose(taps.rest[:, 4], centres, atol=1e-6)
    expected = all_taps.offset[1, 0, 3, 5].numpy()
    np.testing.assert_allclose((taps.taps - taps.rest)[5] * (width, height), expected[:, ::-1], atol=1e-4)
    np.testing.assert_allclose(taps.mask[5], all_taps.mask[1, 0, 3, 5].numpy())
    lengths = all_taps.offset[1].norm(dim=-1)
    assert taps.lengths == pytest.approx((lengths.mean().item(), lengths.max().item()))
    assert record.weights is None and 'offsets' in visualize.table(list(stages.values())).splitlines()[1]


def test_taps_of_few_positions_and_of_other_layers():
    layers = [FADConv2d(3, 4, 3, padding=1, stride=4, sampling='deform', freq_select=False),
              FADConv2d(4, 4, 3, padding=1, freq_select=False)]
    model = torch.nn.Sequential(OrderedDict(a=layers[0], b=layers[1]))
    first, second = visualize.collect(model, torch.randn(1, 3, 4, 8))
    assert second.taps is None
    taps = visualize.select_taps('a', first.taps)
    assert taps.taps.shape == (2, 9, 2) and taps.lengths == (0., 0.) and (taps.mask == 1).all()


def test_figure_draws_the_taps():
    model = off_identity(timm.create_model('test_resnet_dcn_fadc'), 0.5)
    stages = visualize.summarize(visualize.collect(model, torch.randn(1, 3, 64, 96)))
    fig = visualize.figure(Image.new('RGB', (96, 64)), stages)
    drawn = [c for ax in fig.axes for c in ax.collections if c.get_cmap().name == 'plasma' and len(c.get_offsets())]
    drawn = [c for c in drawn if c.get_array() is not None and c.get_array().size == 54]
    assert len(drawn) == 3
    for stage, dots in zip(stages, drawn, strict=True):
        np.testing.assert_allclose(dots.get_offsets(), (stage.taps.taps * (96, 64)).reshape(-1, 2), rtol=1e-5)
        np.testing.assert_allclose(dots.get_array(), stage.taps.mask.reshape(-1))
        assert dots.get_clim() == (0, 2)
    assert not [i for ax in fig.axes for i in ax.images if i.get_cmap().name == 'viridis']  # no dilation map
    assert len([i for ax in fig.axes for i in ax.images if i.get_cmap().name == 'RdBu_r']) == 9


@pytest.mark.parametrize('name', ['test_resnet_dcn', 'test_resnet_dcn_fadc'])
def test_command(name, tmp_path, capsys):
    args = ['--model', name, '--no-pretrained', '--size', '96', '--out', str(tmp_path / 'a.png')]
    assert main(['visualize', *args]) == 0
    out = capsys.readouterr().out
    assert out.count('offsets 0.00 (to 0.00)') == 3 and ('1.00' in out) == name.endswith('_fadc')
    with Image.open(tmp_path / 'a.png') as image:
        assert image.format == 'PNG' and image.width == 1600


def test_at_start():
    """A network that starts as its base moves no tap of any layer, and weighs none; the table has all layers."""
    x = torch.randn(1, 3, 64, 64)

    def stages(change):
        model = timm.create_model('test_resnet_dcn_fadc')
        bias = model.layer2[0].conv1.free_offsets.conv.bias.data  # of the first of two layers
        change(bias)
        return visualize.summarize(visualize.collect(model, x))

    assert visualize.all_at_start(stages(lambda bias: None))
    moved = stages(lambda bias: bias[:18].fill_(3.))
    assert not visualize.all_at_start(moved) and moved[0].offset_lengths[1] == pytest.approx(18 ** 0.5)
    assert 'offsets 2.12 (to 4.24)' in visualize.table(moved)
    assert not visualize.all_at_start(stages(lambda bias: bias[18:].fill_(3.)))
    with pytest.raises(ValueError, match='layer2 has dilations, taps or band weights that are not finite'):
        visualize.figure(np.zeros((64, 64, 3)), stages(lambda bias: bias[:18].fill_(float('nan')))[:1])
