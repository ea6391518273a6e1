"""Counters of multiply-adds that see modules: with our hooks they count a layer as torch's counter does."""
import pytest
import timm
import torch

from fadc_timm import FADConv2d
from fadc_timm.models.cost import module_cost
from fadc_timm.ops import flops
from tests.support.integration_cases import models, uses
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')
SIZE = (3, 64, 64)


def gmacs(name):
    return module_cost(timm.create_model(name, device='meta').eval(), SIZE).gmacs


@models
def test_layer_multiply_adds(name):
    """Those of all layers, and of the network without them, are those of the network; nothing is changed or run."""
    model = off_identity(timm.create_model(name)).eval()
    layers = [m for m in model.modules() if isinstance(m, FADConv2d)]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    counts, calls = [], []
    handles = [m.register_forward_hook(lambda m, args, y: counts.append(flops.layer_multiply_adds(m, args[0])))
               for m in layers]
    handles += [m.ada_dr.register_forward_hook(lambda *args: calls.append(1)) for m in layers]
    with torch.no_grad():
        model(torch.randn(1, *SIZE))
    for handle in handles:
        handle.remove()
    assert len(counts) == len(calls) == len(layers)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, *SIZE))
    of_layers = sum(
        sum(c.values()) for module, c in counter.flop_counts.items()
        if module.count('.') and any(module.endswith(f'.{n}') for n, m in model.named_modules() if m in layers))
    assert sum(counts) == of_layers // 2


@uses('thop', 'profile, with fadc_timm.ops.flops.thop_hook')
@models
def test_thop(name):
    thop = pytest.importorskip('thop')
    model = timm.create_model(name).eval()
    macs, _ = thop.profile(
        model, inputs=(torch.randn(1, *SIZE),), custom_ops={FADConv2d: flops.thop_hook}, verbose=False)
    assert macs / 1e9 == pytest.approx(gmacs(name), rel=0.03)  # thop counts norms and poolings too
    plain, _ = thop.profile(timm.create_model(name).eval(), inputs=(torch.randn(1, *SIZE),), verbose=False)
    assert plain < 0.95 * macs


@uses('ptflops', "get_model_complexity_info, backend='pytorch', with fadc_timm.ops.flops.ptflops_hook")
@models
def test_ptflops(name):
    ptflops = pytest.importorskip('ptflops')
    macs, _ = ptflops.get_model_complexity_info(
        timm.create_model(name), SIZE, as_strings=False, print_per_layer_stat=False, backend='pytorch',
        custom_modules_hooks={FADConv2d: flops.ptflops_hook})
    assert macs / 1e9 == pytest.approx(gmacs(name), rel=0.06)  # ptflops counts norms and activations too
