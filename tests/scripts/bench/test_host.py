"""The benchmark of host time: what it counts, on a stand-in for the function that all launches go through."""
import sys
import types

import pytest
import torch

from fadc_timm.layers import one_call
from fadc_timm.ops import triton_support
from scripts.bench import host
from scripts.bench.op import SHAPES
from scripts.bench.subjects import Setting


@pytest.fixture
def hook(monkeypatch):
    """A module with the functions, which would fail if they were called."""
    module = types.ModuleType(host.HOOK)
    module.launch_now = module.relaunch_of = lambda *args: 1 / 0
    monkeypatch.setitem(sys.modules, host.HOOK, module)
    return module


def test_launches_are_counted_and_do_not_run(hook):
    before, programs = hook.launch_now, one_call.programs
    with host.without_launches() as kernels:
        hook.launch_now('kernel', 'tensor')
        hook.relaunch_of('replayed', ('tensor',))(0, 1)
        assert one_call.programs is not programs  # a test in this process is not to replay what launches nothing
    assert kernels == ['kernel', 'replayed']
    assert hook.launch_now is before and hook.relaunch_of is before and one_call.programs is programs


@pytest.mark.parametrize('name', ['launch_now', 'relaunch_of'])
def test_no_such_function(name, hook):
    delattr(hook, name)
    with pytest.raises(RuntimeError, match=f'no function `{name}`'), host.without_launches():
        pass


def test_count(hook):
    x = torch.randn(4, 6)

    def call():
        y = x.t().reshape(24)  # a view, and a copy within
        y.reshape(2, 12).contiguous().to(torch.float32)  # nothing
        hook.launch_now('kernel', 'tensor')
        return torch.empty_like(y), (y + 1).sum()

    with host.without_launches() as kernels:
        assert host.count(call, kernels) == host.Count(operators=7, computing=3, launches=1)


def test_passes():
    made = host.Pass(lambda x, w, _: x @ w, [torch.randn(3, 4), torch.randn(4, 5), None], Setting(amp='bfloat16'))
    assert made.y.dtype == torch.bfloat16 and made.grad.shape == (3, 5)
    made.backward()


def test_time_leaves_out_what_prepares(monkeypatch):
    now = [0.]
    monkeypatch.setattr(host.time, 'perf_counter', lambda: now[0])

    def take(seconds):
        now[0] += seconds

    assert host.host_time(lambda: take(0.002), lambda: take(5.), 'cpu') == pytest.approx(2.)


def test_shapes():
    assert [s.net for s in host.select_shapes(['*'])] == list(dict.fromkeys(s.net for s in SHAPES))
    assert host.select_shapes(['nothing']) == []


def test_rows(monkeypatch, tmp_path):
    if triton_support.why_not_on('cpu') is not None:
        pytest.skip(triton_support.why_not_on('cpu'))
    monkeypatch.setattr(host, 'CALLS', 1)
    args = types.SimpleNamespace(device='cpu', amp='', repeats=1)
    rows = host.measure(host.select_shapes(['resnet50'])[0], args)
    assert {r['variant'] for r in rows} == {'operator', 'layer', 'freq_select'}
    values = {(r['variant'], r['what']): float(r['median']) for r in rows}
    for variant in ('operator', 'layer', 'freq_select'):
        assert values[variant, 'forward launches'] >= 1
        assert values[variant, 'forward kernels'] >= values[variant, 'forward launches']
        assert values[variant, 'backward host time'] > 0
