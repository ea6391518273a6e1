"""train_segmentation.py: variants, recipe, resuming to the bit, slide inference, and the script itself."""
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'scripts'))

from segmentation import checkpoint as files  # noqa: E402
from segmentation.batches import Samples, step_batches  # noqa: E402
from segmentation.checkpoint import Log, load_checkpoint, save_checkpoint  # noqa: E402
from segmentation.deform import DeformConv2d  # noqa: E402
from segmentation.engine import Objective, Recipe, World, train  # noqa: E402
from segmentation.optimizer import poly_schedule, rate_groups  # noqa: E402
from segmentation.slide import slide, windows  # noqa: E402
from segmentation.variants import VARIANTS, added_keys, apply_variant  # noqa: E402
from segmentation.weights import Initial, load_backbone  # noqa: E402
from torchrun import torchrun  # noqa: E402

import fadc_timm  # noqa: E402
import fadc_timm.losses  # noqa: E402
from fadc_timm.models.cost import module_cost  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')

SCRIPT = ROOT / 'scripts' / 'train_segmentation.py'
BACKBONES = ('test_resnet', 'test_convnext')
CPU = World(torch.device('cpu'))


def awake(model):
    """Undo the zeros, of norms and of ConvNeXt's scales, that residual branches start with, and are hidden by."""
    for name, parameter in model.named_parameters():
        if name.endswith(('.bn2.weight', '.bn3.weight', '.gamma')):
            nn.init.constant_(parameter, 0.8)
    return model


def backbone(name='test_resnet', **kwargs):
    torch.manual_seed(3)
    return awake(timm.create_model(name, features_only=True, **kwargs))


# variants


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('variant', [v for v in VARIANTS if v != 'plain'])
def test_variant(name, variant):
    """The same convolutions as in the zoo, the plain network's weights, and its function unless dilation changes it."""
    plain, net = backbone(name), backbone(name)
    replaced = apply_variant(net, variant)
    zoo = timm.create_model(f'{name}_fadc', features_only=True)
    assert replaced == [n for n, m in zoo.named_modules() if isinstance(m, fadc_timm.FADConv2d)]
    state, own = plain.state_dict(), net.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items())
    added = set(own) - set(state)
    assert added == set(added_keys(net))
    has = [any(f'.{part}.' in key for key in added) for part in ('ada_dr', 'ada_kern', 'freq_select', 'offset')]
    assert has == [variant in ('adadr', 'adadr_adakern', 'fadc'), variant in ('adadr_adakern', 'fadc'),
                   variant == 'fadc', variant == 'dcnv2']
    if variant == 'fadc':
        assert own.keys() == zoo.state_dict().keys()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, features = plain.eval()(x), net.eval()(x)
    for a, b in zip(features, expected):
        assert a.shape == b.shape
        assert variant == 'dilation2' or (a - b).norm() <= 1e-3 * b.norm()
    assert variant != 'dilation2' or (features[-1] - expected[-1]).norm() > 0.01 * expected[-1].norm()
    if variant == 'dilation2':
        macs = [module_cost(m.to('meta'), (3, 64, 96)).gmacs for m in (plain, net)]
        assert macs[0] == macs[1]


def test_plain_is_left():
    net = backbone()
    before = str(net)
    assert apply_variant(net, 'plain') == [] and str(net) == before


def test_freq_select_stages():
    net = backbone()
    apply_variant(net, 'fadc', {'dilation_act': 'relu'}, freq_select_stages=(2, 3))
    having = {name.partition('.')[0] for name, m in net.named_modules() if isinstance(m, fadc_timm.FreqSelect)}
    assert having == {'layer2', 'layer3'}
    acts = {m.dilation_act for m in net.modules() if isinstance(m, fadc_timm.AdaDR)}
    assert acts == {'relu'} and any(n.startswith('layer4') and isinstance(m, fadc_timm.AdaDR)
                                    for n, m in net.named_modules())


def test_backbone_cut_off():
    """As a decoder of depth 3 or 4 has it."""
    net = backbone(out_indices=(0, 1, 2, 3))
    assert {name.partition('.')[0] for name in apply_variant(net, 'fadc')} == {'layer2', 'layer3'}


@pytest.mark.parametrize('args, message', [
    (('other',), "There is no variant 'other'"),
    (('dcnv2', {'eps': 0.1}), "'dcnv2' has no FADC, which the options eps"),
    (('fadc', {}, (1,)), 'freq_select_stages must be among 2, 3 and 4'),
])
def test_variant_errors(args, message):
    with pytest.raises(ValueError, match=message):
        apply_variant(backbone(), *args)


@pytest.mark.parametrize('args', [dict(stride=2, padding=1), dict(padding=2, dilation=2, groups=4, bias=False)])
def test_deformable(args):
    conv = nn.Conv2d(8, 8, 3, **args)
    deformable = DeformConv2d.from_conv(conv)
    x = torch.randn(2, 8, 9, 12)
    y = deformable(x)
    torch.testing.assert_close(y, conv(x), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert deformable.weight is conv.weight and deformable.offset.weight.grad.abs().min() > 0
    with torch.autocast('cpu', torch.bfloat16):
        half = deformable(x)
    torch.testing.assert_close(half.float(), y, rtol=2e-2, atol=2e-2)


# recipe


@pytest.mark.parametrize('variant', ['plain', 'fadc', 'dcnv2'])
def test_groups(variant):
    net = backbone()
    apply_variant(net, variant)
    groups = rate_groups(net, 10.0, 0.05)
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(id(p) for p in net.parameters())
    names, added = {id(p): n for n, p in net.named_parameters()}, set(added_keys(net))
    for g in groups:
        for p in g['params']:
            assert g['weight_decay'] == (0.05 if p.ndim > 1 else 0)
            assert g['lr_scale'] == (10 if names[id(p)] in added else 1)
    assert len(groups) == (2 if variant == 'plain' else 4)


def test_schedule():
    groups = [{'params': [nn.Parameter(torch.zeros(1))], 'lr_scale': scale} for scale in (1.0, 10.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = poly_schedule(optimizer, steps=20, power=0.9, warmup=5)
    for step in range(20):
        schedule.step_update(num_updates=step)
        expected = 1e-2 * step / 5 if step < 5 else 1e-2 * (1 - step / 20) ** 0.9
        assert [g['lr'] for g in optimizer.param_groups] == pytest.approx([expected, 10 * expected])


@pytest.mark.parametrize('values, message', [
    ({'steps': 0}, 'steps must be above 0'), ({'clip': -1.0}, 'clip must be finite'), ({'ema': 1.0}, 'ema must be'),
    ({'amp': 'half'}, 'amp must be'), ({'warmup': 160_000}, 'warmup must be shorter'),
    ({'batch': 1}, 'batch must give each of 1 processes'),
])
def test_recipe_errors(values, message):
    Recipe().check(8)
    with pytest.raises(ValueError, match=message):
        Recipe(**values).check()


# batches


class Pictures:
    """Five images of the number of their place."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return np.full((32, 32, 3), i, np.uint8), np.full((32, 32), i % 3, np.uint8)

    def name(self, i):
        return str(i)


def transform(image, mask, rng):
    x = torch.from_numpy(image).permute(2, 0, 1) + torch.from_numpy(rng.normal(size=(3, 32, 32)).astype(np.float32))
    return x, torch.from_numpy(mask).long()


def test_batches():
    """A function of seed and step: wherever one begins, and however many processes there are."""
    whole = [x for x, _ in step_batches(Samples(Pictures(), transform, 7), 0, 5, 4)]
    later = [x for x, _ in step_batches(Samples(Pictures(), transform, 7), 3, 5, 4)]
    assert len(whole) == 5 and all(torch.equal(a, b) for a, b in zip(whole[3:], later))
    shares = [list(step_batches(Samples(Pictures(), transform, 7), 0, 5, 4, rank, 2)) for rank in range(2)]
    assert all(torch.equal(a, torch.cat([b[0], c[0]])) for a, b, c in zip(whole, *shares))
    loaded = [x for x, _ in step_batches(Samples(Pictures(), transform, 7), 0, 5, 4, workers=1)]
    assert all(torch.equal(a, b) for a, b in zip(whole, loaded))
    samples = Samples(Pictures(), transform, 7)
    epochs = [[samples.index(5 * e + i) for i in range(5)] for e in range(4)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert not torch.equal(samples[0][0], Samples(Pictures(), transform, 8)[0][0])
    with pytest.raises(ValueError, match='batch size 4 is no multiple of the 3'):
        step_batches(samples, 0, 5, 4, 0, 3)


# files


@pytest.mark.parametrize('moment', ['half of it', 'before the exchange', 'after the exchange'])
def test_killed_while_saving(moment, tmp_path, monkeypatch):
    """SIGKILL, which no `finally` sees: the checkpoint is the old one or the new one."""
    path = tmp_path / 'last.pt'
    states = [{'step': i, 'config': {}, 'model': {'w': torch.full((1000,), float(i))}} for i in range(3)]
    save_checkpoint(path, states[0])
    child = os.fork()
    if child == 0:
        def kill(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        save, replace = torch.save, os.replace
        if moment == 'half of it':
            files.torch.save = lambda state, part: (save(state, part), os.truncate(part, 1000), kill())
        else:
            os.replace = (lambda *args: (replace(*args), kill())) if moment.startswith('after') else kill
        save_checkpoint(path, states[1])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load_checkpoint(path, {})['step'] == (1 if moment.startswith('after') else 0)
    save_checkpoint(path, states[2])
    assert [p.name for p in tmp_path.iterdir()] == ['last.pt']
    assert torch.equal(load_checkpoint(path, {})['model']['w'], states[2]['model']['w'])


def test_checkpoint_errors(tmp_path):
    path = tmp_path / 'last.pt'
    save_checkpoint(path, {'step': 1, 'config': {'lr': 0.1, 'crop': 32}})
    with pytest.raises(RuntimeError, match='is of another run: crop is 64, was 32; lr is 0.2, was 0.1'):
        load_checkpoint(path, {'lr': 0.2, 'crop': 64})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RuntimeError, match='cannot be read as a checkpoint'):
        load_checkpoint(path, {})
    torch.save([1], path)
    with pytest.raises(RuntimeError, match='is no checkpoint of train_segmentation.py'):
        load_checkpoint(path, {})


def test_log(tmp_path):
    """Rows after the checkpoint, and the half of a row that a killed process wrote, are taken back."""
    path = tmp_path / 'log.csv'
    log = Log(path, ('step', 'loss'), 0)
    for step in range(1, 5):
        log.add({'step': step, 'loss': step / 3})
    path.write_text(path.read_text() + '5')
    Log(path, ('step', 'loss'), 3).add({'step': 4, 'loss': 0.25})
    assert path.read_text() == 'step,loss\n1,0.333333333\n2,0.666666667\n3,1\n4,0.25\n'
    Log(path, ('step', 'loss'), 0)
    assert path.read_text() == 'step,loss\n'


# training


class Small(nn.Module):
    """A backbone and the smallest of heads, as segmentation_models_pytorch arranges them."""

    def __init__(self, variant='fadc'):
        super().__init__()
        self.encoder = backbone(drop_path_rate=0.2)
        apply_variant(self.encoder, variant)
        self.head = nn.Conv2d(self.encoder.feature_info.channels()[-1], 3, 1)

    def forward(self, x):
        return nn.functional.interpolate(self.head(self.encoder(x)[-1]), x.shape[2:])


def small_run(output, stop_at=0, config=None, batch=transform, **recipe):
    torch.manual_seed(1)
    model = Small()
    width = model.encoder.feature_info.channels()[-2]
    objective = Objective(model, nn.Sequential(nn.Conv2d(width, 3, 1), nn.Dropout(0.1)), 0.4)
    recipe = Recipe(**{**dict(steps=6, batch=2, lr=1e-2, warmup=1, seed=5), **recipe})
    return train(objective, Samples(Pictures(), batch, recipe.seed), recipe, output, config or {'a': 1}, CPU,
                 log_every=2, save_every=3, stop_at=stop_at)


def losses(path):
    with (path / 'log.csv').open(newline='') as file:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(file)]


@pytest.mark.parametrize('recipe', [dict(), dict(amp='bfloat16', ema=0.9)], ids=['float32', 'amp_ema'])
def test_resume(recipe, tmp_path, capsys):
    """The same losses and weights as without a break, in the middle of a row of the log."""
    whole = small_run(tmp_path / 'whole', **recipe)
    small_run(tmp_path / 'broken', stop_at=3, **recipe)
    assert [row['step'] for row in losses(tmp_path / 'broken')] == ['2']
    resumed = small_run(tmp_path / 'broken', **recipe)
    assert 'after 3 of 6 steps' in capsys.readouterr().out
    assert losses(tmp_path / 'broken') == losses(tmp_path / 'whole')
    assert [row['step'] for row in losses(tmp_path / 'whole')] == ['2', '4', '6']
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values()))
    initial = Small().state_dict()
    assert all(not torch.equal(v, initial[k]) for k, v in whole.state_dict().items()
               if 'ada_' in k and k.endswith('weight'))
    # what is there is finished, and another run's is refused
    assert losses(tmp_path / 'whole')[-1]['step'] == '6'
    with pytest.raises(RuntimeError, match='is of another run: a is 2, was 1'):
        small_run(tmp_path / 'whole', config={'a': 2}, **recipe)


def test_not_finite(tmp_path):
    def broken(image, mask, rng):
        x, y = transform(image, mask, rng)
        return x * float('nan'), y

    with pytest.raises(RuntimeError, match='The loss is nan in one of the 2 steps up to 2'):
        small_run(tmp_path, batch=broken)
    assert not (tmp_path / 'last.pt').exists()


def test_loss():
    """The mean over all pixels; those that are ignored count as zero, and a batch of them alone gives no NaN."""
    logits = torch.tensor([[[[2.0, 0.0, 1.0]], [[0.0, 0.0, 3.0]]]])
    y = torch.tensor([[[0, 1, 255]]])
    expected = (np.log1p(np.exp(-2.0)) + np.log(2.0)) / 3
    assert Objective._loss(logits, y).item() == pytest.approx(expected)
    assert Objective._loss(logits, torch.full_like(y, 255)).item() == 0


def test_dilation_loss():
    model = Small().eval()
    x, y = torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    with fadc_timm.losses.record_dilations(model) as records:
        plain = Objective(model)(x, y)
    extra = fadc_timm.losses.dilation_frequency_loss(records)
    torch.testing.assert_close(Objective(model, dilation_loss=0.5)(x, y), plain + 0.5 * extra)
    with pytest.raises(ValueError, match='a loss for AdaDR, which this network has not'):
        Objective(Small('dcnv2'), dilation_loss=0.5)


# slide inference


def test_windows():
    assert windows(10, 4, 3) == [0, 3, 6] and windows(11, 4, 3) == [0, 3, 6, 7]
    assert windows(4, 4, 3) == [0] and windows(3, 4, 3) == [0]


@pytest.mark.parametrize('size', [(7, 12), (3, 9), (6, 6)])
def test_slide(size):
    """Against the mean over windows computed pixel by pixel; the model tells where in its window a pixel is."""
    crop, stride = 6, 4
    ramp = torch.arange(crop * crop, dtype=torch.float32).reshape(1, 1, crop, crop)

    def model(x):
        return torch.cat([x[:, :1] + ramp, x[:, 1:2] * ramp], 1)

    image = torch.randn(3, *size)
    padded = torch.zeros(3, max(size[0], crop), max(size[1], crop))
    padded[:, :size[0], :size[1]] = image
    values = [[[] for _ in range(padded.shape[2])] for _ in range(padded.shape[1])]
    for top in windows(padded.shape[1], crop, stride):
        for left in windows(padded.shape[2], crop, stride):
            out = model(padded[None, :, top:top + crop, left:left + crop])[0]
            for i in range(crop):
                for j in range(crop):
                    values[top + i][left + j].append(out[:, i, j])
    expected = torch.stack([torch.stack([torch.stack(v).mean(0) for v in row], 1) for row in values], 1)
    for batch in (1, 4):
        got = slide(model, image, crop, stride, batch)
        torch.testing.assert_close(got, expected[:, :size[0], :size[1]])
    with pytest.raises(ValueError, match='stride of the windows must be from 1 to the crop of 6, got 7'):
        slide(model, image, crop, 7)


# initial weights


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('variant', ['plain', 'fadc', 'dcnv2'])
def test_load_backbone(name, variant):
    source = awake(timm.create_model(name, num_classes=4))
    net = backbone(name)
    apply_variant(net, variant)
    text = load_backbone(net, Initial(source.state_dict(), 'x.pth'))
    assert text.startswith('x.pth: ') and ', without ' in text
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = source.eval().forward_intermediates(x, intermediates_only=True)[-1]
        torch.testing.assert_close(net.eval()(x)[-1], expected, rtol=1e-3, atol=1e-4)
    state = source.state_dict()
    first, last = list(state)[0], [k for k in state if k.startswith(('layer4', 'stages.3'))][-1]
    state[f'{last}_extra'] = state[last]
    with pytest.raises(RuntimeError, match=f'unexpected keys: {last}_extra'):
        load_backbone(net, Initial(state, 'x.pth'))
    del state[f'{last}_extra'], state[first]
    with pytest.raises(RuntimeError, match=f'missing keys: {first.replace("stem.0", "stem_0")}'):
        load_backbone(net, Initial(state, 'x.pth'))


# with segmentation_models_pytorch


def build(*args, **kwargs):
    pytest.importorskip('segmentation_models_pytorch')
    from segmentation.model import build
    return build(*args, **kwargs)


@pytest.mark.parametrize('decoder', [
    'upernet', 'unet', 'unetplusplus', 'manet', 'fpn', 'pspnet', 'deeplabv3', 'deeplabv3plus', 'pan', 'segformer'])
def test_decoders(decoder):
    built = build('test_resnet_fadc', 5, decoder=decoder, decoder_channels=16)
    assert built.replaced
    size = 128 if decoder == 'pan' else 64  # it pools the map at stride 16 three times
    with torch.no_grad():
        assert built.model.eval()(torch.randn(1, 3, size, size)).shape == (1, 5, size, size)
    wide = build('test_resnet_fadc', 5, decoder=decoder)
    assert sum(p.numel() for p in wide.model.parameters()) > sum(p.numel() for p in built.model.parameters())


@pytest.mark.parametrize('name', BACKBONES)
def test_variants_start_alike(name):
    x = torch.randn(2, 3, 64, 64)
    state, expected = None, None
    for variant in VARIANTS:
        model = awake(build(name, 5, variant, decoder_channels=16, seed=3).model.eval())
        with torch.no_grad():
            y = model(x)
        if state is None:
            state, expected = model.state_dict(), y
        own = model.state_dict()
        assert all(torch.equal(own[key], value) for key, value in state.items())
        assert variant == 'dilation2' or (y - expected).norm() < 1e-3 * expected.norm()
    other = build(name, 5, decoder_channels=16, seed=4).model.state_dict()
    assert any(not torch.equal(other[k], v) for k, v in state.items())


def test_init(tmp_path):
    base = timm.create_model('test_resnet', num_classes=4)
    torch.save({'state_dict': {f'module.{k}': v for k, v in base.state_dict().items()}}, tmp_path / 'base.pth')
    for variant in ('plain', 'fadc'):
        built = build('test_resnet', 5, variant, init=str(tmp_path / 'base.pth'))
        assert torch.equal(built.model.encoder.model.layer2[0].conv1.weight, base.layer2[0].conv1.weight)
        assert 'without fc' in built.loaded
    # weights of FADC, of a file of the package
    fadc = timm.create_model('test_resnet_fadc.bluemarble_climate', pretrained=True).state_dict()
    built = build('test_resnet', 5, 'fadc', init='bluemarble_climate')
    own = built.model.encoder.model.state_dict()
    assert all(torch.equal(value, fadc[key]) for key, value in own.items()) and built.mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match='has weights of FADC, for the variant fadc, not for plain'):
        build('test_resnet', 5, 'plain', init='bluemarble_climate')
    with pytest.raises(ValueError, match="'other' is neither a file nor a tag of test_resnet, whose tags are"):
        build('test_resnet', 5, init='other')
    with pytest.raises(FileNotFoundError, match='no checkpoint none.pth'):
        build('test_resnet', 5, init='none.pth')
    with pytest.raises(RuntimeError, match='does not fit the backbone: missing keys'):
        build('test_convnext', 5, init=str(tmp_path / 'base.pth'))


def test_init_official(tmp_path):
    """A checkpoint of the authors' is that of an FADC model padded as theirs are."""
    pytest.importorskip('segmentation_models_pytorch')
    from segmentation import weights
    full = timm.create_model('test_resnet_fadc', num_classes=0, padding_mode='replicate')
    called = {}

    def convert(checkpoint, name, args, release):
        called.update(name=name, args=args, release=release)
        return type('Converted', (), {'model': full})

    torch.save({'state_dict': {'backbone.x': torch.zeros(1)}}, tmp_path / 'theirs.pth')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, 'convert', convert)
        built = build('test_resnet_fadc', 5, init=str(tmp_path / 'theirs.pth'), fadc={'dilation_act': 'relu'})
    assert called == {'name': 'test_resnet_fadc', 'args': {}, 'release': 'april2024'}
    layers = [m for m in built.model.modules() if isinstance(m, fadc_timm.FADConv2d)]
    assert {m.padding_mode for m in layers} == {'replicate'} and {m.ada_dr.dilation_act for m in layers} == {'relu'}
    assert torch.equal(built.model.encoder.model.layer2[0].conv1.weight, full.layer2[0].conv1.weight)


@pytest.mark.parametrize('args, kwargs, message', [
    (('resnet51', 5), {}, "timm has no model 'resnet51'"),
    (('resnet18.a1_in1k', 5), {}, 'give --backbone resnet18 --init a1_in1k'),
    (('resnet18_fadc', 5, 'dcnv2'), {}, 'resnet18_fadc is the variant fadc: give --backbone resnet18'),
    (('test_resnet', 5), dict(decoder='other'), 'Wrong architecture type `other`'),
    (('test_resnet', 5), dict(decoder='linknet', decoder_channels=8), "decoder_channels is for .*, not for 'linknet'"),
])
def test_build_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(*args, **kwargs)


# the script


@pytest.fixture
def folder(tmp_path):
    """A data set in the layout `folder`: halves of two grey values, one pixel unlabelled."""
    root, rng = tmp_path / 'data', np.random.default_rng(0)
    root.mkdir()
    (root / 'classes.txt').write_text('left\nright\n')
    for split, count in (('train', 4), ('val', 2)):
        for i in range(count):
            mask = np.zeros((40, 48), np.uint8)
            mask[:, int(rng.integers(12, 36)):] = 1
            noise = rng.integers(0, 60, (40, 48, 3))
            mask[0, 0] = 255
            for kind, array in (('images', (noise + 120 * (mask == 1)[..., None]).astype(np.uint8)), ('masks', mask)):
                path = root / split / kind / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root


OPTIONS = ['--backbone', 'test_resnet_fadc', '--decoder-channels', '8', '--crop', '32', '--batch', '2', '--steps', '6',
           '--warmup', '1', '--lr', '1e-3', '--ema', '0.5', '--aux-loss', '0.4', '--data', 'folder', '--log-every', '1',
           '--save-every', '2', '--threads', '1', '--device', 'cpu']


def main(*args):
    pytest.importorskip('segmentation_models_pytorch')
    import train_segmentation
    return train_segmentation.main([str(a) for a in args])


# kills itself in the middle of writing the checkpoint of step 4
KILLED = '''
import os, signal, sys
sys.path.insert(0, {scripts!r})
import train_segmentation
from segmentation import checkpoint
save = checkpoint.torch.save
def save_half(state, part):
    save(state, part)
    if state['step'] == 4:
        os.truncate(part, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.torch.save = save_half
train_segmentation.main({args!r})
'''


def test_script(folder, tmp_path, capsys):
    """Killed and resumed as left alone; then tested, with the averaged weights, again by --eval."""
    args = [*OPTIONS, '--root', folder]
    assert main(*args, '--output', tmp_path / 'whole', '--eval-every', 3, '--overlays', 1) == 0
    out = capsys.readouterr().out
    assert 'upernet over test_resnet, fadc' in out and '5 convolutions replaced' in out and 'folder: 4 images' in out
    code = KILLED.format(scripts=str(SCRIPT.parent), args=[str(a) for a in (*args, '--output', tmp_path / 'killed')])
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={
        **os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert [row['step'] for row in losses(tmp_path / 'killed')] == ['1', '2', '3', '4']
    assert main(*args, '--output', tmp_path / 'killed') == 0
    assert 'after 2 of 6 steps' in capsys.readouterr().out
    assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')
    assert not list((tmp_path / 'killed').glob('.*'))
    results = [json.loads((tmp_path / name / 'result.json').read_text()) for name in ('whole', 'killed')]
    assert results[0] == results[1] and results[0]['classes'] == ['left', 'right'] and results[0]['images'] == 2
    assert (results[0]['config']['backbone'], results[0]['config']['variant']) == ('test_resnet', 'fadc')
    assert results[0]['added'] > 0
    assert (tmp_path / 'whole' / 'val.csv').read_text().splitlines()[0] == 'step,miou,accuracy'
    assert main('--eval', tmp_path / 'whole' / 'last.pt', '--root', folder, '--overlays', 2, '--device', 'cpu') == 0
    tested = json.loads((tmp_path / 'whole' / 'eval.json').read_text())
    assert tested['miou'] == results[0]['miou'] and tested['iou'] == results[0]['iou']
    assert sorted(p.name for p in (tmp_path / 'whole' / 'overlays_test').iterdir()) == ['0.png', '1.png']
    # the checkpoint is one for --init
    built = build('test_resnet', 7, 'fadc', init=str(tmp_path / 'whole' / 'last.pt'))
    ema = torch.load(tmp_path / 'whole' / 'last.pt', weights_only=True)['model_ema']
    key = next(k for k in built.model.encoder.model.state_dict() if k.endswith('.ada_dr.conv.weight'))
    assert 'model_ema' in built.loaded and torch.equal(
        built.model.encoder.model.state_dict()[key], ema[f'encoder.model.{key}'])
    # finished: nothing is trained again, and another recipe is refused
    assert main(*args, '--output', tmp_path / 'whole') == 0
    assert main(*args, '--output', tmp_path / 'whole', '--lr', '1e-2') == 1
    assert 'is of another run: lr is 0.01, was 0.001' in capsys.readouterr().err


# the script, killed once in the middle of writing the checkpoint of step 4, where that is asked for
WORKER = '''
import os, signal, sys
sys.path.insert(0, {scripts!r})
import train_segmentation
from segmentation import checkpoint
save = checkpoint.torch.save
def save_half(state, part):
    save(state, part)
    if state['step'] == 4 and not os.path.exists(os.environ['KILLED']):
        open(os.environ['KILLED'], 'w').close()
        os.truncate(part, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
if 'KILLED' in os.environ:
    checkpoint.torch.save = save_half
sys.exit(train_segmentation.main())
'''


def test_two_processes(folder, tmp_path):
    """Under torchrun one process writes, each sees its half of the crops, and a killed run goes on by itself."""
    pytest.importorskip('segmentation_models_pytorch')
    worker, args = tmp_path / 'worker.py', [*OPTIONS, '--batch', '4', '--root', folder, '--output']
    worker.write_text(WORKER.format(scripts=str(SCRIPT.parent)))
    out = torchrun(worker, *args, tmp_path / 'whole')
    assert out.count('5 convolutions replaced') == 1 and out.count('statistics of each process for itself') == 1
    out = torchrun(worker, *args, tmp_path / 'killed', KILLED=str(tmp_path / 'mark'))
    assert (tmp_path / 'mark').exists() and out.count('after 2 of 6 steps') == 1
    assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')
    results = [json.loads((tmp_path / name / 'result.json').read_text()) for name in ('whole', 'killed')]
    assert results[0] == results[1] and results[0]['step'] == 6 and results[0]['images'] == 2
    # one process of the same batch has other norms and dropout, but not another problem
    torchrun(worker, *args, tmp_path / 'one', processes=1)
    for one, two in zip(losses(tmp_path / 'one'), losses(tmp_path / 'whole'), strict=True):
        assert float(one['loss']) == pytest.approx(float(two['loss']), rel=0.5) and one['loss'] != two['loss']


def test_script_errors(folder, tmp_path, capsys):
    args = [*OPTIONS, '--root', folder, '--output', tmp_path / 'out']
    Image.fromarray(np.full((40, 48), 7, np.uint8)).save(folder / 'train' / 'masks' / '2.png')
    assert main(*args) == 1
    assert f'{folder}/train/masks/2.png: wrong label 7' in capsys.readouterr().err
    (folder / 'train' / 'masks' / '2.png').unlink()
    assert main(*args) == 1
    assert f'{folder}/train/images/2.png: image without a mask' in capsys.readouterr().err
    assert main(*OPTIONS, '--root', tmp_path / 'none', '--output', tmp_path / 'out') == 1
    assert 'none: no such folder' in capsys.readouterr().err
    assert not (tmp_path / 'out' / 'last.pt').exists()
