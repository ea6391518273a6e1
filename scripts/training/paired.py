"""Statistics of runs that are paired by their seed."""
import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple


class Difference(NamedTuple):
    """Mean of paired differences with its 95% t interval, which one pair alone has not (NaN)."""
    n: int
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.mean:+.2f}' + (f' ({self.low:+.2f} to {self.high:+.2f})' if self.n > 1 else '')


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> Difference:
    """Differences of runs of the same seed, over the seeds that both have.

    Raises:
        ValueError: They have no seed in common.
    """
    from scipy import stats  # no dependency of the package, so not of --help either
    differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if not differences:
        raise ValueError('There is no seed that both settings were run with.')
    mean, n = statistics.fmean(differences), len(differences)
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return Difference(n, mean, mean - half, mean + half)


def mean_and_deviation(values: Mapping[int, float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over the seeds; NaN for one."""
    numbers = list(values.values())
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else math.nan


def spread(values: Mapping[int, float]) -> str:
    """Mean and standard deviation as a text."""
    mean, deviation = mean_and_deviation(values)
    return f'{mean:.2f}' + (f' ({deviation:.2f})' if len(values) > 1 else '')
