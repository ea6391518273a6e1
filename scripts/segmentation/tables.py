"""The table of the segmentation comparison in docs/segmentation.md, and its plot, from the files of compare.py."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

from fadc_timm._writing import markdown_table
from scripts.results import RESULTS, Row, read_csv
from scripts.segmentation.comparison import BY_NAME, PRESETS
from scripts.training import plots
from scripts.training.paired import paired_difference, spread

RUNS, TIMES, PLOT = (RESULTS / name for name in ('segmentation.csv', 'segmentation_time.csv', 'segmentation.png'))


Values = dict[str, dict[tuple[int, int], float]]


def by_setting(rows: list[Row], column: str) -> Values:
    """Values by setting, then by seed and steps of the setting without `longer`; settings in their order.

    So a run is paired with one of the same seed and, but for what the settings say, of as many steps.
    """
    out: Values = {name: {} for name in BY_NAME}
    for row in rows:
        steps = round(int(row['steps']) / BY_NAME[row['setting']].longer)
        out[row['setting']][int(row['seed']), steps] = float(row[column])
    return {name: values for name, values in out.items() if values}


def _difference(name: str, values: Values) -> str:
    against = BY_NAME[name].against
    if name == against or against not in values or not values[name].keys() & values[against].keys():
        return ''
    difference = paired_difference(values[name], values[against])
    return f'{difference}' + (f', to {against}' if against != 'plain' else '')


def _table(preset: str, rows: list[Row], times: list[Row]) -> str:
    values = by_setting(rows, 'miou')
    timed = {row['setting']: row for row in times}
    header = ['backbone', 'setting', 'seeds', 'mIoU %, mean (s.d.)', 'difference to plain (95 %)', 'M params', 'GMACs',
              'time per step', 'memory, MB']
    lines = []
    for name, of_seeds in values.items():
        row = next(r for r in rows if r['setting'] == name)
        clock = timed.get(name)
        against = BY_NAME[name].against
        time = f'{float(clock["ratio"]):.2f} x' + (f', to {against}' if against != 'plain' else '') if clock else ''
        if clock and name == against:
            time = f'{float(clock["ms"]):.0f} ms'
        lines.append([
            BY_NAME[name].what, f'`{name}`', str(len(of_seeds)), spread(of_seeds), _difference(name, values),
            f'{int(row["params"]) / 1e6:.3f}', f'{float(row["gmacs"]):.2f}', time, clock['peak_mb'] if clock else ''])
    where = Counter((r['device'], r['torch'], r['commit'], r['date']) for r in rows)
    runs = '; '.join(f'{device}, torch {torch}, commit {commit}, {date}: {n} runs'
                     for (device, torch, commit, date), n in where.most_common())
    p = PRESETS[preset]
    steps = ', '.join(sorted({r['steps'] for r in rows}, key=int))
    return (f'`--preset {preset}`: {steps} steps of {p.batch} crops of {p.crop} px, test on {rows[0]["images"]} '
            f'images. {runs}.\n\n' + markdown_table(header, lines, left=2))


def segmentation(runs: Path | None = None, times: Path | None = None) -> str:
    """A table for each preset that there are runs of.

    Args:
        runs: File of the runs, None for that of the documentation.
        times: File of the times, likewise.
    """
    rows, clocks = read_csv(runs or RUNS), read_csv(times or TIMES)
    parts = []
    for preset in PRESETS:
        here = [row for row in rows if row['preset'] == preset]
        if here:
            parts.append(_table(preset, here, [row for row in clocks if row['preset'] == preset]))
    return '\n\n'.join(parts) or 'Not run yet.'


def draw(path: Path) -> None:
    """Draw each run's mIoU, and the paired differences with their intervals, a row of axes for each preset."""
    rows = read_csv(RUNS)
    present = [p for p in PRESETS if any(row['preset'] == p for row in rows)]
    against = {name: setting.against for name, setting in BY_NAME.items()}
    plots.draw(path, [
        plots.Panel(f'preset {p}', 'mIoU', by_setting([row for row in rows if row['preset'] == p], 'miou'), against)
        for p in present])
