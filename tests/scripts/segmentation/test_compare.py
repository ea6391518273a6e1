"""compare.py: its settings, what is run again, and the tables."""
import csv
import math
from types import SimpleNamespace

import pytest

from scripts.results import RESULTS, read_csv
from scripts.segmentation import tables
from scripts.segmentation.comparison import (
    ATTENTION,
    BY_NAME,
    PRESETS,
    REMEDIES,
    SETTINGS,
    command,
)

pytestmark = pytest.mark.usefixtures('one_thread')


def test_settings():
    """The issue's rows; what a setting is compared with is there, and takes as many steps."""
    assert [s.variant for s in SETTINGS] == [
        'plain', 'adadr', 'adadr_adakern', 'fadc', 'dcnv2', 'dcnv2_fadc', 'dilation2']
    assert len(BY_NAME) == len(SETTINGS + REMEDIES + ATTENTION) and len(REMEDIES) >= 3
    assert command(PRESETS['cpu'], BY_NAME['dinat_mini_fadc'], 0)[-2:] == ['--backbone', 'dinat_mini']
    for setting in BY_NAME.values():
        assert BY_NAME[setting.against].variant == 'plain'
        assert setting.name == 'plain_longer' or BY_NAME[setting.against].longer == setting.longer


def test_gmacs():
    """Each setting can be counted; what a variant adds costs, and a fixed dilation costs nothing."""
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.segmentation import compare

    gmacs = {s.name: compare.gmacs_of(command(PRESETS['cpu'], s, 0), 7, 64) for s in SETTINGS + REMEDIES}
    plain, fadc = gmacs['plain'], gmacs['fadc']
    assert gmacs['dilation2'] == gmacs['plain_longer'] == plain
    assert plain < gmacs['adadr'] < gmacs['adadr_adakern'] < gmacs['fadc_no_fs4'] < fadc == gmacs['fadc_longer']
    assert plain < gmacs['dcnv2'] < 2 * plain


ROW = dict(accuracy='70', mean_accuracy='60', iou='1 2', loss='0.5', added='0', images='20', seconds='9',
           device='cpu: X', torch='2', timm='1', commit='abc', date='2026-01-01', command='c', steps='300',
           preset='cpu')


def write(path, rows):
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_tables(tmp_path, monkeypatch):
    for name in ('RUNS', 'TIMES'):
        monkeypatch.setattr(tables, name, tmp_path / f'{name}.csv')
    assert tables.segmentation() == 'Not run yet.'
    runs = [('plain', 0, 40), ('plain', 1, 42), ('fadc', 0, 41), ('fadc', 1, 45), ('plain_longer', 0, 50),
            ('fadc_longer', 0, 49)]
    write(tmp_path / 'RUNS.csv', [
        dict(ROW, setting=name, seed=str(seed), miou=str(miou), params='500000', gmacs='0.5',
             steps=str(300 * round(BY_NAME[name].longer)))
        for name, seed, miou in runs])
    write(tmp_path / 'TIMES.csv', [
        dict(preset='cpu', setting='plain', ms='380', ratio='1', peak_mb='228'),
        dict(preset='cpu', setting='fadc', ms='600', ratio='1.56', peak_mb='245')])
    text = tables.segmentation()
    half = 12.7062 * math.sqrt(2) / math.sqrt(2)  # differences 1 and 3
    assert f'| 2 | 43.00 (2.83) | +2.00 ({2 - half:+.2f} to {2 + half:+.2f}) | 0.500 | 0.50 | 1.56 x | 245 |' in text
    assert '| 2 | 41.00 (1.41) |  | 0.500 | 0.50 | 380 ms | 228 |' in text
    assert '| 1 | 49.00 | -1.00, to plain_longer |' in text
    assert '| `plain_longer` | 1 | 50.00 | +10.00 |' in text
    assert 'cpu: X, torch 2, commit abc, 2026-01-01: 6 runs' in text
    values = tables.by_setting(read_csv(tmp_path / 'RUNS.csv'), 'miou')
    assert values['plain_longer'].keys() < values['plain'].keys() == {(0, 300), (1, 300)}
    tables.draw(tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 5000


def test_runs_of_other_lengths(tmp_path):
    """They are no pairs; a ratio of time to another setting than plain says so."""
    write(tmp_path / 'runs.csv', [
        dict(ROW, setting=name, seed=str(seed), miou=str(miou), params='1', gmacs='0.5', steps=steps)
        for name, seed, miou, steps in (('plain', 0, 40, '300'), ('plain', 1, 41, '300'), ('fadc', 0, 45, '300'),
                                        ('fadc', 1, 60, '40'), ('dinat_mini', 0, 50, '300'),
                                        ('dinat_mini_fadc', 0, 51, '40'))])
    write(tmp_path / 'times.csv', [
        dict(preset='cpu', setting='dinat_mini', ms='500', ratio='1', peak_mb='9'),
        dict(preset='cpu', setting='dinat_mini_fadc', ms='600', ratio='1.2', peak_mb='9')])
    text = tables.segmentation(tmp_path / 'runs.csv', tmp_path / 'times.csv')
    assert '| 2 | 52.50 (10.61) | +5.00 |' in text
    assert '| `dinat_mini` | 1 | 50.00 |  | 0.000 | 0.50 | 500 ms |' in text
    assert '| `dinat_mini_fadc` | 1 | 51.00 |  | 0.000 | 0.50 | 1.20 x, to dinat_mini |' in text


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """The script, with the files of its results in a folder of the test, and runs that are not run."""
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.segmentation import compare
    from scripts.training import jobs
    for module, name in ((compare, 'RUNS'), (tables, 'RUNS'), (compare, 'PLOT'), (compare, 'TIMES'), (tables, 'TIMES')):
        monkeypatch.setattr(module, name, tmp_path / f'{name}.csv')
    monkeypatch.setattr(compare, 'open_data', lambda *_: type('Data', (), {'classes': ('a', 'b')}))
    monkeypatch.setattr(compare, 'gmacs_of', lambda *_: 0.5)
    monkeypatch.setattr(compare, 'draw', lambda path: None)
    ran: list = []
    broken: set = set()

    def run_one(job, folder, threads, children):
        ran.append(job)
        if job.key[1:] in broken:
            raise RuntimeError('out of memory')
        return dict(miou=50 + int(job.key[2]), accuracy=1, mean_accuracy=1, iou=[1.0, None], loss='1', params=10,
                    added=1, step=int(job.options[job.options.index('--steps') + 1]), images=2, seconds='3',
                    device='cuda: Y', torch='2', timm='1', commit='abc', date='2026-01-01')

    monkeypatch.setattr(jobs, 'run_one', run_one)
    return SimpleNamespace(main=compare.main, columns=compare.COLUMNS, ran=ran, broken=broken, module=compare)


def test_runs(compare, tmp_path):
    """A run is finished when its row has its command; a run that fails is told, and the others still run."""
    args = ['--settings', 'plain', 'fadc', '--seeds', '0', '1', '--runs', str(tmp_path)]
    compare.broken.add(('fadc', '1'))
    assert compare.main(args) == 1
    assert sorted(job.key[1:] for job in compare.ran) == [
        ('fadc', '0'), ('fadc', '1'), ('plain', '0'), ('plain', '1')]
    compare.broken.clear()
    compare.ran.clear()
    assert compare.main(args) == 0 and [job.key[1:] for job in compare.ran] == [('fadc', '1')]
    rows = read_csv(tmp_path / 'RUNS.csv')
    assert len(rows) == 4 and rows[0]['iou'] == '1.00 -' and list(rows[0]) == list(compare.columns)
    # what the run says, and not what this process is
    assert [rows[0][k] for k in ('device', 'torch', 'timm', 'commit', 'date')] == [
        'cuda: Y', '2', '1', 'abc', '2026-01-01']
    compare.ran.clear()
    assert compare.main([*args, '--steps', '300']) == 0 and not compare.ran
    assert compare.main([*args, '--steps', '40']) == 0 and len(compare.ran) == 4
    assert read_csv(tmp_path / 'RUNS.csv') == rows
    assert {row['steps'] for row in read_csv(tmp_path / 'bluemarble_40_steps.csv')} == {'40'}
    text = ' '.join(command(PRESETS['cpu'], BY_NAME['fadc'], 3, 40))
    assert '--variant fadc' in text and '--steps 40 --seed 3' in text


def test_runs_of_other_data(compare, tmp_path):
    """They have rows of their own, and are told which number in a mask is which class."""
    args = ['--settings', 'plain', '--seeds', '0', '--runs', str(tmp_path)]
    assert compare.main(args) == 0
    other = ['--data', 'folder', '--root', 'x', '--mask-values', '0,255', '--ignore-values', '7']
    assert compare.main([*args, *other]) == 0
    first, second = compare.ran
    assert first.further == ('--data', 'bluemarble') and first.options == second.options[:len(first.options)]
    assert second.options[len(first.options):] == (
        '--data', 'folder', '--mask-values', '0,255', '--ignore-values', '7')
    assert second.further == ('--root', 'x') and first.folder(tmp_path) != second.folder(tmp_path)
    assert [len(read_csv(tmp_path / name)) for name in ('RUNS.csv', 'folder.csv')] == [1, 1]
    from scripts.segmentation.train import parse_args
    assert parse_args([*second.options, *second.further, '--output', 'y']).mask_values == [0, 255]


def names(settings):
    return [s.name for s in settings]


def test_columns(compare):
    """Those of the stored files."""
    for path, columns in ((RESULTS / 'segmentation.csv', compare.columns),
                          (RESULTS / 'segmentation_time.csv', compare.module.TIME_COLUMNS)):
        assert tuple(read_csv(path)[0]) == columns


def test_what_is_timed(compare, capsys):
    """With what a setting is compared with, before it; in place of more steps one of them."""
    def timed(*asked):
        return names(compare.module.to_time([BY_NAME[name] for name in asked]))

    assert timed('fadc', 'dcnv2') == ['plain', 'fadc', 'dcnv2']
    assert timed('dinat_mini_fadc') == ['dinat_mini', 'dinat_mini_fadc']
    assert timed('fadc', 'dinat_mini_fadc', 'dinat_mini') == ['plain', 'fadc', 'dinat_mini', 'dinat_mini_fadc']
    assert not capsys.readouterr().out
    assert timed('plain_longer') == ['plain'] and timed('fadc_longer') == ['plain', 'fadc']
    assert 'plain_longer: a step is one of plain, which is timed' in capsys.readouterr().out


def test_times(compare, tmp_path, monkeypatch, capsys):
    """A ratio is to what the setting is compared with; times of other data have a file of their own."""
    steps = {'plain': 10., 'dinat_mini': 20., 'dinat_mini_fadc': 30., 'fadc': 15.}
    monkeypatch.setattr(compare.module, 'training_step', lambda options, classes, crop: (None, None, 0))
    monkeypatch.setattr(compare.module, 'interleave', lambda made, *_: {name: [steps[name]] * 3 for name in made})
    monkeypatch.setattr(compare.module, 'peak_memory', lambda *_: 1.)
    args = ['--time', '--runs', str(tmp_path / 'runs'), '--settings']
    assert compare.main([*args, 'dinat_mini_fadc', 'fadc']) == 0
    rows = {row['setting']: row['ratio'] for row in read_csv(tmp_path / 'TIMES.csv')}
    assert rows == {'dinat_mini': '1', 'dinat_mini_fadc': '1.5', 'plain': '1', 'fadc': '1.5'}
    assert 'dinat_mini_fadc: 30 ms (30 to 30), 1.50 of dinat_mini' in capsys.readouterr().out
    assert compare.main([*args, 'plain_longer', '--data', 'folder']) == 0
    assert [row['setting'] for row in read_csv(tmp_path / 'runs' / 'folder_time.csv')] == ['plain']
    assert len(read_csv(tmp_path / 'TIMES.csv')) == 4
