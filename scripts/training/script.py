"""What a training script does around its own data, network and test."""
import argparse
import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from fadc_timm._writing import write_atomically
from scripts.results import commit, device_name
from scripts.training.checkpoint import Log, load_checkpoint
from scripts.training.command_line import exit_status
from scripts.training.engine import Recipe
from scripts.training.run_folder import owned
from scripts.training.variants import added_keys
from scripts.training.world import World, processes

Result = dict[str, Any]
# What result.json and eval.json say of where, when and by what they were made.
ORIGIN = ('device', 'torch', 'timm', 'commit', 'date')


def run_script(
        name: str,
        args: argparse.Namespace,
        check: Callable[[argparse.Namespace], object],
        train: Callable[[argparse.Namespace, World], Result | None],
        evaluate: Callable[[argparse.Namespace, World], Result | None],
        describe: Callable[[Result], str],
) -> int:
    """Do what the command line asks for, and give the exit status.

    Args:
        name: Of the script.
        args: The command line.
        check: --check-data.
        train: Trains and tests, for result.json; None where there is no result yet.
        evaluate: --eval, for eval.json; None where nothing is tested.
        describe: A result in words.
    """
    if args.threads:
        torch.set_num_threads(args.threads)

    def work() -> None:
        if args.check_data:
            check(args)
            return
        check_output(args.output)
        at = commit()  # of the modules that are loaded: the tree may be another when a long run ends
        with processes(args.device) as world:
            result = train(args, world) if args.eval is None else evaluate(args, world)
            if world.main and result is not None:
                path = (args.output or args.eval.parent) / ('result.json' if args.eval is None else 'eval.json')
                result = {**result, **origin(world.device, at)}
                write_atomically(path, lambda part: part.write_text(json.dumps(result, indent=1) + '\n'))
                world.say(describe(result))

    last = None if args.output is None or args.eval is not None else args.output / 'last.pt'
    return exit_status(name, work, last)


def origin(device: torch.device, at: str) -> Result:
    """`ORIGIN` of a result of this process.

    Args:
        device: Of the run.
        at: The commit.
    """
    values = device_name(str(device)), torch.__version__, timm.__version__, at, datetime.date.today().isoformat()
    return dict(zip(ORIGIN, values))


def check_output(output: Path | None) -> None:
    """Raises NotADirectoryError where --output is a file, or would lie in one."""
    there = next((path for path in (output, *output.parents) if path.exists()), None) if output is not None else None
    if there is not None and not there.is_dir():
        raise NotADirectoryError(f'--output wants a folder, and {there} is a file')


@contextmanager
def run_folder(args: argparse.Namespace, config: dict[str, Any], world: World,
               check: Callable[[], str]) -> Iterator[None]:
    """Own the run's folder, whose checkpoint, if any, is of this configuration, while the data are checked and used.

    Args:
        args: The command line.
        config: The run's.
        world: The first process checks, and says what `check` returns.
        check: Reads all data.
    """
    with owned(args.output) if world.main else nullcontext():
        path = args.output / 'last.pt'

        def look() -> None:
            if path.exists():
                load_checkpoint(path, config)
            world.say(f'checking the data set {args.data}')
            world.say(check())

        world.first(look)
        yield


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters of a network, and how many of them a variant added to the plain one."""
    keys = set(added_keys(model))
    return (sum(p.numel() for p in model.parameters()),
            sum(p.numel() for name, p in model.named_parameters() if name in keys))


def log_validation(folder: Path, step: int, result: Result, columns: tuple[str, ...]) -> None:
    """Add a row to val.csv."""
    log = Log(folder / 'val.csv', ('step', *columns), step - 1)
    log.add({'step': step, **{name: result[name] for name in columns}})


def final_result(args: argparse.Namespace, recipe: Recipe, config: dict[str, Any], world: World, tested: Result,
                 counts: tuple[int, int]) -> Result:
    """What result.json has, beside `ORIGIN`: the figures of the test, and of the network and the run."""
    peak = torch.cuda.max_memory_allocated(world.device) / 1e6 if world.device.type == 'cuda' else None
    return {'step': recipe.steps, 'split': args.split, **tested, 'params': counts[0], 'added': counts[1],
            'peak_mb': peak, 'config': config}
