"""The command line: visualize, list, info and run."""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fadc_timm
from fadc_timm import visualize
from fadc_timm.checkpoints import write_folder
from fadc_timm.cli import main
from fadc_timm.layers import FADConv2d
from fadc_timm.models._family import architecture_of
from fadc_timm.models.cost import Cost, listed_cost, model_cost
from fadc_timm.ops import triton_support
from scripts.checks import cost_table
from tests.support.off_identity import off_identity
from tests.support.small_model import MODEL, make_model

ROOT = Path(fadc_timm.__file__).parents[1]
SHOW_STATE = 'import sys, timm; print(sys.argv, sys.path[0], __name__, __file__)\n'


@pytest.fixture
def process(monkeypatch):
    """`run` makes this process the script's; give it back afterwards."""
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])


def command(*args, **kwargs):
    """Run a python command line with the package importable, wherever it runs."""
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
           'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        [sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=300, **kwargs)


def table_rows(text):
    """Stage name -> the row's columns."""
    lines = [line for line in text.splitlines() if re.match(r'(layer|stages\.)\d', line)]
    return {line.split()[0]: re.split(r'\s{2,}', line) for line in lines}


# --- visualize ---

def test_visualize(tmp_path, capsys):
    out = tmp_path / 'a.png'
    assert main(['visualize', '--no-pretrained', '--out', str(out)]) == 0
    text = capsys.readouterr().out
    assert 'random weights' in text and str(out) in text
    line = 'No map differs from its start, as before any training of FADC; --pretrained takes weights that were trained'
    assert f'{line} with it.' in text.splitlines()
    rows = table_rows(text)
    assert rows['layer2'][2:5] == ['48x48x72', '8', '1.00 (1.00 to 1.00)'] and rows['layer2'][5:] == ['1.00'] * 3
    assert rows['layer4'][2:4] == ['96x12x18', '32']
    with Image.open(out) as image:
        assert image.format == 'PNG' and image.width == 1600 and 900 < image.height < 2000
        pixels = np.asarray(image.convert('RGB'))
    left = pixels[:, :420]  # the photograph is in colour, and there is more than it
    assert left.std() > 30 and (np.ptp(left.astype(int), axis=-1) > 60).sum() > 20000
    assert pixels[:, 420:].std() > 20
    assert os.listdir(tmp_path) == ['a.png']


def test_visualize_takes_weights_from_the_package(tmp_path, capsys):
    assert main(['visualize', '--out', str(tmp_path / 'a.png')]) == 0
    text = capsys.readouterr().out
    assert "pretrained weights 'bluemarble_climate', in the package" in text and 'constant' not in text
    for row in table_rows(text).values():  # training moved every stage away from its identity start
        low, high = map(float, re.search(r'\((.*) to (.*)\)', row[4]).groups())
        assert high - low > 0.1 and min(map(float, row[5:])) < 0.95


def test_visualize_shows_what_the_model_saw(tmp_path, monkeypatch):
    """The photograph undistorted and without borders, its normalisation undone."""
    shown = []
    monkeypatch.setattr(visualize, 'figure', lambda image, *args: shown.append(image))
    monkeypatch.setattr(visualize, 'save', lambda *args: None)
    colour = (200, 40, 90)
    pixels = np.full((300, 500, 3), colour, np.uint8)
    pixels[100:200, 200:300] = 0  # a square
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    assert main(['visualize', str(tmp_path / 'photo.png'), '--no-pretrained', '--out', str(tmp_path / 'a.png')]) == 0
    image, = shown
    assert image.shape == (352, 576, 3)
    np.testing.assert_allclose(image[:5].reshape(-1, 3) * 255, np.broadcast_to(colour, (5 * 576, 3)), atol=1)
    np.testing.assert_allclose(image[-5:].reshape(-1, 3) * 255, np.broadcast_to(colour, (5 * 576, 3)), atol=1)
    dark = image.sum(-1) < 0.3
    assert dark.any(0).sum() == pytest.approx(dark.any(1).sum(), abs=1)


def test_visualize_size_and_aspect(tmp_path, capsys):
    photo = tmp_path / 'tall.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 100, 3), np.uint8)).save(photo)
    args = ['visualize', str(photo), '--no-pretrained', '--out', str(tmp_path / 'a.png')]
    assert main(args) == 0
    assert 'input 192x576' in capsys.readouterr().out
    assert main([*args, '--size', '101']) == 0
    assert 'input 34x101' in capsys.readouterr().out


def test_visualize_checkpoint(tmp_path, capsys):
    """A checkpoint with its own number of classes, FADC or plain, as a training script saves it."""
    args = ['visualize', '--size', '64', '--out', str(tmp_path / 'a.png'), '--checkpoint', str(tmp_path / 'c.pth')]
    model = make_model()
    model.reset_classifier(5)
    for m in model.modules():
        if isinstance(m, FADConv2d):
            torch.nn.init.zeros_(m.ada_dr.conv.weight)
            torch.nn.init.constant_(m.ada_dr.conv.bias, 0.75)
    torch.save({'state_dict': model.state_dict(), 'epoch': 3}, tmp_path / 'c.pth')
    assert main(args) == 0
    assert [row[4] for row in table_rows(capsys.readouterr().out).values()] == ['1.75 (1.75 to 1.75)'] * 3

    torch.save(timm.create_model('test_resnet', num_classes=0).state_dict(), tmp_path / 'c.pth')
    assert main(args) == 0
    assert [row[4] for row in table_rows(capsys.readouterr().out).values()] == ['1.00 (1.00 to 1.00)'] * 3


def test_visualize_a_picture_of_constant_maps_says_so(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(visualize, 'figure', lambda image, stages, title, note: notes.append(note))
    monkeypatch.setattr(visualize, 'save', lambda *args: None)
    args = ['visualize', '--size', '64', '--out', str(tmp_path / 'a.png')]
    assert main([*args, '--no-pretrained']) == 0 and main(args) == 0
    assert main([*args, '--no-pretrained', '--model', 'test_convnext_fadc']) == 0
    assert ['No map differs from its start' in note for note in notes] == [True, False, True]
    assert '--pretrained takes' in notes[0] and '--checkpoint takes' in notes[2]  # of which there are trained weights


@pytest.mark.parametrize('options, pretrained', [
    (['--model', 'resnet18_fadc.a2_in1k'], True), (['--model', 'resnet18_fadc.a2_in1k', '--no-pretrained'], False),
    (['--model', 'resnet18_fadc'], False), (['--model', 'resnet18_fadc', '--pretrained'], True)])
def test_visualize_a_tag_means_its_weights(options, pretrained, tmp_path, monkeypatch, capsys):
    asked, model = [], make_model()

    def create_model(name, pretrained=False):
        asked.append(pretrained)
        return model

    monkeypatch.setattr(timm, 'create_model', create_model)
    assert main(['visualize', *options, '--size', '64', '--out', str(tmp_path / 'a.png')]) == 0
    assert asked == [pretrained]
    assert ('pretrained weights' in capsys.readouterr().out) == pretrained


def test_visualize_several_images(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = [tmp_path / 'wide.png', tmp_path / 'tall.jpg']
    for path, size in zip(photos, ((90, 60), (60, 90))):
        Image.effect_noise(size, 60).save(path)
    assert main(['visualize', *map(str, photos), '--size', '64', '--no-pretrained']) == 0
    lines = capsys.readouterr().out.splitlines()
    for path, size in zip(photos, ('64x43', '43x64')):
        assert f'{path}: {MODEL}: random weights; input {size}' in lines
    assert sorted(os.listdir('fadc_visualize')) == ['tall.png', 'wide.png']
    assert main(['visualize', *map(str, photos), '--size', '64', '--no-pretrained', '--out', 'other']) == 0
    assert sorted(os.listdir('other')) == ['tall.png', 'wide.png']
    capsys.readouterr()
    (tmp_path / 'a').mkdir()
    Image.effect_noise((64, 64), 60).save('a/wide.jpg')
    for args, message in (
            (['--out', 'a.png'], "--out wants a folder for the pictures of 2 images, got 'a.png'"),
            (['--out', 'wide.png'], '--out wants a folder'), (['absent.jpg'], "no image at 'absent.jpg'"),
            (['a/wide.jpg'], "wide.png' and 'a/wide.jpg' have the same name")):
        assert main(['visualize', *map(str, photos), *args]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == ''


def test_visualize_takes_the_folder_of_a_model(tmp_path, capsys):
    """Its architecture and options too."""
    model = timm.create_model(MODEL, num_classes=5, fadc_stages=(False, False, False, True))
    folder = str(write_folder(off_identity(model), tmp_path / 'own',
                              model_args=dict(fadc_stages=(False, False, False, True))))
    args = ['visualize', '--size', '64', '--out', str(tmp_path / 'a.png'), '--checkpoint']
    assert main([*args, folder]) == 0
    text = capsys.readouterr().out
    assert f'{MODEL}: weights from {folder}' in text and list(table_rows(text)) == ['layer4'] and 'constant' not in text
    assert main([*args, folder, '--model', MODEL]) == 0
    capsys.readouterr()
    plain = str(write_folder(timm.create_model('test_resnet'), tmp_path / 'plain'))
    grey = str(write_folder(timm.create_model(MODEL, in_chans=1), tmp_path / 'grey', model_args=dict(in_chans=1)))
    for rest, message in (
            ([folder, '--model', 'resnet18_fadc'], f'holds the model {MODEL}, not resnet18_fadc'),
            ([plain], "the model test_resnet in '.*plain' has no FADC layers"),
            ([str(tmp_path)], 'has no config.json, so it is no folder of a model'),
            ([grey], 'takes images of 1 channels')):
        assert main([*args, *rest]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_visualize_of_16_bits(tmp_path, monkeypatch):
    """The model sees the photograph, not white."""
    shown = []
    monkeypatch.setattr(visualize, 'figure', lambda image, *args: shown.append(image))
    monkeypatch.setattr(visualize, 'save', lambda *args: None)
    grey = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))
    for name, values in (('a.png', grey), ('b.png', grey.astype(np.uint16) * 257), ('c.tif', (grey / 255).astype('f'))):
        Image.fromarray(values).save(tmp_path / name)
        assert main(['visualize', str(tmp_path / name), '--no-pretrained', '--out', str(tmp_path / 'o.png')]) == 0
    assert shown[0].std() > 0.2
    for image in shown[1:]:
        np.testing.assert_array_equal(image, shown[0])


@pytest.mark.parametrize('args, message', [
    (['--model', 'resnet50'], r"'resnet50' is a plain timm model; with FADC it is 'resnet50_fadc'"),
    (['--model', 'resnet51_fadc'], r"'resnet51_fadc'; close matches: .*resnet50_fadc"),
    (['--model', 'resnet50_fadc.nope'], r"'resnet50_fadc' has no tag 'nope'; it has: .*a1_in1k"),
    (['absent.jpg'], r"no image at 'absent.jpg'"),
    ([__file__], r"cannot read '.*test_cli.py' as an image"),
    (['--checkpoint', 'absent.pth'], r"no checkpoint at 'absent.pth'"),
    (['--checkpoint', __file__], r"cannot read checkpoint '.*test_cli.py'"),
    (['--checkpoint', 'absent.pth', '--pretrained'], r'exclude each other'),
    (['--out', 'a.jpg'], r"\.png, got 'a.jpg'"),
    (['--out', 'absent/a.png'], r"no folder 'absent'"),
    (['--size', '0'], r"32 or more, got '0'"),
    (['--size', 'big'], r"32 or more, got 'big'"),
])
def test_visualize_errors_are_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['visualize', '--no-pretrained' if '--pretrained' not in args else '--size=64', *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == '' and len(captured.err.splitlines()) == 1
    assert re.search(message, captured.err), captured.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('state, message', [
    (lambda: timm.create_model('test_convnext', num_classes=3).state_dict(), r"does not fit 'test_resnet_fadc'"),
    (lambda: {'state_dict': {'a': 1}}, 'holds no tensors'),
    (lambda: {}, 'holds no tensors'),
])
def test_checkpoint_that_does_not_fit(state, message, tmp_path, capsys):
    torch.save(state(), tmp_path / 'c.pth')
    assert main(['visualize', '--checkpoint', str(tmp_path / 'c.pth'), '--out', str(tmp_path / 'a.png')]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1 and len(error) < 600
    assert os.listdir(tmp_path) == ['c.pth']


# --- list ---

def list_rows(capsys, *args):
    assert main(['list', *args]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ['name', 'base', 'params', '(M)', 'GMACs', 'input', 'licence', 'weights']
    return [line.split(maxsplit=6) for line in lines]


def test_list(capsys):
    rows = list_rows(capsys, 'test_resnet*')
    name, base, params, gmacs, size, licence, weights = next(row for row in rows if row[0] == MODEL)
    model = timm.create_model(MODEL, num_classes=timm.get_pretrained_cfg(MODEL).num_classes)
    assert base == 'test_resnet' and size == '160x160' and (licence, weights) == ('apache-2.0', 'in the package')
    assert float(params) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.005)
    # the weights move FADC's cost above that of the base: no operator is left out of the count
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        timm.create_model('test_resnet').eval()(torch.randn(1, 3, 160, 160))
    assert counter.get_total_flops() / 2e9 < float(gmacs) < 2 * counter.get_total_flops() / 2e9


def test_list_filters(capsys):
    everything = [name for name in timm.list_models() if architecture_of(name) is not None]
    for pattern in ('test_*', 'test_'):
        assert [row[0] for row in list_rows(capsys, pattern)] == [n for n in everything if n.startswith('test_')]
    assert [row[0] for row in list_rows(capsys, MODEL)] == [MODEL]
    rows = list_rows(capsys, 'resnet18_fadc', '--tags')
    assert [row[0] for row in rows] == timm.list_models('resnet18_fadc', include_tags=True) and len(rows) > 3
    ids = {row[0]: row[5:] for row in rows}
    assert ids['resnet18_fadc.a1_in1k'] == ['apache-2.0', 'timm/resnet18.a1_in1k']
    assert ids['resnet18_fadc.fb_ssl_yfcc100m_ft_in1k'][0] == 'cc-by-nc-4.0'
    assert [row[0] for row in list_rows(capsys, 'resnet18_fadc.a1*', '--tags')] == ['resnet18_fadc.a1_in1k']
    assert main(['list', 'resnt18_fadc']) == 2
    assert re.search("'resnt18_fadc'; close matches: .*resnet18_fadc", capsys.readouterr().err)


FAMILIES = ['test_resnet_fadc', 'test_convnext_fadc', 'resnet18_fadc', 'convnextv2_atto_fadc']
in_families = pytest.mark.parametrize('pattern', [*FAMILIES, pytest.param('*_fadc', marks=pytest.mark.sweep)])


@in_families
def test_list_counts_nothing(pattern, capsys, monkeypatch):
    """Models and tags are in the table; what another version of timm adds is counted."""
    monkeypatch.setattr('fadc_timm.models.cost.model_cost', lambda *args: pytest.fail(f'counted {args}'))
    assert len(list_rows(capsys, pattern, '--tags')) == len(timm.list_models(pattern, include_tags=True))
    monkeypatch.setattr('fadc_timm.models.cost._table', dict)
    monkeypatch.setattr('fadc_timm.models.cost.model_cost', lambda *args: Cost(1.5, 2.5, 3.5))
    assert list_rows(capsys, pattern)[0][2:4] == ['1.50', '2.50']


@in_families
def test_table_of_costs(pattern):
    """What `python -m scripts.checks.cost_table` counted is what is counted now."""
    found = list(cost_table.keys(pattern))
    assert found and any(not arch.endswith('_fadc') for arch, _, _ in found)
    for key in found:
        assert cost_table.row(*key, listed_cost(*key)) == cost_table.row(*key, model_cost(*key)), key


# --- info ---

def test_info(monkeypatch, capsys):
    """What it says is what the library says."""
    for name in ('FADC_TIMM_BACKEND', 'FADC_TIMM_WORKSPACE_MB'):
        monkeypatch.delenv(name, raising=False)
    assert main(['info']) == 0
    text = capsys.readouterr().out
    assert f'fadc_timm {fadc_timm.__version__}, torch {torch.__version__}, ' in text
    assert "name none: by device, dtype and shape; workspace of 'triton': 256 MB\n" in text
    cpu = text.partition('\ncpu: ')[2].split('\n\n')[0].splitlines()
    assert 'GiB' in cpu[0] and cpu[1] == '  convolution: gather; depthwise: gather; band mix: fused'
    reason = triton_support.why_not_on('cpu')
    assert cpu[2:] == [*(f'  {name}: runs' for name in ('reference', 'gather', 'torchvision', 'grid_sample')),
                       f'  triton: cannot run: {reason}' if reason else '  triton: runs']


def test_info_of_settings(monkeypatch, capsys):
    monkeypatch.setenv('FADC_TIMM_BACKEND', 'grid_sample')
    monkeypatch.setenv('FADC_TIMM_WORKSPACE_MB', '64')
    monkeypatch.setattr('fadc_timm.ops.triton_support.unavailable', lambda: 'Triton is not installed (why)')
    assert main(['info']) == 0
    text = capsys.readouterr().out
    assert "name none: grid_sample; workspace of 'triton': 64 MB\n" in text
    assert '  convolution: grid_sample; depthwise: grid_sample; band mix: written_out\n' in text
    for line in ('Triton is not installed (why)', '  triton: cannot run: Triton is not installed (why)'):
        assert f'\n{line}\n' in text
    monkeypatch.setenv('FADC_TIMM_BACKEND', 'other')
    assert main(['info']) == 2
    assert "FADC_TIMM_BACKEND is 'other', it must be one of" in capsys.readouterr().err


# --- run ---

def test_run_registers_the_models(tmp_path, capsys, process):
    (tmp_path / 'neighbour.py').write_text('value = 3\n')
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys, timm, neighbour\n'
        'class Pickled: pass\n'
        'import __main__\n'
        'print(__name__, sys.argv[1:], neighbour.value, __main__.Pickled is Pickled)\n'
        'print(timm.is_model("test_resnet_fadc"))\n')
    assert main(['run', str(script), '--help', '--', '-x', 'a b']) == 0
    assert capsys.readouterr().out.splitlines() == ["__main__ ['--help', '--', '-x', 'a b'] 3 True", 'True']


@pytest.mark.parametrize('code', [0, 7, 'a message'])
def test_run_passes_on_the_exit_status(code, tmp_path, process):
    script = tmp_path / 'script.py'
    script.write_text(f'import sys; sys.exit({code!r})')
    with pytest.raises(SystemExit) as e:
        main(['run', str(script)])
    assert e.value.code == code


def test_run_without_a_script(tmp_path, capsys, process):
    assert main(['run']) == 2
    assert main(['run', str(tmp_path / 'absent.py')]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and 'wants a script' in lines[0] and 'absent.py' in lines[1]


def test_run_does_what_python_does(tmp_path):
    """Same output, traceback and exit status as without us."""
    script = Path('folder') / 'script.py'
    (tmp_path / 'folder').mkdir()
    (tmp_path / script).write_text(SHOW_STATE + 'def f():\n    raise ValueError("said so")\nf()\n')
    plain = command(script, '--help', '3', cwd=tmp_path)
    ours = command('-m', 'fadc_timm', 'run', script, '--help', '3', cwd=tmp_path)
    assert plain.returncode == ours.returncode == 1
    assert ours.stdout == plain.stdout and f"['{script}', '--help', '3'] {tmp_path / 'folder'}" in ours.stdout
    assert ours.stderr == plain.stderr and 'said so' in ours.stderr


def test_run_under_torchrun(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys, timm, torch, torch.distributed as dist\n'
        'dist.init_process_group("gloo")\n'
        'x = torch.tensor([float(timm.is_model("test_resnet_fadc")) + dist.get_rank()])\n'
        'dist.all_reduce(x)\n'
        'if dist.get_rank() == 0: print("sum", x.item(), sys.argv[1:])\n'
        'dist.destroy_process_group()\n')
    done = command('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2,
                   '-m', 'fadc_timm', 'run', script, '--lr', '1', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sum 3.0 ['--lr', '1']" in done.stdout
