"""lift_model: other networks of timm, and networks that timm has never seen."""
import copy
import re
from collections import OrderedDict

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import prune

from fadc_timm import FADConv2d, LiftReport, lift_model
from fadc_timm.models.lift import NothingToLift
from tests.support.backbones import LOSSLESS, ROUNDING, awaken, check_learns, photos
from tests.support.cases import error
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')


def convs(model):
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Conv2d)}


def as_list(y):
    return y if isinstance(y, list) else [y]


@torch.no_grad()
def lift(model, *args, x=None, **kwargs):
    """Lift, and check that the report is complete and true, and that the function stayed the same."""
    x = photos() if x is None else x
    expected = as_list(model(x))
    before, parameters = convs(model), set(model.parameters())
    report = lift_model(model, *args, **kwargs)
    assert isinstance(report, LiftReport)
    assert sorted([*report.replaced, *report.left]) == sorted(before)  # each once
    for name in report.replaced:
        new = model.get_submodule(name)
        assert type(new) is FADConv2d and new.weight is before[name].weight and new.bias is before[name].bias
    assert all(model.get_submodule(name) is before[name] for name in report.left)
    assert parameters <= set(model.parameters())  # an optimizer keeps what it has
    assert not any(m.training for m in model.modules())
    for a, e in zip(as_list(model(x)), expected, strict=True):
        assert error(a, e) < LOSSLESS  # 9.7e-5
    return report


# networks of timm


@pytest.mark.parametrize('name, prefixes, number', [
    ('regnetx_002', ('s2.', 's3.', 's4.'), 12),
    ('regnetz_b16', ('stages.1.', 'stages.2.', 'stages.3.', 'final_conv.'), 20),
    ('legacy_seresnet18', ('layer2.', 'layer3.', 'layer4.'), 12),
    ('efficientnet_b0', ('blocks.2.', 'blocks.3.', 'blocks.4.', 'blocks.5.', 'blocks.6.'), 13),
    ('mobilenetv3_small_050', ('blocks.1.', 'blocks.2.', 'blocks.3.', 'blocks.4.', 'blocks.5.'), 10),
    ('densenet121', ('features.transition', *(f'features.denseblock{i}.' for i in (2, 3, 4))), 52),
])
def test_stages_of_feature_info(name, prefixes, number):
    """Stages 2 to 4, all that has taps; the stem and stage 1 stay."""
    model = awaken(timm.create_model(name))
    taps = {n for n, m in convs(model).items() if m.kernel_size != (1, 1)}
    report = lift(model)
    assert len(report.replaced) == number
    assert set(report.replaced) == {n for n in taps if n.startswith(prefixes)}
    for conv, reason in report.left.items():
        assert ('outside' if not conv.startswith(prefixes) else '1x1') in reason
    assert f'replaced {number} layers: {report.replaced[0]}, ' in str(report)
    assert all(conv in str(report) for conv in report.left)


def test_depthwise():
    model = awaken(timm.create_model('efficientnet_b0'))
    for name in lift(model).replaced:
        m = model.get_submodule(name)
        assert m.groups == m.in_channels and m.ada_dr.depthwise and m.ada_kern.low.out_features == m.in_channels


@pytest.mark.parametrize('name, number', [('regnetx_002', 12), ('efficientnet_b0', 13), ('densenet121', 52)])
def test_deformable(name, number):
    """On any network, with the function unchanged but for rounding, and the options passed on."""
    model = awaken(timm.create_model(name))
    expected = model(photos())
    report = lift(model, sampling='deform', freq_select=False, modulated=False, backend='torchvision')
    layers = [model.get_submodule(n) for n in report.replaced]
    assert len(layers) == number and error(model(photos()), expected) < ROUNDING
    for m in layers:
        assert m.sampling == 'deform' and m.freq_select is None and m.backend == 'torchvision'
        assert not m.free_offsets.modulated and (m.free_offsets.dw is not None) == (m.groups == m.in_channels)
    again = lift(model, (True, True, True, True), sampling='deform')
    assert {again.left[f'{n}.free_offsets.conv'] for n in report.replaced} == {'a part of FADC'}


def test_one_stage():
    model = awaken(timm.create_model('regnetx_002'))
    report = lift(model, (True, False, False, False), dilation_act='relu', bands=(2,))
    assert report.replaced == ('s1.b1.conv2.conv',)
    m = model.get_submodule('s1.b1.conv2.conv')
    assert m.ada_dr.dilation_act == 'relu' and m.freq_select.bands == (2,)
    assert lift(model, [False] * 4).replaced == ()


def test_subclasses_are_left():
    """Conv2dSame pads by itself, StdConv2d normalizes its weight: to swap them would change the function."""
    model = awaken(timm.create_model('tf_efficientnet_b0'))
    report = lift(model)
    same = {n for n, m in convs(model).items() if type(m).__name__ == 'Conv2dSame'}
    left = {n: reason for n, reason in report.left.items() if 'Conv2dSame' in reason}
    assert len(report.replaced) == 10 and left
    assert set(left) == {n for n in same if n.startswith(('blocks.2', 'blocks.3', 'blocks.4', 'blocks.5', 'blocks.6'))}
    with pytest.raises(NothingToLift, match='NormFreeNet has no k x k .*stem.conv: of class ScaledStdConv2d, .*; ...'):
        lift_model(timm.create_model('nf_resnet26'), ['stages'])


def test_names_of_stages():
    model = awaken(timm.create_model('hrnet_w18_small'))
    names = 'names of modules, of which these .* lift: conv1, conv2, layer1, transition1, stage2, transition2, stage3'
    with pytest.raises(ValueError, match=f"feature 'stem' of HighResolutionNet is no module.*{names}"):
        lift_model(model)
    report = lift(model, ['stage2', 'stage3', 'stage4'])
    assert len(report.replaced) > 50 and all(n.startswith(('stage2', 'stage3', 'stage4')) for n in report.replaced)


@pytest.mark.parametrize('name, kernel', [
    ('swin_tiny_patch4_window7_224', r'patch_embed\.proj: kernel_size must be odd, got \(4, 4\)'),
    ('vit_tiny_patch16_224', r'patch_embed\.proj: kernel_size must be odd, got \(16, 16\)'),
    ('mixer_s32_224', r'stem\.proj: kernel_size must be odd'),
    ('resmlp_12_224', r'stem\.proj: kernel_size must be odd'),
])
def test_networks_without_convolutions(name, kernel):
    """They say what they lack, and what can be done, not how many stages they have."""
    with torch.device('meta'):
        model = timm.create_model(name)
    for args in ((), (['patch_embed' if 'patch' in kernel else 'stem'],)):
        with pytest.raises(NothingToLift, match=f'{type(model).__name__} has no k x k .*{kernel}.*FreqSelect'):
            lift_model(model, *args)


def test_stages_without_convolutions():
    model = timm.create_model('regnetx_002')
    with pytest.raises(NothingToLift, match=r"stages=\['head'\]: there are no .* to lift in stem, s1, s2, s3, s4\.$"):
        lift_model(model, ['head'])
    lift_model(model)
    with pytest.raises(NothingToLift, match=r'12 .* left \(a FADConv2d already\).* to lift in stem, s1\.$'):
        lift_model(model)


@pytest.mark.parametrize('name, number', [('regnetx_002', 12), ('efficientnet_b0', 13), ('resnet18', 12)])
def test_features_only(name, number):
    model = awaken(timm.create_model(name, features_only=True))
    assert len(lift(model).replaced) == number


@pytest.mark.parametrize('name, number, out_indices', [
    *(('resnet18', 12, indices) for indices in ((2, 3, 4), (4,), (0, 2, 4))),
    *(('convnext_atto', 10, indices) for indices in ((1, 2, 3), (3,), (0, 1, 3)))])
def test_features_only_of_some_stages(name, number, out_indices):
    """The stages are the network's, whether or not it puts them out."""
    model = awaken(timm.create_model(name, features_only=True, out_indices=out_indices))
    assert len(lift(model).replaced) == number


def test_features_only_without_the_last_stages():
    model = awaken(timm.create_model('resnet18', features_only=True, out_indices=(2,)))
    with pytest.raises(ValueError, match='has 2 stages, got 4 booleans: .* The stages end with layer1, layer2;'):
        lift(model)
    assert len(lift(model, (False, True)).replaced) == 4


# other networks


def small(**convolutions):
    """Convolutions of 4 channels in a row."""
    return nn.Sequential(OrderedDict(convolutions)).eval()


X = torch.randn(2, 4, 16, 15, generator=torch.Generator().manual_seed(0))


def conv(kernel_size=3, **kwargs):
    return nn.Conv2d(4, 4, kernel_size, **kwargs)


def test_sequential():
    body = small(a=conv(5), act=nn.GELU(), b=conv(padding=2, dilation=2))
    model = small(stem=conv(padding=1), body=body, head=conv(1))
    report = lift(model, ['body'], x=X)
    assert report.replaced == ('body.a', 'body.b') and set(report.left) == {'stem', 'head'}
    assert lift(model, ['body.a', 'head', 'stem'], x=X).replaced == ('stem',)
    with pytest.raises(ValueError, match='Sequential has no feature_info.*names of modules, .* to lift: stem, body'):
        lift_model(small(stem=conv(padding=1), body=small(a=conv(5), act=nn.GELU()), head=conv(1)))


def test_convolution_in_two_places():
    """It stays one module, under both names, also where its block stands in two places."""
    shared = conv(padding=1)
    model = small(a=shared, act=nn.GELU(), b=shared, c=conv())
    assert lift(model, ['a', 'b'], x=X).replaced == ('a', 'b')
    assert model.a is model.b
    shared = conv(padding=1)
    model = small(a=shared, b=shared)
    assert lift(model, ['b'], x=X).replaced == ('b',)
    assert type(model.a) is nn.Conv2d and model.a.weight is model.b.weight
    block = small(conv=conv(padding=1))
    model = small(a=block, act=nn.GELU(), b=block)
    assert lift(model, ['a', 'b'], x=X).replaced == ('a.conv', 'b.conv')
    assert model.a.conv is model.b.conv and type(model.a.conv) is FADConv2d
    block = small(conv=conv(padding=1))
    model = small(a=block, act=nn.GELU(), b=block)
    assert lift(model, ['b'], x=X).replaced == ('a.conv', 'b.conv')  # one place with two names


@torch.no_grad()
@pytest.mark.parametrize('name, number', [('repvgg_a0', 19), ('repvit_m0_9', 24)])
def test_blocks_that_fold_their_convolutions(name, number, caplog):
    """`reparameterize_model` would make plain convolutions of those that learned to dilate."""
    model = timm.create_model(name, num_classes=3).eval()
    lift_model(model)
    off_identity(model)
    expected = model(photos())
    for folded in (reparameterize_model(model), reparameterize_model(copy.deepcopy(model), inplace=True)):
        assert sum(isinstance(m, FADConv2d) for m in folded.modules()) == number
        assert error(folded(photos()), expected) < 1e-5
        assert all(m.reparameterize.block is m for m in folded.modules() if 'reparameterize' in m.__dict__)
    assert 'is left out: it would make a plain convolution of a layer with FADC' in caplog.text


def with_method(name):
    """A convolution that computes something else, as accelerate's hooks and circular padding are put on it."""
    module = conv(padding=1)
    original = getattr(module, name)
    setattr(module, name, lambda *args: 2 * original(*args))
    return module


def with_state_hook():
    module = conv(padding=1)
    module.register_load_state_dict_pre_hook(lambda *args: None)
    return module


def with_plain_weight():
    """The weight is computed elsewhere, as a hypernetwork's is."""
    module = conv(padding=1)
    weight = module.weight.detach()
    del module.weight
    module.weight = weight
    return module


@pytest.mark.parametrize('module, reason', [
    (nn.utils.parametrizations.weight_norm(conv(padding=1)), 'ParametrizedConv2d'),
    (nn.utils.parametrizations.spectral_norm(conv(padding=1)), 'ParametrizedConv2d'),
    (nn.utils.spectral_norm(conv(padding=1)), 'hooks'),
    (prune.l1_unstructured(conv(padding=1), 'weight', 0.5), 'hooks'),
    (with_method('forward'), r'methods that were set on it \(forward\)'),
    (with_method('_conv_forward'), r'methods that were set on it \(_conv_forward\)'),
    (with_state_hook(), 'hooks'), (with_plain_weight(), 'must be a parameter of real numbers, got a Tensor'),
    (conv(4), 'kernel_size'), (conv((3, 1)), 'kernel_size'), (conv(stride=(1, 2)), 'stride'),
    (conv(dilation=(1, 2)), 'dilation'), (conv(padding=(1, 0)), 'padding'),
    (conv(padding=1, padding_mode='reflect'), "padding_mode.*'reflect'"),
    (conv(padding=1, padding_mode='circular'), "padding_mode.*'circular'"),
    (conv(padding=2, dilation=2, padding_mode='replicate'), 'padding_mode'),
], ids=str)
def test_what_does_not_fit_is_left(module, reason):
    model = small(a=conv(), odd=module, b=conv())
    report = lift(model, ['a', 'odd', 'b'], x=X)
    assert report.replaced == ('a', 'b')
    assert re.search(reason, report.left['odd'])


def test_replicating_convolutions():
    model = small(a=conv(padding=1, padding_mode='replicate'))
    assert lift(model, ['a'], x=X).replaced == ('a',)
    assert model.a.padding_mode == 'replicate'


def test_lifted_twice():
    """What FADC is made of is no convolution of the network."""
    model = awaken(timm.create_model('regnetx_002'))
    first, keys = lift(model), list(model.state_dict())
    again = lift(model, (True, True, True, True))
    assert again.replaced == ('s1.b1.conv2.conv',)
    assert {again.left[n] for n in first.replaced} == {'a FADConv2d already'}
    assert {again.left[f'{n}.freq_select.conv'] for n in first.replaced} == {'a part of FADC'}
    assert set(keys) == {k for k in model.state_dict() if not k.startswith('s1.b1.conv2.conv.')
                         or k == 's1.b1.conv2.conv.weight'}


def test_complex_numbers():
    with pytest.raises(ValueError, match='real numbers, got a Parameter of torch.complex64'):
        FADConv2d.from_conv(conv(dtype=torch.complex64))


def test_synchronised_norms():
    """AdaKern's BatchNorms are synchronised where the network's are, in either order of lifting and converting."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(timm.create_model('test_resnet'))
    lift_model(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {nn.SyncBatchNorm}


def test_mode_device_dtype():
    model = small(a=conv(dtype=torch.float64), b=conv(device='meta')).train()
    model.a.weight.requires_grad_(False)
    lift_model(model, ['a', 'b'])
    assert all(m.training for m in model.modules()) and not model.a.weight.requires_grad
    assert {p.dtype for p in model.a.parameters()} == {torch.float64}
    assert {p.device.type for p in model.b.parameters()} == {'meta'}


@pytest.mark.parametrize('stages, cfg, exception, message', [
    ((True, True), {}, ValueError, r'4 stages, got 2 .*: \(True, True\)\. The stages end with s1, s2, s3, s4;'),
    ((), {}, ValueError, 'RegNet has 4 stages, got 0'),
    (['s5'], {}, ValueError, "RegNet has no module 's5'; its top modules are stem, s1, s2, s3, s4, "),
    (['s1', ''], {}, ValueError, "no module ''"),
    (['s1.b'], {}, ValueError, "no module 's1.b'"),
    ('s1', {}, ValueError, "stages.*'s1'"),
    ((1, 0, 0, 1), {}, ValueError, r'stages must be booleans.*\(1, 0, 0, 1\)'),
    ((True, 's1'), {}, ValueError, r"stages must be booleans.*\(True, 's1'\)"),
    (['s1'], dict(dilation_akt='abs', band=2), TypeError, 'unknown options band, dilation_akt; FADConv2d has padding'),
    (['s1'], dict(kernel_size=5), TypeError, 'unknown options kernel_size'),
    (['s1'], dict(ada_dr=True), TypeError, 'ada_dr=True is now the option sampling'),
    (['s1', 's2'], dict(sampling='deform', offset_groups=24), ValueError, 's2.b1.conv2.conv: offset_groups=24 .*56'),
    (['s1'], dict(dilation_act='gelu'), ValueError, "s1.b1.conv2.conv: .*dilation_act.*'gelu'"),
    (['s1'], dict(padding_mode='mirror'), ValueError, "padding_mode.*'mirror'"),
    (['s1'], dict(backend='no_such'), ValueError, "backend.*'no_such'"),
    (['s1', 's2'], dict(dilation_groups=24), ValueError, 's2.b1.conv2.conv: dilation_groups=24 .*56'),
], ids=str)
def test_wrong_arguments(stages, cfg, exception, message):
    """Raise before anything is replaced."""
    model = timm.create_model('regnetx_002')
    with pytest.raises(exception, match=message):
        lift_model(model, stages, **cfg)
    assert not any(isinstance(m, FADConv2d) for m in model.modules())


def test_lifted_network_trains():
    model = timm.create_model('regnetx_002', num_classes=6)
    lift_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    check_learns(model, optimizer)
