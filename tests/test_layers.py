"""The layers: each module against its definition written out in float64, and FADConv2d where an nn.Conv2d stood."""
import copy
import inspect
import itertools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from cases import error
from conftest import needs_dynamo
from torch import nn

from fadc_timm import AdaDR, AdaKern, FADConv2d, FreqSelect
from fadc_timm.layers.fad_conv import OPTIONS
from fadc_timm.layers.few_outputs import convolve
from fadc_timm.ops import adaptive_dilated_conv2d

SIZES = [(1, 1), (1, 7), (2, 3), (4, 4), (8, 8), (9, 16), (33, 40), (5, 70)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
EXACT = 1e-12  # float64 against float64
AT_START = 1e-4  # of a layer against its convolution, AdaDR's eps of 1e-5: 5e-5


pytestmark = pytest.mark.usefixtures('one_thread')


def ids(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix('torch.')
    if isinstance(value, dict):
        return ','.join(f'{k}={v}' for k, v in value.items()) or 'default'
    return None


def off_identity(module, std=1.0):
    """Random values for all that FADC adds, so that bands, gains, dilations and masks are in play."""
    own = ('weight', 'bias') if isinstance(module, FADConv2d) else ()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name not in own:
                p.add_(torch.randn_like(p) * std / p[0].numel() ** 0.5)
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(std=0.2)
                m.running_var.uniform_(0.2, 0.5)
    return module


def grads(y, inputs):
    """Gradients of a fixed random projection of y."""
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return torch.autograd.grad((y * cotangent).sum(), list(inputs), allow_unused=True)


def assert_same(actual, expected, tolerance):
    """Tensors (or None) pairwise: the same shapes, and all together within the relative error."""
    assert [None if t is None else t.shape for t in actual] == [None if t is None else t.shape for t in expected]
    actual, expected = (torch.cat([t.detach().flatten() for t in ts if t is not None]) for ts in (actual, expected))
    assert error(actual, expected) <= tolerance


# definitions, written out


def oracle_freq_select(m, x):
    """Masks in the shifted complex spectrum, band differences, a weight map for each band, as in the released code."""
    b, c, h, w = x.shape
    groups, maps = m.spatial_group, len(m.bands) + m.lowfreq_att
    weights = 2 * torch.sigmoid(F.conv2d(x, m.conv.weight, m.conv.bias, padding=1, groups=groups))
    weights = weights.reshape(b, groups, maps, h, w).repeat_interleave(c // groups, dim=1)
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(2, 3))
    above, y = x, 0
    for i, f in enumerate(m.bands):
        mask = torch.zeros(h, w, dtype=x.dtype)
        mask[round(h / 2 - h / (2 * f)):round(h / 2 + h / (2 * f)),
             round(w / 2 - w / (2 * f)):round(w / 2 + w / (2 * f))] = 1
        low = torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(2, 3))).real
        y = y + (above - low) * weights[:, :, i]
        above = low
    return y + (above * weights[:, :, -1] if m.lowfreq_att else above)


def oracle_ada_kern(m, x):
    """A trunk and two heads for each part; in training with more than one sample the batch's statistics."""
    pooled = x.flatten(2).mean(2)
    width = m.fc.weight.shape[0] // m.parts
    parts = []
    for i in range(m.parts):
        rows = slice(i * width, (i + 1) * width)
        t = pooled @ m.fc.weight[rows].T
        mean, var = m.norm.running_mean[rows], m.norm.running_var[rows]
        if m.training and len(x) > 1:
            mean, var = t.mean(0), t.var(0, unbiased=False)
        t = ((t - mean) / (var + m.norm.eps).sqrt() * m.norm.weight[rows] + m.norm.bias[rows]).relu()
        head = {'both': (m.low, m.high), 'low': (m.low,), 'high': (m.high,)}[m.kernel_decompose][i]
        gains = 2 * torch.sigmoid(t @ head.weight.T + head.bias)
        parts.append((gains[:, :m.in_channels], None if m.depthwise else gains[:, m.in_channels:]))
    none = ((None, None),)
    return sum({'both': parts, 'low': (*parts, *none), 'high': (*none, *parts)}[m.kernel_decompose], ())


def oracle_ada_dr(m, x, padding):
    d, g, stride = m.dilation, m.dilation_groups, m.conv.stride
    x = F.pad(x, [padding] * 4)
    o = F.conv2d(x, m.conv.weight[:g], m.conv.bias[:g], stride)
    dilation = {
        'abs': lambda: 1 + o.abs() * d, 'relu': lambda: 1 + o.relu() * d, 'zero': lambda: 1 + ((o + 1).relu() - 1) * d,
    }[m.dilation_act]()
    if m.depthwise:
        mask = F.conv2d(x, m.mask_dw.weight, None, stride, groups=x.shape[1])
        mask = F.conv2d(mask, m.mask_pw.weight, m.mask_pw.bias)
    else:
        mask = F.conv2d(x, m.conv.weight[g:], m.conv.bias[g:], stride)
    return dilation, 2 * torch.sigmoid(mask)


def oracle_fad_conv(m, x):
    """FreqSelect, AdaKern before any padding, replication, AdaDR, the operator's own oracle."""
    if m.freq_select is not None:
        x = oracle_freq_select(m.freq_select, x)
    gains = oracle_ada_kern(m.ada_kern, x) if m.ada_kern is not None else None
    r, d = m.kernel_size[0] // 2, m.dilation[0]
    padding = {'same': r * d, 'valid': 0}[m.padding] if isinstance(m.padding, str) else m.padding[0]
    padding -= r * (d - 1)
    if m.padding_mode == 'replicate' and padding > 0:
        x, padding = F.pad(x, [padding] * 4, mode='replicate'), 0
    if m.ada_dr is not None:
        dilation, mask = oracle_ada_dr(m.ada_dr, x, padding)
    else:
        h, w = ((n + 2 * padding - 2 * r - 1) // m.stride[0] + 1 for n in x.shape[2:])
        dilation, mask = torch.full((len(x), 1, h, w), float(d), dtype=x.dtype), None
    return adaptive_dilated_conv2d(
        x, m.weight, dilation, mask, m.bias, gains=gains, stride=m.stride[0], padding=padding, groups=m.groups,
        backend='reference')


# FreqSelect

FREQ_SELECT = [
    dict(), dict(lowfreq_att=True), dict(spatial_group=2), dict(spatial_group=65, lowfreq_att=True),
    dict(bands=(2,)), dict(bands=(3, 5, 7, 9)), dict(bands=[2, 16])]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('cfg', FREQ_SELECT, ids=ids)
def test_freq_select(cfg, size):
    m = off_identity(FreqSelect(4, **cfg, dtype=torch.float64))
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    inputs = [x, *m.parameters()]
    y, expected = m(x), oracle_freq_select(m, x)
    assert min(size) < 8 or error(y, x) > 0.1  # no identity any more, but for maps that are all low frequency
    assert_same((y, *grads(y, inputs)), (expected, *grads(expected, inputs)), EXACT)  # 3e-15


@pytest.mark.parametrize('dtype', DTYPES, ids=ids)
def test_freq_select_is_the_identity_at_start(dtype):
    for size, lowfreq_att in itertools.product(SIZES, (False, True)):
        x = torch.randn(2, 4, *size).to(dtype)
        assert torch.equal(FreqSelect(4, lowfreq_att=lowfreq_att, dtype=dtype)(x), x)


def test_freq_select_band_weights():
    m = off_identity(FreqSelect(4, (2, 4), True, spatial_group=2))
    x = torch.randn(3, 4, 9, 7) * 3
    weights = m.band_weights(x)
    assert weights.shape == (3, 3, 2, 9, 7)
    assert weights.min() >= 0 and weights.max() <= 2 and weights.std() > 0.3
    group = slice(2, 4)  # the second group of channels has its own maps, from its own channels
    conv = F.conv2d(x[:, group], m.conv.weight[3:], m.conv.bias[3:], padding=1)
    assert error(weights[:, :, 1], 2 * torch.sigmoid(conv)) < 1e-6  # 3e-8


# AdaKern


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('depthwise', [False, True])
@pytest.mark.parametrize('kernel_decompose', ['both', 'low', 'high'])
def test_ada_kern(kernel_decompose, depthwise, batch, training):
    out_channels = 6 if depthwise else 10
    m = AdaKern(6, out_channels, kernel_decompose, depthwise, min_channels=4, dtype=torch.float64)
    m = off_identity(m, 2.).train(training)
    x = torch.randn(batch, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *m.parameters()]
    expected = oracle_ada_kern(m, x)
    gains = m(x)
    given = {'both': 4, 'low': 2, 'high': 2}[kernel_decompose] // (1 + depthwise)
    assert sum(g is not None for g in gains) == given
    assert_same(gains, expected, EXACT)  # 2e-15
    y, expected = (torch.cat([g for g in gains if g is not None], 1) for gains in (gains, expected))
    assert y.min() >= 0 and y.max() <= 2 and y.std() > 0.3
    # without a second sample the batch has no variance
    assert_same(grads(y, inputs), grads(expected, inputs), EXACT)  # 7e-15


def test_ada_kern_gains_at_start_and_at_the_ends():
    m = AdaKern(4, 6)
    x = torch.randn(3, 4, 5, 5)
    assert all(torch.equal(g, torch.ones(3, n)) for g, n in zip(m(x), (4, 6, 4, 6)))
    for bias, gain in ((30., 2.), (-30., 0.)):
        nn.init.constant_(m.low.bias, bias)
        nn.init.constant_(m.high.bias, bias)
        assert all((g - gain).abs().max() < 1e-6 for g in m(x))  # 2e-13


def test_ada_kern_width():
    assert AdaKern(8, 8).fc.out_features == 2 * 16  # not fewer than 16 for each part
    assert AdaKern(512, 8).fc.out_features == 2 * 32
    assert AdaKern(512, 8, 'low').fc.out_features == 32
    assert AdaKern(512, 8, reduction=8, min_channels=100).fc.out_features == 2 * 100


# AdaDR


@pytest.mark.parametrize('cfg', [
    dict(), dict(kernel_size=5, dilation_groups=2), dict(stride=2), dict(kernel_size=7, stride=2, padding=1),
    dict(padding=0), dict(padding=-1), dict(padding=-2, dilation=3, dilation_groups=3), dict(kernel_size=1, dilation=2),
    dict(depthwise=True), dict(depthwise=True, kernel_size=5, padding=-1, dilation_groups=2, stride=2)], ids=ids)
@pytest.mark.parametrize('dilation_act', ['abs', 'relu', 'zero'])
def test_ada_dr(dilation_act, cfg):
    m = off_identity(AdaDR(6, dilation_act=dilation_act, **cfg, dtype=torch.float64))
    x = torch.randn(2, 6, 11, 9, dtype=torch.float64, requires_grad=True)
    k, g = cfg.get('kernel_size', 3), cfg.get('dilation_groups', 1)
    dilation, mask = m(x)
    expected = oracle_ada_dr(m, x, cfg.get('padding', k // 2))
    assert dilation.shape == expected[0].shape and mask.shape[1] == g * k * k
    inputs = [x, *m.parameters()]
    y, y_expected = torch.cat((dilation, mask), 1), torch.cat(expected, 1)
    assert_same((dilation, mask, *grads(y, inputs)), (*expected, *grads(y_expected, inputs)), EXACT)  # 2e-15


@pytest.mark.parametrize('depthwise', [False, True])
@pytest.mark.parametrize('dilation_act', ['abs', 'relu', 'zero'])
@pytest.mark.parametrize('d', [1, 2, 4])
def test_ada_dr_at_start(d, dilation_act, depthwise):
    m = AdaDR(4, dilation=d, dilation_act=dilation_act, depthwise=depthwise, eps=0.)
    x = torch.randn(2, 4, 7, 6)
    dilation, mask = m(x)
    assert torch.equal(mask, torch.ones(2, 9, 7, 6))
    assert torch.equal(dilation, torch.full((2, 1, 7, 6), float(d)))
    dilation.sum().backward()
    assert m.conv.weight.grad[0].abs().min() > 0  # |o| and relu(o) have a gradient at zero
    for eps in (1e-5, 0.01):
        m = AdaDR(4, dilation=d, dilation_act=dilation_act, depthwise=depthwise, eps=eps)
        assert (m(x)[0] - (d + eps)).abs().max() < 1e-6  # 2e-7


@pytest.mark.parametrize('dilation_act, lowest', [('abs', 1.), ('relu', 1.), ('zero', -1.)])
def test_ada_dr_range(dilation_act, lowest):
    """Where the dilation ends: with 'zero' at 1 - d."""
    m = off_identity(AdaDR(4, dilation=2, dilation_act=dilation_act), 5.)
    dilation = m(torch.randn(2, 4, 16, 16))[0]
    assert lowest <= dilation.min() < lowest + 0.1 and dilation.max() > 5
    if dilation_act != 'abs':
        assert (dilation == lowest).float().mean() > 0.2


# each module alone, on any map in any dtype

MODULES = {
    'FreqSelect': lambda **dd: FreqSelect(4, lowfreq_att=True, **dd),
    'AdaKern': lambda **dd: AdaKern(4, 6, **dd),
    'AdaKern_depthwise': lambda **dd: AdaKern(4, 4, depthwise=True, **dd),
    'AdaDR': lambda **dd: AdaDR(4, 3, **dd),
    'AdaDR_depthwise': lambda **dd: AdaDR(4, 7, depthwise=True, **dd),
    'FADConv2d': lambda **dd: FADConv2d(4, 6, 3, padding=1, **dd),
    'FADConv2d_depthwise': lambda **dd: FADConv2d(4, 4, 7, padding=3, groups=4, **dd),
    'FADConv2d_replicate': lambda **dd: FADConv2d(4, 6, 5, 2, 2, padding_mode='replicate', **dd),
}
# Relative error against float64 on the same rounded parameters and input; the largest of all modules and sizes.
ROUNDING = {
    torch.float32: 3e-6,  # 1.5e-6
    torch.bfloat16: 0.02,  # 0.011
    torch.float16: 3e-3,  # 1.5e-3
    torch.float64: EXACT,  # 0
}


def as_tuple(y):
    return tuple(t for t in y if t is not None) if isinstance(y, tuple) else (y,)


@pytest.mark.parametrize('dtype', DTYPES, ids=ids)
@pytest.mark.parametrize('name', MODULES)
def test_any_map(name, dtype):
    m = off_identity(MODULES[name](), 0.5).eval().to(dtype)
    exact = copy.deepcopy(m).double()
    for size, memory_format in itertools.product(SIZES, (torch.contiguous_format, torch.channels_last)):
        x = torch.randn(2, 4, *size).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        y, expected = as_tuple(m(x)), as_tuple(exact(x.double()))
        for a, e in zip(y, expected, strict=True):
            # positions are too fine for half dtypes
            assert a.dtype == (torch.float32 if dtype in HALF and 'AdaDR' in name and a is y[0] else dtype)
            assert error(a, e) < ROUNDING[dtype], (size, memory_format)
        for g in torch.autograd.grad(sum(t.float().sum() for t in y), [x, *m.parameters()], allow_unused=True):
            assert g is None or g.isfinite().all(), (size, memory_format)


# FADConv2d against the definition

FAD_CONV = [
    dict(),
    dict(padding=1),
    dict(padding=2, stride=2, bias=False, dilation_groups=2),
    dict(kernel_size=5, padding='same', dilation_act='relu'),
    dict(kernel_size=7, padding=3, groups=4, out_channels=4, spatial_group=2),  # depthwise
    dict(padding=1, groups=4, out_channels=8),  # depthwise with a multiplier
    dict(padding='same', dilation=2, groups=2, dilation_act='zero', kernel_decompose='low', lowfreq_att=True),
    dict(padding=1, dilation=3, kernel_decompose='high', bands=(2, 3)),  # crops
    dict(kernel_size=1, kernel_decompose='low'),
    dict(padding=1, padding_mode='replicate'),
    dict(padding='same', dilation=2, padding_mode='replicate', stride=1),
    dict(kernel_size=5, padding=4, dilation=2, padding_mode='replicate', stride=2, groups=4, out_channels=4),
    dict(padding=1, dilation=2, padding_mode='replicate'),  # nothing left to replicate
    dict(padding=1, freq_select=False),
    dict(padding=2, dilation=2, kernel_decompose='none'),
    dict(padding=2, dilation=2, stride=2, ada_dr=False),
    dict(padding=2, dilation=2, ada_dr=False, bias=False, groups=4, out_channels=4, kernel_decompose='low'),
    dict(padding='same', dilation=2, ada_dr=False, padding_mode='replicate'),
    dict(padding='same', dilation=2, ada_dr=False, kernel_decompose='none', padding_mode='replicate'),
]


def make(out_channels=6, kernel_size=3, **cfg):
    return FADConv2d(4, out_channels, kernel_size, **cfg)


@pytest.mark.parametrize('batch, training', [(2, False), (2, True), (1, True)])
@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_fad_conv(cfg, batch, training):
    m = off_identity(make(**cfg, dtype=torch.float64)).train(training)
    x = torch.randn(batch, 4, 10, 9, dtype=torch.float64, requires_grad=True)
    inputs = [x, *m.parameters()]
    y, expected = m(x), oracle_fad_conv(m, x)
    assert_same((y,), (expected,), EXACT)  # 2e-15
    actual_grads, expected_grads = grads(y, inputs), grads(expected, inputs)
    unused = [name for (name, _), g in zip([('x', None), *m.named_parameters()], expected_grads) if g is None]
    assert not unused
    assert_same(actual_grads, expected_grads, EXACT)  # 4e-15


def test_replicate_is_padding_by_hand():
    """Replicated for the padding at dilation 1, and zeros beyond, where large dilations reach."""
    cfg = dict(padding=1, freq_select=False, kernel_decompose='none')
    m = off_identity(make(**cfg, padding_mode='replicate'))
    inner = copy.deepcopy(m)
    inner.padding_mode, inner.padding, inner.inner_padding, inner.pads_itself = 'zeros', (0, 0), 0, False
    x = torch.randn(2, 4, 7, 8)
    padded = F.pad(x, (1, 1, 1, 1), mode='replicate')
    assert m.ada_dr(padded)[0].max() > 3  # beyond the replicated pixel
    assert torch.equal(m(x), inner(padded))
    zeros = make(**cfg)
    zeros.load_state_dict(m.state_dict())
    assert error(m(x), zeros(x)) > 0.1


@pytest.mark.parametrize('kernel_decompose', ['both', 'low', 'high', 'none'])
@pytest.mark.parametrize('padding_mode', ['zeros', 'replicate'])
def test_without_ada_dr_is_ada_dr_at_start(padding_mode, kernel_decompose):
    """The dilation of either is the base dilation, whatever else is on."""
    cfg = dict(padding=2, dilation=2, padding_mode=padding_mode, kernel_decompose=kernel_decompose, stride=2)
    without = off_identity(make(**cfg, ada_dr=False))
    m = make(**cfg, eps=0.)
    assert [k for k in m.load_state_dict(without.state_dict(), strict=False).missing_keys if 'ada_dr' not in k] == []
    x = torch.randn(2, 4, 10, 9)
    assert error(without(x), m(x)) < 1e-6  # 1.0e-7


# the identity at start

CONVS = [
    *(dict(kernel_size=k, padding=d * (k // 2), dilation=d) for k in (3, 5, 7) for d in (1, 2, 3, 4)),
    *(dict(kernel_size=k, padding='same', dilation=d, groups=8) for k in (3, 5, 7) for d in (1, 2)),
    *(dict(kernel_size=3, padding=p, stride=s, dilation=d) for p in (0, 1, 2, 5) for s in (1, 2, 3) for d in (1, 4)),
    dict(kernel_size=5, padding='valid', dilation=2, groups=4), dict(kernel_size=7, padding=3, groups=8, stride=2),
    dict(kernel_size=3, padding=1, groups=2, bias=False),
    dict(kernel_size=3, padding=4, dilation=4, groups=8, bias=False),
    dict(kernel_size=1), dict(kernel_size=1, stride=2, padding=1),
]


def plain_conv(cfg, dtype=torch.float32):
    return nn.Conv2d(8, 8, **cfg, dtype=dtype)


@pytest.mark.parametrize('cfg', CONVS, ids=ids)
def test_identity_at_start(cfg):
    conv = plain_conv(cfg)
    x = torch.randn(2, 8, 19, 18)
    expected = conv(x)
    for training in (False, True):
        m = FADConv2d.from_conv(conv.train(training))
        assert m.training == training
        y = m(x)
        assert y.shape == expected.shape
        assert error(y, expected) < AT_START
    assert error(FADConv2d.from_conv(conv, eps=0.)(x), expected) < 2e-6  # 4.7e-7


@pytest.mark.parametrize('options', [
    dict(kernel_decompose='low'), dict(kernel_decompose='none'), dict(freq_select=False), dict(ada_dr=False),
    dict(dilation_act='relu'), dict(dilation_act='zero'), dict(dilation_groups=4),
    dict(lowfreq_att=True, spatial_group=8), dict(bands=(2, 3, 4, 5)),
    dict(backend='grid_sample'), dict(backend='torchvision')], ids=ids)
def test_identity_at_start_with_options(options):
    x = torch.randn(2, 8, 19, 18)
    for cfg in CONVS[1], CONVS[12], CONVS[-3]:
        conv = plain_conv(cfg)
        assert error(FADConv2d.from_conv(conv, **options)(x), conv(x)) < AT_START
        assert error(FADConv2d.from_conv(conv, eps=0., **options)(x), conv(x)) < 2e-6  # 4.1e-7


@pytest.mark.parametrize('cfg', [CONVS[0], CONVS[6], CONVS[12], CONVS[-4]], ids=ids)
def test_distance_from_the_identity_is_eps(cfg):
    """Proportional to eps, and nothing else: in float64 there is none without it."""
    conv = plain_conv(cfg, torch.float64)
    x = torch.randn(2, 8, 19, 18, dtype=torch.float64)
    expected = conv(x)
    per_eps = [error(FADConv2d.from_conv(conv, eps=eps)(x), expected) / eps for eps in (1e-3, 1e-4, 1e-6, 1e-9)]
    assert all(1 < e < 10 for e in per_eps)
    assert all(abs(e / per_eps[0] - 1) < 0.002 for e in per_eps)  # 8e-4
    assert error(FADConv2d.from_conv(conv, eps=0.)(x), expected) < EXACT  # 5e-16


@pytest.mark.parametrize('cfg', CONVS, ids=ids)
def test_output_size(cfg):
    """As the plain convolution on every size, and an error where that has one."""
    conv = plain_conv(cfg)
    m, replicate = FADConv2d.from_conv(conv), FADConv2d.from_conv(conv, padding_mode='replicate')
    for size in itertools.product((1, 2, 5, 8, 13), (3, 9, 12)):
        x = torch.randn(1, 8, *size)
        try:
            shape = conv(x).shape
        except RuntimeError:
            with pytest.raises((RuntimeError, ValueError)):
                m(x)
            continue
        assert m(x).shape == replicate(x).shape == shape


# from_conv


def test_from_conv_takes_the_convolution_over():
    conv = nn.Conv2d(8, 4, (3, 3), (2, 2), (1, 1), groups=2, dtype=torch.float64).eval()
    conv.weight.requires_grad_(False)
    m = FADConv2d.from_conv(conv, kernel_decompose='low', bands=[2, 4])
    assert m.weight is conv.weight and m.bias is conv.bias
    assert not m.weight.requires_grad and m.bias.requires_grad
    assert all(p.requires_grad for name, p in m.named_parameters() if name != 'weight')
    assert not any(module.training for module in m.modules())
    assert {p.dtype for p in m.parameters()} == {torch.float64}
    assert (m.kernel_size, m.stride, m.padding, m.dilation, m.groups) == ((3, 3), (2, 2), (1, 1), (1, 1), 2)
    assert m.ada_kern.kernel_decompose == 'low' and m.freq_select.bands == (2, 4)
    assert set(conv.state_dict()) < set(m.state_dict())
    assert isinstance(m, nn.Conv2d)
    no_bias = FADConv2d.from_conv(nn.Conv2d(4, 4, 3, bias=False))
    assert no_bias.bias is None and no_bias.training
    assert {p.device.type for p in FADConv2d.from_conv(nn.Conv2d(4, 4, 3, device='meta')).parameters()} == {'meta'}


class Conv2dSubclass(nn.Conv2d):
    pass


@pytest.mark.parametrize('conv, cfg, exception, message', [
    (Conv2dSubclass(4, 4, 3), {}, TypeError, 'test_layers.Conv2dSubclass'),
    (nn.Conv1d(4, 4, 3), {}, TypeError, 'Conv1d'),
    (nn.LazyConv2d(4, 3), {}, TypeError, 'LazyConv2d'),
    (FADConv2d(4, 4, 3), {}, TypeError, 'FADConv2d'),
    (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), {}, TypeError, 'ParametrizedConv2d'),
    (nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), {}, ValueError, 'hooks'),
    (nn.Conv2d(4, 4, (3, 5)), {}, ValueError, r'kernel_size .*\(3, 5\)'),
    (nn.Conv2d(4, 4, 4), {}, ValueError, r'kernel_size .*4'),
    (nn.Conv2d(4, 4, 3, (1, 2)), {}, ValueError, r'stride .*\(1, 2\)'),
    (nn.Conv2d(4, 4, 3, padding=(0, 1)), {}, ValueError, r'padding .*\(0, 1\)'),
    (nn.Conv2d(4, 4, 3, dilation=(1, 2)), {}, ValueError, r'dilation .*\(1, 2\)'),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), {}, ValueError, "padding_mode .*'reflect'"),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode='circular'), {}, ValueError, "padding_mode .*'circular'"),
    # a convolution that replicates more than FADC does: not the same function
    (nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode='replicate'), {}, ValueError, 'padding_mode'),
    (nn.Conv2d(4, 4, 3), {'no_such': 1}, TypeError, 'no_such'),
], ids=str)
def test_from_conv_refuses(conv, cfg, exception, message):
    with pytest.raises(exception, match=message):
        FADConv2d.from_conv(conv, **cfg)


@pytest.mark.parametrize('padding', [0, 1, 2])
def test_from_conv_of_a_replicating_convolution(padding):
    conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode='replicate')
    x = torch.randn(2, 4, 9, 8)
    m = FADConv2d.from_conv(conv, eps=0.)
    assert m.padding_mode == 'replicate'
    assert error(m(x), conv(x)) < 1e-6  # 1.5e-7
    assert FADConv2d.from_conv(conv, padding_mode='zeros').padding_mode == 'zeros'


BAD = [
    (dict(kernel_size=2), ValueError, 'kernel_size.*2'),
    (dict(kernel_size=0), ValueError, 'kernel_size.*0'),
    (dict(kernel_size=(3, 5)), ValueError, 'kernel_size'),
    (dict(kernel_size=3.), ValueError, 'kernel_size'),
    (dict(kernel_size=None), ValueError, 'kernel_size'),
    (dict(stride=(1, 2)), ValueError, 'stride'),
    (dict(stride=0), ValueError, 'stride.*0'),
    (dict(dilation=0), ValueError, 'dilation.*0'),
    (dict(dilation=True), ValueError, 'dilation.*True'),
    (dict(padding=(1, 2)), ValueError, 'padding'),
    (dict(padding=-1), ValueError, 'padding.*-1'),
    (dict(padding='full'), ValueError, 'padding.*full'),
    (dict(padding='same', stride=2), ValueError, 'padding|stride'),
    (dict(groups=3), ValueError, 'groups'),
    (dict(padding_mode='reflect'), ValueError, 'padding_mode.*reflect'),
    (dict(kernel_decompose='no'), ValueError, "kernel_decompose.*'no'"),
    (dict(kernel_decompose=None), ValueError, 'kernel_decompose.*None'),
    (dict(dilation_act='gelu'), ValueError, 'dilation_act.*gelu'),
    (dict(dilation_groups=3), ValueError, 'dilation_groups=3'),
    (dict(dilation_groups=0), ValueError, 'dilation_groups=0'),
    (dict(spatial_group=3), ValueError, 'spatial_group=3'),
    (dict(spatial_group=0), ValueError, 'spatial_group=0'),
    (dict(bands=()), ValueError, 'bands'),
    (dict(bands=(2, 1)), ValueError, r'bands.*\(2, 1\)'),
    (dict(bands=(2, 4.)), ValueError, r'bands.*4\.0'),
    (dict(bands=(True, 2)), ValueError, 'bands.*True'),
    (dict(bands=4), ValueError, 'bands.*4'),
    (dict(eps=-1e-4), ValueError, 'eps.*-0.0001'),
    (dict(backend='no_such'), ValueError, "backend.*'no_such'"),
]


@pytest.mark.parametrize('cfg, exception, message', BAD, ids=ids)
def test_bad_arguments(cfg, exception, message):
    with pytest.raises(exception, match=message):
        FADConv2d(**{**dict(in_channels=4, out_channels=4, kernel_size=3), **cfg})


@pytest.mark.parametrize('make_module', [
    lambda: AdaKern(4, 4, 'none'), lambda: AdaDR(4, dilation_act='gelu'), lambda: FreqSelect(4, (0,)),
    lambda: FreqSelect(4, spatial_group=3)])
def test_bad_arguments_of_the_modules(make_module):
    with pytest.raises(ValueError, match='kernel_decompose|dilation_act|bands|spatial_group'):
        make_module()


@pytest.mark.parametrize('shape', [(4, 8, 8), (1, 3, 8, 8), (1, 4, 8, 8, 8)], ids=str)
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r'\(B, 4, H, W\).*\[' + ', '.join(map(str, shape))):
        FADConv2d(4, 4, 3)(torch.zeros(shape))


def test_options_are_arguments():
    """What models pass on: every argument beyond nn.Conv2d's, and padding_mode."""
    ours, plain = (set(inspect.signature(c.__init__).parameters) for c in (FADConv2d, nn.Conv2d))
    assert set(OPTIONS) == ours - plain | {'padding_mode'}


# training


@pytest.mark.parametrize('sync', [False, True])
def test_batch_1_trains(sync):
    """On the running statistics, which stay as they are; with two samples on the batch's, which move them."""
    m = off_identity(FADConv2d(4, 6, 3, padding=1))
    m = nn.SyncBatchNorm.convert_sync_batchnorm(m) if sync else m
    norm = m.ada_kern.norm
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(1, 4, 8, 7)
    y = m.train()(x)
    assert torch.equal(y, copy.deepcopy(m).eval()(x))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.norm() > 0 for p in m.parameters())
    assert all(torch.equal(t, before[name]) for name, t in norm.state_dict().items())
    two = torch.randn(2, 4, 8, 7)
    assert error(m(two), copy.deepcopy(m).eval()(two)) > 1e-3
    assert not any(torch.equal(t, before[name]) for name, t in norm.state_dict().items() if 'running' in name)
    assert norm.num_batches_tracked == before['num_batches_tracked'] + 1


@pytest.mark.parametrize('depthwise', [False, True])
def test_leaves_the_identity(depthwise):
    """From the start, gradients reach everything but what is behind a zero head; after one step, everything."""
    m = FADConv2d(4, 4, 3, padding=1, groups=4 if depthwise else 1)
    behind_zero = {'ada_kern.fc.weight', 'ada_kern.norm.weight', 'ada_kern.norm.bias', 'ada_dr.mask_dw.weight'}
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    x = torch.randn(4, 4, 12, 12)
    for expected in (behind_zero & {n for n, _ in m.named_parameters()}, set()):
        optimizer.zero_grad()
        m(x).square().mean().backward()
        assert {n for n, p in m.named_parameters() if p.grad is None or p.grad.norm() == 0} == expected
        optimizer.step()


def test_reset_fadc_parameters():
    m = off_identity(FADConv2d(4, 6, 3, padding=1, groups=2, eps=0.))
    x = torch.randn(2, 4, 8, 7)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    conv.load_state_dict({k: m.state_dict()[k] for k in ('weight', 'bias')})
    assert error(m.eval()(x), conv(x)) > 0.1
    m.reset_fadc_parameters()
    assert error(m(x), conv(x)) < 1e-6  # 1.0e-7
    assert m.ada_kern.norm.running_mean.abs().max() == 0


# dtypes, autocast, layouts


@pytest.mark.parametrize('dtype', HALF, ids=ids)
@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_autocast(cfg, dtype):
    m = off_identity(make(**cfg), 0.5)
    conv = nn.Conv2d(4, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.bias is not None)
    for size in ((10, 9), (40, 36)):
        x = torch.randn(4, 4, *size)
        expected = m(x)
        with torch.autocast('cpu', dtype):
            y, plain = m(x), conv(x)
        assert y.dtype == plain.dtype == dtype and y.shape == expected.shape
        # a plain convolution has 2.9e-3 in bfloat16 and 3.6e-4 in float16, and five of them follow each other here
        assert error(y, expected) < 8 * error(plain, conv(x))  # 5.3 in both
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads(y.float(), m.parameters()))


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_layout(cfg, memory_format):
    """Layout in = layout out, and the same values."""
    m = off_identity(make(**cfg))
    x = torch.randn(2, 4, 10, 9)
    expected = m(x)
    m = m.to(memory_format=memory_format)
    y = m(x.contiguous(memory_format=memory_format))
    assert y.is_contiguous(memory_format=memory_format)
    assert error(y, expected) < 2e-6  # 1.1e-6
    x = torch.randn(9, 10, 8, 2).permute(3, 2, 1, 0)[:, ::2]  # dense in no layout
    assert error(m(x), m(x.contiguous())) < 2e-6  # 3.5e-7


@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_meta(cfg):
    m = make(**cfg, device='meta', dtype=torch.bfloat16)
    assert {t.device.type for t in m.state_dict().values()} == {'meta'}
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    x = torch.zeros(2, 4, 10, 9, device='meta', dtype=torch.bfloat16)
    real = make(**cfg)
    y = m(x)
    assert y.shape == real(torch.zeros(2, 4, 10, 9)).shape and y.dtype == torch.bfloat16
    m = m.to_empty(device='cpu')
    m.load_state_dict(real.to(torch.bfloat16).state_dict())
    x = torch.randn(2, 4, 10, 9).bfloat16()
    assert torch.equal(m.eval()(x), real.eval()(x))


# copies, formats, compilers


def test_state_dict():
    """Plain keys for the plain convolution, no buffers but the norm's."""
    m = FADConv2d(4, 6, 3)
    assert {n for n, _ in m.named_buffers()} == {
        f'ada_kern.norm.{n}' for n in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert set(m.state_dict()) == {n for n, _ in m.named_buffers()} | {n for n, _ in m.named_parameters()}
    assert {n.partition('.')[0] for n in m.state_dict()} == {'weight', 'bias', 'freq_select', 'ada_kern', 'ada_dr'}
    bare = FADConv2d(4, 6, 3, freq_select=False, kernel_decompose='none', ada_dr=False)
    assert set(bare.state_dict()) == {'weight', 'bias'}


@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_copies(cfg):
    m = off_identity(make(**cfg)).eval()
    x = torch.randn(2, 4, 10, 9)
    expected = m(x)
    loaded = make(**cfg).eval()
    loaded.load_state_dict(m.state_dict())
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), loaded):
        assert torch.equal(copied(x), expected)
        assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in m.parameters()}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_script(cfg, dtype):
    m = off_identity(make(**cfg, dtype=dtype)).eval()
    scripted = torch.jit.script(m)
    for shape in ((2, 4, 10, 9), (1, 4, 37, 33)):
        x = torch.randn(shape, dtype=dtype)
        assert error(scripted(x), m(x)) < (2e-6 if dtype == torch.float32 else EXACT)  # 6.5e-7, 1.9e-15


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('k, padding', [(1, 0), (3, 1), (3, 0), (3, 2), (3, 4), (5, 3), (7, 3), ((3, 5), (0, 4))])
@pytest.mark.parametrize('outputs', [1, 4, 5])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_few_outputs(layout, outputs, k, padding, bias):
    """The convolution, whatever way it is computed, and its gradients."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, outputs, k, padding=padding, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    y, expected = convolve(conv, x), conv(x)
    assert y.shape == expected.shape and error(y, expected) < 1e-13
    grad = torch.randn_like(y)
    for g, e in zip(*(torch.autograd.grad(t, [x, *conv.parameters()], grad) for t in (y, expected)), strict=True):
        assert error(g, e) < 1e-13


@pytest.mark.parametrize('size', [(1, 1), (2, 9), (7, 8)])
def test_few_outputs_compiled(size):
    """The form for inductor, on maps smaller than the kernel too."""
    torch.compiler.reset()
    conv = nn.Conv2d(4, 1, 7, padding=3, dtype=torch.float64)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    y, expected = torch.compile(convolve, backend='aot_eager', fullgraph=True)(conv, x), conv(x)
    assert error(y, expected) < 1e-13
    grad = torch.randn_like(y)
    for g, e in zip(*(torch.autograd.grad(t, [x, *conv.parameters()], grad) for t in (y, expected)), strict=True):
        assert error(g, e) < 1e-13


def test_few_outputs_calls_hooks():
    conv, calls = nn.Conv2d(6, 1, 3), []
    conv.register_forward_hook(lambda *_: calls.append(1))
    convolve(conv, torch.randn(1, 6, 5, 5))
    assert calls == [1]


@needs_dynamo
@pytest.mark.parametrize('cfg, batch', [(FAD_CONV[4], 1), (FAD_CONV[6], 2), (FAD_CONV[9], 2)], ids=ids)
def test_compile(cfg, batch):
    """One graph, forward and backward, in training."""
    m = off_identity(make(**cfg))
    compiled = torch.compile(copy.deepcopy(m), backend='aot_eager', fullgraph=True)
    x = torch.randn(batch, 4, 10, 9, requires_grad=True)
    y, expected = compiled(x), m(x)
    assert_same(
        (y, *grads(y, [x, *compiled.parameters()])), (expected, *grads(expected, [x, *m.parameters()])), 2e-6)  # 0
    assert_same(compiled.state_dict().values(), m.state_dict().values(), 1e-6)  # 0


def test_sync_batch_norm():
    m = off_identity(FADConv2d(4, 6, 3, padding=1)).eval()
    x = torch.randn(2, 4, 8, 7)
    expected = m(x)
    m = nn.SyncBatchNorm.convert_sync_batchnorm(m)
    assert isinstance(m.ada_kern.norm, nn.SyncBatchNorm)
    assert torch.equal(m(x), expected)
    assert error(m.train()(x), expected) > 1e-3  # the batch's statistics


def test_inference_mode_then_training():
    """Nothing made under inference mode, where autograd cannot follow, is kept for later."""
    m = off_identity(FADConv2d(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 40, 36)
    with torch.inference_mode():
        expected = m(x)
    y = m(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in m.parameters())
    assert torch.equal(y, expected)


def test_two_threads():
    """The same layer at once on maps of different sizes."""
    m = off_identity(FADConv2d(4, 6, 3, padding=1)).eval()
    xs = [torch.randn(1, 4, *size) for size in ((40, 36), (9, 8), (33, 70), (16, 16))]
    expected = [m(x) for x in xs]
    wrong, start = [], threading.Barrier(4)

    def work(i):
        start.wait()
        for _ in range(5):
            if not torch.equal(m(xs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
