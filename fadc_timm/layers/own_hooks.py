"""What was put on a module: whether a call of it does more than its class says, so that it has to run as a module."""
from typing import Optional

import torch
from torch import nn

__all__ = ['does_more', 'has_global_hooks', 'has_hooks', 'has_own_hooks']


def has_own_hooks(module: nn.Module) -> bool:
    """Whether hooks were registered with the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether hooks were registered for all modules."""
    return torch.nn.modules.module._has_any_global_hook()


def does_more(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class, global hooks left aside: hooks, or a forward set on it."""
    return 'forward' in module.__dict__ or has_own_hooks(module)


def has_hooks(*modules: Optional[nn.Module]) -> bool:
    """Whether a call of one of the modules does more than its class: hooks, of it or of all, or a forward set on it."""
    if has_global_hooks():
        return any(module is not None for module in modules)
    return any(module is not None and does_more(module) for module in modules)
