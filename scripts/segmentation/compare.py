#!/usr/bin/env python3
"""Compare backbones under the same head and recipe: plain, FADC piece by piece, the same effort spent otherwise.

    python -m scripts.segmentation.compare --preset cpu --jobs 2                    # the seven main ones, five seeds
    python -m scripts.segmentation.compare --preset cpu --settings plain fadc_lr10  # some
    python -m scripts.segmentation.compare --preset cpu --time                      # a step of each, interleaved
    python -m scripts.segmentation.compare --report                                 # tables and plot from the results

Runs of a seed have the same initial weights, images in the same order, and steps. Each run is a process of
segmentation.train with one thread; when it ends, its row goes to scripts/results/segmentation.csv. A run with a row
of the same command is finished; one that was interrupted goes on from its checkpoint. Rows of other data, and of a
number of --steps that is not the preset's, go to a file in the folder of the runs, and so do the times of other data.
Then run `python -m scripts.checks.doc_tables`.
"""
import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fadc_timm.models.cost import module_cost
from scripts.bench.measure import Clock, interleave, peak_memory
from scripts.results import RESULTS, commit, device_name, quartiles, read_csv
from scripts.segmentation.comparison import BY_NAME, PRESETS, REMEDIES, SETTINGS, Preset, Setting, command
from scripts.segmentation.data import open_data
from scripts.segmentation.model import Auxiliary, import_smp
from scripts.segmentation.recipe import Objective
from scripts.segmentation.tables import PLOT, RUNS, TIMES, draw, segmentation
from scripts.segmentation.train import integers, network_of, recipe_of
from scripts.segmentation.train import parse_args as parse_training
from scripts.training.command_line import at_least, exit_status
from scripts.training.jobs import Job, run_jobs, store, unfinished
from scripts.training.optimizer import rate_groups
from scripts.training.script import ORIGIN

TRAIN = 'scripts.segmentation.train'
COLUMNS = (
    'preset', 'setting', 'seed', 'miou', 'accuracy', 'mean_accuracy', 'iou', 'loss', 'params', 'added', 'gmacs',
    'steps', 'images', 'seconds', *ORIGIN, 'command')
TIME_COLUMNS = (
    'preset', 'setting', 'ms', 'ms_q25', 'ms_q75', 'ratio', 'ratio_q25', 'ratio_q75', 'rounds', 'peak_mb', 'threads',
    'device', 'torch', 'commit', 'date')


def gmacs_of(options: list[str], classes: int, crop: int) -> float:
    """GMACs of the network for one crop."""
    args = parse_training([*options, '--output', '-'])
    built = network_of({**recipe_of(args)[1], 'init': ''}, classes)
    return module_cost(built.model.to('meta').eval(), (3, crop, crop)).gmacs


def data_options(args: argparse.Namespace) -> list[str]:
    """Which data set, and what the numbers in its masks mean, as options of segmentation.train."""
    values = [(f'--{name}', getattr(args, name.replace('-', '_'))) for name in ('mask-values', 'ignore-values')]
    given = [text for name, numbers in values if numbers is not None for text in (name, ','.join(map(str, numbers)))]
    return ['--data', args.data, *given]


def classes_of(args: argparse.Namespace) -> int:
    """Number of classes of the data set."""
    return len(open_data(args.data, args.root, args.mask_values, args.ignore_values).classes)


def runs_of(args: argparse.Namespace) -> Path:
    """The file of the results: that of the documentation has Blue Marble with the preset's steps only."""
    if args.steps in (0, PRESETS[args.preset].steps):
        return RUNS if args.data == 'bluemarble' else args.runs / f'{args.data}.csv'
    return args.runs / f'{args.data}_{args.steps}_steps.csv'


def times_of(args: argparse.Namespace) -> Path:
    """The file of the times: that of the documentation has Blue Marble only, with its number of classes."""
    return TIMES if args.data == 'bluemarble' else args.runs / f'{args.data}_time.csv'


def run_all(args: argparse.Namespace, preset: Preset, settings: Sequence[Setting]) -> int:
    """Run what has no row yet; the exit status."""
    data, root = data_options(args), ['--root', str(args.root)] if args.root else []
    # rows of Blue Marble's runs do not name their data
    own, further = ([], [*data, *root]) if args.data == 'bluemarble' else (data, root)
    path, key = runs_of(args), COLUMNS[:3]
    jobs = unfinished(
        [Job((args.preset, s.name, str(seed)), TRAIN, (*command(preset, s, seed, args.steps), *own), tuple(further))
         for seed in args.seeds for s in settings],  # seed by seed, so that an early end leaves pairs
        path, key)
    classes, costs = classes_of(args), {}
    for job in jobs:
        if job.key[1] not in costs:
            costs[job.key[1]] = gmacs_of(list(job.options), classes, preset.crop)

    def finished(job: Job, result: dict) -> None:
        store(path, COLUMNS, key, {
            **dict(zip(key, job.key)), **{k: f'{result[k]:.4f}' for k in ('miou', 'accuracy', 'mean_accuracy')},
            'iou': ' '.join('-' if v is None else f'{v:.2f}' for v in result['iou']), 'loss': result['loss'],
            'params': str(result['params']), 'added': str(result['added']), 'gmacs': f'{costs[job.key[1]]:.4f}',
            'steps': str(result['step']), 'images': str(result['images']),
            'seconds': f'{float(result["seconds"]):.1f}', **{k: result[k] for k in ORIGIN}, 'command': job.command})
        print(f'{job.name}: mIoU {result["miou"]:.2f} after {float(result["seconds"]):.0f} s', flush=True)

    return run_jobs(jobs, args.runs, args.jobs, args.threads, finished)


def training_step(options: list[str], classes: int, crop: int) -> tuple[Objective, object, int]:
    """A training step on a fixed random batch: (network and loss, step, bytes held between steps)."""
    args = parse_training([*options, '--output', '-'])
    recipe, config = recipe_of(args)
    built = network_of({**config, 'init': ''}, classes)
    auxiliary = None
    if recipe.aux_loss:
        auxiliary = Auxiliary.for_model(built.model, args.decoder_channels or 256, classes, 0)
    objective = Objective(built.model, auxiliary, recipe.aux_loss, recipe.dilation_loss).to(args.device).train()
    x = torch.randn(recipe.batch, 3, crop, crop, device=args.device)
    y = torch.randint(classes, (recipe.batch, crop, crop), device=args.device)
    if args.channels_last:
        objective = objective.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(rate_groups(objective, recipe.fadc_lr, recipe.weight_decay), lr=1e-5)

    def step() -> None:
        with torch.autocast(args.device.partition(':')[0], torch.bfloat16, enabled=bool(recipe.amp)):
            loss = objective(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), recipe.clip)
        optimizer.step()

    step()
    tensors = [*objective.parameters(), *objective.buffers()]
    held = sum(3 * t.numel() * t.element_size() if t.requires_grad else t.numel() * t.element_size() for t in tensors)
    return objective, step, held


def to_time(settings: Sequence[Setting]) -> list[Setting]:
    """The settings whose steps are timed: those asked for, each after the one that it is compared with.

    In place of one with more steps it is the one with the same step, which is said.
    """
    timed = {}
    for setting in settings:
        if setting.longer != 1:
            same = next(s for s in BY_NAME.values()
                        if (s.variant, s.options, s.longer) == (setting.variant, setting.options, 1))
            print(f'{setting.name}: a step is one of {same.name}, which is timed', flush=True)
            setting = same
        for s in (BY_NAME[setting.against], setting):
            timed[s.name] = s
    return list(timed.values())


def time_steps(args: argparse.Namespace, preset: Preset, settings: Sequence[Setting]) -> int:
    """Time a step of each setting, in turns, in this process. A ratio is to the setting that it is compared with."""
    torch.set_num_threads(args.threads)
    classes = classes_of(args)
    device = parse_training([*command(preset, SETTINGS[0], 0), '--output', '-']).device.partition(':')[0]
    made = {s.name: training_step(command(preset, s, 0), classes, preset.crop) for s in to_time(settings)}
    samples = interleave({name: m[1] for name, m in made.items()}, Clock(device), args.rounds, 1e9)  # type: ignore
    for name, (_, step, held) in made.items():
        ms, against = quartiles(samples[name]), BY_NAME[name].against
        ratio = quartiles([t / base for t, base in zip(samples[name], samples[against])])
        memory = peak_memory(step, held, device)  # type: ignore[arg-type]
        numbers = zip(TIME_COLUMNS[2:8], (*ms, *ratio))
        store(times_of(args), TIME_COLUMNS, TIME_COLUMNS[:2], {
            'preset': args.preset, 'setting': name, **{k: f'{v:.4g}' for k, v in numbers},
            'rounds': str(len(samples[name])), 'peak_mb': f'{memory:.0f}', 'threads': str(args.threads),
            'device': device_name(device), 'torch': torch.__version__, 'commit': commit(),
            'date': datetime.date.today().isoformat()})
        print(f'{name}: {ms[0]:.0f} ms ({ms[1]:.0f} to {ms[2]:.0f}), {ratio[0]:.2f} of {against}, {memory:.0f} MB',
              flush=True)
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', default='cpu', choices=tuple(PRESETS))
    parser.add_argument('--settings', nargs='+', choices=tuple(BY_NAME), help='default: all but the remedies')
    parser.add_argument('--remedies', action='store_true', help='the remedies too')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4])
    parser.add_argument('--steps', type=at_least(0), default=0, help="in place of the preset's")
    parser.add_argument('--jobs', type=int, default=1, help='processes at a time')
    parser.add_argument('--threads', type=int, default=1, help='of each process')
    parser.add_argument('--data', default='bluemarble')
    parser.add_argument('--root', type=Path, help='folder of the data set')
    for name in ('--mask-values', '--ignore-values'):
        parser.add_argument(name, type=integers, metavar='V,...', help='as in segmentation.train')
    parser.add_argument('--runs', type=Path, default=Path('runs'), help='folder of the runs (default: runs)')
    parser.add_argument('--time', action='store_true', help='time a step of each setting, and train none')
    parser.add_argument('--rounds', type=int, default=15, help='of --time')
    parser.add_argument('--report', action='store_true', help='run nothing: print the table and draw the plot')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    settings = [BY_NAME[name] for name in args.settings or [s.name for s in SETTINGS]]
    if args.remedies:
        settings += [s for s in REMEDIES if s not in settings]
    preset, status, start = PRESETS[args.preset], 0, time.time()
    if not args.report and exit_status('segmentation.compare', import_smp, None):
        return 1
    if args.time:
        return time_steps(args, preset, settings)
    if not args.report:
        status = run_all(args, preset, settings)
        print(f'{time.time() - start:.0f} s')
    path = runs_of(args)
    if read_csv(path):
        print(segmentation(path, times_of(args)))
        if path == RUNS:
            draw(PLOT)
            print(f'drew {PLOT}')
    return status


if __name__ == '__main__':
    RESULTS.mkdir(exist_ok=True)
    sys.exit(main())
