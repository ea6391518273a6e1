"""Parts of the GPU check that no other script has, each in a process of its own.

    python -m scripts.checks.gpu_parts device
    python -m scripts.checks.gpu_parts profile --model resnet50_fadc --batch 64 --size 224 --amp float16
    python -m scripts.checks.gpu_parts backends --batch 64 --shapes 128@56 --amp float16 bfloat16
"""
from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fadc_timm
from fadc_timm.ops import list_backends, mix_bands
from fadc_timm.ops.band_mix.functional import BACKENDS
from fadc_timm.ops.band_mix.triton import why_not
from scripts.bench.bands import FACTORS, select_shapes
from scripts.bench.measure import Clock, reason
from scripts.bench.subjects import AMP_DTYPES, Setting, Step, captured, make_models, make_step, place

# Lines of a profile: kernels, and operators by their host time.
MOST_KERNELS, MOST_OPERATORS = 18, 12
# Calls whose time is taken together.
CALLS = 5
# Of the largest value: the error that a backend of the band mix must be below.
MOST_ERROR = {
    'float16': 2e-3,  # 5.7e-4 on a CPU
    'bfloat16': 1.6e-2,  # 3.4e-3 on a CPU
}


# --- device ---

def _version(package: str) -> str:
    try:
        module = __import__(package)
    except Exception as error:  # whatever it is, it is what the report has to say
        return f'{package} none ({reason(error)})'
    return f'{package} {getattr(module, "__version__", "")}'


def show_device(args: argparse.Namespace) -> int:
    print(f'device: {torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"}, '
          f'{len(os.sched_getaffinity(0))} cores', flush=True)
    print(f'versions: torch {torch.__version__}, {_version("triton")}, torchvision {torchvision.__version__}, timm '
          f'{timm.__version__}, Python {platform.python_version()}, fadc_timm {fadc_timm.__version__}')
    print(f'CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; backends {", ".join(list_backends())}')
    if torch.cuda.is_available():
        print(torch.cuda.get_device_properties(0))
        fields = 'name,driver_version,memory.total,memory.used,power.limit,clocks.max.sm,clocks.sm,temperature.gpu'
        subprocess.run(['nvidia-smi', f'--query-gpu={fields}', '--format=csv'], timeout=30)
    return 0


def _failed(what: str, error: BaseException) -> int:
    print(f'FAILED {what}: {reason(error)}', flush=True)
    return 1


# --- profile ---

def _wait(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def _host_time(step: Step, device: str) -> float:
    """Milliseconds until a call returns, whether or not the device has done what it asks for."""
    _wait(device)
    begin = time.perf_counter()
    step()
    passed = (time.perf_counter() - begin) * 1e3
    _wait(device)
    return passed


def _kernels(events: Sequence[Any]) -> list[Any]:
    return sorted((e for e in events if e.device_type.name == 'CUDA' and e.self_device_time_total > 0),
                  key=lambda e: -e.self_device_time_total)


def _print_profile(events: Sequence[Any]) -> None:
    for e in _kernels(events)[:MOST_KERNELS]:
        print(f'  kernel {e.self_device_time_total / 1e3:8.3f} ms x{e.count:5d} {e.key[:110]}')
    host = sorted((e for e in events if e.device_type.name == 'CPU'), key=lambda e: -e.self_cpu_time_total)
    for e in host[:MOST_OPERATORS]:
        print(f'  host   {e.self_cpu_time_total / 1e3:8.3f} ms x{e.count:5d} {e.key[:110]}')


def _show_step(args: argparse.Namespace, what: str, model: nn.Module, x: Tensor) -> None:
    """The profile of a network's training step."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == 'cuda')
    step = make_step(*place(model, x, args.device, 'channels_last'), 'train', Setting(args.device, args.amp[0]))
    clock = Clock(args.device)
    clock(step, 3)
    passed = clock(step, CALLS)
    host = min(_host_time(step, args.device) for _ in range(CALLS))
    with profile(activities=activities) as prof:
        step()
        _wait(args.device)
    events = list(prof.key_averages())
    kernels = _kernels(events)
    print(f'### {what}: {passed:.2f} ms, host '
          f'{host:.2f} ms, kernels {sum(e.self_device_time_total for e in kernels) / 1e3:.2f} ms in '
          f'{sum(e.count for e in kernels)} launches')
    _print_profile(events)
    sys.stdout.flush()


def show_profile(args: argparse.Namespace) -> int:
    """Of a training step of each variant: its time, its kernels and their number, and the host's operators.

    Returns:
        The exit status: 1 if a variant failed, which is told, while the others are still shown.
    """
    x = torch.randn(args.batch, 3, args.size, args.size)
    failures = 0
    for variant, model in make_models(args.model, ('plain', *args.variants)).items():
        what = f'{args.model} {args.batch}x{args.size} train {args.amp[0]} {variant}'
        try:
            _show_step(args, what, model, x)
        except Exception as error:
            failures += _failed(f'profile {what}', error)
    return int(failures > 0)


# --- backends of the band mix ---

def _band_step(backend: str, x: Tensor, weights: Tensor, grad: Tensor, what: str) -> Step:
    if what == 'forward':
        def forward() -> Tensor:
            with torch.inference_mode():
                return mix_bands(x, weights, FACTORS, backend)
        return forward
    leaves = [t.detach().requires_grad_() for t in (x, weights)]
    return lambda: torch.autograd.grad(mix_bands(leaves[0], leaves[1], FACTORS, backend), leaves, grad)[0]


def _in_graph(step: Step, clock: Clock) -> str:
    """The time in a CUDA graph, which is that of the kernels, or why there is none."""
    try:
        replay = captured(step)
        return f'{clock(replay, 20):.3f} ms'
    except Exception as error:
        return f'none ({reason(error)[:50]})'


def _error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).abs().max() / expected.abs().max())


def _show_backend(what: str, step: Step, expected: Tensor, most: float, clock: Clock) -> None:
    """A backend's times and its error.

    Raises:
        RuntimeError: The error is not below `most`.
    """
    error = _error(step(), expected)
    clock(step, 2)
    print(f'backend {what}: {clock(step, CALLS):.3f} ms, in a graph {_in_graph(step, clock)}, error {error:.1e}',
          flush=True)
    if not error < most:
        raise RuntimeError(f'the error of {error:.1e} of the largest value is not below {most:.1e}')


def show_backends(args: argparse.Namespace) -> int:
    """Errors and times of the backends for each shape and dtype; errors are of the largest value.

    Returns:
        The exit status: 1 if a backend raised an error or is wrong, which is told, while the others still run.
    """
    clock, failures = Clock(args.device), 0
    for name, (channels, side) in select_shapes(args.shapes).items():
        torch.manual_seed(0)
        drawn = (torch.randn(args.batch, channels, side, side), torch.rand(args.batch, len(FACTORS), side, side) * 2,
                 torch.randn(args.batch, channels, side, side))
        for amp in args.amp:
            case = f'{name} b{args.batch} {amp}'
            try:
                x, weights, grad = (t.to(args.device, AMP_DTYPES[amp], memory_format=torch.channels_last)
                                    for t in drawn)
                exact = x.double(), weights.double().unsqueeze(2), grad.double()
                references = {what: _band_step('written_out', *exact, what)()
                              for what in ('forward', 'forward+backward')}
            except Exception as error:
                failures += _failed(f'backend {case}, the reference', error)
                continue
            for what, expected in references.items():
                for backend in BACKENDS:
                    if backend == 'written_out' or (backend == 'triton' and why_not(x) is not None):
                        continue
                    try:
                        step = _band_step(backend, x, weights.unsqueeze(2), grad, what)
                        _show_backend(f'{case} {what} {backend}', step, expected, MOST_ERROR[amp], clock)
                    except Exception as error:
                        failures += _failed(f'backend {case} {what} {backend}', error)
    return int(failures > 0)


PARTS = {'device': show_device, 'profile': show_profile, 'backends': show_backends}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=tuple(PARTS))
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--amp', nargs='+', default=['float16'], choices=tuple(AMP_DTYPES))
    parser.add_argument('--model', default='resnet50_fadc')
    parser.add_argument('--variants', nargs='+', default=['fadc'])
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--shapes', nargs='+', default=['128@28'])
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    return PARTS[args.part](args)


if __name__ == '__main__':
    sys.exit(main())
