"""Properties that hold for any arguments: random calls of the operator, random layers and networks, by hypothesis.

The sweep (`pytest -m sweep tests/test_properties.py`) makes the same kinds of cases, thousands instead of dozens.
"""
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fadc_timm import FADConv2d, LiftReport, lift_model
from fadc_timm.models.lift import NothingToLift, liftable_names
from fadc_timm.ops import adaptive_dilated_conv2d, list_backends, mix_bands
from tests.support import cases
from tests.support.band_cases import definition
from tests.support.cases import DTYPES, GAINS, OPTIONAL, SOURCES, OpCase
from tests.support.layer_cases import AT_START, EXACT
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')

BACKENDS = [name for name in list_backends() if name != 'reference']

# Error of the output where values are no longer random, relative to the largest sum of magnitudes: there terms may
# cancel to any small number. Beside it the largest error of 150 cases for each backend.
OF_MAGNITUDES = {
    torch.float32: 2e-7,  # 7.8e-08
    torch.float64: 2e-16,  # 7.3e-17
    torch.bfloat16: 5e-3,  # 1.7e-03
    torch.float16: 1e-3,  # 3.4e-04
}


def examples(few, many):
    """How many cases: a few in the normal run, many in the sweep. The same ones every time."""
    return pytest.mark.parametrize('number', [few, pytest.param(many, marks=pytest.mark.sweep)])


def check_all(strategy, number, body, backend=None):
    if backend == 'triton':
        number = -(-number // 20)  # its interpreter takes seconds for each
    checks = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)
    settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=checks)(
        given(strategy)(body))()


# the operator

small = st.integers(1, 12)


@st.composite
def op_cases(draw):
    groups, dilation_groups = draw(st.sampled_from([1, 1, 2, 4])), draw(st.sampled_from([1, 1, 2, 4]))
    c = math.lcm(groups, dilation_groups) * draw(st.integers(1, 3))
    o = draw(st.one_of(st.just(c), st.integers(1, 6).map(lambda n: n * groups)))
    if draw(st.integers(0, 4)) == 0:
        groups = o = c
    low = draw(st.floats(-4, 4))
    case = OpCase(
        f'hypothesis_{draw(st.integers(0, 2 ** 20))}', (draw(st.integers(8, 12)), c, draw(small), draw(small)), o,
        k=draw(st.sampled_from([1, 3, 3, 5, 7])), stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=draw(st.none() | st.tuples(st.integers(-3, 4), st.integers(-3, 4))), groups=groups,
        dilation_groups=dilation_groups, out=(draw(small), draw(small)),
        use=tuple(name for name in OPTIONAL if draw(st.booleans())), span=(low, low + draw(st.floats(1, 6))))
    if draw(st.booleans()):
        return case
    spacing, more = (draw(st.tuples(st.integers(*ends), st.integers(*ends))) for ends in ((1, 3), (0, 2)))
    return cases.with_offsets(case, draw(st.integers(1, 7)), spacing, more)


@examples(10, 700)
@pytest.mark.parametrize('backend', BACKENDS)
def test_operator_is_the_oracle(backend, number):
    """Output and every gradient, off the pixel grid."""
    def body(drawn):
        case, dtype = drawn
        inputs = cases.make_inputs(case, dtype)
        if cases.why_not(case, inputs, backend):
            return
        actual, expected = cases.results(case, inputs, backend), cases.oracle_results(case, inputs)
        for name, t in actual.items():
            assert t.isfinite().all(), name
            assert t.dtype == (inputs[name].dtype if name in inputs else dtype), name
        for name in cases.conditioned(case, inputs, expected, dtype):
            assert cases.error(actual[name], expected[name]) <= cases.tolerance(name, dtype), name
    check_all(st.tuples(op_cases(), st.sampled_from(DTYPES)), number, body, backend)


dilations = st.one_of(
    st.integers(-6, 14).map(float), st.floats(-14, 14, width=32), st.sampled_from([0.5, 1e4, -1e9, 1e30, -3e38, 1e-40]))


@examples(8, 300)
@pytest.mark.parametrize('backend', BACKENDS)
def test_operator_at_any_position(backend, number):
    """On the grid, at the border, far outside: the output is the oracle's, and no gradient is infinite."""
    def body(drawn):
        case, dtype, palette, layout = drawn
        inputs = cases.make_inputs(case, dtype)
        if cases.why_not(case, inputs, backend):
            return
        d = inputs[case.source]
        with torch.no_grad():
            d.copy_(torch.tensor(palette).to(d)[torch.arange(d.numel()) * 7 % len(palette)].view_as(d))
            inputs['x'] = inputs['x'].contiguous(memory_format=layout).requires_grad_()
        actual, expected = cases.results(case, inputs, backend), cases.oracle_results(case, inputs)
        assert all(t.isfinite().all() for t in actual.values())
        magnitudes = {name: t.detach().double() if name in SOURCES else t.detach().double().abs()
                      for name, t in inputs.items() if name not in GAINS}
        largest = cases.call(case, magnitudes, 'reference').max().item() * (12 if set(GAINS) & set(case.use) else 1)
        error = (actual['out'].double() - expected['out']).abs().max().item()
        assert error <= OF_MAGNITUDES[dtype] * largest, error / largest
    check_all(
        st.tuples(op_cases(), st.sampled_from(DTYPES), st.lists(dilations, min_size=1, max_size=5),
                  st.sampled_from([torch.contiguous_format, torch.channels_last])), number, body, backend)


# layers

@st.composite
def conv_args(draw):
    """Arguments of a convolution, and a size of map that it takes."""
    k, d, s = draw(st.sampled_from([1, 3, 3, 5, 7])), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    c = 4 * draw(st.integers(1, 2))
    o = draw(st.sampled_from([c, 4, 12]))
    if draw(st.integers(0, 3)) == 0:
        groups = o = c
    p = draw(st.integers(0, d * (k // 2) + 1))
    smallest = max(1, d * (k - 1) + 1 - 2 * p)
    args = dict(in_channels=c, out_channels=o, kernel_size=k, stride=s, padding=p, dilation=d, groups=groups,
                bias=draw(st.booleans()))
    return args, (draw(st.integers(1, 3)), c, smallest + draw(st.integers(0, 12)), smallest + draw(st.integers(0, 12)))


def own_groups(cfg):
    """Options with the groups of their sampling alone."""
    taken = {'dilation': 'dilation_groups', 'deform': 'offset_groups'}.get(cfg['sampling'])
    return {**cfg, **{name: 1 for name in ('dilation_groups', 'offset_groups') if name != taken}}


options = st.fixed_dictionaries({
    'freq_select': st.booleans(), 'sampling': st.sampled_from(['dilation', 'dilation', 'deform', 'fixed']),
    'offset_groups': st.sampled_from([1, 1, 2, 4]), 'modulated': st.booleans(),
    'kernel_decompose': st.sampled_from(['both', 'both', 'low', 'high', 'none']),
    'ada_kern_norm': st.sampled_from(['batchnorm2d', 'layernorm2d']),
    'bands': st.lists(st.integers(2, 20), min_size=1, max_size=4).map(tuple), 'lowfreq_att': st.booleans(),
    'spatial_group': st.sampled_from([1, 1, 2, 4, 65]), 'dilation_act': st.sampled_from(['abs', 'relu', 'zero']),
    'dilation_groups': st.sampled_from([1, 1, 2, 4])}).map(own_groups)


@pytest.mark.parametrize('backend', list_backends())
@examples(25, 300)
def test_layer_starts_as_its_convolution(number, backend):
    """But for eps, without any distance."""
    def body(drawn):
        (args, shape), own, training = drawn
        conv = nn.Conv2d(**args, dtype=torch.float64).train(training)
        x = torch.randn(shape, dtype=torch.float64)
        expected = conv(x)
        y = FADConv2d.from_conv(conv, **own, eps=0., backend=backend)(x)
        assert y.shape == expected.shape and y.dtype == torch.float64
        assert cases.error(y, expected) < EXACT
        if expected.numel() > 100:
            assert cases.error(FADConv2d.from_conv(conv, **own, backend=backend)(x), expected) < AT_START
    check_all(st.tuples(conv_args(), options, st.booleans()), number, body, backend)


@pytest.mark.parametrize('backend', BACKENDS)
@examples(25, 300)
def test_layer_is_the_same_on_every_backend(number, backend):
    """Away from the identity, in both paddings; all gradients are there, and finite in every precision."""
    def body(drawn):
        (args, shape), own, padding_mode, training, dtype = drawn
        m = off_identity(FADConv2d(**args, **own, padding_mode=padding_mode, dtype=torch.float64)).train(training)
        x = torch.randn(shape, dtype=torch.float64)
        state = {name: t.clone() for name, t in m.state_dict().items()}
        m.backend = 'reference'
        expected = m(x).detach()
        m.backend = backend
        m.load_state_dict(state)
        assert cases.error(m(x).detach(), expected) < EXACT
        m = m.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        y = m(leaf)
        assert y.dtype == dtype and y.isfinite().all()
        y.float().square().mean().backward()
        for name, p in [('x', leaf), *m.named_parameters()]:
            assert p.grad is not None and p.grad.isfinite().all(), name
    check_all(st.tuples(
        conv_args(), options, st.sampled_from(['zeros', 'replicate']), st.booleans(), st.sampled_from(DTYPES)),
        number, body, backend)


@examples(40, 400)
def test_band_mix_is_its_definition(number):
    """At any size and any bands, their order and repetition included."""
    def body(drawn):
        (b, c, h, w), groups, factors, lowest, seed = drawn
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(b, c * groups, h, w, generator=generator, dtype=torch.float64)
        weights = 2 * torch.rand(b, len(factors) + lowest, groups, h, w, generator=generator, dtype=torch.float64)
        expected = definition(x, weights, factors)
        scale = max(1., expected.abs().max().item())
        for form in ('fused', 'written_out'):
            assert (mix_bands(x, weights, factors, form) - expected).abs().max() < 5e-15 * scale, form
            assert (mix_bands(x.float(), weights.float(), factors, form) - expected).abs().max() < 2e-6 * scale, form
        assert torch.equal(mix_bands(x, torch.ones_like(weights), factors), x)
    shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
    check_all(st.tuples(
        shapes, st.integers(1, 3), st.lists(st.integers(1, 24), min_size=1, max_size=4), st.integers(0, 1),
        st.integers(0, 99)), number, body)


# networks

@st.composite
def networks(draw):
    """Convolutions of all kinds in a row, those that FADC leaves among them; none shrinks the map much."""
    layers, c = [], 4
    for _ in range(draw(st.integers(1, 4))):
        o = draw(st.sampled_from([4, 8]))
        if draw(st.integers(0, 4)) == 0:
            layers.append(nn.ConvTranspose2d(c, o, 2, stride=2))
        else:
            k, d = draw(st.sampled_from([1, 2, 3, 3, 5, (3, 5)])), draw(st.integers(1, 2))
            mode = draw(st.sampled_from(['zeros', 'zeros', 'replicate', 'reflect', 'circular']))
            layers.append(nn.Conv2d(c, o, k, padding=2 * d, dilation=d, padding_mode=mode,
                                    groups=draw(st.sampled_from([1, 1, 4])), bias=draw(st.booleans())))
        layers.append(draw(st.sampled_from([nn.ReLU, nn.GELU, nn.Identity]))())
        c = o
    return nn.ModuleDict({'body': nn.Sequential(*layers)}).double()


@examples(15, 200)
def test_lifted_network_is_the_network(number):
    """Whatever convolutions there are: each is replaced or left for a reason, and the function stays."""
    def body(network):
        x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
        expected = network['body'](x)
        convolutions = {name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
        try:
            report = lift_model(network, ['body'], eps=0.)
        except NothingToLift:
            report = LiftReport((), dict.fromkeys(convolutions, ''))
            assert not liftable_names(network)
        assert {*report.replaced, *report.left} == convolutions
        assert all(isinstance(network.get_submodule(name), FADConv2d) for name in report.replaced)
        assert cases.error(network['body'](x), expected) < EXACT
    check_all(networks(), number, body)


def test_wrong_results_are_found():
    """The checks above can fail: a dilation that is off by a thousandth of a pixel shows."""
    case = OpCase('control', (8, 4, 7, 9), 6)
    inputs = cases.make_inputs(case, torch.float32)
    moved = {**inputs, 'dilation': inputs['dilation'] + 1e-3}
    expected = cases.oracle_results(case, inputs)
    assert cases.error(cases.call(case, moved, 'gather').detach(), expected['out']) > cases.tolerance(
        'out', torch.float32)
    with pytest.raises(AssertionError):
        check_all(st.floats(0, 5), 40, lambda d: torch.testing.assert_close(*(adaptive_dilated_conv2d(
            torch.arange(7.).view(1, 1, 1, 7), torch.ones(1, 1, 3, 3), torch.full((1, 1, 1, 7), d + more))
            for more in (0., 1e-2))))
