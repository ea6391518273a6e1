"""What a step of scripts.segmentation.train is made with: its recipe, its learning rates and its batch."""
import numpy as np
import pytest
import torch
from torch import nn

from scripts.segmentation.recipe import Recipe
from scripts.training.batches import Samples, step_batches
from scripts.training.optimizer import poly_schedule, rate_groups
from scripts.training.variants import added_keys, apply_variant
from tests.support.segmentation_cases import Pictures, backbone, transform

pytestmark = pytest.mark.usefixtures('one_thread')


# recipe


@pytest.mark.parametrize('variant', ['plain', 'fadc', 'dcnv2'])
def test_groups(variant):
    net = backbone()
    apply_variant(net, variant)
    groups = rate_groups(net, 10.0, 0.05)
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(id(p) for p in net.parameters())
    names, added = {id(p): n for n, p in net.named_parameters()}, set(added_keys(net))
    for g in groups:
        for p in g['params']:
            assert g['weight_decay'] == (0.05 if p.ndim > 1 else 0)
            assert g['lr_scale'] == (10 if names[id(p)] in added else 1)
    assert len(groups) == (2 if variant == 'plain' else 4)


def test_schedule():
    groups = [{'params': [nn.Parameter(torch.zeros(1))], 'lr_scale': scale} for scale in (1.0, 10.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = poly_schedule(optimizer, steps=20, power=0.9, warmup=5)
    for step in range(20):
        schedule.step_update(num_updates=step)
        expected = 1e-2 * step / 5 if step < 5 else 1e-2 * (1 - step / 20) ** 0.9
        assert [g['lr'] for g in optimizer.param_groups] == pytest.approx([expected, 10 * expected])


@pytest.mark.parametrize('values, message', [
    ({'steps': 0}, 'steps must be above 0'), ({'clip': -1.0}, 'clip must be finite'), ({'ema': 1.0}, 'ema must be'),
    ({'amp': 'half'}, 'amp must be'), ({'warmup': 160_000}, 'warmup must be shorter'),
    ({'batch': 1}, 'batch must give each of 1 processes'),
])
def test_recipe_errors(values, message):
    Recipe().check(8)
    with pytest.raises(ValueError, match=message):
        Recipe(**values).check()


# batches


def test_batches():
    """A function of seed and step: wherever one begins, and however many processes there are."""
    whole = [x for x, _ in step_batches(Samples(Pictures(), transform, 7), 0, 5, 4)]
    later = [x for x, _ in step_batches(Samples(Pictures(), transform, 7), 3, 5, 4)]
    assert len(whole) == 5 and all(torch.equal(a, b) for a, b in zip(whole[3:], later))
    shares = [list(step_batches(Samples(Pictures(), transform, 7), 0, 5, 4, rank, 2)) for rank in range(2)]
    assert all(torch.equal(a, torch.cat([b[0], c[0]])) for a, b, c in zip(whole, *shares))
    loaded = [x for x, _ in step_batches(Samples(Pictures(), transform, 7), 0, 5, 4, workers=1)]
    assert all(torch.equal(a, b) for a, b in zip(whole, loaded))
    samples = Samples(Pictures(), transform, 7)
    epochs = [[samples.index(5 * e + i) for i in range(5)] for e in range(4)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert not torch.equal(samples[0][0], Samples(Pictures(), transform, 8)[0][0])
    with pytest.raises(ValueError, match='batch size 4 is no multiple of the 3'):
        step_batches(samples, 0, 5, 4, 0, 3)


def test_groups_of_batches():
    """Batches of one group as far as it fills them; all images in each epoch, in an order of its own."""
    groups = [0, 0, 0, 1, 1, 0, 0]

    class Seven(Pictures):
        def __len__(self):
            return 7

    samples = Samples(Seven(), transform, 7, groups, batch=2)
    assert samples.epoch_length == 8
    epochs = [np.array([samples.index(8 * e + i) for i in range(8)]).reshape(4, 2) for e in range(4)]
    for batches in epochs:
        assert set(batches.ravel()) == set(range(7))
        assert sum(groups[a] != groups[b] for a, b in batches) <= 1
    assert len({tuple(batches.ravel()) for batches in epochs}) > 1
    again = Samples(Seven(), transform, 7, groups, batch=2)
    assert [again.index(i) for i in range(16, 24)] == list(epochs[2].ravel())
