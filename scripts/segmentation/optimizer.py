"""AdamW's parameter groups, and the learning rate as a function of the step."""
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import PolyLRScheduler
from torch import nn

from scripts.segmentation.variants import added_keys


def rate_groups(model: nn.Module, multiplier: float, weight_decay: float) -> list[dict[str, Any]]:
    """timm's groups by weight decay (none on 1-D parameters), each split in what a variant adds and the others.

    Args:
        model: The network.
        multiplier: Of the learning rate of what FADC, or a deformable convolution, adds to the plain network.
        weight_decay: Weight decay.

    Returns:
        Groups with `params`, `weight_decay` and `lr_scale`; none is empty.
    """
    keys = set(added_keys(model))
    added = {id(p) for name, p in model.named_parameters() if name in keys}
    groups = []
    for group in param_groups_weight_decay(model, weight_decay):
        for is_added in (False, True):
            params = [p for p in group['params'] if (id(p) in added) is is_added]
            if params:
                groups.append({**group, 'params': params, 'lr_scale': multiplier if is_added else 1.0})
    return groups


def poly_schedule(optimizer: torch.optim.Optimizer, steps: int, power: float, warmup: int) -> PolyLRScheduler:
    """Linear warm-up to the polynomial decay, as mmsegmentation has it: `step_update(n)` sets the rate after n steps.

    The rate of step n (from 0) is `lr * n / warmup` below the warm-up, then `lr * (1 - n / steps) ** power`.
    """
    return PolyLRScheduler(
        optimizer, t_initial=steps, power=power, warmup_t=warmup, warmup_lr_init=0.0, t_in_epochs=False)
