"""The operator's oracle: the `reference` backend against convolutions, torchvision's operator and sampling by hand."""
import pytest
import torch
import torch.nn.functional as F
import torchvision

from fadc_timm.ops import adaptive_dilated_conv2d, deform_conv2d
from tests.support import cases
from tests.support.cases import CASES, GAINS, OpCase
from tests.support.op_checks import ids

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('with_mask', [False, True], ids=['no_mask', 'ones'])
@pytest.mark.parametrize('groups, o', [(1, 6), (2, 6), (4, 4), (4, 8)])
@pytest.mark.parametrize('padding', [0, 2, (3, 1)], ids=str)
@pytest.mark.parametrize('k, stride, dilation', [
    (1, 1, 1), (1, 2, 3), (3, 1, 1), (3, 1, 2), (3, 2, 1), (3, 2, 3), (3, (1, 2), 2), (5, 1, 2), (5, 2, 1), (7, 1, 1),
    (7, 3, 1)])
def test_oracle_is_conv2d(k, stride, dilation, padding, groups, o, with_mask):
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 11, 13), (o, 4 // groups, k, k), (o,)))
    expected = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    b, _, h, w = expected.shape
    pads = (padding, padding) if isinstance(padding, int) else padding
    y = adaptive_dilated_conv2d(
        x, weight, torch.full((b, 1, h, w), float(dilation), dtype=x.dtype),
        torch.ones(b, k * k, h, w, dtype=x.dtype) if with_mask else None, bias, stride=stride,
        padding=tuple(p - k // 2 * (dilation - 1) for p in pads), groups=groups, backend='reference')
    assert cases.error(y, expected) < 1e-14


def kernel_of(case, inputs, b):
    """The kernel of a sample under the gains, number by number."""
    weight = inputs['weight']
    low_in, low_out, high_in, high_out = (
        inputs.get(name, torch.ones(case.shapes[name], dtype=torch.float64)) for name in GAINS)
    rows = []
    for o in range(case.o):
        for i in range(weight.shape[1]):
            c = o // (case.o // case.groups) * weight.shape[1] + i
            mean = weight[o, i].mean()
            rows.append(low_out[b, o] * low_in[b, c] * mean + high_out[b, o] * high_in[b, c] * (weight[o, i] - mean))
    return torch.stack(rows).view_as(weight)


@pytest.mark.parametrize('use', [*((g,) for g in GAINS), GAINS], ids='_'.join)
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_oracle_gains_make_a_kernel_for_each_sample(groups, use):
    case = OpCase(f'gains_{groups}', (3, 4, 7, 9), 8, groups=groups, use=use)
    inputs = cases.make_inputs(case, torch.float64)
    inputs['dilation'] = torch.full(case.shapes['dilation'], 2., dtype=torch.float64)
    samples = [F.conv2d(inputs['x'][b:b + 1], kernel_of(case, inputs, b), padding=2, dilation=2, groups=groups)
               for b in range(3)]
    assert cases.error(cases.call(case, inputs, 'reference'), torch.cat(samples)) < 1e-14


def torchvision_results(case, inputs):
    """The output and every gradient by torchvision's operator, sample by sample where each has a kernel of its own."""
    def conv(samples, weight):
        x, offset, mask = (None if t is None else t[samples] for t in (
            inputs['x'], inputs['offset'], inputs.get('mask')))
        padding = (case.k // 2, case.k // 2) if case.padding is None else case.padding
        return torchvision.ops.deform_conv2d(
            x, offset, weight, inputs.get('bias'), case.stride, padding, case.spacing, mask)

    if set(GAINS).isdisjoint(case.use):
        y = conv(slice(None), inputs['weight'])
    else:
        y = torch.cat([conv(slice(b, b + 1), kernel_of(case, inputs, b)) for b in range(case.x[0])])
    grads = torch.autograd.grad(y, list(inputs.values()), cases.output_gradient(case, y))
    return {'out': y.detach(), **dict(zip(inputs, grads))}


@pytest.mark.parametrize('case', [
    *(case for case in CASES if case.spacing and case.x[0]),
    *(pytest.param(cases.random_case(seed, offsets=True), marks=() if seed < 15 else pytest.mark.sweep)
      for seed in range(300))], ids=ids)
@pytest.mark.parametrize('on_grid', [False, True], ids=['', 'on_grid'])
def test_oracle_is_torchvision(case, on_grid):
    """Its output and its gradients, also the slopes that it takes on a pixel."""
    inputs = cases.make_inputs(case, torch.float64)
    if on_grid:
        with torch.no_grad():
            inputs['offset'].round_()
    expected, actual = torchvision_results(case, inputs), cases.results(case, inputs, 'reference')
    errors = {name: cases.error(actual[name], t) for name, t in expected.items()}
    assert max(errors.values()) < 1e-12, errors


def test_oracle_is_conv2d_at_offset_zero():
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 11, 13), (6, 2, 4, 4), (6,)))
    options = dict(stride=(2, 1), padding=(3, 1), dilation=(1, 2), groups=2)
    expected = F.conv2d(x, weight, bias, **options)
    y = deform_conv2d(
        x, weight, x.new_zeros(2, 32, *expected.shape[2:]), bias=bias, **options, backend='reference')
    assert cases.error(y, expected) < 1e-14


def test_oracle_samples_a_ramp():
    """Bilinear sampling of a linear function is that function: one tap at a time, at fractional positions."""
    h, w = 9, 8
    rows, cols = (t.double() for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij'))
    ramp = (3 + 2 * rows + 0.3 * cols)[None, None]
    dilation = torch.rand(1, 1, 3, 2, dtype=torch.float64) * 2
    mask = torch.rand(1, 9, 3, 2, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
            weight[0, 0, i, j] = 1
            # centres at rows 2, 4, 6 and columns 2, 5: no tap leaves the map
            y = adaptive_dilated_conv2d(
                ramp, weight, dilation, mask, stride=(2, 3), padding=(-1, -1), backend='reference')[0, 0]
            row = 2 + 2 * torch.arange(3)[:, None] + dilation[0, 0] * (i - 1)
            col = 2 + 3 * torch.arange(2) + dilation[0, 0] * (j - 1)
            assert cases.error(y, (3 + 2 * row + 0.3 * col) * mask[0, 3 * i + j]) < 1e-14
