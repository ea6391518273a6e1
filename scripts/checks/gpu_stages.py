"""Stages of the GPU check: what each runs, and how it is run within its time."""
from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ['GRACE', 'LAST', 'ROOT', 'STAGES', 'Outcome', 'Stage', 'budgets', 'not_installed', 'run_stage']

ROOT = Path(__file__).resolve().parents[2]
LOG = 'log.txt'
FAILURES = 'failures.txt'

# Bytes of a stage's output that the log keeps, half from its start and half from its end.
MOST_OUTPUT = 2 ** 20
# Seconds that a stage has, once it was told to stop, to say where it is, and then to end once it was killed.
GRACE, LAST = 3., 2.
# Plugins of pytest, by module: their package, and what the stage of the tests is without them.
PLUGINS = {
    'xdist': ('pytest-xdist', 'the tests run in one process'),
    'pytest_timeout': ('pytest-timeout', "a test that hangs takes the rest of the stage's time")}

Command = list[str]


class Stage(NamedTuple):
    """A stage: its part of the time, and the commands that it runs one after another."""
    name: str
    share: float
    commands: Callable[[Namespace], list[Command]]


class Outcome(NamedTuple):
    """How a stage ended: 'ok', or what is wrong; with what it printed."""
    name: str
    state: str
    seconds: float
    budget: float
    output: str


def _python(module: str, *args: object) -> Command:
    return [sys.executable, '-m', module, *map(str, args)]


def _amps(args: Namespace) -> list[str]:
    return args.amp or ['float16', 'bfloat16']


def _device(args: Namespace) -> list[Command]:
    return [_python('scripts.checks.gpu_parts', 'device')]


def gpu_test_files() -> list[str]:
    """Test files that speak of a GPU: the others take time to collect and have no test for one."""
    files = sorted((ROOT / 'tests').rglob('test_*.py'))
    return [str(f.relative_to(ROOT)) for f in files if re.search(r'\bgpu\b|cuda|DEVICES', f.read_text())]


def _has(module: str) -> bool:
    """Whether a plugin of pytest is installed in this interpreter, which is that of the stages."""
    return importlib.util.find_spec(module) is not None


def not_installed() -> list[str]:
    """A sentence on each plugin of pytest that is missing."""
    return [f'{package} is not installed: {without}' for module, (package, without) in PLUGINS.items()
            if not _has(module)]


def _tests(args: Namespace) -> list[Command]:
    cores = len(os.sched_getaffinity(0))
    several = ['-n', cores, '--dist=worksteal'] if _has('xdist') else []
    limit = ['--timeout', 100] if _has('pytest_timeout') else []
    chosen = ['-m', 'gpu']
    if args.device == 'cpu':
        chosen = ['-m', 'not sweep and not gpu', '-k', 'triton and k1 and float32']
    # the project's own addopts name options of the plugins, which pytest refuses where these are missing
    return [_python(
        'pytest', '-o', 'addopts=--strict-markers', '-p', 'no:cacheprovider', '-p', 'scripts.checks.gpu_plugin', '-W',
        'ignore', *chosen, *several, '-q', '--tb=no', *limit, '--continue-on-collection-errors', *gpu_test_files())]


def _model(compile: str, today: bool = False) -> Callable[[Namespace], list[Command]]:
    """The networks in each half dtype; today's way in the first alone, as it takes most of the time."""
    def commands(args: Namespace) -> list[Command]:
        made = []
        for i, amp in enumerate(_amps(args)):
            variants = ['today'] * (today and i == 0) + (args.variants or ['fadc'])
            options: list[object] = ['--repeats', 7, '--max-time', 1.5]
            if args.quick:
                options = ['--model', 'test_resnet_fadc', '--batch', 2, '--size', 32, '--repeats', 1, '--max-time', 1,
                           '--what', 'inference', *['train', 'memory'] * (compile == 'no')]
            made.append(_python(
                'scripts.bench.model', '--device', args.device, '--amp', amp, '--channels-last', '--compile', compile,
                '--variants', ','.join(variants), '--output', args.out / 'bench_model.csv', *options))
        return made
    return commands


def _op(args: Namespace) -> list[Command]:
    options: list[object] = [
        '--batch', 32, '--shapes', 'resnet50 *', 'convnext_tiny 384*', '--repeats', 5, '--max-time', 0.5]
    if args.quick:
        options = ['--batch', 1, '--size', 32, '--shapes', 'resnet50 128@4', '--repeats', 1, '--min-sample', 0]
    return [_python('scripts.bench.op', '--device', args.device, '--amp', amp, '--channels-last', '--output',
                    args.out / 'bench_op.csv', *options) for amp in _amps(args)[:1]]


def _bands(args: Namespace) -> list[Command]:
    options: list[object] = ['--batch', 64, '--repeats', 5, '--max-time', 0.5]
    if args.quick:
        options = ['--batch', 1, '--shapes', '8@6', '--repeats', 1, '--min-sample', 0]
    return [_python('scripts.bench.bands', '--device', args.device, '--amp', amp, '--output',
                    args.out / 'bench_bands.csv', *options) for amp in _amps(args)[:1]]


def _profile(args: Namespace) -> list[Command]:
    cases = [('resnet50_fadc', 64, 224), ('convnext_tiny_fadc', 64, 224)]
    if args.quick:
        cases = [('test_resnet_fadc', 2, 32)]
    return [_python('scripts.checks.gpu_parts', 'profile', '--device', args.device, '--amp', _amps(args)[0], '--model',
                    model, '--batch', batch, '--size', size, '--variants', *args.variants or ['fadc'])
            for model, batch, size in cases]


def _backends(args: Namespace) -> list[Command]:
    shapes = ['--batch', 1, '--shapes', '8@6'] if args.quick else [
        '--batch', 64, '--shapes', '128@56', '128@28', '256@14', '512@7', '128@64']
    return [_python('scripts.checks.gpu_parts', 'backends', '--device', args.device, '--amp', *_amps(args), *shapes)]


def _host(args: Namespace) -> list[Command]:
    return [_python('scripts.bench.host', '--device', args.device, '--amp', _amps(args)[0], '--output',
                    args.out / 'bench_host.csv', *['--repeats', 3] * args.quick)]


# In the order of running. What a stage leaves of its time goes to those after it.
STAGES = (
    Stage('device', 6, _device),
    Stage('tests', 32, _tests),
    Stage('model', 24, _model('no', today=True)),
    Stage('graph', 12, _model('graph')),
    Stage('reduce-overhead', 16, _model('reduce-overhead')),
    Stage('op', 8, _op),
    Stage('bands', 5, _bands),
    Stage('profile', 6, _profile),
    Stage('backends', 4, _backends),
    Stage('host', 8, _host),
)


def budgets(stages: Sequence[Stage], seconds: float) -> dict[str, float]:
    """Seconds of each stage where they share so many."""
    total = sum(stage.share for stage in stages)
    return {stage.name: seconds * stage.share / total for stage in stages}


def _environment(args: Namespace) -> dict[str, str]:
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONFAULTHANDLER': '1', 'TORCH_LOGS': 'perf_hints',
           'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
           'GPU_CHECK_FAILURES': str(args.out / FAILURES)}
    env.pop('PYTEST_XDIST_WORKER', None)
    if args.commit:
        env['BENCH_COMMIT'] = args.commit
    if args.device == 'cpu':
        env.update(TRITON_INTERPRET='1', OMP_NUM_THREADS='1')
    return env


def _stop(process: subprocess.Popen[bytes]) -> bool:
    """Python says where it is when it is aborted; then it and what it has started are killed.

    Returns:
        Whether it has ended: one that waits for a driver may not.
    """
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(LAST)
    except subprocess.TimeoutExpired:
        return False
    return True


def _run(command: Command, seconds: float, log: Path, env: dict[str, str]) -> str:
    """Run a command with its output at the end of the log; 'ok', or what is wrong."""
    with log.open('ab') as file:
        file.write(f'$ {" ".join(command[1:])}\n'.encode())
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True)
        try:
            try:
                status = process.wait(max(seconds, 0.))
            except subprocess.TimeoutExpired:
                return 'killed at its limit' + ('' if _stop(process) else ', and has not ended')
        except BaseException:  # SIGTERM may come while it is stopped too
            _stop(process)
            raise
    return 'ok' if status == 0 else f'failed with {status}'


def _trim(log: Path, start: int) -> str:
    """What a log has from a position on, where that is long without its middle, which leaves the log too."""
    data = log.read_bytes()
    output = data[start:]
    if len(output) > MOST_OUTPUT:
        half = MOST_OUTPUT // 2
        output = output[:half] + b'\n[...]\n' + output[-half:]
        log.write_bytes(data[:start] + output)
    return output.decode(errors='replace')


def run_stage(stage: Stage, args: Namespace, budget: float) -> Outcome:
    """Run a stage's commands until they end or its time does; a command that fails does not keep back the next."""
    log = args.out / LOG
    begin = time.monotonic()
    states = []
    with log.open('ab') as file:
        file.write(f'== {stage.name}, {budget:.0f} s\n'.encode())
    start = log.stat().st_size
    for command in stage.commands(args):
        left = budget - (time.monotonic() - begin)
        states.append(_run(command, left, log, _environment(args)) if left > 0 else 'no time left')
    state = ', '.join(dict.fromkeys(s for s in states if s != 'ok')) or 'ok'
    return Outcome(stage.name, state, time.monotonic() - begin, budget, _trim(log, start))
