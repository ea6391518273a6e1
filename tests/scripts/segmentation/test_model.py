"""The segmentation networks: a backbone's initial weights, and decoders of segmentation_models_pytorch."""
import pytest
import timm
import torch

import fadc_timm
from scripts.training.variants import VARIANTS, apply_variant
from scripts.training.weights import Initial, load_backbone
from tests.support.segmentation_cases import BACKBONES, awake, backbone

pytestmark = pytest.mark.usefixtures('one_thread')


# initial weights


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('variant', ['plain', 'fadc', 'dcnv2'])
def test_load_backbone(name, variant):
    source = awake(timm.create_model(name, num_classes=4))
    net = backbone(name)
    apply_variant(net, variant)
    text = load_backbone(net, Initial('x.pth', source.state_dict))
    assert text.startswith('x.pth: ') and ', without ' in text
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = source.eval().forward_intermediates(x, intermediates_only=True)[-1]
        torch.testing.assert_close(net.eval()(x)[-1], expected, rtol=1e-3, atol=1e-4)
    state = source.state_dict()
    first, last = list(state)[0], [k for k in state if k.startswith(('layer4', 'stages.3'))][-1]
    state[f'{last}_extra'] = state[last]
    with pytest.raises(RuntimeError, match=f'unexpected keys: {last}_extra'):
        load_backbone(net, Initial('x.pth', lambda: state))
    del state[f'{last}_extra'], state[first]
    with pytest.raises(RuntimeError, match=f'missing keys: {first.replace("stem.0", "stem_0")}'):
        load_backbone(net, Initial('x.pth', lambda: state))


# with segmentation_models_pytorch


def build(*args, **kwargs):
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.segmentation.model import build
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
    assert all(torch.equal(value, fadc[key]) for key, value in own.items())
    with pytest.raises(ValueError, match='has weights of FADC, for the variant fadc, not for plain'):
        build('test_resnet', 5, 'plain', init='bluemarble_climate')
    with pytest.raises(ValueError, match="'other' is neither a file nor a tag of test_resnet, whose tags are"):
        build('test_resnet', 5, init='other')
    with pytest.raises(FileNotFoundError, match='no checkpoint none.pth'):
        build('test_resnet', 5, init='none.pth')
    with pytest.raises(RuntimeError, match='does not fit the backbone: missing keys'):
        build('test_convnext', 5, init=str(tmp_path / 'base.pth'))


@pytest.mark.parametrize('variant, name', [
    ('fadc', 'test_resnet_fadc'), ('plain', 'test_resnet'), ('adadr', 'test_resnet'), ('dcnv2', 'test_resnet')])
def test_default(variant, name):
    """`default` is the tag that `pretrained=True` takes."""
    from scripts.training.weights import find_init
    cfg = timm.get_pretrained_cfg(name)
    assert find_init('test_resnet', 'default', variant, {}).source == f'{name}.{cfg.tag}'


def test_default_weights():
    built = build('test_resnet_fadc', 5, init='default')
    expected = timm.create_model('test_resnet_fadc', pretrained=True).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in built.model.encoder.model.state_dict().items())


def test_default_of_every_architecture():
    from scripts.training.weights import find_init
    for name in timm.list_models('*_fadc'):
        cfg, base = timm.get_pretrained_cfg(name), name.removesuffix('_fadc')
        if cfg.has_weights:
            assert find_init(base, 'default', 'fadc', {}).source.partition('.')[2] == cfg.tag


def test_normalisation(tmp_path):
    """Images are normalised as for the tag's weights, which may differ from those of the architecture's default."""
    from scripts.training.weights import normalisation_of
    names = [f'convnext_base{tag}' for tag in ('', '.clip_laion2b_augreg_ft_in1k')]
    default, clip = ((list(cfg.mean), list(cfg.std)) for cfg in map(timm.get_pretrained_cfg, names))
    assert default != clip
    assert normalisation_of('convnext_base', '', 'plain') == default
    assert normalisation_of('convnext_base', 'default', 'fadc') == default
    assert normalisation_of('convnext_base', 'clip_laion2b_augreg_ft_in1k', 'fadc') == clip
    assert normalisation_of('convnext_base', str(tmp_path / 'base.pth'), 'plain') == default
    assert normalisation_of('test_resnet', 'bluemarble_climate', 'fadc') == ([0.5] * 3, [0.5] * 3)


def test_normalisation_is_kept():
    """--eval, which loads no initial weights, normalises as the training did."""
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.segmentation.train import parse_args, recipe_of
    args = ['--output', 'x', '--backbone', 'convnext_base_fadc', '--init', 'clip_laion2b_augreg_ft_in1k']
    cfg = timm.get_pretrained_cfg('convnext_base.clip_laion2b_augreg_ft_in1k')
    config = recipe_of(parse_args(args))[1]
    assert (config['mean'], config['std']) == (list(cfg.mean), list(cfg.std))
    config = recipe_of(parse_args([*args, '--mean', '0', '0.5', '1']))[1]
    assert (config['mean'], config['std']) == ([0, 0.5, 1], list(cfg.std))


@pytest.mark.parametrize('kwargs, message', [
    (dict(decoder='other'), 'There is no decoder'), (dict(fadc={'bandz': 3}), 'bandz'),
    (dict(freq_select_stages=[1]), 'freq_select_stages must be'), (dict(backbone_args={'other': 1}), 'other')])
def test_downloads_come_last(kwargs, message, monkeypatch):
    """What is wrong with the network is said before its weights are downloaded."""
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.training import weights
    monkeypatch.setattr(weights, '_download', lambda name: pytest.fail('downloaded'))
    with pytest.raises((TypeError, ValueError), match=message):
        build('test_resnet_fadc', 5, init='default', **kwargs)
    with pytest.raises(ValueError, match='has weights of FADC, for the variant fadc'):
        build('test_resnet', 5, init='bluemarble_climate')


def test_init_official(tmp_path):
    """A checkpoint of the authors' is that of an FADC model padded as theirs are."""
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.training import weights
    full = timm.create_model('test_resnet_fadc', num_classes=0, padding_mode='replicate')
    called = {}

    def convert(checkpoint, name, args, release):
        called.update(name=name, args=args, release=release)
        return type('Converted', (), {'model': full})

    state = {'backbone.layer2.0.conv1.conv_offset.weight': torch.zeros(1)}
    torch.save({'state_dict': state}, tmp_path / 'theirs.pth')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, 'convert', convert)
        built = build('test_resnet_fadc', 5, init=str(tmp_path / 'theirs.pth'), fadc={'dilation_act': 'relu'})
    assert called == {'name': 'test_resnet_fadc', 'args': {}, 'release': 'april2024'}
    layers = [m for m in built.model.modules() if isinstance(m, fadc_timm.FADConv2d)]
    assert {m.padding_mode for m in layers} == {'replicate'} and {m.ada_dr.dilation_act for m in layers} == {'relu'}
    assert torch.equal(built.model.encoder.model.layer2[0].conv1.weight, full.layer2[0].conv1.weight)
    # --eval, which loads no initial weights, builds the same layers
    from scripts.segmentation.train import parse_args, recipe_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, 'convert', convert)
        args = ['--backbone', 'test_resnet_fadc', '--init', str(tmp_path / 'theirs.pth'), '--output', 'x']
        config = recipe_of(parse_args([*args, '--fadc', 'eps=0.1']))[1]
    assert config['fadc'] == {'padding_mode': 'replicate', 'dilation_act': 'abs', 'eps': 0.1}


@pytest.mark.parametrize('args, kwargs, message', [
    (('resnet51', 5), {}, "timm has no model 'resnet51'"),
    (('resnet18.a1_in1k', 5), {}, 'give --backbone resnet18 --init a1_in1k'),
    (('resnet18_fadc', 5, 'dcnv2'), {}, 'resnet18_fadc is the variant fadc: give --backbone resnet18'),
    (('test_resnet', 5), dict(decoder='other'), "There is no decoder 'other': the decoders are"),
    (('test_resnet', 5), dict(decoder='linknet', decoder_channels=8), "decoder_channels is for .*, not for 'linknet'"),
])
def test_build_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(*args, **kwargs)
