"""The training loop in two processes, without a launcher: the log of a run that resumes."""
import csv

from tests.support.processes import python

# a run in two processes, whose losses are 0, 1, 2, ... in the first, and ten times as much in the second
TWO = """
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from scripts.segmentation.recipe import Recipe
from scripts.training import engine
from scripts.training.batches import Samples
from scripts.training.world import World

torch.set_num_threads(1)
folder = Path({folder!r})


class Steps(engine.Objective):
    calls = 0

    def forward(self, x, y):
        self.calls += 1
        return 0 * self.model(x).sum() + (self.first + self.calls - 1) * (10 if dist.get_rank() else 1)


def run(world, output, first, **kwargs):
    objective = Steps(nn.Linear(1, 1))
    objective.first = first
    samples = Samples([(0., 0.)] * 4, lambda x, y, rng: ([x], y), 0)
    engine.train(objective, samples, Recipe(steps=4, batch=4, warmup=0), folder / output, {{'a': 1}}, world,
                 log_every=4, save_every=2, **kwargs)


def process(rank):
    dist.init_process_group('gloo', init_method=f'file://{{folder}}/store', rank=rank, world_size=2)
    world = World(torch.device('cpu'), rank, 2)
    run(world, 'whole', 0)
    run(world, 'ended', 0, stop_at=2)
    dist.barrier()
    run(world, 'ended', 2)
    dist.destroy_process_group()


child = os.fork()
process(int(child == 0))
sys.stdout.flush()
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_log_of_a_resumed_run_in_two_processes(tmp_path):
    """The mean over both, of the steps before the break too, and not the first process's sum in the place of both."""
    out = python(TWO.format(folder=str(tmp_path)), CUDA_VISIBLE_DEVICES='')
    assert out.count('after 2 of 4 steps') == 1
    for name in ('whole', 'ended'):
        with (tmp_path / name / 'log.csv').open(newline='') as file:
            row, = csv.DictReader(file)
        assert (row['step'], float(row['loss'])) == ('4', (0 + 1 + 2 + 3) / 4 * 11 / 2), name
