"""Devices that lack what a CPU has: float64 and complex numbers, as Apple's MPS, and sums of int64 by index."""
import copy

import pytest
import timm
import torch

from fadc_timm import losses, visualize
from fadc_timm.ops import low_pass, set_backend
from fadc_timm.ops.band_mix import fused
from fadc_timm.ops.kept_tables import KeptTables
from tests.support.layer_cases import FAD_CONV, ids, make
from tests.support.off_identity import off_identity
from tests.support.play_device import DEVICE, PlayTensor, play_device

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(fused, '_axis', KeptTables(fused._make_axis))
    with play_device():
        yield DEVICE


def test_the_device_is_one(device):
    """It computes, and lacks what it should."""
    x = torch.arange(6., device=device).view(2, 3)
    assert isinstance(x, PlayTensor) and x.device == device and (x.to('cpu') * 2).sum() == 30
    assert torch.nn.Linear(3, 2).to(device)(x).device == device
    for refused in (lambda: x.double(), lambda: torch.zeros(2, dtype=torch.float64, device=device),
                    lambda: torch.fft.rfft2(x), lambda: torch.arange(3, device=device).scatter_add(
                        0, torch.zeros(3, dtype=torch.int64, device=device), torch.arange(3, device=device))):
        with pytest.raises(TypeError, match='mps has no'):
            refused()
    with pytest.raises(RuntimeError, match='on mps and on the CPU'):
        _ = x + torch.ones(2, 3)


def outputs(model, x):
    """The output and all gradients, on the CPU."""
    x = x.detach().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad((y * y).sum(), [x, *model.parameters()])
    return [t.detach().to('cpu') for t in (y, *grads)]


@pytest.mark.parametrize('backend', [None, 'grid_sample'])
@pytest.mark.parametrize('cfg', FAD_CONV, ids=ids)
def test_layer(cfg, backend, device):
    m = off_identity(make(**cfg)).eval()
    x = torch.randn(2, 4, 7, 10)
    with set_backend('grid_sample'):
        expected = outputs(m, x)
    with set_backend(backend):
        actual = outputs(copy.deepcopy(m).to(device), x.to(device))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


def test_low_pass(device):
    x = torch.randn(1, 2, 8, 9)
    for a, e in zip(low_pass(x.to(device), [2, 4]), low_pass(x, [2, 4])):
        torch.testing.assert_close(a.to('cpu'), e)


@pytest.mark.parametrize('name', ['test_resnet_fadc', 'test_convnext_fadc'])
def test_network_loss_and_figures(name, device):
    model = off_identity(timm.create_model(name, pretrained=False)).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = visualize.collect_spectra(model, x), visualize.collect(model, x)
    model, x = model.to(device), x.to(device)
    spectra, records = visualize.collect_spectra(model, x), visualize.collect(model, x)
    for a, e in zip(spectra, expected[0], strict=True):
        assert abs(visualize.spectrum.high_share(a.selected) - visualize.spectrum.high_share(e.selected)) < 1e-3
    for r, e in zip(records, expected[1], strict=True):
        torch.testing.assert_close(r.dilation, e.dilation, rtol=1e-3, atol=1e-3)
    with losses.record_dilations(model) as kept:
        logits = model.train()(x.repeat(2, 1, 1, 1))
    loss = logits.square().mean() + losses.dilation_frequency_loss(kept)
    loss.backward()
    assert all(p.grad is not None and p.grad.to('cpu').isfinite().all() for p in model.parameters())
