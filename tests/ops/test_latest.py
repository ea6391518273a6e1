"""Calls that are like an earlier one: what it holds for, and what a call must not differ in."""
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fadc_timm.ops import latest as module
from fadc_timm.ops.latest import Latest


class Subclass(nn.Parameter):
    pass


def tensors():
    x = torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last)
    return [x, None, nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4, 3)), None, torch.zeros(4)]


def test_like():
    """Values may differ, and who has the tensors."""
    latest = Latest(('a', 1), tensors(), 'value')
    assert latest.value == 'value'
    other = tensors()
    other[0] += 1
    assert latest.holds(('a', 1), other) and latest.holds(('a', 1), tuple(tensors()))
    with torch.no_grad():  # a fact, where it matters
        assert latest.holds(('a', 1), tensors())
    assert not latest.holds(('a', 2), tensors())


def replaced(i, t):
    def change(found):
        found[i] = t(found[i])
    return change


@pytest.mark.parametrize('change', [
    replaced(0, lambda t: t.contiguous()), replaced(0, lambda t: t[:1]), replaced(0, lambda t: t.half()),
    replaced(0, lambda t: t.to('meta')), replaced(0, lambda t: t.requires_grad_()), replaced(0, lambda t: None),
    replaced(0, lambda t: nn.Parameter(t, requires_grad=False)), replaced(0, torch._neg_view),
    replaced(1, lambda _: torch.zeros(4)), replaced(2, Subclass), replaced(2, lambda t: nn.Parameter(t.t())),
    replaced(2, lambda t: t.requires_grad_(False)), lambda found: found.reverse(),
    lambda found: found.__setitem__(slice(1, 3), found[2:0:-1]), lambda found: found.__setitem__(3, found[2])],
    ids=['layout', 'size', 'dtype', 'device', 'requires_grad', 'none', 'class', 'negative', 'not_none', 'subclass',
         'strides', 'frozen', 'order', 'another_is_none', 'twice'])
def test_unlike(change):
    found, latest = tensors(), Latest((), tensors(), None)
    assert latest.holds((), found)
    change(found)
    assert not latest.holds((), found)


def test_data_of_another_form():
    """No version of a parameter counts that."""
    found = tensors()
    latest = Latest((), found, None)
    found[2].data = found[2].data.t().contiguous().t()
    assert not latest.holds((), found)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('context', [
    lambda: torch.autocast('cpu', torch.bfloat16), torch.inference_mode, Mode], ids=['autocast', 'inference', 'mode'])
def test_contexts(context):
    """A call in a context is like another in such a context only."""
    outside = Latest((), tensors(), None)
    with context():
        inside = Latest((), tensors(), None)
        assert inside.holds((), tensors()) and not outside.holds((), tensors())
    assert outside.holds((), tensors()) and not inside.holds((), tensors())


def test_transforms():
    """Of torch.func; and a tangent is not seen, so forward-mode derivatives are for the caller to ask about."""
    latest, seen = Latest((), [torch.zeros(3)], None), []

    def f(x):
        seen.append(latest.holds((), [x]))
        return x.sum()

    torch.func.grad(f)(torch.zeros(3))
    torch.func.vmap(f)(torch.zeros(3, 3))
    assert seen == [False, False]
    with forward_ad.dual_level():
        assert latest.holds((), [forward_ad.make_dual(torch.zeros(3), torch.ones(3))])


def test_without_guards(monkeypatch):
    """A torch that lacks them: no call is like another."""
    monkeypatch.setattr(module, '_Guards', None)
    assert not Latest((), tensors(), None).holds((), tensors())
