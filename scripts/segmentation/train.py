#!/usr/bin/env python3
"""Train a segmentation network over a timm backbone, plain or FADC, by the recipe published for UPerNet with FADC.

    python -m scripts.segmentation.train --data ade20k --root ADE --backbone resnet50_fadc --init default --output out
    python -m scripts.segmentation.train ... --output out                   # again: goes on where it was
    python -m scripts.segmentation.train --eval out/last.pt --root ADE --overlays 8
    torchrun --nproc_per_node=8 -m scripts.segmentation.train ...           # the batch is that of all processes

The output folder gets `last.pt`, from which a run resumes exactly, `log.csv` (loss), `val.csv` (mIoU in training) and
`result.json` (test split, last weights; the averaged ones with --ema). `last.pt` is a checkpoint for --init too, and
for `fadc-timm convert`.
"""
import argparse
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ParseKwargs
from torch import nn

from fadc_timm._writing import write_atomically
from scripts.segmentation.batches import Samples
from scripts.segmentation.checkpoint import Log
from scripts.segmentation.data import DATA_SETS, open_data
from scripts.segmentation.engine import AMP_DTYPES, Objective, Recipe, World, autocast, synchronized, train
from scripts.segmentation.evaluation import evaluate
from scripts.segmentation.metrics import table
from scripts.segmentation.model import Auxiliary, Built, build, split_name
from scripts.segmentation.transforms import EvalTransform, TrainTransform
from scripts.segmentation.variants import VARIANTS, added_keys

# Options that decide how a network is built, and what it sees: kept in the checkpoint.
NETWORK = ('backbone', 'variant', 'decoder', 'decoder_channels', 'output_stride', 'init', 'fadc', 'freq_select_stages',
           'backbone_args', 'mean', 'std')
SIGHT = ('data', 'crop', 'scale', 'cat_max_ratio', 'flip', 'photometric', 'channels_last')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group('data').add_argument
    add('--data', default='bluemarble', choices=DATA_SETS)
    add('--root', type=Path, help='folder of the data set (bluemarble: the cache folder, which has a default)')
    add('--workers', type=int, default=0, help='processes that load images')
    add = parser.add_argument_group('network').add_argument
    add('--backbone', default='resnet50', help="timm's name; NAME_fadc is NAME with --variant fadc")
    add('--variant', default='plain', choices=VARIANTS)
    add('--init', default='', help="a tag of timm's weights or 'default', or a checkpoint of the base, of an FADC "
        'model, of this script, or of the authors; default: random weights')
    add('--decoder', default='upernet', help='of segmentation_models_pytorch')
    add('--decoder-channels', type=int, help="width of the decoder (default: the decoder's own)")
    add('--output-stride', type=int, default=32, choices=(8, 16, 32))
    add('--fadc', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE', help='options of FADConv2d')
    add('--freq-select-stages', type=int, nargs='*', default=[2, 3, 4], help='stages with FreqSelect')
    add('--backbone-args', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE',
        help='more arguments of timm.create_model')
    add('--mean', type=float, nargs=3, help="of images in [0, 1] (default: the backbone's)")
    add('--std', type=float, nargs=3)
    add = parser.add_argument_group('recipe').add_argument
    for field in fields(Recipe):
        kwargs: dict[str, Any] = {'choices': ('', *AMP_DTYPES)} if field.name == 'amp' else {}
        add(f'--{field.name.replace("_", "-")}', type=type(field.default), default=field.default,
            help=f'(default: {field.default!r})', **kwargs)
    add('--crop', type=int, default=512, help='pixels, in training and of the windows in test (default: 512)')
    add('--scale', type=float, nargs=2, default=[0.5, 2.0], help='random resize (default: 0.5 2)')
    add('--cat-max-ratio', type=float, default=0.75)
    add('--flip', type=float, default=0.5, help='probability (default: 0.5)')
    add('--no-photometric', dest='photometric', action='store_false')
    add('--channels-last', action='store_true')
    add = parser.add_argument_group('test').add_argument
    add('--stride', type=int, help='of the windows (default: two thirds of the crop)')
    add('--eval-batch', type=int, default=4, help='windows at once')
    add('--eval-every', type=int, default=0, help='steps between evaluations on the validation split (default: none)')
    add('--eval', type=Path, metavar='CHECKPOINT', help='do not train: test this checkpoint of the script')
    add('--split', default='test', choices=('val', 'test'))
    add('--overlays', type=int, default=0, help='write so many PNGs of the predictions over the images')
    add = parser.add_argument_group('run').add_argument
    add('--output', type=Path, help='folder of the run (with --eval: of the checkpoint)')
    add('--log-every', type=int, default=50)
    add('--save-every', type=int, default=1000)
    add('--stop-at', type=int, default=0, help='end after so many steps of the run, which can be resumed')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--threads', type=int, help='of torch on the CPU')
    args = parser.parse_args(argv)
    if args.eval is None and args.output is None:
        parser.error('--output is wanted: the folder of the run')
    return args


@contextmanager
def processes(device: str):
    """This process among those that torchrun started, if it did."""
    if 'RANK' not in os.environ or int(os.environ['WORLD_SIZE']) == 1:
        yield World(torch.device(device))
        return
    cuda = device.startswith('cuda')
    dist.init_process_group('nccl' if cuda else 'gloo')
    local = torch.device('cuda', int(os.environ['LOCAL_RANK'])) if cuda else torch.device(device)
    if cuda:
        torch.cuda.set_device(local)
    try:
        yield World(local, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def config_of(args: argparse.Namespace) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and with the options of the network and of the samples all that decides a run's losses."""
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    args.backbone, args.variant = split_name(args.backbone, args.variant)
    config = {name: getattr(args, name) for name in NETWORK + SIGHT}
    return recipe, json.loads(json.dumps({**config, **asdict(recipe)}))


def network_of(config: dict[str, Any], classes: int) -> tuple[Built, list[float], list[float]]:
    """The network of a configuration, and its normalisation."""
    names = [name for name in NETWORK if name not in ('mean', 'std', 'backbone')]
    built = build(config['backbone'], classes, seed=config['seed'], **{name: config[name] for name in names})
    return built, list(config['mean'] or built.mean), list(config['std'] or built.std)


def test(
        model: nn.Module, data: Any, split: str, mean: list[float], std: list[float], config: dict[str, Any],
        args: argparse.Namespace, world: World, folder: Path | None,
) -> dict[str, Any]:
    """Evaluate on a split; overlays into the folder."""
    return evaluate(
        model, data, split, EvalTransform(mean, std, data.fit), world, folder, args.overlays if folder else 0,
        crop=config['crop'], stride=args.stride or max(config['crop'] * 2 // 3, 1), batch=args.eval_batch,
        autocast=partial(autocast, world.device, config['amp']))


def run_eval(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """--eval: the averaged weights, if the checkpoint has them."""
    state = torch.load(args.eval, map_location='cpu', weights_only=True)
    if not isinstance(state, dict) or 'config' not in state:
        raise ValueError(f'{args.eval} is no checkpoint of segmentation.train')
    config = state['config']
    data = open_data(config['data'], args.root)
    built, mean, std = network_of({**config, 'init': ''}, len(data.classes))
    built.model.load_state_dict(state['model_ema' if 'model_ema' in state else 'model'])
    folder = (args.output or args.eval.parent) / f'overlays_{args.split}'
    result = test(built.model.to(world.device), data, args.split, mean, std, config, args, world, folder)
    return {'checkpoint': str(args.eval), 'step': state['step'], 'split': args.split, **result}


def run_training(args: argparse.Namespace, world: World) -> dict[str, Any] | None:
    """Train and test; None where --stop-at ended it before."""
    recipe, config = config_of(args)
    recipe.check(world.size)
    data = open_data(args.data, args.root)
    built, mean, std = network_of(config, len(data.classes))
    model = built.model
    params = sum(p.numel() for p in model.parameters())
    keys = set(added_keys(model))
    added = sum(p.numel() for name, p in model.named_parameters() if name in keys)
    world.say(f'{args.decoder} over {args.backbone}, {args.variant}: {params} parameters, {added} of them added to the '
              f'plain network; {len(built.replaced)} convolutions replaced')
    world.say(f'weights: {built.loaded or "random"}; {args.data}: {len(data.train)} images to train, '
              f'{len(data.val)} to validate, {len(data.test)} to test')
    auxiliary = None
    if recipe.aux_loss:
        auxiliary = Auxiliary.for_model(model, args.decoder_channels or 256, len(data.classes), recipe.seed)
    objective = Objective(model, auxiliary, recipe.aux_loss, recipe.dilation_loss).to(world.device)
    if args.channels_last:
        objective = objective.to(memory_format=torch.channels_last)
    objective = synchronized(objective, world)
    transform = TrainTransform(
        args.crop, len(data.classes), tuple(args.scale), args.cat_max_ratio, args.flip, args.photometric, mean, std,
        data.fit)
    args.output.mkdir(parents=True, exist_ok=True)

    def validate(network: nn.Module, step: int) -> None:
        result = test(network, data, 'val', mean, std, config, args, world, None)
        world.say(f'step {step} validation mIoU {result["miou"]:.2f}')
        if world.main:
            log = Log(args.output / 'val.csv', ('step', 'miou', 'accuracy'), step - 1)
            log.add({'step': step, 'miou': result['miou'], 'accuracy': result['accuracy']})

    trained = train(
        objective, Samples(data.train, transform, recipe.seed), recipe, args.output, config, world, args.workers,
        args.log_every, args.save_every, args.eval_every, validate, args.stop_at, args.channels_last)
    if 0 < args.stop_at < recipe.steps:
        return None
    result = test(trained, data, args.split, mean, std, config, args, world, args.output / f'overlays_{args.split}')
    peak = torch.cuda.max_memory_allocated() / 1e6 if world.device.type == 'cuda' else None
    return {'step': recipe.steps, 'split': args.split, **result, 'params': params, 'added': added, 'peak_mb': peak,
            'config': config}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with processes(args.device) as world:
            result = run_training(args, world) if args.eval is None else run_eval(args, world)
            if world.main and result is not None:
                path = (args.output or args.eval.parent) / ('result.json' if args.eval is None else 'eval.json')
                write_atomically(path, lambda part: part.write_text(json.dumps(result, indent=1) + '\n'))
                world.say(table(result, result['classes']))
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        print(f'segmentation.train: {e}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
