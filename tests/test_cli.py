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
from fadc_timm.cli import main
from fadc_timm.layers import FADConv2d
from fadc_timm.models._family import architecture_of
from fadc_timm.ops import triton_support
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
    assert "pretrained weights 'bluemarble_climate', in the package" in text
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
    return [line.split(maxsplit=5) for line in lines]


def test_list(capsys):
    name, base, params, gmacs, size, weights = next(r for r in list_rows(capsys, 'test_resnet*') if r[0] == MODEL)
    model = timm.create_model(MODEL, num_classes=timm.get_pretrained_cfg(MODEL).num_classes)
    assert base == 'test_resnet' and size == '160x160'
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
    ids = {row[0]: row[5] for row in rows}
    assert ids['resnet18_fadc.a1_in1k'] == 'timm/resnet18.a1_in1k'
    assert [row[0] for row in list_rows(capsys, 'resnet18_fadc.a1*', '--tags')] == ['resnet18_fadc.a1_in1k']
    assert main(['list', 'resnt18_fadc']) == 2
    assert re.search("'resnt18_fadc'; close matches: .*resnet18_fadc", capsys.readouterr().err)


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
    assert '  convolution: grid_sample; depthwise: grid_sample; band mix: fused\n' in text
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


def test_import_leaves_matplotlib_alone():
    done = command('-c', 'import sys, fadc_timm.cli, fadc_timm.visualize; print("matplotlib" in sys.modules)')
    assert done.stdout.strip() == 'False', done.stderr
