"""Launches by address on a CPU: as on a GPU, kernels get addresses, of which tensors are made again."""
import ctypes
import math

import torch

from fadc_timm.ops import triton_support


def _extent(size, stride):
    return 1 + sum((n - 1) * s for n, s in zip(size, stride)) if math.prod(size) else 0


def launches_by_address(monkeypatch):
    """Let a replay launch by address. A kernel in the interpreter wants tensors."""
    def relaunch_of(this, tensors):
        like = [None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in tensors]

        def relaunch(stream, *addresses):
            made = []
            for address, kind in zip(addresses, like, strict=True):
                assert (address is None) == (kind is None)
                if kind is None:
                    made.append(None)
                    continue
                size, stride, dtype = kind
                count = _extent(size, stride)
                memory = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address) if count else None
                t = torch.empty(0, dtype=dtype) if memory is None else torch.frombuffer(memory, dtype=dtype)
                made.append(t.as_strided(size, stride))
            triton_support.launch_now(this, *made)

        return relaunch

    monkeypatch.setattr(triton_support, 'relaunch_of', relaunch_of)
