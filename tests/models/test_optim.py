"""param_groups: the rate of what FADC adds, and what is decayed."""
from functools import partial

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import fadc_timm
from fadc_timm import FreqSelect, param_groups
from fadc_timm.models._family import fadc_keys
from tests.support.backbones import SMALL

pytestmark = pytest.mark.usefixtures('one_thread')


def settings(model, groups):
    """(rate, decay) by the name of the parameter; each in one group."""
    settings_of = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    assert len(settings_of) == sum(len(g['params']) for g in groups)
    return {n: settings_of.get(id(p)) for n, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize('sampling', ['dilation', 'deform'])
@pytest.mark.parametrize('base', [*SMALL, 'regnetx_002'])
def test_groups(base, sampling):
    if base in SMALL:
        model = timm.create_model(f'{base}_fadc', sampling=sampling)
    else:
        fadc_timm.lift_model(model := timm.create_model(base), sampling=sampling)
    added = set(fadc_keys(model))
    for name, (rate, decay) in settings(model, param_groups(model, 1e-3, 0.2, 0.03)).items():
        assert rate == (2e-4 if name in added else 1e-3), name
        assert decay == (0 if name.endswith('bias') or model.get_parameter(name).ndim < 2 else 0.03), name
    for name, (rate, _) in settings(model, param_groups(model, 1e-3)).items():
        assert rate == pytest.approx(1e-4 if name in added else 1e-3), name
    assert len(param_groups(model, 1e-3, weight_decay=0.)) == 2


def test_parts_shared_and_frozen_parameters():
    """A lifted network inside of others, a module in two places, a module of FADC alone, and frozen parameters."""
    net = timm.create_model('regnetx_002')
    fadc_timm.lift_model(net)
    shared = fadc_timm.FADConv2d(4, 4, 3)
    model = nn.ModuleDict(dict(net=net, a=shared, b=nn.Sequential(shared), fs=FreqSelect(8), last=nn.Conv2d(4, 4, 3)))
    net.stem.requires_grad_(False)
    net.s2.b1.conv2.conv.ada_dr.requires_grad_(False)
    found = settings(model, param_groups(model, 1., 0.5, also=['last.weight']))
    assert {n for n, v in found.items() if v is None} == {
        n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    assert found['net.s2.b1.conv2.conv.ada_kern.fc.weight'] == (0.5, 0.05) and found['fs.conv.bias'] == (0.5, 0)
    assert found['a.freq_select.conv.weight'] == found['b.0.freq_select.conv.weight'] == (0.5, 0.05)
    assert found['a.weight'] == (1., 0.05) and found['last.weight'] == (0.5, 0.05) and found['last.bias'] == (1., 0)


def test_what_timm_does_not_decay():
    """Also where the network is a part of another one, which timm itself does not see."""
    swin = timm.create_model('swin_tiny_patch4_window7_224', depths=(1, 1), embed_dim=16, num_heads=(1, 2))
    name = next(n for n in swin.no_weight_decay() if 'bias_table' in n)
    assert swin.get_parameter(name).ndim == 2
    model = nn.Sequential(swin)
    assert settings(model, param_groups(model, 1.))[f'0.{name}'] == (1., 0.)


def test_schedulers_keep_the_ratio():
    model = timm.create_model('test_resnet_fadc')
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3))
    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    scheduler.step(5)
    assert sorted({g['lr'] for g in optimizer.param_groups}) == pytest.approx([5e-5, 5e-4])
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert sorted({g['lr'] for g in optimizer.param_groups}) == pytest.approx([5e-5, 5e-4])


def test_with_the_call_of_train_py():
    model = timm.create_model('test_resnet_fadc')
    optimizer = create_optimizer_v2(
        model, opt='adamw', lr=1e-3, weight_decay=0.05, param_group_fn=partial(param_groups, lr=1e-3))
    found = settings(model, optimizer.param_groups)
    assert found['layer2.0.conv2.ada_dr.conv.weight'] == (pytest.approx(1e-4), 0.05)
    assert found['layer2.0.conv2.weight'] == (1e-3, 0.05) and found['fc.bias'] == (1e-3, 0)


@pytest.mark.parametrize('change, message', [
    (dict(lr=-1.), 'lr must be a finite number, at least 0, got -1.0'), (dict(fadc_scale=float('nan')), 'fadc_scale'),
    (dict(weight_decay=-0.1), 'weight_decay'), (dict(also=['weight', 'offset.bias']), 'no parameters offset.bias'),
    (dict(also='weight'), "collection of names of parameters, got the string 'weight'"),
])
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        param_groups(nn.Conv2d(3, 3, 3), **{'lr': 1., **change})
    with pytest.raises(ValueError, match='all of them are frozen'):
        param_groups(nn.Conv2d(3, 3, 3).requires_grad_(False), 1.)
    with pytest.raises(TypeError, match='wants a module, got list'):
        param_groups(list(nn.Conv2d(3, 3, 3).parameters()), 1.)
