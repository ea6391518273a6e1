#!/usr/bin/env python3
"""Host time of the Triton path: what a call costs in Python and torch where no kernel runs.

    python -m scripts.bench.host [--shapes 'resnet50*'] [--device cuda] [--amp float16]

What launches Triton's kernels, `launch_now` of `fadc_timm.ops.triton_support` and what its `relaunch_of` gives, is
replaced by a counter, so that results are not computed. Maps are tiny, so that next to nothing is left of torch's own
kernels. Calls are counted and timed once those of a layer are replayed, as from the third of a kind on. Variants:
`operator` with gains and mask, `layer`, and `freq_select`; each forward and backward. What, for each of the two:

* host time: milliseconds of a call, on one thread (on CUDA: until the call returns);
* operators: calls of torch's operators, those that torch makes within another not counted;
* launches: of Triton's kernels;
* kernels: the launches, and the operators that compute something, which are a kernel each at least.

There is nothing to compare with: the ratio of a row is its value. Rows go to scripts/results/bench_host.csv.
"""
from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fadc_timm.layers import one_call
from fadc_timm.ops import adaptive_dilated_conv2d, set_backend
from fadc_timm.ops.recorded import Programs
from scripts.bench.measure import environment, run_jobs
from scripts.bench.op import SHAPES, Shape, make_layer
from scripts.bench.subjects import AMP_DTYPES, Setting
from scripts.results import RESULTS, Row, make_rows

OUTPUT = RESULTS / 'bench_host.csv'
HOOK = 'fadc_timm.ops.triton_support'
# Side of the maps, largest number of channels of a layer, and calls whose time is one sample.
SIDE, MOST_CHANNELS, CALLS = 2, 64, 20
# Calls until those of a layer are replayed.
WARM_UP = 4
TARGETS = {('operator', 'forward host time'): 0.08, ('layer', 'forward kernels'): 20.}

# Operators that compute nothing where they call no other.
FREE = {
    'alias', 'as_strided', 'chunk', 'contiguous', 'detach', 'detach_', 'diagonal', 'empty', 'empty_like',
    'empty_strided', 'expand', 'expand_as', 'flatten', 'lift_fresh', 'movedim', 'narrow', 'new_empty',
    'new_empty_strided', 'permute', 'reshape', '_reshape_alias', 'resize_', 'resolve_conj', 'resolve_neg',
    'result_type', 'select', 'set_', 'slice', 'split', 'split_with_sizes', 'squeeze', 't', 'to', 'transpose',
    'type_as', 'unbind', 'unflatten', 'unfold', '_unsafe_view', 'unsqueeze', 'view', 'view_as'}


class Count(NamedTuple):
    """Of one call: torch's operators, those of them that compute something, and launches of Triton's kernels."""
    operators: int
    computing: int
    launches: int


@contextlib.contextmanager
def without_launches() -> Iterator[list[Any]]:
    """Replace every launch by nothing; the list has the kernel of each.

    Raises:
        RuntimeError: There are no functions that all launches go through.
    """
    hook = importlib.import_module(HOOK)
    before = {name: getattr(hook, name, None) for name in ('launch_now', 'relaunch_of')}
    for name, function in before.items():
        if not callable(function):
            raise RuntimeError(f'{HOOK} has no function `{name}` that launches go through.')
    kernels: list[Any] = []

    def launch_now(kernel: Any, *tensors: Any) -> None:
        kernels.append(kernel)

    def relaunch_of(kernel: Any, tensors: Any) -> Callable[..., None]:
        return lambda stream, *addresses: kernels.append(kernel)

    hook.launch_now, hook.relaunch_of = launch_now, relaunch_of  # type: ignore[attr-defined]
    # what is recorded here launches nothing later either
    programs, one_call.programs = one_call.programs, Programs()
    try:
        yield kernels
    finally:
        one_call.programs = programs
        for name, function in before.items():
            setattr(hook, name, function)


def _is_operator(event: Any) -> bool:
    return event.name.startswith('aten::')


def _within_another(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _is_operator(parent):
            return True
        parent = parent.cpu_parent
    return False


def _computes(event: Any) -> bool:
    children = [child for child in event.cpu_children if _is_operator(child)]
    if children:
        return any(_computes(child) for child in children)
    return event.name.removeprefix('aten::') not in FREE


def count(call: Callable[[], object], kernels: list[Any]) -> Count:
    """What one call asks for; kernels is the list of :func:`without_launches`."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # else it prints that there is no GPU
    before = len(kernels)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        call()
    outer = [e for e in prof.events() or [] if _is_operator(e) and not _within_another(e)]
    return Count(len(outer), sum(map(_computes, outer)), len(kernels) - before)


def host_time(call: Callable[[], object], prepare: Callable[[], object], device: str) -> float:
    """Milliseconds of a call; what it needs is prepared before each, outside of the time."""
    passed = 0.
    for _ in range(CALLS):
        prepare()
        if device == 'cuda':
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        passed += time.perf_counter() - begin
    return passed * 1e3 / CALLS


class Pass:
    """A function's two passes: `forward` keeps its output, `backward` differentiates that for all inputs."""

    def __init__(self, function: Callable[..., Tensor], tensors: list[Any], setting: Setting) -> None:
        self.function, self.setting = function, setting
        self.tensors = [t if t is None or isinstance(t, nn.Parameter) else t.detach().requires_grad_()
                        for t in tensors]
        self.inputs = [t for t in self.tensors if t is not None]
        self.forward()
        self.grad = torch.zeros_like(self.y)

    def forward(self) -> None:
        with self.setting.autocast():
            self.y = self.function(*self.tensors)

    def backward(self) -> None:
        torch.autograd.grad(self.y, self.inputs, self.grad, allow_unused=True)


Called = tuple[Callable[..., Tensor], list[Any]]  # a function and its tensors


def functions(shape: Shape, device: str) -> dict[str, Called]:
    """By variant, for a narrow layer of a shape's kernel size, stride and kind of groups on a tiny map."""
    channels = min(shape.channels, MOST_CHANNELS)
    groups = channels if shape.groups == shape.channels else min(shape.groups, channels // 4)
    shape = shape._replace(channels=channels, side=SIDE, groups=groups)
    torch.manual_seed(0)
    layer = make_layer(shape).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, channels, SIDE, SIDE, device=device).to(memory_format=torch.channels_last)
    select, kern, dr = layer.freq_select, layer.ada_kern, layer.ada_dr
    assert select is not None and kern is not None and dr is not None
    with torch.no_grad():
        maps = [x, layer.weight, *dr(x), layer.bias, *kern(x)]

    def operator(*t: Any) -> Tensor:
        return adaptive_dilated_conv2d(
            *t[:5], gains=t[5:9], stride=shape.stride, padding=shape.kernel_size // 2, groups=groups, backend='triton')

    return {
        'operator': (operator, maps),
        'layer': (lambda x, *_: layer(x), [x, *layer.parameters()]),
        'freq_select': (lambda x, *_: select(x), [x, *select.parameters()])}


def measure(shape: Shape, args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    setting = Setting(args.device, args.amp)
    name, env = f'{shape.net} {shape.kernel_size}x{shape.kernel_size}', environment(setting)
    called = functions(shape, args.device)  # computed as they should be
    with set_backend('triton'), without_launches() as kernels:
        for variant, (function, tensors) in called.items():
            made = Pass(function, tensors, setting)
            for what, call, prepare in (
                    ('forward', made.forward, lambda: None), ('backward', made.backward, made.forward)):
                for _ in range(WARM_UP):
                    prepare()
                    call()
                prepare()
                counted = count(call, kernels)
                if not counted.launches:
                    raise RuntimeError(f'{variant}, {what}: no launch goes through {HOOK}.launch_now.')
                times = [host_time(call, prepare, args.device) for _ in range(args.repeats)]
                values = {
                    'host time': ('ms', times), 'operators': ('', [float(counted.operators)]),
                    'launches': ('', [float(counted.launches)]),
                    'kernels': ('', [float(counted.computing + counted.launches)])}
                for quantity, (unit, samples) in values.items():
                    target = TARGETS.get((variant, f'{what} {quantity}'))
                    rows += make_rows(
                        name, f'{what} {quantity}', {variant: samples}, {variant: 'channels_last'}, env,
                        None if target is None else {variant: target}, unit, compare=lambda value, base: value)
    return rows


def select_shapes(patterns: list[str]) -> list[Shape]:
    """The last shape of each network: only the kind of a layer matters, not its size."""
    shapes = {shape.net: shape for shape in SHAPES}.values()
    return [s for s in shapes if any(fnmatch.fnmatch(s.net, pattern) for pattern in patterns)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', nargs='+', default=['*'], help="patterns of the networks' names")
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--amp', default='', choices=tuple(AMP_DTYPES), help='autocast to this dtype')
    parser.add_argument('--repeats', type=int, default=11, help='samples (default: 11)')
    parser.add_argument('--output', type=Path, default=OUTPUT, help='CSV file (default: in scripts/results)')
    args = parser.parse_args()
    if args.device == 'cpu':
        os.environ['TRITON_INTERPRET'] = '1'  # else Triton's path is not for a CPU
    torch.set_num_threads(1)
    shapes = select_shapes(args.shapes)
    if not shapes:
        names = ', '.join(dict.fromkeys(s.net for s in SHAPES))
        raise SystemExit(f'No network is called {" or ".join(args.shapes)}; they are {names}.')
    jobs = [(s.net, functools.partial(measure, s, args)) for s in shapes]
    return run_jobs(jobs, args.output, False, 0.)


if __name__ == '__main__':
    sys.exit(main())
