"""What segmentation is trained with: the published recipe, and the loss."""
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from fadc_timm import AdaDR
from fadc_timm.losses import dilation_frequency_loss, record_dilations
from scripts.segmentation.pairs import IGNORE
from scripts.training import engine
from scripts.training.optimizer import poly_schedule, rate_groups


@dataclass(frozen=True)
class Recipe(engine.Recipe):
    """AdamW with a polynomial decay; the defaults are those published for UPerNet with FADC on ADE20K.

    lr: Learning rate of AdamW, its betas being 0.9 and 0.999.
    fadc_lr: Multiplier of the learning rate for what a variant adds to the plain network: 1 at the published rate, less
        at higher ones, where AdaDR's dilation grows past the map.
    power: Power of the polynomial decay.
    aux_loss: Weight of the auxiliary head's loss, 0 for no head.
    dilation_loss: Weight of `fadc_timm.losses.dilation_frequency_loss`.
    """
    steps: int = 160_000
    batch: int = 16
    lr: float = 1e-4
    fadc_lr: float = 1.0
    weight_decay: float = 0.05
    clip: float = 0.1
    warmup: int = 1500
    amp: str = ''
    ema: float = 0.0
    seed: int = 0
    power: float = 1.0
    aux_loss: float = 0.4
    dilation_loss: float = 0.0

    not_negative: ClassVar[tuple[str, ...]] = (*engine.Recipe.not_negative, 'power', 'aux_loss', 'dilation_loss')
    least_share: ClassVar[tuple[int, str]] = 2, ' (decoders have BatchNorm on pooled maps of one pixel)'

    def make_optimizer(self, objective: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            rate_groups(objective, self.fadc_lr, self.weight_decay), lr=self.lr, betas=(0.9, 0.999))

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> Scheduler:
        return poly_schedule(optimizer, self.steps, self.power, self.warmup)


class Objective(engine.Objective):
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
        super().__init__(model, auxiliary)
        self.aux_loss, self.dilation_loss = aux_loss, dilation_loss
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
