"""What the variants of scripts.segmentation.train put in place of a backbone's convolutions."""
import pytest
import timm
import torch
from torch import nn

import fadc_timm
from fadc_timm.models.cost import module_cost
from scripts.segmentation.deform import DeformConv2d
from scripts.segmentation.variants import VARIANTS, added_keys, apply_variant
from tests.support.segmentation_cases import BACKBONES, backbone

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('variant', [v for v in VARIANTS if v != 'plain'])
def test_variant(name, variant):
    """The same convolutions as in the zoo, the plain network's weights, and its function unless dilation changes it."""
    plain, net = backbone(name), backbone(name)
    replaced = apply_variant(net, variant)
    zoo = timm.create_model(f'{name}_fadc', features_only=True)
    assert replaced == [n for n, m in zoo.named_modules() if isinstance(m, fadc_timm.FADConv2d)]
    state, own = plain.state_dict(), net.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items())
    added = set(own) - set(state)
    assert added == set(added_keys(net))
    has = [any(f'.{part}.' in key for key in added) for part in ('ada_dr', 'ada_kern', 'freq_select', 'offset')]
    assert has == [variant in ('adadr', 'adadr_adakern', 'fadc'), variant in ('adadr_adakern', 'fadc'),
                   variant == 'fadc', variant == 'dcnv2']
    if variant == 'fadc':
        assert own.keys() == zoo.state_dict().keys()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, features = plain.eval()(x), net.eval()(x)
    for a, b in zip(features, expected):
        assert a.shape == b.shape
        assert variant == 'dilation2' or (a - b).norm() <= 1e-3 * b.norm()
    assert variant != 'dilation2' or (features[-1] - expected[-1]).norm() > 0.01 * expected[-1].norm()
    if variant == 'dilation2':
        macs = [module_cost(m.to('meta'), (3, 64, 96)).gmacs for m in (plain, net)]
        assert macs[0] == macs[1]


def test_plain_is_left():
    net = backbone()
    before = str(net)
    assert apply_variant(net, 'plain') == [] and str(net) == before


def test_freq_select_stages():
    net = backbone()
    apply_variant(net, 'fadc', {'dilation_act': 'relu'}, freq_select_stages=(2, 3))
    having = {name.partition('.')[0] for name, m in net.named_modules() if isinstance(m, fadc_timm.FreqSelect)}
    assert having == {'layer2', 'layer3'}
    acts = {m.dilation_act for m in net.modules() if isinstance(m, fadc_timm.AdaDR)}
    assert acts == {'relu'} and any(n.startswith('layer4') and isinstance(m, fadc_timm.AdaDR)
                                    for n, m in net.named_modules())


def test_backbone_cut_off():
    """As a decoder of depth 3 or 4 has it."""
    net = backbone(out_indices=(0, 1, 2, 3))
    assert {name.partition('.')[0] for name in apply_variant(net, 'fadc')} == {'layer2', 'layer3'}


@pytest.mark.parametrize('args, message', [
    (('other',), "There is no variant 'other'"),
    (('dcnv2', {'eps': 0.1}), "'dcnv2' has no FADC, which the options eps"),
    (('fadc', {}, (1,)), 'freq_select_stages must be among 2, 3 and 4'),
])
def test_variant_errors(args, message):
    with pytest.raises(ValueError, match=message):
        apply_variant(backbone(), *args)


@pytest.mark.parametrize('args', [dict(stride=2, padding=1), dict(padding=2, dilation=2, groups=4, bias=False)])
def test_deformable(args):
    conv = nn.Conv2d(8, 8, 3, **args)
    deformable = DeformConv2d.from_conv(conv)
    x = torch.randn(2, 8, 9, 12)
    y = deformable(x)
    torch.testing.assert_close(y, conv(x), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert deformable.weight is conv.weight and deformable.offset.weight.grad.abs().min() > 0
    with torch.autocast('cpu', torch.bfloat16):
        half = deformable(x)
    torch.testing.assert_close(half.float(), y, rtol=2e-2, atol=2e-2)
