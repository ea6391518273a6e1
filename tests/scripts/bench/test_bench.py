"""The benchmark scripts: how they measure, and what they make of numbers."""
import contextlib
import csv
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scripts import results
from scripts.bench import bands as bench_bands
from scripts.bench import measure, subjects
from scripts.bench import model as bench_model
from scripts.bench import op as bench_op
from scripts.bench import tables as speed_tables
from scripts.checks import doc_tables
from tests.support.processes import ROOT
from tests.support.small_model import MODEL

pytestmark = pytest.mark.usefixtures('one_thread')


# --- measuring ---

def test_interleave():
    calls = []

    def clock(step, number):
        calls.append(step)
        return {'plain': 1., 'slow': 1000.}[step]

    samples = measure.interleave({'plain': 'plain', 'slow': 'slow'}, clock, repeats=6, max_time=1.)
    assert samples == {'plain': [1.] * 6, 'slow': [1000.] * measure.MIN_REPEATS}
    assert calls[:4] == ['plain', 'slow', 'slow', 'plain']


def test_interleave_repeats_short_steps():
    numbers = []

    def clock(step, number):
        numbers.append(number)
        return 2.

    measure.interleave({'plain': lambda: None}, clock, repeats=2, max_time=1., min_sample=10.)
    assert numbers == [1, 5, 5]


def test_pick_format():
    def clock(step, number=1):
        return {'contiguous': 2., 'channels_last': 1.}[step]

    assert measure.pick_format(lambda f: f, clock, list(subjects.FORMATS)) == ('channels_last', 'channels_last')
    assert measure.pick_format(lambda f: f, clock, ['contiguous']) == ('contiguous', 'contiguous')


def test_peak_memory_of_known_tensors():
    def step():
        a = torch.empty(1_000_000)
        b = torch.empty(2_000_000)
        del a
        c = torch.empty(3_000_000)
        return b, c

    assert measure.peak_memory(step, held=10 ** 6, device='cpu') == pytest.approx(21, abs=0.1)


def test_peak_memory_of_a_training_step():
    """When linear layers on one row have been differentiated, only weights, momentum and gradients count."""
    model = nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(4)])
    state = subjects.training_state(model)
    step = subjects.make_step(model, torch.randn(1, 1000), 'train', subjects.Setting(), state)
    step()
    state.zero_grad(set_to_none=True)
    assert measure.peak_memory(step, held=2 * 16 * 10 ** 6, device='cpu') == pytest.approx(3 * 16, rel=0.01)


# --- rows ---

ENV = {'compile': 'no', 'dtype': 'float32', 'threads': '2', 'device': 'cpu: X, 2 cores', 'torch': '2',
       'torchvision': '0', 'timm': '1', 'commit': 'abc', 'date': '2000-01-01'}


def make_rows(fadc, case='m 4x224', what='inference', target=1.2, **env):
    samples = {'plain': [10., 20., 10.], 'today': [50., 100.], 'fadc': fadc}
    return results.make_rows(case, what, samples, {'plain': 'contiguous'}, {**ENV, **env}, {'fadc': target})


def test_quartiles():
    assert results.quartiles([3.]) == (3., 3., 3.)
    assert results.quartiles([4., 1., 2., 3., 5.]) == (3., 2., 4.)


def test_rows_pair_the_rounds():
    plain, today, fadc = make_rows([11., 26., 12.])
    assert tuple(plain) == results.COLUMNS
    assert (plain['median'], plain['ratio'], plain['n']) == ('10', '1', '3')
    assert (plain['met'], plain['format']) == ('', 'contiguous')
    # the second round was slow for all of them
    assert (today['ratio'], today['ratio_q75'], today['n']) == ('5', '5', '2')
    assert (fadc['median'], fadc['ratio'], fadc['ratio_q25'], fadc['ratio_q75']) == ('12', '1.2', '1.15', '1.25')
    assert (fadc['target'], fadc['met']) == ('1.2', 'yes')
    assert make_rows([13., 26., 13.])[-1]['met'] == 'missed'


def test_replacing_rows(tmp_path):
    path = tmp_path / 'results' / 'x.csv'
    assert results.read_rows(path) == []
    first, other = make_rows([11., 22., 11.]), make_rows([11., 22., 11.], what='train')
    results.replace_rows(path, first + other)
    assert results.read_rows(path) == first + other
    new = make_rows([12., 24., 12.], commit='def')
    results.replace_rows(path, new[1:])
    assert results.read_rows(path) == first[:1] + new[1:] + other
    elsewhere = make_rows([12., 24., 12.], device='cuda: Y')
    results.replace_rows(path, elsewhere)
    assert results.read_rows(path) == first[:1] + new[1:] + other + elsewhere
    assert os.listdir(path.parent) == ['x.csv']
    path.write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='columns a, b'):
        results.replace_rows(path, first)


def test_compare_rows():
    stored = make_rows([11., 22., 11.])
    assert results.compare_rows(make_rows([11.4, 23., 11.5]), stored, 0.05) == (1, [])
    assert results.compare_rows(make_rows([9., 18., 9.]), stored, 0.05) == (1, [])
    compared, lost = results.compare_rows(make_rows([12., 24., 12.]), stored, 0.05)
    assert compared == 1 and len(lost) == 1
    assert lost[0].startswith('m 4x224, inference, fadc: ratio 1.2 ') and 'stored 1.1 ' in lost[0]
    assert not results.compare_rows(make_rows([12., 24., 12.]), stored, 0.1).lost
    # a wide spread that reaches down to what is stored is no loss
    assert not results.compare_rows(make_rows([11., 22., 30.]), stored, 0.05).lost
    for env in (dict(device='cpu: Y'), dict(threads='1'), dict(dtype='bfloat16'), dict(compile='yes')):
        assert results.compare_rows(make_rows([99., 99., 99.], **env), stored, 0.05) == (0, [])


def test_run_jobs(tmp_path, capsys):
    path = tmp_path / 'x.csv'

    def broken():
        raise RuntimeError('this case cannot run')

    good = make_rows([11., 22., 11.])
    assert measure.run_jobs([('broken', broken), ('good', lambda: good)], path, False, 0.05) == 1
    assert results.read_rows(path) == good
    assert 'FAILED broken: RuntimeError: this case cannot run\n' in capsys.readouterr().out
    slower = make_rows([12., 24., 12.])
    assert measure.run_jobs([('good', lambda: good)], path, True, 0.05) == 0
    assert measure.run_jobs([('good', lambda: slower)], path, True, 0.05) == 1
    assert 'LOST m 4x224, inference, fadc' in capsys.readouterr().out
    assert results.read_rows(path) == good
    # a check that compared nothing has not passed
    assert measure.run_jobs([('other', lambda: make_rows([1.], what='train'))], path, True, 0.05) == 1


def test_environment():
    row = measure.environment(subjects.Setting(amp='bfloat16', compile='graph'))
    assert row['device'].startswith('cpu: ') and row['torch'] == torch.__version__ and row['threads'] == '1'
    assert (row['dtype'], row['compile']) == ('bfloat16', 'graph')


def test_commit_from_the_environment(monkeypatch):
    monkeypatch.setenv('BENCH_COMMIT', '1234567')
    assert results.commit() == '1234567'


# --- the table of cases ---

def cases(*argv):
    return bench_model.select_cases(bench_model.parse_args(list(argv)))


def test_select_cases():
    assert cases() == list(bench_model.CASES)
    assert cases('--device', 'cuda') == list(bench_model.CUDA_CASES)
    assert {c.what for c in cases('--model', 'convnext_tiny_fadc', '--compile', 'no')} == {'inference', 'train'}
    assert [c.target for c in cases('--batch', '4', '--size', '224', '--what', 'inference', 'train')] == [1.2, 1.35]
    assert cases('--model', MODEL, '--size', '64') == [bench_model.Case(MODEL, 'inference', 4, 64)]
    assert cases('--model', MODEL) == []
    gpu = ('--device', 'cuda', '--model', 'resnet50_fadc', '--compile')
    assert [(c.what, c.size, c.target) for c in cases(*gpu, 'graph')] == [
        ('inference', 224, 1.5), ('train', 224, 1.7), ('inference', 512, 1.5), ('train', 512, 1.7)]
    assert [c._replace(compile='graph') for c in cases(*gpu, 'reduce-overhead')] == cases(*gpu, 'graph')
    assert [c.compile for c in cases('--model', MODEL, '--size', '64', '--compile', 'no', 'graph')] == ['no', 'graph']
    assert bench_model.parse_args([]).variants == ('plain', 'today', 'fadc')
    assert bench_model.parse_args(['--check']).variants == ('plain', 'fadc')
    assert bench_model.parse_args(['--device', 'cuda']).variants == ('plain', 'today', 'fadc')
    assert bench_model.parse_args(['--variants', 'triton']).variants == ('plain', 'triton')
    assert bench_model.parse_args(['--variants', 'today']).variants == ('plain', 'today')
    with pytest.raises(SystemExit):
        bench_model.parse_args(['--variants', 'fast'])


def test_bands_have_one_memory_format(monkeypatch, capsys):
    """Another one is refused, as nothing would be measured in it."""
    for name in ('contiguous', 'faster'):
        monkeypatch.setattr(sys, 'argv', ['bands', '--memory-format', name])
        with pytest.raises(SystemExit):
            bench_bands.main()
        assert f"invalid choice: '{name}'" in capsys.readouterr().err


def test_speed_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_model, 'OUTPUT', tmp_path / 'model.csv')
    monkeypatch.setattr(bench_op, 'OUTPUT', tmp_path / 'op.csv')
    empty = speed_tables.speed()
    assert empty.count('| resnet50_fadc 4x224 |') >= 4 and 'CUDA: not measured.' in empty
    assert speed_tables.operator() == 'CPU: not measured.\n\nCUDA: not measured.'

    results.replace_rows(bench_model.OUTPUT, make_rows([13., 26., 13.], 'resnet50_fadc 4x224'))
    results.replace_rows(bench_model.OUTPUT, make_rows([9., 18., 9.], 'r 64x224', device='cuda: Y', dtype='float16'))
    speed = speed_tables.speed()
    assert 'X, 2 cores (cpu), 2 threads, float32; torch 2, torchvision 0, timm 1; commit abc; 2000-01-01:' in speed
    assert ('| resnet50_fadc 4x224 | inference | 10 ms | 5.00 (5.00 to 5.00) | 1.30 (1.30 to 1.30) | <= 1.2 | missed |'
            in speed)
    assert '| resnet50_fadc 1x512 | inference | not measured |' in speed
    against_eager = '| resnet50_fadc 4x224 | inference, compiled, against itself eager |'
    assert f'{against_eager} not measured |  | not measured | <= 1 |' in speed
    assert 'Y (cuda)' in speed and 'CUDA: not measured.' not in speed
    results.replace_rows(bench_op.OUTPUT, make_rows([13., 26., 13.], 'r 8@7'))
    assert '| r 8@7 | inference | 10 ms | 5.00 | 1.30 |' in speed_tables.operator()
    assert speed_tables.deform() == 'CPU: not measured.\n\nCUDA: not measured.'
    results.replace_rows(bench_op.OUTPUT, results.make_rows(
        'resnet50_dcn 8@7 b4', 'forward', {'torchvision.ops': [10.], 'plain': [2.], 'deform gather': [3.]}, {}, ENV))
    assert '| resnet50_dcn 8@7 b4 | forward | 10 ms | 0.20 | 0.30 |' in speed_tables.deform()
    assert 'resnet50_dcn' not in speed_tables.operator()

    env = {**ENV, 'compile': 'yes'}
    for eager, compiled, name in ((1000., 1100., 'plain'), (2000., 1800., 'fadc')):
        pair = {f'{name} eager': [eager], name: [compiled]}
        results.replace_rows(bench_model.OUTPUT, results.make_rows(
            'resnet50_fadc 4x224', 'inference/eager', pair, {}, env, {'fadc': 1.}))
    assert (f'{against_eager} 1.10 (1.10 to 1.10) |  | 0.90 (0.90 to 0.90) | <= 1 | yes |'
            in speed_tables.speed())


def test_quantity_says_how_it_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_model, 'OUTPUT', tmp_path / 'model.csv')
    env = dict(device='cuda: Y', dtype='float16')
    for compile in ('no', 'graph', 'reduce-overhead'):
        results.replace_rows(bench_model.OUTPUT, make_rows([9., 18., 9.], 'r 64x224', compile=compile, **env))
    speed = speed_tables.speed()
    for what in ('inference', 'inference, in a CUDA graph', 'inference, compiled to reduce overhead'):
        assert f'| r 64x224 | {what} | 10 ms |' in speed


def test_compiled_against_eager(monkeypatch):
    """Each network to itself; what inductor makes of them is not of interest here."""
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda model, **_: compiled.append(model) or model)
    args = bench_model.parse_args(['--variants', 'fadc', '--repeats', '3'])
    case = bench_model.Case(MODEL, 'inference', 1, 64, target=9., compile='yes', eager_target=8.)
    rows = bench_model.measure_times(case, args, subjects.Setting(compile='yes'))
    assert len(compiled) == 2
    assert [(r['what'], r['variant'], r['target']) for r in rows] == [
        ('inference', 'plain', ''), ('inference', 'fadc', '9'), ('inference/eager', 'plain eager', ''),
        ('inference/eager', 'plain', ''), ('inference/eager', 'fadc eager', ''), ('inference/eager', 'fadc', '8')]
    assert {r['ratio'] for r in rows if r['variant'].endswith('eager')} == {'1'}


class Cuda:
    """Stands in for torch.cuda: a graph that replays a value, and a log of what is called in which order."""

    def __init__(self, change=0.):
        self.log, self.change = [], change

    def install(self, monkeypatch):
        for name in ('Stream', 'CUDAGraph', 'current_stream', 'graph', 'stream'):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name, None) or self.make(name))
        return self

    def make(self, name):
        def call(*args):
            return SimpleNamespace(
                wait_stream=lambda other: self.log.append('wait'), replay=lambda: self.log.append('replay'))
        return call

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append('aside')
        yield

    @contextlib.contextmanager
    def graph(self, graph):
        self.log.append('capture')
        yield

    def step(self):
        self.log.append('step')
        return torch.ones(2) + self.change * ('capture' in self.log)


def test_captured(monkeypatch):
    cuda = Cuda().install(monkeypatch)
    replay = subjects.captured(cuda.step, warm_up=2)
    assert cuda.log == ['wait', 'aside', 'step', 'step', 'wait', 'capture', 'step', 'replay']
    assert torch.equal(replay(), torch.ones(2)) and cuda.log[-1] == 'replay'
    for change in (0.1, float('nan')):
        with pytest.raises(RuntimeError, match='differs from the eager one'):
            subjects.captured(Cuda(change).install(monkeypatch).step)


def test_left_out_where_it_cannot_be_captured(monkeypatch, capsys):
    """It has no row, and its reason is what broke the capture, not the error at its end."""
    seen = []

    def fails_the_second_time(step):
        seen.append(step)
        if len(seen) == 2:
            try:
                raise RuntimeError('cannot copy\nmore')
            finally:
                raise ValueError('the capture ends')
        return step

    monkeypatch.setattr(subjects, 'captured', fails_the_second_time)
    args = bench_model.parse_args(['--variants', 'fadc', '--repeats', '3'])
    case = bench_model.Case(MODEL, 'train', 2, 64, target=9., compile='graph')
    rows = bench_model.measure_times(case, args, subjects.Setting(compile='graph'))
    assert [(r['variant'], r['compile'], r['ratio']) for r in rows] == [('plain', 'graph', '1')]
    assert (f'LEFT OUT {MODEL} 2x64, train, graph, float32, fadc: RuntimeError: cannot copy; then ValueError: the '
            'capture ends\n' in capsys.readouterr().out)
    # without the plain network there is nothing to compare with
    monkeypatch.setattr(subjects, 'captured', lambda step: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench_model.measure_times(case, args, subjects.Setting(compile='graph'))


def test_tables_of_a_gpu(tmp_path, monkeypatch):
    """Triton has a column of its own, and a target that only one of the two misses says so."""
    for module in (bench_model, bench_bands):
        monkeypatch.setattr(module, 'OUTPUT', tmp_path / f'{module.__name__}.csv')
    env = {**ENV, 'device': 'cuda: Y', 'dtype': 'float16'}
    rows = results.make_rows(
        'resnet50_fadc 64x224', 'train', {'plain': [10.], 'today': [50.], 'fadc': [40.], 'triton': [12.]}, {}, env,
        {'fadc': 1.5, 'triton': 1.5})
    results.replace_rows(bench_model.OUTPUT, rows)
    speed = speed_tables.speed(['cuda'])
    assert '| FADC | FADC, `triton` | target | met |' in speed and 'CPU' not in speed
    assert '| 10 ms | 5.00 (5.00 to 5.00) | 4.00 (4.00 to 4.00) | 1.20 (1.20 to 1.20) | <= 1.5 | missed, yes |' in speed
    assert '| resnet50_fadc 16x512 | train | not measured | not measured | not measured | not measured | <=' in speed
    assert '| resnet50_fadc 64x224, train | Y, float16 | 10 ms | 5.00 | 4.00 |' in speed_tables.headlines()
    later = {**env, 'device': 'cuda: Z', 'date': '2999-01-01'}
    results.replace_rows(bench_model.OUTPUT, results.make_rows(
        'resnet50_fadc 64x224', 'train', {'plain': [10.], 'fadc': [20.]}, {}, later, {}))
    assert '| resnet50_fadc 64x224, train | Z, float16 | 10 ms |  | 2.00 |' in speed_tables.headlines()
    assert '| Y, float16' not in speed_tables.headlines()
    assert speed_tables.bands(['cuda']) == 'CUDA: not measured.'
    mixes = {'copy': [1.], 'fused': [30.], 'triton': [5.]}
    results.replace_rows(bench_bands.OUTPUT, results.make_rows('band mix 8@7', 'forward', mixes, {}, env))
    assert '| band mix 8@7 | forward | 1 ms | 30.00 | 5.00 |' in speed_tables.bands(['cuda'])


@pytest.mark.parametrize('page', doc_tables.PAGES)
def test_pages_have_the_markers(page):
    text = (ROOT / page).read_text()
    for name in doc_tables.PAGES[page]:
        assert text.count(f'<!-- table: {name} -->') == text.count(f'<!-- end of table: {name} -->') == 1


# --- the scripts ---

def run(script, *args):
    env = {**os.environ, 'OMP_NUM_THREADS': '1',
           'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    env.pop('TRITON_INTERPRET', None)  # which is for tests of kernels, not for their time
    return subprocess.run(
        [sys.executable, '-m', f'scripts.bench.{script}', *map(str, args)], env=env, cwd=ROOT, capture_output=True,
        text=True)


def test_bench_model(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'x.csv'
    args = tuple(map(str, ('--model', MODEL, '--batch', 2, '--size', 64, '--repeats', 3, '--output', path)))
    done = run('model', *args)
    assert done.returncode == 0, done.stderr
    expected = [(f'{MODEL} 2x64', 'inference', v) for v in ('plain', 'today', 'fadc')]

    def main(*options):
        monkeypatch.setattr(sys, 'argv', ['bench.model', *args, *options])
        return bench_model.main()

    assert main('--variants', 'fadc', '--what', 'train', 'memory', 'per-pixel') == 0
    rows = results.read_rows(path)
    whats = [('2x64', 'train'), ('2x64', 'memory'), ('2x64 against 224', 'per-pixel')]
    expected += [(f'{MODEL} {case}', what, v) for case, what in whats for v in ('plain', 'fadc')]
    assert [(r['case'], r['what'], r['variant']) for r in rows] == expected
    assert all(float(r['median']) > 0 and r['format'] and r['device'].startswith('cpu: ') for r in rows)

    # whatever it was, now a tenth of it is stored
    for row in rows:
        row['ratio_q75'] = str(float(row['ratio_q75']) / 10)
    results.replace_rows(path, rows)
    capsys.readouterr()
    assert main('--what', 'inference', '--check') == 1
    assert f'LOST {MODEL} 2x64, inference, fadc' in capsys.readouterr().out
    assert results.read_rows(path) == rows


def test_bench_op(tmp_path):
    path = tmp_path / 'x.csv'
    done = run('op', '--shapes', 'convnext_tiny 768@1', 'resnet50_dcn 512@1', '--batch', 1, '--repeats', 3,
               '--min-sample', 0, '--size', 32, '--memory-format', 'contiguous', '--output', path)
    assert done.returncode == 0, done.stderr
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    found = {(case, what): [r['variant'] for r in rows if r['case'] == f'{case} b1' and r['what'] == what]
             for case in ('convnext_tiny 768@1', 'resnet50_dcn 512@1') for what in bench_op.WHAT}
    forward = found['convnext_tiny 768@1', 'forward']
    wanted = {'plain', 'op gather', 'op torchvision', 'layer today', 'layer', 'freq_select', 'low_pass fft'}
    assert wanted <= set(forward)
    assert forward == [*found['convnext_tiny 768@1', 'forward+backward'], 'roofline']
    forward = found['resnet50_dcn 512@1', 'forward']
    assert forward[0] == 'torchvision.ops' and {'plain', 'deform gather', 'deform gather gains'} <= set(forward)
    assert forward == found['resnet50_dcn 512@1', 'forward+backward']
    assert {r['variant'] for r in rows if r['target']} == {'deform gather'}
    assert run('op', '--shapes', 'nothing').returncode == 1


@pytest.mark.sweep  # compiles every module of torch and timm first
def test_import_time(tmp_path):
    path = tmp_path / 'x.csv'
    done = run('model', '--what', 'import', '--repeats', 1, '--output', path)
    assert done.returncode == 0, done.stderr
    plain, fadc = results.read_rows(path)
    assert float(fadc['median']) > float(plain['median']) > 100  # milliseconds
    assert 0 < float(fadc['ratio']) < 20 and fadc['target'] == '0.1'
