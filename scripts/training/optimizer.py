"""AdamW's parameter groups, and the learning rate as a function of the step."""
from typing import Any

import torch
from timm.scheduler import PolyLRScheduler
from torch import nn

from fadc_timm import param_groups
from scripts.training.variants import added_keys


def rate_groups(model: nn.Module, multiplier: float, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of :func:`fadc_timm.param_groups`, with what a variant adds in the place of what FADC adds.

    Args:
        model: The network.
        multiplier: Of the learning rate of what FADC, or a deformable convolution, adds to the plain network.
        weight_decay: Weight decay.

    Returns:
        Groups with `params`, `weight_decay` and `lr_scale`; none is empty.
    """
    keys = set(added_keys(model))
    groups = param_groups(
        model, 1.0, multiplier, weight_decay, also=[name for name, _ in model.named_parameters() if name in keys])
    for group in groups:
        group['lr_scale'] = group.pop('lr')  # of a rate of 1
    return groups


def poly_schedule(optimizer: torch.optim.Optimizer, steps: int, power: float, warmup: int) -> PolyLRScheduler:
    """Linear warm-up to the polynomial decay, as mmsegmentation has it: `step_update(n)` sets the rate after n steps.

    The rate of step n (from 0) is `lr * n / warmup` below the warm-up, then `lr * (1 - n / steps) ** power`.
    """
    return PolyLRScheduler(
        optimizer, t_initial=steps, power=power, warmup_t=warmup, warmup_lr_init=0.0, t_in_epochs=False)
