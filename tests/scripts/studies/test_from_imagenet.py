"""from_imagenet.py: the trunk under timm's names, the list of runs, and the tables."""
import math

import pytest
import timm
import torch
import torchvision
from torch import nn

from scripts.results import read_csv
from scripts.studies import from_imagenet, trunk
from scripts.training import jobs

pytestmark = pytest.mark.usefixtures('one_thread')


def test_trunk():
    """The wheel keeps torchvision's children in a sequence; in timm's network they compute the same."""
    whole = torchvision.models.resnet18()
    for m in whole.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    holder = nn.Module()
    holder.features = nn.Sequential(*list(whole.children())[:9])
    holder.fc6 = nn.Linear(2, 2)
    state = trunk.trunk_of(holder.state_dict())
    net = timm.create_model('resnet18', num_classes=0, global_pool='')
    net.load_state_dict(state)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = holder.features[:8].eval()(x)
        torch.testing.assert_close(net.eval()(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match='features.2.weight is of no layer'):
        trunk.trunk_of({**holder.state_dict(), 'features.2.weight': x})
    with pytest.raises(RuntimeError, match=r'there are no tensors features\.4\.\*'):
        trunk.trunk_of({k: v for k, v in holder.state_dict().items() if not k.startswith('features.4.')})


def parse(*args):
    return from_imagenet.parse_args([str(a) for a in args])


@pytest.mark.parametrize('task', from_imagenet.TASKS)
@pytest.mark.parametrize('preset', from_imagenet.PRESETS)
def test_options(task, preset):
    """The training scripts take every command, and read the trunk's images as it wants them."""
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.detection import train as detection
    from scripts.segmentation import train as segmentation
    args = parse('--task', task, '--preset', preset)
    all_jobs = from_imagenet.jobs_of(args, list(from_imagenet.BY_NAME.values()), '~/trunk.safetensors')
    assert len(all_jobs) == 3 * len(from_imagenet.BY_NAME) == len({job.folder(args.runs) for job in all_jobs})
    assert [job.key[3] for job in all_jobs] == sorted(job.key[3] for job in all_jobs)
    for job in all_jobs[:len(from_imagenet.BY_NAME)]:
        script = segmentation if task == 'segmentation' else detection
        parsed = script.parse_args([*job.options, *job.further, '--output', 'x'])
        setting = from_imagenet.BY_NAME[job.key[2]]
        assert (parsed.mean, parsed.std, parsed.variant) == ([0, 0, 0], [1, 1, 1], setting.variant)
        assert parsed.lr == (1e-4 if task == 'segmentation' else 2e-4) and parsed.warmup < parsed.steps
        if task != 'segmentation':
            assert preset == 'tiny' or parsed.short[0] >= 384  # the tiles' 400 pixels, or nearly
            assert (parsed.frozen_stages, parsed.frozen_bn, parsed.optimizer) == (1, True, 'adamw')


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The script with its results in a folder of the test, and runs that are not run."""
    ran = []
    monkeypatch.setattr(from_imagenet, 'RUNS', tmp_path / 'runs.csv')
    monkeypatch.setattr(from_imagenet, 'fetch_trunk', lambda folder: None)
    monkeypatch.setattr(from_imagenet, 'TASKS', {
        name: task._replace(check=lambda: None) for name, task in from_imagenet.TASKS.items()})

    def run_one(job, folder, threads, children):
        ran.append(job)
        origin = dict(device='cpu: X', torch='2', timm='1', commit=f'abc{job.key[3]}', date='2026-01-01')
        score = 40 + 3 * int(job.key[3]) + (2 + int(job.key[3])) * (job.key[2] != 'plain')
        scores = dict(miou=score, accuracy=80) if job.key[1] == 'segmentation' else dict(
            ap=score, ap50=2 * score, ap75=1, boxes=269)
        steps = int(job.options[job.options.index('--steps') + 1])
        return dict(**scores, **origin, images=9, loss='1', params=10, added=1, step=steps, seconds='3')

    monkeypatch.setattr(jobs, 'run_one', run_one)
    return ran


def test_study(study, tmp_path, capsys):
    """What has its row is not run again; tables have the paired differences; a rehearsal is kept apart."""
    args = ['--settings', 'plain', 'fadc_lr0.1', '--seeds', '0', '1', '--runs', str(tmp_path)]
    assert from_imagenet.tables() == 'Not measured.'
    assert from_imagenet.main(args) == 0 and len(study) == 4
    assert from_imagenet.main([*args, '--task', 'retinanet']) == 0 and len(study) == 8
    assert from_imagenet.main(args) == 0 and len(study) == 8
    assert from_imagenet.main([*args, '--preset', 'tiny']) == 0 and len(study) == 12
    assert len(read_csv(tmp_path / 'runs.csv')) == 8 and len(read_csv(tmp_path / 'tiny.csv')) == 4
    # other steps do not take the place of the rows, nor is a run paired with one of another length
    assert from_imagenet.main([*args, '--steps', '40']) == 0 and len(study) == 16
    assert from_imagenet.main([*args, '--steps', '300']) == 0 and len(study) == 16
    assert len(read_csv(tmp_path / 'runs.csv')) == 8 and len(read_csv(tmp_path / '40_steps.csv')) == 4
    assert from_imagenet.main([*args, '--init', 'mine.pth']) == 0 and len(study) == 20
    assert len(read_csv(tmp_path / 'runs.csv')) == 8 and len(read_csv(tmp_path / 'mine.csv')) == 4
    rows = [row for name in ('runs', '40_steps') for row in read_csv(tmp_path / f'{name}.csv')
            if row['task'] == 'segmentation' and (row['setting'] == 'plain') == (name == 'runs')]
    assert [(row['setting'], row['steps']) for row in rows] == [('plain', '300')] * 2 + [('fadc_lr0.1', '40')] * 2
    assert '`resnet50_fadc`, a tenth of the rate for what it adds | 2 | 44.00 (2.83) | 80.00 (0.00) |  |' in (
        from_imagenet._table('cpu', 'segmentation', rows))
    text = from_imagenet.tables()
    assert 'cpu: X, torch 2, commit abc0, 2026-01-01: 2 runs; cpu: X, torch 2, commit abc1, 2026-01-01: 2 runs' in text
    half = 12.7062 * math.sqrt(0.5) / math.sqrt(2)  # differences 2 and 3
    assert (f'| `resnet50_fadc`, a tenth of the rate for what it adds | 2 | 44.00 (2.83) | 80.00 (0.00) | +2.50 '
            f'({2.5 - half:+.2f} to {2.5 + half:+.2f}) |') in text
    assert '| `resnet50` | 2 | 41.50 (2.12) | 80.00 (0.00) |  |' in text
    assert 'RetinaNet, tree crowns, `--preset cpu`: 300 steps, test on 9 images with 269 boxes, mean (s.d.).' in text
    assert (tmp_path / 'runs.png').stat().st_size > 5000 and (tmp_path / 'tiny.png').exists()
    capsys.readouterr()
    assert from_imagenet.main(['--report']) == 0 and len(study) == 20
    assert 'drew' in capsys.readouterr().out
