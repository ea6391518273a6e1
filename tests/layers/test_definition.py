"""FreqSelect, AdaKern, AdaDR, FreeOffsets and FADConv2d against their definitions, written out in float64."""
import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from fadc_timm import AdaDR, AdaKern, FreeOffsets, FreqSelect
from fadc_timm.ops import adaptive_dilated_conv2d, deform_conv2d
from tests.support.cases import DTYPES, error
from tests.support.layer_cases import EXACT, FAD_CONV, SIZES, assert_same, grads, ids, make
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')


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
    """A trunk and two heads for each part. The trunk's norm takes the statistics of each image over the part's
    channels; or of each channel, in training with more than one sample over the batch.
    """
    pooled = x.flatten(2).mean(2)
    width = m.fc.weight.shape[0] // m.parts
    parts = []
    for i in range(m.parts):
        rows = slice(i * width, (i + 1) * width)
        t = pooled @ m.fc.weight[rows].T
        if isinstance(m.norm, nn.GroupNorm):
            mean, var = t.mean(1, keepdim=True), t.var(1, unbiased=False, keepdim=True)
        elif m.training and len(x) > 1:
            mean, var = t.mean(0), t.var(0, unbiased=False)
        else:
            mean, var = m.norm.running_mean[rows], m.norm.running_var[rows]
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


def oracle_free_offsets(m, x, padding):
    """mmcv's order: the offsets of all groups and taps, y before x, then the masks; nothing of it is chunked there."""
    last = m.conv if m.dw is None else m.dw
    k, groups, args = last.kernel_size[0], m.offset_groups, dict(stride=last.stride, dilation=m.dilation)
    x = F.pad(x, [padding] * 4)
    if m.dw is not None:
        x = F.conv2d(x, m.dw.weight, groups=x.shape[1], **args)
        o = torch.einsum('oc,bchw->bohw', m.conv.weight[:, :, 0, 0], x) + m.conv.bias[:, None, None]
    else:
        o = F.conv2d(x, m.conv.weight, m.conv.bias, **args)
    n = 2 * groups * k * k
    assert o.shape[1] == n + groups * k * k * m.modulated
    return o[:, :n], (2 / (1 + (-o[:, n:]).exp()) if m.modulated else None)


def oracle_fad_conv(m, x):
    """FreqSelect, AdaKern before any padding, replication, AdaDR or free offsets, the operator's own oracle."""
    if m.freq_select is not None:
        x = oracle_freq_select(m.freq_select, x)
    gains = oracle_ada_kern(m.ada_kern, x) if m.ada_kern is not None else None
    r, d = m.kernel_size[0] // 2, m.dilation[0]
    padding = {'same': r * d, 'valid': 0}[m.padding] if isinstance(m.padding, str) else m.padding[0]
    padding -= r * (d - 1)
    if m.padding_mode == 'replicate' and padding > 0:
        x, padding = F.pad(x, [padding] * 4, mode='replicate'), 0
    if m.free_offsets is not None:
        offset, mask = oracle_free_offsets(m.free_offsets, x, padding + r * (d - 1))
        return deform_conv2d(
            x, m.weight, offset, mask, m.bias, gains=gains, stride=m.stride[0], padding=padding + r * (d - 1),
            dilation=d, groups=m.groups, backend='reference')
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
@pytest.mark.parametrize('norm_layer', ['batchnorm2d', 'layernorm2d'])
def test_ada_kern(norm_layer, kernel_decompose, depthwise, batch, training):
    out_channels = 6 if depthwise else 10
    m = AdaKern(
        6, out_channels, kernel_decompose, depthwise, min_channels=4, norm_layer=norm_layer, dtype=torch.float64)
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


@pytest.mark.parametrize('kernel_decompose,depthwise', [('both', False), ('both', True), ('low', False)])
def test_ada_kern_reparameterized(kernel_decompose, depthwise):
    """The same gains without the norm, also in training, and scripted; and one again when they are reset."""
    m = AdaKern(6, 6, kernel_decompose, depthwise, min_channels=4, dtype=torch.float64)
    off_identity(m).eval()
    with torch.no_grad():
        m.norm.weight.uniform_(-1, 2)
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    expected = m(x)
    for _ in range(2):
        m.reparameterize()
        assert not any(isinstance(n, nn.BatchNorm2d) for n in m.modules())
        assert_same(m(x), expected, EXACT)
    assert_same(torch.jit.script(m)(x), expected, EXACT)
    assert_same(m.train()(x[:1]), [None if g is None else g[:1] for g in expected], EXACT)
    m.reset_parameters()
    assert all(g is None or torch.equal(g, torch.ones_like(g)) for g in m(x))


@pytest.mark.parametrize('norm_layer, kept', [
    ('layernorm2d', nn.GroupNorm), (partial(nn.BatchNorm2d, track_running_stats=False), nn.BatchNorm2d)])
def test_ada_kern_whose_norm_is_of_the_images_has_nothing_to_fold(norm_layer, kept):
    m = AdaKern(6, 6, norm_layer=norm_layer).eval()
    for head in (m.low, m.high):
        nn.init.normal_(head.weight)
    x = torch.randn(3, 6, 5, 4)
    expected = m(x)
    m.reparameterize()
    assert type(m.norm) is kept and all(map(torch.equal, m(x), expected))


@pytest.mark.parametrize('norm_layer, made, name', [
    ('BatchNorm2d', 'BatchNorm2d(32, eps=1e-05', 'BatchNorm2d'),  # timm's names have no case
    (partial(nn.BatchNorm2d, eps=1e-3), 'BatchNorm2d(32, eps=0.001', 'batchnorm2d'),
    ('layernorm', 'GroupNorm(2, 32, eps=1e-06, affine=True', 'layernorm'),
    (nn.LayerNorm, 'GroupNorm(2, 32, eps=1e-05, affine=True', 'layernorm2d'),
    (partial(LayerNorm2d, eps=1e-3, affine=False), 'GroupNorm(2, 32, eps=0.001, affine=False', 'layernorm2d'),
    ('groupnorm1', 'GroupNorm(2, 32, eps=1e-05, affine=True', 'groupnorm1'),
    (lambda n, **dd: nn.GroupNorm(4, n, **dd), 'GroupNorm(8, 32, eps=1e-05, affine=True', 'layernorm2d'),
], ids=['batchnorm', 'batchnorm eps', 'layernorm', 'LayerNorm', 'layernorm eps', 'groupnorm1', 'four groups'])
def test_ada_kern_norms(norm_layer, made, name):
    """timm's names and callables; the parts of the kernel never meet in the norm."""
    m = AdaKern(4, 6, norm_layer=norm_layer)
    assert repr(m.norm).startswith(made) and m.norm_layer == name
    x = torch.randn(3, 4, 5, 5)
    assert all(torch.equal(g, torch.ones_like(g)) for g in m(x))
    off_identity(m)
    high_in, high_out = m(x)[2:]
    with torch.no_grad():
        m.fc.weight[:16] = 7
    assert torch.equal(m(x)[2], high_in) and torch.equal(m(x)[3], high_out)


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


# FreeOffsets


@pytest.mark.parametrize('cfg', [
    dict(), dict(kernel_size=5, offset_groups=2, dilation=2), dict(stride=2, modulated=False), dict(padding=0),
    dict(kernel_size=1, padding=2), dict(depthwise=True, kernel_size=5, stride=2, offset_groups=3)], ids=ids)
def test_free_offsets(cfg):
    m = off_identity(FreeOffsets(6, **cfg, dtype=torch.float64))
    x = torch.randn(2, 6, 11, 9, dtype=torch.float64, requires_grad=True)
    k, g = cfg.get('kernel_size', 3), cfg.get('offset_groups', 1)
    offset, mask = m(x)
    expected = oracle_free_offsets(m, x, cfg.get('padding', cfg.get('dilation', 1) * (k // 2)))
    assert offset.shape[1] == 2 * g * k * k and (mask is None) == (not cfg.get('modulated', True))
    assert mask is None or mask.shape[1] == g * k * k
    inputs = [x, *m.parameters()]
    y, y_expected = (torch.cat([t for t in ts if t is not None], 1) for ts in ((offset, mask), expected))
    assert_same((offset, mask, *grads(y, inputs)), (*expected, *grads(y_expected, inputs)), EXACT)


@pytest.mark.parametrize('depthwise', [False, True])
def test_free_offsets_at_start(depthwise):
    m = FreeOffsets(4, offset_groups=2, depthwise=depthwise)
    x = torch.randn(2, 4, 7, 6)
    for _ in range(2):
        offset, mask = m(x)
        assert torch.equal(offset, torch.zeros(2, 36, 7, 6)) and torch.equal(mask, torch.ones(2, 18, 7, 6))
        off_identity(m)
        assert m(x)[0].abs().max() > 0.1
        m.reset_parameters()


# FADConv2d


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
    inner.__dict__.update(padding_mode='zeros', padding=(0, 0), inner_padding=0, pads_itself=False)
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
    without = off_identity(make(**cfg, sampling='fixed'))
    m = make(**cfg, eps=0.)
    assert [k for k in m.load_state_dict(without.state_dict(), strict=False).missing_keys if 'ada_dr' not in k] == []
    x = torch.randn(2, 4, 10, 9)
    assert error(without(x), m(x)) < 1e-6  # 1.0e-7
