"""Whether Triton can be used, and how its kernels are launched.

Triton is optional. Of the operators only this module and the modules of kernels import it, at their first use.
"""
import functools
import warnings
from contextlib import suppress
from threading import get_ident
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    'MOST_ELEMENTS', 'Launch', 'block', 'cdiv', 'current_device', 'current_stream', 'has_launch_hooks', 'index_type',
    'is_default_on', 'is_interpreted', 'launch', 'launch_now', 'observers', 'relaunch_of', 'types_of', 'unavailable',
    'why_not', 'why_not_on']

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

MOST_ELEMENTS = 2 ** 20  # that Triton lets a block have

MINIMUM = (3, 5)  # the version with torch 2.9; Triton 3.2 and 3.3 have no float64 products, and fail in other places


@functools.cache
def unavailable() -> Optional[str]:
    """Why Triton cannot be used, or None."""
    try:
        import triton
    except ImportError as e:
        return f'Triton is not installed ({e})'
    except Exception as e:
        return f'Triton cannot be imported ({type(e).__name__}: {e})'
    if tuple(int(n) for n in triton.__version__.split('.')[:2]) < MINIMUM:
        return f'Triton {triton.__version__} is too old, it must be {MINIMUM[0]}.{MINIMUM[1]} or newer'
    return None


@functools.cache
def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on a CPU. The first call settles the answer."""
    import triton

    def probe():
        pass

    return not isinstance(triton.jit(probe), triton.runtime.JITFunction)


@functools.cache
def _why_not_on_cuda() -> Optional[str]:
    """Why a kernel cannot be compiled and run on this machine's GPU, or None. The first call tries it."""
    if is_interpreted() or not torch.cuda.is_available():
        return None  # CUDA tensors are then fake, and no kernel runs on them
    try:
        from .triton_math import probe
        with _disable_current_modes():  # the first call may be on fake tensors, while torch traces
            out = torch.empty(1, dtype=torch.int32, device='cuda')
            launch(Launch(probe, (1,), (), ()), out)
    except Exception as e:
        return f'Triton cannot run a kernel on {torch.cuda.get_device_name()} ({type(e).__name__}: {e})'
    return None


@torch.compiler.assume_constant_result
def why_not_on(device_type: str) -> Optional[str]:
    """Why Triton's kernels do not run on a device, or None."""
    reason = unavailable()
    if reason is not None:
        return reason
    if device_type == 'cuda':
        return _why_not_on_cuda()
    if device_type == 'meta' or (device_type == 'cpu' and is_interpreted()):
        return None
    if device_type == 'cpu':
        return 'Triton does not run on cpu without TRITON_INTERPRET=1 in the environment before the first use'
    return f'Triton does not run on {device_type}'


def why_not(x: Tensor) -> Optional[str]:
    """Why the kernels cannot run on a map, or None."""
    if x.dtype not in _DTYPES:
        return f'the kernels take float16, bfloat16, float32, float64, not {str(x.dtype).removeprefix("torch.")}'
    return why_not_on(x.device.type)


@torch.compiler.assume_constant_result
def is_default_on(device_type: str) -> bool:
    """Whether Triton's kernels run on a device if no backend is named: on CUDA, if they can run there.

    If they cannot, the first call warns with the reason.
    """
    return device_type == 'cuda' and _is_default_on_cuda()


@functools.cache
def _is_default_on_cuda() -> bool:
    reason = why_not_on('cuda')
    if reason is not None:
        warnings.warn(
            f"{reason}: on CUDA a slower backend runs in place of 'triton', 'torchvision' or for depthwise kernels "
            "'gather'.", stacklevel=2)
    return reason is None


def block(n: int, low: int, high: int) -> int:
    """The side of a kernel's block for n elements: the next power of two, within bounds."""
    return min(max(1 << (n - 1).bit_length(), low), high)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def types_of(dtype: torch.dtype) -> Tuple[Any, bool]:
    """Triton's type to accumulate in for tensors of a dtype, and whether kernels have to round to bfloat16 themselves.

    They have to in Triton's interpreter, which truncates where a GPU rounds.
    """
    import triton.language as tl
    return tl.float64 if dtype == torch.float64 else tl.float32, dtype == torch.bfloat16 and is_interpreted()


def index_type(elements: int) -> Any:
    """Triton's type for the places of so many elements."""
    import triton.language as tl
    return tl.int32 if elements < 2 ** 31 else tl.int64


class Launch:
    """A kernel with all its arguments except the tensors: `kernel[grid](*tensors, *numbers, *constants)`.

    So the parameters of a kernel have this order: pointers, numbers, constants of the compiler. A launch is made once
    per set of shapes, strides and dtypes, and kept. It remembers the compiled kernel, so that the next call need not
    ask Triton for it.

    Args:
        kernel: A function under `triton.jit`.
        grid: One to three numbers of programs.
        numbers: Integers and floats.
        constants: Values of the parameters marked `tl.constexpr`.
        num_warps: Warps of a program.
        num_stages: Stages of its pipelined loops.
    """
    __slots__ = ('constants', 'grid', 'kept', 'kernel', 'num_stages', 'num_warps', 'numbers')

    def __init__(
            self,
            kernel: Any,
            grid: Tuple[int, ...],
            numbers: Tuple[Any, ...],
            constants: Tuple[Any, ...],
            num_warps: int = 4,
            num_stages: int = 1,
    ) -> None:
        self.kernel, self.numbers, self.constants = kernel, numbers, constants
        self.grid = (*grid, 1, 1)[:3]
        self.num_warps, self.num_stages = num_warps, num_stages
        # what launches the compiled kernels again, by dtype, device and alignment of each tensor
        self.kept: Dict[Tuple[Any, ...], _Relaunch] = {}


# By thread: what takes a launch and its tensors in place of :func:`launch`.
observers: Dict[int, Callable[[Launch, Tuple[Optional[Tensor], ...]], None]] = {}

# torch.cuda.current_device, without its questions about the state of CUDA. torch without CUDA has only the latter.
current_device = getattr(torch._C, '_cuda_getDevice', torch.cuda.current_device)


def current_stream(device: int) -> int:
    """The current stream of a CUDA device, as a number."""
    return torch._C._cuda_getCurrentRawStream(device)


@functools.cache
def _settings_of_launches() -> Any:
    from triton import knobs
    return knobs.runtime


def has_launch_hooks() -> bool:
    """Whether Triton tells anyone of its launches. Then it has to make them itself."""
    runtime = _settings_of_launches()
    # a chain of hooks, one hook, or None
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, 'calls', enter) or getattr(leave, 'calls', leave))


class _Relaunch(NamedTuple):
    """What launches a compiled kernel again, on a stream and the addresses of tensors like those of its first launch.

    at_once: For launches that no hook is told of.
    """
    with_hooks: Callable[..., None]
    at_once: Callable[..., None]


def _relaunch(this: Launch, compiled: Any, tensors: int) -> _Relaunch:
    """How to launch a compiled kernel of so many tensors again.

    `compiled[grid]` prepares what launch hooks are told, and calls the kernel's launcher, which is written in Python
    too and calls a function in C. What it passes on differs between versions of Triton, but for the ends, so the
    launcher is called once with a function that writes it down. It is called every time where there is more to a
    launch, and `compiled[grid]` in versions whose kernels have no such launcher.
    """
    as_triton, numbers = compiled[this.grid], (*this.numbers, *this.constants)

    def with_hooks(stream: int, *addresses: Optional[int]) -> None:
        as_triton(*addresses, *numbers)

    run: Any = getattr(compiled, 'run', None)
    function, metadata = (getattr(compiled, name, None) for name in ('function', 'packed_metadata'))
    if None in (run, function, metadata):
        return _Relaunch(with_hooks, with_hooks)
    grid = this.grid

    def by_launcher(stream: int, *addresses: Optional[int]) -> None:
        run(*grid, stream, function, metadata, None, None, None, *addresses, *numbers)

    launch: Any = getattr(run, 'launch', None)
    # memory for each launch
    allocates = [getattr(run, f'{name}_scratch_size', None) != 0 for name in ('global', 'profile')]
    if launch is None or any(allocates):
        return _Relaunch(with_hooks, by_launcher)
    called: List[Any] = []
    copy = object.__new__(type(run))
    vars(copy).update(vars(run), launch=lambda *args: called.extend(args))
    stream, args = object(), (*[object() for _ in range(tensors)], *numbers)
    with suppress(Exception):  # it does more with them than to pass them on
        copy(*grid, stream, function, metadata, None, None, None, *args)
    start, nested, flat = len(grid) + 2, called[-1:] == [args], tuple(called[-len(args):]) == args
    if called[:start] != [*grid, stream, function] or not (nested or flat):
        return _Relaunch(with_hooks, by_launcher)
    between = called[start:-1 if nested else -len(args)]

    def at_once(stream: int, *addresses: Optional[int]) -> None:
        launch(*grid, stream, function, *between, *addresses, *numbers)

    def at_once_nested(stream: int, *addresses: Optional[int]) -> None:
        launch(*grid, stream, function, *between, (*addresses, *numbers))

    return _Relaunch(with_hooks, at_once_nested if nested else at_once)


def _addresses(tensors: Sequence[Optional[Tensor]]) -> Tuple[List[Optional[int]], Tuple[Any, ...]]:
    """Addresses of tensors; and what determines, with their shapes, which compiled kernel is theirs."""
    addresses: List[Optional[int]] = []
    key: List[Any] = []
    for t in tensors:
        if t is None:
            addresses.append(None)
            key.append(None)
        else:
            address = t.data_ptr()
            addresses.append(address)
            key += t.dtype, t.get_device(), address & 15
    return addresses, tuple(key)


def relaunch_of(this: Launch, tensors: Sequence[Optional[Tensor]]) -> Optional[Callable[..., None]]:
    """What launches again on a stream and the addresses of tensors like these, if it is known. No hook is told."""
    relaunch = this.kept.get(_addresses(tensors)[1])
    return None if relaunch is None else relaunch.at_once


def launch(this: Launch, first: Tensor, *others: Optional[Tensor]) -> None:
    """Launch a kernel on the current stream of the tensors' device.

    All launches go through this function, except for those of a call that is replayed (:mod:`.recorded`).
    """
    if observers:
        observer = observers.get(get_ident())
        if observer is not None:
            observer(this, (first, *others))
            return
    launch_now(this, first, *others)


def launch_now(this: Launch, first: Tensor, *others: Optional[Tensor]) -> None:
    """:func:`launch` where nothing takes its place."""
    tensors = first, *others
    if is_interpreted():
        this.kernel[this.grid](*tensors, *this.numbers, *this.constants)
        return
    device = current_device()
    if first.get_device() != device:
        with torch.cuda.device(first.device):
            launch_now(this, first, *others)
        return
    # The launcher would ask the driver about each tensor. It need not be asked again about tensors of the same device.
    addresses, key = _addresses(tensors)
    relaunch = this.kept.get(key)
    if relaunch is not None:
        again = relaunch.with_hooks if has_launch_hooks() else relaunch.at_once
        again(current_stream(device), *addresses)
        return
    compiled = this.kernel[this.grid](
        *tensors, *this.numbers, *this.constants, num_warps=this.num_warps, num_stages=this.num_stages)
    if compiled is not None:  # it is None if a hook of Triton's compiler took the call
        this.kept[key] = _relaunch(this, compiled, len(tensors))
