"""Functions that are recorded and replayed: the same results on other tensors, in memory of their own."""
import functools

import pytest
import torch

from fadc_timm.ops import triton_support
from fadc_timm.ops.recorded import Program, Programs, addresses_of, record
from fadc_timm.ops.triton_support import Launch
from tests.support.by_address import launches_by_address

pytest.importorskip('triton')
pytestmark = pytest.mark.usefixtures('one_thread', 'skip_unless_triton_runs')

TABLE = torch.arange(6.).view(2, 3)
CPU = pytest.mark.parametrize('device', ['cpu'])


@pytest.fixture(params=['cpu', 'by_address', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A CPU, where kernels of the interpreter get tensors; or, as on a GPU, addresses; and a GPU."""
    if request.param == 'by_address':
        launches_by_address(monkeypatch)
    return 'cpu' if request.param == 'by_address' else request.param


@functools.cache
def table(device):
    return TABLE.to(device)


@functools.cache
def kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def scale(x, y, n, factor, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < n, other=0.)
        tl.store(y + i, value * factor if factor is not None else value, mask=i < n)

    return scale


def scaled(x, factor):
    y = torch.empty_like(x)
    triton_support.launch(Launch(kernel(), (1,), (x.numel(), factor), (64,)), x, y)
    return y


def function(x, weight, bias, missing):
    """Views, blocks that are there one after another, products into given memory, results, a constant."""
    assert missing is None
    rows = x[1:].t()  # a view of an input, behind its start
    a = scaled(rows.contiguous(), 2.)
    b = torch.empty(3, 5, device=x.device)
    torch.mm(a, weight, out=b)
    c = x.new_empty((3, 5))
    triton_support.launch(Launch(kernel(), (1,), (15, 3.), (64,)), b, c)
    c[0] += bias
    d = table(x.device) @ c
    kept = torch.empty(2, 2, 5, device=x.device)
    kept[1].copy_(d)
    kept[0].zero_()
    y = torch.empty(3, 5, device=x.device)
    y.copy_(c)
    return [y.t(), d.sum(1), kept[1], None, x, b[1:]]


def inputs(device):
    return *[torch.randn(*size).to(device) for size in ((5, 3), (4, 5), (5,))], None


def assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert a.shape == e.shape and a.stride() == e.stride() and torch.equal(a, e)


def test_replay(device):
    given = inputs(device)
    results, program = record(function, given, 2)
    assert_equal(results, function(*given))
    calls = []
    for _ in range(2):
        given = inputs(device)
        own, saved = program(given, addresses_of(given))
        calls.append((given, own, saved))
    for given, own, saved in calls:  # the second call left the results of the first alone
        assert_equal([*own, *program.others(given, saved)], function(*given))
        memory = [t.untyped_storage().data_ptr() for t in (*own, *saved)]
        assert len(set(memory)) == len(memory) and len(saved) == program.saved


def test_inputs_may_start_anywhere(device):
    _, program = record(function, inputs(device), 2)
    x, weight, bias, _ = inputs(device)
    given = torch.cat((torch.zeros(4, 3, device=device), x))[4:], weight, bias, None
    assert given[0].storage_offset() == 12
    own, saved = program(given, addresses_of(given))
    assert_equal([*own, *program.others(given, saved)], function(*given))


@CPU
def test_blocks_share_memory(device):
    """What is not there at the same time."""
    sizes = []

    def step(x):
        y = x.new_empty((256,))
        torch.add(x, 1, out=y)
        return y

    def chain(x):
        for _ in range(6):
            x = step(x)
        return [x.clone()]

    _, program = record(chain, (torch.zeros(256),), 1)
    empty = torch.empty_strided
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, 'empty_strided', lambda size, *args, **options: sizes.append(size) or empty(
            size, *args, **options))
        x = torch.randn(256)
        (y,), saved = program((x,), addresses_of((x,)))
    assert torch.equal(y, x + 1 + 1 + 1 + 1 + 1 + 1) and not saved
    assert sizes == [(2048,)]  # bytes, of two tensors


@CPU
def test_large_results_are_dropped_early(device):
    def chain(x):
        y = x * 2  # 4 MB
        z = y.sum()
        return [(z + 1) * z]

    _, program = record(chain, (torch.ones(2 ** 20),), 1)
    x = torch.randn(2 ** 20)
    assert torch.equal(program((x,), addresses_of((x,)))[0][0], chain(x)[0])
    assert any(step.__name__ == 'drop' for step in program._steps)


@CPU
@pytest.mark.parametrize('name, function, given', [
    ('number', lambda x: [x * x.sum().item()], (torch.ones(3),)),
    ('list', lambda x: [torch.cat((x, x))], (torch.ones(3),)),
    ('same_memory', lambda x, y: [x + y], (TABLE[0], TABLE[1])),
    ('input', lambda x: [x[1:]], (torch.ones(3),)),
    ('constant', lambda x: [TABLE], (torch.ones(3),)),
    ('dtype', lambda x: [x.view(torch.int32) + 1], (torch.ones(3),)),
])
def test_what_cannot_be_replayed(name, function, given, device):
    results, program = record(function, given, 1)
    assert program is None
    assert_equal(results, function(*given))


@CPU
def test_programs(device):
    """The first call of a kind runs, the second is recorded; only so many kinds are kept."""
    calls, programs = [], Programs(most=2)

    def double(x):
        calls.append(x)
        return [x * 2]

    x = torch.ones(3)
    for kind, kept in (('a', False), ('a', True), ('b', False), ('c', False), ('a', False)):
        assert torch.equal(programs.run(kind, double, (x,), 1)[0], 2 * x)
        assert (type(programs.find(kind)) is Program) == kept
    assert len(calls) == 5
    at_once = Programs(at_once=True)
    at_once.run('a', double, (x,), 1)
    assert type(at_once.find('a')) is Program
    plain = Programs()
    for _ in range(3):
        plain.run('a', lambda x: [x * x.sum().item()], (x,), 1)
        assert plain.find('a') is None


@CPU
def test_launches_are_seen_as_well(device, monkeypatch):
    """What takes the place of `launch`, to count, is told each launch once while it is recorded."""
    seen, launch = [], triton_support.launch
    monkeypatch.setattr(triton_support, 'launch', lambda this, *t: seen.append(this) or launch(this, *t))
    record(function, inputs(device), 2)
    assert len(seen) == 2
