"""The detectors: their pyramids, what is frozen, and that variants start alike."""
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import fadc_timm
from scripts.detection.model import DETECTORS, build, freeze
from scripts.detection.recipe import Objective, Recipe
from scripts.detection.transforms import TrainTransform
from scripts.training.optimizer import rate_groups
from tests.support.segmentation_cases import BACKBONES, awake

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = dict(fpn_channels=16, short=(64,), long=96)


def batch(masks=False):
    torch.manual_seed(5)
    images = [torch.rand(3, 64, 80), torch.rand(3, 80, 64)]
    targets = [{'boxes': torch.tensor([[4., 6., 40., 50.], [20., 8., 60., 30.]]), 'labels': torch.tensor([1, 2])},
               {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.int64)}]
    if masks:
        for image, target in zip(images, targets):
            target['masks'] = torch.ones(len(target['labels']), *image.shape[1:], dtype=torch.uint8)
    return images, targets


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('detector', [
    pytest.param(name, marks=[pytest.mark.sweep] if name == 'mask_rcnn' else []) for name in DETECTORS])
def test_detectors(name, detector):
    """A step of training, whose gradients reach what FADC adds, and detections."""
    built = build(name, 2, 'fadc', detector, **SMALL)
    objective = Objective(awake(built.model))
    loss = objective(*batch(detector == 'mask_rcnn'))
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite() and built.replaced
    grads = {n: p.grad for n, p in built.model.named_parameters()}
    assert all(g is not None for n, g in grads.items() if '.fpn.' in n or 'head' in n)
    assert all(grads[n] is not None for n in grads if '.ada_dr.' in n or '.freq_select.' in n)
    with torch.no_grad():
        outputs = built.model.eval()(batch()[0])
    assert len(outputs) == 2 and {'boxes', 'labels', 'scores'} <= set(outputs[0])
    levels = built.model.backbone(torch.rand(1, 3, 64, 96))
    sizes = [tuple(level.shape[-2:]) for level in levels.values()]
    assert sizes[:2] == ([(8, 12), (4, 6)] if detector == 'retinanet' else [(16, 24), (8, 12)])


def test_variants_start_alike():
    """The same losses, as variants compute the plain network at the start and draw the same random numbers."""
    losses = []
    for variant in ('plain', 'fadc', 'dcnv2', 'dcnv2_fadc'):
        model = awake(build('test_resnet', 2, variant, seed=4, **SMALL).model)
        model.backbone.eval()
        torch.manual_seed(2)
        losses.append(Objective(model)(*batch()).item())
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-3)
    model = awake(build('test_resnet', 2, 'plain', seed=5, **SMALL).model)
    torch.manual_seed(2)
    assert Objective(model)(*batch()).item() != pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize('variant', ['fadc', 'dcnv2_fadc'])
def test_frozen(variant):
    """Frozen stages and norms do not change; what the variant added trains in frozen stages too, AdaKern's norm too."""
    model = awake(build('test_resnet', 2, variant, **SMALL).model)  # frozen norms of weight 0 would hide the branches
    net = model.backbone.timm_model
    freeze(net, 3, True)
    added = {n for n, m in net.named_modules() if isinstance(m, fadc_timm.FADConv2d)}
    assert any(n.startswith('layer2') for n in added)
    norms = {n: m for n, m in net.named_modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))}
    assert all(isinstance(m, FrozenBatchNorm2d) != ('ada_kern' in n) for n, m in norms.items())
    assert any('ada_kern' in n for n in norms)
    recipe = Recipe(steps=2, batch=2, lr=0.1, fadc_lr=1.0, warmup=0)
    objective = Objective(model).train()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    optimizer = recipe.make_optimizer(objective)
    for _ in range(2):
        optimizer.zero_grad()
        objective(*batch()).backward()
        optimizer.step()
    same = {n for n, v in net.state_dict().items() if torch.equal(v, before[n])}
    base = {n for n in before if not any(n.startswith(f'{a}.') and n[len(a) + 1:] not in ('weight', 'bias')
                                         for a in added)}
    still = {n for n in base if not n.startswith('layer4')}
    norms_of_base = {n for n in base if isinstance(net.get_submodule(n.rpartition('.')[0]), FrozenBatchNorm2d)}
    assert still | norms_of_base <= same
    assert not {n for n in same if n in base and n.startswith('layer4') and 'conv' in n}
    moved = {n for n in before if n not in same and n.startswith('layer2')}
    assert any('ada_kern.norm.running_mean' in n for n in moved) and any('freq_select' in n for n in moved)
    assert any(('ada_dr' if variant == 'fadc' else 'free_offsets') in n for n in moved)


def test_frozen_stages_without_frozen_norms():
    """Norms of frozen stages are frozen, as theirs are part of the stage."""
    built = build('test_resnet', 2, 'fadc', frozen_stages=1, **SMALL)
    net = built.model.backbone.timm_model
    frozen = {n.partition('.')[0] for n, m in net.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    assert 'layer1' in frozen and not frozen & {'layer2', 'layer3', 'layer4'}
    trained = {n.partition('.')[0] for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {'layer2', 'layer3', 'layer4'} and built.frozen.startswith('1 stages with ')
    assert sum(len(g['params']) for g in rate_groups(built.model, 0.1, 1e-4)) == sum(
        p.requires_grad for p in built.model.parameters())


@pytest.mark.parametrize('args, kwargs, message', [
    (('resnet51', 2), {}, "timm has no model 'resnet51'"),
    (('test_resnet', 2, 'plain', 'yolo'), {}, "There is no detector 'yolo': the detectors are faster_rcnn"),
    (('test_vit', 2), {}, 'faster_rcnn needs a feature map at each of the strides 4, 8, 16, 32; those of test_vit'),
    (('test_resnet', 2), dict(backbone_args=dict(output_stride=8)), 'those of test_resnet have 2, 4, 8, 8, 8'),
    (('test_resnet', 2), dict(frozen_stages=5), '--frozen-stages must be at most the 4 stages of the network, got 5'),
])
def test_build_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(*args, **{**SMALL, **kwargs})


def test_schedule():
    """The learning rate of each step: warm-up, then a tenth after 8 and after 11 of 12 epochs; FADC's is a part."""
    recipe = Recipe(steps=24, batch=8, lr=0.01, warmup=4)
    recipe.check()
    optimizer = recipe.make_optimizer(build('test_resnet', 2, 'fadc', **SMALL).model)
    schedule = recipe.make_schedule(optimizer)
    rates = []
    for step in range(24):
        schedule.step_update(num_updates=step)
        rates.append({round(g['lr'] / g['lr_scale'], 9) for g in optimizer.param_groups})
    expected = [0.01 * step / 4 for step in range(4)] + [0.01] * 12 + [0.001] * 6 + [0.0001] * 2
    assert [rate.pop() for rate in rates] == pytest.approx(expected) and not any(rates)
    assert {g['lr_scale'] for g in optimizer.param_groups} == {1, 0.1}


@pytest.mark.parametrize('values, message', [
    ({'milestones': (9.0, 8.0)}, 'milestones must ascend'), ({'milestones': (13.0,)}, 'up to the 12 epochs'),
    ({'optimizer': 'adam'}, 'optimizer must be sgd or adamw'), ({'epochs': 0.0}, 'epochs must be above 0'),
    ({'batch': 3}, 'batch must give each of 2 processes the same number of images, at least 1, got 3')])
def test_recipe_errors(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{'steps': 1000, **values}).check(2)


def test_flips():
    """A pixel marked in the image stays inside of its box and its mask, whichever way the image is flipped."""
    import numpy as np
    image = np.zeros((20, 30, 3), np.uint8)
    image[3, 5] = 255
    mask = np.zeros((1, 20, 30), np.uint8)
    mask[0, 2:6, 4:10] = 1
    target = {'boxes': np.array([[4, 2, 10, 6]], np.float32), 'labels': np.array([1]), 'masks': mask}
    seen = set()
    for seed in range(20):
        x, y = TrainTransform(0.5, 0.5)(image, target, np.random.default_rng(seed))
        row, column = (int(v) for v in np.argwhere(x[0].numpy())[0])
        left, top, right, bottom = y['boxes'][0].tolist()
        assert left <= column < right and top <= row < bottom and (right - left, bottom - top) == (6, 4)
        inside = y['masks'][0].numpy()
        assert inside.sum() == 24 and inside[int(top):int(bottom), int(left):int(right)].all()
        seen.add((row, column))
    assert seen == {(3, 5), (3, 24), (16, 5), (16, 24)}
    with pytest.raises(ValueError, match='--flip-vertical is a probability, got 2'):
        TrainTransform(0.5, 2)
