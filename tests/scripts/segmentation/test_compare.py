"""compare.py: its settings, what is run again, and the tables."""
import csv
import math
from types import SimpleNamespace

import pytest

from scripts.results import read_csv
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
        dict(ROW, setting=name, seed=str(seed), miou=str(miou), params='500000', gmacs='0.5')
        for name, seed, miou in runs])
    write(tmp_path / 'TIMES.csv', [
        dict(preset='cpu', setting='plain', ms='380', ratio='1', peak_mb='228'),
        dict(preset='cpu', setting='fadc', ms='600', ratio='1.56', peak_mb='245')])
    text = tables.segmentation()
    half = 12.7062 * math.sqrt(2) / math.sqrt(2)  # differences 1 and 3
    assert f'| 2 | 43.00 (2.83) | +2.00 ({2 - half:+.2f} to {2 + half:+.2f}) | 0.500 | 0.50 | 1.56 x | 245 |' in text
    assert '| 2 | 41.00 (1.41) |  | 0.500 | 0.50 | 380 ms | 228 |' in text
    assert '| 1 | 49.00 | -1.00, to plain_longer |' in text
    assert 'cpu: X, torch 2, commit abc, 2026-01-01: 6 runs' in text
    tables.draw(tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 5000


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """The script, with the files of its results in a folder of the test, and runs that are not run."""
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.segmentation import compare
    from scripts.training import jobs
    for module, name in ((compare, 'RUNS'), (tables, 'RUNS'), (compare, 'PLOT'), (tables, 'TIMES')):
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
                    added=1, step=30, images=2, seconds='3')

    monkeypatch.setattr(jobs, 'run_one', run_one)
    return SimpleNamespace(main=compare.main, columns=compare.COLUMNS, ran=ran, broken=broken)


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
    compare.ran.clear()
    assert compare.main([*args, '--steps', '40']) == 0 and len(compare.ran) == 4
    assert len(read_csv(tmp_path / 'RUNS.csv')) == 4
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
