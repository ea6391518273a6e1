"""What detectors are trained with: the 1x schedule, or AdamW."""
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.scheduler import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from scripts.training import engine
from scripts.training.optimizer import rate_groups

OPTIMIZERS = ('sgd', 'adamw')
LR_BATCH = 16  # batch size of SGD's learning rate in the presets
PRESETS: dict[str, dict[str, Any]] = {
    '1x': {'optimizer': 'sgd', 'lr': 0.02, 'weight_decay': 1e-4, 'clip': 0.0},
    'adamw': {'optimizer': 'adamw', 'lr': 1e-4, 'weight_decay': 0.05, 'clip': 0.1},
}


def usual_rate(preset: str, optimizer: str, batch: int) -> float:
    """The learning rate of a preset: SGD's goes with the batch size."""
    rate = PRESETS[preset]['lr']
    return rate * batch / LR_BATCH if optimizer == 'sgd' else rate


def usual_milestones(epochs: float) -> tuple[float, ...]:
    """Where the rate falls in a run of so many epochs: after 8 and 11 of 12."""
    return epochs * 2 / 3, epochs * 11 / 12


@dataclass(frozen=True)
class Recipe(engine.Recipe):
    """SGD or AdamW, warm-up, and a learning rate that falls to a tenth twice; the defaults are the preset 1x.

    steps: Number of steps, 0 for those of the epochs.
    lr: Learning rate, for this batch.
    fadc_lr: Multiplier of the learning rate for what a variant adds to the plain network.
    epochs: Number of epochs, which the steps are together.
    milestones: Epochs after which the rate falls to a tenth.
    optimizer: 'sgd', or 'adamw' with betas 0.9 and 0.999.
    momentum: Momentum of SGD.
    """
    steps: int = 0
    batch: int = 16
    lr: float = 0.02
    fadc_lr: float = 0.1
    weight_decay: float = 1e-4
    clip: float = 0.0
    warmup: int = 500
    amp: str = ''
    ema: float = 0.0
    seed: int = 0
    epochs: float = 12.0
    milestones: tuple[float, ...] = (8.0, 11.0)
    optimizer: str = 'sgd'
    momentum: float = 0.9

    not_negative: ClassVar[tuple[str, ...]] = (*engine.Recipe.not_negative, 'momentum')

    def check(self, world: int = 1) -> None:
        super().check(world)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f'optimizer must be {" or ".join(OPTIMIZERS)}, got {self.optimizer!r}')
        if not self.epochs > 0:
            raise ValueError(f'epochs must be above 0, got {self.epochs!r}')
        if list(self.milestones) != sorted(self.milestones) or any(not 0 < m <= self.epochs for m in self.milestones):
            raise ValueError(f'milestones must ascend, above 0 and up to the {self.epochs:g} epochs of the '
                             f'{self.steps} steps, got {", ".join(f"{m:g}" for m in self.milestones)}')

    def make_optimizer(self, objective: nn.Module) -> torch.optim.Optimizer:
        groups = rate_groups(objective, self.fadc_lr, self.weight_decay)
        if self.optimizer == 'sgd':
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.999))

    @property
    def falls(self) -> list[int]:
        """Steps after which the rate falls to a tenth."""
        return [round(self.steps * m / self.epochs) for m in self.milestones]

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> Scheduler:
        # timm's milestones act on the step before theirs
        decays = [step + 1 for step in self.falls]
        return MultiStepLRScheduler(
            optimizer, decays, 0.1, self.warmup, warmup_lr_init=0.0, warmup_prefix=False, t_in_epochs=False)


class Objective(engine.Objective):
    """A detector with the sum of its losses."""

    def forward(self, x: list[Tensor], y: list[dict[str, Tensor]]) -> Tensor:
        """The loss of images (3, H, W) in [0, 1], with `boxes` (N, 4), `labels` (N,) and maybe `masks` (N, H, W)."""
        losses = self.model(x, y)
        return torch.stack([loss.float() for loss in losses.values()]).sum()
