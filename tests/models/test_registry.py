"""The zoo's registry: names, tags and weights derived from timm, and the default weights in the package."""
from dataclasses import asdict
from inspect import signature
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint

import fadc_timm
from fadc_timm import AdaDR
from fadc_timm.models._family import architecture_of, list_architectures
from tests.support.backbones import BASES, MODULES, PACKAGE, TINY, VARIANTS, module_of

pytestmark = pytest.mark.usefixtures('one_thread')


def test_every_architecture_has_its_variants():
    assert len(BASES) >= 60 and {f'{base}_fadc' for base in TINY} <= set(timm.list_models('*_fadc'))
    for module in MODULES:
        ours = {base + v: (base, v) for base in timm.list_models(module=module) for v in VARIANTS[module]}
        assert set(timm.list_models(module=f'fadc_{module}')) == set(ours)
        registered = {a.name: (a.base, a.variant.suffix) for a in list_architectures() if a.family.module == module}
        assert registered == ours
    assert all(architecture_of(f'{a.name}.some_tag') is a for a in list_architectures())
    assert architecture_of('resnet50') is None
    assert [a.name for a in list_architectures() if a.base == 'resnet18'] == [
        'resnet18_fadc', 'resnet18_dcn', 'resnet18_dcn_fadc']


@pytest.mark.parametrize('base', BASES)
def test_tags_and_weights_are_timms(base):
    for variant in VARIANTS[module_of(base)]:
        check_tags(base, variant)


def check_tags(base, variant):
    def key(cfg):
        return {k: v for k, v in asdict(cfg).items() if k not in ('architecture', 'tag')}

    expected = {cfg.tag: key(cfg) for cfg in get_arch_pretrained_cfgs(base).values()}
    name = base + variant
    cfgs = {cfg.tag: cfg for cfg in get_arch_pretrained_cfgs(name).values()}
    if name == 'test_resnet_fadc':
        ours = cfgs.pop('bluemarble_climate')
        assert ours.architecture == 'test_resnet_fadc' and ours.hf_hub_id is None
        assert list(get_arch_pretrained_cfgs(name)) == [
            'test_resnet_fadc.bluemarble_climate', 'test_resnet_fadc.r160_in1k']
        assert get_pretrained_cfg('test_resnet_fadc').tag == 'bluemarble_climate'
    else:
        assert get_pretrained_cfg(name).tag == get_pretrained_cfg(base).tag
    assert list(cfgs) == list(expected)
    assert {tag: key(cfg) for tag, cfg in cfgs.items()} == expected
    for tag, cfg in cfgs.items():
        assert (cfg.architecture, cfg.tag) == (name, tag)
        assert cfg.hf_hub_id is None or variant not in cfg.hf_hub_id
        plain = get_pretrained_cfg(f'{base}.{tag}' if tag else base)
        if plain.hf_hub_id:
            assert cfg.hf_hub_id == plain.hf_hub_id == f'timm/{base}.{tag}' or not plain.hf_hub_id.startswith('timm/')


@pytest.mark.parametrize('name, layer', [
    ('resnet50_fadc', 'FADConv2d'), ('test_resnet_dcn', 'FADConv2d'), ('dinat_mini_fadc', 'FADNeighborhoodAttention')])
def test_help(name, layer):
    """The signature has no argument of our own, and the docstring names where the options are."""
    entrypoint = model_entrypoint(name)
    assert list(signature(entrypoint).parameters) == ['pretrained', 'kwargs']
    assert '`fadc_stages`' in entrypoint.__doc__ and f'fadc_timm.layers.{layer}`' in entrypoint.__doc__
    assert hasattr(fadc_timm.layers, layer)


def test_known_weights():
    """Written out, so that a change in how timm keeps them is seen."""
    assert get_pretrained_cfg('resnet50_fadc').tag == 'a1_in1k'
    assert get_pretrained_cfg('resnet50_fadc.a1_in1k').hf_hub_id == 'timm/resnet50.a1_in1k'
    assert get_pretrained_cfg('resnet50_dcn').tag == get_pretrained_cfg('resnet50_dcn_fadc').tag == 'a1_in1k'
    assert get_pretrained_cfg('resnet50_dcn_fadc.a1_in1k').hf_hub_id == 'timm/resnet50.a1_in1k'
    assert get_pretrained_cfg('convnextv2_atto_fadc.fcmae').hf_hub_id == 'timm/convnextv2_atto.fcmae'
    assert get_pretrained_cfg('convnextv2_atto_fadc.fcmae').license == 'cc-by-nc-4.0'
    assert 'resnet50_fadc.a1_in1k' in timm.list_models('resnet50_fadc*', pretrained=True)
    assert len(timm.list_models('*_fadc', pretrained=True)) >= 250


def test_default_weights():
    """Plain `pretrained=True`, without a network, from a small file in the package."""
    cfg = get_pretrained_cfg('test_resnet_fadc')
    file = Path(cfg.file)
    assert PACKAGE in file.parents and file.stat().st_size < 3e6
    model = timm.create_model('test_resnet_fadc', pretrained=True).eval()
    assert model.num_classes == cfg.num_classes == len(cfg.label_names)
    weights = safetensors.torch.load_file(file)
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(t, weights[k]) for k, t in model.state_dict().items())
    learned = [m for m in model.modules() if isinstance(m, AdaDR)]
    assert learned and all(m.conv.weight.abs().max() > 0 for m in learned)  # FADC was trained too
