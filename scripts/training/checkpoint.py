"""Files of a run: its checkpoint and its CSV logs. Whenever a process is killed, they are those of some step."""
import csv
import pickle
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fadc_timm._writing import write_atomically
from fadc_timm.checkpoints.convert import what_was_blocked
from fadc_timm.models._checkpoint import why_unreadable
from scripts.results import write_csv


def _remove_leftovers(path: Path) -> None:
    """Temporary files of processes that were killed while they wrote this one."""
    for part in path.parent.glob(f'.{path.name}.*.part'):
        part.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: tensors, numbers, strings, and lists and dictionaries of them.

    `model` (and `model_ema`) are the network's state dicts, where fadc_timm and timm look for them.

    Raises:
        RuntimeError: It cannot be written, for instance because the disk is full; the old file, if any, stays.
    """
    _remove_leftovers(path)
    try:
        write_atomically(path, lambda part: torch.save(state, part))
    except (OSError, RuntimeError) as e:
        # torch names neither the file nor the system's error, and adds a trace of its C++ functions
        guess = '' if isinstance(e, OSError) else ', is the disk full?'
        reason = str(e).partition('\n')[0]
        raise RuntimeError(f'{path} cannot be written{guess} ({reason})') from e


def read_state(
        path: Path, device: str | torch.device = 'cpu', needs: Collection[str] = ()) -> dict[str, Any]:
    """Read a checkpoint of any run.

    Args:
        path: The file.
        device: Where to.
        needs: What its configuration must have, which only runs of one script have.

    Raises:
        RuntimeError: There is no such file, it is damaged, or it is no checkpoint of a run, or one of another script.
    """
    try:
        reason = why_unreadable(str(path))
        if reason:
            raise RuntimeError(f'it is {reason}')
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RuntimeError(f'{path}: no such checkpoint') from None
    except pickle.UnpicklingError as e:
        raise RuntimeError(f'{path} cannot be read as a checkpoint: {what_was_blocked(e)}') from e
    except Exception as e:
        raise RuntimeError(f'{path} cannot be read as a checkpoint: {e}') from e
    if not isinstance(state, dict) or 'config' not in state or 'step' not in state:
        raise RuntimeError(f'{path} is no checkpoint of a training script')
    lacking = [name for name in needs if name not in state['config']]
    if lacking:
        raise RuntimeError(f'{path} is a checkpoint of another script: its configuration has no {", ".join(lacking)}')
    return state


def load_checkpoint(path: Path, config: dict[str, Any], device: str | torch.device = 'cpu') -> dict[str, Any]:
    """Read a checkpoint of this run.

    Args:
        path: The file.
        config: What decides the run's results; that of the checkpoint must be the same.
        device: Where to.

    Raises:
        RuntimeError: The file is damaged, or it is of a run with another configuration; the message names what differs.
    """
    state = read_state(path, device)
    old = state['config']
    differing = [f'{key} is {config.get(key)!r}, was {old.get(key)!r}' for key in sorted(config.keys() | old.keys())
                 if config.get(key) != old.get(key)]
    if differing:
        raise RuntimeError(
            f'{path} is of another run: {"; ".join(differing)}. Give the same options, or another --output.')
    return state


def load_weights(model: nn.Module, state: dict[str, Any]) -> nn.Module:
    """Load a checkpoint's weights into its network, the averaged ones if it has them."""
    model.load_state_dict(state['model_ema' if 'model_ema' in state else 'model'])
    return model


def classes_of(path: Path, config: dict[str, Any]) -> list[str]:
    """The names of a checkpoint's classes; an old checkpoint without them is a ValueError."""
    if 'classes' not in config:
        raise ValueError(f'{path} does not name its classes: an older version of this script wrote it')
    return config['classes']


def check_classes(path: Path, config: dict[str, Any], classes: Sequence[str], name: str) -> None:
    """Raises ValueError where a checkpoint has other classes than the data set of that name."""
    own, there = classes_of(path, config), list(classes)
    if len(own) != len(there):
        names = [', '.join(some[:8]) + ', ...' * (len(some) > 8) for some in (own, there)]
        raise ValueError(f'{path} was trained on {len(own)} classes ({names[0]}); the data set {name} has '
                         f'{len(there)} ({names[1]})')
    differing = [i for i, pair in enumerate(zip(own, there)) if pair[0] != pair[1]]
    if differing:
        i = differing[0]
        raise ValueError(f'{path} was trained on other classes than those of the data set {name}: class {i} was '
                         f'{own[i]!r} and is {there[i]!r} ({len(differing)} of {len(own)} differ)')


class Log:
    """A CSV file with a row for a step. What a checkpoint does not know of is taken back when a run resumes."""

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        """
        Args:
            path: The file.
            columns: Its columns, the first of which is `step`.
            step: Rows of later steps are removed; 0 begins anew.
        """
        _remove_leftovers(path)
        rows = []
        if step and path.exists():
            with path.open(newline='') as file:
                # a process that is killed may leave a line without its end
                rows = [row for row in csv.DictReader(file)
                        if None not in row.values() and row['step'].isdigit() and int(row['step']) <= step]

        write_csv(path, columns, rows)
        self.path, self.columns, self.last = path, columns, {} if not rows else rows[-1]

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; floats in the nine digits that tell all float32 values apart."""
        self.last = {k: f'{row[k]:.9g}' if isinstance(row[k], float) else str(row[k]) for k in self.columns}
        with self.path.open('a', newline='') as file:
            csv.DictWriter(file, self.columns, lineterminator='\n').writerow(self.last)
