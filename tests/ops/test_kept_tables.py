"""Tables that are made once: which are kept, and for how long."""
import threading

import pytest
import torch

from fadc_timm.ops.band_mix import fused
from fadc_timm.ops.band_mix.triton.tables import tables_of
from fadc_timm.ops.kept_tables import KeptTables
from fadc_timm.ops.neighborhood_attention import windows
from fadc_timm.ops.sampled_conv.gather import table
from tests.support.no_copies import no_copies

CUDA = torch.device('cuda', 0)


def make(n, device):
    return torch.arange(n, device=device)


def test_tables_that_a_graph_reads_are_kept(monkeypatch):
    """And no more of the others than a number, the oldest of which go; nothing of what a capture makes."""
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: capturing)
    tables = KeptTables(make, 2)
    with no_copies():
        capturing = False
        first, second = tables(3, CUDA), tables(4, CUDA)
        assert tables(3, CUDA) is first and tables(4, CUDA) is second
        capturing = True
        assert tables(4, CUDA) is second and tables(5, CUDA) is not tables(5, CUDA) and len(tables.kept) == 2
        capturing = False
        tables(6, CUDA)
        assert tables(4, CUDA) is second and tables(3, CUDA) is not first
        # they are none of those that are kept for a time
        assert [n for n, _ in tables.kept] == [6, 3] and tables(4, CUDA) is second
        capturing = True
        assert tables(4, CUDA) is second  # a second graph of that size
    assert list(tables.captured.values()) == [second]


FLOATS = (torch.float32, CUDA)


@pytest.mark.parametrize('tables, args', [
    (fused._axis, (8, (2, 4), *FLOATS)), (fused._opposites, (1, *FLOATS)), (tables_of, (8, 8, (2, 4), *FLOATS)),
    (table._line, (3, 1, -1, (3,), *FLOATS)), (table._first_rows, (2, 2, 9, 1, torch.int32, CUDA)),
    (windows._tables_of, (4, 6, 1, 3, *FLOATS))])
def test_tables_of_operators(tables, args, monkeypatch):
    """None that a capture makes is found by a later call."""
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    with no_copies():
        assert tables(*args) is not None and args not in tables.kept and args not in tables.captured


def test_tables_of_bands_are_made_with_a_graph():
    """The first run of what torch.compile makes may be one in which nothing may be kept."""
    made = []

    def backend(graph, inputs):
        made.extend(fused._axis.kept)
        return graph.forward

    x, steps = torch.randn(1, 4, 37, 39), torch.randn(1, 3, 37, 39)
    with torch.no_grad():
        torch.compile(fused.mix_low_passes, fullgraph=True, backend=backend)(x, steps, [2, 4])
    assert {n for n, *_ in made} >= {37, 39}


def test_second_graph_reads_the_tables_of_the_first(monkeypatch):
    """Also where other tables of the same arguments have been made meanwhile, as by another thread."""
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    tables = KeptTables(make)
    with no_copies():
        tables.kept[3, CUDA] = first = make(3, CUDA)
        assert tables(3, CUDA) is first
        tables.kept[3, CUDA] = make(3, CUDA)
        assert tables(3, CUDA) is first and tables.captured[3, CUDA] is first


def test_a_smaller_number_is_kept():
    """The number may have been exceeded, as a user may lower it."""
    tables, device = KeptTables(make, 4), torch.device('cpu')
    for n in range(4):
        tables(n, device)
    tables.most = 2
    tables(4, device)
    assert [n for n, _ in tables.kept] == [3, 4]


def test_threads():
    """Two that make the same tables get the same ones, and none fails in dropping old ones."""
    device, met = torch.device('cpu'), threading.Barrier(2)

    def make_together(n, device):
        met.wait(10)
        return make(n, device)

    tables, found = KeptTables(make_together, 2), {0: [], 1: []}

    def run(i):
        for n in range(20):
            found[i].append(tables(n, device))

    threads = [threading.Thread(target=run, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found[0]) == len(found[1]) == 20 and len(tables.kept) <= 2
    assert all(a is b for a, b in zip(*found.values(), strict=True))


@pytest.mark.parametrize('inference', [False, True])
def test_tables_take_part_in_training(inference):
    tables = KeptTables(lambda device: torch.ones(2, device=device))
    with torch.inference_mode(inference):
        made = tables(torch.device('cpu'))
    x = torch.ones(2, requires_grad=True)
    (made * x).sum().backward()
    assert not made.requires_grad and torch.equal(x.grad, made)
