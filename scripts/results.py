"""What measurements leave in scripts/results/: CSV files that are whole or absent, and the rows of the benchmarks.

A row is one variant of one case. Its `ratio` compares it with the plain variant *of the same round* (see `interleave`
in bench/measure.py); `ratio_q25` and `ratio_q75` are quartiles over the rounds.
"""
import csv
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fadc_timm._writing import write_atomically

RESULTS = Path(__file__).parent / 'results'
COLUMNS = (
    'case', 'what', 'variant', 'unit', 'median', 'q25', 'q75', 'ratio', 'ratio_q25', 'ratio_q75', 'target', 'met', 'n',
    'format', 'compile', 'dtype', 'threads', 'device', 'torch', 'torchvision', 'timm', 'commit', 'date')
KEY = ('case', 'what', 'variant', 'device', 'dtype', 'compile')

Row = dict[str, str]
Samples = dict[str, list[float]]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV file as a whole; an entry that a row lacks is empty.

    Args:
        path: The file.
        columns: Its columns; a row that has others is refused.
        rows: Values by column.

    Raises:
        ValueError: A row has a column that is not one of the file's.
    """
    def write(part: Path) -> None:
        with part.open('w', newline='') as file:
            writer = csv.DictWriter(file, columns, lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def cores() -> int:
    """Cores of the CPU that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def device_name(device: str) -> str:
    """'cpu: MODEL, N cores' or 'cuda: MODEL', for 'cuda:1' that of the second GPU."""
    if device.partition(':')[0] == 'cuda':
        return f'cuda: {torch.cuda.get_device_name(device)}'
    model = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), model)
    return f'{device}: {model}, {cores()} cores'


def commit() -> str:
    """Short hash of the commit, with '+' where the tree differs from it in more than what the benchmarks write.

    BENCH_COMMIT in the environment comes before it, for a copy of the tree without git.
    """
    if os.environ.get('BENCH_COMMIT'):
        return os.environ['BENCH_COMMIT']

    def git(*args: str) -> str:
        return subprocess.run(
            ['git', '-C', str(RESULTS.parents[1]), *args], capture_output=True, text=True, check=True).stdout.strip()
    try:
        dirty = git('status', '--porcelain', '--', ':/', ':!/scripts/results', ':!/README.md', ':!/docs')
        return git('rev-parse', '--short', 'HEAD') + ('+' if dirty else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, first quartile, third quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q25, q50, q75 = statistics.quantiles(values, n=4, method='inclusive')
    return q50, q25, q75


def _number(x: float) -> str:
    """Four significant digits at least, and no exponent."""
    return f'{x:.0f}' if abs(x) >= 1000 else f'{x:.4g}'


def make_rows(
        case: str,
        what: str,
        samples: Samples,
        formats: dict[str, str],
        env: Row,
        targets: dict[str, float] | None = None,
        unit: str = 'ms',
        compare: Callable[[float, float], float] = lambda value, base: value / base,
) -> list[Row]:
    """A row for each variant.

    Args:
        case: What was measured on which shapes.
        what: Which quantity.
        samples: Values by variant, the one to compare with first; index i of each is of one round.
        formats: Memory format by variant.
        env: Columns of :func:`environment`.
        targets: Largest ratio by variant, where there is one.
        unit: Of the values.
        compare: The "ratio" of a value and that of the first variant.
    """
    base = next(iter(samples.values()))
    rows = []
    for variant, values in samples.items():
        ratio = quartiles([compare(v, b) for v, b in zip(values, base)])
        target = (targets or {}).get(variant)
        met = '' if target is None else 'yes' if ratio[0] <= target else 'missed'
        numbers = [_number(x) for x in (*quartiles(values), *ratio)]
        rows.append({
            'case': case, 'what': what, 'variant': variant, 'unit': unit, **dict(zip(COLUMNS[4:10], numbers)),
            'target': '' if target is None else f'{target:g}', 'met': met, 'n': str(len(values)),
            'format': formats.get(variant, ''), **env})
    return rows


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[k] for k in KEY)


def read_rows(path: Path) -> list[Row]:
    """Rows of a file of the benchmarks, none if there is no file."""
    rows = read_csv(path)
    for row in rows[:1]:
        if tuple(row) != COLUMNS:
            raise ValueError(f'{path} has the columns {", ".join(row)}, the benchmarks write {", ".join(COLUMNS)}.')
    return rows


def replace_rows(path: Path, new: Sequence[Row]) -> None:
    """Write rows into a CSV file: each in the place of the one with its key, or at the end."""
    rows = {key(row): row for row in read_rows(path)}
    rows.update({key(row): row for row in new})
    write_csv(path, COLUMNS, rows.values())


class Comparison(NamedTuple):
    """Stored and new rows compared: how many had a partner, and a sentence on each ratio that is lost."""
    compared: int
    lost: list[str]


def compare_rows(new: Sequence[Row], stored: Sequence[Row], margin: float) -> Comparison:
    """Find the ratios that are lost beyond their noise.

    A ratio is lost where the new first quartile lies above the stored third one by more than the margin. The plain
    variant, whose ratio is one, and today's way are not compared, nor are rows taken with another number of threads.

    Args:
        new: Rows just measured.
        stored: Rows of the CSV file.
        margin: Fraction of the stored third quartile.
    """
    known = {(*key(row), row['threads']): row for row in stored}
    compared, lost = 0, []
    for row in new:
        old = known.get((*key(row), row['threads']))
        if old is None or row['variant'].endswith(('plain', 'today')):
            continue
        compared += 1
        limit = float(old['ratio_q75']) + margin * abs(float(old['ratio_q75']))
        if float(row['ratio_q25']) > limit:
            lost.append(
                f'{row["case"]}, {row["what"]}, {row["variant"]}: ratio {row["ratio"]} ({row["ratio_q25"]} to '
                f'{row["ratio_q75"]}), stored {old["ratio"]} ({old["ratio_q25"]} to {old["ratio_q75"]}, commit '
                f'{old["commit"]})')
    return Comparison(compared, lost)


def print_rows(rows: Sequence[Row]) -> None:
    for row in rows:
        target = f', target {row["target"]}: {row["met"]}' if row['target'] else ''
        print(f'{row["case"]:34} {row["what"]:12} {row["variant"]:10} {row["median"]:>8} {row["unit"]} '
              f'({row["q25"]} to {row["q75"]}), ratio {row["ratio"]} ({row["ratio_q25"]} to {row["ratio_q75"]}), '
              f'n {row["n"]}, {row["format"]}{target}', flush=True)
