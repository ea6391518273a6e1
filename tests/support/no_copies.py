"""What a CUDA graph cannot hold, found without a GPU: copies from the host, and values that the host waits for."""
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.marks import before_torch_2_11


class _OneDevice(TorchDispatchMode):
    """Fails where an operator has tensors on the host and on the device, as every copy between them has."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert len(devices) <= 1, f'{func} copies between {" and ".join(sorted(devices))}'
        return out


@contextmanager
def no_copies():
    """All tensors that are made within are fake: 'cuda' needs no GPU, and asking for a value raises.

    Torch before 2.11 asks for a GPU all the same.
    """
    if before_torch_2_11 and not torch.cuda.is_available():
        pytest.skip('fake CUDA tensors need a GPU before torch 2.11')
    with FakeTensorMode(), _OneDevice():
        yield
