"""The table of the segmentation comparison in docs/segmentation.md, and its plot, from the files of compare.py."""
from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from fadc_timm._writing import markdown_table
from scripts.results import RESULTS
from scripts.segmentation.comparison import BY_NAME, PRESETS, mean_and_deviation, paired_difference

RUNS, TIMES, PLOT = (RESULTS / name for name in ('segmentation.csv', 'segmentation_time.csv', 'segmentation.png'))

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Rows of a CSV file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def by_setting(rows: list[Row], column: str) -> dict[str, dict[int, float]]:
    """Values by setting and seed, settings in their order."""
    out: dict[str, dict[int, float]] = {name: {} for name in BY_NAME}
    for row in rows:
        out[row['setting']][int(row['seed'])] = float(row[column])
    return {name: values for name, values in out.items() if values}


def _difference(name: str, values: dict[str, dict[int, float]]) -> str:
    against = BY_NAME[name].against
    if name == against or against not in values or not values[name].keys() & values[against].keys():
        return ''
    d = paired_difference(values[name], values[against])
    interval = f' ({d.low:+.2f} to {d.high:+.2f})' if d.n > 1 else ''
    return f'{d.mean:+.2f}{interval}' + (f', to {against}' if against != 'plain' else '')


def _table(preset: str, rows: list[Row], times: list[Row]) -> str:
    values = by_setting(rows, 'miou')
    timed = {row['setting']: row for row in times}
    header = ['backbone', 'setting', 'seeds', 'mIoU %, mean (s.d.)', 'difference to plain (95 %)', 'M params', 'GMACs',
              'time per step', 'memory, MB']
    lines = []
    for name, of_seeds in values.items():
        row = next(r for r in rows if r['setting'] == name)
        mean, deviation = mean_and_deviation(of_seeds)
        spread = f' ({deviation:.2f})' if len(of_seeds) > 1 else ''
        clock = timed.get(name)
        time = f'{float(clock["ratio"]):.2f} x' if clock else ''
        if clock and name == 'plain':
            time = f'{float(clock["ms"]):.0f} ms'
        lines.append([
            BY_NAME[name].what, f'`{name}`', str(len(of_seeds)), f'{mean:.2f}{spread}', _difference(name, values),
            f'{int(row["params"]) / 1e6:.3f}', f'{float(row["gmacs"]):.2f}', time, clock['peak_mb'] if clock else ''])
    where = Counter((r['device'], r['torch'], r['commit'], r['date']) for r in rows)
    runs = '; '.join(f'{device}, torch {torch}, commit {commit}, {date}: {n} runs'
                     for (device, torch, commit, date), n in where.most_common())
    p = PRESETS[preset]
    steps = ', '.join(sorted({r['steps'] for r in rows}, key=int))
    return (f'`--preset {preset}`: {steps} steps of {p.batch} crops of {p.crop} px, test on {rows[0]["images"]} '
            f'images. {runs}.\n\n' + markdown_table(header, lines, left=2))


def segmentation() -> str:
    """A table for each preset that there are runs of."""
    rows, times = read(RUNS), read(TIMES)
    parts = []
    for preset in PRESETS:
        here = [row for row in rows if row['preset'] == preset]
        if here:
            parts.append(_table(preset, here, [row for row in times if row['preset'] == preset]))
    return '\n\n'.join(parts) or 'Not run yet.'


def draw(path: Path) -> None:
    """Draw each run's mIoU, and the paired differences with their intervals, a row of axes for each preset."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    rows = read(RUNS)
    presets = [p for p in PRESETS if any(row['preset'] == p for row in rows)]
    values = {p: by_setting([row for row in rows if row['preset'] == p], 'miou') for p in presets}
    heights = [1.1 + 0.34 * len(values[p]) for p in presets]
    figure, axes = plt.subplots(
        len(presets), 2, squeeze=False, figsize=(10, sum(heights)), height_ratios=heights, layout='constrained')
    for (left, right), preset in zip(axes, presets):
        names = list(values[preset])
        for y, name in enumerate(names):
            of_seeds = values[preset][name]
            mean, _ = mean_and_deviation(of_seeds)
            left.plot(list(of_seeds.values()), [y] * len(of_seeds), 'o', color='tab:blue', alpha=0.5, markersize=5)
            left.plot([mean, mean], [y - 0.3, y + 0.3], color='black')
            against = values[preset].get(BY_NAME[name].against, {})
            if name != BY_NAME[name].against and len(of_seeds.keys() & against.keys()) > 1:
                d = paired_difference(of_seeds, against)
                reach = [[d.mean - d.low], [d.high - d.mean]]
                right.errorbar([d.mean], [y], xerr=reach, fmt='o', color='black', capsize=3)
        right.axvline(0, color='grey', linewidth=0.8)
        for axis in (left, right):
            axis.set_yticks(range(len(names)), names if axis is left else [''] * len(names))
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.grid(axis='x', alpha=0.3)
        left.set_xlabel('mIoU of each seed, and mean, %')
        right.set_xlabel('difference to plain of the same seed, 95 % interval, points')
        left.set_title(f'preset {preset}', loc='left')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
