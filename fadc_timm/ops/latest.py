"""What was found out about the latest call, for calls like it: torch compares their tensors in one function of C++."""
from typing import Any, Hashable, Optional, Sequence

import torch
from torch import Tensor

__all__ = ['Latest']

# What torch.compile guards its graphs by; torch may drop it, as it is private.
_Guards: Any = getattr(getattr(torch._C._dynamo, 'guards', None), 'TensorGuards', None)


class Latest:
    """A value that holds for calls like one call.

    They have equal facts, and tensors of the same classes, dtypes, devices, sizes, strides and requires_grad. They are
    under no other transform, mode or inference mode, and autocast is on for both or for none. Tensors of equal calls
    are not the same twice. What this leaves to the facts: the mode of gradients, forward-mode derivatives, modes of
    torch functions, and autocast's dtype.
    """
    __slots__ = ('_facts', '_guards', '_missing', '_present', 'value')

    def __init__(self, facts: Hashable, tensors: Sequence[Optional[Tensor]], value: Any) -> None:
        """
        Args:
            facts: What the value depends on besides the tensors.
            tensors: Those of the call; None counts too.
            value: What holds.
        """
        self._facts, self.value = facts, value
        self._missing = [i for i, t in enumerate(tensors) if t is None]
        self._present = [i for i, t in enumerate(tensors) if t is not None]
        present: Any = [t for t in tensors if t is not None]
        self._guards = None if _Guards is None else _Guards(
            *present, dynamic_dims_sizes=[list(t.shape) for t in present],
            dynamic_dims_strides=[list(t.stride()) for t in present])

    def holds(self, facts: Hashable, tensors: Sequence[Optional[Tensor]]) -> bool:
        """Whether a call of as many tensors is like this one."""
        if self._guards is None or facts != self._facts:
            return False
        for i in self._missing:
            if tensors[i] is not None:
                return False
        return self._guards.check(*[tensors[i] for i in self._present])
