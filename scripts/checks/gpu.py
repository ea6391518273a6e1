#!/usr/bin/env python3
"""What a GPU says in some minutes: whether all is right, how fast it is, and where the time goes.

    python -m scripts.checks.gpu --minutes 6 --out DIR
    python -m scripts.checks.gpu --out DIR --stages tests graph      # some stages, which share the time
    python -m scripts.checks.gpu --out DIR --device cpu --quick      # a rehearsal with Triton's interpreter

Stages: `device` and versions; `tests` marked gpu, in as many processes as there are cores, or with no pytest-xdist in
one; `model`, the networks eager, as a `graph`, and compiled in the mode `reduce-overhead`; `op` and `bands`, the
operator and the band mix; a `profile` of a training step by kernel and by host; the `backends` of the band mix, their
errors and times; and `host`, the host time of a layer. Each runs in processes of its own and is killed when its share
of the time is over; what it leaves of that goes to those after it. SIGTERM kills the running stage, which the report
names, and ends the check. Seven files come of it:

* report.txt: the report that is printed at the end, written anew after each stage;
* log.txt: what all stages printed;
* failures.txt: failed tests with their messages, as they happen;
* bench_model.csv, bench_op.csv, bench_bands.csv, bench_host.csv: rows as of scripts/results.

It needs neither network nor git: without git rows have the commit of --commit, or 'unknown'. The exit status is 0 where
each stage has ended well and no target was missed.
"""
from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.checks.gpu_report import is_good, make_report
from scripts.checks.gpu_stages import FAILURES, GRACE, LAST, LOG, STAGES, Outcome, Stage, budgets, run_stage

# Seconds kept for the end of a stage that is killed and for the report, and those below which no stage is started.
RESERVE, LEAST = GRACE + LAST + 1., 1.
REPORT = 'report.txt'


class Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, once: a second one does not break off what ends the running stage."""
    def terminate(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=6., help='for all stages together (default: 6)')
    parser.add_argument('--out', type=Path, required=True, help='folder of the results; older ones there are replaced')
    parser.add_argument('--stages', nargs='+', choices=[stage.name for stage in STAGES], help='default: all')
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--quick', action='store_true', help='tiny networks and maps: a rehearsal')
    parser.add_argument(
        '--amp', nargs='+', choices=('float16', 'bfloat16'), help='dtypes of autocast (default: float16 bfloat16)')
    parser.add_argument(
        '--variants', nargs='+', choices=('fadc', 'triton'), help='networks beside the plain one (default: fadc)')
    parser.add_argument('--commit', default='', help="of the rows, where git does not know it")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    return args


def run(stages: Sequence[Stage], args: argparse.Namespace) -> list[Outcome]:
    """Run stages one after another, and write the report after each.

    Raises:
        Terminated: SIGTERM came. The stage that ran is killed, and is the last in the report.
    """
    end = time.monotonic() + 60 * args.minutes - RESERVE
    outcomes: list[Outcome] = []
    for i, stage in enumerate(stages):
        budget = budgets(stages[i:], end - time.monotonic())[stage.name]
        if budget < LEAST:
            outcomes.append(Outcome(stage.name, 'no time left', 0., max(budget, 0.), ''))
        else:
            print(f'== {stage.name}, {budget:.0f} s', flush=True)
            begin = time.monotonic()
            try:
                outcomes.append(run_stage(stage, args, budget))
            except Terminated:
                outcomes.append(Outcome(stage.name, 'killed by SIGTERM', time.monotonic() - begin, budget, ''))
                (args.out / REPORT).write_text(make_report(outcomes, args.out))
                print(f'   SIGTERM: {stage.name} is killed, and the check ends', flush=True)
                raise
            print(f'   {outcomes[-1].state} after {outcomes[-1].seconds:.0f} s', flush=True)
        (args.out / REPORT).write_text(make_report(outcomes, args.out))
    return outcomes


def main() -> int:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in (REPORT, LOG, FAILURES, *(f'bench_{b}.csv' for b in ('model', 'op', 'bands', 'host'))):
        (args.out / name).unlink(missing_ok=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    stages = [stage for stage in STAGES if stage.name in (args.stages or [s.name for s in STAGES])]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        # a stage that is killed leaves broken files in inductor's cache, which is not to be that of others
        os.environ['TORCHINDUCTOR_CACHE_DIR'] = cache
        try:
            with terminable():
                outcomes = run(stages, args)
        except Terminated:
            return 128 + signal.SIGTERM
    print((args.out / REPORT).read_text())
    return 0 if is_good(outcomes, args.out) else 1


if __name__ == '__main__':
    sys.exit(main())
