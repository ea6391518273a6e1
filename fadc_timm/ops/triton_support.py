"""Whether Triton can be used. It is optional, and only imported here and where its kernels are, at their first use."""
import functools
from typing import Optional

import torch

__all__ = ['block', 'is_interpreted', 'unavailable', 'why_not_on']

MINIMUM = (3, 5)  # torch 2.9 brings it; 3.2 and 3.3 lack float64 products, and fail in other places


@functools.cache
def unavailable() -> Optional[str]:
    """Why there is no Triton to be used, or None."""
    try:
        import triton
    except ImportError as e:
        return f'Triton is not installed ({e})'
    if tuple(int(n) for n in triton.__version__.split('.')[:2]) < MINIMUM:
        return f'Triton {triton.__version__} is too old, it must be {MINIMUM[0]}.{MINIMUM[1]} or newer'
    return None


@functools.cache
def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on a CPU. That is settled at the first call."""
    import triton

    def probe():
        pass

    return not isinstance(triton.jit(probe), triton.runtime.JITFunction)


@torch.compiler.assume_constant_result
def why_not_on(device_type: str) -> Optional[str]:
    """Why Triton's kernels do not run on a device, or None."""
    reason = unavailable()
    if reason is not None:
        return reason
    if device_type in ('cuda', 'meta') or (device_type == 'cpu' and is_interpreted()):
        return None
    return (f'Triton does not run on {device_type}, but for a CPU if TRITON_INTERPRET=1 is in the environment before '
            'the first use')


def block(n: int, low: int, high: int) -> int:
    """The power of two for n, within bounds: sides of a kernel's blocks."""
    return min(max(1 << (n - 1).bit_length(), low), high)
