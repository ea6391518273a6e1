"""AdaKern's norm: a network without BatchNorm gets none, and its images do not depend on each other."""
from functools import partial

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.nn.functional import cross_entropy

from fadc_timm import AdaKern, lift_model
from tests.support.backbones import SMALL, TINY, create_fadc, fad_convs, load, photos, trained
from tests.support.cases import error

pytestmark = pytest.mark.usefixtures('one_thread')


def norms_of(model):
    return {layer.ada_kern.norm_layer for layer in fad_convs(model).values()}


def batch_norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize('name, kwargs, norm', [
    ('resnet10t_fadc', {}, 'batchnorm2d'), ('resnet10t_dcn_fadc', {}, 'batchnorm2d'),
    ('resnet50_gn_fadc', {}, 'layernorm2d'), ('test_convnext_fadc', {}, 'layernorm2d'),
    ('convnextv2_atto_fadc', {}, 'layernorm2d'), ('convnext_zepto_rms_fadc', {}, 'layernorm2d'),
    ('convnext_atto_fadc', dict(norm_layer='batchnorm2d'), 'batchnorm2d'),  # the base's option
    ('test_convnext_fadc', dict(ada_kern_norm='batchnorm2d'), 'batchnorm2d'),
    ('resnet10t_fadc', dict(ada_kern_norm='layernorm2d'), 'layernorm2d'),
    ('test_dinat_fadc', dict(kernel_decompose='both'), 'layernorm2d'),
], ids=str)
def test_kind_of_the_family(name, kwargs, norm):
    with torch.device('meta'):
        model = timm.create_model(name, **kwargs)
    assert norms_of(model) == {norm}
    own = [n for n in batch_norms(model) if '.ada_kern.' in n]
    assert len(own) == (len(fad_convs(model)) if norm == 'batchnorm2d' else 0)
    assert own or not batch_norms(model) or 'resnet10t' in name


@pytest.mark.parametrize('make, norm', [
    (lambda: timm.create_model('mobilenetv2_050'), 'batchnorm2d'),
    (lambda: freeze_batch_norm_2d(timm.create_model('mobilenetv2_050')), 'batchnorm2d'),
    (lambda: timm.create_model('resnet18', norm_layer=nn.InstanceNorm2d), 'layernorm2d'),
    (lambda: timm.create_model('vgg11'), 'layernorm2d'), (lambda: timm.create_model('vgg11_bn'), 'batchnorm2d'),
], ids=['BatchNorm', 'frozen', 'InstanceNorm', 'none', 'vgg11_bn'])
def test_kind_of_a_lifted_network(make, norm):
    with torch.device('meta'):
        model = make()
    lift_model(model)
    assert norms_of(model) == {norm}


@torch.no_grad()
def test_folded_without_parameters():
    kern = AdaKern(16, 16, norm_layer=partial(nn.BatchNorm2d, affine=False)).eval()
    nn.init.normal_(kern.norm.running_mean)
    nn.init.normal_(kern.high.weight)
    x = torch.randn(2, 16, 3, 3)
    gains = kern(x)
    kern.reparameterize()
    assert type(kern.norm) is nn.Identity
    for folded, gain in zip(kern(x), gains, strict=True):
        torch.testing.assert_close(folded, gain)


def test_lifted_in_two_calls():
    """What FADC itself has is none of the network's norms."""
    model = timm.create_model('test_convnext')
    lift_model(model, ['stages.2'], ada_kern_norm='batchnorm2d')
    lift_model(model, ['stages.3'])
    assert {n[:8]: m.ada_kern.norm_layer for n, m in fad_convs(model).items()} == {
        'stages.2': 'batchnorm2d', 'stages.3': 'layernorm2d'}


@pytest.mark.parametrize('base', TINY + SMALL)
@torch.no_grad()
def test_start_is_the_same_to_the_bit(base):
    """All gains are one, whatever the norm."""
    models = [load(f'{base}_fadc', trained(base), num_classes=1000, ada_kern_norm=norm)
              for norm in ('batchnorm2d', 'layernorm2d')]
    for training in (False, True):
        outputs = [m.train(training)(photos()) for m in models]
        assert torch.equal(*outputs)


def gradients(model, x, y, steps):
    """Of the mean loss, accumulated over equal parts of the batch."""
    model.zero_grad()
    for images, labels in zip(x.chunk(steps), y.chunk(steps)):
        (cross_entropy(model(images), labels) / steps).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize('norm, equal', [(None, True), ('batchnorm2d', False)])
def test_accumulated_gradients(norm, equal):
    """Four times two images, and eight times one, are eight images, as in the base."""
    kwargs = {} if norm is None else dict(ada_kern_norm=norm)
    model = create_fadc('test_convnext_fadc', num_classes=3, **kwargs).double().train()
    assert bool(batch_norms(model)) == (not equal)
    x, y = torch.randn(8, 3, 64, 64, dtype=torch.float64), torch.arange(8) % 3
    expected = gradients(model, x, y, 1)
    assert all(g.isfinite().all() and g.norm() > 0 for g in expected.values())
    for steps in (4, 8):
        accumulated = gradients(model, x, y, steps)
        assert (max(error(g, expected[n]) for n, g in accumulated.items()) < 1e-9) == equal
