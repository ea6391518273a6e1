"""Batches that are a function of the seed and the step: every variant, and every resumed run, sees the same ones."""
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scripts.training.run_folder import leave_to_parent

# what the random numbers are for
_ORDER, _TRANSFORM, _STEP = 0, 1, 2


def seed_of(seed: int, step: int, rank: int = 0) -> int:
    """A seed for torch's random numbers in a step of a run: of dropout, drop path."""
    return int(np.random.SeedSequence([_STEP, seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Samples(Dataset):
    """The n-th sample of a run: an image of the n-th place of its epoch's order, transformed with n's random numbers.

    Args:
        data: A sequence of pairs: an image, and what is to be learned of it.
        transform: Takes such a pair and a numpy Generator, and gives tensors or arrays, or dictionaries of them.
        seed: Of the run.
        groups: A group of each image: batches hold images of one group, as far as its images fill them. Then an epoch
            has whole batches, for which the last one takes images a second time.
        batch: Batch size over all processes, for groups.
        collate: Makes a batch of samples; None stacks them.
    """

    def __init__(
            self,
            data: Any,
            transform: Callable[..., tuple[Any, Any]],
            seed: int,
            groups: Sequence[int] | None = None,
            batch: int = 1,
            collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if not len(data):
            raise ValueError('There are no training images.')
        self.data, self.transform, self.seed, self.batch, self.collate = data, transform, seed, batch, collate
        self.groups = None if groups is None else np.asarray(groups)
        self.epoch_length = len(data) if groups is None else -(-len(data) // batch) * batch
        self._epoch, self._order = -1, np.zeros(0, dtype=int)

    def _order_of(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([_ORDER, self.seed, epoch])
        order = rng.permutation(len(self.data))
        if self.groups is None:
            return order
        whole, rest = [], []
        for group in np.unique(self.groups):
            own = order[self.groups[order] == group]
            end = len(own) // self.batch * self.batch
            whole.append(own[:end])
            rest.append(own[end:])
        full = np.concatenate([*whole, *rest])
        full = np.concatenate([full, rng.choice(order, self.epoch_length - len(full))])
        batches = full.reshape(-1, self.batch)
        return batches[rng.permutation(len(batches))].ravel()

    def index(self, number: int) -> int:
        """Which image sample `number` is; each epoch has all of them in an order of its own."""
        epoch, place = divmod(number, self.epoch_length)
        if epoch != self._epoch:
            self._order, self._epoch = self._order_of(epoch), epoch
        return int(self._order[place])

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        rng = np.random.default_rng([_TRANSFORM, self.seed, number])
        image, target = self.transform(*self.data[self.index(number)], rng)
        if isinstance(target, dict):
            return torch.as_tensor(image), {key: torch.as_tensor(value) for key, value in target.items()}
        return torch.as_tensor(image), torch.as_tensor(target)



def _numbers(first: int, steps: int, batch: int, rank: int, world: int) -> Iterator[list[int]]:
    share = batch // world
    for step in range(first, steps):
        start = step * batch + rank * share
        yield list(range(start, start + share))


class _Steps:
    """Sample numbers of each batch, as a batch sampler."""

    def __init__(self, make: Callable[[], Iterator[list[int]]], length: int) -> None:
        self.make, self.length = make, length

    def __iter__(self) -> Iterator[list[int]]:
        return self.make()

    def __len__(self) -> int:
        return self.length


def _start_worker(_worker: int) -> None:
    leave_to_parent()
    torch.set_num_threads(1)


def step_batches(
        samples: Samples,
        first: int,
        steps: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
) -> DataLoader:
    """Batches of steps `first` to `steps - 1`.

    Args:
        samples: The samples of the run.
        first: First step.
        steps: Number of steps of the whole run.
        batch: Batch size over all processes; process `rank` of `world` gets its share, in their order.
        rank: Number of this process.
        world: Number of processes, which divides the batch.
        workers: Processes that load.
        pin_memory: For a GPU.
    """
    if batch % world:
        raise ValueError(f'The batch size {batch} is no multiple of the {world} processes.')
    sampler = _Steps(partial(_numbers, first, steps, batch, rank, world), steps - first)
    return DataLoader(
        samples, batch_sampler=sampler, collate_fn=samples.collate, num_workers=workers,
        worker_init_fn=_start_worker if workers else None, persistent_workers=workers > 0,
        pin_memory=pin_memory)
