"""Statistics of runs that are paired: by their seed, or by their seed and number of steps."""
import math
import statistics
from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

Pair = TypeVar('Pair', bound=Hashable)  # what the runs of a pair have in common


class Difference(NamedTuple):
    """Mean of paired differences with its 95% t interval, which one pair alone has not (NaN)."""
    n: int
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.mean:+.2f}' + (f' ({self.low:+.2f} to {self.high:+.2f})' if self.n > 1 else '')


def paired_difference(values: Mapping[Pair, float], base: Mapping[Pair, float]) -> Difference:
    """Differences of runs of the same key, over the keys that both have.

    Args:
        values: By seed, or by seed and number of steps.
        base: Likewise, of the setting to compare with.

    Raises:
        ValueError: They have no key in common.
    """
    from scipy import stats  # no dependency of the package, so not of --help either
    differences = [value - base[pair] for pair, value in values.items() if pair in base]
    if not differences:
        raise ValueError('There is no seed that both settings were run with, for as many steps.')
    mean, n = statistics.fmean(differences), len(differences)
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return Difference(n, mean, mean - half, mean + half)


def mean_and_deviation(values: Mapping[Pair, float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over the runs; NaN for one."""
    numbers = list(values.values())
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else math.nan


def spread(values: Mapping[Pair, float]) -> str:
    """Mean and standard deviation as a text."""
    mean, deviation = mean_and_deviation(values)
    return f'{mean:.2f}' + (f' ({deviation:.2f})' if len(values) > 1 else '')
