"""FADConv2d where an nn.Conv2d stood: the same function at the start, its arguments, and what training moves."""
import copy
import inspect
import itertools
import random

import numpy as np
import pytest
import torch
from timm.layers.split_batchnorm import SplitBatchNorm2d, convert_splitbn_model
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.ops import deform_conv2d

from fadc_timm import AdaDR, AdaKern, FADConv2d, FreeOffsets, FreqSelect
from fadc_timm.layers.fad_conv import OPTIONS, SAMPLINGS, read_options
from tests.support.cases import error
from tests.support.layer_cases import AT_START, EXACT, FAD_CONV, ids, make
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')


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
    dict(kernel_decompose='low'), dict(kernel_decompose='none'), dict(freq_select=False), dict(sampling='fixed'),
    dict(sampling='deform'), dict(sampling='deform', offset_groups=4, modulated=False, kernel_decompose='none'),
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


# deformable


@pytest.mark.parametrize('backend', [None, 'reference', 'gather', 'torchvision'])
@pytest.mark.parametrize('options', [
    dict(), dict(freq_select=False, kernel_decompose='none'), dict(modulated=False, offset_groups=4)], ids=ids)
@pytest.mark.parametrize('cfg', [CONVS[0], CONVS[1], CONVS[12], CONVS[-3], CONVS[-1]], ids=ids)
def test_deformable_is_the_convolution_exactly(cfg, options, backend):
    """To the last bit: all products and sums of these integers are exact, so no order of summation matters."""
    conv = plain_conv(cfg, torch.float64)
    with torch.no_grad():
        taps = conv.kernel_size[0] ** 2
        for p in conv.parameters():
            p.copy_(torch.randint(-9, 10, p.shape))
        # the mean over the taps is an integer
        conv.weight[:, :, 0, 0] += taps - conv.weight.sum((2, 3)) % taps
    x = torch.randint(-9, 10, (2, 8, 19, 18)).double()
    m = FADConv2d.from_conv(conv, sampling='deform', backend=backend, **options)
    assert torch.equal(m(x), conv(x))


def test_without_the_modules_it_is_dcn_v2():
    """torchvision's operator, with the offsets and the mask of one convolution; v1 without the mask."""
    bare = dict(padding=2, dilation=2, stride=2, sampling='deform', freq_select=False, kernel_decompose='none')
    m = off_identity(FADConv2d(4, 6, 3, **bare, offset_groups=2))
    assert {n.partition('.')[0] for n in m.state_dict()} == {'weight', 'bias', 'free_offsets'}
    x = torch.randn(2, 4, 12, 11)
    o = m.free_offsets.conv(x)
    args = dict(stride=2, padding=2, dilation=2)
    expected = deform_conv2d(x, o[:, :36], m.weight, m.bias, mask=2 * o[:, 36:].sigmoid(), **args)
    assert error(m(x), expected) < 2e-6
    v1 = FADConv2d(4, 6, 3, **bare, offset_groups=2, modulated=False)
    v1.load_state_dict({k: v[:36] if 'free_offsets' in k else v for k, v in m.state_dict().items()})
    assert error(v1(x), deform_conv2d(x, o[:, :36], m.weight, m.bias, **args)) < 2e-6


@pytest.mark.parametrize('backend', ['reference', 'gather', 'torchvision'])
def test_slope_at_offset_zero(backend):
    """Where the tap lies on a pixel: that towards the next pixel below and to the right, in the last ones towards 0."""
    m = FADConv2d(1, 1, 1, bias=False, sampling='deform', modulated=False, freq_select=False, kernel_decompose='none',
                  backend=backend, dtype=torch.float64)
    torch.nn.init.ones_(m.weight)
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    offsets = []
    m.free_offsets.register_forward_hook(lambda module, args, output: offsets.append(output[0]))
    y = m(x)
    slope, = torch.autograd.grad(y.sum(), offsets)
    padded = nn.functional.pad(x, (0, 1, 0, 1))
    assert torch.equal(y, x)
    assert error(slope[:, :1], padded[:, :, 1:, :-1] - x) < EXACT and error(
        slope[:, 1:], padded[:, :, :-1, 1:] - x) < EXACT
    with torch.no_grad():  # the slope that a small step in this direction sees, and not the one of a step back
        m.free_offsets.conv.bias[0] = 1e-3
        assert error((m(x) - x) / 1e-3, slope[:, :1]) < 1e-9
        m.free_offsets.conv.bias[0] = -1e-3
        assert error((x - m(x)) / 1e-3, slope[:, :1]) > 0.1


def test_options_of_older_versions():
    """In a stored configuration; a call with them is an error."""
    assert read_options(dict(ada_dr=True, eps=0.)) == dict(sampling='dilation', eps=0.)
    assert read_options(dict(ada_dr=False)) == dict(sampling='fixed')
    assert read_options(dict(ada_dr=False, sampling='deform')) == dict(sampling='deform')
    with pytest.raises(ValueError, match="ada_dr, which is sampling today.*'no'"):
        read_options(dict(ada_dr='no'))
    with pytest.raises(TypeError, match='sampling'):
        FADConv2d.from_conv(nn.Conv2d(4, 4, 3), ada_dr=True)
    with pytest.raises(TypeError, match='takes kernel_size, stride from the convolution'):
        FADConv2d.from_conv(nn.Conv2d(4, 4, 3), kernel_size=5, stride=2)


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


@pytest.mark.parametrize('sampling', SAMPLINGS)
@pytest.mark.parametrize('padding', [0, 1, 2])
def test_from_conv_of_a_replicating_convolution(padding, sampling):
    conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode='replicate')
    x = torch.randn(2, 4, 9, 8)
    m = FADConv2d.from_conv(conv, eps=0., sampling=sampling)
    assert m.padding_mode == 'replicate'
    assert error(m(x), conv(x)) < 1e-6  # 1.5e-7
    assert FADConv2d.from_conv(conv, padding_mode='zeros').padding_mode == 'zeros'


# bad arguments

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
    (dict(ada_kern_norm='rmsnorm2d'), ValueError, "ada_kern_norm .* must make a BatchNorm of maps, .*'rmsnorm2d'"),
    (dict(ada_kern_norm='frozenbatchnorm2d'), ValueError, "ada_kern_norm.*'frozenbatchnorm2d'"),
    (dict(ada_kern_norm='batch'), ValueError, "ada_kern_norm .*'batchnorm2d'.*got 'batch'"),
    (dict(ada_kern_norm='groupnorm'), ValueError, "ada_kern_norm .* does not take the trunk's 16 channels"),
    (dict(ada_kern_norm='batchnorm1d'), ValueError, "ada_kern_norm .*'batchnorm1d'"),
    (dict(dilation_groups=2, sampling='deform'), ValueError, "dilation_groups .* sampling='dilation', got 2 with 'def"),
    (dict(offset_groups=2), ValueError, "offset_groups is an option of sampling='deform', got 2 with 'dilation'"),
    (dict(ada_kern_norm=nn.Identity), ValueError, 'ada_kern_norm.*Identity'),
    (dict(ada_kern_norm=None), ValueError, 'ada_kern_norm.*None'),
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
    (dict(sampling='deformable'), ValueError, "sampling must be one of .*'deformable'"),
    (dict(sampling=None), ValueError, 'sampling .*None'),
    (dict(sampling='deform', offset_groups=3), ValueError, 'offset_groups=3'),
    (dict(sampling='deform', offset_groups=0), ValueError, 'offset_groups=0'),
    (dict(sampling='deform', offset_groups=2.), ValueError, 'offset_groups.*2.0'),
    (dict(sampling='deform', modulated=1), ValueError, 'modulated.*1'),
    (dict(ada_dr=False), TypeError, "ada_dr=False is now the option sampling: .* 'fixed'"),
    (dict(backend='no_such'), ValueError, "backend.*'no_such'"),
]


@pytest.mark.parametrize('cfg, exception, message', BAD, ids=ids)
def test_bad_arguments(cfg, exception, message):
    with pytest.raises(exception, match=message):
        FADConv2d(**{**dict(in_channels=4, out_channels=4, kernel_size=3), **cfg})


@pytest.mark.parametrize('make_module', [
    lambda: AdaKern(4, 4, 'none'), lambda: AdaDR(4, dilation_act='gelu'), lambda: FreqSelect(4, (0,)),
    lambda: FreqSelect(4, spatial_group=3), lambda: FreeOffsets(4, offset_groups=3),
    lambda: FreeOffsets(4, modulated='yes')])
def test_bad_arguments_of_the_modules(make_module):
    with pytest.raises(ValueError, match='kernel_decompose|dilation_act|bands|spatial_group|offset_groups|modulated'):
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


@pytest.mark.parametrize('groups', [1, 4], ids=['dense', 'depthwise'])
def test_images_do_not_depend_on_each_other(groups):
    """With AdaKern's norm per image: outputs and gradients of an image are those in a batch, in training too."""
    x = torch.randn(3, 4, 8, 7, dtype=torch.float64)
    for norm, equal in (('layernorm2d', True), ('batchnorm2d', False)):
        m = off_identity(make(4, padding=1, groups=groups, ada_kern_norm=norm, dtype=torch.float64)).train()
        alone = [m(image[None]) for image in x]
        of_each = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y in alone]
        batch = m(x)
        of_batch = torch.autograd.grad(batch.square().sum(), list(m.parameters()))
        assert (error(torch.cat(alone), batch) < EXACT) == equal
        assert (max(error(sum(gs), g) for *gs, g in zip(*of_each, of_batch)) < EXACT) == equal
        assert error(torch.cat([m.eval()(image[None]) for image in x]), m(x)) < EXACT


def test_weights_of_another_norm():
    """Those of a BatchNorm are refused by the option's name, where torch would drop its statistics without a word too.
    """
    batch, layer = (AdaKern(4, 6, norm_layer=n) for n in ('batchnorm2d', 'layernorm2d'))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="norm is a BatchNorm in the weights .* norm_layer, .* 'batchnorm2d'"):
            layer.load_state_dict(batch.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=r'Missing key.*norm\.running_mean'):
        batch.load_state_dict(layer.state_dict())


@pytest.mark.parametrize('sampling', SAMPLINGS)
@pytest.mark.parametrize('depthwise', [False, True])
def test_leaves_the_identity(depthwise, sampling):
    """From the start, gradients reach everything but what is behind a zero head; after one step, everything."""
    m = FADConv2d(4, 4, 3, padding=1, groups=4 if depthwise else 1, sampling=sampling)
    behind_zero = {'ada_kern.fc.weight', 'ada_kern.norm.weight', 'ada_kern.norm.bias', 'ada_dr.mask_dw.weight',
                   'free_offsets.dw.weight'}
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    x = torch.randn(4, 4, 12, 12)
    for expected in (behind_zero & {n for n, _ in m.named_parameters()}, set()):
        optimizer.zero_grad()
        m(x).square().mean().backward()
        assert {n for n, p in m.named_parameters() if p.grad is None or p.grad.norm() == 0} == expected
        optimizer.step()


@pytest.mark.parametrize('folded', [False, True])
def test_batch_1_trains_scripted(folded):
    """As unscripted, and the running statistics stay."""
    m = off_identity(FADConv2d(4, 6, 3, padding=1)).train()
    if folded:
        m.ada_kern.reparameterize()
    before = copy.deepcopy(m.state_dict())
    scripted, x = torch.jit.script(m), torch.randn(1, 4, 8, 7)
    assert error(scripted(x), m(x)) < 2e-6
    assert all(torch.equal(v, before[k]) for k, v in scripted.state_dict().items())
    batch = torch.randn(3, 4, 8, 7)
    assert error(scripted(batch), copy.deepcopy(m)(batch)) < 2e-6  # of more samples the statistics are the batch's
    assert folded or not torch.equal(scripted.state_dict()['ada_kern.norm.running_mean'], before[
        'ada_kern.norm.running_mean'])


@pytest.mark.parametrize('sizes', [[1] * 5, [3, 1]], ids=str)
def test_update_bn_of_single_images(sizes):
    """torch's `update_bn` resets the statistics and adds up those of all batches, of one image too."""
    m = off_identity(AdaKern(4, 6)).train()
    maps = [torch.randn(n, 4, 8, 7) for n in sizes]
    update_bn(maps, m)
    trunk = [m.fc(x.mean((2, 3))).detach() for x in maps]
    assert m.norm.num_batches_tracked == len(sizes)
    # each batch has the same share of the mean
    assert error(m.norm.running_mean, sum(t.mean(0) for t in trunk) / len(trunk)) < 1e-6
    if set(sizes) == {1}:
        assert error(m.norm.running_var, torch.cat(trunk).var(0, correction=0)) < 1e-6


@pytest.mark.parametrize('training', [False, True])
def test_one_image_without_running_statistics(training):
    """As some adapt a network to each image: the value is its own mean, and the bias is what is left."""
    m = off_identity(AdaKern(4, 6)).train(training)
    m.norm.track_running_stats = False
    m.norm.running_mean = m.norm.running_var = None
    gains = m(torch.randn(1, 4, 8, 7))
    low, high = m.norm.bias.relu().chunk(2)
    expected = 2 * torch.sigmoid(torch.cat((m.low(low), m.high(high))))
    assert error(torch.cat(gains, 1)[0], expected) < 1e-6


def test_split_batch_norm():
    """timm's, with one norm for each part of the batch; a part of one sample has no variance."""
    m = convert_splitbn_model(off_identity(AdaKern(4, 6)), 2).train()
    assert isinstance(m.norm, SplitBatchNorm2d)
    m.norm.aux_bn[0].running_mean.add_(1)
    x = torch.randn(4, 4, 8, 7)
    state = copy.deepcopy(m.state_dict())
    pair = m(x[:2])
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    for i, norm in enumerate((m.norm, m.norm.aux_bn[0])):
        alone = copy.deepcopy(m)
        alone.norm = copy.deepcopy(norm) if i else nn.BatchNorm2d(m.norm.num_features)
        alone.norm.load_state_dict({k: v for k, v in norm.state_dict().items() if 'aux' not in k})
        for a, e in zip(pair, alone.eval()(x[i:i + 1])):
            assert error(a[i:i + 1], e) < 1e-6
    m(x)
    assert not torch.equal(m.norm.running_mean, state['norm.running_mean'])
    with pytest.raises(AssertionError, match='divisible'):
        m(x[:3])


@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_loops_that_reset_every_module(cfg):
    """In any order the layer starts over, as one that was just made."""
    m = make(**cfg)
    x = torch.randn(2, 4, 9, 12)
    for order in (1, -1, 0):
        modules = list(off_identity(m).modules())
        for module in random.sample(modules, len(modules)) if not order else modules[::order]:
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        fresh = make(**cfg).eval()
        fresh.load_state_dict({k: v for k, v in m.state_dict().items() if k in ('weight', 'bias')}, strict=False)
        assert torch.equal(m.eval()(x), fresh(x))


def test_a_loop_that_draws_every_convolution():
    """Kaiming initialisation draws what predicts the dilation too; one call undoes it, and keeps the weight."""
    m = FADConv2d(4, 6, 3, padding=1)
    for module in m.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    weight = m.weight.clone()
    x = torch.randn(2, 4, 9, 12)
    assert (m.ada_dr(x)[0] - 1).abs().max() > 0.5
    m.reset_fadc_parameters()
    assert (m.ada_dr(x)[0] - 1).abs().max() < 1e-4 and torch.equal(m.weight, weight)


@pytest.mark.parametrize('sampling', SAMPLINGS)
def test_reset_fadc_parameters(sampling):
    m = off_identity(FADConv2d(4, 6, 3, padding=1, groups=2, eps=0., sampling=sampling))
    x = torch.randn(2, 4, 8, 7)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    conv.load_state_dict({k: m.state_dict()[k] for k in ('weight', 'bias')})
    assert error(m.eval()(x), conv(x)) > 0.1
    m.reset_fadc_parameters()
    assert error(m(x), conv(x)) < 1e-6  # 1.0e-7
    assert m.ada_kern.norm.running_mean.abs().max() == 0


@pytest.mark.parametrize('name, value', [
    ('dilation', (2, 2)), ('stride', (2, 2)), ('padding', (2, 2)), ('padding_mode', 'circular'), ('groups', 2)])
def test_geometry_is_for_good(name, value):
    """Tools that dilate a network, or make it circular, set attributes of its convolutions."""
    layer = make(4, padding=1)
    setattr(layer, name, getattr(layer, name))
    with pytest.raises(AttributeError, match=f'^{name} of an FADConv2d is .* for good, .* got .*{value}'.replace(
            '(2, 2)', r'\(2, 2\)')):
        setattr(layer, name, value)
    layer.backend = 'grid_sample'


def test_numbers_of_numpy():
    conv = nn.Conv2d(4, 4, np.int64(3), stride=np.int64(2), padding=1)
    x = torch.randn(1, 4, 7, 7)
    torch.testing.assert_close(FADConv2d.from_conv(conv, sampling='fixed')(x), conv(x))
