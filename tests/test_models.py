"""The zoo: names and weights derived from timm, losslessness, and what timm expects of a model."""
import copy
import functools
import json
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from cases import error
from conftest import needs_dynamo
from fvcore.nn import FlopCountAnalysis
from PIL import Image
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor

import fadc_timm
from fadc_timm import AdaDR, AdaKern, FADConv2d, FreqSelect
from fadc_timm.ops.band_mix import multiply_adds
from fadc_timm.ops.flops import fvcore_handlers

PACKAGE = Path(fadc_timm.__file__).parent
MODULES = ('resnet', 'convnext')
BASES = [base for module in MODULES for base in timm.list_models(module=module)]
STAGES = {'resnet': [f'layer{i}.' for i in range(1, 5)], 'convnext': [f'stages.{i}.' for i in range(4)]}

# One block a stage is enough to see a kind of block.
THIN = dict(layers=(1, 1, 1, 1))
REPRESENTATIVES = {
    'resnet18': {}, 'resnet10t': {}, 'resnet26d': {}, 'resnet50c': THIN, 'resnet50s': THIN, 'resnet50_gn': THIN,
    'resnext50_32x4d': THIN, 'seresnet18': {}, 'ecaresnet26t': {}, 'resnetaa50': THIN, 'resnetblur18': {},
    'resnetrs50': THIN, 'test_resnet': {},
    'convnext_atto': {}, 'convnext_atto_ols': {}, 'convnext_zepto_rms': {}, 'convnextv2_atto': {}, 'test_convnext': {},
}
# Relative error of an FADC model at its start against its base: eps, rounding, and what the depth makes of it.
LOSSLESS = 5e-4  # 1.4e-4
ROUNDING = 2e-5  # without AdaDR's eps: 4.4e-6 (convnextv2_atto)

TINY = ('test_resnet', 'test_convnext')
SMALL = ('resnet10t', 'convnext_atto')


pytestmark = pytest.mark.usefixtures('one_thread')


@functools.cache
def photos(size=64):
    """Six crops of the photograph in the package."""
    path, = (PACKAGE / 'data').glob('*.jpg')
    boxes = [(0, 0, 400, 400), (200, 0, 600, 400), (150, 100, 350, 300), (0, 250, 150, 400), (300, 150, 450, 300),
             (400, 20, 500, 120)]
    image = Image.open(path).convert('RGB')
    crops = torch.stack([to_tensor(image.crop(box).resize((size, size), Image.Resampling.BICUBIC)) for box in boxes])
    return (crops - crops.mean((0, 2, 3), keepdim=True)) / crops.std((0, 2, 3), keepdim=True)


@torch.no_grad()
def awaken(model):
    """As after training: timm starts residual branches and layer scales at (nearly) zero, here they are open, and the
    norms have seen the photographs. Half of their statistics, as those alone make deep networks chaotic: they then
    amplify the rounding of float32 a thousandfold, the bases as well.
    """
    for name, p in model.named_parameters():
        if p.ndim == 1 and name.endswith('bias'):
            p.normal_(std=0.1)
        elif p.ndim == 1:
            p.uniform_(0.5, 1.5)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.momentum = 0.5
    model.train()(photos())
    for m in norms:
        m.momentum = 0.1
    return model.eval()


@functools.lru_cache(maxsize=1)
def _trained(base, kwargs):
    torch.manual_seed(0)
    model = awaken(timm.create_model(base, **dict(kwargs)))
    with torch.no_grad():
        model.get_classifier().bias -= model(photos()).mean(0)  # no class is everyone's
    return model.state_dict()


def trained(base, **kwargs):
    """State dict of a base that computes something."""
    return dict(_trained(base, tuple(kwargs.items())))


def load(name, checkpoint, **kwargs):
    """A model in eval mode from a file or a state dict; a classifier of another size is drawn alike every time."""
    source = dict(state_dict=dict(checkpoint)) if isinstance(checkpoint, dict) else dict(file=str(checkpoint))
    torch.manual_seed(1)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **kwargs).eval()


def with_tag(base, suffix=''):
    """The base or `<base>_fadc` with the base's default tag: weights of 1000 classes."""
    return '.'.join(filter(None, (base + suffix, get_pretrained_cfg(base).tag)))


def create_fadc(name, std=0.5, **kwargs):
    """An FADC model away from the identity, in eval mode."""
    torch.manual_seed(2)
    model = timm.create_model(name, **kwargs)
    fadc = [p for m in model.modules() if isinstance(m, (FreqSelect, AdaKern, AdaDR)) for p in m.parameters()]
    with torch.no_grad():
        for p in fadc:
            p.add_(torch.randn_like(p) * std / p[0].numel() ** 0.5)
    return awaken(model)


def fad_convs(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, FADConv2d)}


def module_of(base):
    return next(m for m in MODULES if base in timm.list_models(module=m))


@torch.no_grad()
def check_lossless(base, state, tolerance=LOSSLESS, options=None, **kwargs):
    plain = load(with_tag(base), state, **kwargs)
    fadc = load(with_tag(base, '_fadc'), state, **kwargs, **(options or {}))
    assert fad_convs(fadc)
    x = photos()[:, torch.arange(kwargs.get('in_chans', 3)) % 3]
    expected, y = plain(x), fadc(x)
    if kwargs.get('features_only'):
        assert len(y) == len(expected)
        assert max(error(a, e) for a, e in zip(y, expected, strict=True)) < tolerance
        return
    if not kwargs:
        assert len(set(expected.argmax(1).tolist())) > 1  # the photographs are told apart
    assert error(y, expected) < tolerance
    assert torch.equal(y.argmax(1), expected.argmax(1))


# registry


def test_every_architecture_has_its_fadc():
    models = set(timm.list_models('*_fadc'))
    assert {f'{base}_fadc' for base in BASES} == models
    assert len(models) >= 60
    assert {f'{base}_fadc' for base in TINY} < models
    for module in MODULES:
        assert set(timm.list_models(module=f'fadc_{module}')) == {f'{b}_fadc' for b in timm.list_models(module=module)}


@pytest.mark.parametrize('base', BASES)
def test_tags_and_weights_are_timms(base):
    def key(cfg):
        return {k: v for k, v in asdict(cfg).items() if k not in ('architecture', 'tag')}

    expected = {cfg.tag: key(cfg) for cfg in get_arch_pretrained_cfgs(base).values()}
    cfgs = {cfg.tag: cfg for cfg in get_arch_pretrained_cfgs(f'{base}_fadc').values()}
    if base == 'test_resnet':
        ours = cfgs.pop('bluemarble_climate')
        assert ours.architecture == 'test_resnet_fadc' and ours.hf_hub_id is None
        assert list(get_arch_pretrained_cfgs(f'{base}_fadc')) == [
            'test_resnet_fadc.bluemarble_climate', 'test_resnet_fadc.r160_in1k']
        assert get_pretrained_cfg('test_resnet_fadc').tag == 'bluemarble_climate'
    else:
        assert get_pretrained_cfg(f'{base}_fadc').tag == get_pretrained_cfg(base).tag
    assert list(cfgs) == list(expected)
    assert {tag: key(cfg) for tag, cfg in cfgs.items()} == expected
    for tag, cfg in cfgs.items():
        assert (cfg.architecture, cfg.tag) == (f'{base}_fadc', tag)
        assert cfg.hf_hub_id is None or '_fadc' not in cfg.hf_hub_id
        plain = get_pretrained_cfg(f'{base}.{tag}' if tag else base)
        if plain.hf_hub_id:
            assert cfg.hf_hub_id == plain.hf_hub_id == f'timm/{base}.{tag}' or not plain.hf_hub_id.startswith('timm/')


def test_known_weights():
    """Written out, so that a change in how timm keeps them is seen."""
    assert get_pretrained_cfg('resnet50_fadc').tag == 'a1_in1k'
    assert get_pretrained_cfg('resnet50_fadc.a1_in1k').hf_hub_id == 'timm/resnet50.a1_in1k'
    assert get_pretrained_cfg('convnextv2_atto_fadc.fcmae').hf_hub_id == 'timm/convnextv2_atto.fcmae'
    assert get_pretrained_cfg('convnextv2_atto_fadc.fcmae').license == 'cc-by-nc-4.0'
    assert 'resnet50_fadc.a1_in1k' in timm.list_models('resnet50_fadc*', pretrained=True)
    assert len(timm.list_models('*_fadc', pretrained=True)) >= 250


def test_default_weights():
    """Plain `pretrained=True`, without a network, from a small file in the package."""
    cfg = get_pretrained_cfg('test_resnet_fadc')
    file = Path(cfg.file)
    assert PACKAGE in file.parents and file.stat().st_size < 3e6
    model = timm.create_model('test_resnet_fadc', pretrained=True).eval()
    assert model.num_classes == cfg.num_classes == len(cfg.label_names)
    weights = safetensors.torch.load_file(file)
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(t, weights[k]) for k, t in model.state_dict().items())
    learned = [m for m in model.modules() if isinstance(m, AdaDR)]
    assert learned and all(m.conv.weight.abs().max() > 0 for m in learned)  # FADC was trained too


# lossless


VARIANTS = [{}, dict(num_classes=7, in_chans=1, output_stride=16), dict(features_only=True, output_stride=8)]


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
@pytest.mark.parametrize('base', REPRESENTATIVES)
def test_lossless(base, variant):
    kwargs = REPRESENTATIVES[base]
    state = trained(base, **kwargs)
    check_lossless(base, state, **kwargs, **variant)
    check_lossless(base, state, ROUNDING, dict(eps=0.), **kwargs, **variant)


@pytest.mark.parametrize('variant', [
    dict(num_classes=7), dict(num_classes=0), dict(in_chans=1), dict(in_chans=5), dict(features_only=True),
    dict(output_stride=8), dict(output_stride=16), dict(global_pool='fast')], ids=str)
@pytest.mark.parametrize('base', TINY + SMALL)
def test_lossless_variants(base, variant):
    check_lossless(base, trained(base), **variant)


@pytest.mark.sweep
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
@pytest.mark.parametrize('base', BASES)
def test_lossless_everywhere(base, variant):
    check_lossless(base, trained(base), 1e-3, **variant)  # 5.4e-4 (wide_resnet101_2, of the 21 architectures tried)


@pytest.mark.parametrize('stages', [(False, True, True, True), (True,) * 4, (False, False, False, True), (False,) * 4])
@pytest.mark.parametrize('base', ['resnet18', 'resnet50_gn', 'senet154', 'convnext_atto', 'convnext_atto_ols'])
def test_stages(base, stages):
    """Every convolution with taps around a centre is FADC in these stages, and no other."""
    prefixes = tuple(p for p, on in zip(STAGES[module_of(base)], stages) if on)
    with torch.device('meta'):
        plain = timm.create_model(base)
        model = timm.create_model(f'{base}_fadc', fadc_stages=stages)
    convs = {n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] in (3, 7)}
    assert set(fad_convs(model)) == {n for n in convs if n.startswith(prefixes)}
    assert all(m.freq_select and m.ada_kern and m.ada_dr for m in fad_convs(model).values())
    # what the base has, has the base's names
    extra = tuple(f'{n}.{part}.' for n in fad_convs(model) for part in ('freq_select', 'ada_kern', 'ada_dr'))
    assert [n for n in model.state_dict() if not n.startswith(extra)] == list(plain.state_dict())


@pytest.mark.parametrize('kwargs, exception, message', [
    (dict(fadc_stages=(True, True)), ValueError, r'fadc_stages must be 4 booleans.*\(True, True\)'),
    (dict(fadc_stages='layer4'), ValueError, "fadc_stages.*'layer4'"),
    (dict(fadc_stages=(0, 1, 1, 1)), ValueError, r'fadc_stages.*\(0, 1, 1, 1\)'),
    (dict(dilation_akt='abs'), TypeError, 'dilation_akt'),
    (dict(dilation_act='gelu'), ValueError, "dilation_act.*'gelu'"),
    (dict(padding_mode='reflect'), ValueError, "padding_mode.*'reflect'"),
    (dict(kernel_decompose='all'), ValueError, "kernel_decompose.*'all'"),
    (dict(bands=(2, 1)), ValueError, r'bands.*\(2, 1\)'),
    (dict(spatial_group=7), ValueError, 'spatial_group=7'),
    (dict(dilation_groups=7), ValueError, 'dilation_groups=7'),
    (dict(backend='cudnn'), ValueError, "backend.*'cudnn'"),
], ids=str)
@pytest.mark.parametrize('base', TINY)
def test_bad_options(base, kwargs, exception, message):
    with pytest.raises(exception, match=message):
        timm.create_model(f'{base}_fadc', **kwargs)


# checkpoints


def save(state, path):
    if path.suffix == '.pth':
        torch.save({'epoch': 3, 'state_dict': state}, path)
    else:
        safetensors.torch.save_file(state, path)


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_checkpoint_file(base, suffix, tmp_path):
    """Of the base, then of an FADC model."""
    path, name, x = tmp_path / f'checkpoint.{suffix}', with_tag(base, '_fadc'), photos()
    save(trained(base), path)
    expected = load(with_tag(base), path)(x)
    assert error(load(name, path)(x), expected) < LOSSLESS
    model = create_fadc(name)
    save(model.state_dict(), path)
    assert torch.equal(load(name, path)(x), model(x))
    assert error(model(x), expected) > 0.1
    assert torch.equal(load(name, path, num_classes=7).forward_features(x), model.forward_features(x))
    features = load(name, path, features_only=True)(x)
    assert torch.equal(features[-1], model.forward_intermediates(x, intermediates_only=True)[-1])
    grey = load(name, path, in_chans=1)
    assert error(grey(x[:, :1]), model(x[:, :1].expand(-1, 3, -1, -1))) < 1e-5  # 1.5e-6


@pytest.mark.parametrize('kwargs', [
    {}, dict(features_only=True), dict(num_classes=7), dict(num_classes=0), dict(in_chans=1)], ids=str)
@pytest.mark.parametrize('base, lost', [
    ('test_resnet', 'layer3.0.conv1.weight'), ('test_resnet', 'bn1.running_mean'),
    ('test_convnext', 'stages.2.blocks.0.conv_dw.bias'), ('test_convnext', 'head.norm.weight')])
def test_checkpoint_that_fits_neither(base, lost, kwargs):
    """Fails by naming the keys, also where timm itself loads loosely."""
    name = with_tag(base, '_fadc')
    fadc = create_fadc(name).state_dict()
    own = next(key for key in fadc if key.endswith('ada_dr.conv.bias'))
    for state, key in ((trained(base), lost), (fadc, lost), (fadc, own)):
        without = {k: v for k, v in state.items() if k != key}
        # timm's filter for ConvNeXt looks up what has two dimensions
        for more in ({}, {'neck.fc.weight': torch.zeros(4)}, {'neck.fc.weight': torch.zeros(4, 4)}):
            with pytest.raises(RuntimeError) as e:
                load(name, {**without, **more}, **kwargs)
            missing, unexpected = str(e.value).split('unexpected keys: ')
            assert key in missing and all(k in unexpected for k in more)
        with pytest.raises(RuntimeError, match=r'missing keys: none; unexpected keys: neck\.fc\.weight\.'):
            load(name, {**state, 'neck.fc.weight': torch.zeros(4, 4)}, **kwargs)


@pytest.mark.parametrize('base', TINY)
def test_checkpoint_of_other_stages(base):
    state = create_fadc(with_tag(base, '_fadc'), fadc_stages=(False, False, True, True)).state_dict()
    with pytest.raises(RuntimeError, match=f'missing keys: {STAGES[module_of(base)][1]}'):
        load(with_tag(base, '_fadc'), state, features_only=True)
    with pytest.raises(RuntimeError, match=f'unexpected keys: {STAGES[module_of(base)][2]}'):
        load(with_tag(base, '_fadc'), state, features_only=True, fadc_stages=(False, False, False, True))


def test_checkpoint_of_another_network():
    with pytest.raises(RuntimeError, match='missing keys: stem.0.weight, .*unexpected keys: .*conv1.0.weight, '):
        load('test_convnext_fadc', trained('test_resnet'), num_classes=7)
    with pytest.raises(RuntimeError, match='missing keys: .*unexpected keys: a'):
        load('test_resnet_fadc', {'a': torch.zeros(1)}, features_only=True)


@pytest.mark.parametrize('base', ['convnext_atto', 'convnextv2_atto', 'test_convnext'])
@torch.no_grad()
def test_checkpoint_in_the_format_of_the_authors(base):
    """ConvNeXt's original names and shapes, through timm's own filter."""
    state = {}
    for k, v in trained(base).items():
        for timm_name, name in (
                ('stem.', 'downsample_layers.0.'), ('.blocks.', '.'), ('conv_dw', 'dwconv'), ('mlp.fc', 'pwconv'),
                ('mlp.grn.weight', 'grn.gamma'), ('mlp.grn.bias', 'grn.beta'), ('head.norm', 'norm'),
                ('head.fc', 'head')):
            k = k.replace(timm_name, name)
        if '.downsample.' in k:
            k = k.replace('stages', 'downsample_layers').replace('.downsample', '')
        if 'grn' in k:
            v = v.reshape(1, 1, 1, -1)
        if 'pwconv' in k and k.endswith('weight'):
            v = v.flatten(1)
        state[k] = v
    assert len(state) == len(trained(base)) and not set(state) & {'head.norm.weight', 'stem.0.weight'}
    for kwargs in ({}, dict(features_only=True)):
        y = load(with_tag(base, '_fadc'), state, **kwargs)(photos())
        expected = load(with_tag(base), trained(base), **kwargs)(photos())
        assert error(y if not kwargs else y[-1], expected if not kwargs else expected[-1]) < LOSSLESS


@torch.no_grad()
def test_checkpoint_without_head():
    """The weights of masked autoencoders end before the final norm."""
    state = {k: v for k, v in trained('convnextv2_atto').items() if not k.startswith('head.')}
    model, plain = (load(f'{arch}.fcmae', state) for arch in ('convnextv2_atto_fadc', 'convnextv2_atto'))
    assert model.num_classes == 0
    assert error(model(photos()), plain(photos())) < LOSSLESS
    del state['stages.3.blocks.1.mlp.grn.bias']
    with pytest.raises(RuntimeError, match='missing keys: stages.3.blocks.1.mlp.grn.bias;'):
        load('convnextv2_atto_fadc.fcmae', state)


@pytest.mark.parametrize('base', TINY)
def test_channels_last_weights(base, tmp_path):
    name = with_tag(base, '_fadc')
    model = create_fadc(name).to(memory_format=torch.channels_last)
    x = photos().contiguous(memory_format=torch.channels_last)
    expected = model(x)
    for path in (tmp_path / 'checkpoint.pth', tmp_path / 'checkpoint.safetensors'):
        state = model.state_dict()
        save({k: v.contiguous() for k, v in state.items()} if path.suffix == '.safetensors' else state, path)
        loaded = load(name, path)
        assert error(loaded(photos()), expected) < 2e-6  # 4.2e-7


@pytest.mark.parametrize('base, own', [
    ('test_resnet', {}), ('test_convnext', {}), ('resnet50c', THIN), ('convnext_atto', dict(depths=(1, 1, 2, 1)))])
@torch.no_grad()
def test_local_dir(base, own, tmp_path):
    """The options travel in config.json."""
    options = dict(
        fadc_stages=(False, False, True, True), padding_mode='replicate', dilation_act='relu', kernel_decompose='low',
        bands=(2, 4), lowfreq_att=True, num_classes=7, **own)
    model = create_fadc(f'{base}_fadc', **options)
    save_for_hf(model, tmp_path, model_args=dict(options), safe_serialization=True)
    assert (tmp_path / 'model.safetensors').is_file()
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == f'{base}_fadc' and config['num_classes'] == 7
    assert config['model_args'].items() >= {'padding_mode': 'replicate', 'bands': [2, 4]}.items()
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert loaded.num_classes == 7 and fad_convs(loaded).keys() == fad_convs(model).keys()
    assert torch.equal(loaded(photos()), model(photos()))
    for m in fad_convs(loaded).values():
        assert (m.padding_mode, m.ada_dr.dilation_act, m.ada_kern.kernel_decompose) == ('replicate', 'relu', 'low')
        assert m.freq_select.bands == (2, 4) and m.freq_select.lowfreq_att
    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()
    assert torch.equal(features(photos())[-1], model.forward_intermediates(photos(), intermediates_only=True)[-1])


# what timm expects of a model


def test_options_reach_every_layer():
    cfg = dict(bands=(3,), spatial_group=2, dilation_groups=4, eps=0.01, backend='grid_sample', dilation_act='zero')
    for m in fad_convs(timm.create_model('test_resnet_fadc', **cfg)).values():
        assert (m.freq_select.bands, m.freq_select.spatial_group, m.backend) == ((3,), 2, 'grid_sample')
        assert (m.ada_dr.dilation_groups, m.ada_dr.eps, m.ada_dr.dilation_act) == (4, 0.01, 'zero')
    off = timm.create_model('test_resnet_fadc', freq_select=False, kernel_decompose='none', ada_dr=False)
    assert all(set(m.state_dict()) <= {'weight', 'bias'} for m in fad_convs(off).values())


@pytest.mark.integration(package='timm', what='features_only: list, dict, hook, getter, torch.fx')
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter', 'fx'])
@pytest.mark.parametrize('base', SMALL)
@torch.no_grad()
def test_features(base, feature_cls):
    name = with_tag(base, '_fadc')
    model = create_fadc(name)
    expected = model.forward_intermediates(photos(), intermediates_only=True)
    for out_indices in (None, (1, 3)):
        kwargs = {} if out_indices is None else dict(out_indices=out_indices)
        net = load(name, model.state_dict(), features_only=True, feature_cls=feature_cls, **kwargs)
        y = net(photos())
        y = list(y.values()) if isinstance(y, dict) else y
        wanted = expected if out_indices is None else [expected[i] for i in out_indices]
        assert len(y) == len(wanted) == len(net.feature_info.channels())
        assert all(torch.equal(a, e) for a, e in zip(y, wanted))
        for f, channels, reduction in zip(y, net.feature_info.channels(), net.feature_info.reduction()):
            assert f.shape[1:] == (channels, 64 // reduction, 64 // reduction)


@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_symbolic_trace(base):
    """torch.fx without timm's tracer: FADC's layers are leaves of themselves."""
    model = create_fadc(f'{base}_fadc')
    traced = torch.fx.symbolic_trace(model)
    leaves = {node.target for node in traced.graph.nodes if node.op == 'call_module'}
    assert {*fad_convs(model)} <= leaves and not any('.ada_dr' in name for name in leaves)
    for x in (photos(), photos(96)[:2]):
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize('base', SMALL)
@torch.no_grad()
def test_intermediates(base):
    model = create_fadc(f'{base}_fadc')
    last, every = model.forward_intermediates(photos())
    assert torch.equal(last, model.forward_features(photos()))
    indices = [1, 2]
    some = model.forward_intermediates(photos(), indices=indices, intermediates_only=True)
    assert all(torch.equal(a, every[i]) for a, i in zip(some, indices, strict=True))
    before = len(fad_convs(model))
    assert model.prune_intermediate_layers(indices) == indices
    assert 0 < len(fad_convs(model)) < before
    some = model.forward_intermediates(photos(), indices=indices, intermediates_only=True)
    assert all(torch.equal(a, every[i]) for a, i in zip(some, indices, strict=True))


@pytest.mark.parametrize('base', TINY)
def test_classifier(base):
    model = create_fadc(f'{base}_fadc', num_classes=9)
    assert model(photos()).shape == (6, 9)
    features = model.forward_features(photos())
    model.reset_classifier(5)
    assert model(photos()).shape == (6, 5) and model.num_classes == 5
    assert torch.equal(model.forward_features(photos()), features)
    model.reset_classifier(0, 'max')
    assert model(photos()).shape == (6, model.num_features)
    assert model.get_classifier() is not None


@pytest.mark.parametrize('base', SMALL)
def test_layer_decay(base):
    """Every parameter in one group; those of FADC in that of the convolution that they belong to."""
    scales = {}
    for name in (base, f'{base}_fadc'):
        with torch.device('meta'):
            model = timm.create_model(name)
        groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
        group_of = {p: g for g in groups for p in g['params']}
        assert sum(len(g['params']) for g in groups) == len(group_of) == len(list(model.parameters()))
        scales[name] = {n: (group_of[p]['lr_scale'], group_of[p]['weight_decay']) for n, p in model.named_parameters()}
    plain, fadc = scales.values()
    assert plain.items() <= fadc.items() and len(set(plain.values())) > 4
    for conv, m in fad_convs(model).items():
        for n, p in m.named_parameters():
            assert fadc[f'{conv}.{n}'] == (fadc[f'{conv}.weight'][0], 0.05 if p.ndim > 1 else 0)


@pytest.mark.parametrize('base', TINY)
def test_gradient_checkpointing(base):
    results = []
    for enable in (False, True):
        model = create_fadc(f'{base}_fadc', num_classes=9).train()
        model.set_grad_checkpointing(enable)
        y = model(photos())
        y.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        results.append((y, *(p.grad for p in model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize('base', SMALL)
def test_drop_path(base):
    def rates(name):
        model = timm.create_model(name, drop_path_rate=0.4)
        return model, [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']

    (_, expected), (model, actual) = rates(base), rates(f'{base}_fadc')
    assert actual == expected and max(actual) == pytest.approx(0.4)
    model(photos()).mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('base', TINY)
def test_factory_arguments(base):
    model = timm.create_model(f'{base}_fadc', device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}
    assert model(torch.zeros(2, 3, 64, 64, device='meta', dtype=torch.bfloat16)).shape == (2, model.num_classes)
    model = load(with_tag(base, '_fadc'), trained(base), dtype=torch.float64, eps=0.)
    plain = load(with_tag(base), trained(base), dtype=torch.float64)
    assert error(model(photos().double()), plain(photos().double())) < 1e-12  # 3.2e-15
    model = timm.create_model(f'{base}_fadc', dtype=torch.bfloat16).eval()
    assert model(photos().bfloat16()).isfinite().all()


@pytest.mark.parametrize('base', ['test_resnet', 'resnet18', 'resnet50c', 'resnet50_gn', 'seresnet18', 'resnetaa50'])
@torch.no_grad()
def test_init_weights(base):
    """Starts anew, with FADC as the identity."""
    kwargs = dict(num_classes=9, **REPRESENTATIVES[base])
    model, plain = create_fadc(f'{base}_fadc', **kwargs), timm.create_model(base, **kwargs)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights(zero_init_last=False)
    state = model.state_dict()
    assert not any(torch.equal(state[f'{n}.weight'], before[f'{n}.weight']) for n in fad_convs(model))
    plain.load_state_dict({k: state[k] for k in plain.state_dict()})
    assert error(model(photos()), plain.eval()(photos())) < LOSSLESS


@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_torchscript(base):
    model = create_fadc(f'{base}_fadc')
    assert error(torch.jit.script(model)(photos()), model(photos())) < 2e-6  # 6.0e-7
    net = create_fadc(f'{base}_fadc', features_only=True)
    for a, e in zip(torch.jit.script(net)(photos()), net(photos()), strict=True):
        assert error(a, e) < 2e-6  # 5.0e-7


@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_copies(base):
    model = create_fadc(f'{base}_fadc')
    assert type(model).__name__ in ('FADCResNet', 'FADCConvNeXt')
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(copied(photos()), model(photos()))


@pytest.mark.parametrize('global_pool', ['fast', 'avg', 'max', ''])
@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_global_pool(base, global_pool):
    """benchmark.py passes 'fast'."""
    state = trained(base)
    kwargs = dict(global_pool=global_pool, num_classes=9 if global_pool else 0)
    model, plain = load(with_tag(base, '_fadc'), state, **kwargs), load(with_tag(base), state, **kwargs)
    assert error(model(photos()), plain(photos())) < LOSSLESS


@pytest.mark.parametrize('size', [(33, 47), (64, 97), (160, 32)], ids=str)
@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_any_size(base, size):
    state = trained(base)
    model, plain = load(with_tag(base, '_fadc'), state), load(with_tag(base), state)
    x = nn.functional.interpolate(photos(), size, mode='bilinear')
    assert error(model(x), plain(x)) < LOSSLESS


@pytest.mark.parametrize('base', TINY)
def test_training(base):
    """Learns the photographs by heart; then batch 1."""
    model = timm.create_model(f'{base}_fadc', num_classes=6)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(photos()), torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model(photos()[:1]).sum().backward()


@needs_dynamo
@pytest.mark.integration(package='torch', what='torch.compile, one graph: any batch and size, training too')
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('base', ['resnet10t', 'test_convnext'])
def test_compile_any_batch_and_size(base, training):
    """One graph for all batches and sizes, forward and backward."""
    model = timm.create_model(f'{base}_fadc', num_classes=3).train(training)
    for m in fad_convs(model).values():
        for part in (m.freq_select, m.ada_kern, m.ada_dr):
            for p in part.parameters():  # off the identity
                p.data += torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.3 * p[0].numel() ** -0.5)
    torch.compiler.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for batch, height, width in ((2, 64, 96), (3, 96, 64), (5, 128, 160)):
        x = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        if training:
            model.zero_grad()
            compiled(x).square().sum().backward()
            actual = [p.grad for p in model.parameters()]
            model.zero_grad()
            model(x).square().sum().backward()
            for a, p in zip(actual, model.parameters()):
                assert (a - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6
        graphs.add(counter.frame_count)
    assert len(graphs) == 1  # as many as after the first


# FLOPs


def flops(f, *args):
    with FlopCounterMode(display=False) as counter:
        f(*args)
    return counter.get_total_flops()


def own_flops(m, x, y):
    """What FADC adds to a convolution from x to y, from shapes."""
    (b, c, h, w), o, p = x.shape, y.shape[1], y.shape[0] * y.shape[2] * y.shape[3]
    taps, depthwise = m.kernel_size[0] ** 2, m.groups == c
    maps, width = len(m.freq_select.bands), max(c // 16, 16)
    freq_select = b * h * w * 9 * c * maps
    ada_kern = b * 2 * width * (c + (c if depthwise else c + o))
    ada_dr = p * c * taps * (3 if depthwise else 1 + taps)
    mean_kernel = 0 if depthwise else p * o * c // m.groups
    mix = multiply_adds(x.shape, m.freq_select.bands)
    return 2 * (freq_select + ada_kern + ada_dr + mean_kernel + mix)


@pytest.mark.parametrize('base, size', [
    ('resnet10t', 64), ('resnet10t', 288), ('convnext_atto', 64), ('convnext_atto', 288), ('resnext50_32x4d', 64),
    ('seresnet18', 64)])
@torch.no_grad()
def test_flops(base, size):
    """The base and the modules."""
    kwargs = dict(num_classes=9, **REPRESENTATIVES[base])
    x = torch.zeros(2, 3, size, size)
    plain, model = timm.create_model(base, **kwargs).eval(), timm.create_model(f'{base}_fadc', **kwargs).eval()
    total = flops(model, x)
    own = []
    for m in fad_convs(model).values():
        m.register_forward_hook(lambda m, args, y: own.append(own_flops(m, args[0], y)))
    model(x)
    assert len(own) == len(fad_convs(model))
    assert total == flops(plain, x) + sum(own)


@pytest.mark.parametrize('base, backend', [
    ('test_resnet', None), ('test_resnet', 'torchvision'), ('test_convnext', None)])
@torch.no_grad()
def test_flops_of_fvcore(base, backend):
    x = torch.zeros(1, 3, 64, 64)
    plain = FlopCountAnalysis(timm.create_model(base).eval(), x).unsupported_ops_warnings(False)
    model = timm.create_model(f'{base}_fadc', num_classes=1000, backend=backend).eval()
    analysis = FlopCountAnalysis(model, x).set_op_handle(**fvcore_handlers()).unsupported_ops_warnings(False)
    analysis = analysis.uncalled_modules_warnings(False)
    assert analysis.total() >= plain.total()
    assert not {op for op in analysis.unsupported_ops() if op.startswith(('torchvision', 'fadc_timm'))}
    lifted = sum(plain.by_module()[n] for n in fad_convs(model))
    by_operator = analysis.by_operator()
    if backend == 'torchvision':
        assert by_operator['deform_conv2d'] == lifted  # the only sample has a kernel of its own
    elif base == 'test_convnext':
        assert by_operator['sampled_conv2d'] == lifted
