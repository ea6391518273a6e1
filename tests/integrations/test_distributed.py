"""Several processes: torchrun with gloo on this machine. SyncBatchNorm in training needs GPUs, its conversion not."""
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from fadc_timm import FADConv2d
from tests.support import distributed_worker
from tests.support.cases import error
from tests.support.distributed_worker import build
from tests.support.processes import torchrun

WORKER = Path(distributed_worker.__file__)


def run(task, folder, processes=2, **env):
    torchrun(WORKER, task, folder, processes=processes, **env)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    for processes in (1, 2):
        run('gradients', tmp_path, processes)
    one, two = (torch.load(tmp_path / f'{name}.pt', weights_only=True) for name in ('one', 'two'))
    assert one.keys() == two.keys() and any('ada_dr' in name for name in one)
    for name, g in one.items():
        assert g is not None and g.norm() > 0, name
        assert error(two[name], g.double()) < 1e-5, name


def test_fsdp(tmp_path):
    """FSDP2's step is the step of one process."""
    run('gradients', tmp_path, 1)
    run('fsdp', tmp_path)
    expected = build().state_dict()
    state = torch.load(tmp_path / 'fsdp.pt', weights_only=True)
    assert state.keys() == expected.keys()
    for name, g in torch.load(tmp_path / 'one.pt', weights_only=True).items():
        assert error(state[name], (expected[name] - 0.1 * g).double()) < 1e-6, name


def test_killed_worker(tmp_path):
    """A process is killed, torchrun starts both anew, and the run ends as if nothing had been."""
    for name, env in (('whole', {}), ('killed', dict(KILL='1'))):
        (tmp_path / name).mkdir()
        run('resume', tmp_path / name, **env)
    assert (tmp_path / 'whole' / 'starts').read_text().splitlines() == ['0 0', '0 1', '0 2', '0 3']
    assert (tmp_path / 'killed' / 'starts').read_text().splitlines() == ['0 0', '0 1', '2 2', '2 3']
    whole, killed = (torch.load(tmp_path / n / 'last.pt', weights_only=True)['model'] for n in ('whole', 'killed'))
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
