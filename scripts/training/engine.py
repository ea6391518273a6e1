"""The training loop: AdamW, poly schedule, clipping, AMP, EMA, DDP, checkpoints that resume exactly."""
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from fadc_timm import AdaDR
from fadc_timm.losses import dilation_frequency_loss, record_dilations
from scripts.segmentation.pairs import IGNORE
from scripts.training.batches import Samples, seed_of, step_batches
from scripts.training.checkpoint import Log, load_checkpoint, save_checkpoint
from scripts.training.optimizer import poly_schedule, rate_groups
from scripts.training.run_folder import Interrupted, Interruption

AMP_DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}
COLUMNS = ('step', 'loss', 'lr', 'grad_norm', 'seconds')


@dataclass(frozen=True)
class Recipe:
    """What a run does with a network and samples; the defaults are those published for UPerNet with FADC on ADE20K.

    steps: Number of steps.
    batch: Batch size, over all processes.
    lr: Learning rate of AdamW, its betas being 0.9 and 0.999.
    fadc_lr: Multiplier of the learning rate for what a variant adds to the plain network: 1 at the published rate, less
        at higher ones, where AdaDR's dilation grows past the map.
    weight_decay: None on 1-D parameters.
    clip: Largest norm of the gradient, 0 for no clipping.
    power: Of the polynomial decay.
    warmup: Steps of linear warm-up.
    aux_loss: Weight of the auxiliary head's loss, 0 for no head.
    dilation_loss: Weight of `fadc_timm.losses.dilation_frequency_loss`.
    amp: '', 'bfloat16' or 'float16'.
    ema: Decay of the averaged weights, 0 for none.
    seed: Of everything random.
    """
    steps: int = 160_000
    batch: int = 16
    lr: float = 1e-4
    fadc_lr: float = 1.0
    weight_decay: float = 0.05
    clip: float = 0.1
    power: float = 1.0
    warmup: int = 1500
    aux_loss: float = 0.4
    dilation_loss: float = 0.0
    amp: str = ''
    ema: float = 0.0
    seed: int = 0

    def check(self, world: int = 1) -> None:
        """Raises ValueError where a value is none that a run can have."""
        for name in ('steps', 'batch', 'lr'):
            if not getattr(self, name) > 0:
                raise ValueError(f'{name} must be above 0, got {getattr(self, name)!r}')
        for name in ('fadc_lr', 'weight_decay', 'clip', 'power', 'warmup', 'aux_loss', 'dilation_loss'):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f'{name} must be finite and not negative, got {getattr(self, name)!r}')
        if self.amp and self.amp not in AMP_DTYPES:
            raise ValueError(f"amp must be '', {' or '.join(AMP_DTYPES)}, got {self.amp!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f'ema must be at least 0 and below 1, got {self.ema!r}')
        if self.warmup >= self.steps:
            raise ValueError(f'warmup must be shorter than the run of {self.steps} steps, got {self.warmup}')
        if self.batch % world or self.batch // world < 2:
            raise ValueError(
                f'batch must give each of {world} processes the same number of images, at least 2 (decoders have '
                f'BatchNorm on pooled maps of one pixel), got {self.batch}')


class Objective(nn.Module):
    """A network with its loss: cross entropy, that of an auxiliary head on the map at stride 16, and AdaDR's.

    Raises:
        ValueError: There is a weight for AdaDR's loss, and no AdaDR.
    """

    def __init__(
            self,
            model: nn.Module,
            auxiliary: nn.Module | None = None,
            aux_loss: float = 0.0,
            dilation_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.auxiliary, self.aux_loss, self.dilation_loss = model, auxiliary, aux_loss, dilation_loss
        if dilation_loss and not any(isinstance(m, AdaDR) for m in model.modules()):
            raise ValueError('dilation_loss is a loss for AdaDR, which this network has not')
        self._feature: Tensor | None = None
        if auxiliary is not None:
            model.get_submodule('encoder').register_forward_hook(self._keep)

    def _keep(self, _encoder: nn.Module, _inputs: Any, features: list[Tensor]) -> None:
        if self.training:
            self._feature = features[-2]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of images (B, 3, H, W) and labels (B, H, W); the mean over all pixels, ignored ones counting as 0."""
        if self.dilation_loss:
            with record_dilations(self.model) as records:
                logits = self.model(x)
            loss = self._loss(logits, y) + self.dilation_loss * dilation_frequency_loss(records)
        else:
            loss = self._loss(self.model(x), y)
        if self.auxiliary is not None:
            assert self._feature is not None
            logits = self.auxiliary(self._feature)
            self._feature = None
            logits = F.interpolate(logits.float(), y.shape[-2:], mode='bilinear', align_corners=False)
            loss = loss + self.aux_loss * self._loss(logits, y)
        return loss

    @staticmethod
    def _loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), y, ignore_index=IGNORE, reduction='sum') / y.numel()


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


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The context of the network's calls."""
    return torch.autocast(device.type, AMP_DTYPES[amp]) if amp else nullcontext()


def synchronized(module: Objective, world: World) -> Objective:
    """Convert its batch norms to SyncBatchNorm, where several processes train on GPUs."""
    if world.size == 1:
        return module
    if world.device.type != 'cuda':
        world.say('batch norm: statistics of each process for itself, as SyncBatchNorm trains on GPUs only')
        return module
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


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
    optimizer = torch.optim.AdamW(
        rate_groups(objective, recipe.fadc_lr, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.999))
    scheduler = poly_schedule(optimizer, recipe.steps, recipe.power, recipe.warmup)
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
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
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
                save(done)
            if stops:
                text = f'ended after {done} of {recipe.steps} steps; the same command goes on from {path}'
                raise Interrupted(text if world.main else '')
    return world.share(ema.module if ema else model)
