#!/usr/bin/env python3
"""Does FADC help a network that is trained already? An ImageNet-trained ResNet-50 is lifted and fine-tuned.

    python -m scripts.studies.from_imagenet --task segmentation --jobs 2      # all settings, three seeds; resumes
    python -m scripts.studies.from_imagenet --task faster_rcnn --jobs 2       # tree crowns; or retinanet
    python -m scripts.studies.from_imagenet --task segmentation --remedies    # which module hurts, lower rates
    python -m scripts.studies.from_imagenet --preset tiny --task faster_rcnn  # two steps at 64 px: a rehearsal
    python -m scripts.studies.from_imagenet --report                          # tables and plot from the results

All runs of a task start from the same trunk (`trunk.py`: non-commercial, for experiments alone, 368 MB, downloaded
where it is used), runs of a seed with the same heads, and see the same images in the same order. `segmentation` is
UPerNet on the Blue Marble, with what a variant adds at the base rate and at a tenth; `faster_rcnn` and `retinanet` are
detectors of tree crowns, with the stem and the first stage frozen.

Each run is a process of segmentation.train or detection.train; when it ends, its row goes to
scripts/results/from_imagenet.csv. A run with a row of the same command is finished; one that was interrupted goes on
from its checkpoint. A step of the segmentation takes about 3 s of a core for plain with the preset `cpu` (256 px), a
quarter of that with `small` (128 px), where one of Faster R-CNN takes 2 s; `gpu` has 512 px and more steps: give it
more --seeds. Rows of `tiny`, of another --init, and of a number of --steps that is not the preset's, go to a file in
the folder of the runs. Then run `python -m scripts.checks.doc_tables`.
"""
import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fadc_timm._writing import markdown_table
from scripts.detection.annotations import import_coco
from scripts.results import RESULTS, Row, read_csv
from scripts.segmentation.model import import_smp
from scripts.studies.trunk import MEAN, NAME, STD, fetch_trunk
from scripts.training import plots
from scripts.training.command_line import at_least, exit_status
from scripts.training.jobs import Job, run_jobs, store, unfinished
from scripts.training.paired import paired_difference, spread
from scripts.training.script import ORIGIN
from scripts.wheels import CACHE_DIR

RUNS = RESULTS / 'from_imagenet.csv'
KEY = ('preset', 'task', 'setting', 'seed')
SCORES = ('miou', 'accuracy', 'ap', 'ap50', 'ap75')  # those that a task has
COLUMNS = (*KEY, *SCORES, 'boxes', 'images', 'loss', 'params', 'added', 'steps', 'seconds', *ORIGIN, 'command')


class Task(NamedTuple):
    """What the network is fine-tuned for.

    what: In words.
    script: Module of its training.
    scores: Columns of the table, the first of which is compared, and their names.
    check: Raises an ImportError where a package of the script is not installed.
    settings: Those that are run unless others are asked for; none for all but the remedies.
    """
    what: str
    script: str
    scores: dict[str, str]
    check: Callable[[], Any]
    settings: tuple[str, ...] = ()


_AP = {'ap': 'AP', 'ap50': 'AP50', 'ap75': 'AP75'}
_TENTH = ('plain', 'fadc_lr0.1', 'dcnv2_lr0.1', 'dcnv2_fadc_lr0.1')
TASKS = {
    'segmentation': Task('UPerNet, Blue Marble', 'scripts.segmentation.train',
                         {'miou': 'mIoU', 'accuracy': 'pixel accuracy'}, import_smp),
    'faster_rcnn': Task('Faster R-CNN, tree crowns', 'scripts.detection.train', _AP, import_coco, _TENTH),
    'retinanet': Task('RetinaNet, tree crowns', 'scripts.detection.train', _AP, import_coco, _TENTH),
}


class Setting(NamedTuple):
    """A row of the table: its name, the variant of the backbone, in words, and further options of the training."""
    name: str
    variant: str
    what: str
    options: tuple[str, ...] = ()


def _at_both_rates(name: str, variant: str, what: str) -> tuple[Setting, Setting]:
    return (Setting(name, variant, what, ('--fadc-lr', '1')),
            Setting(f'{name}_lr0.1', variant, f'{what}, a tenth of the rate for what it adds', ('--fadc-lr', '0.1')))


SETTINGS = (
    Setting('plain', 'plain', '`resnet50`'),
    *_at_both_rates('fadc', 'fadc', '`resnet50_fadc`'),
    *_at_both_rates('adadr', 'adadr', '`resnet50_fadc`, AdaDR alone'),
    *_at_both_rates('dcnv2', 'dcnv2', '`resnet50_dcn`'),
    *_at_both_rates('dcnv2_fadc', 'dcnv2_fadc', '`resnet50_dcn_fadc`'),
)
REMEDIES = (
    Setting('fadc_lr0.01', 'fadc', '`resnet50_fadc`, a hundredth of the rate', ('--fadc-lr', '0.01')),
    Setting('adadr_adakern_lr0.1', 'adadr_adakern', '`resnet50_fadc` without FreqSelect, a tenth of the rate',
            ('--fadc-lr', '0.1')),
    Setting('fadc_no_fs4_lr0.1', 'fadc', '`resnet50_fadc` without FreqSelect in stage 4, a tenth of the rate',
            ('--fadc-lr', '0.1', '--freq-select-stages', '2', '3')),
    Setting('fadc_no_kern_lr0.1', 'fadc', '`resnet50_fadc` without AdaKern, a tenth of the rate',
            ('--fadc-lr', '0.1', '--fadc', 'kernel_decompose=none')),
)
BY_NAME = {setting.name: setting for setting in SETTINGS + REMEDIES}


class Preset(NamedTuple):
    """What the runs share.

    steps: Their number.
    options: Of both scripts.
    segmentation: Further ones of the segmentation.
    detection: Further ones of the detectors. Tree crowns of 30 to 50 pixels in tiles of 400 are near the smallest boxes
        that these detectors look for: at half the size RetinaNet finds none.
    """
    steps: int
    options: tuple[str, ...]
    segmentation: tuple[str, ...]
    detection: tuple[str, ...]


def _crops(size: int, batch: int) -> tuple[str, ...]:
    return '--data', 'bluemarble', '--crop', str(size), '--batch', str(batch)


def _tiles(short: int, batch: int) -> tuple[str, ...]:
    return '--short', str(short), '--long', str(short * 4 // 3), '--batch', str(batch)


_CPU = ('--device', 'cpu', '--log-every', '25', '--save-every', '50')
_NARROW = ('--decoder-channels', '64', '--aux-loss', '0', '--channels-last')  # UPerNet's own width takes 5x the time
PRESETS = {
    'small': Preset(300, _CPU, (*_NARROW, *_crops(128, 8)), (*_tiles(384, 1), '--fpn-channels', '64')),
    'cpu': Preset(300, _CPU, (*_NARROW, *_crops(256, 8)), _tiles(384, 2)),
    'gpu': Preset(2000, ('--device', 'cuda', '--amp', 'bfloat16', '--workers', '8', '--save-every', '500'),
                  _crops(512, 16), _tiles(768, 4)),
    'tiny': Preset(2, ('--device', 'cpu', '--log-every', '1'), _crops(64, 2), _tiles(96, 1)),
}


def options_of(task: str, preset: Preset, setting: Setting, seed: int, init: str, steps: int = 0) -> tuple[str, ...]:
    """Options of a run that decide its result; `steps` in place of the preset's, if given."""
    total = steps or preset.steps
    shared = ('--backbone', 'resnet50', '--variant', setting.variant, '--init', init, '--mean', *map(str, MEAN),
              '--std', *map(str, STD), '--steps', str(total), '--warmup', str(total // 10), '--seed', str(seed),
              '--lr', '1e-4' if task == 'segmentation' else '2e-4', *preset.options, *setting.options)
    if task == 'segmentation':
        return (*shared, *preset.segmentation)
    return (*shared, *preset.detection, '--data', 'trees', '--detector', task, '--preset', 'adamw',
            '--flip-vertical', '0.5')


def jobs_of(args: argparse.Namespace, settings: Sequence[Setting], init: str) -> list[Job]:
    """All runs that are asked for, seed by seed, so that an early end leaves pairs."""
    script = TASKS[args.task].script
    pictures = '--overlays' if args.task == 'segmentation' else '--draw'
    further = (('--root', str(args.root)) if args.root else ()) + (pictures, '3')
    return [
        Job((args.preset, args.task, setting.name, str(seed)), script,
            options_of(args.task, PRESETS[args.preset], setting, seed, init, args.steps), further)
        for seed in args.seeds for setting in settings]


def row_of(job: Job, result: dict) -> Row:
    """The row of a run."""
    return {
        **dict(zip(KEY, job.key)), **{name: f'{result[name]:.4f}' for name in SCORES if name in result},
        'boxes': str(result.get('boxes', '')), 'images': str(result['images']), 'loss': result['loss'],
        'params': str(result['params']), 'added': str(result['added']), 'steps': str(result['step']),
        'seconds': f'{float(result["seconds"]):.1f}', **{name: result[name] for name in ORIGIN}, 'command': job.command}


def values_of(rows: Sequence[Row], column: str) -> dict[str, dict[tuple[int, int], float]]:
    """Scores by setting, then by seed and steps, which the runs of a pair have in common; settings in their order."""
    out: dict[str, dict[tuple[int, int], float]] = {name: {} for name in BY_NAME}
    for row in rows:
        out[row['setting']][int(row['seed']), int(row['steps'])] = float(row[column])
    return {name: values for name, values in out.items() if values}


def parts_of(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """The rows of each preset and task that has some."""
    found = [(preset, task, [row for row in rows if (row['preset'], row['task']) == (preset, task)])
             for preset in PRESETS for task in TASKS]
    return [part for part in found if part[2]]


def _table(preset: str, task: str, rows: list[Row]) -> str:
    scores = TASKS[task].scores
    by_score = {score: values_of(rows, score) for score in scores}
    first, first_name = next(iter(scores.items()))
    lines = []
    for name, values in by_score[first].items():
        base = by_score[first].get('plain', {})
        difference = str(paired_difference(values, base)) if name != 'plain' and values.keys() & base.keys() else ''
        lines.append([BY_NAME[name].what, str(len(values)), *(spread(by_score[score][name]) for score in scores),
                      difference])
    header = ['backbone', 'seeds', *(f'{name} %' for name in scores.values()), f'{first_name}, to plain (95 %)']
    where = Counter((row['device'], row['torch'], row['commit'], row['date']) for row in rows)
    runs = '; '.join(f'{device}, torch {version}, commit {at}, {date}: {n} runs'
                     for (device, version, at, date), n in where.most_common())
    steps = ', '.join(sorted({row['steps'] for row in rows}, key=int))
    boxes = f' with {rows[0]["boxes"]} boxes' if rows[0]['boxes'] else ''
    return (f'{TASKS[task].what}, `--preset {preset}`: {steps} steps, test on {rows[0]["images"]} images{boxes}, mean '
            f'(s.d.). {runs}.\n\n{markdown_table(header, lines)}')


def tables(path: Path | None = None) -> str:
    """A table for each preset and task that there are runs of."""
    return '\n\n'.join(_table(*part) for part in parts_of(read_csv(path or RUNS))) or 'Not measured.'


def path_of(args: argparse.Namespace) -> Path:
    """The file of the results: that of the documentation has runs from the trunk, with a preset's steps."""
    others = [] if args.init is None else [Path(args.init).stem]
    if args.steps not in (0, PRESETS[args.preset].steps):
        others.append(f'{args.steps}_steps')
    elif args.preset == 'tiny':
        others.append('tiny')
    return args.runs / f'{"_".join(others)}.csv' if others else RUNS


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the scores and the paired differences, a row of axes for each preset and task."""
    against = dict.fromkeys(BY_NAME, 'plain')
    panels = []
    for preset, task, part in parts_of(rows):
        score, name = next(iter(TASKS[task].scores.items()))
        panels.append(plots.Panel(f'{TASKS[task].what}, preset {preset}', name, values_of(part, score), against))
    plots.draw(path, panels)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', default='segmentation', choices=tuple(TASKS))
    parser.add_argument('--preset', default='cpu', choices=tuple(PRESETS))
    parser.add_argument('--settings', nargs='+', choices=tuple(BY_NAME),
                        help='default: all but the remedies; of the detectors those at a tenth of the rate')
    parser.add_argument('--remedies', action='store_true', help='the remedies too')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--steps', type=at_least(0), default=0, help="in place of the preset's")
    parser.add_argument('--jobs', type=int, default=1, help='processes at a time')
    parser.add_argument('--threads', type=int, default=1, help='of each process')
    parser.add_argument('--root', type=Path, help=f'cache folder of trunk and data (default: {CACHE_DIR})')
    parser.add_argument('--init', help='another checkpoint of a resnet50 in place of the trunk, for images in [0, 1]')
    parser.add_argument('--runs', type=Path, default=Path('runs/from_imagenet'),
                        help='folder of the runs (default: runs/from_imagenet)')
    parser.add_argument('--report', action='store_true', help='run nothing: print the tables and draw the plot')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    names = args.settings or TASKS[args.task].settings or [s.name for s in SETTINGS]
    settings = [BY_NAME[name] for name in names]
    if args.remedies:
        settings += [s for s in REMEDIES if s not in settings]
    path = path_of(args)
    plot, status = path.with_suffix('.png'), 0
    if not args.report:
        init = args.init

        def prepare() -> None:
            TASKS[args.task].check()
            if init is None:
                fetch_trunk(args.root or CACHE_DIR)

        status = exit_status('studies.from_imagenet', prepare, None)
        if status:
            return status
        if init is None:
            # the same command wherever the home is
            init = str(args.root / NAME) if args.root else f'~/{CACHE_DIR.relative_to(Path.home())}/{NAME}'
        jobs = unfinished(jobs_of(args, settings, init), path, KEY)

        def finished(job: Job, result: dict) -> None:
            row = row_of(job, result)
            store(path, COLUMNS, KEY, row)
            score = next(iter(TASKS[args.task].scores))
            print(f'{job.name}: {score} {float(row[score]):.2f} after {float(row["seconds"]):.0f} s', flush=True)

        status = run_jobs(jobs, args.runs, args.jobs, args.threads, finished)
    rows = read_csv(path)
    if rows:
        print(tables(path))
        draw(rows, plot)
        print(f'drew {plot}')
    return status


if __name__ == '__main__':
    sys.exit(main())
