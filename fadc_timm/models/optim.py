"""Parameter groups for optimizers: a learning rate of its own for what FADC adds."""
import math
from typing import Any, Collection, Dict, List

from torch import nn

from ..layers.fad_conv import PARTS

__all__ = ['param_groups']


def _no_weight_decay(model: nn.Module) -> List[str]:
    """What timm's networks want without weight decay, also where a network of timm is a part of another network."""
    names: List[str] = []
    for prefix, module in model.named_modules():
        listed = getattr(module, 'no_weight_decay', None)
        if callable(listed):
            names += [f'{prefix}.{name}' if prefix else name for name in listed()]
    return names


def param_groups(
        model: nn.Module,
        lr: float,
        fadc_scale: float = 0.1,
        weight_decay: float = 0.05,
        also: Collection[str] = (),
) -> List[Dict[str, Any]]:
    """Parameter groups for an optimizer: the network at one learning rate, what FADC adds at a fraction of it.

    Biases, norms and other 1-D parameters are not decayed, nor is what a network of timm lists in `no_weight_decay()`.
    Each parameter is in one group, also where it stands in two places; frozen parameters are in none. Each group has
    its own `lr`, which the schedulers of torch and of timm scale. timm's `warmup_lr_init` and `lr_min` are the same for
    all groups.

    Args:
        model: A network with FADC, lifted ones and ones inside of other modules included. Without FADC all of its
            parameters get `lr`.
        lr: Learning rate of the network.
        fadc_scale: Times `lr` for the parameters of FreqSelect, AdaKern, AdaDR and free offsets.
        weight_decay: Weight decay.
        also: Names of further parameters that get the rate of FADC's.

    Returns:
        Two to four dictionaries with `params`, `lr` and `weight_decay`; none is empty.

    Raises:
        TypeError: `model` is no module.
        ValueError: A number is negative or not finite, a name in `also` is no parameter's, or everything is frozen.
    """
    from timm.optim import param_groups_weight_decay  # `import timm` does without it, and so does ours
    if not isinstance(model, nn.Module):
        raise TypeError(f'param_groups wants a module, got {type(model).__name__}.')
    for name, value in (('lr', lr), ('fadc_scale', fadc_scale), ('weight_decay', weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f'{name} must be a finite number, at least 0, got {value!r}.')
    if isinstance(also, str):
        raise ValueError(f'also must be a collection of names of parameters, got the string {also!r}.')
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(set(also) - set(parameters))
    if unknown:
        raise ValueError(f'{type(model).__name__} has no parameters {", ".join(unknown)}.')
    added = {id(parameters[name]) for name in also}
    parts = tuple(PARTS.values())
    added |= {id(p) for m in model.modules() if isinstance(m, parts) for p in m.parameters()}
    groups = []
    for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=_no_weight_decay(model)):
        for rate, is_added in ((lr, False), (lr * fadc_scale, True)):
            params = [p for p in group['params'] if (id(p) in added) is is_added]
            if params:
                groups.append({'params': params, 'lr': rate, 'weight_decay': group['weight_decay']})
    if not groups:
        raise ValueError(f'{type(model).__name__} has no parameters that are trained: all of them are frozen.')
    return groups
