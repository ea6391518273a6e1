"""What was put on a module: whether a call of it does more than its class says, so that it has to run as a module."""
from typing import Any, Dict, Optional

import torch
from torch import nn

__all__ = ['does_more', 'has_global_hooks', 'has_hooks', 'says_more', 'why_not_taken_over']


# Hooks of a module that act when its state is read or loaded.
_STATE_HOOKS = (
    '_state_dict_hooks', '_state_dict_pre_hooks', '_load_state_dict_pre_hooks', '_load_state_dict_post_hooks')


def _has_call_hooks(own: Dict[str, Any]) -> bool:
    """Whether hooks that act in a call are among the attributes of a module."""
    return bool(
        own['_forward_hooks'] or own['_forward_pre_hooks'] or own['_backward_hooks'] or own['_backward_pre_hooks'])


def has_global_hooks() -> bool:
    """Whether hooks were registered for all modules."""
    # torch has a function for this from 2.7 on
    own = torch.nn.modules.module
    return bool(own._global_forward_hooks or own._global_forward_pre_hooks or own._global_backward_hooks
                or own._global_backward_pre_hooks)


def says_more(own: Dict[str, Any]) -> bool:
    """:func:`does_more` of the module that has these attributes of its own."""
    return 'forward' in own or _has_call_hooks(own)


def does_more(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class, global hooks left aside: hooks, or a forward set on it."""
    return says_more(module.__dict__)


def why_not_taken_over(module: nn.Module) -> Optional[str]:
    """What was put on a module that another module in its place would lack, as a reason, or None."""
    if _has_call_hooks(module.__dict__) or any(getattr(module, name, None) for name in _STATE_HOOKS):
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
