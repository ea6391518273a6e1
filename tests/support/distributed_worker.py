"""Run by test_distributed.py under torchrun: gradients of all processes, an FSDP2 step, a run that is killed once.

    torchrun --nproc_per_node=2 distributed_worker.py FOLDER [gradients] [fsdp] [resume]
"""
import os
import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fadc_timm  # noqa: F401  registers the models
from tests.support.off_identity import off_identity

BATCH = 8


def build():
    """A network away from FADC's identity; in eval mode, where statistics are not those of a process's own batch."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet_fadc', num_classes=4, zero_init_last=False)
    return off_identity(model, 0.5).eval()


def batch(step=0):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, 3, 64, 64, generator=generator), torch.arange(BATCH) % 4


def own(t):
    return t.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else t


def gradients(folder):
    """Every parameter takes part in every step: nothing has to look for unused ones."""
    model = DistributedDataParallel(build()) if dist.is_initialized() else build()
    for _ in range(2):  # a parameter without a gradient would fail the second
        model.zero_grad()
        x, y = map(own, batch())
        cross_entropy(model(x), y).backward()
    grads = {n: p.grad for n, p in getattr(model, 'module', model).named_parameters()}
    if dist.is_initialized() and dist.get_rank() == 0:
        torch.save(grads, folder / 'gradients.pt')
    return grads


def fsdp(folder):
    model = build()
    for block in (model.layer1, model.layer2, model.layer3, model.layer4):
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = map(own, batch())
    cross_entropy(model(x), y).backward()
    optimizer.step()
    state = {k: v.full_tensor() if hasattr(v, 'full_tensor') else v for k, v in get_model_state_dict(model).items()}
    if dist.get_rank() == 0:
        torch.save(state, folder / 'fsdp.pt')


def resume(folder):
    """Four steps with a checkpoint after each. In the first life one process dies before the third step."""
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    path, start = folder / 'last.pt', 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.module.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        start = saved['step']
    for step in range(start, 4):
        if step == 2 and os.environ.get('KILL') and not int(os.environ['TORCHELASTIC_RESTART_COUNT']):
            if dist.get_rank() == 1:
                os.kill(os.getpid(), 9)
        x, y = map(own, batch(step))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if dist.get_rank() == 0:
            temporary = path.with_suffix('.tmp')
            state = dict(model=model.module.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            torch.save(state, temporary)
            temporary.rename(path)
            (folder / 'starts').open('a').write(f'{start} {step}\n')
        dist.barrier()


if __name__ == '__main__':
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    for task in sys.argv[2:]:
        {'gradients': gradients, 'fsdp': fsdp, 'resume': resume}[task](Path(sys.argv[1]))
    dist.destroy_process_group()
