"""Launches of the Triton kernels: grids, block sizes, and the sums over what they leave.

Block sizes are a function of the shape. With FADC_TIMM_AUTOTUNE=1 in the environment the dense forward kernel and that
for the gradients of samples take the fastest of a few configurations instead, found once for a shape by Triton's own
autotuner (TRITON_CACHE_AUTOTUNING=1 makes it keep them on disk).
"""
import functools
import os
from typing import Any, Dict, List, Optional, Sequence, Tuple

from torch import Tensor

from ...runtime import accumulation_dtype
from ...triton_support import block
from .call import Bundles, Call, Scatter, bound, sampling_gradients

__all__ = ['dense_backward', 'dense_forward', 'depthwise_backward', 'depthwise_forward']

# Programs that keep a large GPU busy, where work can be split at will: about four for each of its processors.
_PROGRAMS = 528
# Positions of a program, by kernel.
_BLOCK_P = {'dense': 64, 'kernel': 64, 'depthwise': 32, 'depthwise_backward': 64}

Gains = Sequence[Optional[Tensor]]


def _kernels(call: Call, bundles: Bundles, split: bool) -> Tuple[Tensor, Optional[Tensor]]:
    """The kernel as the Triton kernels want it, less its mean over the taps if it is split, and the mean."""
    if not split:
        return bundles.pack(call.weight), None
    weight = call.weight.to(accumulation_dtype(call.x.dtype))
    mean = weight.mean((2, 3), keepdim=True)
    rest, mean = (bundles.pack(w.to(call.x.dtype)) for w in (weight - mean, mean))
    return rest, mean


def run(kernel: Any, grid: Any, args: Sequence[Any], constants: Dict[str, Any], config: Dict[str, int]) -> None:
    """Launch with a configuration, or if the grid can follow and it is asked for, with the best of those around it."""
    if callable(grid) and os.environ.get('FADC_TIMM_AUTOTUNE') == '1':
        _autotuned(kernel, tuple(config.items()))[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants, **config)


_TUNE_BY = ('height', 'width', 'out_h', 'out_w', 'channels', 'out_channels', 'K')
_ADDS_TO = ('grad_x',)


@functools.cache
def _autotuned(kernel: Any, default: Tuple[Tuple[str, int], ...]) -> Any:
    """Half and twice as many positions, warps and stages as by default."""
    import triton
    base = dict(default)
    space = [{**base, 'BLOCK_P': p, 'num_warps': warps, 'num_stages': stages}
             for p in {max(base['BLOCK_P'] // 2, 16), base['BLOCK_P'], min(base['BLOCK_P'] * 2, 256)}
             for warps in (4, 8) for stages in (1, 2, 3)]
    configs = [triton.Config({n: v for n, v in c.items() if n.isupper()}, num_warps=c['num_warps'],
                             num_stages=c['num_stages']) for c in space]
    return triton.autotune(
        configs, key=[n for n in _TUNE_BY if n in kernel.arg_names],
        reset_to_zero=[n for n in _ADDS_TO if n in kernel.arg_names])(kernel)


def _blocks_of(call: Call, bundles: Bundles) -> Dict[str, int]:
    half = call.x.element_size() == 2
    block_o = block(bundles.out_width, 16, 256 if half else 64)
    block_c = block(bundles.slice_width, 16, 32 if half else 16)
    return {'BLOCK_P': _BLOCK_P['dense'], 'BLOCK_C': block_c, 'BLOCK_O': block_o,
            'num_warps': 8 if block_o > 64 or not half else 4, 'num_stages': 2}


def dense_forward(call: Call, bias: Optional[Tensor], gains: Gains, y: Tensor) -> None:
    """Into y (B, H', W', O)."""
    from . import dense
    bundles, split = Bundles(call), gains[0] is not None
    kernel, mean = _kernels(call, bundles, split)
    config = _blocks_of(call, bundles)
    run(dense.forward,
        lambda meta: (-(-call.positions // meta['BLOCK_P']), -(-bundles.out_width // meta['BLOCK_O']), bundles.count),
        (*call.tensors(), kernel, mean, bias, *gains, y, call.positions, *call.geometry, *call.strides[0],
         *call.strides[1], *bundles.channels),
        {**call.constants(), **call.products(), 'SPLIT': split, 'HAS_BIAS': bias is not None,
         'INDEX': call.index(config['BLOCK_P'])}, config)


def dense_backward(
        call: Call,
        grad: Tensor,
        gains: Gains,
        need_samples: bool,
        need_kernel: bool,
) -> List[Optional[Tensor]]:
    """Gradients of x, dilation, mask, weight and gains from grad (B, H', W', O)."""
    from . import dense
    bundles, split = Bundles(call), gains[0] is not None
    kernel, mean = _kernels(call, bundles, split)
    inputs = (grad, *call.tensors(), kernel, mean, *gains)
    constants = {**call.constants(), **call.products(), 'SPLIT': split}
    results: List[Optional[Tensor]] = [None] * 8
    if need_samples:
        config = _blocks_of(call, bundles)
        config.update(BLOCK_O=min(config['BLOCK_O'], 64), num_warps=8)
        pieces = bundles.pieces_of * -(-bundles.slice_width // config['BLOCK_C'])

        def largest() -> Tensor:
            high = bound(grad, kernel, call.mask, gains[2], gains[3])
            return high if mean is None else high + bound(grad, mean, call.mask, gains[0], gains[1])

        scatter = Scatter(call, largest)
        parts = grad.new_empty(pieces, call.k ** 2 + 1, call.positions, dtype=accumulation_dtype(call.x.dtype))
        run(dense.backward_samples, lambda meta: (-(-call.positions // meta['BLOCK_P']), pieces),
            (*inputs, scatter.into, parts, scatter.scale, call.positions, *call.geometry, *call.strides[0],
             *call.grad_strides, *call.strides[1], *bundles.channels),
            {**constants, 'FIXED': scatter.fixed, 'INDEX': call.index(config['BLOCK_P'])}, config)
        results[:3] = scatter.result(), *sampling_gradients(call, parts)
    if need_kernel:
        results[3:] = _kernel_gradients(call, bundles, inputs, constants, split)
    return results


def _kernel_gradients(
        call: Call,
        bundles: Bundles,
        inputs: Sequence[Optional[Tensor]],
        constants: Dict[str, Any],
        split: bool,
) -> List[Optional[Tensor]]:
    """Of the weight and the gains."""
    from . import dense
    taps, wide = call.k ** 2, accumulation_dtype(call.x.dtype)
    block_c, block_o = block(bundles.slice_width, 16, 64), block(bundles.out_width, 16, 64)
    config = {'BLOCK_P': _BLOCK_P['kernel'], 'BLOCK_C': block_c, 'BLOCK_O': block_o, 'num_warps': 8, 'num_stages': 2}
    blocks, o_blocks = -(-bundles.slice_width // block_c), -(-bundles.out_width // block_o)
    pieces = bundles.pieces_of * blocks
    wanted = max(_PROGRAMS // (pieces * o_blocks * taps), 1)
    chunks = min(max(-(-wanted // call.b), 1), -(-call.area // (4 * config['BLOCK_P'])))
    chunk = -(-call.area // chunks)
    chunks, wanted = -(-call.area // chunk), min(wanted, call.b * chunks)
    units = call.b * chunks
    a_split = -(-units // wanted)
    splits = -(-units // a_split)
    x = call.x
    kernels = [x.new_empty(splits, bundles.count, taps, bundles.width, bundles.out_width, dtype=wide)
               for _ in range(1 + split)]
    rows_in, rows_out = taps * o_blocks, taps * (bundles.width // bundles.slice_width) * blocks
    for_gains = [x.new_empty(rows, units if split else 0, n, dtype=wide)
                 for rows, n in ((rows_in, call.c), (rows_in, call.c), (rows_out, call.o), (rows_out, call.o))]
    high_in, low_in, high_out, low_out = for_gains
    run(dense.backward_kernel, (pieces * o_blocks, taps, splits),
        (*inputs, kernels[0], kernels[-1], high_in, low_in, high_out, low_out, call.b, chunks, chunk, a_split,
         *call.geometry, *call.strides[0], *call.strides[1], *bundles.channels), constants, config)
    grad_weight = bundles.unpack(kernels[0].sum(0), call.weight)
    if not split:
        return [grad_weight, None, None, None, None]
    grad_mean = bundles.unpack(kernels[1].sum((0, 2)), call.weight[:, :, :1, :1])
    grad_weight = grad_weight + (grad_mean - grad_weight.sum((2, 3), keepdim=True)) / taps
    return [grad_weight, *(t.sum(0).view(call.b, chunks, -1).sum(1) for t in (low_in, low_out, high_in, high_out))]


def _depthwise(call: Call, block_p: int) -> Tuple[Tensor, Tuple[int, ...], Tuple[int, int, int]]:
    """The kernel (B or 1, k*k, C); w_b, channels, dilation_width, part_width, parts_a_group; units, parts, chunks."""
    kernel = call.weight.flatten(-2).squeeze(-2)  # (..., C, k*k)
    kernel = kernel.transpose(-1, -2).contiguous()
    chunks = -(-call.area // block_p)
    units = call.b * chunks
    wanted = max(_PROGRAMS // (units * call.dilation_groups), 1)
    part_width = max(-(-call.dilation_width // wanted), min(call.dilation_width, 64))
    parts = -(-call.dilation_width // part_width)
    w_b = kernel.stride(0) if kernel.dim() == 3 else 0
    return kernel, (w_b, call.c, call.dilation_width, part_width, parts), (units, call.dilation_groups * parts, chunks)


def depthwise_forward(call: Call, bias: Optional[Tensor], gains: Gains, y: Tensor) -> None:
    """Into y (B, H', W', C). There are no gains, they are in the kernel."""
    from . import depthwise
    config = {'BLOCK_P': _BLOCK_P['depthwise'], 'BLOCK_C': block(call.dilation_width, 16, 64), 'num_warps': 4,
              'num_stages': 2}
    kernel, channels, (units, parts, chunks) = _depthwise(call, config['BLOCK_P'])
    run(depthwise.forward, (units, parts),
        (*call.tensors(), kernel, bias, y, chunks, *call.geometry, *call.strides[0], *call.strides[1], *channels),
        {**call.constants(), 'HAS_BIAS': bias is not None}, config)


def depthwise_backward(
        call: Call,
        grad: Tensor,
        gains: Gains,
        need_samples: bool,
        need_kernel: bool,
) -> List[Optional[Tensor]]:
    """Gradients of x, dilation, mask and weight from grad (B, H', W', C); they are made together."""
    from . import depthwise
    config = {'BLOCK_P': _BLOCK_P['depthwise_backward'], 'BLOCK_C': block(call.dilation_width, 16, 32), 'num_warps': 8,
              'num_stages': 1}
    kernel, channels, (units, parts, chunks) = _depthwise(call, config['BLOCK_P'])
    scatter = Scatter(call, lambda: bound(grad, kernel[..., None], call.mask))
    sampling = grad.new_empty(parts, call.k ** 2 + 1, call.positions, dtype=accumulation_dtype(call.x.dtype))
    grad_kernel = grad.new_empty(units, call.k ** 2, call.c, dtype=accumulation_dtype(call.x.dtype))
    run(depthwise.backward, (units, parts),
        (grad, *call.tensors(), kernel, scatter.into, sampling, grad_kernel, scatter.scale, call.positions, chunks,
         *call.geometry, *call.strides[0], *call.grad_strides, *call.strides[1], *channels),
        {**call.constants(), 'FIXED': scatter.fixed}, config)
    if call.weight.dim() == 5:
        grad_kernel = grad_kernel.view(call.b, chunks, call.k ** 2, call.c).sum(1)
    else:
        grad_kernel = grad_kernel.sum(0)
    grad_weight = grad_kernel.transpose(-1, -2).reshape(call.weight.shape)
    return [scatter.result(), *sampling_gradients(call, sampling), grad_weight, None, None, None, None]
