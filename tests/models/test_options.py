"""The options of the models: the stages that have FADC, what reaches each layer, and what is refused."""
import pytest
import timm
import torch
from torch import nn

from tests.support.backbones import STAGES, TINY, fad_convs, module_of

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('stages', [(False, True, True, True), (True,) * 4, (False, False, False, True), (False,) * 4])
@pytest.mark.parametrize('base', ['resnet18', 'resnet50_gn', 'senet154', 'convnext_atto', 'convnext_atto_ols'])
def test_stages(base, stages):
    """Every convolution with taps around a centre is FADC in these stages, and no other."""
    prefixes = tuple(p for p, on in zip(STAGES[module_of(base)], stages) if on)
    with torch.device('meta'):
        plain = timm.create_model(base)
        model = timm.create_model(f'{base}_fadc', fadc_stages=stages)
    convs = {n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] in (3, 7)}
    assert set(fad_convs(model)) == {n for n in convs if n.startswith(prefixes)}
    assert all(m.freq_select and m.ada_kern and m.ada_dr for m in fad_convs(model).values())
    # what the base has, has the base's names
    extra = tuple(f'{n}.{part}.' for n in fad_convs(model) for part in ('freq_select', 'ada_kern', 'ada_dr'))
    assert [n for n in model.state_dict() if not n.startswith(extra)] == list(plain.state_dict())


@pytest.mark.parametrize('name, modules', [('test_resnet_dcn', False), ('test_resnet_dcn_fadc', True)])
def test_deformable(name, modules):
    """The 3x3 convolutions of stages 2 to 4, as mmdetection's stage_with_dcn; options of the layer reach them."""
    layers = fad_convs(timm.create_model(name))
    assert layers.keys() == fad_convs(timm.create_model('test_resnet_fadc')).keys()
    assert {n.partition('.')[0] for n in layers} == {'layer2', 'layer3', 'layer4'}
    for m in layers.values():
        assert m.sampling == 'deform' and m.ada_dr is None and m.free_offsets.modulated
        assert (m.freq_select is not None) == (m.ada_kern is not None) == modules
    layers = fad_convs(timm.create_model(name, modulated=False, offset_groups=4, freq_select=not modules))
    for m in layers.values():
        assert not m.free_offsets.modulated and m.free_offsets.conv.out_channels == 4 * 18
        assert (m.freq_select is None) == modules
    assert all(m.ada_dr for m in fad_convs(timm.create_model(name, sampling='dilation')).values())


def test_options_reach_every_layer():
    cfg = dict(bands=(3,), spatial_group=2, dilation_groups=4, eps=0.01, backend='grid_sample', dilation_act='zero')
    for m in fad_convs(timm.create_model('test_resnet_fadc', **cfg)).values():
        assert (m.freq_select.bands, m.freq_select.spatial_group, m.backend) == ((3,), 2, 'grid_sample')
        assert (m.ada_dr.dilation_groups, m.ada_dr.eps, m.ada_dr.dilation_act) == (4, 0.01, 'zero')
    off = timm.create_model('test_resnet_fadc', freq_select=False, kernel_decompose='none', sampling='fixed')
    assert all(set(m.state_dict()) <= {'weight', 'bias'} for m in fad_convs(off).values())


@pytest.mark.parametrize('kwargs, exception, message', [
    (dict(fadc_stages=(True, True)), ValueError, r'fadc_stages must be 4 booleans.*\(True, True\)'),
    (dict(fadc_stages='layer4'), ValueError, "fadc_stages.*'layer4'"),
    (dict(fadc_stages=(0, 1, 1, 1)), ValueError, r'fadc_stages.*\(0, 1, 1, 1\)'),
    (dict(dilation_akt='abs'), TypeError,
     r"_fadc has no argument 'dilation_akt'; the closest is 'dilation_act'\. Beside .* fadc_stages, padding_mode, "),
    (dict(nonsense=3), TypeError, r"no argument 'nonsense'\. Beside the arguments of test_\w+ it has fadc_stages, "),
    (dict(sampling='deform', offset_groups=7), ValueError, 'offset_groups=7'),
    (dict(sampling='free'), ValueError, "sampling.*'free'"),
    (dict(dilation_act='gelu'), ValueError, "dilation_act.*'gelu'"),
    (dict(padding_mode='reflect'), ValueError, "padding_mode.*'reflect'"),
    (dict(kernel_decompose='all'), ValueError, "kernel_decompose.*'all'"),
    (dict(bands=(2, 1)), ValueError, r'bands.*\(2, 1\)'),
    (dict(spatial_group=7), ValueError, 'spatial_group=7'),
    (dict(dilation_groups=7), ValueError, 'dilation_groups=7'),
    (dict(backend='cudnn'), ValueError, "backend.*'cudnn'"),
], ids=str)
@pytest.mark.parametrize('base', TINY)
def test_bad_options(base, kwargs, exception, message):
    with pytest.raises(exception, match=message):
        timm.create_model(f'{base}_fadc', **kwargs)
