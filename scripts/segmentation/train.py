#!/usr/bin/env python3
"""Train a segmentation network over a timm backbone, plain or FADC, by the recipe published for UPerNet with FADC.

    python -m scripts.segmentation.train --data folder --root DIR --check-data
    python -m scripts.segmentation.train --data folder --root DIR --backbone resnet50_fadc --init default --output out
    python -m scripts.segmentation.train ... --output out                   # again: goes on where it was
    python -m scripts.segmentation.train --eval out/last.pt --root DIR --overlays 8
    python -m scripts.segmentation.train --eval out/last.pt --predict IMAGES --overlays 8
    torchrun --nproc_per_node=8 -m scripts.segmentation.train ...           # the batch is that of all processes

The output folder gets `last.pt`, from which a run resumes exactly, `log.csv` (loss), `val.csv` (mIoU in training) and
`result.json` (test split, last weights; the averaged ones with --ema). Ctrl-C ends a run after its step, with a
checkpoint. `last.pt` is a checkpoint for --init too, and for `fadc-timm convert`.
"""
import argparse
import inspect
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.segmentation.check import check_data
from scripts.segmentation.data import DATA_SETS, SegmentationData, open_data
from scripts.segmentation.evaluation import evaluate
from scripts.segmentation.layouts import FITS
from scripts.segmentation.layouts import folder as folder_layout
from scripts.segmentation.metrics import table
from scripts.segmentation.model import Auxiliary, Built, build, import_smp
from scripts.segmentation.predict import Unlabelled, predict
from scripts.segmentation.recipe import Objective, Recipe
from scripts.segmentation.transforms import EvalTransform, TrainTransform
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
from scripts.training.images import SPLITS
from scripts.training.script import count_parameters, final_result, log_validation, run_folder, run_script
from scripts.training.world import World

# Options that decide, with those of the backbone, how a network is built, and what it sees: kept in the checkpoint.
DECODER = ('decoder', 'decoder_channels', 'output_stride')
SIGHT = ('data', 'mask_values', 'ignore_values', 'crop', 'scale', 'cat_max_ratio', 'flip', 'photometric',
         'channels_last')
# What --eval reads of the command line. All else it has from the checkpoint.
EVAL = ('eval', 'data', 'root', 'mask_values', 'ignore_values', 'anyway', 'stride', 'eval_batch', 'split', 'overlays',
        'output', 'device', 'threads')
PREDICT = ('eval', 'predict', 'stride', 'eval_batch', 'overlays', 'output', 'device', 'threads')


def integers(text: str) -> list[int]:
    """A type of argparse: integers with commas between them."""
    try:
        return [int(part) for part in text.split(',')]
    except ValueError as e:
        raise argparse.ArgumentTypeError(f'wanted are numbers with commas between them, as 0,255; got {text!r}') from e


def make_parser() -> argparse.ArgumentParser:
    layout = inspect.getdoc(folder_layout).partition('\n\nArgs:')[0]  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f'--data folder: {layout}', formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group('data').add_argument
    add('--data', choices=DATA_SETS, help="(default: bluemarble; with --eval the checkpoint's); folder: see below")
    add('--root', type=Path, help='folder of the data set (bluemarble: the cache folder, which has a default)')
    add('--mask-values', type=integers, metavar='V0,V1,...',
        help='folder: the number in the masks that stands for class 0, 1, ..., as 0,255 (default: 0,1,...)')
    add('--ignore-values', type=integers, metavar='V,...',
        help='folder: the numbers in the masks for pixels to ignore (default: 255, unless it stands for a class)')
    add('--check-data', action='store_true',
        help='do not train: read all files of all splits, count the classes, and say what is wrong')
    add('--anyway', action='store_true',
        help='use data that are in doubt: a class in no training mask, images without labels, palettes that differ, '
        'images in two splits')
    add('--workers', type=at_least(0), default=0, help='processes that load images')
    add = parser.add_argument_group('network').add_argument
    add_backbone(add)
    add('--decoder', default='upernet', help='of segmentation_models_pytorch')
    add('--decoder-channels', type=at_least(1), help="width of the decoder (default: the decoder's own)")
    add('--output-stride', type=int, default=32, choices=(8, 16, 32))
    add = parser.add_argument_group('recipe').add_argument
    add_recipe(add, Recipe)
    add('--crop', type=at_least(1), default=512, help='pixels, in training and of the windows in test (default: 512)')
    add('--scale', type=float, nargs=2, default=[0.5, 2.0], help='random resize (default: 0.5 2)')
    add('--cat-max-ratio', type=float, default=0.75, help='largest share of one class in a crop (default: 0.75)')
    add('--flip', type=float, default=0.5, help='probability (default: 0.5)')
    add('--no-photometric', dest='photometric', action='store_false', help='leave colours and brightness as they are')
    add('--channels-last', action='store_true')
    add = parser.add_argument_group('test').add_argument
    add('--stride', type=at_least(1), help='of the windows (default: two thirds of the crop)')
    add('--eval-batch', type=at_least(1), default=4, help='windows at once')
    add('--eval-every', type=at_least(0), default=0,
        help='steps between evaluations on the validation split (default: none)')
    add('--eval', type=Path, metavar='CHECKPOINT', help='do not train: test this checkpoint of the script')
    add('--predict', type=Path, metavar='IMAGES',
        help='with --eval: do not test, but write the predicted classes of all images below this folder')
    add('--split', default='test', choices=('val', 'test'))
    add('--overlays', type=at_least(0), default=0,
        help='write so many PNGs: image, truth if there is one, and prediction, with a legend')
    add_run(parser.add_argument_group('run').add_argument)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if wants_eval(parser, args, argv, EVAL, PREDICT):
        return args
    if args.data is None:
        if args.root is not None:
            parser.error(f'--root is given without --data: give one of {", ".join(DATA_SETS)}; folder is for your own')
        args.data = 'bluemarble'
    args.warmup = warmup_of(args.warmup, Recipe.warmup, args.steps)
    if args.output is None and not args.check_data:
        parser.error('--output is wanted: the folder of the run')
    return args


def recipe_of(args: argparse.Namespace) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and with the options of the network and of the samples all that decides a run's losses."""
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    return recipe, config_of(args, recipe, (*DECODER, *SIGHT))


def network_of(config: dict[str, Any], classes: int) -> Built:
    """The network of a configuration."""
    names = [name for name in (*BACKBONE, *DECODER) if name not in ('mean', 'std', 'backbone')]
    return build(config['backbone'], classes, seed=config['seed'], **{name: config[name] for name in names})


def windows_of(config: dict[str, Any], args: argparse.Namespace, world: World) -> dict[str, Any]:
    """How a network sees an image: the arguments of `slide.slide`."""
    return dict(
        crop=config['crop'], stride=args.stride or max(config['crop'] * 2 // 3, 1), batch=args.eval_batch,
        autocast=partial(autocast, world.device, config['amp']))


def test(
        model: nn.Module, data: Any, split: str, config: dict[str, Any], args: argparse.Namespace, world: World,
        folder: Path | None,
) -> dict[str, Any]:
    """Evaluate on a split; pictures into the folder."""
    transform = EvalTransform(config['mean'], config['std'], data.fit)
    return evaluate(model, data, split, transform, world, folder, args.overlays if folder else 0,
                    **windows_of(config, args, world))


def check_windows(crop: int, stride: int | None, output_stride: int) -> None:
    """Raises ValueError where a network cannot take the crops, or the windows of the test leave gaps."""
    if crop % output_stride:
        raise ValueError(f'--crop must be a multiple of the output stride of {output_stride}, got {crop}')
    if stride is not None and stride > crop:
        raise ValueError(f'--stride must be at most the crop of {crop}, got {stride}: windows would leave gaps')


def open_for(args: argparse.Namespace, config: dict[str, Any]) -> SegmentationData:
    """The data set that the command line, or else the checkpoint, names."""
    name = args.data or config['data']
    values = {key: getattr(args, key) for key in ('mask_values', 'ignore_values')}
    if name == config['data'] and all(value is None for value in values.values()):
        values = {key: config.get(key) for key in values}
    return open_data(name, args.root, **values)


def trained_network(state: dict[str, Any], world: World) -> nn.Module:
    """The network of a checkpoint."""
    config = state['config']
    built = network_of({**config, 'init': ''}, len(config['classes']))
    return load_weights(built.model, state).to(world.device)


def run_eval(args: argparse.Namespace, world: World) -> dict[str, Any] | None:
    """--eval; None with --predict, which tests nothing."""
    world.check_device()
    state = read_state(args.eval, needs=DECODER)
    config = state['config']
    check_windows(config['crop'], args.stride, config['output_stride'])
    import_smp()
    folder = args.output or args.eval.parent
    if args.predict is not None:
        images, classes = Unlabelled(args.predict, folder), classes_of(args.eval, config)
        transform = EvalTransform(config['mean'], config['std'], FITS.get(config['data']))
        predict(trained_network(state, world), images, classes, transform, world, folder, args.overlays,
                **windows_of(config, args, world))
        return None
    data = open_for(args, config)
    check_classes(args.eval, config, data.classes, data.name)
    world.first(lambda: world.say(check_data(data, [args.split], args.anyway)))
    result = test(trained_network(state, world), data, args.split, config, args, world,
                  folder / f'overlays_{args.split}')
    return {'checkpoint': str(args.eval), 'step': state['step'], 'split': args.split, **result}


def run_check(args: argparse.Namespace) -> None:
    """--check-data: print what is in the data set."""
    data = open_data(args.data, args.root, args.mask_values, args.ignore_values)
    print(check_data(data, SPLITS, args.anyway))


def run_training(args: argparse.Namespace, world: World) -> dict[str, Any] | None:
    """Train and test; None where --stop-at ended it before."""
    recipe, config = recipe_of(args)
    recipe.check(world.size)
    check_windows(args.crop, args.stride, args.output_stride)
    world.check_device()
    import_smp()
    data = open_data(args.data, args.root, args.mask_values, args.ignore_values)
    config['classes'] = list(data.classes)
    try_network(lambda: network_of({**config, 'init': ''}, len(data.classes)))
    transform = TrainTransform(
        args.crop, len(data.classes), tuple(args.scale), args.cat_max_ratio, args.flip, args.photometric,
        config['mean'], config['std'], data.fit)
    with run_folder(args, config, world, lambda: check_data(data, SPLITS, args.anyway, args.output / 'data.json')):
        return train_and_test(args, world, recipe, config, data, transform)


def train_and_test(
        args: argparse.Namespace,
        world: World,
        recipe: Recipe,
        config: dict[str, Any],
        data: SegmentationData,
        transform: TrainTransform,
) -> dict[str, Any] | None:
    """Train and test on data that were checked; None where --stop-at ended it before."""
    built = network_of(config, len(data.classes))
    model = built.model
    params, added = counts = count_parameters(model)
    world.say(f'{args.decoder} over {args.backbone}, {args.variant}: {params} parameters, {added} of them added to the '
              f'plain network; {len(built.replaced)} convolutions replaced')
    world.say(f'weights: {built.loaded or "random"}; {args.data}: {len(data.train)} images to train, '
              f'{len(data.val)} to validate, {len(data.test)} to test')
    world.say(f'{recipe.steps} steps, {recipe.warmup} of them warm-up')
    auxiliary = None
    if recipe.aux_loss:
        auxiliary = Auxiliary.for_model(model, args.decoder_channels or 256, len(data.classes), recipe.seed)
    objective = Objective(model, auxiliary, recipe.aux_loss, recipe.dilation_loss).to(world.device)
    if args.channels_last:
        objective = objective.to(memory_format=torch.channels_last)
    objective = synchronized(objective, world)

    def validate(network: nn.Module, step: int) -> None:
        result = test(network, data, 'val', config, args, world, None)
        world.say(f'step {step} validation mIoU {result["miou"]:.2f}')
        if world.main:
            log_validation(args.output, step, result, ('miou', 'accuracy'))

    trained = train(
        objective, Samples(data.train, transform, recipe.seed), recipe, args.output, config, world, args.workers,
        args.log_every, args.save_every, args.eval_every, validate, args.stop_at, args.channels_last)
    if 0 < args.stop_at < recipe.steps:
        return None
    result = test(trained, data, args.split, config, args, world, args.output / f'overlays_{args.split}')
    return final_result(args, recipe, config, world, result, counts)


def main(argv: list[str] | None = None) -> int:
    return run_script('segmentation.train', parse_args(argv), run_check, run_training, run_eval,
                      lambda result: table(result, result['classes']))


if __name__ == '__main__':
    sys.exit(main())
