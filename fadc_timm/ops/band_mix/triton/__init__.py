"""The band mix in Triton: one kernel forward and one backward for maps up to 64x64, two each for larger ones.

Reads a map of any strides in its own dtype and writes one. The products accumulate in float32 (float64 for that). Their
factors are float16 for float16, and else float32: exact, but of bfloat16 maps, and of float32 ones where torch allows
it (`torch.backends.cuda.matmul.allow_tf32`), to TF32's ten bits, which hold every bfloat16. Nothing is added up in an
order that changes: both passes are deterministic.

For CUDA; with TRITON_INTERPRET=1 in the environment Triton interprets its kernels on a CPU, slowly, which is what the
tests do. Triton is optional, and imported at the first call.
"""
import functools
import math
import os
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ...runtime import accumulation_dtype
from ...triton_support import block, is_interpreted, why_not_on
from ..frequencies import frequencies

__all__ = ['forward', 'mix_bands_fused', 'mix_bands_fused_backward', 'why_not']

# Sides of a map whose programs do all in one launch.
_ONE_PASS = 64

# Of a grid's second axis on CUDA; a program takes more than one block where there are more.
_MOST_BLOCKS = 65535


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def why_not(x: Tensor) -> Optional[str]:
    """Why the kernels cannot run on a map, or None."""
    if x.dtype not in _DTYPES:
        return f'the kernels take {", ".join(_name(d) for d in _DTYPES)}, not {_name(x.dtype)}'
    return why_not_on(x.device.type)


def forward(x: Tensor, weights: Tensor, factors: List[int]) -> Tensor:
    """Of `mix_bands`, or NotImplementedError with the reason."""
    reason = why_not(x)
    if reason is not None:
        raise NotImplementedError(f"backend='triton' cannot mix these bands: {reason}.")
    return mix_bands_fused(x, weights, factors)


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


def precision(dtype: torch.dtype, allow_tf32: bool) -> Tuple[torch.dtype, str]:
    """Of the factors of the products on a map."""
    if dtype == torch.bfloat16:
        return torch.float32, 'tf32'
    return dtype, 'tf32' if dtype == torch.float32 and allow_tf32 else 'ieee'


def default_config(h: int, w: int, channels: int, frequencies_h: int, is_half: bool) -> Dict[str, int]:
    """Block sizes by shape, without a tuning run: the largest with which the compiled kernels spill no registers.

    On all of the shapes of `scripts/checks/inspect_bands.py`, which measures that. What is fastest is not measured.
    """
    columns = block(w, 16, 64)
    elements = 8192 if columns == 32 or (is_half and columns > 16) else 4096
    channel_block = block(channels, 1, elements // (16 * columns))
    # with as many threads as there are registers for; more frequencies than a block's are one more loop to hold
    most = 8 if not is_half or (columns == 32 and frequencies_h > 16) else 16
    return {'R': 16, 'WB': columns, 'IB': block(frequencies_h, 16, 64), 'JB': 16, 'CB': channel_block,
            'num_warps': min(max(16 * columns * channel_block // 256, 4), most), 'num_stages': 1}


def candidates(default: Dict[str, int]) -> List[Dict[str, int]]:
    """The default first, and what tuning tries beside it: half and twice the channels, warps and stages."""
    found = [default]
    for channel_block in (default['CB'], default['CB'] // 2, default['CB'] * 2):
        for warps in (4, 8, 16):
            for stages in (1, 2):
                config = {**default, 'CB': channel_block, 'num_warps': warps, 'num_stages': stages}
                if channel_block and config not in found:
                    found.append(config)
    return found


# by kernel, shapes, dtypes and device
_tuned: Dict[Tuple[Any, ...], Dict[str, int]] = {}


def _choose_config(
        key: Tuple[Any, ...],
        default: Dict[str, int],
        run: Callable[[Dict[str, int]], Any],
        measure: Callable[[Callable[[], Any]], float],
) -> Dict[str, int]:
    """The fastest of the candidates, found once for a key. Those that ask for more than the device has are left out."""
    from triton.runtime.errors import OutOfResources
    if key not in _tuned:
        times = []
        for config in candidates(default):
            try:
                times.append((measure(functools.partial(run, config)), config))
            except OutOfResources:
                continue
        _tuned[key] = min(times, key=lambda t: t[0])[1]
    return _tuned[key]


def run(kernel: Any, grid: Any, args: Sequence[Any], constants: Dict[str, Any], config: Dict[str, int]) -> None:
    kernel[grid](*args, **constants, **config)


class _Call:
    """What both passes share: the filters of a call, its grid, and the arguments that both kernels take."""

    def __init__(self, x: Tensor, weights: Tensor, factors: List[int]) -> None:
        self.x, self.weights, self.factors = x, weights, tuple(factors)
        self.b, self.c, self.h, self.w = x.shape
        self.count, self.groups = weights.shape[1:3]
        self.channels = self.c // self.groups
        dtype, how = precision(x.dtype, x.device.type == 'cuda' and torch.backends.cuda.matmul.allow_tf32)
        self.capturing = x.device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
        # what is made during a capture is only there once the graph runs
        make = _make_filters if self.capturing else _cached_filters
        self.filters = make(self.h, self.w, self.factors, dtype, how, x.device)
        self.frequencies = (self.filters.rows.basis.shape[1], self.filters.cols.basis.shape[1])
        self.wide = accumulation_dtype(x.dtype)
        import triton.language as tl
        types = {torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}
        self.constants = {'FILTERS': len(factors), 'COUNT': self.count, 'DT': types[dtype], 'ACC': types[self.wide],
                          'PRECISION': how}

    def config(self, run: Callable[[Dict[str, int]], Any]) -> Dict[str, int]:
        """Block sizes for a kernel: the default, or with FADC_TIMM_AUTOTUNE=1 in the environment the fastest."""
        x = self.x
        default = default_config(self.h, self.w, self.channels, self.frequencies[0], x.element_size() == 2)
        if os.environ.get('FADC_TIMM_AUTOTUNE') != '1' or x.device.type != 'cuda' or self.capturing:
            return default
        from triton.testing import do_bench
        key = (run.__name__, self.h, self.w, self.channels, self.groups, self.count, self.factors, x.dtype,
               self.weights.dtype, self.constants['PRECISION'], torch.cuda.get_device_name(x.device))
        return _choose_config(key, default, run, do_bench)

    def programs(self, config: Dict[str, int]) -> Tuple[int, int, int]:
        """Samples, groups, and blocks of a group's channels."""
        return self.b, self.groups, -(-self.channels // config['CB'])

    def scratch(self, size: int, config: Dict[str, int]) -> Tensor:
        """Room for so many coefficients of each program's channels."""
        return self.x.new_empty(math.prod(self.programs(config)), size, config['CB'], dtype=self.wide)

    def filter_arguments(self) -> Tuple[Tensor, ...]:
        rows, cols, table, _ = self.filters
        return rows.basis, cols.basis, rows.filters, cols.filters, table

    def sizes(self) -> Tuple[int, ...]:
        return self.h, self.w, self.channels, self.groups, *self.frequencies

    def output(self) -> Tensor:
        """For a map that a kernel makes. Triton's interpreter cuts bfloat16 off where it should round: torch does."""
        wide = self.x.dtype == torch.bfloat16 and is_interpreted()
        return _empty_like(self.x, self.wide if wide else self.x.dtype)

    def launch(self, kernel: Any, config: Dict[str, int], *args: Any) -> None:
        across_coefficients = -(-self.frequencies[0] // config['IB']) * -(-self.frequencies[1] // config['JB'])
        chunks = -(-self.h // config['R']) * -(-self.w // config['WB'])
        one_pass = max(self.h, self.w) <= _ONE_PASS
        for number, blocks in ((0, 1),) if one_pass else ((1, across_coefficients), (2, chunks)):
            grid = (math.prod(self.programs(config)), min(blocks, _MOST_BLOCKS))
            run(kernel, grid, args, {**self.constants, 'PASS': number}, config)


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(x.shape, dtype=dtype, device=x.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.library.custom_op('fadc_timm::mix_bands_fused', mutates_args=())
def mix_bands_fused(x: Tensor, weights: Tensor, factors: List[int]) -> Tensor:
    """`mix_bands` in Triton.

    Args:
        x: Map (B, C, H, W), any strides, best channels_last.
        weights: (B, M, S, H, W), any strides and float dtype.
        factors: Filters at 1/f of Nyquist, one less than there are bands.

    Returns:
        (B, C, H, W), channels_last where x is that, else contiguous.
    """
    from . import kernels
    if not x.numel():
        return _empty_like(x, x.dtype)
    call = _Call(x, weights, factors)
    y = call.output()

    def forward(config: Dict[str, int]) -> None:
        call.launch(kernels.forward, config, x, weights, y, *call.filter_arguments(),
                    call.scratch(math.prod(call.frequencies), config), *call.sizes(), *x.stride(), *weights.stride(),
                    *y.stride())

    forward(call.config(forward))
    return y.to(x.dtype)


@mix_bands_fused.register_fake
def _(x, weights, factors):
    return _empty_like(x, x.dtype)


@torch.library.custom_op('fadc_timm::mix_bands_fused_backward', mutates_args=())
def mix_bands_fused_backward(
        grad: Tensor, x: Tensor, weights: Tensor, factors: List[int]) -> Tuple[Tensor, Tensor]:
    """Gradients of :func:`mix_bands_fused` for x and weights. The low-passes are self-adjoint."""
    from . import kernels
    if not x.numel():
        return _empty_like(x, x.dtype), weights.new_zeros(weights.shape)
    call = _Call(x, weights, factors)
    grad_x = call.output()

    def backward(config: Dict[str, int]) -> Tensor:
        shares = x.new_empty(*call.programs(config), call.count, call.h, call.w, dtype=call.wide)
        call.launch(kernels.backward, config, grad, x, weights, grad_x, shares, *call.filter_arguments(),
                    call.scratch(call.filters.size, config), call.filters.size, *call.sizes(), *grad.stride(),
                    *x.stride(), *weights.stride(), *grad_x.stride())
        return shares

    grad_weights = weights.new_empty(weights.shape)
    grad_weights.copy_(backward(call.config(backward)).sum(2).transpose(1, 2))
    return grad_x.to(x.dtype), grad_weights


@mix_bands_fused_backward.register_fake
def _(grad, x, weights, factors):
    return _empty_like(x, x.dtype), weights.new_empty(weights.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weights, ctx.factors = inputs
    ctx.save_for_backward(x, weights)


def _backward(ctx, grad: Tensor):
    return *mix_bands_fused_backward(grad, *ctx.saved_tensors, ctx.factors), None


mix_bands_fused.register_autograd(_backward, setup_context=_setup_context)
