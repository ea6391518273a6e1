"""Statistics of paired runs, against values computed by hand."""
import math

import pytest

from scripts.training import plots
from scripts.training.paired import mean_and_deviation, paired_difference, spread


def test_paired_difference():
    """Differences 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3, and three degrees of freedom."""
    base = {0: 10.0, 1: 20.0, 2: 5.0, 3: 7.0, 9: 1.0}
    values = {3: 13.0, 0: 11.0, 1: 22.0, 2: 8.0, 8: 100.0}
    d = paired_difference(values, base)
    half = 3.182446 * math.sqrt(14 / 3) / 2
    assert d.n == 4 and (d.mean, d.low, d.high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-6)
    assert str(d) == f'+3.00 ({3 - half:+.2f} to {3 + half:+.2f})'
    assert paired_difference({(0, 300): 2.0, (1, 40): 9.0}, {(1, 300): 5.0, (0, 300): 1.0}).n == 1
    one = paired_difference({0: 3.0}, {0: 1.0})
    assert (one.n, one.mean, str(one)) == (1, 2.0, '+2.00') and math.isnan(one.low) and math.isnan(one.high)
    with pytest.raises(ValueError, match='no seed that both'):
        paired_difference({0: 1.0}, {1: 1.0})


def test_mean_and_deviation():
    assert mean_and_deviation({0: 1.0, 1: 2.0, 2: 6.0}) == pytest.approx((3.0, math.sqrt(7)))
    mean, deviation = mean_and_deviation({4: 2.0})
    assert mean == 2 and math.isnan(deviation)
    assert spread({0: 1.0, 1: 3.0}) == '2.00 (1.41)' and spread({0: 1.0}) == '1.00'


def test_axis_of_the_plot():
    """It names what each difference is to, of those that are shown."""
    runs = {0: 1.0, 1: 2.0}
    against = {'plain': 'plain', 'fadc': 'plain', 'plain_longer': 'plain', 'fadc_longer': 'plain_longer'}
    label = 'difference to plain of the same seed, 95 % interval, points'
    assert plots.difference_label(plots.Panel('', '', {'plain': runs, 'fadc': runs}, against)) == label
    assert plots.difference_label(plots.Panel('', '', dict.fromkeys(against, runs), against)) == (
        f'{label}\nfadc_longer: to plain_longer')
    one = {**dict.fromkeys(against, runs), 'fadc_longer': {0: 1.0}}  # one pair has no interval
    assert plots.difference_label(plots.Panel('', '', one, against)) == label
