"""Questions about dtypes, layouts and the running program that no operator owns."""
import operator
import threading
from contextlib import nullcontext
from functools import lru_cache, reduce, wraps
from typing import Any, Callable, ContextManager, Dict, List, MutableMapping, Optional, Sequence, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

__all__ = [
    'accumulation_dtype', 'allows_tf32', 'are_known', 'as_dtype', 'below_autograd', 'constant', 'contiguous_weight',
    'convolution_dtype', 'empty_map', 'exact_products', 'fold_groups', 'form_of_call', 'in_a_row', 'is_depthwise',
    'is_exporting', 'is_plain_eager', 'is_transformed', 'literal', 'makes_onnx', 'match_layout', 'nhwc',
    'once_per_graph', 'table_device', 'under_autocast', 'unfold_groups', 'wide_product', 'without_autocast',
    'writes_out']


_Function = TypeVar('_Function', bound=Callable[..., Any])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half precisions, in which neither coordinates nor the FFT are accurate; else dtype itself."""
    return torch.float32 if dtype == torch.float16 or dtype == torch.bfloat16 else dtype


def is_depthwise(in_channels: int, out_channels: int, groups: int) -> bool:
    """Whether a convolution has one input and one output channel per group (without a channel multiplier)."""
    return groups > 1 and groups == in_channels == out_channels


def table_device(device: torch.device) -> torch.device:
    """Where tables for a device are computed in float64: on the CPU, as not every device has that dtype.

    Except for CUDA: its graphs cannot hold a copy from the host.
    """
    return device if device.type in ('cuda', 'meta') else torch.device('cpu')


def constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate what makes a tensor from numbers: it is made once, and is a constant of the graphs that are made."""
    cached = lru_cache(maxsize=256)(function)

    @torch.compiler.assume_constant_result
    @wraps(function)
    def wrapped(*args: Any) -> Tensor:
        # a real tensor, where torch makes a graph with fake ones
        with _disable_current_modes(), torch.inference_mode(False):
            return cached(*args)

    return wrapped


def _tracer() -> Optional[Any]:
    """What records the graph that torch makes by running the program, or None."""
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
        return None
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer


_of_graphs: MutableMapping[Any, Dict[Any, Any]] = WeakKeyDictionary()


def once_per_graph(function: _Function) -> _Function:
    """Decorate what makes tensors from sizes: where these are symbolic, all calls of a graph share one result."""
    @wraps(function)
    def wrapped(*args: Any) -> Any:
        tracer = _tracer()
        if tracer is None:
            return function(*args)
        known = _of_graphs.setdefault(tracer, {})
        key = function, tree_map(lambda n: n.node.expr if isinstance(n, torch.SymInt) else n, args)
        if key not in known:
            known[key] = function(*args)
        return known[key]

    return cast(_Function, wrapped)


def allows_tf32() -> bool:
    """Whether CUDA's float32 products may use TF32."""
    # from torch 2.9 on; once it was set, torch does not let anyone read the older setting
    precision = getattr(torch.backends.cuda.matmul, 'fp32_precision', None)
    return torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == 'tf32'


def are_known(*sizes: int) -> bool:
    """Whether none of them is symbolic."""
    if torch.compiler.is_dynamo_compiling():  # it gives symbolic integers the type of others
        shapes = torch.fx.experimental.symbolic_shapes  # which dynamo has imported, and which takes long
        if hasattr(shapes, 'has_static_value'):
            return all(shapes.has_static_value(n) for n in sizes)
    return all(type(n) is int for n in sizes)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in a dtype; no node of a graph where it has it."""
    return t if t.dtype == dtype else t.to(dtype)


def convolution_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution computes on x: under autocast autocast's dtype, except for float64."""
    device_type = x.device.type
    if device_type == 'meta' or not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def under_autocast(x: Tensor) -> Tensor:
    """x in its :func:`convolution_dtype`."""
    return as_dtype(x, convolution_dtype(x))


def fold_groups(x: Tensor, groups: int) -> Tensor:
    """x (B, G*C, ...) as (B*G, C, ...)."""
    if groups == 1:
        return x
    if torch.jit.is_tracing():  # the older ONNX exporter forgets in flatten that the batch may have any size
        return x.reshape(-1, x.shape[1] // groups, *x.shape[2:])
    return x.unflatten(1, (groups, -1)).flatten(0, 1)


def unfold_groups(x: Tensor, groups: int) -> Tensor:
    """x (B*G, C, ...) as (B, G*C, ...)."""
    if groups == 1:
        return x
    if torch.jit.is_tracing():
        return x.reshape(-1, x.shape[1] * groups, *x.shape[2:])
    return x.unflatten(0, (-1, groups)).flatten(1, 2)


def empty_map(like: Tensor, shape: Optional[Sequence[int]] = None) -> Tensor:
    """A map of the dtype and device of another, and of its shape or the given one, channels_last.

    Operators return such a map itself, and fill it through `permute`: layers cannot work in place on a view.
    """
    return torch.empty(
        tuple(like.shape if shape is None else shape), dtype=like.dtype, device=like.device,
        memory_format=torch.channels_last)


def nhwc(x: Tensor) -> Tensor:
    """x (B, C, H, W) as (B, H, W, C), contiguous; no copy of a channels_last map."""
    return x.permute(0, 2, 3, 1).contiguous()


def contiguous_weight(weight: Tensor) -> Tensor:
    """A convolution's weight in a layout whose taps are one axis: contiguous or channels_last."""
    is_dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return weight if is_dense else weight.contiguous()


def in_a_row(*tensors: Optional[Tensor]) -> List[Any]:
    """Tensors as kernels read them: contiguous. To ask is faster than to call an operator that copies nothing."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def match_layout(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x: channels_last if x is only channels_last, otherwise contiguous.

    In transforms, where torch does not say what format x has, y itself; and in exported graphs, where the question
    would be one about symbolic sizes.
    """
    if not torch.jit.is_scripting():
        if is_transformed() or is_exporting():
            return y
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _captures_without_dynamo() -> bool:
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def is_exporting() -> bool:
    """Whether torch is making a graph for other runtimes, which know neither our operators nor every FFT."""
    # torch has is_exporting from 2.7 on; from 2.8 on it is true where dynamo captures an export, too.
    captures = getattr(torch.compiler, 'is_exporting', _captures_without_dynamo)
    # is_in_onnx_export imports modules at every call: it is asked only where the older exporter may run, which traces
    return _writing_out.is_on or captures() or (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export())


if hasattr(torch.compiler, 'is_exporting'):
    # up to torch 2.11 every graph of torch.compile would be one that is exported, if dynamo looked into the function
    is_exporting = torch.compiler.assume_constant_result(is_exporting)


class _WritingOut(threading.local):
    is_on = False


_writing_out = _WritingOut()


def writes_out(function: _Function) -> _Function:
    """Decorate what torch's ONNX exporter calls after it has captured a network: a graph is made there too."""
    @wraps(function)
    def wrapped(*args: Any) -> Any:
        before, _writing_out.is_on = _writing_out.is_on, True
        try:
            return function(*args)
        finally:
            _writing_out.is_on = before

    return cast(_Function, wrapped)


@constant
def _constant(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def literal(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.tensor`, of a number or of tuples of numbers, which writes into a tensor where a graph may not."""
    return _constant(values, dtype, device) if _writing_out.is_on else torch.tensor(values, dtype=dtype, device=device)


def makes_onnx(x: Tensor) -> bool:
    """Whether torch's ONNX exporter makes a graph with x; not the older one, and not where dynamo captures the network.

    The exporter's tensors are of classes of their own. Other threads have ordinary ones at the same time.
    """
    return _writing_out.is_on or (
        type(x) not in (Tensor, torch.nn.Parameter) and is_exporting() and not torch.jit.is_tracing()
        and not torch.compiler.is_dynamo_compiling() and torch.onnx.is_in_onnx_export())


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a level of forward-mode derivatives or a transform of torch.func is open.

    Our kernels have only gradients: a tangent would be lost there without a word. Then torch's own operators have to
    compute a call.
    """
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def without_autocast(x: Tensor) -> ContextManager[None]:
    """A context in which torch computes the products of x in the precision of x."""
    device_type = x.device.type
    if device_type == 'meta' or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def below_autograd(x: Tensor) -> ContextManager[Any]:
    """A context in which torch's operators on x neither ask autograd nor cast for autocast; views take half the time.

    So they count no versions either: what they write to must be their own, or nobody else's to ask about.
    """
    return torch._C._ExcludeDispatchKeyGuard(_KEYS_ABOVE[x.device.type])


_KEYS_ABOVE = {
    name: reduce(operator.or_, [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in (
        f'Autograd{backend}', 'ADInplaceOrView', f'Autocast{backend}')])
    for name, backend in (('cpu', 'CPU'), ('cuda', 'CUDA'))}


def exact_products(function: Callable) -> Callable:
    """Decorate the body of an operator: autocast is off inside, also where a gradient is taken under autocast."""
    @wraps(function)
    def wrapped(x: Tensor, *args: Any) -> Any:
        with without_autocast(x):
            return function(x, *args)

    return wrapped


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, or of two batches of matrices, summed up and left in float32, or float64.

    Where its result is in half precision, a library may add up parts of a long sum in half precision too.
    """
    wide = accumulation_dtype(a.dtype)
    multiply: Any = torch.mm if a.dim() == 2 else torch.bmm
    if a.is_cuda and a.dtype != wide:
        # in torch from 2.8 on, which the Triton that we need comes with; on CUDA only
        return multiply(a, b, out_dtype=wide)
    with without_autocast(a):
        return multiply(as_dtype(a, wide), as_dtype(b, wide))


# What lists the open modes of torch functions; torch may drop it, as it is private.
_function_modes: Optional[Callable[[], List[Any]]] = getattr(
    torch.overrides, '_get_current_function_mode_stack', None)


def _has_function_modes() -> bool:
    """Whether a mode sees torch's functions, other than one that sets the device of tensors whose device is not given.

    That is `torch.set_default_device`, or a device as a context. We give the device of every tensor.
    """
    if not torch._C._len_torch_function_stack():
        return False
    return _function_modes is None or any(type(mode) is not DeviceContext for mode in _function_modes())


def is_plain_eager(*tensors: Optional[Tensor]) -> bool:
    """Whether nothing but autograd looks at operators on these tensors: no compiler, tracer, mode, transform, subclass.

    Nor may they be views that torch negates when it reads them, as the imaginary part of a conjugate is.

    A default device is no such mode. Then a Python function with a gradient of its own does what an operator of torch
    does, without the 0.2 milliseconds that torch takes to call one that is written in Python.
    """
    if torch.compiler.is_compiling():  # first, as dynamo does not know is_neg
        return False
    for t in tensors:
        if t is not None and (type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta or t.is_neg()):
            return False
    return not (
        torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() or _has_function_modes() or is_transformed())


def form_of_call(
        operator: Callable[..., Any],
        eager: Any,
        function: Callable[..., Any],
        tensors: Sequence[Optional[Tensor]],
) -> Callable[..., Any]:
    """The cheapest form of an operator that does all that is wanted of a call.

    Args:
        operator: Of torch, for what more than autograd looks at.
        eager: The `torch.autograd.Function` of it.
        function: What both compute, without a gradient.
        tensors: Those of the call.
    """
    if not is_plain_eager(*tensors):
        return operator
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return eager.apply
    return function
