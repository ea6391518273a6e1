"""Launches of the Triton kernels: their layouts of weights, grids and block sizes, and the sums over what they leave.

Block sizes are a function of the shape. With FADC_TIMM_AUTOTUNE=1 in the environment the forward and the two dense
backward kernels take the fastest of a few configurations instead, found once for a shape by Triton's own autotuner
(TRITON_CACHE_AUTOTUNING=1 makes it keep them on disk).
"""
import functools
import math
import os
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

__all__ = ['Call', 'dense_backward', 'dense_forward', 'depthwise_backward', 'depthwise_forward']

# Programs that keep a large GPU busy, where work can be split at will: about four for each of its processors.
_PROGRAMS = 528
_MIN_BUNDLE = 32
# Positions of a program, by kernel.
_BLOCK_P = {'dense': 64, 'kernel': 64, 'depthwise': 32, 'depthwise_backward': 64}

Gains = Sequence[Optional[Tensor]]


class Call:
    """What the kernels want to know of a call, and the arguments that all of them take."""

    def __init__(
            self,
            x: Tensor,
            dilation: Tensor,
            mask: Optional[Tensor],
            weight: Tensor,
            stride: List[int],
            padding: List[int],
            groups: int,
    ) -> None:
        self.x = x.permute(0, 2, 3, 1).contiguous()
        self.dilation, self.mask, self.weight, self.groups = dilation, mask, weight, groups
        self.b, self.h, self.w, self.c = self.x.shape
        self.o, self.per_group, self.k, _ = weight.shape[-4:]
        self.dilation_groups, self.out_h, self.out_w = dilation.shape[1:]
        self.area = self.out_h * self.out_w
        self.positions = self.b * self.area
        self.depthwise = weight.dim() == 5 or (groups > 1 and groups == self.c == self.o)
        self.dilation_width = self.c // self.dilation_groups
        r = self.k // 2
        self.geometry = (self.h, self.w, self.out_h, self.out_w, r - padding[0], r - padding[1], *stride)
        self.strides = self.x.stride()[:3], (*dilation.stride(), *(mask.stride() if mask is not None else (0,) * 4))
        self.grad_strides = (self.h * self.w * self.c, self.w * self.c)

    def tensors(self) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        return self.x, self.dilation, self.mask

    def constants(self) -> Dict[str, Any]:
        import triton.language as tl
        return {'K': self.k, 'HAS_MASK': self.mask is not None,
                'ACC': tl.float64 if self.x.dtype == torch.float64 else tl.float32}

    def products(self) -> Dict[str, Any]:
        """Constants of the kernels with matrix products."""
        from ._triton import is_interpreted
        return {'PRECISION': 'tf32' if _allows_tf32(self.x) else 'ieee',
                'UPCAST': self.x.dtype == torch.bfloat16 and is_interpreted()}

    def index(self, block: int) -> Any:
        import triton.language as tl
        return tl.int32 if self.positions + block < 2 ** 31 else tl.int64

    def wide(self) -> torch.dtype:
        """Of what kernels leave for others to add up."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


def _allows_tf32(x: Tensor) -> bool:
    """As a convolution does."""
    return x.device.type == 'cuda' and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32


class _Bundles:
    """Groups put together until there are enough channels for a matrix product, as one block-diagonal kernel."""

    def __init__(self, call: Call) -> None:
        per_group, out_per_group = call.per_group, call.o // call.groups
        divisors = [m for m in range(1, call.groups + 1) if call.groups % m == 0]
        self.size = next((m for m in divisors if m * min(per_group, out_per_group) >= _MIN_BUNDLE), call.groups)
        self.count = call.groups // self.size
        self.shape = (self.count, self.size, out_per_group, per_group, -1)
        self.width, self.out_width = self.size * per_group, self.size * out_per_group
        self.slice_width = math.gcd(self.width, call.dilation_width)
        self.channels = (call.c, call.o, self.width, self.out_width, self.slice_width, call.dilation_width)
        self.pieces_of = call.c // self.slice_width  # and each of these in blocks

    def pack(self, weight: Tensor) -> Tensor:
        """(O, C/groups, k, k) to (bundles, k*k, C of a bundle, O of a bundle)."""
        w = weight.flatten(2).reshape(self.shape).permute(0, 4, 1, 3, 2)  # bundle, tap, group, c, o
        if self.size > 1:
            eye = torch.eye(self.size, dtype=w.dtype, device=w.device)
            w = w[:, :, :, :, None] * eye[:, None, :, None]
        return w.reshape(self.count, -1, self.width, self.out_width).contiguous()

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """The transpose of pack."""
        w = packed.view(self.count, -1, self.size, self.width // self.size, self.size, self.out_width // self.size)
        return w.diagonal(dim1=2, dim2=4).permute(0, 4, 3, 2, 1).reshape(like.shape)


def _kernels(call: Call, bundles: _Bundles, split: bool) -> Tuple[Tensor, Optional[Tensor]]:
    """The kernel as the Triton kernels want it, less its mean over the taps if it is split, and the mean."""
    if not split:
        return bundles.pack(call.weight), None
    weight = call.weight.to(call.wide())
    mean = weight.mean((2, 3), keepdim=True)
    rest, mean = (bundles.pack(w.to(call.x.dtype)) for w in (weight - mean, mean))
    return rest, mean


def _block(n: int, low: int, high: int) -> int:
    """The power of two for n, within bounds."""
    return min(max(1 << (n - 1).bit_length(), low), high)


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


def _blocks_of(call: Call, bundles: _Bundles) -> Dict[str, int]:
    half = call.x.element_size() == 2
    block_o = _block(bundles.out_width, 16, 256 if half else 64)
    block_c = _block(bundles.slice_width, 16, 32 if half else 16)
    return {'BLOCK_P': _BLOCK_P['dense'], 'BLOCK_C': block_c, 'BLOCK_O': block_o,
            'num_warps': 8 if block_o > 64 else 4, 'num_stages': 2}


def dense_forward(call: Call, bias: Optional[Tensor], gains: Gains, y: Tensor) -> None:
    """Into y (B, H', W', O)."""
    from . import _triton_dense
    bundles, split = _Bundles(call), gains[0] is not None
    kernel, mean = _kernels(call, bundles, split)
    config = _blocks_of(call, bundles)
    run(_triton_dense.forward,
         lambda meta: (-(-call.positions // meta['BLOCK_P']), -(-bundles.out_width // meta['BLOCK_O']), bundles.count),
         (*call.tensors(), kernel, mean, bias, *gains, y, call.positions, *call.geometry, *call.strides[0],
          *call.strides[1], *bundles.channels),
         {**call.constants(), **call.products(), 'SPLIT': split, 'HAS_BIAS': bias is not None,
          'INDEX': call.index(config['BLOCK_P'])}, config)


class _Scatter:
    """Where gradients of x are added up: in float, or if torch wants that to be deterministic in whole numbers."""

    def __init__(self, call: Call, largest: Any) -> None:
        self.fixed = torch.are_deterministic_algorithms_enabled()
        self.into = torch.zeros(
            call.x.shape, dtype=torch.int64 if self.fixed else call.wide(), device=call.x.device)
        self.scale: Optional[Tensor] = None
        if self.fixed:
            # no sum over a sample's positions and taps may leave the range, whatever the dilation
            bound = largest().double().clamp(min=1e-300) * (call.area * call.k ** 2)
            self.scale = 2. ** 62 / bound

    def result(self) -> Tensor:
        """(B, C, H, W)."""
        into = self.into
        return (into if self.scale is None else into / self.scale).permute(0, 3, 1, 2)


def _largest(grad: Tensor, kernel: Tensor, mask: Optional[Tensor], *gains: Optional[Tensor]) -> Tensor:
    """A bound of the gradients of samples: of g * kernel, added up over the output channels."""
    bound = grad.abs().amax().double() * kernel.double().abs().sum(-1).amax()
    for t in (mask, *gains):
        if t is not None:
            bound = bound * t.abs().amax()
    return bound


def _sampling_gradients(call: Call, parts: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
    """Of dilation and mask, from those of some channels each (parts, k*k + 1, positions)."""
    total = parts.view(call.dilation_groups, -1, call.k ** 2 + 1, call.b, call.out_h, call.out_w)
    mask = None
    if call.mask is not None:
        mask = total[:, :, :-1].sum(1).permute(2, 0, 1, 3, 4).flatten(1, 2)
    return total[:, :, -1].sum(1).transpose(0, 1), mask


def dense_backward(
        call: Call,
        grad: Tensor,
        gains: Gains,
        need_samples: bool,
        need_kernel: bool,
) -> List[Optional[Tensor]]:
    """Gradients of x, dilation, mask, weight and gains from grad (B, H', W', O)."""
    from . import _triton_dense
    bundles, split = _Bundles(call), gains[0] is not None
    kernel, mean = _kernels(call, bundles, split)
    inputs = (grad, *call.tensors(), kernel, mean, *gains)
    constants = {**call.constants(), **call.products(), 'SPLIT': split}
    results: List[Optional[Tensor]] = [None] * 8
    if need_samples:
        config = _blocks_of(call, bundles)
        config.update(BLOCK_O=min(config['BLOCK_O'], 64), num_warps=8)
        pieces = bundles.pieces_of * -(-bundles.slice_width // config['BLOCK_C'])

        def largest() -> Tensor:
            bound = _largest(grad, kernel, call.mask, gains[2], gains[3])
            return bound if mean is None else bound + _largest(grad, mean, call.mask, gains[0], gains[1])

        scatter = _Scatter(call, largest)
        parts = grad.new_empty(pieces, call.k ** 2 + 1, call.positions, dtype=call.wide())
        run(_triton_dense.backward_samples, lambda meta: (-(-call.positions // meta['BLOCK_P']), pieces),
             (*inputs, scatter.into, parts, scatter.scale, call.positions, *call.geometry, *call.strides[0],
              *call.grad_strides, *call.strides[1], *bundles.channels),
             {**constants, 'FIXED': scatter.fixed, 'INDEX': call.index(config['BLOCK_P'])}, config)
        results[:3] = scatter.result(), *_sampling_gradients(call, parts)
    if need_kernel:
        results[3:] = _kernel_gradients(call, bundles, inputs, constants, split)
    return results


def _kernel_gradients(
        call: Call,
        bundles: _Bundles,
        inputs: Sequence[Optional[Tensor]],
        constants: Dict[str, Any],
        split: bool,
) -> List[Optional[Tensor]]:
    """Of the weight and the gains."""
    from . import _triton_dense
    taps, wide = call.k ** 2, call.wide()
    block_c, block_o = _block(bundles.slice_width, 16, 64), _block(bundles.out_width, 16, 64)
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
    run(_triton_dense.backward_kernel, (pieces * o_blocks, taps, splits),
        (*inputs, kernels[0], kernels[-1], high_in, low_in, high_out, low_out, call.b, chunks, chunk, a_split,
         *call.geometry, *call.strides[0], *call.strides[1], *bundles.channels), constants, config)
    grad_weight = bundles.unpack(kernels[0].sum(0), call.weight)
    if not split:
        return [grad_weight, None, None, None, None]
    grad_mean = bundles.unpack(kernels[1].sum((0, 2)), call.weight[:, :, :1, :1])
    grad_weight = grad_weight + (grad_mean - grad_weight.sum((2, 3), keepdim=True)) / taps
    return [grad_weight, *(t.sum(0).view(call.b, chunks, -1).sum(1) for t in (low_in, low_out, high_in, high_out))]


def _depthwise(call: Call, block_p: int) -> Tuple[Tensor, Tuple[int, ...], Tuple[int, int, int]]:
    """The kernel (B or 1, k*k, C); w_b, channels, dilation_width, part_width and parts_a_group; units, parts, chunks."""
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
    from . import _triton_depthwise
    config = {'BLOCK_P': _BLOCK_P['depthwise'], 'BLOCK_C': _block(call.dilation_width, 16, 64), 'num_warps': 4,
              'num_stages': 2}
    kernel, channels, (units, parts, chunks) = _depthwise(call, config['BLOCK_P'])
    run(_triton_depthwise.forward, (units, parts),
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
    from . import _triton_depthwise
    config = {'BLOCK_P': _BLOCK_P['depthwise_backward'], 'BLOCK_C': _block(call.dilation_width, 16, 32), 'num_warps': 4,
              'num_stages': 1}
    kernel, channels, (units, parts, chunks) = _depthwise(call, config['BLOCK_P'])
    scatter = _Scatter(call, lambda: _largest(grad, kernel[..., None], call.mask))
    sampling = grad.new_empty(parts, call.k ** 2 + 1, call.positions, dtype=call.wide())
    grad_kernel = grad.new_empty(units, call.k ** 2, call.c, dtype=call.wide())
    run(_triton_depthwise.backward, (units, parts),
        (grad, *call.tensors(), kernel, scatter.into, sampling, grad_kernel, scatter.scale, call.positions, chunks,
         *call.geometry, *call.strides[0], *call.grad_strides, *call.strides[1], *channels),
        {**call.constants(), 'FIXED': scatter.fixed}, config)
    if call.weight.dim() == 5:
        grad_kernel = grad_kernel.view(call.b, chunks, call.k ** 2, call.c).sum(1)
    else:
        grad_kernel = grad_kernel.sum(0)
    grad_weight = grad_kernel.transpose(-1, -2).reshape(call.weight.shape)
    return [scatter.result(), *_sampling_gradients(call, sampling), grad_weight, None, None, None, None]
