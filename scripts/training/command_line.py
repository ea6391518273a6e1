"""Options that the training scripts share, and how their runs end."""
import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from timm.utils import ParseKwargs

from scripts.training.engine import AMP_DTYPES, Recipe
from scripts.training.run_folder import Interrupted
from scripts.training.variants import VARIANTS, split_name
from scripts.training.weights import normalisation_of, options_for

# Options that decide how a backbone is built, and what it sees.
BACKBONE = ('backbone', 'variant', 'init', 'fadc', 'freq_select_stages', 'backbone_args', 'mean', 'std')
WARMUP_SHARE = 10  # the warm-up is at most this part of the steps, unless it is given

Add = Callable[..., Any]


def at_least(least: int) -> Callable[[str], int]:
    """A type of argparse: an integer that is not smaller."""
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f'must be at least {least}, got {value}')
        return value
    return integer


def add_backbone(add: Add) -> None:
    """The options of a backbone."""
    add('--backbone', default='resnet50', help="timm's name; NAME_fadc is NAME with --variant fadc")
    add('--variant', default='plain', choices=VARIANTS,
        help='what takes the place of the 3x3 convolutions of stages 2 to 4 (default: plain)')
    add('--init', default='', help="a tag of timm's weights, or 'default' for those of pretrained=True, or a "
        'checkpoint of the base, of an FADC model, of a training script, or of the authors; default: random weights')
    add('--fadc', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE', help='options of FADConv2d')
    add('--freq-select-stages', type=int, nargs='*', default=[2, 3, 4], help='stages with FreqSelect')
    add('--backbone-args', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE',
        help='more arguments of timm.create_model')
    add('--mean', type=float, nargs=3, help="of images in [0, 1] (default: the backbone's)")
    add('--std', type=float, nargs=3, help='likewise')


def _meanings(recipe: type[Recipe]) -> dict[str, str]:
    """What the fields of a recipe mean: the lines `name: meaning.` of its docstring, or of the common one."""
    meanings = {}
    for cls in (Recipe, recipe):
        for name, text in re.findall(r'^(\w+): (.*(?:\n +.*)*)', inspect.getdoc(cls) or '', re.MULTILINE):
            sentence = ' '.join(text.rstrip('.').split())
            meanings[name] = sentence[0].lower() + sentence[1:]
    return meanings


def add_recipe(add: Add, recipe: type[Recipe], **changes: dict[str, Any]) -> None:
    """An option for each field of a recipe.

    Args:
        add: Of the parser.
        recipe: Class of the recipe.
        **changes: By field, other arguments of `add`.
    """
    meanings = _meanings(recipe)
    for field in fields(recipe):
        usual = repr(field.default)
        kwargs: dict[str, Any] = {'type': type(field.default), 'default': field.default}
        if field.name == 'amp':
            kwargs['choices'] = ('', *AMP_DTYPES)
        elif field.name == 'warmup':
            kwargs['default'] = None
            usual += ', at most a tenth of the steps'
        kwargs['help'] = f'{meanings[field.name]} (default: {usual})'
        add(f'--{field.name.replace("_", "-")}', **{**kwargs, **changes.get(field.name, {})})


def add_run(add: Add) -> None:
    """The options of a run."""
    add('--output', type=Path, help='folder of the run, of one run at a time (with --eval: of the checkpoint)')
    add('--log-every', type=at_least(1), default=50)
    add('--save-every', type=at_least(1), default=1000)
    add('--stop-at', type=at_least(0), default=0, help='end after so many steps of the run, which can be resumed')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--threads', type=at_least(1), help='of torch on the CPU')


def wants_eval(
        parser: argparse.ArgumentParser,
        args: argparse.Namespace,
        argv: list[str] | None,
        read: Collection[str],
        read_by_predict: Collection[str],
) -> bool:
    """Whether a command line asks for --eval, maybe with --predict.

    It ends with an error where these come with options that they do not read, or --predict comes alone.
    """
    if args.eval is None:
        if args.predict is not None:
            parser.error('--predict wants a checkpoint: give --eval CHECKPOINT too')
        return False
    if args.check_data:
        parser.error('--check-data and --eval are two things: give one of them')
    why = '--eval takes its network and recipe from the checkpoint'
    if args.predict is not None:
        read, why = read_by_predict, '--predict reads a checkpoint and images alone'
    unset = object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    others = [f'--{name.replace("_", "-")}' for name, value in vars(given).items()
              if value is not unset and name not in read]
    if others:
        parser.error(f'{why}: leave out {", ".join(others)}')
    return True


def warmup_of(given: int | None, usual: int, steps: int) -> int:
    """The warm-up that is given, else the usual one, at most a tenth of the steps."""
    return given if given is not None else max(min(usual, steps // WARMUP_SHARE), 0)


def config_of(args: argparse.Namespace, recipe: Recipe, names: Collection[str]) -> dict[str, Any]:
    """All that decides a run's losses, as JSON holds it: the backbone, further options, the recipe.

    The name of one of our models becomes its base and its variant, in `args` too.
    """
    args.backbone, args.variant = split_name(args.backbone, args.variant)
    mean, std = normalisation_of(args.backbone, args.init, args.variant)
    config = {name: getattr(args, name) for name in (*BACKBONE, *names)}
    config.update(mean=args.mean or mean, std=args.std or std)
    config['fadc'] = options_for(args.backbone, args.init, args.variant, args.fadc)
    return json.loads(json.dumps({**config, **asdict(recipe)}))


def try_network(build: Callable[[], object]) -> None:
    """Build a network for the errors in its options, before the data are read and weights are downloaded.

    Raises:
        ValueError: An option is wrong.
    """
    try:
        build()
    except TypeError as e:  # of an argument that timm or FADConv2d does not know
        raise ValueError(f'an option of the network is wrong: {e}') from e


def exit_status(script: str, work: Callable[[], object], checkpoint: Path | None) -> int:
    """Do a script's work, and say on stderr what went wrong.

    Args:
        script: Its name.
        work: What it does.
        checkpoint: That from which the same command goes on, if there is one by then.
    """
    try:
        work()
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        print(f'{script}: {e}', file=sys.stderr)
        return 1
    except Interrupted as e:
        if str(e):
            print(f'{script}: {e}', file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        resumes = f'; the same command goes on from {checkpoint}' if checkpoint and checkpoint.exists() else ''
        print(f'{script}: interrupted{resumes}', file=sys.stderr)
        return 130
    return 0
