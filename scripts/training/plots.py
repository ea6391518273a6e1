"""The plot of a comparison: the score of each run, and paired differences with their intervals."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fadc_timm._writing import write_atomically
from scripts.training.paired import mean_and_deviation, paired_difference


class Panel(NamedTuple):
    """A row of axes.

    title: Of the row.
    score: What is shown, with its unit.
    values: Scores by setting, and by what a run has in common with the one that it is compared with: seed and steps.
    against: The setting that each setting is compared with.
    """
    title: str
    score: str
    values: Mapping[str, Mapping[Any, float]]
    against: Mapping[str, str]


def _compared(panel: Panel) -> dict[str, str]:
    """The settings that have a difference to another one, and that one."""
    pairs = {name: panel.against[name] for name in panel.values}
    return {name: base for name, base in pairs.items()
            if name != base and len(panel.values[name].keys() & panel.values.get(base, {}).keys()) > 1}


def difference_label(panel: Panel) -> str:
    """What the axis of the differences says: to plain, and which settings are compared with another one."""
    others: dict[str, list[str]] = {}
    for name, base in _compared(panel).items():
        if base != 'plain':
            others.setdefault(base, []).append(name)
    further = ''.join(f'\n{", ".join(names)}: to {base}' for base, names in others.items())
    return f'difference to plain of the same seed, 95 % interval, points{further}'


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Draw each run's score, and the paired differences with their 95 % intervals."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    heights = [1.1 + 0.34 * len(panel.values) for panel in panels]
    figure, axes = plt.subplots(
        len(panels), 2, squeeze=False, figsize=(10, sum(heights)), height_ratios=heights, layout='constrained')
    for (left, right), panel in zip(axes, panels):
        names, compared = list(panel.values), _compared(panel)
        for y, name in enumerate(names):
            of_seeds = panel.values[name]
            mean, _ = mean_and_deviation(of_seeds)
            left.plot(list(of_seeds.values()), [y] * len(of_seeds), 'o', color='tab:blue', alpha=0.5, markersize=5)
            left.plot([mean, mean], [y - 0.3, y + 0.3], color='black')
            if name in compared:
                d = paired_difference(of_seeds, panel.values[compared[name]])
                reach = [[d.mean - d.low], [d.high - d.mean]]
                right.errorbar([d.mean], [y], xerr=reach, fmt='o', color='black', capsize=3)
        right.axvline(0, color='grey', linewidth=0.8)
        for axis in (left, right):
            axis.set_yticks(range(len(names)), names if axis is left else [''] * len(names))
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.grid(axis='x', alpha=0.3)
        left.set_xlabel(f'{panel.score} of each seed, and mean, %')
        right.set_xlabel(difference_label(panel))
        left.set_title(panel.title, loc='left')
    write_atomically(path, lambda part: figure.savefig(part, dpi=110, format='png'))
    plt.close(figure)
