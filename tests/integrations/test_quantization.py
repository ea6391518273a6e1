"""What torch and torchao do to the layers of a network: pruning, parametrizations, quantisation."""
import pytest
import timm
import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.nn.utils import parametrizations, prune

from fadc_timm import FADConv2d
from tests.support.backbones import create_fadc, photos
from tests.support.cases import error
from tests.support.integration_cases import models, opened, uses

pytestmark = pytest.mark.usefixtures('one_thread')


@uses('torch', 'torch.nn.utils.prune')
@models
@torch.no_grad()
def test_pruning(name):
    """Of lifted layers: masks on their weights, which can be made permanent."""
    model = create_fadc(name)
    layers = [m for m in model.modules() if isinstance(m, FADConv2d)]
    before = model(photos())
    for m in layers:
        prune.l1_unstructured(m, 'weight', 0.3)
    pruned = model(photos())
    assert error(pruned, before.double()) > 1e-3 and pruned.isfinite().all()
    for m in layers:
        prune.remove(m, 'weight')
        assert 0.29 < (m.weight == 0).float().mean() < 0.31
    assert error(model(photos()), pruned.double()) < 1e-5


@uses('torch', 'torch.nn.utils.parametrizations: weight_norm, spectral_norm')
@models
@pytest.mark.parametrize('kind', ['weight_norm', 'spectral_norm'])
def test_parametrization(kind, name):
    """Of lifted layers: weight_norm leaves the function, spectral_norm divides by the norm; all of it trains."""
    model = create_fadc(name)
    layers = [m for m in model.modules() if isinstance(m, FADConv2d)]
    expected, weights = model(photos()).detach(), [m.weight.detach().clone() for m in layers]
    for m in layers:
        getattr(parametrizations, kind)(m)
    y = model(photos())
    if kind == 'weight_norm':
        assert error(y.detach(), expected.double()) < 1e-5
    else:
        for m, w in zip(layers, weights):
            assert error(m.weight.detach() * (w.norm() / m.weight.norm()), w.double()) < 1e-5
            assert not torch.equal(m.weight, w)
    y.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@uses('torch', 'torch.ao.quantization.quantize_dynamic')
@models
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_dynamic_quantization(name):
    """Linear layers, the classifier's and those of AdaKern, in int8."""
    model = create_fadc(name)
    quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = {type(m.ada_kern.fc) for m in quantized.modules() if isinstance(m, FADConv2d)}
    assert all('quantized' in kind.__module__ for kind in kinds) and kinds
    assert 0 < error(quantized(photos()), model(photos()).double()) < 0.2


def pair(name):
    """The FADC model and its base, with random weights and open residual branches."""
    return create_fadc(name, num_classes=6), opened(timm.create_model(name.removesuffix('_fadc'), num_classes=6)).eval()


def check_quantized(model):
    """Whatever torch.fx sees is quantised; FADConv2d, a leaf there, is not, nor is anything inside of it."""
    layers = [m for m in model.modules() if isinstance(m, FADConv2d)]
    inside = {part for m in layers for part in m.modules()}
    quantized = {m for m in model.modules() if 'quantized' in type(m).__module__}
    assert layers and len(quantized) > 10 and not quantized & inside
    assert not [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear) and m not in inside]


@uses('torch', 'torch.ao.quantization.quantize_fx: static; FADC layers stay in float32')
@models
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_static_quantization(name):
    """The error is at most twice that of the base."""
    errors = []
    for model in pair(name):
        prepared = prepare_fx(model, get_default_qconfig_mapping('x86'), (photos(),))
        prepared(photos())
        quantized = convert_fx(prepared)
        errors.append(error(quantized(photos()), model(photos()).double()))
        if model.default_cfg['architecture'] == name:
            check_quantized(quantized)
    assert 0 < errors[0] < 2 * errors[1], errors


@uses('torch', 'torch.ao.quantization.quantize_fx: quantization-aware training; FADC layers stay in float32')
@models
@pytest.mark.filterwarnings('ignore')
def test_quantization_aware_training(name):
    """All of it trains, and what is then quantised is as near to what was trained as the base is, times two."""
    errors = []
    for net in pair(name):
        model = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping('x86'), (photos(),))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(photos()), torch.arange(6)).backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
        with torch.no_grad():
            expected = model.eval()(photos()).double()
            quantized = convert_fx(model)
            errors.append(error(quantized(photos()), expected))
        if net.default_cfg['architecture'] == name:
            check_quantized(quantized)
    assert 0 < errors[0] < 2 * errors[1], errors


@uses('torchao', 'quantize_: int8 weights, int8 activations and weights')
@models
@pytest.mark.parametrize('config', ['Int8WeightOnlyConfig', 'Int8DynamicActivationInt8WeightConfig'])
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_torchao(config, name):
    """Linear layers, the classifier's and those of AdaKern."""
    torchao = pytest.importorskip('torchao.quantization')
    model = create_fadc(name)
    expected = model(photos()).double()
    torchao.quantize_(model, getattr(torchao, config)())
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear and all(isinstance(m.weight, torchao.Int8Tensor) for m in linear)
    assert 0 < error(model(photos()), expected) < 0.02  # 0.0076
