"""What was put on a module: whether a call of it does more than its class says, so that it has to run as a module."""
from typing import Optional

import torch
from torch import nn

__all__ = ['CALL_HOOKS', 'does_more', 'has_global_hooks', 'has_hooks', 'why_not_taken_over']


# Hooks of a module that act in a call.
CALL_HOOKS = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
# Hooks of a module that act when its state is read or loaded.
_STATE_HOOKS = (
    '_state_dict_hooks', '_state_dict_pre_hooks', '_load_state_dict_pre_hooks', '_load_state_dict_post_hooks')


def _has_own_hooks(module: nn.Module) -> bool:
    """Whether hooks that act in a call were registered with the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether hooks were registered for all modules."""
    return torch.nn.modules.module._has_any_global_hook()


def does_more(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class, global hooks left aside: hooks, or a forward set on it."""
    return 'forward' in module.__dict__ or _has_own_hooks(module)


def why_not_taken_over(module: nn.Module) -> Optional[str]:
    """What was put on a module that another module in its place would lack, as a reason, or None."""
    if _has_own_hooks(module) or any(getattr(module, name, None) for name in _STATE_HOOKS):
        return 'has hooks (as weight_norm and pruning add them), which would be lost'
    methods = [name for name in module.__dict__ if callable(getattr(type(module), name, None))]
    if methods:
        return f'has methods that were set on it ({", ".join(methods)}), which would be lost'
    return None


def has_hooks(*modules: Optional[nn.Module]) -> bool:
    """Whether a call of one of the modules does more than its class: hooks, of it or of all, or a forward set on it."""
    if has_global_hooks():
        return any(module is not None for module in modules)
    return any(module is not None and does_more(module) for module in modules)
