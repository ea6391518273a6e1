"""The recorder of dilations: what it holds of layers and models, also under checkpointing, autocast and DDP."""
import copy
import threading

import pytest
import timm
import torch
from torch import nn

from fadc_timm.layers import FADConv2d
from fadc_timm.layers.hooks import watch_layers
from fadc_timm.losses import dilation_frequency_loss, high_frequency_power, record_dilations

pytestmark = pytest.mark.usefixtures('one_thread')
MODEL = 'test_resnet_fadc'


def test_records_of_a_model():
    model = timm.create_model(MODEL)
    x = torch.randn(2, 3, 72, 104)
    with record_dilations(model) as records:
        model(x)
    names = [name for name, m in model.named_modules() if isinstance(m, FADConv2d)]
    assert [r.name for r in records] == names
    for r in records:
        assert r.dilation.shape == r.power.shape and r.power.min() >= 0
        assert r.dilation.requires_grad and not r.power.requires_grad
        torch.testing.assert_close(r.dilation, torch.ones_like(r.dilation), rtol=0, atol=2e-5)
    assert not any(m._forward_hooks for m in model.modules())
    count = len(records)
    model(x)
    assert len(records) == count  # nothing is recorded behind the block


def test_copy_is_not_recorded():
    """An average of the weights that is made in the block has the hooks, which a copy takes along."""
    model = timm.create_model(MODEL)
    with record_dilations(model) as records:
        model(torch.randn(1, 3, 64, 64))
        copied, count = copy.deepcopy(model), len(records)
        copied(torch.randn(1, 3, 64, 64))
        assert len(records) == count
    copied(torch.randn(1, 3, 64, 64))
    assert len(records) == count > 0


def test_replicas_in_threads():
    """DataParallel's replicas run beside each other: each record holds one replica's dilation and power."""
    model = nn.Sequential(FADConv2d(2, 2, 3, padding=1))
    replicas = [copy.deepcopy(model), copy.deepcopy(model)]
    meet, calls = threading.Barrier(2, timeout=60), []

    def wait(*_):
        meet.wait()

    def run(replica, x):
        for m in replica.modules():
            m._is_replica = True
        replica[0].ada_dr.register_forward_hook(wait)
        replica(x)

    with watch_layers(model, calls.append):
        for replica in replicas:
            replica[0]._forward_hooks = model[0]._forward_hooks.copy()
            replica[0]._forward_hooks_with_kwargs = model[0]._forward_hooks_with_kwargs.copy()
            for name in ('freq_select', 'ada_kern', 'ada_dr'):
                getattr(replica[0], name)._forward_hooks = getattr(model[0], name)._forward_hooks.copy()
        threads = [threading.Thread(target=run, args=(r, torch.randn(1, 2, size, size)))
                   for r, size in zip(replicas, (6, 9), strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(c.output.shape[-1] for c in calls) == [6, 9]
    assert all(c.dilation is not None and c.dilation.shape[2:] == c.output.shape[2:] for c in calls)


def test_power_is_that_of_what_the_layer_samples():
    layer = FADConv2d(4, 4, 3, padding=1, padding_mode='replicate')
    nn.init.normal_(layer.freq_select.conv.weight)
    x = torch.randn(1, 4, 12, 12)
    with record_dilations(layer) as records:
        layer(x)
    torch.testing.assert_close(records[0].power, high_frequency_power(layer.freq_select(x)))
    assert (records[0].power - high_frequency_power(x)).abs().max() > 1e-3


def test_layer_that_is_called_by_keyword():
    layer, x = FADConv2d(4, 4, 3, padding=1), torch.randn(1, 4, 12, 12)
    with record_dilations(layer) as records:
        layer(x)
        layer(x=x)
    torch.testing.assert_close(records[0].power, records[1].power)


@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing(reentrant):
    torch.manual_seed(1)
    model = timm.create_model(MODEL).train()
    x, kept = torch.randn(2, 3, 64, 64), []
    checkpointed = torch.utils.checkpoint.checkpoint
    for on in (False, True):
        model.zero_grad()
        with record_dilations(model) as records:
            if on:
                h = model.maxpool(model.act1(model.bn1(model.conv1(x))))
                h = h.detach().requires_grad_()
                for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
                    h = checkpointed(stage, h, use_reentrant=reentrant)
            else:
                model.forward_features(x)
        if on and reentrant:
            with pytest.raises(RuntimeError, match='reentrant'):
                dilation_frequency_loss(records)
            return
        dilation_frequency_loss(records).backward()
        kept.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and 'layer' in n})
    assert kept[0].keys() == kept[1].keys() and any('ada_dr.conv.weight' in n for n in kept[0])
    for name, grad in kept[0].items():
        torch.testing.assert_close(kept[1][name], grad, rtol=1e-4, atol=1e-6)


def test_timms_checkpointing():
    model = timm.create_model(MODEL).train()
    model.set_grad_checkpointing()
    with record_dilations(model) as records:
        logits = model(torch.randn(2, 3, 64, 64))
    (logits.square().mean() + 0.1 * dilation_frequency_loss(records)).backward()
    for layer in (m for m in model.modules() if isinstance(m, FADConv2d)):
        assert layer.ada_dr.conv.weight.grad.abs().max() > 0
    assert len(records) == sum(isinstance(m, FADConv2d) for m in model.modules())


def test_autocast():
    model = timm.create_model(MODEL).train()
    with torch.autocast('cpu', dtype=torch.bfloat16), record_dilations(model) as records:
        model(torch.randn(2, 3, 64, 64))
        loss = dilation_frequency_loss(records)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_distributed_data_parallel():
    """No parameter is left without a gradient, and the records are those of the module inside."""
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(timm.create_model(MODEL))
        for _ in range(2):  # the second step fails where the first left a parameter unused
            with record_dilations(model) as records:
                logits = model(torch.randn(2, 3, 64, 64))
            (logits.square().mean() + dilation_frequency_loss(records)).backward()
        assert [r.name for r in records][0] == 'module.layer2.0.conv1'
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_recorder_refuses():
    with pytest.raises(ValueError, match='no FADConv2d'), record_dilations(timm.create_model('test_resnet')):
        pass
    model = timm.create_model(MODEL)
    with pytest.raises(ValueError, match='none of the 5 FADC layers'), record_dilations(model):
        pass
    with pytest.raises(KeyError), record_dilations(model):  # what is raised inside comes out
        raise KeyError
    assert not any(m._forward_hooks for m in model.modules())

    layer = FADConv2d(3, 3, 3, padding=1, sampling='fixed')
    with record_dilations(layer) as records:
        layer(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match='no layer with AdaDR ran'):
        dilation_frequency_loss(records)

    with torch.no_grad(), record_dilations(model) as records:
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(RuntimeError, match='No dilation has a gradient'):
        dilation_frequency_loss(records)
    with torch.no_grad():
        dilation_frequency_loss(records)


def test_watched_call():
    """What a call holds is what the modules give, as often as the layer runs."""
    layer = FADConv2d(4, 6, 3, padding=1, kernel_decompose='high')
    x, calls = torch.randn(2, 4, 8, 9), []
    with watch_layers(nn.Sequential(layer), calls.append):
        layer(x)
        y = layer(x)
    assert [c.name for c in calls] == ['0', '0'] and calls[1].output is y and calls[1].layer is layer
    torch.testing.assert_close(calls[0].selected, layer.freq_select(x))
    assert calls[0].gains[0] is None and calls[0].gains[3].shape == (2, 6)
    assert calls[0].dilation.shape == (2, 1, 8, 9)
