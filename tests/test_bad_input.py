"""Bad input and faults: each gives one clear error that names the cause, and leaves files as they were.

More such tables stand beside what they are about: arguments of the operator (ops/sampled_conv/test_contract.py), of the
layers (layers/test_layers.py), of lift_model (models/test_lift.py), of the command line (test_cli.py), and keys of
checkpoints (models/test_checkpoints.py, checkpoints/test_official.py).
"""
import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from packaging.version import Version
from torch import nn

import fadc_timm
from fadc_timm import AdaDR, AdaKern, FADConv2d, FreqSelect, lift_model
from fadc_timm.cli import main
from tests.support.op_checks import operator

pytestmark = pytest.mark.usefixtures('one_thread')

MODEL = 'test_resnet_fadc'
WEIGHT = 'layer2.0.conv2.weight'


class Malicious:
    """What runs a command when it is unpickled without care."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def model():
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=10)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder of checkpoints that are wrong, and of one that is not."""
    root = tmp_path_factory.mktemp('files')
    state = model().state_dict()

    def changed(value):
        return {**state, WEIGHT: value}

    safetensors.torch.save_file(state, root / 'good.safetensors')
    torch.save(state, root / 'good.pth')
    nan, infinite = state[WEIGHT].clone(), state[WEIGHT].clone()
    nan[0, 0], infinite[0, 0, 0, 0] = float('nan'), float('inf')
    safetensors.torch.save_file(changed(nan), root / 'nan.safetensors')
    torch.save(changed(infinite), root / 'infinite.pth')
    safetensors.torch.save_file(changed(state[WEIGHT].to(torch.int8)), root / 'int8.safetensors')
    safetensors.torch.save_file(changed(torch.zeros(3, 3)), root / 'shape.safetensors')
    torch.save(changed('a string'), root / 'string.pth')
    for name, keep in (('good.safetensors', -500), ('good.pth', -500)):
        (root / f'cut_off{Path(name).suffix}').write_bytes((root / name).read_bytes()[:keep])
    (root / 'header.safetensors').write_bytes((root / 'good.safetensors').read_bytes()[:500])
    for suffix in ('pth', 'safetensors'):
        (root / f'empty.{suffix}').write_bytes(b'')
        (root / f'page.{suffix}').write_text('<html>404: not found</html>')
    torch.save({'state_dict': state, 'more': Malicious(f'touch {root}/was_run')}, root / 'malicious.pth')
    torch.save({'state_dict': model()}, root / 'module.pth')
    other = timm.create_model('test_convnext', num_classes=10).state_dict()
    safetensors.torch.save_file(other, root / 'other.safetensors')
    photo = Path(fadc_timm.__file__).parent / 'data' / 'coffee.jpg'
    (root / 'cut_off.jpg').write_bytes(photo.read_bytes()[:20_000])
    (root / 'folder.png').mkdir()
    timm.models.save_for_hf(model(), root / 'whole', model_args={}, safe_serialization=True)
    for name, change in FOLDERS.items():
        change(Path(shutil.copytree(root / 'whole', root / name)))
    return root


def with_config(**entries):
    def change(folder):
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps({**config, **entries}))
    return change


def cut_off_weights(folder):
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])


# Options of the wrong type, as a config.json written by hand may have them.
OPTIONS = {
    'bands': ('2,4,8', [2, '4'], None), 'fadc_stages': ([0, 1, 1, 1], None, 'layer4', [True]),
    'eps': ('small', None, True), 'dilation_groups': ('2', 1.5, True, None), 'spatial_group': ('1', 1.5, True, None),
    'lowfreq_att': ('yes', 1, None), 'freq_select': ('no', 0), 'backend': (3, 'cudnn'),
    'ada_dr': ('no', 1, None), 'sampling': ('no', True, None),
    'padding_mode': (None, 'reflect'), 'kernel_decompose': (True, ['low']), 'dilation_act': (None, 0),
    'ada_kern_norm': (None, 1, 'norm', ['layernorm2d'])}
FOLDERS = {f'{name}={i}': with_config(model_args={name: value})
           for name, values in OPTIONS.items() for i, value in enumerate(values)}
FOLDERS.update({
    'unknown_option': with_config(model_args={'dilation_akt': 'abs'}),
    'unknown_architecture': with_config(architecture='resnet51_fadc'),
    'other_architecture': with_config(architecture='test_convnext_fadc'),
    'no_json': lambda folder: (folder / 'config.json').write_text('{"architecture": '),
    'no_architecture': lambda folder: (folder / 'config.json').write_text('{}'),
    'no_config': lambda folder: (folder / 'config.json').unlink(),
    'no_weights': lambda folder: (folder / 'model.safetensors').unlink(),
    'cut_off_weights': cut_off_weights,
})


# what the cases call


def load(name, **kwargs):
    def call(files, _):
        overlay = dict(file=str(files / name), num_classes=10)
        timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    return call


def local(name):
    return lambda files, _: timm.create_model(f'local-dir:{files / name}', pretrained=True)


def create(name=MODEL, **kwargs):
    return lambda *_: timm.create_model(name, **kwargs)


def forward(make_module, *shape, dtype=torch.float32, device='cpu'):
    return lambda *_: make_module()(torch.zeros(shape, device=device).to(dtype))


def command(*args):
    """The command line, its one line on stderr as an exception; `{}` in an argument is the folder of the files."""
    def call(files, capsys):
        status = main([a.format(files) for a in args])
        captured = capsys.readouterr()
        assert status == 2 and captured.out == '' and len(captured.err.splitlines()) == 1, captured
        raise RuntimeError(captured.err)
    return call


def visualize(*args):
    return command('visualize', '--size', '64', '--out', '{}/out.png', *args)


def conv(**kwargs):
    return lambda: FADConv2d(4, 4, 3, **{'padding': 1, **kwargs})


CASES = {
    # names and tags
    'tag': (create('resnet18_fadc.nope'), RuntimeError, 'Invalid pretrained tag .nope. for resnet18_fadc'),
    'model': (create('resnet51_fadc'), RuntimeError, r'Unknown model \(resnet51_fadc\)'),
    'plain_path': (create('./resnet18_fadc'), ValueError, "local-dir:./resnet18_fadc"),
    'no_pretrained_weights': (
        create('resnet18_fadc', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=None, url='')),
        RuntimeError, 'No pretrained weights exist for resnet18_fadc'),
    'no_network': (create('resnet18_fadc.tv_in1k', pretrained=True), Exception, 'connection|offline'),
    # files of weights
    'absent_file': (load('absent.pth'), FileNotFoundError, r"no checkpoint '.*absent\.pth'"),
    'absent_safetensors': (load('absent.safetensors'), FileNotFoundError, r"no checkpoint '.*absent\.safetensors'"),
    'folder_for_file': (load('no_config'), FileNotFoundError, "no checkpoint '.*no_config'"),
    'cut_off_safetensors': (load('cut_off.safetensors'), RuntimeError, r"'.*cut_off\.safetensors' is cut off"),
    'cut_off_header': (load('header.safetensors'), RuntimeError, r"'.*header\.safetensors' is cut off"),
    'cut_off_pth': (load('cut_off.pth'), RuntimeError, r"'.*cut_off\.pth' is cut off"),
    'empty_pth': (load('empty.pth'), RuntimeError, r"'.*empty\.pth' is cut off, or not a file of torch\.save"),
    'empty_safetensors': (load('empty.safetensors'), RuntimeError, r"'.*empty\.safetensors' is cut off"),
    'page_pth': (load('page.pth'), RuntimeError, r"'.*page\.pth' is .*not a file of torch\.save"),
    'page_safetensors': (load('page.safetensors'), RuntimeError, r"'.*page.safetensors' is .*not in the format"),
    'malicious': (load('malicious.pth'), RuntimeError, r'weights_only=True blocked.*system'),
    'pickled_module': (load('module.pth'), RuntimeError, r'weights_only=True blocked.*FADConv2d'),
    # what is in them
    'nan': (load('nan.safetensors'), RuntimeError, rf'not finite: {WEIGHT} \(9 of 20736\)'),
    'nan_features': (load('nan.safetensors', features_only=True), RuntimeError, rf'not finite: {WEIGHT} \(9 of'),
    'infinite': (load('infinite.pth'), RuntimeError, rf'not finite: {WEIGHT} \(1 of 20736\)'),
    'integers': (load('int8.safetensors'), RuntimeError, rf'integers: {WEIGHT} \(torch\.int8\)'),
    'no_tensor': (load('string.pth'), RuntimeError, rf'no tensors: {WEIGHT} \(str\)'),
    'shape': (load('shape.safetensors'), RuntimeError, rf'size mismatch for {WEIGHT}.*\[3, 3\].*\[48, 48, 3, 3\]'),
    'other_network': (load('other.safetensors'), RuntimeError, 'fits neither test_resnet_fadc nor its base: missing'),
    'plain_into_fadc': (
        lambda *_: model().load_state_dict(timm.create_model('test_convnext', num_classes=10).state_dict()),
        RuntimeError, r'fits neither test_resnet_fadc nor its base'),
    # folders
    **{f'{name}={value!r}': (local(f'{name}={i}'), ValueError, rf'{name}\b.*(must|does not divide)')
       for name, values in OPTIONS.items() for i, value in enumerate(values)},
    'unknown_option': (local('unknown_option'), TypeError, 'dilation_akt'),
    'unknown_architecture': (local('unknown_architecture'), RuntimeError, 'Unknown model .resnet51_fadc'),
    'other_architecture': (local('other_architecture'), RuntimeError, 'fits neither test_convnext_fadc nor its base'),
    'no_json': (local('no_json'), json.JSONDecodeError, 'line 1'),
    'no_architecture': (local('no_architecture'), KeyError, 'architecture'),
    'no_config': (local('no_config'), FileNotFoundError, r'no_config/config\.json'),
    'no_weights': (local('no_weights'), RuntimeError, 'No suitable checkpoints found in .*no_weights'),
    'no_folder': (local('absent'), FileNotFoundError, r'absent/config\.json'),
    'cut_off_weights': (local('cut_off_weights'), RuntimeError, r"cut_off_weights/model\.safetensors' is cut off"),
    # images
    'channels': (forward(model, 1, 4, 64, 64), RuntimeError, r'\[1, 4, 64, 64\] to have 3 channels, but got 4'),
    'no_batch': (forward(lambda: timm.create_model('test_convnext_fadc'), 3, 64, 64), Exception, '3D|permute|dim'),
    'image_too_small': (
        forward(lambda: timm.create_model('test_convnext_fadc'), 1, 3, 8, 8), RuntimeError,
        r"\(1 x 1\).*Kernel size can't be greater"),
    'no_pixels': (forward(model, 1, 3, 0, 64), RuntimeError, "Kernel size can't be greater"),
    'integer_image': (forward(model, 1, 3, 64, 64, dtype=torch.uint8), RuntimeError, 'Byte but found Float'),
    'double_image': (forward(model, 1, 3, 64, 64, dtype=torch.float64), RuntimeError, 'Double but found Float'),
    'image_elsewhere': (forward(model, 1, 3, 64, 64, device='meta'), RuntimeError, 'device cpu.*device meta'),
    'model_elsewhere': (
        forward(lambda: model().to('meta'), 1, 3, 64, 64), RuntimeError, 'device meta.*device cpu'),
    # maps
    'map_of_integers': (forward(conv(), 1, 4, 8, 8, dtype=torch.int64), RuntimeError, 'long int.* and .*float'),
    'map_elsewhere': (forward(conv(), 1, 4, 8, 8, device='meta'), RuntimeError, 'device cpu.*device meta'),
    'map_without_rows': (forward(conv(), 1, 4, 0, 8), ValueError, r'FADConv2d wants \(B, 4, H, W\).*\[1, 4, 0, 8\]'),
    'map_too_small': (forward(conv(padding=0), 1, 4, 2, 2), RuntimeError, r'\(2 x 2\).*Kernel size: \(3 x 3\)'),
    'freq_select': (forward(lambda: FreqSelect(4), 1, 5, 8, 8), ValueError, r'FreqSelect wants .*\[1, 5, 8, 8\]'),
    'freq_select_rank': (forward(lambda: FreqSelect(4), 4, 8, 8), ValueError, r'FreqSelect wants .*\[4, 8, 8\]'),
    'ada_kern': (forward(lambda: AdaKern(4, 4), 1, 5, 8, 8), ValueError, r'AdaKern wants \(B, 4,.*\[1, 5, 8, 8\]'),
    'ada_kern_rank': (forward(lambda: AdaKern(4, 4), 1, 4), ValueError, r'AdaKern wants .*\[1, 4\]'),
    'ada_dr': (forward(lambda: AdaDR(4), 1, 5, 8, 8), RuntimeError, r'\[1, 5, 8, 8\] to have 4 channels'),
    # backends
    'absent_backend': (create(backend='cudnn'), ValueError, "backend.*'cudnn'"),
    'absent_backend_in_a_call': (operator(backend='cudnn'), ValueError, "no backend 'cudnn'.*gather"),
    'backend_elsewhere': (
        forward(lambda: conv(backend='torchvision')().to('meta'), 1, 4, 8, 8, device='meta'), NotImplementedError,
        "'torchvision' cannot run this call: .*meta"),
    # networks
    'in_chans': (create(in_chans=-1), RuntimeError, r'negative dimension -1'),
    'feature_index': (create(features_only=True, out_indices=(9,)), IndexError, 'index out of range'),
    'lift_stages_none': (lambda *_: lift_model(timm.create_model('test_resnet'), None), ValueError, 'stages.*None'),
    'lift_stages_number': (lambda *_: lift_model(timm.create_model('test_resnet'), 3), ValueError, 'stages.*got 3'),
    'lift_name': (lambda *_: lift_model('resnet50'), TypeError, 'wants a module, got str'),
    'lift_module': (lambda *_: lift_model(nn.Linear(3, 3)), ValueError, 'Linear has no k x k'),
    # command line
    'visualize_absent': (visualize('--checkpoint', '{}/absent.pth'), RuntimeError, "no checkpoint at '.*absent.pth'"),
    'visualize_cut_off': (visualize('--checkpoint', '{}/cut_off.pth'), RuntimeError, "cannot read .*: it is cut off"),
    'visualize_cut_off_safetensors': (
        visualize('--checkpoint', '{}/cut_off.safetensors'), RuntimeError, "cannot read .*: it is cut off"),
    'visualize_malicious': (visualize('--checkpoint', '{}/malicious.pth'), RuntimeError, 'weights_only=True blocked'),
    'visualize_nan': (visualize('--checkpoint', '{}/nan.safetensors'), RuntimeError, f'not finite: {WEIGHT}'),
    'visualize_other': (visualize('--checkpoint', '{}/other.safetensors'), RuntimeError, f"does not fit '{MODEL}'"),
    'visualize_image': (visualize('{}/cut_off.jpg'), RuntimeError, r"cannot read '.*\.jpg' as an image: .*trunc"),
    'visualize_folder': (visualize('{}'), RuntimeError, 'cannot read .* as an image: .*directory'),
    'visualize_onto_a_folder': (
        command('visualize', '--size', '64', '--out', '{}/folder.png'), RuntimeError, "'.*folder.png' is a folder"),
    'list': (command('list', 'nothing_like_it'), RuntimeError, "no FADC model matches 'nothing_like_it'"),
    'run': (command('run', '{}/absent.py'), RuntimeError, r"cannot open script '.*absent\.py': No such file"),
}


def contents(folder):
    return {path: path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob('*')}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)


if Version(timm.__version__) < Version('1.0.31'):
    del CASES['plain_path']  # timm 1.0.28 takes the end of a path for a name


@pytest.mark.filterwarnings('ignore:Initializing zero-element tensors')
@pytest.mark.parametrize('call, exception, message', CASES.values(), ids=CASES)
def test_bad_input(call, exception, message, files, capsys, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(files)
    with pytest.raises(exception, match=f'(?s){message}'):
        call(files, capsys)
    assert contents(files) == before and not os.listdir(tmp_path)


def test_what_is_not_wrong(files):
    """The good files load, so that what is refused above is refused for its one fault."""
    expected = model().state_dict()
    for name in ('good.pth', 'good.safetensors'):
        overlay = dict(file=str(files / name), num_classes=10)
        loaded = timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay)
        assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    timm.create_model(f'local-dir:{files / "whole"}', pretrained=True)
    operator()()
