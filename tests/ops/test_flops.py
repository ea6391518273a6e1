"""The operator's FLOPs: those of the convolution that it stands for, in torch's counter and in fvcore's."""
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fadc_timm.ops import flops
from tests.support import cases
from tests.support.cases import GAINS
from tests.support.op_checks import BACKEND_NAMES, CASE, ids, skip_unless_runs

pytestmark = pytest.mark.usefixtures('one_thread')

FLOP_CASES = [
    CASE['plain'], CASE['mask_bias'], CASE['k7_stride2'], CASE['groups3_of_6'], CASE['dilation_groups_all'],
    CASE['depthwise_plain'], CASE['depthwise_stride2'], CASE['depthwise_multiplier_plain'], CASE['tall_map'],
    CASE['batch1'], CASE['depthwise'], CASE['gains'], CASE['offset_plain'], CASE['offset_depthwise_k7'],
    CASE['offset_gains'],
]


def convolution_flops(case):
    """Of the convolution that the operator stands for: two for a multiply-add."""
    b, c, _, _ = case.x
    return 2 * b * case.o * math.prod(case.out_size) * c // case.groups * case.k ** 2


def flops_of(function):
    with FlopCounterMode(display=False) as counter:
        y = function()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    return forward, counter.get_total_flops()


@pytest.mark.parametrize('case', FLOP_CASES, ids=ids)
@pytest.mark.parametrize('backend', BACKEND_NAMES)
def test_flops(backend, case):
    """The convolution's, and twice that backward: once for the samples, once for the weight.

    Sampling is bandwidth, and no counter counts elementwise work. Outside of depthwise convolution the gains split the
    weight in two: the mean kernel costs one more tap where the samples are added up first, and in torchvision all taps
    again. torch's formula for the backward pass of a grouped F.conv2d, which grid_sample calls, ignores the groups.
    """
    inputs = cases.make_inputs(case, torch.float32, device='meta' if backend == 'triton' else 'cpu')
    skip_unless_runs(case, inputs, backend)
    expected = convolution_flops(case)
    if not set(GAINS).isdisjoint(case.use):
        taps = case.k ** 2
        own = 0 if case.groups == case.o else 1
        more = {'torchvision': taps if case.x[0] > 1 else 0}.get(backend, own)
        expected = expected * (taps + more) // taps
    forward, backward = flops_of(lambda: cases.call(case, inputs, backend))
    assert forward == expected
    if backend != 'grid_sample' or case.groups == 1:
        assert backward == 2 * expected


class Operator(torch.nn.Module):
    def __init__(self, case, backend):
        super().__init__()
        self.case, self.backend = case, backend

    def forward(self, *inputs):
        return cases.call(self.case, dict(zip(cases.make_inputs(self.case, torch.float32), inputs)), self.backend)


@pytest.mark.parametrize('case', [c for c in FLOP_CASES if set(GAINS).isdisjoint(c.use)], ids=ids)
@pytest.mark.parametrize('backend', ['gather', 'torchvision', 'grid_sample', 'triton'])
def test_fvcore_flops(backend, case):
    """fvcore counts multiply-adds."""
    analysis = pytest.importorskip('fvcore.nn').FlopCountAnalysis(
        Operator(case, backend), tuple(cases.make_inputs(case, torch.float32).values()))
    analysis.set_op_handle(**flops.fvcore_handlers()).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = analysis.by_operator()
    counts.pop('grid_sampler', None)  # fvcore's own handler counts the sampling, which is no matter of ours
    assert sum(counts.values()) == convolution_flops(case) // 2
