"""Fine-tuning on real images: what FADC adds learns, in every precision, and timm's training machinery works.

Elsewhere: groups of layer decay and weight decay, gradient checkpointing and drop path alone (models/test_models.py),
several processes (test_distributed.py).
"""
import functools
import math

import pytest
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from fadc_timm import FADConv2d
from tests.support.backbones import PACKAGE
from tests.support.integration_cases import models, opened, uses
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')

CLASSES = 4


@functools.cache
def photograph():
    """The photograph in the package (3, H, W), in the range of the weights in the package."""
    image = pil_to_tensor(Image.open(PACKAGE / 'data' / 'coffee.jpg').convert('RGB'))
    return image.float() / 127.5 - 1


def crops(step, number=16, size=48):
    """Random crops of the photograph, and which quarter of it each is from."""
    generator = torch.Generator().manual_seed(step)
    photo = photograph()
    h, w = (n // 2 for n in photo.shape[1:])
    labels = torch.arange(number) % CLASSES
    images = []
    for label in labels.tolist():
        top, left = (int(torch.randint(n - size, (), generator=generator)) for n in (h, w))
        top, left = top + label // 2 * h, left + label % 2 * w
        images.append(photo[:, top:top + size, left:left + size])
    return torch.stack(images), labels


def lifted(**kwargs):
    """A trained plain network as an FADC model: FADC at the identity."""
    trained = timm.create_model('test_resnet_fadc', pretrained=True).state_dict()
    plain = timm.create_model('test_resnet', num_classes=6).state_dict()
    overlay = dict(state_dict={k: v for k, v in trained.items() if k in plain})
    torch.manual_seed(0)
    return timm.create_model('test_resnet_fadc', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=CLASSES,
                             **kwargs)


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, FADConv2d)}


def added(model):
    """Parameters of FreqSelect, AdaKern and AdaDR."""
    return {f'{name}.{n}': p for name, m in layers(model).items() for n, p in m.named_parameters()
            if n not in ('weight', 'bias')}


@torch.no_grad()
def dilations(model, x):
    maps = {}
    hooks = [m.ada_dr.register_forward_hook(lambda _, __, out, name=name: maps.update({name: out[0]}))
             for name, m in layers(model).items()]
    model(x)
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.sweep)], ids=str)
def test_new_parameters_train(dtype):
    """30 steps from lifted weights: every FADC parameter has moved, and dilations depend on the image."""
    model = lifted().train()
    before = {name: p.detach().clone() for name, p in added(model).items()}
    assert all(d.amin() == d.amax() for d in dilations(model, crops(0)[0]).values())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    scaler = torch.amp.GradScaler('cpu', enabled=dtype == torch.float16)
    losses = []
    for step in range(30):
        x, y = crops(step, number=8)
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < 0.6 * sum(losses[:5]), losses
    still = [name for name, p in added(model).items() if not (p - before[name]).abs().max() > 1e-5]
    assert not still, still
    for name, d in dilations(model.eval(), crops(99)[0]).items():
        assert d.isfinite().all() and d.std() > 1e-3, (name, d.std())


def train(folder, until, resume=None):
    """Steps with all that timm's train.py combines; returns the model, its average, and the losses."""
    torch.manual_seed(1)
    model = lifted(drop_path_rate=0.1)
    model.set_grad_checkpointing()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=2e-3, weight_decay=0.05, layer_decay=0.8)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=4, warmup_epochs=1, warmup_lr=1e-4, step_on_epochs=True)
    ema = ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder))
    start = 0
    if resume is not None:
        start = timm.models.resume_checkpoint(model, str(resume), optimizer=optimizer, log_info=False)
        timm.models.load_checkpoint(ema.module, str(resume), use_ema=True)
        scheduler.step(start)
    losses = []
    for epoch in range(start, until):
        torch.manual_seed(epoch)
        model.train()
        for i in range(4):
            x, y = crops(100 * epoch + i, number=8)
            with torch.autocast('cpu', torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=-losses[-1])
    return model, ema.module, losses


def test_timm_training(tmp_path):
    """AMP, EMA, layer decay, drop path, gradient checkpointing; resumed from a checkpoint, it goes on the same."""
    for name in ('whole', 'halves'):
        (tmp_path / name).mkdir()
    model, average, losses = train(tmp_path / 'whole', 4)
    assert all(map(math.isfinite, losses)) and sum(losses[-4:]) < sum(losses[:4])
    train(tmp_path / 'halves', 2)
    again, average_again, losses_again = train(tmp_path / 'halves', 4, resume=tmp_path / 'halves' / 'last.pth.tar')
    assert losses_again == losses[8:]
    for one, other in ((model, again), (average, average_again)):
        state = other.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in one.state_dict().items())
    # the checkpoint is one that create_model takes, the average first
    overlay = dict(file=str(tmp_path / 'whole' / 'last.pth.tar'), num_classes=CLASSES)
    loaded = timm.create_model('test_resnet_fadc', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = crops(7)[0]
    assert torch.equal(loaded(x), average.eval()(x)) and not torch.equal(loaded(x), model.eval()(x))


@uses('peft', 'LoRA on plain convolutions and linear layers: training step, merge')
@models
def test_lora(name):
    """With the targets of docs/fine_tuning.md: adapters are plain, and merging them changes nothing."""
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    # in float64: a network off its identity makes much of rounding
    model = off_identity(opened(timm.create_model(name, num_classes=CLASSES))).double().eval()
    inside = tuple(f'{layer}.' for layer in layers(model))
    targets = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)
               and getattr(m, 'groups', 1) == 1 and not n.startswith(inside)]
    assert len(targets) > 5
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2)).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    x, labels = crops(0)
    x = x.double()
    for _ in range(2):  # one half of an adapter starts at zero
        optimizer.zero_grad()
        nn.functional.cross_entropy(adapted(x), labels).backward()
        assert all(p.grad.isfinite().all() for p in trained)
        optimizer.step()
    assert all(p.grad.norm() > 0 for p in trained)
    adapters = [m for n, m in adapted.named_modules() if '.lora_' in n and isinstance(m, nn.Conv2d)]
    assert adapters and all(type(m) is nn.Conv2d for m in adapters)
    adapted.eval()
    with torch.no_grad():
        y = adapted(x)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(x), y, rtol=1e-8, atol=1e-8)
    changed = {k for k, v in merged.state_dict().items() if not torch.equal(v, before[k])}
    # peft compares the ends of names: a ResNet's `fc` is AdaKern's linear layer `ada_kern.fc` too
    assert {k.removesuffix('.weight') for k in changed if k.endswith('.weight')} <= {
        n for n, _ in merged.named_modules() if any(f'.{n}'.endswith(f'.{t}') for t in targets)}
    assert not any(f'{layer}.weight' in changed for layer in layers(merged))
    assert f'{targets[0]}.weight' in changed
