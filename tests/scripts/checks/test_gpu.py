"""The check for GPUs: its stages and their time, a stage that hangs, and what the report makes of numbers."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.checks import gpu, gpu_parts, gpu_plugin, gpu_report, gpu_stages
from scripts.checks.gpu_stages import Outcome, Stage
from scripts.results import COLUMNS, make_rows, replace_rows

ENV = {'compile': 'no', 'dtype': 'float16', 'threads': '2', 'device': 'cuda: X', 'torch': '2', 'torchvision': '0',
       'timm': '1', 'commit': 'abc', 'date': '2000-01-01'}


def parse(tmp_path, *argv):
    return gpu.parse_args(['--out', str(tmp_path), '--device', 'cpu', *argv])


def stage(name, *codes, share=1):
    """A stage that runs pieces of Python one after another."""
    return Stage(name, share, lambda args: [[sys.executable, '-c', code] for code in codes])


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


# --- stages ---

def test_stages(tmp_path):
    assert [s.name for s in gpu_stages.STAGES] == [
        'device', 'tests', 'model', 'graph', 'reduce-overhead', 'op', 'bands', 'profile', 'backends', 'host']
    for argv in ((), ('--quick',), ('--device', 'cuda'), ('--device', 'cuda', '--amp', 'float16')):
        for s in gpu_stages.STAGES:
            commands = s.commands(parse(tmp_path, *argv))
            assert commands and all(c[:2] == [sys.executable, '-m'] and set(map(type, c)) == {str} for c in commands)


def test_each_dtype_and_way(tmp_path):
    args = parse(tmp_path, '--device', 'cuda')
    for name, compile, variants in (('model', 'no', ['today,fadc', 'fadc']), ('graph', 'graph', ['fadc', 'fadc'])):
        commands = next(s for s in gpu_stages.STAGES if s.name == name).commands(args)
        assert [c[c.index('--amp') + 1] for c in commands] == ['float16', 'bfloat16']
        assert [c[c.index('--variants') + 1] for c in commands] == variants
        assert {c[c.index('--compile') + 1] for c in commands} == {compile}


def test_files_with_tests_for_a_gpu():
    files = gpu_stages.gpu_test_files()
    assert files and all((gpu_stages.ROOT / f).exists() for f in files)
    assert any('triton' in f for f in files)


def test_budgets():
    stages = [stage('a', share=1), stage('b', share=3)]
    assert gpu_stages.budgets(stages, 8.) == {'a': 2., 'b': 6.}
    # what the first has left is the second's
    assert gpu_stages.budgets(stages[1:], 7.5) == {'b': 7.5}


def test_run(tmp_path, capsys):
    args = parse(tmp_path, '--minutes', '0.5', '--commit', 'fedcba9')
    outcomes = gpu.run([stage('good', "import os; print(os.environ['BENCH_COMMIT'])"),
                        stage('bad', "print('before'); raise SystemExit(3)", "print('after')")], args)
    assert [(o.name, o.state) for o in outcomes] == [('good', 'ok'), ('bad', 'failed with 3')]
    assert 'fedcba9' in outcomes[0].output and 'after' in outcomes[1].output
    assert outcomes[1].budget == pytest.approx(30 - gpu.RESERVE - outcomes[0].seconds, abs=0.5)
    log = (tmp_path / 'log.txt').read_text()
    first = f'== good, {(30 - gpu.RESERVE) / 2:.0f} s'
    assert log.index(first) < log.index('fedcba9') < log.index('== bad') < log.index('before')
    assert 'bad              failed with 3' in (tmp_path / 'report.txt').read_text()
    assert not gpu_report.is_good(outcomes, tmp_path) and gpu_report.is_good(outcomes[:1], tmp_path)


def test_no_time_left(tmp_path):
    outcomes = gpu.run([stage('late', "print('here')")], parse(tmp_path, '--minutes', '0.01'))
    assert [(o.state, o.output) for o in outcomes] == [('no time left', '')]


def test_a_stage_that_hangs(tmp_path):
    """It is killed with all that it has started, what it printed stays, and it says where it was."""
    child = f'import subprocess, sys; p = subprocess.Popen([{sys.executable!r}, "-c", "import time; time.sleep(99)"])'
    code = f'{child}\nprint("child", p.pid, flush=True)\nimport time\ndef wait():\n    time.sleep(99)\nwait()'
    begin = time.monotonic()
    outcome = gpu_stages.run_stage(stage('hangs', code, "print('next')"), parse(tmp_path), 3.)
    assert time.monotonic() - begin < 3 + 2 * gpu_stages.GRACE
    assert outcome.state == 'killed at its limit, no time left' and 'next' not in outcome.output
    pid = outcome.output.partition('child ')[2].split()[0]
    while is_running(pid) and time.monotonic() < begin + 20:
        time.sleep(0.05)
    assert not is_running(pid)
    lines = gpu_report.stage_lines([outcome])
    assert lines[1] == f'  last printed: child {pid}' and lines[2].endswith('in wait')


def test_reserve():
    """A stage that is killed at the end of the time ends before the time of the whole check does."""
    assert gpu.RESERVE > gpu_stages.GRACE + gpu_stages.LAST


def test_sigterm(tmp_path):
    """It kills the running stage, which the report names, and no other starts."""
    code = ("import os, signal, time; print('pid', os.getpid(), flush=True); os.kill(os.getppid(), signal.SIGTERM); "
            'time.sleep(99)')
    before, begin = signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(gpu.Terminated), gpu.terminable():
        gpu.run([stage('runs', code), stage('next', "print('other')")], parse(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before
    log = (tmp_path / 'log.txt').read_text()
    pid = log.partition('\npid ')[2].split()[0]
    while is_running(pid) and time.monotonic() < begin + 20:
        time.sleep(0.05)
    assert not is_running(pid) and 'other' not in log
    assert 'runs             killed by SIGTERM, ' in (tmp_path / 'report.txt').read_text()


def test_a_stage_that_cannot_be_killed(tmp_path, monkeypatch):
    """The check goes on, and says so: a process that waits for a driver is not there for a signal."""
    monkeypatch.setattr(gpu_stages, 'GRACE', 0.05)
    monkeypatch.setattr(gpu_stages, 'LAST', 0.05)
    monkeypatch.setattr(subprocess.Popen, 'send_signal', lambda self, number: None)
    killed = []
    monkeypatch.setattr(os, 'killpg', lambda pid, number: killed.append(pid))
    outcome = gpu_stages.run_stage(stage('hangs', 'import time; time.sleep(99)'), parse(tmp_path), 0.5)
    monkeypatch.undo()
    os.killpg(killed[0], signal.SIGKILL)
    assert outcome.state == 'killed at its limit, and has not ended'


def test_without_plugins_of_pytest(tmp_path, monkeypatch):
    """The tests run, in one process and without a limit, and the report says what is missing."""
    command, = gpu_stages._tests(parse(tmp_path))
    assert {'-n', '--dist=worksteal', '--timeout'} < set(command) and gpu_stages.not_installed() == []
    monkeypatch.setattr(gpu_stages, '_has', lambda module: False)
    command, = gpu_stages._tests(parse(tmp_path))
    options = command[1:command.index('--continue-on-collection-errors')]
    path = tmp_path / 'test_x.py'
    path.write_text('def test_triton_k1_float32(): pass\ndef test_other(): pass\n')
    run = subprocess.run(
        [sys.executable, *options, '-p', 'no:xdist', '-p', 'no:timeout', '-c', 'pyproject.toml', str(path)],
        capture_output=True, text=True, cwd=gpu_stages.ROOT, env=gpu_stages._environment(parse(tmp_path)))
    assert run.returncode == 0 and '1 passed, 1 deselected' in run.stdout, run.stdout + run.stderr
    text = gpu_report.make_report([Outcome('tests', 'ok', 1., 2., '')], tmp_path)
    assert '\npytest-xdist is not installed: the tests run in one process\n' in text and 'pytest-timeout is not' in text
    assert 'pytest' not in gpu_report.make_report([Outcome('op', 'ok', 1., 2., '')], tmp_path)


def test_long_output_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_stages, 'MOST_OUTPUT', 1000)
    outcome = gpu_stages.run_stage(stage('talks', "print('first'); print('x' * 5000); print('last')"),
                                   parse(tmp_path), 20.)
    assert 'first' in outcome.output and outcome.output.endswith('last\n') and len(outcome.output) < 1100
    assert (tmp_path / 'log.txt').stat().st_size < 1200


# --- failures ---

def report(outcome, when='call', message='', node='t.py::test'):
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message=message))
    return SimpleNamespace(failed=outcome == 'failed', passed=outcome == 'passed', outcome=outcome, when=when,
                           nodeid=node, duration=0.25, longrepr=crash)


def test_failures_are_written_as_they_happen(tmp_path):
    path = tmp_path / 'failures.txt'
    failures = gpu_plugin.Failures(str(path))
    for when in ('setup', 'call', 'teardown'):
        failures.pytest_runtest_logreport(report('passed', when))
    failures.pytest_runtest_logreport(report('failed', message='off by\n 0.5'))
    assert path.read_text() == 't.py::test call 0.2s :: off by 0.5\n'
    failures.pytest_runtest_logreport(report('skipped', 'setup'))
    failures.pytest_collectreport(SimpleNamespace(failed=True, nodeid='u.py', longrepr='no such module'))
    failures.pytest_sessionfinish()
    assert path.read_text().splitlines()[1:] == [
        'u.py collection 0.0s :: no such module', '# 1 passed, 2 failed, 1 skipped']


def test_plugin_in_a_run(tmp_path):
    (tmp_path / 'test_x.py').write_text('def test_a(): assert 1 == 2\ndef test_b(): pass\n')
    path = tmp_path / 'failures.txt'
    subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'scripts.checks.gpu_plugin', '-p', 'no:cacheprovider', '-q', '-n1',
         '--rootdir', str(tmp_path), '-c', '/dev/null', str(tmp_path / 'test_x.py')], capture_output=True,
        env={**gpu_stages._environment(parse(tmp_path)), 'GPU_CHECK_FAILURES': str(path)})
    lines = path.read_text().splitlines()
    assert len([line for line in lines if 'test_a call' in line]) == 1
    assert lines[-1] == '# 1 passed, 1 failed, 0 skipped'


# --- report ---

def test_kinds_of_failures():
    lines = ['a.py::x[1] call 0.1s :: off by 0.5', '# 3 passed, 1 failed, 0 skipped',
             'a.py::x[2] call 0.1s :: off by 2e-3', 'b.py::y call 0.1s :: no kernel', '# 9 passed, 3 failed, 0 skipped']
    assert gpu_report.failure_lines('\n'.join(lines)) == [
        '9 passed, 3 failed, 0 skipped', '  2 x off by N (a.py::x[1])', '  1 x no kernel (b.py::y)']
    assert gpu_report.failure_lines('') == ['no test has ended']


def rows(what='inference', fadc=2., today=10., case='resnet50_fadc 64x224', target=1.5, **env):
    samples = {'plain': [10.], 'today': [10. * today], 'fadc': [10. * fadc]}
    return make_rows(case, what, samples, {}, {**ENV, **env}, {'fadc': target})


def test_ratios():
    made = rows(fadc=1.25) + rows('train', fadc=2., compile='graph')
    assert gpu_report.ratio_lines(made) == [
        'resnet50_fadc 64x224, train, graph, float16, fadc: 2.00 (2.00 to 2.00), 20 ms, target 1.5: missed',
        'resnet50_fadc 64x224, inference, no, float16, fadc: 1.25 (1.25 to 1.25), 12.5 ms, target 1.5: yes']


def test_ahead_of_todays_way():
    lines = gpu_report.ahead_lines(rows(fadc=2., today=9.) + rows('train', fadc=2., today=10.))
    assert [line.split(': ', 1)[1] for line in lines] == [
        '4.50 times as fast, target 5: missed', '5.00 times as fast, target 5: yes']
    lines = gpu_report.ahead_lines(rows(case='resnet50_fadc 16x512', fadc=2., today=8.) + rows(case='m 1x8'))
    assert [line.split(': ', 1)[1] for line in lines] == [
        '4.00 times as fast, target 3.5: yes', '5.00 times as fast']
    assert gpu_report.ahead_lines([row for row in rows() if row['variant'] != 'today']) == []


def test_report(tmp_path):
    replace_rows(tmp_path / 'bench_model.csv', [row for i in range(60) for row in rows(case=f'm {i}x64', fadc=1.)])
    (tmp_path / 'failures.txt').write_text('# 9 passed, 0 failed, 0 skipped\n')
    outcomes = [Outcome('device', 'ok', 1., 2., 'device: X\nversions: Y\n'),
                Outcome('graph', 'ok', 1., 2., 'LEFT OUT case: reason\n### step: 1 ms\nbackend a: 1 ms\nelse\n')]
    text = gpu_report.make_report(outcomes, tmp_path)
    for line in ('device: X', 'LEFT OUT case: reason', '### step: 1 ms', 'backend a: 1 ms',
                 '9 passed, 0 failed, 0 skipped'):
        assert f'\n{line}\n' in text
    assert 'else' not in text and len(text.splitlines()) < 75
    assert not gpu_report.is_good(outcomes, tmp_path)
    outcomes[1] = outcomes[1]._replace(output='')
    assert gpu_report.is_good(outcomes, tmp_path)
    replace_rows(tmp_path / 'bench_model.csv', rows(fadc=1.6))
    assert not gpu_report.is_good(outcomes, tmp_path)
    assert list(rows()[0]) == list(COLUMNS)


def test_kernels_of_a_profile():
    def event(kind, time, key):
        return SimpleNamespace(device_type=SimpleNamespace(name=kind), self_device_time_total=time, key=key)

    events = [event('CUDA', 1., 'small'), event('CPU', 9., 'host'), event('CUDA', 5., 'large'),
              event('CUDA', 0., 'none')]
    assert [e.key for e in gpu_parts._kernels(events)] == ['large', 'small']


# --- parts ---

def test_backends_that_fail(monkeypatch, capsys):
    """One that raises, is wrong or gives no number is told with its reason; the others go on; the status is 1."""
    mix = gpu_parts.mix_bands

    def mix_bands(x, weights, factors, backend):
        if backend == 'broken' and x.dtype == torch.bfloat16:
            raise RuntimeError('no kernel')
        y = mix(x.float(), weights.float(), factors, 'written_out').to(x.dtype)
        return {'wrong': 1.1, 'nan': float('nan')}.get(backend, 1) * y if backend != 'written_out' else mix(
            x, weights, factors, 'written_out')

    monkeypatch.setattr(gpu_parts, 'mix_bands', mix_bands)
    argv = ['backends', '--device', 'cpu', '--batch', '1', '--shapes', '8@6', '--amp', 'float16', 'bfloat16']
    args = gpu_parts.parse_args(argv)
    monkeypatch.setattr(gpu_parts, 'BACKENDS', ['written_out', 'good'])
    assert gpu_parts.show_backends(args) == 0
    assert capsys.readouterr().out.count('\nbackend 8@6 b1 ') == 3
    monkeypatch.setattr(gpu_parts, 'BACKENDS', ['nan', 'written_out', 'broken', 'wrong', 'good'])
    assert gpu_parts.show_backends(args) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith('FAILED backend 8@6 b1 ')]
    counts = {name: sum(f' {name}: RuntimeError: ' in line for line in failed) for name in gpu_parts.BACKENDS}
    assert counts == {'nan': 4, 'written_out': 0, 'broken': 2, 'wrong': 4, 'good': 0}
    assert any('bfloat16 forward broken: RuntimeError: no kernel' in line for line in failed)
    assert any('not below 2.0e-03' in line for line in failed)
    assert sum(line.startswith('backend 8@6 b1 ') and ' good: ' in line for line in lines) == 4
    outcome = Outcome('backends', 'ok', 1., 2., '\n'.join(lines))
    assert not gpu_report.is_good([outcome], Path('nowhere'))


def test_profile_of_a_network_that_fails(monkeypatch, capsys):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError('no kernel')

    sound = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    monkeypatch.setattr(gpu_parts, 'make_models', lambda name, variants: {'plain': Broken(), 'fadc': sound})
    args = gpu_parts.parse_args(['profile', '--device', 'cpu', '--amp', 'bfloat16', '--batch', '2', '--size', '2'])
    monkeypatch.setattr(gpu_parts, 'make_step', lambda model, x, what, setting: lambda: model(x))
    assert gpu_parts.show_profile(args) == 1
    out = capsys.readouterr().out
    assert 'FAILED profile resnet50_fadc 2x2 train bfloat16 plain: RuntimeError: no kernel' in out
    assert '### resnet50_fadc 2x2 train bfloat16 fadc: ' in out
