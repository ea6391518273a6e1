"""Several processes: torchrun with gloo on this machine. SyncBatchNorm in training needs GPUs, its conversion not."""
import functools
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from fadc_timm import FADConv2d
from tests.support import distributed_worker
from tests.support.cases import error
from tests.support.distributed_worker import build
from tests.support.marks import before_torch_2_8
from tests.support.processes import torchrun

WORKER = Path(distributed_worker.__file__)


@pytest.fixture(scope='module')
def together(tmp_path_factory):
    """What two processes computed, in a folder; one start of them for all tasks, as a start takes seconds."""
    folder = tmp_path_factory.mktemp('together')
    torchrun(WORKER, folder, 'gradients', *([] if before_torch_2_8 else ['fsdp']), 'resume')
    return folder


@functools.cache
def gradients_of_one():
    return distributed_worker.gradients(None)


def test_two_processes_have_the_gradients_of_one(together):
    one, two = gradients_of_one(), torch.load(together / 'gradients.pt', weights_only=True)
    assert one.keys() == two.keys() and any('ada_dr' in name for name in one)
    for name, g in one.items():
        assert g is not None and g.norm() > 0, name
        assert error(two[name], g.double()) < 1e-5, name


@pytest.mark.skipif(before_torch_2_8, reason='FSDP2 on CPUs: torch 2.7 sums the gradients, and torch 2.6 does not end')
def test_fsdp(together):
    """FSDP2's step is the step of one process."""
    expected = build().state_dict()
    state = torch.load(together / 'fsdp.pt', weights_only=True)
    assert state.keys() == expected.keys()
    for name, g in gradients_of_one().items():
        assert error(state[name], (expected[name] - 0.1 * g).double()) < 1e-6, name


def test_killed_worker(together, tmp_path):
    """A process is killed, torchrun starts both anew, and the run ends as if nothing had been."""
    torchrun(WORKER, tmp_path, 'resume', KILL='1')
    assert (together / 'starts').read_text().splitlines() == ['0 0', '0 1', '0 2', '0 3']
    assert (tmp_path / 'starts').read_text().splitlines() == ['0 0', '0 1', '2 2', '2 3']
    whole, killed = (torch.load(f / 'last.pt', weights_only=True)['model'] for f in (together, tmp_path))
    assert all(torch.equal(t, killed[name]) for name, t in whole.items())


@pytest.mark.parametrize('name', ['test_resnet_fadc', 'resnet18_fadc'])
def test_sync_batch_norm_conversion(name):
    """Every norm is converted, AdaKern's too, and in eval mode computes the same."""
    model = timm.create_model(name, num_classes=4).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(type(m) is nn.SyncBatchNorm for m in norms)
    layers = [m for m in model.modules() if isinstance(m, FADConv2d)]
    assert layers and all(type(m.ada_kern.norm) is nn.SyncBatchNorm for m in layers)
    assert torch.equal(model(x), expected)
