#!/usr/bin/env python3
"""Time of the backends of FreqSelect's band mix, against a copy of the map, which is the least that memory allows.

    python -m scripts.bench.bands --device cuda --amp float16 --batch 64 [--shapes '*@28'] [--check]

`fused` is the default on a CPU, `written_out` the backend with an FFT, `triton` the Triton kernels, the default on CUDA
where they can run. The map and the weights are channels_last, in the dtype of --amp; forward, or forward+backward with
both gradients. A copy forward+backward is two copies. Rows go to scripts/results/bench_bands.csv, as those of
bench/model.py.
"""
import argparse
import fnmatch
import functools
import re
import sys

import torch
from torch import Tensor

from fadc_timm.ops import mix_bands
from fadc_timm.ops.band_mix.functional import BACKENDS
from fadc_timm.ops.band_mix.triton import why_not
from scripts.bench.measure import Clock, add_options, environment, interleave, run_jobs
from scripts.bench.subjects import AMP_DTYPES, Setting, Step
from scripts.results import RESULTS, Row, make_rows

OUTPUT = RESULTS / 'bench_bands.csv'
FACTORS = [2, 4, 8]
WHAT = ('forward', 'forward+backward')

# channels and side: ResNet-50 and ConvNeXt-T at 224, ResNet-50 at 512, and a map for two passes
SHAPES: dict[str, tuple[int, int]] = {f'{c}@{n}': (c, n) for c, n in (
    (128, 56), (128, 28), (256, 14), (512, 7), (192, 28), (384, 14), (768, 7), (128, 64), (256, 32), (512, 16),
    (128, 128))}


def select_shapes(patterns: list[str]) -> dict[str, tuple[int, int]]:
    """The shapes of the table whose names match, and those of other names C@N."""
    shapes = {name: shape for name, shape in SHAPES.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
    for own in (re.fullmatch(r'(\d+)@(\d+)', pattern) for pattern in patterns):
        if own is not None:
            shapes[own[0]] = int(own[1]), int(own[2])
    return shapes


def make_steps(shape: tuple[int, int], what: str, batch: int, setting: Setting) -> dict[str, Step]:
    channels, side = shape
    torch.manual_seed(0)
    x, grad = (torch.randn(batch, channels, side, side) for _ in range(2))
    weights = torch.rand(batch, len(FACTORS), side, side) * 2
    dtype = AMP_DTYPES[setting.amp] if setting.amp else torch.float32
    x, grad, weights = (t.to(setting.device, dtype, memory_format=torch.channels_last) for t in (x, grad, weights))
    weights = weights.unsqueeze(2)
    leaf_x, leaf_weights = (t.detach().requires_grad_() for t in (x, weights))

    def forward(backend: str) -> Tensor:
        with torch.inference_mode():
            return mix_bands(x, weights, FACTORS, backend)

    def both(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(mix_bands(leaf_x, leaf_weights, FACTORS, backend), (leaf_x, leaf_weights), grad)

    steps: dict[str, Step] = {'copy': x.clone if what == 'forward' else lambda: (x.clone(), grad.clone())}
    for backend in BACKENDS:
        if backend != 'triton' or why_not(x) is None:
            steps[backend] = functools.partial(forward if what == 'forward' else both, backend)
    return steps


def measure(name: str, shape: tuple[int, int], what: str, args: argparse.Namespace) -> list[Row]:
    setting = Setting(args.device, args.amp)
    clock = Clock(setting.device)
    steps = make_steps(shape, what, args.batch, setting)
    for step in steps.values():
        clock(step, 3)
    samples = interleave(steps, clock, args.repeats, args.max_time, min_sample=args.min_sample)
    return make_rows(
        f'band mix {name} b{args.batch}', what, samples, dict.fromkeys(steps, 'channels_last'), environment(setting))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--shapes', nargs='+', default=['*'], help="name patterns, '128@28' or '*@14', or a shape of your own")
    parser.add_argument('--what', nargs='+', default=WHAT, choices=WHAT)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument(
        '--min-sample', type=float, default=10., metavar='MS', help='shorter steps are repeated to this (default: 10)')
    add_options(parser, repeats=11, max_time=5., formats=('channels_last',))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = select_shapes(args.shapes)
    if not shapes:
        raise SystemExit(f'No shape is called {" or ".join(args.shapes)}; the shapes are {", ".join(SHAPES)}.')
    jobs = [(f'{name}, {what}', functools.partial(measure, name, shape, what, args))
            for name, shape in shapes.items() for what in args.what]
    return run_jobs(jobs, args.output or OUTPUT, args.check, args.margin)


if __name__ == '__main__':
    sys.exit(main())
