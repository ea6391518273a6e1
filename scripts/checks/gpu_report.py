"""The report of the GPU check: what failed, and each ratio beside its target, in some sixty lines."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from scripts.checks.gpu_stages import FAILURES, ROOT, Outcome, not_installed
from scripts.results import Row, read_rows

__all__ = ['is_good', 'make_report']

# By how many times this package is to be ahead of today's way, by the end of the case's name.
AHEAD = {'64x224': 5., '16x512': 3.5}
OURS = ('fadc', 'triton')

WIDTH = 160
MOST_KINDS, MOST_RATIOS, MOST_LINES = 8, 34, 12


def _cut(lines: Sequence[str], most: int) -> list[str]:
    rest = [f'  ... {len(lines) - most} more'] if len(lines) > most else []
    return [line[:WIDTH] for line in lines[:most]] + rest


def _where(output: str) -> list[str]:
    """The last line printed, and of a process that was aborted the innermost frame and the innermost in the project."""
    printed, _, trace = output.partition('Fatal Python error: Aborted')
    lines = [line.strip() for line in printed.splitlines() if line.strip() and not line.startswith('$ ')]
    trace = trace.rpartition('Current thread')[2]
    frames = [line.strip().replace(f'{ROOT}/', '') for line in trace.splitlines() if line.startswith('  File ')]
    ours = [frame for frame in frames if frame.startswith(('File "fadc_timm', 'File "scripts', 'File "tests'))]
    return [f'last printed: {line}' for line in lines[-1:]] + list(dict.fromkeys(frames[:1] + ours[:1]))


def stage_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each stage, and where it was killed or has failed the last that it printed."""
    lines = []
    for o in outcomes:
        lines.append(f'{o.name:16} {o.state}, {o.seconds:.0f} of {o.budget:.0f} s')
        if o.state != 'ok':
            lines += [f'  {line}'[:WIDTH] for line in _where(o.output)]
    return lines


def failure_lines(text: str) -> list[str]:
    """How many tests have passed and failed, and the kinds of failures with their number and an example."""
    lines = text.splitlines()
    counts = [line for line in lines if line.startswith('# ')]
    failures = [line.partition(' :: ') for line in lines if not line.startswith('#') and ' :: ' in line]
    # the same but for its numbers is the same kind
    kinds = Counter(re.sub(r'[0-9.e+-]*[0-9][0-9.e+-]*', 'N', message)[:200] for _, _, message in failures)
    found = [counts[-1][2:] if counts else 'no test has ended']
    for kind, n in kinds.most_common():
        node = next(node for node, _, message in failures
                    if re.sub(r'[0-9.e+-]*[0-9][0-9.e+-]*', 'N', message)[:200] == kind)
        found.append(f'  {n} x {kind[:90]} ({node.split()[0]})')
    return _cut(found, MOST_KINDS)


def _name(row: Row) -> str:
    return f'{row["case"]}, {row["what"]}, {row["compile"]}, {row["dtype"]}, {row["variant"]}'


def ratio_lines(rows: Sequence[Row]) -> list[str]:
    """Ratios to plain beside their targets, those that miss it first."""
    ours = [row for row in rows if row['variant'] in OURS]
    ours.sort(key=lambda row: row['met'] != 'missed')
    return _cut([
        f'{_name(row)}: {float(row["ratio"]):.2f} ({float(row["ratio_q25"]):.2f} to {float(row["ratio_q75"]):.2f}), '
        f'{row["median"]} {row["unit"]}' + (f', target {row["target"]}: {row["met"]}' if row['target'] else '')
        for row in ours], MOST_RATIOS)


def ahead_lines(rows: Sequence[Row]) -> list[str]:
    """How many times as fast as today's way, measured in the same run."""
    def key(row: Row) -> tuple[str, ...]:
        return row['case'], row['what'], row['compile'], row['dtype']

    today = {key(row): float(row['ratio']) for row in rows if row['variant'] == 'today'}
    lines = []
    for row in rows:
        if row['variant'] in OURS and key(row) in today and row['unit'] == 'ms':
            times = today[key(row)] / float(row['ratio'])
            target = AHEAD.get(row['case'].rpartition(' ')[2])
            met = '' if target is None else f', target {target:g}: {"yes" if times >= target else "missed"}'
            lines.append(f'{_name(row)}: {times:.2f} times as fast{met}')
    return lines


def printed_lines(outcomes: Sequence[Outcome], *starts: str) -> list[str]:
    """Lines that stages have printed and that start in one of some ways."""
    return [line for o in outcomes for line in o.output.splitlines() if line.startswith(starts)]


def make_report(outcomes: Sequence[Outcome], out: Path) -> str:
    """The report on the stages that have run, from what they printed and what they left in a folder."""
    rows = read_rows(out / 'bench_model.csv')
    failures = out / FAILURES
    parts = {
        'device': printed_lines(outcomes, 'device: ', 'versions: '),
        'stages': stage_lines(outcomes),
        'tests': [
            *(failure_lines(failures.read_text()) if failures.exists() else []),
            *(not_installed() if any(o.name == 'tests' for o in outcomes) else [])],
        'failed or left out': _cut(printed_lines(outcomes, 'FAILED ', 'LEFT OUT '), MOST_LINES),
        'ratio to plain': ratio_lines(rows),
        "against today's way": _cut(ahead_lines(rows), MOST_LINES),
        'a training step': _cut(printed_lines(outcomes, '### '), MOST_LINES),
        'backends of the band mix': _cut(printed_lines(outcomes, 'backend '), MOST_LINES),
    }
    return '\n'.join(line for title, lines in parts.items() if lines for line in (f'== {title}', *lines)) + '\n'


def is_good(outcomes: Sequence[Outcome], out: Path) -> bool:
    """Whether all stages have ended well, with nothing failed or left out and no target missed."""
    rows = read_rows(out / 'bench_model.csv')
    missed = any(row['met'] == 'missed' for row in rows) or any(': missed' in line for line in ahead_lines(rows))
    return all(o.state == 'ok' for o in outcomes) and not missed and not printed_lines(
        outcomes, 'FAILED ', 'LEFT OUT ')
