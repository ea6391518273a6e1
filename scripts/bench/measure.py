"""Measuring: interleaved timing, peak memory, and the frame of the benchmark scripts.

In each round all variants run one after another, in an order that rotates, so that what slows the machine down slows
all of them down.
"""
import argparse
import datetime
import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import torchvision
from torch.profiler import ProfilerActivity, profile

from scripts.bench.subjects import AMP_DTYPES, FORMATS, Setting, Step
from scripts.results import Row, Samples, commit, compare_rows, device_name, print_rows, read_rows, replace_rows

MIN_REPEATS = 3


def environment(setting: Setting) -> Row:
    """The columns of a row that say where, when and how."""
    return {
        'compile': setting.compile, 'dtype': setting.amp or 'float32',
        'threads': str(torch.get_num_threads()), 'device': device_name(setting.device),
        'torch': torch.__version__, 'torchvision': torchvision.__version__, 'timm': timm.__version__,
        'commit': commit(), 'date': datetime.date.today().isoformat()}


class Clock:
    """Milliseconds of one call of a step, the mean over `number` calls in a row."""

    def __init__(self, device: str) -> None:
        self.cuda = device == 'cuda'

    def __call__(self, step: Step, number: int = 1) -> float:
        if self.cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(number):
                step()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / number
        begin = time.perf_counter()
        for _ in range(number):
            step()
        return (time.perf_counter() - begin) * 1e3 / number


def pick_format(make: Callable[[str], Step], clock: Clock, formats: Sequence[str], calls: int = 3) -> tuple[str, Step]:
    """The step in the memory format in which it is faster (median of a few calls, after two to warm up).

    Args:
        make: Makes the step in a format.
        clock: Measures it.
        formats: The formats to try; a single one is warmed up only.
        calls: Number of calls.
    """
    best: tuple[float, str, Step] | None = None
    for name in formats:
        step = make(name)
        clock(step, 2)
        t = statistics.median(clock(step) for _ in range(calls)) if len(formats) > 1 else 0.
        if best is None or t < best[0]:
            best = t, name, step
    assert best is not None
    return best[1], best[2]


def interleave(
        steps: dict[str, Step],
        clock: Callable[[Step, int], float],
        repeats: int,
        max_time: float,
        min_sample: float = 0.,
) -> Samples:
    """Measure steps round by round.

    Args:
        steps: Step of each variant, warmed up; the first is the one that the others are compared with.
        clock: Milliseconds of a call.
        repeats: Number of rounds.
        max_time: Seconds after which a variant, unless it is the first, sits out the remaining rounds, but not before
            round `MIN_REPEATS`.
        min_sample: Milliseconds that a sample should take: shorter steps are called several times for one.

    Returns:
        Milliseconds by variant; index i is round i.
    """
    names = list(steps)
    number = {name: max(1, round(min_sample / max(clock(step, 1), 1e-3))) if min_sample else 1
              for name, step in steps.items()}
    samples: Samples = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.)
    for i in range(repeats):
        for name in names[i % len(names):] + names[:i % len(names)]:
            if name == names[0] or i < MIN_REPEATS or spent[name] < max_time:
                t = clock(steps[name], number[name])
                samples[name].append(t)
                spent[name] += t * number[name] / 1e3
    return samples


def peak_memory(step: Step, held: int, device: str) -> float:
    """Largest number of megabytes (1e6 bytes) of tensors during a step, with what is held all along.

    On a CPU, torch's profiler reports every allocation and release of torch's allocator, inside of operators too, and
    their running sum is exact and the same in every run. (Peak resident memory is neither: freed blocks stay with
    malloc, and libraries load late.) What libraries allocate by themselves is not seen, on a GPU neither.

    Args:
        step: Warmed up, and holding no memory between its calls but `held`.
        held: Bytes of parameters, buffers and optimizer state.
        device: 'cpu' or 'cuda'.
    """
    gc.collect()
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before + held) / 1e6
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # else it prints that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return (peak + held) / 1e6


def formats_to_try(memory_format: str) -> list[str]:
    """The formats of the option --memory-format."""
    return list(FORMATS) if memory_format == 'faster' else [memory_format]


def add_options(
        parser: argparse.ArgumentParser,
        repeats: int,
        max_time: float = 30.,
        formats: Sequence[str] = ('faster', *FORMATS),
) -> None:
    """The options that the benchmarks share.

    Args:
        parser: Of the benchmark.
        repeats: Default number of rounds.
        max_time: Default seconds of a variant.
        formats: Memory formats that the benchmark has, the default first.
    """
    usual = 'that in which each is faster' if formats[0] == 'faster' else formats[0]
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--amp', default='', choices=tuple(AMP_DTYPES), help='autocast to this dtype')
    parser.add_argument('--threads', type=int, help="of torch on the CPU, default: torch's choice")
    parser.add_argument('--repeats', type=int, default=repeats, help=f'rounds (default: {repeats})')
    parser.add_argument(
        '--max-time', type=float, default=max_time, metavar='SECONDS',
        help='of a variant other than plain, which then sits out the remaining rounds, '
        f'but not before round {MIN_REPEATS} (default: {max_time:g})')
    parser.add_argument(
        '--memory-format', default=formats[0], choices=formats, help=f'of all variants; default: {usual}')
    parser.add_argument(
        '--channels-last', dest='memory_format', action='store_const', const='channels_last',
        help='short for --memory-format channels_last')
    parser.add_argument('--check', action='store_true', help='write nothing; fail where a stored ratio is lost')
    parser.add_argument(
        '--margin', type=float, default=0.05,
        help='--check: fraction by which the first quartile may lie above the stored third one (default: 0.05)')
    parser.add_argument('--output', type=Path, help='CSV file (default: in scripts/results)')


def reason(error: BaseException) -> str:
    """The first line of an error, and before it of what went wrong first: a broken capture raises again at its end."""
    lines = [f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}']
    while error.__context__ is not None:
        error = error.__context__
        lines[1:] = [f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}']
    return '; then '.join(reversed(lines))


def run_jobs(jobs: Sequence[tuple[str, Callable[[], list[Row]]]], path: Path, check: bool, margin: float) -> int:
    """Measure case by case; write each at once, or compare it with what is stored. The exit status.

    A case that raises is reported, and the others still run.
    """
    failed, lost, compared = False, [], 0
    stored = read_rows(path)
    for name, measure in jobs:
        try:
            rows = measure()
        except Exception as error:
            traceback.print_exc()
            print(f'FAILED {name}: {reason(error)}', flush=True)
            failed = True
            continue
        print_rows(rows)
        if check:
            result = compare_rows(rows, stored, margin)
            compared += result.compared
            lost += result.lost
        else:
            replace_rows(path, rows)
    for line in lost:
        print(f'LOST {line}')
    if check:
        print(f'{compared} ratios compared with {path}, {len(lost)} lost')
    return int(failed or bool(lost) or (check and not compared))
