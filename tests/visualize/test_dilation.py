"""What is collected from a model's layers, and the picture that is drawn of it."""
import os
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from fadc_timm import lift_model, visualize
from fadc_timm.layers import FADConv2d
from fadc_timm.layers.hooks import watch_layers
from fadc_timm.visualize._common import stage_name
from tests.support.small_model import MODEL, make_model


@pytest.fixture
def model():
    return make_model()


# --- collect and summarize ---

def test_collect_records_what_the_layers_computed(model):
    x = torch.randn(2, 3, 72, 104)
    seen = {}
    layer = model.layer3[0].conv2
    layer.ada_dr.register_forward_hook(lambda m, a, out: seen.update(dilation=out[0]))
    layer.freq_select.register_forward_hook(lambda m, a, out: seen.update(x=a[0]))
    records = {r.name: r for r in visualize.collect(model, x)}

    names = [name for name, m in model.named_modules() if isinstance(m, FADConv2d)]
    assert list(records) == names
    record = records['layer3.0.conv2']
    assert (record.stage, record.stride, record.bands) == ('layer3', 16, (2, 4, 8))
    assert record.shape == (48, 5, 7)  # 72 and 104 are not multiples of 16
    torch.testing.assert_close(record.dilation, seen['dilation'])
    torch.testing.assert_close(record.weights, layer.freq_select.band_weights(seen['x']))
    assert record.dilation.std() > 1e-3 and record.weights.std() > 1e-3


def test_collect_leaves_the_model_as_it_was(model):
    model.train()
    model.layer2.eval()
    x = torch.randn(1, 3, 64, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    visualize.collect(model, x)
    assert model.training and model.layer3.training and not any(m.training for m in model.layer2.modules())
    assert not any(m._forward_hooks for m in model.modules())
    for key, value in model.state_dict().items():  # running statistics included
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_collect_gives_the_model_back_when_the_forward_fails(model):
    model.train()
    with pytest.raises(RuntimeError):
        visualize.collect(model, torch.randn(1, 7, 64, 64))
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_collect_without_fadc_layers():
    with pytest.raises(ValueError, match='no FADConv2d'):
        visualize.collect(timm.create_model('test_resnet'), torch.randn(1, 3, 64, 64))


def test_nothing_to_draw(model):
    for collect in (visualize.collect, visualize.collect_spectra):
        with pytest.raises(ValueError, match=r'the input is empty, \[0, 3, 64, 64\]'):
            collect(model, torch.randn(0, 3, 64, 64))
    stages = visualize.summarize(visualize.collect(model, torch.randn(1, 3, 64, 64)))
    with pytest.raises(ValueError, match='no pixels'):
        visualize.figure(np.zeros((0, 0, 3)), stages)
    stages[0] = replace(stages[0], dilation=stages[0].dilation * np.nan)
    with pytest.raises(ValueError, match=f'{stages[0].name} has dilations, taps or band weights that are not finite'):
        visualize.figure(np.zeros((8, 8, 3)), stages)


def test_modules_switched_off_and_lowest_band():
    layers = [
        FADConv2d(3, 4, 3, padding=2, dilation=2, sampling='fixed', bands=(2, 4), lowfreq_att=True),
        FADConv2d(4, 4, 3, padding=1, freq_select=False, dilation_groups=2),
    ]
    model = torch.nn.Sequential(OrderedDict(features=torch.nn.Sequential(*layers)))
    records = visualize.collect(model, torch.randn(1, 3, 9, 12))
    assert records[0].dilation.unique().tolist() == [2] and records[0].weights.shape == (1, 3, 1, 9, 12)
    assert records[1].weights is None and records[1].dilation.shape == (1, 2, 9, 12)
    stages = visualize.summarize(records)
    assert [len(s.layers) for s in stages] == [2]  # a flat trunk: one stage for each size
    assert list(stages[0].weights) == ['1/2-1', '1/4-1/2', '0-1/4']


@pytest.mark.parametrize('name, stage', [
    ('layer2.0.conv2', 'layer2'), ('stages.1.blocks.3.conv_dw', 'stages.1'),
    ('encoder.layer3.1.conv2', 'encoder.layer3'), ('s2.b1.conv2.conv', 's2'),
    ('features.3', 'features'), ('conv', 'conv'), ('7', '7'),
])
def test_stage_names(name, stage):
    assert stage_name(name) == stage


def test_stages_of_a_network_within_another():
    """A number in the name of what holds the network is no stage, where the stages have one size too."""
    model = timm.create_model(MODEL, output_stride=8)
    x = torch.randn(1, 3, 64, 64)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.resnet50 = model

        def forward(self, x):
            return self.resnet50(x)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net1, self.net2 = model, timm.create_model(MODEL, output_stride=8)

        def forward(self, x):
            return self.net1(x) + self.net2(x)

    two = visualize.summarize(visualize.collect(Two(), x))
    assert [s.name for s in two] == [f'net{n}.layer{i}' for n in (1, 2) for i in (2, 3, 4)]
    other = nn.Sequential(torchvision.models.resnet18())  # not timm's
    lift_model(other, ['0.layer2', '0.layer3', '0.layer4'])
    assert [s.name for s in visualize.summarize(visualize.collect(other, x))] == ['0.layer2', '0.layer3', '0.layer4']
    for net, name in ((nn.Sequential(model, nn.ReLU()), '0.'), (Net(), 'resnet50.'), (model, '')):
        stages = visualize.summarize(visualize.collect(net, x))
        assert [s.name for s in stages] == [f'{name}layer{i}' for i in (2, 3, 4)]
        assert [len(s.layers) for s in stages] == [2, 1, 2]
        first = visualize.first_of_stages(visualize.collect_spectra(net, x))
        assert [s.stage for s in first] == [s.name for s in stages]


def test_a_network_that_runs_twice(model):
    twice = nn.Sequential(OrderedDict(net=model))
    twice.forward = lambda x: model(model(x)[:, :3, None, None].expand(-1, -1, 64, 64))
    records = visualize.collect(twice, torch.randn(1, 3, 64, 64))
    assert len(records) == 10 and [len(s.layers) for s in visualize.summarize(records)] == [2, 1, 2]


@pytest.mark.parametrize('in_place', [False, True])
def test_compiled(model, in_place):
    """It calls no hooks once it was compiled; it runs without torch.compile here."""
    x = torch.randn(1, 3, 64, 64)
    expected = visualize.collect(model, x)
    if in_place:
        model.compile(backend='eager')
        compiled = model
    else:
        compiled = torch.compile(model, backend='eager')
    with torch.no_grad():
        compiled.eval()(x)
    error = pytest.raises(ValueError, match='A model that was compiled before calls no hooks')
    with error, watch_layers(compiled, print), torch.no_grad():
        compiled(x)
    for a, b in zip(visualize.collect(compiled, x), expected, strict=True):
        assert a.stage == ('' if in_place else '_orig_mod.') + b.stage and torch.equal(a.dilation, b.dilation)


def test_summarize_averages_a_stage(model):
    records = visualize.collect(model, torch.randn(2, 3, 64, 96))
    stages = {s.name: s for s in visualize.summarize(records, index=1)}
    assert list(stages) == ['layer2', 'layer3', 'layer4'] and [s.stride for s in stages.values()] == [8, 16, 32]
    of_stage = [r for r in records if r.stage == 'layer2']
    assert len(of_stage) > 1
    expected = torch.stack([r.dilation[1, 0] for r in of_stage]).mean(0).numpy()
    np.testing.assert_allclose(stages['layer2'].dilation, expected, rtol=1e-6)
    assert stages['layer2'].dilation_range[1] == max(r.dilation[1].max().item() for r in of_stage)
    # the first layer is strided, so its weights are twice as fine as the map that they are averaged on
    assert of_stage[0].weights.shape[-2:] == (16, 24)
    assert all(w.shape == (8, 12) for w in stages['layer2'].weights.values())
    mean = torch.stack([r.weights[1, 0].mean() for r in of_stage]).mean().item()
    assert stages['layer2'].weights['1/2-1'].mean() == pytest.approx(mean, rel=1e-5)
    assert stages['layer2'].weight_ranges['1/2-1'] == (
        min(r.weights[1, 0].min().item() for r in of_stage), max(r.weights[1, 0].max().item() for r in of_stage))


@pytest.mark.parametrize('kwargs', [{}, dict(output_stride=8), dict(lowfreq_att=True)], ids=str)
def test_at_start(kwargs):
    """Before any training, whatever the base dilation; not once a map is another, the same at each position or not."""
    x = torch.randn(2, 3, 64, 64)
    for part, index in ((None, None), ('ada_dr.conv', 0), ('freq_select.conv', -1), ('ada_kern.high', 0)):
        model = timm.create_model(MODEL, **kwargs)
        if part:
            with torch.no_grad():
                model.layer3[0].conv2.get_submodule(part).bias[index] += 0.2
        assert visualize.all_at_start(visualize.summarize(visualize.collect(model, x), 1)) == (part is None)


def test_one_image_at_its_start(model):
    records = visualize.collect(model, torch.randn(2, 3, 64, 64))
    for r in records:
        assert r.change.shape == (2,) and (r.change > 1e-3).all()
        r.change[1] = 0
    assert [visualize.all_at_start(visualize.summarize(records, i)) for i in range(2)] == [False, True]


# --- the picture ---

def test_figure_of_constant_maps_says_so():
    model = timm.create_model(MODEL)
    stages = visualize.summarize(visualize.collect(model, torch.randn(1, 3, 64, 64)))
    fig = visualize.figure(np.zeros((64, 64, 3)), stages)
    texts = [t.get_text() for t in fig.texts]
    assert sum('constant 1.00' in t for t in texts) == 3 * (1 + 3)  # three stages: dilation and three bands
    scales = [image.get_clim() for ax in fig.axes for image in ax.images if image.get_cmap().name == 'viridis']
    assert len(scales) == 3 and all(high - low > 0.5 for low, high in scales)


def test_weights_beyond_the_bar(model):
    """The bar has arrows where the largest weight lies beyond its ends, and its label has room under one stage too."""
    stages = visualize.summarize(visualize.collect(model, torch.randn(1, 3, 64, 64)))[:1]
    map_of = stages[0].weights['1/2-1']
    for value, beyond in ((1.05, False), (2., True)):
        map_of[:] = 1
        map_of[0, 0] = value
        fig = visualize.figure(np.zeros((64, 64, 3)), [replace(stages[0], weights={'1/2-1': map_of})])
        bar = fig.axes[-1]
        fig.canvas.draw()
        assert bar.get_xlabel().replace('\n', ' ').endswith('2 doubles it') and len(bar.patches) == 2 * beyond
        box = bar.xaxis.label.get_window_extent(fig.canvas.get_renderer())
        assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y0 >= 0


def test_figure_shows_the_maps(model):
    stages = visualize.summarize(visualize.collect(model, torch.randn(1, 3, 64, 96)))
    fig = visualize.figure(Image.new('RGB', (96, 64)), stages)
    shown = [image.get_array() for ax in fig.axes for image in ax.images if image.get_cmap().name == 'viridis']
    for s, values in zip(stages, shown, strict=True):
        np.testing.assert_array_equal(values, s.dilation)
    weights = [image for ax in fig.axes for image in ax.images if image.get_cmap().name == 'RdBu_r']
    assert len({image.get_clim() for image in weights}) == 1
    assert sum(weights[0].get_clim()) == pytest.approx(2)  # centred at 1


def test_figure_and_table_give_the_same_ranges(model):
    stages = visualize.summarize(visualize.collect(model, torch.randn(1, 3, 64, 96)))
    texts = [t.get_text() for t in visualize.figure(np.zeros((64, 96, 3)), stages).texts]
    for row, s in zip(visualize.table(stages).splitlines()[1:], stages, strict=True):
        mean, low, high = re.search(r'([\d.]+) \((-?[\d.]+) to ([\d.]+)\)', row).groups()
        averaged = ' before averaging' if len(s.layers) > 1 else ''
        assert sum(t.endswith(f'; mean {mean}, {low} to {high}{averaged}') for t in texts) == 1
        assert averaged == '' or (low, high) != (f'{s.dilation.min():.2f}', f'{s.dilation.max():.2f}')
        for low, high in s.weight_ranges.values():
            assert any('weight: mean' in t and f', {low:.2f} to {high:.2f}' in t for t in texts)
    assert [len(s.layers) for s in stages] == [2, 1, 2]


@pytest.mark.parametrize('count', [1, 2, 3, 4, 7])
def test_figure_is_as_wide_as_its_columns(model, count):
    stages = visualize.summarize(visualize.collect(model, torch.randn(1, 3, 64, 64)))
    fig = visualize.figure(np.zeros((64, 64, 3)), (stages * 3)[:count], 'title', 'note ' * 60)
    right = max(ax.get_position().x1 for ax in fig.axes) * fig.get_figwidth()
    assert fig.get_figwidth() - right == pytest.approx(0.3)
    assert (fig.get_figwidth() == pytest.approx(16)) == (count in (3, 4))


@pytest.mark.parametrize('size', [(64, 160), (160, 64)])
def test_figure_text_stays_in_its_column(model, size):
    stages = visualize.summarize(visualize.collect(model, torch.randn(1, 3, *size)))
    stages = [replace(s, name='features.denseblock4', dilation=s.dilation * 10) for s in (stages * 3)[:7]]
    fig = visualize.figure(np.zeros((*size, 3)), stages, 'title', 'a long note, of several lines; ' * 20)
    renderer = fig.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in fig.texts if t.get_text()]
    for i, a in enumerate(boxes):
        assert a.x0 >= 0 and a.x1 <= fig.bbox.x1 and a.y0 >= 0 and a.y1 <= fig.bbox.y1
        assert not any(a.overlaps(b) for b in boxes[i + 1:])


def test_save_is_whole_or_not_at_all(tmp_path):
    class Broken:
        def savefig(self, path, **kwargs):
            Path(path).write_bytes(b'half a picture')
            raise OSError('disk full')

    out = tmp_path / 'a.png'
    out.write_bytes(b'the old one')
    with pytest.raises(OSError, match='disk full'):
        visualize.save(Broken(), out)
    assert out.read_bytes() == b'the old one' and os.listdir(tmp_path) == ['a.png']
