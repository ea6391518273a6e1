"""Checkpoints of bases and of FADC models: what loads, what is refused, and options that travel with the weights."""
import json
import re

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

from tests.support.backbones import (
    LOSSLESS,
    STAGES,
    THIN,
    TINY,
    create_fadc,
    fad_convs,
    load,
    module_of,
    photos,
    trained,
    with_tag,
)
from tests.support.cases import error

pytestmark = pytest.mark.usefixtures('one_thread')


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
        neck = [{'neck.fc.weight': torch.zeros(shape)} for shape in ((4,), (4, 4))]
        for more in ({}, *neck) if not kwargs else neck[:1]:
            with pytest.raises(RuntimeError) as e:
                load(name, {**without, **more}, **kwargs)
            missing, unexpected = str(e.value).split('unexpected keys: ')
            assert key in missing and all(k in unexpected for k in more)
        with pytest.raises(RuntimeError, match=r'missing keys: none; unexpected keys: neck\.fc\.weight\.'):
            load(name, {**state, 'neck.fc.weight': torch.zeros(4, 4)}, **kwargs)


@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_head_of_a_file(base, caplog):
    """It is kept where it has the wanted size, whatever the tag's has; where it goes, one line says so."""
    state = dict(trained(base, num_classes=10))
    x, expected = photos(), load(with_tag(base), state, num_classes=10).eval()
    expected.load_state_dict(state)
    for suffix in ('_fadc', '_fadc.bluemarble_climate' if base == 'test_resnet' else '_fadc'):
        model = load(f'{base}{suffix}', state, num_classes=10)
        assert error(model(x), expected(x)) < LOSSLESS
        assert model.pretrained_cfg['num_classes'] == 10 and 'label_names' not in model.pretrained_cfg
    fadc = create_fadc(f'{base}_fadc', num_classes=10)
    assert torch.equal(load(f'{base}_fadc', fadc.state_dict(), num_classes=10)(x), fadc(x))
    assert not caplog.records
    head = base.replace('test_resnet', 'fc').replace('test_convnext', 'head.fc') + '.weight'
    for overlay, classes, reason in (({}, 5, 'the model has 5 classes'),
                                     (dict(num_classes=-1), 10, 'num_classes=-1 in the configuration asks for a new')):
        model = timm.create_model(f'{base}_fadc', pretrained=True, num_classes=classes,
                                  pretrained_cfg_overlay=dict(state_dict=dict(state), **overlay))
        record, = caplog.records
        assert f'head of 10 classes is left out, and the model\'s is drawn anew: {reason}' in record.getMessage()
        assert not torch.equal(model.state_dict()[head][:5], state[head][:5])
        caplog.clear()
    # said by the user, or not wanted
    for kwargs in (dict(num_classes=0), dict(features_only=True)):
        load(f'{base}_fadc', state, **kwargs)
    timm.create_model(f'{base}_fadc', pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(
        state_dict=dict(state), num_classes=10))
    assert not caplog.records
    with pytest.raises(RuntimeError, match='head has 10 classes, and the model .*: create .* with num_classes=10'):
        load(f'{base}_fadc', state)


@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_checkpoint_path(base, tmp_path, caplog):
    """`checkpoint_path=`, the `--initial-checkpoint` of timm's train.py: a base's checkpoint too, and nothing else."""
    path, x = str(tmp_path / 'a.pth'), photos()
    save(trained(base), tmp_path / 'a.pth')
    plain = timm.create_model(base, checkpoint_path=path).eval()
    model = timm.create_model(f'{base}_fadc', num_classes=1000, checkpoint_path=path).eval()
    assert error(model(x), plain(x)) < LOSSLESS
    fadc = create_fadc(f'{base}_fadc', num_classes=1000)
    kept = fadc.state_dict()
    assert fadc.load_state_dict(trained(base), strict=False).missing_keys  # as it always was
    caplog.clear()
    fadc.load_state_dict(trained(base))  # FADC goes back to the identity
    assert error(fadc(x), plain(x)) < LOSSLESS
    assert [r.getMessage() for r in caplog.records] == [
        'The checkpoint is of the base, without FADC: FADC is the identity now.']
    save(kept, tmp_path / 'a.pth')
    loaded = timm.create_model(f'{base}_fadc', num_classes=1000, checkpoint_path=path)
    assert all(torch.equal(v, kept[k]) for k, v in loaded.state_dict().items())
    lost = next(k for k in kept if 'ada_dr' in k)
    for state, match in (({k: v for k, v in kept.items() if k != lost}, f'Missing key.*{lost}'),
                         ({**trained(base), 'neck': torch.zeros(1)}, 'fits neither .* unexpected keys: neck')):
        with pytest.raises(RuntimeError, match=f'(?s){match}'):
            loaded.load_state_dict(state)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_base_is_assigned(base, dtype):
    """`assign=True` takes the base's tensors as they are, and FADC follows them, off the meta device too."""
    plain = timm.create_model(base, num_classes=4).to(dtype).eval()
    for device in ('meta', 'cpu'):
        with torch.device(device):
            model = timm.create_model(f'{base}_fadc', num_classes=4)
        model.load_state_dict(plain.state_dict(), assign=True)
        assert all(p.dtype == dtype and p.device.type == 'cpu' for p in model.parameters())
        assert error(model.eval()(photos().to(dtype)), plain(photos().to(dtype)).double()) < (
            LOSSLESS if dtype == torch.float32 else 0.02)


@torch.no_grad()
def test_base_that_fails_leaves_fadc(caplog):
    model = create_fadc('test_resnet_fadc', num_classes=4)
    kept = {k: v.clone() for k, v in model.state_dict().items() if 'ada_' in k}
    with pytest.raises(RuntimeError, match='size mismatch for fc'):
        model.load_state_dict(timm.create_model('test_resnet', num_classes=5).state_dict())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in kept.items()) and not caplog.records


@pytest.mark.parametrize('saved, made, messages', [
    ({}, dict(freq_select=False), ['weights have FreqSelect, and .* created without it: see .* freq_select']),
    ({}, dict(freq_select=False, sampling='fixed', kernel_decompose='none'), [
        'weights have FreqSelect', 'weights have AdaKern, .*kernel_decompose', 'weights have AdaDR, .* sampling']),
    (dict(freq_select=False), {}, ['model has FreqSelect, which the weights lack.*: see the option freq_select']),
    (dict(kernel_decompose='low'), dict(kernel_decompose='high'), ['different parts of AdaKern: .* kernel_decompose']),
    (dict(ada_kern_norm='batchnorm2d'), dict(ada_kern_norm='layernorm2d'), [
        'AdaKern has a BatchNorm in the weights, and another norm in the model: see the option ada_kern_norm']),
    (dict(ada_kern_norm='layernorm2d', freq_select=False), dict(ada_kern_norm='batchnorm2d'), [
        'AdaKern has a BatchNorm in the model, and another norm .* ada_kern_norm', 'model has FreqSelect, .* lack']),
    (dict(fadc_stages=(False, False, True, True)), {}, ['model has FADC in {1}, where .*: see fadc_stages']),
    (dict(fadc_stages=(True,) * 4), {}, ['weights have FADC in {0}, where the model has none: see fadc_stages']),
    (dict(bands=(2, 4)), {}, ['size mismatch: FreqSelect follows the options bands, lowfreq_att and spatial_group']),
    (dict(dilation_groups=2), {}, ['size mismatch: AdaDR follows the options dilation_groups']),
])
@pytest.mark.parametrize('base', TINY)
def test_options_that_differ_are_named(base, saved, made, messages):
    state = timm.create_model(f'{base}_fadc', num_classes=4, **saved).state_dict()
    stages = [s.rstrip('.') for s in STAGES[module_of(base)]]
    for kwargs in (dict(num_classes=4), dict(features_only=True)):
        with pytest.raises(RuntimeError) as e:
            load(f'{base}_fadc', dict(state), **kwargs, **made)
        for message in messages:
            assert re.search(message.format(*stages), str(e.value)), str(e.value)[-600:]
        assert len(re.findall('see |follows', str(e.value))) == len(messages)


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


@pytest.mark.parametrize('ada_dr, sampling', [(True, 'dilation'), (False, 'fixed')])
@torch.no_grad()
def test_local_dir_of_an_older_version(ada_dr, sampling, tmp_path):
    """With the option `ada_dr` in config.json, which is `sampling` today. In a call it is read too, with a warning."""
    model = create_fadc('test_resnet_fadc', sampling=sampling, num_classes=7)
    save_for_hf(model, tmp_path, model_args={}, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['model_args'] = dict(ada_dr=ada_dr)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    name = f'local-dir:{tmp_path}'
    loaded = timm.create_model(name, pretrained=True).eval()
    assert {m.sampling for m in fad_convs(loaded).values()} == {sampling}
    assert torch.equal(loaded(photos()), model(photos()))
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    assert torch.equal(features(photos())[-1], model.forward_intermediates(photos(), intermediates_only=True)[-1])
    other = timm.create_model(name, sampling='deform')  # the call's comes first
    assert {m.sampling for m in fad_convs(other).values()} == {'deform'}
    with pytest.warns(FutureWarning, match='ada_dr is now sampling'):
        called = timm.create_model('test_resnet_fadc', ada_dr=ada_dr)
    assert {m.sampling for m in fad_convs(called).values()} == {sampling}


@pytest.mark.parametrize('suffix', ['_dcn', '_dcn_fadc'])
@torch.no_grad()
def test_deformable_checkpoint(suffix, tmp_path):
    """Of a deformable model, through a file and a folder; of another variant it is refused."""
    name = f'test_resnet{suffix}'
    model, path = create_fadc(name), tmp_path / 'checkpoint.pth'
    save(model.state_dict(), path)
    assert torch.equal(load(with_tag('test_resnet', suffix), path)(photos()), model(photos()))
    assert error(model(photos()), load(with_tag('test_resnet', suffix), trained('test_resnet'))(photos())) > 0.1
    save_for_hf(model, tmp_path / 'folder', model_args={}, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    assert torch.equal(loaded(photos()), model(photos()))
    with pytest.raises(RuntimeError, match=r'unexpected keys: .*conv1\.free_offsets\.'):
        load(with_tag('test_resnet', '_fadc'), path)


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
