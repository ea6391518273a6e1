"""The training loop: clipping, AMP, EMA, DDP, a CSV log, checkpoints that resume exactly."""
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from scripts.training.batches import Samples, seed_of, step_batches
from scripts.training.checkpoint import Log, load_checkpoint, save_checkpoint
from scripts.training.run_folder import Interrupted, Interruption
from scripts.training.world import World

AMP_DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}
COLUMNS = ('step', 'loss', 'lr', 'grad_norm', 'seconds')
Trained = TypeVar('Trained', bound='Objective')


@dataclass(frozen=True)
class Recipe:
    """What a run does with a network and samples. The recipe of a task has defaults, and an optimizer.

    steps: Number of steps.
    batch: Batch size, over all processes.
    lr: Learning rate.
    fadc_lr: Multiplier of the learning rate for what a variant adds to the plain network.
    weight_decay: Weight decay, none on 1-D parameters.
    clip: Largest norm of the gradient, 0 for no clipping.
    warmup: Steps of linear warm-up.
    amp: Dtype of automatic mixed precision, '' for none.
    ema: Decay of the averaged weights, 0 for none.
    seed: Seed of everything random.
    """
    steps: int
    batch: int
    lr: float
    fadc_lr: float
    weight_decay: float
    clip: float
    warmup: int
    amp: str
    ema: float
    seed: int

    not_negative: ClassVar[tuple[str, ...]] = ('fadc_lr', 'weight_decay', 'clip', 'warmup')
    least_share: ClassVar[tuple[int, str]] = 1, ''  # images of a process in a batch, and why so many

    def check(self, world: int = 1) -> None:
        """Raises ValueError where a value is none that a run can have."""
        for name in ('steps', 'batch', 'lr'):
            if not getattr(self, name) > 0:
                raise ValueError(f'{name} must be above 0, got {getattr(self, name)!r}')
        for name in self.not_negative:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f'{name} must be finite and not negative, got {getattr(self, name)!r}')
        if self.amp and self.amp not in AMP_DTYPES:
            raise ValueError(f"amp must be '', {' or '.join(AMP_DTYPES)}, got {self.amp!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f'ema must be at least 0 and below 1, got {self.ema!r}')
        if self.warmup >= self.steps:
            raise ValueError(f'warmup must be shorter than the run of {self.steps} steps, got {self.warmup}')
        least, why = self.least_share
        if self.batch % world or self.batch // world < least:
            raise ValueError(f'batch must give each of {world} processes the same number of images, at least {least}'
                             f'{why}, got {self.batch}')

    def make_optimizer(self, objective: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a network and its loss; its groups have an `lr_scale`."""
        raise NotImplementedError

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> Scheduler:
        """The learning rate as a function of the step: `step_update(n)` sets the rate after n steps."""
        raise NotImplementedError


class Objective(nn.Module):
    """A network with its loss; `forward(x, y)` gives the loss of a batch, as the samples collate it.

    Args:
        model: The network.
        auxiliary: What is trained beside the network and is no part of it, None for nothing.
    """

    def __init__(self, model: nn.Module, auxiliary: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.auxiliary = model, auxiliary


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The context of the network's calls."""
    return torch.autocast(device.type, AMP_DTYPES[amp]) if amp else nullcontext()


def synchronized(module: Trained, world: World) -> Trained:
    """Convert its batch norms to SyncBatchNorm, where several processes train on GPUs."""
    if world.size == 1:
        return module
    if world.device.type != 'cuda':
        world.say('batch norm: statistics of each process for itself, as SyncBatchNorm trains on GPUs only')
        return module
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def _to(value: Any, device: torch.device, channels_last: bool) -> Any:
    """A batch on the device: a tensor, or a list or dictionary of such."""
    if isinstance(value, Tensor):
        value = value.to(device, non_blocking=True)
        return value.contiguous(memory_format=torch.channels_last) if channels_last and value.ndim == 4 else value
    if isinstance(value, dict):
        return {key: _to(entry, device, False) for key, entry in value.items()}
    return [_to(entry, device, False) for entry in value]


def train(
        objective: Objective,
        samples: Samples,
        recipe: Recipe,
        output: Path,
        config: dict[str, Any],
        world: World,
        workers: int = 0,
        log_every: int = 50,
        save_every: int = 1000,
        eval_every: int = 0,
        validate: Callable[[nn.Module, int], object] | None = None,
        stop_at: int = 0,
        channels_last: bool = False,
) -> nn.Module:
    """Train, or go on with the training whose checkpoint is in the output folder.

    Args:
        objective: Network and loss, on the device.
        samples: The samples of the run, of the recipe's seed.
        recipe: What to do.
        output: Folder with `last.pt` and `log.csv` (mean of the loss since the row before).
        config: What decides the results, as kept in the checkpoint.
        world: This process.
        workers: Processes that load.
        log_every: Steps of a row of the log.
        save_every: Steps between checkpoints; one is written at the end too.
        eval_every: Steps between calls of `validate`, 0 for none.
        validate: Called with the network (the averaged one, if there is one) and the number of steps done.
        stop_at: End after so many steps of the recipe's, as if the process had been killed after a checkpoint.
        channels_last: Memory format of the images, and of the network.

    Returns:
        The network: the averaged one, if there is one.

    Raises:
        RuntimeError: The loss is not finite, or the checkpoint is of another run.
        Interrupted: Ctrl-C or SIGTERM, after the step that it came in and a checkpoint.
    """
    recipe.check(world.size)
    device, model = world.device, objective.model
    optimizer = recipe.make_optimizer(objective)
    scheduler = recipe.make_schedule(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == 'float16')
    ema = ModelEmaV3(model, recipe.ema) if recipe.ema else None
    path = output / 'last.pt'
    first, loss_sum, loss_count, spent = 0, torch.zeros((), dtype=torch.float64, device=device), 0, 0.0
    if path.exists():
        state = load_checkpoint(path, config, device)
        model.load_state_dict(state['model'])
        if objective.auxiliary is not None:
            objective.auxiliary.load_state_dict(state['auxiliary'])
        if ema is not None:
            ema.module.load_state_dict(state['model_ema'])
        optimizer.load_state_dict(state['optimizer'])
        scaler.load_state_dict(state['scaler'])
        first, loss_count, spent = state['step'], state['loss_count'], state['seconds']
        loss_sum += state['loss_sum']
        world.say(f'resumed {path} after {first} of {recipe.steps} steps')
    log = Log(output / 'log.csv', COLUMNS, first) if world.main else None
    network: nn.Module = objective
    if world.size > 1:
        network = nn.parallel.DistributedDataParallel(objective, [device] if device.type == 'cuda' else None)
    start = time.perf_counter() - spent

    def save(step: int) -> None:
        if not world.main:
            return
        save_checkpoint(path, {
            'step': step, 'config': config, 'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
            'scaler': scaler.state_dict(), 'loss_sum': loss_sum.item(), 'loss_count': loss_count,
            'seconds': time.perf_counter() - start,
            **({'model_ema': ema.module.state_dict()} if ema else {}),
            **({'auxiliary': objective.auxiliary.state_dict()} if objective.auxiliary is not None else {})})

    end = min(stop_at or recipe.steps, recipe.steps)
    batches = step_batches(
        samples, first, end, recipe.batch, world.rank, world.size, workers, pin_memory=device.type == 'cuda')
    # no bar where nobody sees it: then there is a line for each row of the log
    bar = tqdm(batches, initial=first, total=recipe.steps, unit='step', disable=None if world.main else True)
    objective.train()
    with Interruption(world.main) as interruption:
        for step, (x, y) in enumerate(bar, start=first):
            x, y = _to(x, device, channels_last), _to(y, device, False)
            scheduler.step_update(num_updates=step)
            lr = max(group['lr'] / group['lr_scale'] if group['lr_scale'] else 0.0 for group in optimizer.param_groups)
            torch.manual_seed(seed_of(recipe.seed, step, world.rank))
            with autocast(device, recipe.amp):
                loss = network(x, y)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(objective.parameters(), recipe.clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            if ema is not None:
                ema.update(model, step + 1)
            loss_sum += loss.detach()
            loss_count += 1
            done = step + 1
            stops = world.any(interruption.asked)
            logs = done % log_every == 0 or done == recipe.steps
            saves = done % save_every == 0 or done == end or stops
            if logs or saves:
                mean = world.mean(loss_sum / loss_count)
                if not math.isfinite(mean):
                    raise RuntimeError(f'The loss is {mean} in one of the {loss_count} steps up to {done}.')
            if logs:
                row = {'step': done, 'loss': mean, 'lr': lr, 'grad_norm': norm.item(),
                       'seconds': time.perf_counter() - start}
                loss_sum.zero_()
                loss_count = 0
                if log is not None:
                    log.add(row)
                bar.set_postfix(loss=f'{mean:.4f}', refresh=False)
                if bar.disable:
                    world.say(f'step {done} loss {mean:.4f} lr {lr:.3g} norm {norm.item():.3g} {row["seconds"]:.0f} s')
            if eval_every and validate is not None and done % eval_every == 0 and done < recipe.steps:
                validate(world.share(ema.module if ema else model), done)
            if saves:
                # all processes go on from the sum in the checkpoint, those that resume and these
                loss_sum.fill_(world.mean(loss_sum))
                save(done)
            if stops:
                text = f'ended after {done} of {recipe.steps} steps; the same command goes on from {path}'
                raise Interrupted(text if world.main else '')
    return world.share(ema.module if ema else model)
