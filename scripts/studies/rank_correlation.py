"""Rank correlations of maps, and what several of them say together: estimates are (mean, low, high)."""
import math

import numpy as np

UNDEFINED = (math.nan, math.nan, math.nan)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two maps (G, H, W), the mean over G; NaN where one is constant in every group."""
    from scipy import stats  # no dependency of the package, so not of --help either
    out = []
    for x, y in zip(a.reshape(len(a), -1), b.reshape(len(b), -1)):
        if len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0:
            out.append(float(stats.spearmanr(x, y).statistic))
    return float(np.mean(out)) if out else float('nan')


def bootstrap(values: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float, float]:
    """Mean of the values that are defined, and the 95 % percentile interval of the mean over resampled images."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return UNDEFINED
    picks = np.random.default_rng(seed).integers(len(defined), size=(resamples, len(defined)))
    low, high = np.percentile(defined[picks].mean(1), (2.5, 97.5))
    return float(defined.mean()), float(low), float(high)


def over_draws(correlations: np.ndarray) -> tuple[float, float, float]:
    """Of random readouts (draws, images): mean and 95 % range of the means over images."""
    # a draw whose relu is nowhere positive gives constant maps, which have no correlation
    means = [np.mean(d[~np.isnan(d)]) for d in correlations if not np.isnan(d).all()]
    if not means:
        return UNDEFINED
    low, high = np.percentile(means, (2.5, 97.5))
    return float(np.mean(means)), float(low), float(high)
