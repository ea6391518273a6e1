"""Tables on a device that are made once, and outlive the CUDA graphs that read them."""
from threading import Lock
from typing import Any, Callable, Dict, Generic, Sequence, Tuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ['KeptTables', 'prepare']

_Tables = TypeVar('_Tables')


class KeptTables(Generic[_Tables]):
    """A function that makes tables from numbers, called once for each set of its arguments.

    A CUDA graph reads the tables that a call before its capture made. Without such a call the graph makes them itself,
    at each replay, which is slower.
    """

    def __init__(self, make: Callable[..., _Tables], most: int = 256) -> None:
        """
        Args:
            make: The function. The last of its arguments is the device, on which it fills the tables: a CUDA graph
                cannot capture a copy from the host.
            most: How many results are kept besides those that captured graphs read. The oldest go first.
        """
        self.make, self.most = make, most
        # results by the arguments that they were made for, the oldest first
        self.kept: Dict[Tuple[Any, ...], _Tables] = {}
        # those that captured graphs read: they have to outlive the graphs
        self.captured: Dict[Tuple[Any, ...], _Tables] = {}
        self._lock = Lock()

    def __call__(self, *key: Any) -> _Tables:
        device: torch.device = key[-1]
        capturing = device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
        tables = self.kept.get(key)
        if tables is None:
            tables = self.captured.get(key)
        if tables is not None:
            return self.captured.setdefault(key, tables) if capturing else tables
        with torch.inference_mode(False), torch.no_grad():
            tables = self.make(*key)
        if capturing:
            return tables  # a table made in a capture has no values until the graph runs
        if device.type == 'cuda' and torch.cuda.is_available():
            torch.cuda.current_stream(device).synchronize()  # other streams read the tables too
        with self._lock:
            if key not in self.kept:
                while len(self.kept) >= self.most:
                    del self.kept[next(iter(self.kept))]
                self.kept[key] = tables
            return self.kept[key]


def prepare(x: Tensor, numbers: Sequence[Any], make: Callable[[], Any]) -> None:
    """Make the tables of a call while torch makes a graph of it.

    The first run of a compiled graph may be the one in which torch collects what a CUDA graph allocates, where nothing
    may be kept.

    Args:
        x: A fake tensor of the call. Nothing is made for a device on which nothing runs.
        numbers: Those of the call that the tables follow from. Nothing is made where one of them is symbolic.
        make: Makes the tables.
    """
    runs = torch.cuda.is_available() if x.device.type == 'cuda' else x.device.type != 'meta'
    if runs and all(type(n) is int for n in numbers):
        with _disable_current_modes():
            make()
