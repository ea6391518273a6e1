"""What the tests of the operator share: its cases by name, the check against the oracle, and a call that is right."""
import pytest
import torch

from fadc_timm.ops import adaptive_dilated_conv2d, list_backends
from tests.support import cases
from tests.support.cases import CASES, INPUTS, OpCase

BACKEND_NAMES = [name for name in list_backends() if name != 'reference']
CASE = {case.name: case for case in CASES}


def ids(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix('torch.')
    return value.name if isinstance(value, OpCase) else None


def skip_unless_runs(case, inputs, backend):
    reason = cases.why_not(case, inputs, backend)
    if reason:
        pytest.skip(f'{backend}: {reason}')


def is_near(case, name, dtype, error):
    """Within the tolerance of the table, or beyond it by no more than one rounding of the steps makes."""
    tolerance = cases.tolerance(name, dtype)
    return error <= tolerance or error <= tolerance + cases.steps_rounded(case, dtype)[name]


def check(case, inputs, actual, expected, dtype, names=('out', *INPUTS)):
    errors = {name: cases.error(actual[name], expected[name]) for name in actual if name in names}
    too_large = {n: f'{e:.1e} > {cases.tolerance(n, dtype):.1e}' for n, e in errors.items()
                 if not is_near(case, n, dtype, e)}
    assert not too_large, f'{case}: {too_large}'
    for name, t in inputs.items():
        assert actual[name].dtype == t.dtype and actual[name].shape == t.shape, name


def operator(**kwargs):
    """A function that calls the operator, with right arguments but for these; what it is given itself is not read."""
    def call(*_):
        args = dict(x=torch.ones(1, 4, 6, 6), weight=torch.ones(4, 4, 3, 3), dilation=torch.ones(1, 1, 6, 6))
        adaptive_dilated_conv2d(**{**args, **kwargs})
    return call
