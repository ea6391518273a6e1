#!/usr/bin/env python3
"""Train an object detector over a timm backbone, plain or FADC: torchvision's Faster R-CNN, RetinaNet or Mask R-CNN.

    python -m scripts.detection.train --data folder --root DIR --check-data
    python -m scripts.detection.train --data folder --root DIR --backbone resnet50_fadc --init default --output out
    python -m scripts.detection.train ... --output out                   # again: goes on where it was
    python -m scripts.detection.train --eval out/last.pt --root DIR --draw 8
    python -m scripts.detection.train --eval out/last.pt --predict IMAGES --draw 8
    torchrun --nproc_per_node=8 -m scripts.detection.train ...           # the batch is that of all processes

The output folder gets `last.pt`, from which a run resumes exactly, `log.csv` (loss), `val.csv` (AP in training),
`detections_test.json` (COCO's format) and `result.json` (test split, last weights; the averaged ones with --ema).
Ctrl-C ends a run after its step, with a checkpoint. `last.pt` is a checkpoint for --init too, and for
`fadc-timm convert`.
"""
import argparse
import inspect
import math
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from scripts.detection.annotations import SPLITS, CocoImages, DetectionData, import_coco
from scripts.detection.data import DATA_SETS, open_data
from scripts.detection.data import folder as folder_layout
from scripts.detection.evaluation import evaluate
from scripts.detection.model import DETECTORS, Built, build
from scripts.detection.predict import predict, unlabelled
from scripts.detection.recipe import OPTIMIZERS, PRESETS, Objective, Recipe, usual_milestones, usual_rate
from scripts.detection.transforms import TrainTransform, collate
from scripts.training.batches import Samples
from scripts.training.checkpoint import check_classes, classes_of, load_weights, read_state
from scripts.training.command_line import (
    BACKBONE,
    add_backbone,
    add_recipe,
    add_run,
    at_least,
    config_of,
    try_network,
    wants_eval,
    warmup_of,
)
from scripts.training.engine import autocast, synchronized, train
from scripts.training.script import count_parameters, final_result, log_validation, run_folder, run_script
from scripts.training.world import World

# Options that decide, with those of the backbone, how a network is built, and what it sees: kept in the checkpoint.
DETECTOR = ('detector', 'fpn_channels', 'short', 'long', 'frozen_stages', 'frozen_bn')
SIGHT = ('data', 'anyway', 'keep_empty', 'group', 'flip', 'flip_vertical')
# What --eval reads of the command line. All else it has from the checkpoint.
EVAL = ('eval', 'data', 'root', 'anyway', 'eval_batch', 'split', 'draw', 'draw_score', 'output', 'device', 'threads')
PREDICT = ('eval', 'predict', 'eval_batch', 'draw', 'draw_score', 'output', 'device', 'threads')


def make_parser() -> argparse.ArgumentParser:
    layout = inspect.getdoc(folder_layout).partition('\n\nArgs:')[0]  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f'--data folder: {layout}', formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group('data').add_argument
    add('--data', choices=DATA_SETS, help="(default: trees; with --eval the checkpoint's); folder: see below")
    add('--root', type=Path, help='folder of the data set (trees: the cache folder, which has a default)')
    add('--check-data', action='store_true', help='do not train: read all annotations and all images, and say '
        'what is wrong; with --detector mask_rcnn for masks too')
    add('--anyway', action='store_true',
        help='leave out annotations whose box is wrong: outside of its image, negative, or without area')
    add('--keep-empty', action='store_true', help='train on images without a box too')
    add('--no-group', dest='group', action='store_false', help='do not keep wide and tall images in batches apart')
    add('--workers', type=at_least(0), default=0, help='processes that load images')
    add = parser.add_argument_group('network').add_argument
    add_backbone(add)
    add('--detector', default='faster_rcnn', choices=tuple(DETECTORS))
    add('--fpn-channels', type=at_least(1), default=256, help='width of the feature pyramid (default: 256)')
    add('--frozen-stages', type=at_least(0),
        help='the stem and so many stages are not trained, except what the variant added (default: 1 with --init)')
    add('--frozen-bn', action=argparse.BooleanOptionalAction,
        help="the backbone's batch norms are not trained, except AdaKern's (default: with --init)")
    add = parser.add_argument_group('recipe').add_argument
    add('--preset', default='1x', choices=tuple(PRESETS),
        help='defaults of optimizer, lr, weight-decay and clip: SGD at 0.02, or AdamW at 1e-4')
    add_recipe(
        add, Recipe, steps={'help': 'number (default: those of the epochs)'}, optimizer={'choices': OPTIMIZERS},
        milestones={'type': float, 'nargs': '*', 'default': None,
                    'help': 'epochs after which the rate falls to a tenth (default: those after 2/3 '
                            'and 11/12 of the run, which are 8 11 of 12)'},
        lr={'default': None, 'help': 'is taken as it is (default: 0.02, with --preset adamw 1e-4; of sgd at a batch of '
                                     '16, and in proportion at others)'})
    add('--short', type=at_least(1), nargs='+', default=[800],
        help='short side in pixels; of several one is drawn for each image, and the largest is for the test '
        '(default: 800)')
    add('--long', type=at_least(1), default=1333, help='largest long side in pixels (default: 1333)')
    add('--flip', type=float, default=0.5, help='probability (default: 0.5)')
    add('--flip-vertical', type=float, default=0.0, help='probability, for images from the air (default: 0)')
    add = parser.add_argument_group('test').add_argument
    add('--eval-batch', type=at_least(1), default=1,
        help='images at once; they are padded to one size, which changes results a little (default: 1)')
    add('--eval-every', type=at_least(0), default=0,
        help='steps between evaluations on the validation split (default: none)')
    add('--eval', type=Path, metavar='CHECKPOINT', help='do not train: test this checkpoint of the script')
    add('--predict', type=Path, metavar='IMAGES',
        help='with --eval: do not test, but write the detections in all images below this folder')
    add('--split', default='test', choices=('val', 'test'))
    add('--draw', type=at_least(0), default=0,
        help='write so many PNGs: true boxes, if they are known, beside detections')
    add('--draw-score', type=float, default=0.5, help='least score of detections that are drawn (default: 0.5)')
    add_run(parser.add_argument_group('run').add_argument)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if wants_eval(parser, args, argv, EVAL, PREDICT):
        return args
    parser.set_defaults(**{name: value for name, value in PRESETS[args.preset].items() if name != 'lr'})
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = usual_rate(args.preset, args.optimizer, args.batch)
    if args.data is None:
        if args.root is not None:
            parser.error(f'--root is given without --data: give one of {", ".join(DATA_SETS)}; folder is for your own')
        args.data = 'trees'
    if args.output is None and not args.check_data:
        parser.error('--output is wanted: the folder of the run')
    if args.frozen_stages is None:
        args.frozen_stages = int(bool(args.init))
    if args.frozen_bn is None:
        args.frozen_bn = bool(args.init)
    args.short = sorted(args.short)
    return args


def recipe_of(args: argparse.Namespace, images: int) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and with the options of the network and of the samples all that decides a run's losses.

    Args:
        args: The command line.
        images: Number of images in an epoch.
    """
    values = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    values['milestones'] = usual_milestones(args.epochs) if args.milestones is None else tuple(args.milestones)
    values['steps'] = args.steps or math.ceil(args.epochs * images / max(args.batch, 1))
    if args.steps and args.milestones is not None:
        # given milestones are epochs of the data; the usual ones are parts of the run, however long it is
        values['epochs'] = args.steps * args.batch / max(images, 1)
    values['warmup'] = warmup_of(args.warmup, Recipe.warmup, values['steps'])
    recipe = Recipe(**values)
    return recipe, config_of(args, recipe, (*DETECTOR, *SIGHT))


def network_of(config: dict[str, Any], classes: int) -> Built:
    """The network of a configuration."""
    names = [name for name in (*BACKBONE, *DETECTOR) if name != 'backbone']
    return build(config['backbone'], classes, seed=config['seed'], **{name: config[name] for name in names})


def needs_masks(detector: str) -> bool:
    """Whether a detector is trained and tested with masks."""
    return detector == 'mask_rcnn'


def samples_of(split: CocoImages, config: dict[str, Any]) -> Samples:
    """The training images of a configuration, in its order."""
    if needs_masks(config['detector']):
        split.need_masks()
    if not config['keep_empty']:
        split = split.with_boxes()
    groups = [int(e.width > e.height) for e in split.entries] if config['group'] else None
    return Samples(split, TrainTransform(config['flip'], config['flip_vertical']), config['seed'], groups,
                   config['batch'], collate)


def test(
        model: nn.Module, data: DetectionData, split: str, config: dict[str, Any], args: argparse.Namespace,
        world: World, folder: Path | None,
) -> dict[str, Any]:
    """Evaluate on a split; detections and pictures go into the folder."""
    return evaluate(
        model, getattr(data, split), world, args.eval_batch, partial(autocast, world.device, config['amp']),
        folder / f'detections_{split}.json' if folder else None, folder / f'pictures_{split}' if folder else None,
        args.draw if folder else 0, args.draw_score)


def trained_network(state: dict[str, Any], world: World) -> nn.Module:
    """The detector of a checkpoint."""
    config = state['config']
    built = network_of({**config, 'init': ''}, len(config['classes']))
    return load_weights(built.model, state).to(world.device)


def run_eval(args: argparse.Namespace, world: World) -> dict[str, Any] | None:
    """--eval; None with --predict, which tests nothing."""
    world.check_device()
    state = read_state(args.eval, needs=DETECTOR)
    config = state['config']
    import_coco()
    folder = args.output or args.eval.parent
    if args.predict is not None:
        images = unlabelled(args.predict, folder, classes_of(args.eval, config))
        predict(trained_network(state, world), images, world, args.eval_batch,
                partial(autocast, world.device, config['amp']), folder, args.draw, args.draw_score)
        return None
    data = open_data(args.data or config['data'], args.root, args.anyway or config['anyway'])
    check_classes(args.eval, config, data.classes, data.name)
    world.first(lambda: world.say(data.check([args.split], needs_masks(config['detector']))))
    result = test(trained_network(state, world), data, args.split, config, args, world, folder)
    return {'checkpoint': str(args.eval), 'step': state['step'], 'split': args.split, **result}


def run_check(args: argparse.Namespace) -> None:
    """--check-data: print what is in the data set."""
    data = open_data(args.data, args.root, args.anyway)
    print(data.check(masks=needs_masks(args.detector), whole=SPLITS))


def run_training(args: argparse.Namespace, world: World) -> dict[str, Any] | None:
    """Train and test; None where --stop-at ended it before."""
    world.check_device()
    import_coco()
    data = open_data(args.data, args.root, args.anyway)
    recipe, config = recipe_of(args, len(data.train if args.keep_empty else data.train.with_boxes()))
    recipe.check(world.size)
    samples = samples_of(data.train, config)
    config['classes'] = list(data.classes)
    try_network(lambda: network_of({**config, 'init': ''}, len(data.classes)))
    with run_folder(args, config, world, lambda: data.check(masks=needs_masks(args.detector))):
        return train_and_test(args, world, recipe, config, data, samples)


def train_and_test(
        args: argparse.Namespace,
        world: World,
        recipe: Recipe,
        config: dict[str, Any],
        data: DetectionData,
        samples: Samples,
) -> dict[str, Any] | None:
    """Train and test on data that were checked; None where --stop-at ended it before."""
    built = network_of(config, len(data.classes))
    model = built.model
    params, added = counts = count_parameters(model)
    world.say(f'{args.detector} over {args.backbone}, {args.variant}: {params} parameters, {added} of them added to '
              f'the plain network; {len(built.replaced)} convolutions replaced')
    world.say(f'weights: {built.loaded or "random"}; frozen: {built.frozen}')
    falls = ''.join(f', a tenth of that after step {step}' if i == 0 else f' and again after step {step}'
                    for i, step in enumerate(recipe.falls))
    world.say(f'{len(samples.data)} images to train; {recipe.steps} steps, {recipe.warmup} of them warm-up, at a '
              f'learning rate of {recipe.lr:g}{falls}')
    objective = synchronized(Objective(model).to(world.device), world)

    def validate(network: nn.Module, step: int) -> None:
        result = test(network, data, 'val', config, args, world, None)
        if world.main:
            world.say(f'step {step} validation AP {result["ap"]:.2f}')
            log_validation(args.output, step, result, ('ap', 'ap50', 'ap75'))

    trained = train(
        objective, samples, recipe, args.output, config, world, args.workers, args.log_every, args.save_every,
        args.eval_every, validate, args.stop_at)
    if 0 < args.stop_at < recipe.steps:
        return None
    result = test(trained, data, args.split, config, args, world, args.output)
    return final_result(args, recipe, config, world, result, counts)


def describe(result: dict[str, Any]) -> str:
    """pycocotools' lines, for boxes and for masks."""
    return '\n'.join([result['lines'], *([f'masks\n{result["masks"]["lines"]}'] if 'masks' in result else [])])


def main(argv: list[str] | None = None) -> int:
    return run_script('detection.train', parse_args(argv), run_check, run_training, run_eval, describe)


if __name__ == '__main__':
    sys.exit(main())
