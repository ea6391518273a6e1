"""The processes of a run: this one among those that torchrun started, if it did."""
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class World:
    """This process among those of the run."""
    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None  # a group of processes on CPUs, which waits for no GPU

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stdout)

    def mean(self, value: Tensor) -> float:
        """Mean over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value.item()

    def any(self, question: bool) -> bool:
        """Whether one of the processes says yes."""
        if self.size > 1:
            answers = torch.tensor(int(question))
            dist.all_reduce(answers, dist.ReduceOp.MAX, group=self.control)
            return bool(answers)
        return question

    def gather(self, value: Any) -> list[Any]:
        """What each of the processes has, in their order; small things, as they are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def first(self, work: Callable[[], object]) -> None:
        """Let the first process work; the others wait, and end if it fails, as it has said why."""
        failed = True
        try:
            if self.main:
                work()
            failed = False
        finally:
            failed = self.any(failed)
        if failed:
            raise SystemExit(1)

    def share(self, module: nn.Module) -> nn.Module:
        """Give all processes the buffers of the first: statistics of batch norms that are not synchronised."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)
        return module

    def check_device(self) -> None:
        """Raises ValueError where the device is not there, before anything is read or downloaded."""
        try:
            torch.zeros((), device=self.device)
        except (AssertionError, RuntimeError) as e:
            raise ValueError(f'--device {self.device} cannot be used: {e}') from e


@contextmanager
def processes(device: str) -> Iterator[World]:
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
        # the others wait while the first process checks the data
        control = dist.new_group(backend='gloo', timeout=timedelta(days=1))
        yield World(local, dist.get_rank(), dist.get_world_size(), control)
    finally:
        dist.destroy_process_group()
