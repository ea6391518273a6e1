#!/usr/bin/env python3
"""Time and memory of FADC networks against their plain base, in the same run on the same machine.

    python -m scripts.bench.model                                               # every case of the table
    python -m scripts.bench.model --model resnet50_fadc --what inference train  # some of them
    python -m scripts.bench.model --model resnet50d_fadc --batch 8 --size 288   # another case
    python -m scripts.bench.model --device cuda --amp float16 --channels-last   # the table for GPUs
    python -m scripts.bench.model --device cuda --amp float16 --channels-last --compile graph  # in CUDA graphs alone
    python -m scripts.bench.model --check                                       # fail where a ratio was lost

Variants: `plain`, the base network, or what a network without one is compared with (`dinat_mini`: timm's Swin-T, at its
own size alone); `today`, an FADC network with convolutions as everyone runs it today (bench/today.py); `fadc`, this
package; and where it is asked for `triton`, the same with the Triton kernels by name, which on CUDA are those of `fadc`
where they can run. FADC parameters are off the identity, and before a case is timed, all but `plain` must agree. What:

* inference: a batch, in milliseconds;
* train: forward, loss, backward and a step of SGD;
* inference/eager, train/eager: the compiled network, its ratio is that to itself without compiling;
* memory: the largest number of megabytes of tensors during a training step;
* per-pixel: the time of a pixel at one size over that at 224, its ratio is the growth over that of the plain network;
* import: `import timm` and `import fadc_timm` in new processes, the ratio is the *difference in seconds*.

Compile: `no` is eager, `yes` through inductor, `graph` captured in a CUDA graph, `reduce-overhead` is inductor in the
mode of that name. The ratio is to the plain network run in the same way. A variant that cannot be captured has no row,
its reason is printed.

Rows go to scripts/results/bench_model.csv, each in place of the one with its case, quantity, variant, device, dtype and
compile; `python -m scripts.checks.doc_tables` brings them into README.md and docs/.
"""
import argparse
import copy
import functools
import itertools
import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scripts.bench.measure import (
    Clock,
    add_options,
    environment,
    formats_to_try,
    interleave,
    peak_memory,
    pick_format,
    reason,
    run_jobs,
)
from scripts.bench.subjects import COMPILE, RIVALS, Setting, Step, make_models, make_step, place, training_state
from scripts.results import RESULTS, Row, Samples, make_rows

OUTPUT = RESULTS / 'bench_model.csv'
VARIANTS = ('plain', 'today', 'fadc', 'triton')
WHAT = ('inference', 'train', 'memory', 'per-pixel', 'import')
SMALL = 224  # side that per-pixel compares with
CAPTURED = ('graph', 'reduce-overhead')


class Case(NamedTuple):
    """A row of the table: largest ratio of this package, and of a compiled network the largest to itself eager."""
    model: str
    what: str
    batch: int = 1
    size: int = SMALL
    target: float | None = None
    compile: str = 'no'
    eager_target: float | None = None

    @property
    def name(self) -> str:
        if self.what == 'import':
            return 'fadc_timm beyond timm'
        against = f' against {SMALL}' if self.what == 'per-pixel' else ''
        rival = f' against {RIVALS[self.model]}' if self.model in RIVALS else ''
        return f'{self.model} {self.batch}x{self.size}{against}{rival}'


# Targets are for two cores and float32,
CASES = (
    Case('resnet50_fadc', 'inference', 4, 224, 1.2),
    Case('resnet50_fadc', 'inference', 1, 224, 1.3),
    Case('resnet50_fadc', 'inference', 1, 512, 1.3),
    Case('resnet50_fadc', 'train', 4, 224, 1.35),
    Case('resnet18_fadc', 'inference', 4, 224, 1.3),
    Case('resnet101_fadc', 'inference', 4, 224, 1.3),
    Case('resnext50_32x4d_fadc', 'inference', 4, 224, 1.3),
    Case('convnext_tiny_fadc', 'inference', 4, 224, 1.8),
    Case('convnext_tiny_fadc', 'train', 2, 224, 2.2),
    Case('resnet50_fadc', 'memory', 4, 224, 1.5),
    Case('resnet50_fadc', 'per-pixel', 1, 1024, 1.1),
    Case('dinat_mini', 'inference', 4, 224, 1.6),
    Case('dinat_mini', 'train', 4, 224, 2.),
    Case('dinat_mini', 'memory', 4, 224, 1.5),
    Case('dinat_mini_fadc', 'inference', 4, 224, 1.3),
    Case('dinat_mini_fadc', 'train', 4, 224, 1.3),
    Case('dinat_mini_fadc', 'per-pixel', 1, 896, 1.1),
    Case('resnet50_fadc', 'inference', 4, 224, 1.3, compile='yes', eager_target=1.),
    Case('resnet50_fadc', 'train', 4, 224, 1.3, compile='yes', eager_target=1.),
    Case('convnext_tiny_fadc', 'inference', 4, 224, 1.6, compile='yes'),
    Case('convnext_tiny_fadc', 'train', 2, 224, 2., compile='yes'),
    Case('resnet50_dcn', 'inference', 4, 224, 1.5),
    Case('resnet50_dcn', 'train', 4, 224, 1.7),
    Case('resnet50_dcn_fadc', 'inference', 4, 224, 1.6),
    Case('resnet50_dcn_fadc', 'train', 4, 224, 1.8),
    Case('', 'import', target=0.1),
)
# and these for an H100 or H200 and half precision.
CUDA_CASES = (
    Case('resnet50_fadc', 'inference', 64, 224, 2.),
    Case('resnet50_fadc', 'train', 64, 224, 2.4),
    Case('resnet50_fadc', 'inference', 16, 512, 1.8),
    Case('resnet50_fadc', 'train', 16, 512, 2.2),
    Case('convnext_tiny_fadc', 'inference', 64, 224, 2.),
    Case('convnext_tiny_fadc', 'train', 64, 224, 2.5),
    Case('resnet50_fadc', 'memory', 64, 224, 1.25),
    *(case for compile in CAPTURED for case in (
        Case('resnet50_fadc', 'inference', 64, 224, 1.5, compile=compile),
        Case('resnet50_fadc', 'train', 64, 224, 1.7, compile=compile),
        Case('resnet50_fadc', 'inference', 16, 512, 1.5, compile=compile),
        Case('resnet50_fadc', 'train', 16, 512, 1.7, compile=compile),
        Case('convnext_tiny_fadc', 'inference', 64, 224, 2., compile=compile),
        Case('convnext_tiny_fadc', 'train', 64, 224, 2.5, compile=compile))),
)


# A network is drawn once for all of its cases: steps take copies.
networks = functools.lru_cache(maxsize=1)(make_models)


def targets(case: Case) -> dict[str, float]:
    """The largest ratio by variant."""
    return {} if case.target is None else dict.fromkeys(('fadc', 'triton'), case.target)


def check_same(models: dict[str, nn.Module], x: Tensor, device: str) -> None:
    """Raise unless today's way and ours compute the same, and something finite."""
    outputs = {}
    with torch.inference_mode():
        for variant, model in models.items():
            outputs[variant] = copy.deepcopy(model).to(device).eval()(x.to(device))
            if not outputs[variant].isfinite().all():
                raise RuntimeError(f'{variant}: the output is not finite, its time would mean nothing.')
    outputs.pop('plain', None)
    limit = 1e-3 if device == 'cpu' else 2e-2  # with TF32
    for (a, expected), (b, y) in itertools.pairwise(outputs.items()):
        error = float((expected - y).abs().max() / expected.abs().max())
        if error > limit:
            raise RuntimeError(f'{a} and {b} differ by {error:.1e} of the largest logit, over {limit:.0e}.')


def _skipped_graphs() -> int:
    """How often inductor has gone without CUDA graphs that were asked for."""
    return int(torch._dynamo.utils.counters['inductor']['cudagraph_skips'])


def measure_times(case: Case, args: argparse.Namespace, setting: Setting) -> list[Row]:
    """inference, train."""
    models = networks(case.model, args.variants)
    x = torch.randn(case.batch, 3, case.size, case.size)
    check_same(models, x, setting.device)
    torch.compiler.reset()
    clock = Clock(setting.device)
    formats: dict[str, str] = {}
    steps: dict[str, Step] = {}

    def add(name: str, model: nn.Module, setting: Setting) -> None:
        def make(memory_format: str, compile: str = 'no') -> Step:
            return make_step(
                *place(model, x, setting.device, memory_format), case.what, setting._replace(compile=compile))

        # the format is chosen without compiling, which takes minutes for each
        formats[name], steps[name] = pick_format(make, clock, formats_to_try(args.memory_format))
        if setting.compile != 'no':
            del steps[name]
            counts = setting.compile == 'reduce-overhead' and setting.device == 'cuda'
            skipped = _skipped_graphs() if counts else 0
            compiled = make(formats[name], setting.compile)
            clock(compiled, 3)
            if counts and _skipped_graphs() > skipped:
                raise RuntimeError("inductor has skipped its CUDA graphs, TORCH_LOGS=perf_hints says why")
            steps[name] = compiled

    for variant, model in models.items():
        try:
            add(variant, model, setting)
        except Exception as error:
            if variant == 'plain' or case.compile not in CAPTURED:
                raise
            print(f'LEFT OUT {case.name}, {case.what}, {case.compile}, {setting.amp or "float32"}, {variant}: '
                  f'{reason(error)}', flush=True)
    to_eager = [v for v in ('plain', 'fadc') if case.compile == 'yes' and v in models]
    for variant in to_eager:
        add(f'{variant} eager', models[variant], setting._replace(compile='no'))
    samples = interleave(steps, clock, args.repeats, args.max_time)
    env = environment(setting)
    rows = make_rows(case.name, case.what, {v: samples[v] for v in models if v in samples}, formats, env, targets(case))
    eager_targets = {} if case.eager_target is None else {'fadc': case.eager_target}
    for variant in to_eager:
        pair = {v: samples[v] for v in (f'{variant} eager', variant)}
        rows += make_rows(case.name, f'{case.what}/eager', pair, formats, env, eager_targets)
    return rows


def measure_per_pixel(case: Case, args: argparse.Namespace, setting: Setting) -> list[Row]:
    models = networks(case.model, args.variants)
    clock = Clock(setting.device)
    formats: dict[str, str] = {}
    steps: dict[str, Step] = {}
    for size in (SMALL, case.size):
        x = torch.randn(case.batch, 3, size, size)
        check_same(models, x, setting.device)
        for variant, model in models.items():
            def make(memory_format: str, model: nn.Module = model, x: Tensor = x) -> Step:
                return make_step(*place(model, x, setting.device, memory_format), 'inference', setting)

            formats[f'{variant} {size}'], steps[f'{variant} {size}'] = pick_format(
                make, clock, formats_to_try(args.memory_format))
    times = interleave(steps, clock, args.repeats, args.max_time)
    pixels = (case.size / SMALL) ** 2
    samples: Samples = {}
    for v in models:
        small, big = f'{v} {SMALL}', f'{v} {case.size}'
        samples[v] = [b / a / pixels for a, b in zip(times[small], times[big])]
        formats[v] = ' and '.join(sorted({formats[small], formats[big]}))
    return make_rows(case.name, case.what, samples, formats, environment(setting), targets(case), unit='x')


def measure_memory(case: Case, args: argparse.Namespace, setting: Setting) -> list[Row]:
    x = torch.randn(case.batch, 3, case.size, case.size)
    samples: Samples = {}
    formats: dict[str, str] = {}
    for variant, source in networks(case.model, args.variants).items():
        for memory_format in formats_to_try(args.memory_format):
            model, images = place(source, x, setting.device, memory_format)
            optimizer = training_state(model)
            step = make_step(model, images, 'train', setting, optimizer)
            for _ in range(2):
                step()
            optimizer.zero_grad(set_to_none=True)
            state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
            held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *state, images))
            peak = peak_memory(step, held, setting.device)
            if variant not in samples or peak < samples[variant][0]:
                samples[variant], formats[variant] = [peak], memory_format
    return make_rows(case.name, case.what, samples, formats, environment(setting), targets(case), unit='MB')


def measure_import(case: Case, args: argparse.Namespace, setting: Setting) -> list[Row]:
    code = ('import time; t0 = time.perf_counter(); import timm; t1 = time.perf_counter(); import fadc_timm; '
            'print(t1 - t0, time.perf_counter() - t0)')
    samples: Samples = {'plain': [], 'fadc': []}
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONDONTWRITEBYTECODE'}
    with tempfile.TemporaryDirectory() as cache:
        env['PYTHONPYCACHEPREFIX'] = cache  # installing timm has compiled it: a checkout is not yet
        for i in range(args.repeats + 1):
            out = subprocess.run([sys.executable, '-c', code], cwd=RESULTS.parents[1], env=env, capture_output=True,
                                 text=True, check=True).stdout
            if i:  # the first compiles all modules and fills the disk cache
                for values, seconds in zip(samples.values(), out.split()):
                    values.append(float(seconds) * 1e3)
    return make_rows(case.name, case.what, samples, {}, environment(setting), targets(case),
                     compare=lambda value, base: (value - base) / 1e3)


MEASURE = {
    'inference': measure_times, 'train': measure_times, 'memory': measure_memory, 'per-pixel': measure_per_pixel,
    'import': measure_import}


def measure(case: Case, args: argparse.Namespace) -> list[Row]:
    setting = Setting(args.device, args.amp, case.compile)
    if bool(args.amp) != (args.device == 'cuda'):
        case = case._replace(target=None, eager_target=None)
    return MEASURE[case.what](case, args, setting)


def select_cases(args: argparse.Namespace) -> list[Case]:
    """The cases of the table that the options leave, or where there is --batch or --size those that they make."""
    table = CUDA_CASES if args.device == 'cuda' else CASES
    what = args.what or WHAT
    if args.batch is None and args.size is None:
        return [c for c in table if c.what in what and (not args.model or c.model in args.model)
                and c.compile in (args.compile or COMPILE)]
    known = {c._replace(target=None, eager_target=None): c for c in table}
    cases = [Case(m, w, args.batch or 4, args.size or SMALL, compile=compile)
             for compile in args.compile or ['no']
             for m in args.model or ['resnet50_fadc'] for w in args.what or ['inference']]
    return [known.get(c, c) for c in cases]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--model', nargs='+', help='<base>_fadc or another architecture of this package, dinat_mini or nat_mini')
    parser.add_argument('--what', nargs='+', choices=WHAT, help='quantities')
    parser.add_argument('--batch', type=int, help='with --size: a case of your own (default: 4)')
    parser.add_argument('--size', type=int, help='with --batch: a case of your own (default: 224)')
    parser.add_argument(
        '--compile', nargs='+', choices=COMPILE, help='ways to run; default: all of the table, or eager for your own')
    parser.add_argument(
        '--variants', type=lambda s: tuple(s.split(',')), help="comma-separated, plain is always measured (default: "
        f"{','.join(v for v in VARIANTS if v != 'triton')}, with --check without today's)")
    add_options(parser, repeats=15)
    args = parser.parse_args(argv)
    # triton computes what fadc computes on CUDA, and cannot run elsewhere
    variants = args.variants or [v for v in VARIANTS if v != 'triton' and (v != 'today' or not args.check)]
    if set(variants) - set(VARIANTS):
        parser.error(f'--variants are of {", ".join(VARIANTS)}, got {", ".join(variants)}')
    args.variants = tuple(v for v in VARIANTS if v == 'plain' or v in variants)
    return args


def main() -> int:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = select_cases(args)
    if not cases:
        raise SystemExit('The table has no such case: give --batch and --size for one of your own.')
    if any(c.compile not in ('no', 'graph') for c in cases):
        # a case has up to six compiled networks alive, and one that fell back to eager would be timed as compiled
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    dtype = args.amp or 'float32'
    jobs = [(f'{c.name}, {c.what}, {c.compile}, {dtype}', functools.partial(measure, c, args)) for c in cases]
    return run_jobs(jobs, args.output or OUTPUT, args.check, args.margin)


if __name__ == '__main__':
    sys.exit(main())
