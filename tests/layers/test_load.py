"""Under load: determinism, threads, memory over many sizes, and half precision beside the plain base's."""
import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import fadc_timm
from fadc_timm import FADConv2d
from fadc_timm.ops import list_backends
from fadc_timm.ops.band_mix import fused
from tests.support import cases
from tests.support.backbones import create_fadc, load, photos, trained
from tests.support.cases import CASES, error

SMALL = ('test_resnet_fadc', 'test_convnext_fadc')
CASE = {case.name: case for case in CASES}


def gradients(model, x):
    loss = model(x).float().square().mean()
    return torch.autograd.grad(loss, list(model.parameters()))


# determinism


@pytest.mark.parametrize('name', ['everything', 'depthwise', 'groups2', 'batch33'])
@pytest.mark.parametrize('backend', list_backends())
@pytest.mark.interpreted('groups2')
def test_backend_is_deterministic(backend, name, one_thread):
    """On a CPU every backend, output and all gradients, to the bit."""
    inputs = cases.make_inputs(CASE[name], torch.float32)
    if cases.why_not(CASE[name], inputs, backend):
        pytest.skip(cases.why_not(CASE[name], inputs, backend))
    first = cases.results(CASE[name], inputs, backend)
    for _ in range(3):
        again = cases.results(CASE[name], inputs, backend)
        assert all(torch.equal(t, again[key]) for key, t in first.items())


@pytest.mark.parametrize('name, threads', [
    pytest.param(SMALL[0], 1, marks=pytest.mark.sweep), (SMALL[1], 1), (SMALL[0], 2)])
def test_training_is_deterministic(name, threads, one_thread):
    """The same seed makes the same network, and two steps lead to the same weights."""
    torch.set_num_threads(threads)

    def run():
        torch.manual_seed(3)
        model = timm.create_model(name, num_classes=6)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(photos(40)), torch.arange(6))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.state_dict()

    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(t, second[key]) for key, t in first.items())


@pytest.mark.parametrize('name', [SMALL[0], pytest.param(SMALL[1], marks=pytest.mark.sweep)])
def test_number_of_threads(name, one_thread):
    """One and two threads agree within rounding, forward and backward."""
    model, x = create_fadc(name), photos(96)
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append((model(x).detach(), *gradients(model, x)))
    assert error(results[1][0], results[0][0].double()) < 1e-6  # 1.9e-7
    one, two = (torch.cat([t.flatten() for t in r[1:]]) for r in results)
    assert error(two, one.double()) < 2e-6  # 4.0e-7


@pytest.mark.parametrize('name', SMALL)
def test_one_model_in_two_threads(name, one_thread):
    """At once on maps of different sizes, forward and backward: as one after the other."""
    model = create_fadc(name)
    images = [photos(size)[i:i + 1] for i, size in enumerate((64, 80, 50, 97))]
    expected = [gradients(model, x) for x in images]
    logits = [model(x).detach() for x in images]
    wrong, start = [], threading.Barrier(2)

    def work(order):
        try:
            start.wait()
            for i in order * 3:
                same = all(map(torch.equal, gradients(model, images[i]), expected[i]))
                if not same or not torch.equal(model(images[i]), logits[i]):
                    wrong.append(i)
        except Exception as e:  # it would end with the thread
            wrong.append(e)

    workers = [threading.Thread(target=work, args=(order,)) for order in ([0, 1, 2, 3], [3, 1, 0, 2])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# memory


STEPS = """
import gc
import torch
from torch import nn
from fadc_timm import FADConv2d

torch.manual_seed(0)
net = nn.Sequential(FADConv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), FADConv2d(8, 8, 3, padding=1, groups=8))
optimizer = torch.optim.SGD(net.parameters(), 1e-3)
for step in range(160):
    b, h, w = (int(torch.randint(low, high, ())) for low, high in ((1, 3), (4, 29), (4, 29)))
    loss = net(torch.randn(b, 3, h, w)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (99, 159):
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        with open('/proc/self/statm') as file:
            held = int(file.read().split()[1]) * 4096
        print(held / 2 ** 20, sum(t.untyped_storage().nbytes() for t in tensors) / 2 ** 20)
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_memory_of_many_sizes():
    """160 training steps, nearly each of another size and batch. oneDNN's own caches, a thousand kernels, are off."""
    env = {**os.environ, 'LRU_CACHE_CAPACITY': '1', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY': '1', 'OMP_NUM_THREADS': '1',
           'PYTHONPATH': str(Path(fadc_timm.__file__).parents[1])}
    out = subprocess.run([sys.executable, '-c', STEPS], env=env, capture_output=True, text=True, check=True).stdout
    (held, alive), (held_at_end, alive_at_end) = (map(float, line.split()) for line in out.splitlines())
    assert held_at_end - held < 10  # 1.0 MB
    assert alive_at_end - alive < 1  # 0.01 MB


@torch.no_grad()
def test_axes_in_the_cache_are_few(one_thread):
    """More sizes than the cache holds: still right, and no more of them kept."""
    limit = fused._axis.most
    m = FADConv2d(2, 2, 3, padding=1, sampling='fixed', kernel_decompose='none')
    with torch.no_grad():
        m.freq_select.conv.weight.normal_()
    x = torch.randn(1, 2, 9, 5)
    expected = m(x)
    for n in range(1, limit + 20):
        m(torch.randn(1, 2, 2, n))
    assert len(fused._axis.kept) == limit
    assert torch.equal(m(x), expected)


# half precision


MEMBERS = {'resnet18': dict(layers=(1, 1, 1, 1)), 'resnext50_32x4d': dict(layers=(1, 1, 1, 1)), 'convnext_atto': {}}


@pytest.mark.parametrize('how', ['cast', 'autocast'])
@pytest.mark.parametrize(
    'dtype', [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.sweep)], ids=str)
@pytest.mark.parametrize('base', [
    'resnet18', pytest.param('resnext50_32x4d', marks=pytest.mark.sweep), 'convnext_atto'])
@torch.no_grad()
def test_half_precision(base, dtype, how, one_thread):
    """Error against float32: at most twice the plain model's, lifted from the same weights and away from them."""
    state, x = trained(base, **MEMBERS[base]), photos()
    classes = dict(num_classes=1000, **MEMBERS[base])

    def error_of(model):
        expected = model(x).double()
        if how == 'cast':
            return error(copy.deepcopy(model).to(dtype)(x.to(dtype)).float(), expected)
        with torch.autocast('cpu', dtype):
            return error(model(x).float(), expected)

    plain = error_of(load(base, state, **classes))
    lifted = load(f'{base}_fadc', state, **classes)
    assert 1e-4 < plain < 0.1
    away = create_fadc(f'{base}_fadc', std=0.2, **classes)
    away.get_classifier().bias -= away(x).mean(0)  # as in the base: no class is everyone's
    assert error_of(lifted) < 2 * plain  # 1.09
    assert error_of(away) < 2 * plain  # 1.30
