"""Files of a run: its checkpoint and its CSV logs. Whenever a process is killed, they are those of some step."""
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fadc_timm._writing import write_atomically
from scripts.results import write_csv


def _remove_leftovers(path: Path) -> None:
    """Temporary files of processes that were killed while they wrote this one."""
    for part in path.parent.glob(f'.{path.name}.*.part'):
        part.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: tensors, numbers, strings, and lists and dictionaries of them.

    `model` (and `model_ema`) are the network's state dicts, where fadc_timm and timm look for them.
    """
    _remove_leftovers(path)
    write_atomically(path, lambda part: torch.save(state, part))


def read_state(path: Path, device: str | torch.device = 'cpu') -> dict[str, Any]:
    """Read a checkpoint of any run.

    Raises:
        RuntimeError: There is no such file, it is damaged, or it is no checkpoint of a run.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RuntimeError(f'{path}: no such checkpoint') from None
    except Exception as e:
        raise RuntimeError(f'{path} cannot be read as a checkpoint: {e}') from e
    if not isinstance(state, dict) or 'config' not in state or 'step' not in state:
        raise RuntimeError(f'{path} is no checkpoint of segmentation.train')
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
