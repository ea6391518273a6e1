"""scripts.segmentation.train: its losses, training resumed to the bit, and the script itself."""
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fadc_timm
import fadc_timm.losses
from scripts.segmentation.recipe import Objective, Recipe
from scripts.training.batches import Samples
from scripts.training.engine import train
from scripts.training.variants import apply_variant
from scripts.training.world import World
from tests.support.processes import torchrun
from tests.support.segmentation_cases import Pictures, backbone, put, transform, write_folder
from tests.support.training_cases import losses

pytestmark = pytest.mark.usefixtures('one_thread')

CPU = World(torch.device('cpu'))
# of processes that run the script
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}


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


# the script


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / 'data')


OPTIONS = ['--backbone', 'test_resnet_fadc', '--decoder-channels', '8', '--crop', '32', '--batch', '2', '--steps', '6',
           '--warmup', '1', '--lr', '1e-3', '--ema', '0.5', '--aux-loss', '0.4', '--data', 'folder', '--log-every', '1',
           '--save-every', '2', '--threads', '1', '--device', 'cpu']


def main(*args):
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.segmentation import train as train_segmentation
    return train_segmentation.main([str(a) for a in args])


# the script, killed once in the middle of writing the checkpoint of step 4, where that is asked for
WORKER = '''
import os, signal, sys
from scripts.segmentation import train as train_segmentation
from scripts.training import checkpoint
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


@pytest.fixture
def worker(tmp_path):
    """Path of the script as `WORKER` changes it."""
    pytest.importorskip('segmentation_models_pytorch')
    path = tmp_path / 'worker.py'
    path.write_text(WORKER)
    return path


def test_script(folder, worker, tmp_path, capsys):
    """Killed and resumed as left alone; then tested, with the averaged weights, again by --eval."""
    args = [*OPTIONS, '--root', folder]
    assert main(*args, '--output', tmp_path / 'whole', '--eval-every', 3, '--overlays', 1) == 0
    out = capsys.readouterr().out
    assert 'upernet over test_resnet, fadc' in out and '5 convolutions replaced' in out and 'folder: 4 images' in out
    command = [sys.executable, worker, *args, '--output', tmp_path / 'killed']
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={
        **ENVIRONMENT, 'KILLED': str(tmp_path / 'mark')})
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
    from scripts.segmentation.model import build
    built = build('test_resnet', 7, 'fadc', init=str(tmp_path / 'whole' / 'last.pt'))
    ema = torch.load(tmp_path / 'whole' / 'last.pt', weights_only=True)['model_ema']
    key = next(k for k in built.model.encoder.model.state_dict() if k.endswith('.ada_dr.conv.weight'))
    assert 'model_ema' in built.loaded and torch.equal(
        built.model.encoder.model.state_dict()[key], ema[f'encoder.model.{key}'])
    # finished: nothing is trained again, and another recipe is refused
    assert main(*args, '--output', tmp_path / 'whole') == 0
    assert main(*args, '--output', tmp_path / 'whole', '--lr', '1e-2') == 1
    assert 'is of another run: lr is 0.01, was 0.001' in capsys.readouterr().err


def test_predict(folder, tmp_path, capsys):
    """Images without masks get the classes that the test predicts, as a palette's numbers, and pictures."""
    checkpoint, photos = tmp_path / 'run' / 'last.pt', tmp_path / 'photos'
    assert main(*OPTIONS, '--steps', '2', '--root', folder, '--output', tmp_path / 'run') == 0
    for i in range(2):
        put(photos / f'of{i}' / f'{i}.bmp', np.asarray(Image.open(folder / 'val' / 'images' / f'{i}.png')))
    predict = ['--eval', checkpoint, '--predict', photos, '--device', 'cpu']
    assert main(*predict, '--overlays', 8, '--output', tmp_path / 'out') == 0
    assert '2 images of 2 classes' in capsys.readouterr().out
    made = sorted(p.relative_to(tmp_path / 'out').as_posix() for p in (tmp_path / 'out').rglob('*') if p.is_file())
    assert made == ['overlays_predictions/of0/0.png', 'overlays_predictions/of1/1.png', 'predictions/classes.txt',
                    'predictions/masks/of0/0.png', 'predictions/masks/of1/1.png']
    # as masks of a data set they are right everywhere
    data = tmp_path / 'made'
    for part in ('train', 'val'):
        for i in range(2):
            put(data / part / 'images' / f'of{i}' / f'{i}.png', np.asarray(Image.open(photos / f'of{i}' / f'{i}.bmp')))
        shutil.copytree(tmp_path / 'out' / 'predictions' / 'masks', data / part / 'masks')
    shutil.copy(tmp_path / 'out' / 'predictions' / 'classes.txt', data)
    assert main('--eval', checkpoint, '--root', data, '--device', 'cpu', '--anyway') == 0
    assert json.loads((tmp_path / 'run' / 'eval.json').read_text())['accuracy'] == 100
    # what is made is not taken for images, nor written over them, and what is no image is named
    before = (tmp_path / 'out' / 'predictions' / 'masks' / 'of0' / '0.png').read_bytes()
    for images, output in ((photos, photos / 'out'), (tmp_path / 'out' / 'predictions' / 'masks', tmp_path / 'out')):
        assert main('--eval', checkpoint, '--predict', images, '--output', output, '--device', 'cpu') == 1
        assert 'will be written, and the images are those in' in capsys.readouterr().err
    assert (tmp_path / 'out' / 'predictions' / 'masks' / 'of0' / '0.png').read_bytes() == before
    assert main('--eval', checkpoint, '--predict', checkpoint, '--device', 'cpu') == 1
    assert 'last.pt: a file; wanted is a folder' in capsys.readouterr().err
    for name, message in (('a.png', 'a.png: the image cannot be read'), ('notes.txt', 'notes.txt: unexpected file')):
        (photos / name).write_text('')
        assert main(*predict) == 1
        assert message in capsys.readouterr().err
        (photos / name).unlink()


@pytest.mark.sweep
def test_two_processes_that_are_killed(folder, worker, tmp_path):
    """The run goes on by itself, as if nothing had happened."""
    args = [*OPTIONS, '--batch', '4', '--root', folder, '--output']
    torchrun(worker, *args, tmp_path / 'whole')
    out = torchrun(worker, *args, tmp_path / 'killed', KILLED=str(tmp_path / 'mark'))
    assert (tmp_path / 'mark').exists() and out.count('after 2 of 6 steps') == 1
    assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')
    results = [json.loads((tmp_path / name / 'result.json').read_text()) for name in ('whole', 'killed')]
    assert results[0] == results[1]


def test_two_processes(folder, worker, tmp_path):
    """Under torchrun one process writes, and each sees its half of the crops."""
    args = [*OPTIONS, '--batch', '4', '--root', folder, '--output']
    out = torchrun(worker, *args, tmp_path / 'whole')
    assert out.count('5 convolutions replaced') == 1 and out.count('statistics of each process for itself') == 1
    result = json.loads((tmp_path / 'whole' / 'result.json').read_text())
    assert result['step'] == 6 and result['images'] == 2
    # one process of the same batch has other norms and dropout, but not another problem
    assert main(*args, tmp_path / 'one') == 0
    for one, two in zip(losses(tmp_path / 'one'), losses(tmp_path / 'whole'), strict=True):
        assert float(one['loss']) == pytest.approx(float(two['loss']), rel=0.5) and one['loss'] != two['loss']


# the script with signals sent to it: those of `SIGNALS`, at the step after which the log has so many rows
SIGNALLED = '''
import os, signal, sys
from scripts.training import checkpoint
from scripts.segmentation import train as train_segmentation
add = checkpoint.Log.add
def add_and_signal(self, row):
    add(self, row)
    if self.path.name == 'log.csv' and row['step'] == 3:
        os.kill(os.getpid(), getattr(signal, os.environ['SIGNAL']))
checkpoint.Log.add = add_and_signal
sys.exit(train_segmentation.main())
'''


@pytest.mark.parametrize('name', [pytest.param('SIGINT', marks=pytest.mark.sweep), 'SIGTERM'])
def test_ctrl_c(name, folder, tmp_path, capsys):
    """The step is ended and a checkpoint written, from which the same command goes on as if nothing had happened."""
    pytest.importorskip('segmentation_models_pytorch')
    args = [*OPTIONS, '--root', folder, '--save-every', '100', '--workers', '1', '--output']
    (tmp_path / 'worker.py').write_text(SIGNALLED)
    command = [sys.executable, tmp_path / 'worker.py', *args, tmp_path / 'ended']
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**ENVIRONMENT, 'SIGNAL': name})
    assert run.returncode == 130, run.stderr
    assert 'ending after this step, with a checkpoint' in run.stderr and 'Traceback' not in run.stderr
    last = tmp_path / 'ended' / 'last.pt'
    assert f'segmentation.train: ended after 4 of 6 steps; the same command goes on from {last}' in run.stderr
    assert main(*args, tmp_path / 'ended') == 0 and main(*args, tmp_path / 'whole') == 0
    assert 'after 4 of 6 steps' in capsys.readouterr().out
    assert losses(tmp_path / 'ended') == losses(tmp_path / 'whole')


@pytest.mark.sweep
def test_ctrl_c_in_two_processes(folder, tmp_path):
    """SIGINT to one of them ends both, after the same step."""
    pytest.importorskip('segmentation_models_pytorch')
    (tmp_path / 'worker.py').write_text(SIGNALLED)  # one process writes the log
    args = [*OPTIONS, '--batch', '4', '--root', folder, '--save-every', '100', '--output', tmp_path / 'out']
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               tmp_path / 'worker.py', *args]
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, env={**ENVIRONMENT, 'SIGNAL': 'SIGINT'})
    assert run.returncode and run.stderr.count('ended after 4 of 6 steps') == 1
    assert torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)['step'] == 4


def test_one_run_per_output(folder, tmp_path, capsys):
    """While another process owns the folder, a run is refused, and leaves its files alone."""
    from scripts.training.run_folder import LOCK
    code = f"""
import sys
from pathlib import Path
from scripts.training.run_folder import owned
with owned(Path({str(tmp_path / 'out')!r})):
    print('owns', flush=True)
    sys.stdin.read()
"""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, '-c', code], env=ENVIRONMENT, **pipes) as other:
        other.stdout.readline()
        assert main(*OPTIONS, '--root', folder, '--output', tmp_path / 'out') == 1
        assert f'out is in use by another run (process {other.pid} on ' in capsys.readouterr().err
        assert [p.name for p in (tmp_path / 'out').iterdir()] == [LOCK]
        other.kill()
    assert main(*OPTIONS, '--root', folder, '--output', tmp_path / 'out') == 0


def test_data_are_checked_first(folder, tmp_path, capsys, monkeypatch):
    """A wrong validation mask is found before weights are downloaded and a step is trained; --check-data alone too."""
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.training import weights
    downloads = []
    monkeypatch.setattr(weights, '_download', lambda name: downloads.append(name) or {})
    args = [*OPTIONS, '--root', folder, '--init', 'default', '--output', tmp_path / 'out']
    assert main(*args) == 1 and downloads == ['test_resnet_fadc.bluemarble_climate']
    capsys.readouterr()
    mask = np.asarray(Image.open(folder / 'val' / 'masks' / '1.png')).copy()
    mask[mask == 1] = 200
    Image.fromarray(mask).save(folder / 'val' / 'masks' / '1.png')
    assert main(*args) == 1 and len(downloads) == 1
    assert f'{folder}/val/masks/1.png: wrong label 200' in capsys.readouterr().err
    assert not (tmp_path / 'out' / 'last.pt').exists() and not (tmp_path / 'out' / 'log.csv').exists()
    check = ['--data', 'folder', '--root', folder, '--check-data']
    assert main(*check) == 1 and 'wrong label 200' in capsys.readouterr().err
    mask[mask == 200] = 1
    Image.fromarray(mask).save(folder / 'val' / 'masks' / '1.png')
    assert main(*check) == 0
    out = capsys.readouterr().out
    assert 'train: 4 pairs, 48 x 40 pixels' in out and out.count('left ') == 1
    # 0 and 255 instead of 0 and 1
    for path in folder.rglob('masks/*.png'):
        Image.fromarray(np.uint8(255) * (np.asarray(Image.open(path)) == 1)).save(path)
    assert main(*check) == 1 and 'give --mask-values 0,255' in capsys.readouterr().err
    assert main(*check, '--mask-values', '0,255') == 0
    assert main(*OPTIONS, '--root', folder, '--output', tmp_path / 'mapped', '--mask-values', '0,255') == 0
    capsys.readouterr()
    evaluation = ['--eval', tmp_path / 'mapped' / 'last.pt', '--root', folder, '--device', 'cpu']
    assert main(*evaluation) == 0 and 'right' in capsys.readouterr().out
    assert main(*evaluation, '--mask-values', '255') == 1
    assert '--mask-values has 1 values for the 2 classes' in capsys.readouterr().err


def test_eval_of_other_classes(folder, tmp_path, capsys):
    args = [*OPTIONS, '--root', folder, '--output', tmp_path / 'out', '--steps', '2', '--ema', '0']
    assert main(*args) == 0
    out = capsys.readouterr().out
    assert '2 steps, 1 of them warm-up' in out
    evaluation = ['--eval', tmp_path / 'out' / 'last.pt', '--root', folder, '--device', 'cpu']
    (folder / 'classes.txt').write_text('left\nright\nabove\n')
    assert main(*evaluation) == 1
    assert 'was trained on 2 classes (left, right); the data set folder has 3 (left, right, above)' in (
        capsys.readouterr().err)
    (folder / 'classes.txt').write_text('right\nleft\n')
    assert main(*evaluation) == 1
    assert "class 0 was 'left' and is 'right' (2 of 2 differ)" in capsys.readouterr().err
    assert main(*args) == 1  # nor does the run go on
    assert "classes is ['right', 'left'], was ['left', 'right']" in capsys.readouterr().err
    paths = (tmp_path / 'none.pt', 'no such checkpoint'), (folder / 'classes.txt', 'cannot be read as a checkpoint')
    for path, message in paths:
        assert main('--eval', path, '--root', folder, '--device', 'cpu') == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize('args, message', [
    (['--root', 'x', '--output', 'y'], '--root is given without --data: give one of bluemarble, ade20k, cityscapes'),
    (['--eval', 'x', '--lr', '1', '--crop', '64'], 'recipe from the checkpoint: leave out --lr, --crop'),
    (['--eval', 'x', '--check-data'], '--check-data and --eval are two things'),
    (['--eval', 'x', '--predict', 'y', '--root', 'z'], 'a checkpoint and images alone: leave out --root'),
    (['--predict', 'y', '--output', 'x'], '--predict wants a checkpoint: give --eval CHECKPOINT too'),
    (['--output', 'x', '--log-every', '0'], '--log-every: must be at least 1, got 0'),
    (['--output', 'x', '--mask-values', '0-255'], 'wanted are numbers with commas between them, as 0,255'),
    ([], '--output is wanted')])
def test_command_line_errors(args, message, capsys):
    with pytest.raises(SystemExit):
        main(*args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('args, message', [
    (['--crop', '40'], '--crop must be a multiple of the output stride of 32, got 40'),
    (['--stride', '33'], '--stride must be at most the crop of 32, got 33'),
    (['--device', 'nowhere'], 'nowhere'),
    (['--warmup', '6'], 'warmup must be shorter than the run of 6 steps')])
def test_errors_come_before_the_data(args, message, tmp_path, capsys):
    """Errors that cost nothing to find do not wait for the data, or for the end of the training."""
    assert main(*OPTIONS, '--root', tmp_path / 'none', '--output', tmp_path / 'out', *args) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('args, message', [
    (['--decoder', 'other'], "There is no decoder 'other': the decoders are"),
    (['--freq-select-stages', '1'], 'freq_select_stages must be among 2, 3 and 4'),
    (['--fadc', 'bandz=3'], 'an option of the network is wrong: lift_model got unknown options bandz')])
def test_wrong_options_come_before_wrong_data(args, message, folder, tmp_path, capsys):
    """An option that the network refuses is named before the files are read."""
    (folder / 'val' / 'masks' / '1.png').write_bytes(b'')
    assert main(*OPTIONS, '--root', folder, '--output', tmp_path / 'out', *args) == 1
    assert message in capsys.readouterr().err and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('output', ['file', 'file/out'])
def test_output_is_a_file(output, folder, tmp_path, capsys, monkeypatch):
    """It is refused before a network is built."""
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.segmentation import train as train_segmentation
    monkeypatch.delattr(train_segmentation, 'build')
    (tmp_path / 'file').touch()
    assert main(*OPTIONS, '--root', folder, '--output', tmp_path / output) == 1
    assert f'--output wants a folder, and {tmp_path}/file is a file' in capsys.readouterr().err


def test_warmup_of_short_runs():
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.segmentation.train import parse_args, recipe_of
    for steps, given, warmup in ((160_000, [], 1500), (4000, [], 400), (10, [], 1), (5, [], 0), (10, ['7'], 7)):
        args = parse_args(['--output', 'x', '--steps', str(steps), *(['--warmup', *given] if given else [])])
        recipe = recipe_of(args)[0]
        assert recipe.warmup == warmup
        recipe.check()


def test_help_has_the_layout(capsys):
    with pytest.raises(SystemExit):
        main('--help')
    out = capsys.readouterr().out
    assert 'train/masks/NAME.png' in out and 'classes.txt' in out and '--check-data' in out


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
