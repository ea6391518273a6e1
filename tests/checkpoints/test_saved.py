"""A model of one's own: saved, loaded, and read from whatever holds it."""
import json
import re
from functools import partial

import pytest
import timm
import torch
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.utils import ModelEmaV3, freeze, unwrap_model
from torch import nn

import fadc_timm
from fadc_timm import FADConv2d, FreqSelect, lift_model
from fadc_timm.checkpoints import load_checkpoint, write_folder
from fadc_timm.layers import FADC_LAYERS
from fadc_timm.layers.fad_conv import OPTIONS, SAMPLINGS
from fadc_timm.models.lifted import layer_options, lifted_layers
from tests.support.backbones import awaken, create_fadc, fad_convs, photos, trained
from tests.support.cases import error
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')


def lifted(name, *args, lift=(), **kwargs):
    """A lifted network away from the identity, in eval mode."""
    torch.manual_seed(3)
    model = timm.create_model(name, **kwargs)
    lift_model(model, *args, **dict(lift))
    return awaken(off_identity(model, 0.5, statistics=False))


NETWORKS = {
    'regnetx_002': partial(lifted, 'regnetx_002', num_classes=7),
    'stages and options': partial(lifted, 'regnetx_002', ('s2', 's4'), lift=dict(
        bands=(2, 4), padding_mode='replicate', dilation_act='relu', kernel_decompose='low', spatial_group=8)),
    'without parts': partial(lifted, 'regnetx_002', lift=dict(freq_select=False, kernel_decompose='none')),
    'deformable': partial(lifted, 'regnetx_002', lift=dict(sampling='deform', offset_groups=2, modulated=False)),
    'efficientnet_b0': partial(lifted, 'efficientnet_b0', num_classes=3, in_chans=3),
    'densenet121': partial(lifted, 'densenet121', num_classes=3),
    'hrnet_w18_small': partial(lifted, 'hrnet_w18_small', ('stage4',), num_classes=3),
    'mobilevit': partial(lifted, 'mobilevitv2_050', ('stages',), num_classes=3),
    'a family': partial(
        create_fadc, 'test_resnet_fadc', num_classes=5, bands=(2, 4), fadc_stages=(False, True, False, True)),
    'family, depthwise': partial(create_fadc, 'test_convnext_fadc', num_classes=5, spatial_group=100),
    'family, another norm': partial(create_fadc, 'test_convnext_fadc', num_classes=5, ada_kern_norm='batchnorm2d'),
    'without BatchNorm': partial(lifted, 'poolformer_s12', num_classes=3),
}


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.sweep] * (name in ('densenet121', 'hrnet_w18_small'))) for name in NETWORKS])
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    """The same function, by our call and by timm's, with other classes and as feature maps too."""
    model, x = NETWORKS[name](), photos()
    folder = fadc_timm.save(model, tmp_path / 'own')
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors']
    config = json.loads((folder / 'config.json').read_text())
    is_family = 'family' in name
    assert config['architecture'] == (model.pretrained_cfg['architecture'] if is_family else 'fadc_lifted')
    for loaded in (fadc_timm.load(folder), timm.create_model(f'local-dir:{folder}', pretrained=True)):
        assert loaded.training and torch.equal(loaded.eval()(x), model(x))
        assert {n: layer_options(m) for n, m in fad_convs(loaded).items()} == {
            n: layer_options(m) for n, m in fad_convs(model).items()}
    assert type(fadc_timm.load(folder)) is type(model)
    assert torch.equal(load_checkpoint(folder)(x), model(x))
    other = fadc_timm.load(folder, num_classes=11).eval()
    assert other.num_classes == 11 and torch.equal(other.forward_features(x), model.forward_features(x))
    again = fadc_timm.save(fadc_timm.load(folder), tmp_path / 'again')  # what was loaded is saved alike
    assert json.loads((again / 'config.json').read_text()) == config
    plain = timm.create_model(f'local-dir:{folder}')
    assert plain.num_classes == model.num_classes and fad_convs(plain).keys() == fad_convs(model).keys()


@pytest.mark.parametrize('name', ['regnetx_002', 'efficientnet_b0', 'mobilevit', 'a family', 'hrnet_w18_small'])
@torch.no_grad()
def test_feature_maps(name, tmp_path):
    model, x = NETWORKS[name](), photos()
    folder = fadc_timm.save(model, tmp_path / 'own')
    maps = fadc_timm.load(folder, features_only=True).eval()
    assert fad_convs(maps)
    plain = timm.create_model(model.pretrained_cfg['architecture'].removesuffix('_fadc'), features_only=True).eval()
    features = maps(x)
    assert [f.shape for f in features] == [f.shape for f in plain(x)]
    if hasattr(model, 'forward_intermediates'):
        last = model.forward_intermediates(x, intermediates_only=True)[-1]
        assert error(features[-1], last) < 1e-5 or last.shape != features[-1].shape
    cut = fadc_timm.load(folder, features_only=True, out_indices=(1, 2)).eval()(x)
    assert all(map(torch.equal, cut, features[1:3])) and len(cut) == 2


@pytest.mark.parametrize('feature_cls', ['hook', 'fx', 'getter', 'dict'])
@torch.no_grad()
def test_classes_of_feature_networks(feature_cls, tmp_path):
    model, x = lifted('test_resnet', num_classes=3), photos(64)
    folder = fadc_timm.save(model, tmp_path / 'own')
    features = fadc_timm.load(folder, features_only=True, feature_cls=feature_cls).eval()(x)
    features = list(features.values()) if isinstance(features, dict) else features
    assert error(features[-1], model.forward_features(x)) < 1e-5


@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize('lift', [('regnetx_002', 'gather'), ('dinat_mini', 'windows')], ids=str)
def test_options_of_a_lifted_network(lift, features_only, tmp_path):
    """Its backend is an argument; the other options stand in config.json."""
    name, backend = lift
    folder = fadc_timm.save(lifted(name, num_classes=3), tmp_path / 'own')
    load = partial(fadc_timm.load, folder, features_only=features_only)
    layers = [m for m in load(backend=backend).modules() if isinstance(m, FADC_LAYERS)]
    assert layers and all(m.backend == backend for m in layers)
    with pytest.raises(TypeError, match='takes no bands, lowfreq_att: the options .* in its config.json, under "lif'):
        load(bands=(2, 4), lowfreq_att=True)
    with pytest.raises(TypeError, match='takes no freq_select_for'):
        load(freq_select_for='v')
    with pytest.raises(ValueError, match="backend must be None or one of.*'other'"):
        load(backend='other')


@torch.no_grad()
def test_what_else_travels(tmp_path):
    """Arguments of the base, labels, the own preprocessing, and the licence of the base's weights."""
    model = timm.create_model('regnetx_002', num_classes=3, in_chans=4, output_stride=16).eval()
    lift_model(model)
    off_identity(model, 0.5)
    cfg = dict(label_names=['a', 'b', 'c'], mean=(.1, .2, .3, .4), std=(1., 1., 1., .5), input_size=(4, 96, 64))
    recorded = hasattr(model, '_model_args')  # by newer timm
    if not recorded:
        with pytest.raises(RuntimeError, match='model_args'):
            fadc_timm.save(model, tmp_path / 'own', pretrained_cfg=cfg)
    folder = fadc_timm.save(model, tmp_path / 'own', pretrained_cfg=cfg, model_args=None if recorded else dict(
        in_chans=4, output_stride=16))
    loaded = fadc_timm.load(folder).eval()
    x = torch.randn(2, 4, 96, 64)
    assert torch.equal(loaded(x), model(x)) and loaded.forward_features(x).shape[-2:] == (6, 4)
    assert list(loaded.pretrained_cfg['label_names']) == ['a', 'b', 'c']
    data = timm.data.resolve_model_data_config(loaded)
    assert all(tuple(data[k]) == cfg[k] for k in ('mean', 'std', 'input_size'))
    assert loaded.pretrained_cfg['license'] == model.pretrained_cfg['license'] and 'tag' not in loaded.pretrained_cfg
    fadc_timm.save(model, folder, pretrained_cfg=dict(license='mit'), model_args=None if recorded else dict(
        in_chans=4, output_stride=16))
    assert fadc_timm.load(folder).pretrained_cfg['license'] == 'mit'


def test_half_precision_and_training_state(tmp_path):
    """Neither the mode nor the dtype of the model changes; bfloat16 weights come back as they were saved."""
    model = lifted('regnetx_002', num_classes=3, drop_path_rate=0.1).bfloat16().train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = fadc_timm.load(fadc_timm.save(model, tmp_path / 'own'))
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v.to(state[k].dtype), state[k]) for k, v in loaded.state_dict().items())


def frozen(model):
    freeze(model)
    return model


AFTER_TRAINING = {
    'channels_last': lambda model: model.to(memory_format=torch.channels_last), 'SyncBN': convert_sync_batchnorm,
    'frozen': frozen, 'compiled': torch.compile, 'average': ModelEmaV3, 'DataParallel': nn.DataParallel}


@pytest.mark.parametrize('name', AFTER_TRAINING)
@pytest.mark.parametrize('network', [partial(create_fadc, 'test_resnet_fadc', num_classes=3), NETWORKS['regnetx_002']])
@torch.no_grad()
def test_as_training_leaves_it(network, name, tmp_path):
    """What a recipe does to a network before it is saved: layouts, other classes of its norms, wrappers."""
    model = AFTER_TRAINING[name](network())
    loaded = fadc_timm.load(fadc_timm.save(model, tmp_path / 'own')).eval()
    expected = unwrap_model(model).eval()(photos(64))
    assert error(loaded(photos(64)), expected.double()) < 1e-5


def test_what_changed_since_it_was_built(tmp_path):
    """The pooling, and the options of layers; the rates of training are none of the model's."""
    model = create_fadc('test_resnet_fadc', num_classes=3, drop_rate=0.2, drop_path_rate=0.3)
    model = fadc_timm.load(fadc_timm.save(model, tmp_path / 'own'))
    model.reset_classifier(0, '')
    args = {} if hasattr(model, '_model_args') else dict(global_pool='')  # newer timm records it
    config = json.loads((fadc_timm.save(model, tmp_path / 'own', model_args=args) / 'config.json').read_text())
    assert not [name for name in config['model_args'] if 'drop' in name]
    assert fadc_timm.load(tmp_path / 'own')(photos(64)).dim() == 4
    model = timm.create_model('test_resnet_fadc', kernel_decompose='low', fadc_stages=(False, True, False, True))
    lift_model(model, ['layer3.0.conv2'], bands=(3,))
    assert lifted_layers(fadc_timm.load(fadc_timm.save(model, tmp_path / 'own'))) == lifted_layers(model)


def test_saving_draws_no_numbers(tmp_path):
    """A run that saves its model trains as one that does not."""
    model = lifted('test_resnet', num_classes=3)
    state = torch.get_rng_state()
    fadc_timm.save(model, tmp_path / 'own')
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_module_in_two_places(tmp_path):
    """Both names are in the file, where safetensors refuses shared memory."""
    model = timm.create_model('coat_lite_tiny', num_classes=3).eval()
    lift_model(model, ['serial_blocks4'])
    off_identity(model)
    state = model.state_dict()
    assert len({t.data_ptr() for t in state.values()}) < len(state)
    loaded = fadc_timm.load(fadc_timm.save(model, tmp_path / 'own')).eval()
    assert torch.equal(loaded(photos(224)[:1]), model(photos(224)[:1]))


def test_norms_that_no_configuration_has(tmp_path):
    model = convert_splitbn_model(create_fadc('test_resnet_fadc', num_classes=3))
    with pytest.raises(RuntimeError, match='unexpected keys: .*aux_bn.* no place for modules that were exchanged'):
        fadc_timm.save(model, tmp_path / 'own')


def test_a_family_that_was_lifted_further(tmp_path):
    """Where one option does not describe the whole model, the layers are listed."""
    model = timm.create_model('test_resnet_fadc', num_classes=4)
    lift_model(model, ['layer1'], bands=(3,))
    folder = fadc_timm.save(model, tmp_path / 'own')
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'fadc_lifted' and config['model_args']['base'] == 'test_resnet'
    loaded = fadc_timm.load(folder)
    assert lifted_layers(loaded) == lifted_layers(model) and len(lifted_layers(model)) == 2
    model = timm.create_model('test_resnet_fadc', num_classes=4)
    lift_model(model, ['layer1'])
    config = json.loads((fadc_timm.save(model, folder) / 'config.json').read_text())
    assert config['architecture'] == 'test_resnet_fadc' and config['model_args']['fadc_stages'] == [True] * 4


@torch.no_grad()
def test_folder_from_before_the_option_of_the_norm(tmp_path):
    """Every AdaKern had a BatchNorm then. A list of lifted layers is read so; a family names its option."""
    model = lifted('test_convnext', num_classes=3, lift=dict(ada_kern_norm='batchnorm2d'))
    family = create_fadc('test_convnext_fadc', num_classes=3, ada_kern_norm='batchnorm2d')
    for m, folder in ((model, tmp_path / 'lifted'), (family, tmp_path / 'family')):
        fadc_timm.save(m, folder)
        text = (folder / 'config.json').read_text()
        assert '"ada_kern_norm": "batchnorm2d"' in text
        (folder / 'config.json').write_text(re.sub(r'"ada_kern_norm": "batchnorm2d",?', '', text))
    assert torch.equal(fadc_timm.load(tmp_path / 'lifted').eval()(photos()), model(photos()))
    with pytest.raises(RuntimeError, match='AdaKern has a BatchNorm in the weights, .*: see the option ada_kern_norm'):
        fadc_timm.load(tmp_path / 'family')
    loaded = fadc_timm.load(tmp_path / 'family', ada_kern_norm='batchnorm2d').eval()
    assert torch.equal(loaded(photos()), family(photos()))


def test_every_option_is_stored():
    stored = {name for sampling in SAMPLINGS for name in layer_options(FADConv2d(4, 4, 3, sampling=sampling))}
    assert stored == set(OPTIONS) - {'eps', 'backend'}


def test_what_cannot_be_saved(tmp_path):
    model = lifted('regnetx_002', num_classes=3)
    model.s3.b1.se = nn.Sequential(FreqSelect(56))  # no config says where it was put
    with pytest.raises(RuntimeError, match='cannot be loaded again: .*unexpected keys: .*s3.b1.se.0.conv.weight'):
        fadc_timm.save(model, tmp_path / 'own')
    model = lifted('regnetx_002', num_classes=3)
    model.s3.b1.conv1.bn.act = nn.Identity()  # the state dict alone does not show it
    with pytest.raises(RuntimeError, match='differs in s3.b1.conv1.bn.act'):
        fadc_timm.save(model, tmp_path / 'own')
    network = nn.Sequential(nn.Conv2d(3, 3, 3))
    lift_model(network, ['0'])
    for other, message in (
            (network, 'Sequential is no network of timm'),
            (timm.create_model('test_resnet'), 'ResNet has no FADC layer: lift_model'),
            (timm.create_model('test_resnet_fadc', features_only=True), 'FeatureListNet is a feature network')):
        with pytest.raises(ValueError, match=message):
            fadc_timm.save(other, tmp_path / 'own')
    model = lifted('regnetx_002', num_classes=3)
    for cfg, message in (
            (dict(label_names=['a']), 'label_names has 1 names, and the model 3 classes'),
            (dict(mean=(123, 117, 104)), r'mean is of images in \[0, 1\]'), (dict(crop_pct=90), 'crop_pct is a share'),
            (dict(means=(0, 0, 0)), 'timm has no entry means')):
        with pytest.raises(ValueError, match=message):
            fadc_timm.save(model, tmp_path / 'own', pretrained_cfg=cfg)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own' / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='is no folder of a model'):
        fadc_timm.save(model, tmp_path / 'own')


def test_what_cannot_be_loaded(tmp_path):
    model = lifted('regnetx_002', num_classes=3)
    folder = fadc_timm.save(model, tmp_path / 'own')
    config = json.loads((folder / 'config.json').read_text())

    def changed(**model_args):
        new = {**config, 'model_args': {**config['model_args'], **model_args}}
        (folder / 'config.json').write_text(json.dumps(new))

    layers, options = config['model_args']['lifted'][0].values()
    changed(lifted=[dict(layers=layers[1:], options=options)])
    with pytest.raises(RuntimeError, match=f'does not fit the lifted regnetx_002: .*unexpected keys: {layers[0]}'):
        fadc_timm.load(folder, num_classes=5)
    changed(lifted=[dict(layers=['s9.conv'], options=options)])
    with pytest.raises(ValueError, match="no module 's9.conv'"):
        fadc_timm.load(folder)
    changed(base='regnet_of_tomorrow')
    with pytest.raises(RuntimeError, match='This version of timm has no model regnet_of_tomorrow'):
        fadc_timm.load(folder)
    with pytest.raises(TypeError, match='fadc_lifted is the architecture of the folders that fadc_timm.save writes'):
        timm.create_model('fadc_lifted')


@torch.no_grad()
def test_checkpoint_or_folder(tmp_path):
    """A file wants a name, a folder knows its own; both have the number of classes that they were saved with."""
    model = create_fadc('test_resnet_fadc', num_classes=5, bands=(2, 4))
    x = photos()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match='size mismatch: FreqSelect follows the options bands'):
        load_checkpoint(tmp_path / 'a.pth', 'test_resnet_fadc')  # a file does not hold the bands
    folder = write_folder(model, tmp_path / 'folder', model_args=dict(bands=(2, 4)))
    for name in (None, 'test_resnet_fadc', 'test_resnet_fadc.r160_in1k'):
        loaded = load_checkpoint(folder, name)
        assert not loaded.training and torch.equal(loaded(x), model(x))
    for norm in ('batchnorm2d', 'layernorm2d'):  # which it does hold
        model = create_fadc('test_convnext_fadc', ada_kern_norm=norm)
        torch.save(model.state_dict(), tmp_path / 'a.pth')
        assert torch.equal(load_checkpoint(tmp_path / 'a.pth', 'test_convnext_fadc')(x), model(x))
    torch.save(trained('test_resnet'), tmp_path / 'a.pth')
    assert load_checkpoint(tmp_path / 'a.pth', 'test_resnet_fadc').num_classes == 1000
    for name, path, exception, message in (
            ('test_convnext_fadc', folder, ValueError, 'holds the model test_resnet_fadc, not test_convnext_fadc'),
            (None, tmp_path / 'a.pth', ValueError, "a.pth' wants the model's name"),
            ('test_resnet_fadc', tmp_path / 'b', OSError, "There is no checkpoint or folder '.*b'"),
            (None, tmp_path, OSError, 'has no config.json, so it is no folder of a model')):
        with pytest.raises(exception, match=message):
            load_checkpoint(path, name)
    with pytest.raises(OSError, match="no folder '.*b' of a model"):
        fadc_timm.load(tmp_path / 'b')
