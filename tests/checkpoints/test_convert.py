"""`fadc-timm convert`: checkpoints to folders, with an account of every key, whole or not at all."""
import argparse
import json
import os
import re
import signal
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from fadc_timm.cli import main
from fadc_timm.models._family import fadc_keys
from tests.support.backbones import LOSSLESS, TINY, create_fadc, photos, trained, with_tag
from tests.support.cases import error
from tests.support.official_cases import VECTORS, assert_features, mini_backbone
from tests.support.processes import forked

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def convert(capsys):
    def call(*args):
        """The exit status, and the list of keys, or what was said where there is none."""
        status = main(['convert', *map(str, args)])
        out, err = capsys.readouterr()
        if status:
            return status, out + err
        assert len(out.splitlines()) <= 7 and not err
        return status, Path(re.search('Wrote (.*): every key', out)[1]).read_text()
    return call


def lines(out):
    """The reported keys: taken {in the model: in the file}, added, left."""
    taken, added, left = {}, set(), set()
    for line in out.splitlines():
        kind, _, rest = line.partition('  ')
        if kind == 'taken':
            source, _, key = rest.partition(' -> ')
            taken[key or source] = source
        elif kind in ('added', 'left'):
            (added if kind == 'added' else left).add(rest.strip())
    return taken, added, left


def folder_of(out):
    assert sorted(p.name for p in out.iterdir()) == ['config.json', 'model.safetensors']
    assert [p.name for p in out.parent.iterdir() if p.name.startswith('.')] == []
    return timm.create_model(f'local-dir:{out}', pretrained=True).eval(), json.loads((out / 'config.json').read_text())


def train_checkpoint(state, ema):
    """As timm's train script writes it, under the wrappers of torch.compile and DDP."""
    return dict(
        epoch=3, arch='x', version=2, args=argparse.Namespace(model='x', lr=0.1), optimizer=dict(state={}), metric=1.5,
        state_dict={f'_orig_mod.module.{k}': v for k, v in state.items()}, state_dict_ema=ema)


@pytest.mark.parametrize('prefix', ['backbone.timm_model.', 'encoder.model.'])
@pytest.mark.parametrize('name', ['test_resnet_fadc', 'test_convnext_fadc', 'test_dinat_fadc', 'test_convnext'])
@torch.no_grad()
def test_backbone_of_a_segmentation_network(name, prefix, convert, tmp_path):
    """As mmsegmentation and segmentation_models_pytorch keep it: features_only, without last norm and classifier."""
    backbone = timm.create_model(name, features_only=True).eval()
    for p in backbone.parameters():
        p.copy_(torch.randn_like(p) * 0.1)
    state = {f'{prefix}{k}': v for k, v in backbone.state_dict().items()}
    torch.save(dict(meta=dict(iter=40), state_dict={**state, 'decode_head.weight': torch.zeros(3)}), tmp_path / 'a.pth')
    base = name.removesuffix('_fadc')
    status, out = convert(tmp_path / 'a.pth', '--model', f'{base}_fadc', '--out', tmp_path / 'out')
    assert status == 0, out
    taken, added, left = lines(out)
    assert set(taken.values()) == set(backbone.state_dict()) and left == {'decode_head.weight', 'meta.*'}
    assert {k for k in added if not FADC_KEY.search(k)} == {
        'test_resnet': set(), 'test_convnext': {'head.norm.weight', 'head.norm.bias'},
        'test_dinat': {'norm.weight', 'norm.bias'}}[base]
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, features_only=True).eval()
    for a, b in zip(model(photos()), backbone(photos()), strict=True):
        assert torch.equal(a, b) if name.endswith('_fadc') else error(a, b) < LOSSLESS


FADC_KEY = re.compile(r'\.(ada_dr|ada_kern|freq_select)\.')


def in_the_names_of_mmsegmentation(base):
    """The backbone of a base as mmsegmentation, or its authors' code for segmentation, names it."""
    state = {}
    for key, value in timm.create_model(base).state_dict().items():
        if base == 'test_resnet':
            stem = re.sub(r'^conv1\.', 'stem.', re.sub(r'^bn1\.', 'stem.7.', key))
            key = None if key.startswith('fc.') else stem
        elif base == 'test_convnext':
            key = None if key.startswith('head.') else key.replace('stem.', 'downsample_layers.0.')
            if key and '.downsample.' in key:
                key = key.replace('stages', 'downsample_layers').replace('.downsample', '')
            for a, b in (('.blocks.', '.'), ('conv_dw', 'dwconv'), ('mlp.fc', 'pwconv')):
                key = key and key.replace(a, b)
            value = value.flatten(1) if key and 'pwconv' in key and key.endswith('weight') else value
        else:
            key = None if key.startswith(('head.', 'norm.')) else key
            key = key and re.sub(r'^stages\.(\d+)\.downsample', lambda f: f'levels.{int(f[1]) - 1}.downsample', key)
            key = key and re.sub(r'ls([12])\.gamma', r'gamma\1', re.sub(r'^stages\.', 'levels.', key))
            key = key and re.sub(r'patch_embed\.conv([12])', lambda f: f'patch_embed.proj.{int(f[1]) - 1}', key)
        if key is not None:
            state[f'backbone.{key}'] = torch.randn_like(value) * 0.1 if value.is_floating_point() else value
    if base != 'test_resnet':  # a norm behind each stage, for the decoder
        state.update({f'backbone.norm{i}.{p}': torch.ones(8) for i in range(4) for p in ('weight', 'bias')})
    return {k: v.abs() if k.endswith('running_var') else v for k, v in state.items()}


@pytest.mark.parametrize('base', ['test_resnet', 'test_convnext', 'test_convnext of mmpretrain', 'test_dinat'])
@torch.no_grad()
def test_backbone_without_fadc_of_mmsegmentation(base, convert, tmp_path):
    """It is lifted as the base is."""
    torch.manual_seed(0)
    base, _, mmpretrain = base.partition(' ')
    state = in_the_names_of_mmsegmentation(base)
    if mmpretrain:
        state = {k.replace('dwconv', 'depthwise_conv').replace('pwconv', 'pointwise_conv'): v for k, v in state.items()}
    file, args = tmp_path / 'a.pth', ['--model', f'{base}_fadc', '--out', tmp_path / 'out']
    torch.save(dict(meta=dict(config="style='pytorch'"), state_dict={**state, 'decode_head.x': torch.ones(1)}), file)
    status, out = convert(file, *args)
    assert status == 0, out
    taken, added, left = lines(out)
    norms = {k.removeprefix('backbone.') for k in state if re.search(r'\.norm\d\.', k) and k.count('.') == 2}
    assert left == {'meta.*', 'decode_head.x', *norms}
    assert set(taken.values()) == {k.removeprefix('backbone.') for k in state} - norms
    model, config = folder_of(tmp_path / 'out')
    assert config['pretrained_cfg']['mean'] == [0.485, 0.456, 0.406] and config['num_classes'] == 0
    plain = timm.create_model(base, num_classes=0).eval()
    missing = plain.load_state_dict({k: v for k, v in model.state_dict().items() if not FADC_KEY.search(k)})
    assert not missing.missing_keys and error(model(photos()), plain(photos())) < LOSSLESS
    torch.save(dict(meta=dict(config="style='caffe'"), state_dict=state), file)
    status, out = convert(file, *args)
    assert status == 2 and "style='caffe'" in out
    torch.save(dict(meta=dict(cfg='strides=(1, 2, 1, 1), dilations=(1, 1,\n 2, 4)'), state_dict=state), file)
    status, out = convert(file, *args)
    assert status == 2 and 'says dilations=(1, 1, 2, 4): its backbone has an output stride of 8. Give' in out
    status, out = convert(file, *args, '--model-kwargs', 'output_stride=8')
    assert status == 0, out


def test_backbone_of_another_network(convert, tmp_path, capsys):
    """That has a prefix and no more of mmsegmentation says nothing of the images that it was trained with."""
    torch.save({f'backbone.{k}': v for k, v in trained('test_resnet').items()}, tmp_path / 'a.pth')
    assert main(['convert', str(tmp_path / 'a.pth'), '--model', 'test_resnet_fadc', '--out', str(tmp_path / 'o')]) == 0
    assert 'A checkpoint of a network around the backbone' in capsys.readouterr().out
    model, config = folder_of(tmp_path / 'o')
    assert config['pretrained_cfg']['mean'] == [0.5, 0.5, 0.5] and 'license' not in config['pretrained_cfg']



def test_normalisation_of_a_training(convert, tmp_path):
    """A checkpoint of this project's training scripts says what its images were normalised with."""
    state = {f'encoder.model.{k}': v for k, v in trained('test_resnet').items()}
    config = dict(backbone='test_resnet', variant='plain', mean=[0.1, 0.2, 0.3], std=[1.0, 0.5, 0.25])
    torch.save(dict(model=state, config=config, step=2), tmp_path / 'last.pt')
    args = tmp_path / 'last.pt', '--model', 'test_resnet_fadc', '--out', tmp_path / 'out'
    assert convert(*args)[0] == 0
    cfg = folder_of(tmp_path / 'out')[1]['pretrained_cfg']
    assert (cfg['mean'], cfg['std']) == (config['mean'], config['std'])
    assert convert(*args, '--mean', '0', '0', '0')[0] == 0  # what is given goes before
    cfg = folder_of(tmp_path / 'out')[1]['pretrained_cfg']
    assert (cfg['mean'], cfg['std']) == ([0, 0, 0], config['std'])


@pytest.mark.parametrize('form', ['safetensors', 'pth', 'ema', 'no-ema', 'fadc'])
@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_checkpoints_of_timm(base, form, convert, tmp_path):
    name, state = with_tag(base, '_fadc'), dict(trained(base))
    other = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    expected = timm.create_model(base, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state)).eval()
    source, options = tmp_path / f'checkpoint.{"safetensors" if form == "safetensors" else "pth.tar"}', []
    if form == 'safetensors':
        safetensors.torch.save_file(state, source)
    elif form == 'pth':
        torch.save(state, source)
    elif form == 'ema':
        torch.save(train_checkpoint(other, state), source)
    elif form == 'no-ema':
        torch.save(train_checkpoint(state, other), source)
        options = ['--no-ema']
    else:
        expected = create_fadc(f'{base}_fadc', num_classes=7)
        state = expected.state_dict()
        torch.save(train_checkpoint(state, None), source)
    status, out = convert(source, '--model', name, '--out', tmp_path / 'out', *options)
    assert status == 0, out
    model, config = folder_of(tmp_path / 'out')
    if form == 'fadc':
        assert torch.equal(model(photos()), expected(photos())) and config['num_classes'] == 7
    else:
        assert error(model(photos()), expected(photos())) < LOSSLESS

    taken, added, left = lines(out)
    assert taken == {k: k for k in state}
    assert added == set() if form == 'fadc' else added == set(fadc_keys(model))
    assert taken.keys() | added == model.state_dict().keys()
    bookkeeping = {'epoch', 'arch', 'version', 'args', 'optimizer.*', 'metric'}
    assert left == {'safetensors': set(), 'pth': set(), 'ema': bookkeeping | {'state_dict.*'},
                    'no-ema': bookkeeping | {'state_dict_ema.*'}, 'fadc': bookkeeping | {'state_dict_ema'}}[form]


def test_names_of_the_authors_of_convnext(convert, tmp_path):
    """Renamed and reshaped tensors are traced to their keys."""
    state = {}
    for k, v in trained('test_convnext').items():
        new = k
        for a, b in (('stem.', 'downsample_layers.0.'), ('.blocks.', '.'), ('conv_dw', 'dwconv'), ('mlp.fc', 'pwconv'),
                     ('head.norm', 'norm'), ('head.fc', 'head')):
            new = new.replace(a, b)
        if '.downsample.' in new:
            new = new.replace('stages', 'downsample_layers').replace('.downsample', '')
        state[new] = (v.flatten(1) if 'pwconv' in new and new.endswith('weight') else v), k
    torch.save({'model': {k: v for k, (v, _) in state.items()}}, tmp_path / 'x.pth')
    status, out = convert(tmp_path / 'x.pth', '--model', 'test_convnext_fadc', '--out', tmp_path / 'out')
    assert status == 0, out
    taken, added, left = lines(out)
    assert taken == {k: new for new, (_, k) in state.items()} and left == set()
    assert any(k != source for k, source in taken.items())


def test_tags_and_classes(convert, tmp_path):
    """Only a named tag gives its licence and labels to the weights; a classifier of any size is taken."""
    torch.save(create_fadc('test_resnet_fadc', num_classes=6).state_dict(), tmp_path / 'x.pth')
    status, out = convert(tmp_path / 'x.pth', '--model', 'test_resnet_fadc', '--out', tmp_path / 'out')
    config = folder_of(tmp_path / 'out')[1]
    assert not {'license', 'tag', 'label_names', 'description'} & {*config, *config['pretrained_cfg']}
    assert config['num_classes'] == 6 and 'num_classes' not in config.get('model_args', {})
    assert config['pretrained_cfg']['mean'] == [0.5, 0.5, 0.5]
    convert(tmp_path / 'x.pth', '--model', 'test_resnet_fadc.bluemarble_climate', '--out', tmp_path / 'out')
    config = folder_of(tmp_path / 'out')[1]
    assert config['pretrained_cfg']['license'] == 'apache-2.0' and config['label_names'][0] == 'ocean'
    # arguments of the model travel, and a network without a classifier stays one
    state = timm.create_model('test_resnet_fadc', num_classes=0, in_chans=5, padding_mode='replicate').state_dict()
    torch.save(state, tmp_path / 'x.pth')
    options = ['--model-kwargs', 'in_chans=5', 'padding_mode=replicate']
    status, out = convert(tmp_path / 'x.pth', '--model', 'test_resnet_fadc', '--out', tmp_path / 'out', *options)
    assert status == 0
    model, config = folder_of(tmp_path / 'out')
    assert config['num_classes'] == 0 and model(torch.zeros(1, 5, 64, 64)).shape == (1, 96)
    assert config['model_args']['padding_mode'] == 'replicate'


def test_what_is_said(tmp_path, capsys):
    """A summary that fits a screen; the list of all keys in a file, beside the folder or where it is wanted."""
    state = {**trained('test_resnet'), **{f'neck.{i}': torch.zeros(1) for i in range(3)}}
    del state['fc.weight'], state['fc.bias']
    state = {f'encoder.model.{k}' if not k.startswith('neck') else k: v for k, v in state.items()}
    torch.save(train_checkpoint({}, state), tmp_path / 'x.pth')
    args = ['convert', str(tmp_path / 'x.pth'), '--model', 'test_resnet_fadc', '--out', str(tmp_path / 'out')]
    assert main(args) == 0
    out = capsys.readouterr().out.splitlines()
    added = len(fadc_keys(timm.create_model('test_resnet_fadc')))
    assert out[:3] == ["A checkpoint of timm, its tensors under 'state_dict_ema'.",
                       f'taken  {len(state) - 3} tensors of the model',
                       f'added  {added} tensors of FADC, which start as the identity']
    assert out[3].startswith('left   ') and 'state_dict.*' in out[3] and 'neck.* (3)' in out[3]
    assert out[4].startswith(f'Wrote {tmp_path / "out"}: timm.create_model(')
    assert out[5] == f'Wrote {tmp_path / "out.keys.txt"}: every key'
    keys = (tmp_path / 'out.keys.txt').read_text().splitlines()
    assert len(keys) == len(state) - 3 + added + 10 and 'left   neck.1' in keys
    assert main([*args, '--keys', str(tmp_path / 'lists' / 'keys.txt')]) == 0
    assert (tmp_path / 'lists' / 'keys.txt').read_text().splitlines() == keys
    assert main(['convert', str(tmp_path / 'out'), *args[2:]]) == 2
    assert 'is a folder, wanted a file. The folder of a model is loaded with fadc_timm.load' in capsys.readouterr().err


def test_counts_of_batches_are_not_told(tmp_path, capsys):
    """Files that lack num_batches_tracked are whole for the summary; the list of keys has them."""
    state = {k: v for k, v in trained('test_resnet').items() if not k.endswith('.num_batches_tracked')}
    torch.save(state, tmp_path / 'x.pth')
    args = ['convert', str(tmp_path / 'x.pth'), '--model', 'test_resnet_fadc', '--out', str(tmp_path / 'out')]
    assert main(args) == 0
    out = capsys.readouterr().out
    added = len(fadc_keys(timm.create_model('test_resnet_fadc')))
    assert f'added  {added} tensors of FADC' in out and 'other tensors' not in out
    assert 'added  bn1.num_batches_tracked' in (tmp_path / 'out.keys.txt').read_text()


def test_own_preprocessing_and_labels(convert, tmp_path):
    torch.save(create_fadc('test_resnet_fadc', num_classes=3).state_dict(), tmp_path / 'x.pth')
    (tmp_path / 'names.txt').write_text('caf\u00e9\nsea \t#00ff00\nsky\t\n', encoding='utf-8-sig')
    args = (tmp_path / 'x.pth', '--model', 'test_resnet_fadc', '--out', tmp_path / 'out')
    own = ('--mean', .1, .2, .3, '--std', .4, .5, 1, '--img-size', 96, 128, '--crop-pct', .8, '--labels',
           tmp_path / 'names.txt', '--license', 'mit')
    assert convert(*args, *own)[0] == 0
    model, config = folder_of(tmp_path / 'out')
    data = timm.data.resolve_model_data_config(model)
    assert (*data['mean'], *data['std'], *data['input_size'], data['crop_pct']) == (
        .1, .2, .3, .4, .5, 1., 3, 96, 128, .8)
    assert config['label_names'] == ['caf\u00e9', 'sea', 'sky'] and model.pretrained_cfg['license'] == 'mit'
    assert list(model.pretrained_cfg['label_names']) == config['label_names']
    before = (tmp_path / 'out' / 'config.json').read_bytes()
    (tmp_path / 'two.txt').write_text('a\nb\n')
    (tmp_path / 'twice.txt').write_text('a\nb\na\n')
    (tmp_path / 'gap.txt').write_text('a\n\nb\n')
    for wrong, message in (
            (('--mean', .1), r'mean must be 3 numbers, one per input channel, got \[0.1\]'),
            (('--std', 0, 1, 1), 'std must be 3 numbers above 0'),
            (('--mean', 123, 117, 104), r'mean is of images in \[0, 1\], .* got \[123.0, .*\]: 123.0 is 0.482'),
            (('--std', .2, 1.5, .2), r'std is of images in \[0, 1\], so at most 1, got \[0.2, 1.5, 0.2\]\.$'),
            (('--crop-pct', 90), 'crop_pct is a share of the image, above 0 and up to 1, got 90.0: 90.0 % is 0.9'),
            (('--crop-pct', 0), 'crop_pct is a share'), (('--crop-pct', 'nan'), 'crop_pct is a share'),
            (('--img-size', 3, 96, 96), '--img-size wants one or two numbers, got 3'),
            (('--img-size', -1), r'input_size must be \(3, height, width\) in pixels'),
            (('--labels', tmp_path / 'two.txt'), 'label_names has 2 names, and the model 3 classes'),
            (('--labels', tmp_path / 'twice.txt'), 'same name for several classes: a'),
            (('--labels', tmp_path / 'gap.txt'), '--labels .*gap.txt: empty names of classes in the lines 2'),
            (('--labels', tmp_path / 'none.txt'), 'none.txt')):
        status, out = convert(*args, *wrong)
        assert status == 2 and re.search(message, out) and len(out.splitlines()) == 1, out
        assert out.startswith(f'fadc-timm: error: {wrong[0]}') and 'x.pth' not in out
    assert (tmp_path / 'out' / 'config.json').read_bytes() == before


def official(path, **more):
    kwargs, state, tensors = mini_backbone()
    torch.save(dict(state_dict=state, meta=dict(epoch=1), **more), path)
    return state, tensors, ['--model', 'resnet50c_fadc', '--model-kwargs', *(f'{k}={v!r}' for k, v in kwargs.items())]


def test_checkpoint_of_the_authors(convert, tmp_path):
    source, out = tmp_path / 'official.pth', tmp_path / 'converted'
    state, tensors, options = official(source)
    for _ in range(2):  # a second run replaces the folder
        status, text = convert(source, '--out', out, *options)
        assert status == 0, text
        model, config = folder_of(out)
        with torch.no_grad():
            assert_features(model.forward_intermediates(tensors['io.x'], intermediates_only=True)[1:], tensors)
    assert config['model_args']['padding_mode'] == 'replicate' and config['model_args']['dilation_act'] == 'abs'
    assert config['model_args']['ada_kern_norm'] == 'batchnorm2d'
    taken, added, left = lines(text)
    assert taken.keys() | added == model.state_dict().keys()
    # joined tensors name all that they were made of
    conv = next(k for k in taken if k.endswith('ada_dr.conv.weight'))
    assert re.fullmatch(r'backbone\.(\S+)\.conv_mask\.weight \+ backbone\.\1\.conv_offset\.weight', taken[conv])[1]
    assert taken['bn1.weight'] == 'backbone.stem.7.weight'
    used = {source for sources in taken.values() for source in sources.split(' + ')}
    assert used | left == {*state, 'meta.*'} and not used & left
    assert {k for k in left if not k.startswith(('decode_head', 'auxiliary_head', 'meta'))} == {
        k for k in state if k.endswith(('dilated_offset', 'OMNI_ATT2.bn.num_batches_tracked'))}
    status, _ = convert(source, '--out', out, *options, '--release', 'april2024')
    assert status == 0 and folder_of(out)[1]['model_args']['dilation_act'] == 'relu'
    # what the command line gives goes before what the release says
    status, _ = convert(source, '--out', out, *options, 'dilation_act=relu', 'padding_mode=zeros')
    assert status == 0
    assert {k: folder_of(out)[1]['model_args'][k] for k in ('dilation_act', 'padding_mode')} == {
        'dilation_act': 'relu', 'padding_mode': 'zeros'}


class Payload:
    def __reduce__(self):
        return (print, ('code from a pickle ran',))


def test_refusals_leave_the_folder_alone(convert, tmp_path, capsys):
    source, out = tmp_path / 'x.pth', tmp_path / 'out'
    torch.save(trained('test_resnet'), source)
    options = ('--model', 'test_resnet_fadc', '--out', out)
    assert convert(source, *options)[0] == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def refused(message, *args):
        status, err = convert(*args)
        assert status == 2 and err.startswith('fadc-timm: error: ') and re.search(message, err), err
        assert 'code from a pickle ran' not in err
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []

    refused('There is no checkpoint', tmp_path / 'nothing.pth', *options)
    bad = tmp_path / 'bad.pth'
    torch.save(dict(trained('test_resnet'), extra=Payload()), bad)
    refused('weights_only=True blocked', bad, *options)
    bad.write_bytes(source.read_bytes()[:-1000])
    refused('bad.pth cannot be read as weights: it is cut off, or not a file of torch.save', bad, *options)
    bad = tmp_path / 'bad.safetensors'
    bad.write_bytes(b'\0' * 100)
    refused('bad.safetensors cannot be read as weights: it is cut off, or not in the format', bad, *options)
    bad = tmp_path / 'bad.bin'
    torch.save([1, 2], bad)
    refused('holds a list, wanted names and tensors', bad, *options)
    torch.save(dict(state_dict={}), bad)
    refused('holds no tensors under state_dict', bad, *options)
    torch.save({k: v for k, v in trained('test_resnet').items() if k != 'layer2.0.conv1.weight'}, bad)
    refused(r'missing keys: layer2\.0\.conv1\.weight; unexpected keys: none', bad, *options)
    refused('fits neither test_convnext_fadc', source, '--model', 'test_convnext_fadc', '--out', out)
    for name, message in (('test_resnet', "'test_resnet' is a plain timm model; with FADC it is 'test_resnet_fadc'"),
                          ('test_vit', "no FADC model is called 'test_vit'"),
                          ('nothing_fadc', "no FADC model is called 'nothing_fadc'"),
                          ('test_resnet_fadc.none', "has no tag 'none'; it has: bluemarble_climate")):
        refused(f'error: --model: .*{message}', source, '--model', name, '--out', out)
    refused('--release is for', source, *options, '--release', 'april2024')
    status, err = convert(source, '--model', 'test_resnet_fadc', '--out', VECTORS)
    assert status == 2 and f'error: --out: {VECTORS} exists and is no folder of a model' in err
    assert (VECTORS / 'README.md').exists()
    refused('error: --model-kwargs: .*depht', source, *options, '--model-kwargs', 'depht=3')


def dies(moment, args):
    """Run the command, and die at a moment of its writing."""
    from fadc_timm.checkpoints import folder
    save, put = folder.save_file, folder._put

    def kill(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def save_half(tensors, path, metadata):
        save(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        kill()

    if moment == 'half of the weights':
        folder.save_file = save_half
    elif moment == 'before the exchange':
        folder._put = kill
    else:
        folder._put = lambda *args: (put(*args), kill())
    main(['convert', *args])


@pytest.mark.parametrize('moment', ['half of the weights', 'before the exchange', 'after the exchange'])
def test_killed(convert, moment, tmp_path):
    """SIGKILL, which no `finally` sees: the folder is the old one or the new one."""
    source, out = tmp_path / 'x.pth', tmp_path / 'out'
    states = [dict(trained('test_resnet')), {k: v * 2 for k, v in trained('test_resnet').items()}]
    args = [str(source), '--model', 'test_resnet_fadc', '--out', str(out)]
    torch.save(states[0], source)
    assert convert(*args)[0] == 0
    torch.save(states[1], source)
    assert forked(lambda: dies(moment, args)) == -signal.SIGKILL
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    expected = states[moment == 'after the exchange']
    assert torch.equal(loaded.state_dict()['conv1.0.weight'], expected['conv1.0.weight'])
    assert sorted(p.name for p in out.iterdir()) == ['config.json', 'model.safetensors']
    assert convert(*args)[0] == 0
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert torch.equal(loaded.state_dict()['conv1.0.weight'], states[1]['conv1.0.weight'])


def test_where_folders_cannot_be_exchanged(convert, tmp_path, monkeypatch):
    """Two renames; if the second fails, the first is undone."""
    from fadc_timm.checkpoints import folder
    monkeypatch.setattr(folder, '_exchange', lambda *args: False)
    source, out = tmp_path / 'x.pth', tmp_path / 'out'
    torch.save(trained('test_resnet'), source)
    args = (source, '--model', 'test_resnet_fadc', '--out', out)
    assert convert(*args)[0] == 0 and convert(*args)[0] == 0
    folder_of(out)
    before, rename = (out / 'model.safetensors').stat().st_ino, Path.rename

    def failing(self, target):
        if self.name == 'new':
            raise OSError('no')
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', failing)
    assert convert(*args)[0] == 2
    assert (out / 'model.safetensors').stat().st_ino == before
    monkeypatch.undo()
    folder_of(out)
