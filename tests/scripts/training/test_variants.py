"""What the variants of scripts.segmentation.train put in place of a backbone's convolutions."""
import copy

import pytest
import timm
import torch
from torch import nn

import fadc_timm
from fadc_timm.models.cost import module_cost
from scripts.training.variants import VARIANTS, added_keys, apply_variant, split_name
from scripts.training.weights import find_init, load_backbone
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
    has = [any(f'.{part}.' in key for key in added) for part in ('ada_dr', 'ada_kern', 'freq_select', 'free_offsets')]
    assert has == [variant in ('adadr', 'adadr_adakern', 'fadc'), variant in ('adadr_adakern', 'fadc', 'dcnv2_fadc'),
                   variant in ('fadc', 'dcnv2_fadc'), variant.startswith('dcnv2')]
    of_zoo = {'fadc': '_fadc', 'dcnv2': '_dcn', 'dcnv2_fadc': '_dcn_fadc'}.get(variant)
    if of_zoo is not None and timm.is_model(f'{name}{of_zoo}'):
        assert own.keys() == timm.create_model(f'{name}{of_zoo}', features_only=True).state_dict().keys()
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


def test_names_of_our_models():
    assert split_name('resnet50_dcn', 'plain') == ('resnet50', 'dcnv2')
    assert split_name('resnet50_dcn_fadc', 'dcnv2_fadc') == ('resnet50', 'dcnv2_fadc')
    assert split_name('resnet50_fadc', 'plain') == ('resnet50', 'fadc')
    with pytest.raises(ValueError, match='resnet50_dcn is the variant dcnv2: give --backbone resnet50'):
        split_name('resnet50_dcn', 'fadc')


def test_options_of_an_older_configuration():
    net = backbone()
    apply_variant(net, 'fadc', {'ada_dr': False})
    assert {m.sampling for m in net.modules() if isinstance(m, fadc_timm.FADConv2d)} == {'fixed'}


def test_checkpoint_of_dcnv2_before():
    """When its offsets came from a module of the scripts: `offset` beside the weight, with the same outputs."""
    net, other = backbone(), backbone()
    for n in (net, other):
        apply_variant(n, 'dcnv2')
    for m in net.modules():
        if isinstance(m, fadc_timm.FreeOffsets):
            nn.init.normal_(m.conv.weight, std=0.1)
    old = {key.replace('free_offsets.conv', 'offset'): value for key, value in net.state_dict().items()}
    assert any(key.endswith('conv2.offset.weight') for key in old)
    copy.deepcopy(other).load_state_dict(old)
    other.load_state_dict(old)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(net.eval()(x), other.eval()(x)))


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


@pytest.mark.parametrize('variant', [v for v in VARIANTS if v not in ('plain', 'dilation2')])
def test_init_of_a_variant(variant, tmp_path):
    """A run's checkpoint starts a run of the same variant, and of no other one."""
    net = backbone()
    apply_variant(net, variant)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save({'model': {f'encoder.model.{k}': v for k, v in net.state_dict().items()}}, tmp_path / 'last.pt')

    def load(name):
        other = backbone()
        apply_variant(other, name)
        load_backbone(other, find_init('test_resnet', str(tmp_path / 'last.pt'), name, {}))
        return other.state_dict()

    assert all(torch.equal(value, net.state_dict()[key]) for key, value in load(variant).items())
    with pytest.raises(ValueError, match='has weights of FADC, for the variant fadc, not for plain'):
        load('plain')
    with pytest.raises(RuntimeError, match='does not fit the backbone'):
        load('dcnv2' if variant != 'dcnv2' else 'adadr')
