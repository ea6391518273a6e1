"""The band mix in Triton: one kernel forward and one backward for maps up to 64x64, two each for larger ones.

Reads a map of any strides in its own dtype and writes one. The products accumulate in float32 (float64 for that). Their
factors are float16 for float16, and else float32: exact, but of bfloat16 maps, and of float32 ones where torch allows
it (`torch.backends.cuda.matmul.allow_tf32`), to TF32's ten bits, which hold every bfloat16. Nothing is added up in an
order that changes: both passes are deterministic.

For CUDA; with TRITON_INTERPRET=1 in the environment Triton interprets its kernels on a CPU, slowly, which is what the
tests do. Triton is optional, and imported at the first call.
"""
import functools
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ._frequencies import frequencies
from .case import accumulation_dtype

__all__ = ['mix_bands_fused', 'why_not']

MINIMUM = (3, 2)  # of Triton: torch 2.6 brings it

# Sides of a map whose programs do all in one launch.
_ONE_PASS = 64


@functools.cache
def _unavailable() -> Optional[str]:
    """Why there is no Triton to be used, or None."""
    try:
        import triton
    except ImportError as e:
        return f'Triton is not installed ({e})'
    if tuple(int(n) for n in triton.__version__.split('.')[:2]) < MINIMUM:
        return f'Triton {triton.__version__} is too old, it must be {MINIMUM[0]}.{MINIMUM[1]} or newer'
    return None


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter. That is settled when they are first imported."""
    from triton.runtime import JITFunction

    from . import _triton_bands_kernels
    return not isinstance(_triton_bands_kernels.forward, JITFunction)


def why_not(x: Tensor) -> Optional[str]:
    """Why the kernels cannot run on a map, or None."""
    reason = _unavailable()
    if reason is not None:
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f'the kernels take float16, bfloat16, float32 and float64, not {str(x.dtype).removeprefix("torch.")}'
    if x.device.type in ('cuda', 'meta') or (x.device.type == 'cpu' and is_interpreted()):
        return None
    return (f'Triton does not run on {x.device.type}, but for a CPU where TRITON_INTERPRET=1 is in the environment '
            'before the first use')


class _Axis(NamedTuple):
    """The filters along one axis of n points as the kernels want them: 1, 0, cos 1, sin 1, cos 2, sin 2, ...

    basis: (n, J).
    filters: (M, 2, J): how many times each is kept, and of the pair kept on one side the sign of that, for sines
        turned around.
    kept: How many of the first each filter needs, an even number.
    """
    basis: Tensor
    filters: Tensor
    kept: List[int]


def _axis(n: int, factors: Sequence[int], dtype: torch.dtype, precision: str, device: torch.device) -> _Axis:
    f = frequencies(n, factors, device)
    basis = torch.cat([f.basis[:, :1], torch.zeros_like(f.basis[:, :1]), f.basis[:, 1:]], dim=1).to(dtype)
    if precision == 'tf32':
        basis = ((basis.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    filters = torch.zeros(len(factors), 2, basis.shape[1], dtype=accumulation_dtype(dtype), device=device)
    for into, kept, (k, side) in zip(filters, f.kept, f.one_sided):
        into[0, 0], into[0, 2:len(kept) + 1] = kept[0], kept[1:]
        if side:
            into[1, 2 * k], into[1, 2 * k + 1] = side, -side
    return _Axis(basis.contiguous(), filters, [len(kept) + 1 for kept in f.kept])


class _Filters(NamedTuple):
    """Both axes, the table (M, 3) of rows, columns and first coefficient of each filter, and their number in all."""
    rows: _Axis
    cols: _Axis
    table: Tensor
    size: int


@torch.inference_mode(False)
def _make_filters(
        h: int,
        w: int,
        factors: Tuple[int, ...],
        dtype: torch.dtype,
        precision: str,
        device: torch.device,
) -> _Filters:
    rows, cols = (_axis(n, factors, dtype, precision, device) for n in (h, w))
    entries: List[int] = []
    size = rows.basis.shape[1] * cols.basis.shape[1]
    for n, m in zip(rows.kept, cols.kept):
        entries += [n, m, size]
        size += n * m
    # each filled in on the device: a copy from the host may not be captured in a CUDA graph
    table = torch.stack([torch.full((), n, dtype=torch.int32, device=device) for n in entries])
    return _Filters(rows, cols, table, size)


_cached_filters = functools.lru_cache(maxsize=256)(_make_filters)


def _precision(x: Tensor) -> Tuple[torch.dtype, str]:
    """Of the factors of the products."""
    if x.dtype == torch.bfloat16:
        return torch.float32, 'tf32'
    allowed = x.device.type == 'cuda' and x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return x.dtype, 'tf32' if allowed else 'ieee'


def _block(n: int, low: int, high: int) -> int:
    """The power of two for n, within bounds."""
    return min(max(1 << (n - 1).bit_length(), low), high)


def default_config(h: int, w: int, channels: int, frequencies_h: int) -> Dict[str, int]:
    """Block sizes by shape: chunks of 16 rows and of 16 thousand elements."""
    columns = _block(w, 16, 64)
    return {'R': 16, 'WB': columns, 'IB': _block(frequencies_h, 16, 64), 'JB': 16,
            'CB': _block(channels, 1, 1024 // columns), 'num_warps': 8, 'num_stages': 2}


class _Call:
    """What both passes share: the filters of a call, its grid, and the arguments that both kernels take."""

    def __init__(self, x: Tensor, weights: Tensor, factors: List[int]) -> None:
        self.x, self.weights = x, weights
        self.b, self.c, self.h, self.w = x.shape
        self.count, self.groups = weights.shape[1:3]
        self.channels = self.c // self.groups
        dtype, precision = _precision(x)
        capturing = x.device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
        # what is made during a capture is only there once the graph runs
        make = _make_filters if capturing else _cached_filters
        self.filters = make(self.h, self.w, tuple(factors), dtype, precision, x.device)
        self.frequencies = (self.filters.rows.basis.shape[1], self.filters.cols.basis.shape[1])
        self.wide = accumulation_dtype(x.dtype)
        self.config = default_config(self.h, self.w, self.channels, self.frequencies[0])
        self.one_pass = max(self.h, self.w) <= _ONE_PASS
        import triton.language as tl
        types = {torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}
        self.constants = {'FILTERS': len(factors), 'COUNT': self.count, 'DT': types[dtype], 'ACC': types[self.wide],
                          'PRECISION': precision}

    @property
    def blocks(self) -> int:
        """Of channels, in a group."""
        return -(-self.channels // self.config['CB'])

    @property
    def programs(self) -> int:
        return self.b * self.groups * self.blocks

    def scratch(self, size: int) -> Tensor:
        """Room for so many coefficients of each program's channels."""
        return self.x.new_empty(self.programs, size, self.config['CB'], dtype=self.wide)

    def filter_arguments(self) -> Tuple[Tensor, ...]:
        rows, cols, table, _ = self.filters
        return rows.basis, cols.basis, rows.filters, cols.filters, table

    def sizes(self) -> Tuple[int, ...]:
        return self.h, self.w, self.channels, self.groups, *self.frequencies

    def launch(self, kernel: Any, *args: Any) -> None:
        config = self.config
        across_coefficients = -(-self.frequencies[0] // config['IB']) * -(-self.frequencies[1] // config['JB'])
        chunks = -(-self.h // config['R']) * -(-self.w // config['WB'])
        for number, blocks in ((0, 1),) if self.one_pass else ((1, across_coefficients), (2, chunks)):
            kernel[self.programs, blocks](*args, **self.constants, **config, PASS=number)


@torch.library.custom_op('fadc_timm::mix_bands_fused', mutates_args=())
def mix_bands_fused(x: Tensor, weights: Tensor, factors: List[int]) -> Tensor:
    """:func:`mix_bands` in Triton.

    Args:
        x: Map (B, C, H, W), any strides, best channels_last.
        weights: (B, M, S, H, W), any strides and float dtype.
        factors: Filters at 1/f of Nyquist, one less than there are bands.

    Returns:
        (B, C, H, W), channels_last where x is that, else contiguous.
    """
    from . import _triton_bands_kernels as kernels
    y = _empty_like(x)
    if y.numel():
        call = _Call(x, weights, factors)
        call.launch(kernels.forward, x, weights, y, *call.filter_arguments(),
                    call.scratch(call.frequencies[0] * call.frequencies[1]), *call.sizes(), *x.stride(),
                    *weights.stride(), *y.stride())
    return y


def _empty_like(x: Tensor) -> Tensor:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(x.shape, dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@mix_bands_fused.register_fake
def _(x, weights, factors):
    return _empty_like(x)


@torch.library.custom_op('fadc_timm::mix_bands_fused_backward', mutates_args=())
def mix_bands_fused_backward(
        grad: Tensor, x: Tensor, weights: Tensor, factors: List[int]) -> Tuple[Tensor, Tensor]:
    """Gradients of :func:`mix_bands_fused` for x and weights. The low-passes are self-adjoint."""
    from . import _triton_bands_kernels as kernels
    grad_x = _empty_like(x)
    if not x.numel():
        return grad_x, weights.new_zeros(weights.shape)
    call = _Call(x, weights, factors)
    shares = x.new_empty(call.b, call.groups, call.blocks, call.count, call.h, call.w, dtype=call.wide)
    call.launch(kernels.backward, grad, x, weights, grad_x, shares, *call.filter_arguments(),
                call.scratch(call.filters.size), call.filters.size, *call.sizes(), *grad.stride(), *x.stride(),
                *weights.stride(), *grad_x.stride())
    return grad_x, shares.sum(2).transpose(1, 2).to(weights.dtype, memory_format=torch.contiguous_format, copy=True)


@mix_bands_fused_backward.register_fake
def _(grad, x, weights, factors):
    return _empty_like(x), weights.new_empty(weights.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weights, ctx.factors = inputs
    ctx.save_for_backward(x, weights)


def _backward(ctx, grad: Tensor):
    return *mix_bands_fused_backward(grad, *ctx.saved_tensors, ctx.factors), None


mix_bands_fused.register_autograd(_backward, setup_context=_setup_context)
