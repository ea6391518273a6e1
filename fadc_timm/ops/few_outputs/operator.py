"""A convolution with few outputs as an operator of torch, and its gradient."""
import functools
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import triton_support
from ..derivatives import formula_gradients, wants_formula
from ..runtime import (
    accumulation_dtype,
    contiguous_weight,
    empty_map,
    form_of_call,
    in_a_row,
    is_exporting,
    is_transformed,
    nhwc,
    wide_product,
)
from ..triton_support import Launch, block, cdiv, types_of

__all__ = [
    'MOST_PRODUCTS', 'MOST_WEIGHTS', 'call', 'few_outputs_conv2d', 'fits', 'forward', 'gradient', 'pack', 'suits']

# Outputs times taps: the map of products has so many channels.
MOST_PRODUCTS = 256
# The rows of a matrix in half precision are read 16 bytes at a time.
_MULTIPLE = 8
# Weights that one launch packs.
MOST_WEIGHTS = 3
# Elements of a program of each kernel. Small maps are to have programs for all multiprocessors.
_BLOCK, _POSITIONS, _COLUMNS = 1024, 256, 2048


def fits(weight: Tensor, dtype: torch.dtype, device_type: str) -> bool:
    """Whether these kernels are ahead of a library's convolution on a device.

    They are in half precision, where Triton is the default, and where no more than `MOST_PRODUCTS` products of each
    pixel are wanted. cuDNN computes a block of 32 outputs however few there are.
    """
    return (dtype in (torch.float16, torch.bfloat16) and triton_support.is_default_on(device_type)
            and _columns(weight.shape) <= MOST_PRODUCTS)


def suits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether :func:`call` is the way to convolve x in a dtype on its device: it :func:`fits`, and can be called."""
    # torch's convolution says which devices, or without autocast which dtypes, differ; a subclass of Tensor may compute
    # in another way
    return (fits(weight, dtype, x.device.type) and weight.device == x.device
            and (weight.dtype == dtype or torch.is_autocast_enabled(x.device.type))
            and type(weight) in (Tensor, nn.Parameter) and not is_exporting() and not is_transformed())


class _Spec(NamedTuple):
    """What determines the launches of a call: shapes, dtypes and strides of map and weight, and the options."""
    x: Tuple[int, ...]
    dtype: torch.dtype
    weight: Tuple[int, ...]
    weight_strides: Tuple[int, ...]
    has_bias: bool
    stride: Tuple[int, ...]
    padding: Tuple[int, ...]
    dilation: Tuple[int, ...]


def _spec(x, weight, bias, stride, padding, dilation) -> _Spec:
    return _Spec(
        tuple(x.shape), x.dtype, tuple(weight.shape), weight.stride(), bias is not None, tuple(stride), tuple(padding),
        tuple(dilation))


class _Sizes:
    """Numbers that the launches share.

    columns: Of the matrix of products. shared: Arguments of the larger kernels. shares: Number of programs of `spread`
    that have a share in the gradient of the bias, the first ones.
    """

    def __init__(self, spec: _Spec) -> None:
        self.spec = spec
        b, self.channels, h, w = spec.x
        self.outputs, _, self.k, self.k_w = spec.weight
        self.taps = self.k * self.k_w
        self.out_h, self.out_w = _out_size(spec.x, spec.weight, spec.stride, spec.padding, spec.dilation)
        self.pixels, self.positions = b * h * w, b * self.out_h * self.out_w
        self.columns = _columns(spec.weight)
        self.acc, self.upcast = types_of(spec.dtype)
        self.block_o = block(self.outputs, 1, 4096)
        self.shared = (h, w, self.out_h, self.out_w, -spec.padding[0], -spec.padding[1], *spec.stride, *spec.dilation,
                       self.positions, self.outputs, self.columns)
        self.shares = cdiv(self.positions, self.block_q) if spec.has_bias else 0
        self.programs = max(cdiv(self.pixels, self.block_q), self.shares)

    @property
    def block_n(self) -> int:
        return block(self.columns, 16, 64)

    @property
    def block_q(self) -> int:
        return _COLUMNS // max(self.block_n, self.block_o)


def _columns(weight: Sequence[int]) -> int:
    """Columns of the matrix of products, from the shape of the weight."""
    return cdiv(weight[0] * weight[2] * weight[3], _MULTIPLE) * _MULTIPLE


def _out_size(x, weight, stride, padding, dilation) -> List[int]:
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(x[2:], weight[2:], stride, padding, dilation)]


def _tap_strides(weight: Sequence[int], strides: Sequence[int]) -> Tuple[int, int, int]:
    """Of the weight: the steps between outputs, channels and taps, which are one axis."""
    w_o, w_c, w_row, w_col = strides
    return w_o, w_c, w_row if weight[3] == 1 else w_col


@functools.lru_cache(maxsize=1024)
def _pack_launch(weights: Tuple[Tuple[Tuple[int, ...], Tuple[int, ...]], ...], dtype: torch.dtype) -> Launch:
    """Of the shapes and strides of one to three weights."""
    from . import kernels
    numbers: List[int] = []
    for shape, strides in weights:
        numbers += shape[0], shape[1], _columns(shape), *_tap_strides(shape, strides)
    taps = [shape[2] * shape[3] for shape, _ in weights]
    missing = MOST_WEIGHTS - len(weights)
    blocks = max(cdiv(_columns(shape) * shape[1], _BLOCK) for shape, _ in weights)
    return Launch(kernels.pack, (blocks, len(weights)), (*numbers, *[0] * (6 * missing)),
                  (*taps, *[0] * missing, types_of(dtype)[1], _BLOCK))


def pack(weights: Sequence[Tensor], dtype: torch.dtype) -> List[Tensor]:
    """Weights as the matrices (columns, C) that :func:`forward` multiplies by, in one launch.

    Args:
        weights: One to `MOST_WEIGHTS` of (O, C, k, k') each.
        dtype: Of the maps.
    """
    weights = [contiguous_weight(weight) for weight in weights]
    launch = _pack_launch(tuple([(tuple(weight.shape), weight.stride()) for weight in weights]), dtype)
    taps = [weight.new_empty((_columns(weight.shape), weight.shape[1]), dtype=dtype) for weight in weights]
    pairs: List[Any] = [t for pair in zip(weights, taps) for t in pair]
    triton_support.launch(launch, *pairs, *[None] * (2 * (MOST_WEIGHTS - len(weights))))
    return taps


class _Forward(NamedTuple):
    sizes: _Sizes
    add_taps: Launch


@functools.lru_cache(maxsize=1024)
def _forward_launches(spec: _Spec) -> _Forward:
    if spec.weight[1] != spec.x[1]:
        raise ValueError(f'The weight wants maps of {spec.weight[1]} channels, got {list(spec.x)}.')
    from . import kernels
    sizes = _Sizes(spec)
    block_p = max(_POSITIONS // sizes.block_o, 16)
    return _Forward(
        sizes,
        Launch(kernels.add_taps, (cdiv(sizes.positions, block_p),), sizes.shared,
               (sizes.k_w, sizes.taps, spec.has_bias, sizes.acc, sizes.upcast, block_p, sizes.block_o)))


class _Backward(NamedTuple):
    sizes: _Sizes
    spread: Launch
    unpack: Launch


@functools.lru_cache(maxsize=1024)
def _backward_launches(spec: _Spec, grad_strides: Tuple[int, ...]) -> _Backward:
    from . import kernels
    sizes = _Sizes(spec)
    numel = sizes.outputs * sizes.taps * sizes.channels
    return _Backward(
        sizes,
        Launch(kernels.spread, (sizes.programs, cdiv(sizes.columns, sizes.block_n)),
               (*sizes.shared, sizes.pixels, *grad_strides),
               (sizes.k_w, sizes.taps, sizes.acc, sizes.block_q, sizes.block_n, sizes.block_o)),
        Launch(kernels.unpack, (cdiv(numel, _BLOCK),),
               (sizes.outputs, sizes.channels, numel, sizes.shares, *_tap_strides(spec.weight, spec.weight_strides)),
               (sizes.acc, sizes.upcast, _BLOCK, sizes.block_o, max(_BLOCK // sizes.block_o, 1))))


def forward(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        taps: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """F.conv2d of x in its dtype, whatever dtype weight and bias have.

    Args:
        x: Map (B, C, H, W), best channels_last; another layout costs one copy.
        weight: (O, C, k, k').
        bias: (O,) or None.
        stride, padding, dilation: Of the rows and of the columns.
        taps: What :func:`pack` makes of the weight, or None.

    Returns:
        (B, O, H', W') channels_last, and the weight as a matrix (columns, C), which the backward pass reads.
    """
    weight = contiguous_weight(weight)
    y = empty_map(x, (x.shape[0], weight.shape[0], *_out_size(x.shape, weight.shape, stride, padding, dilation)))
    if not y.numel():
        return y, x.new_zeros((_columns(weight.shape), weight.shape[1]))
    launches = _forward_launches(_spec(x, weight, bias, stride, padding, dilation))
    sizes = launches.sizes
    if taps is None:
        taps, = pack([weight], x.dtype)
    products = wide_product(nhwc(x).view(-1, sizes.channels), taps.t())
    triton_support.launch(launches.add_taps, products, *in_a_row(bias), y)
    return y, taps


few_outputs_conv2d = torch.library.custom_op(
    'fadc_timm::few_outputs_conv2d', forward, mutates_args=(),
    schema='(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation) '
           '-> (Tensor, Tensor)')


@few_outputs_conv2d.register_fake
def _(x, weight, bias, stride, padding, dilation):
    y = empty_map(x, (x.shape[0], weight.shape[0], *_out_size(x.shape, weight.shape, stride, padding, dilation)))
    return y, x.new_empty((_columns(weight.shape), weight.shape[1]))


def gradient(
        grad: Tensor,
        taps: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        into: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; that of no bias is empty.

    Args:
        grad, taps: The gradient of the output of :func:`forward`, and its second result.
        x, weight, bias, stride, padding, dilation: As there.
        into: A map (B, C, H, W), channels_last, to which the gradient of x is added, or None.
    """
    weight = contiguous_weight(weight)
    grad_x, grad_weight = empty_map(x) if into is None else into, torch.empty_like(weight)
    grad_bias = x.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)
    if not grad.numel():
        return grad_x.zero_() if into is None else into, grad_weight.zero_(), grad_bias.zero_()
    launches = _backward_launches(_spec(x, weight, bias, stride, padding, dilation), grad.stride())
    sizes = launches.sizes
    grad_products = torch.empty((sizes.pixels, sizes.columns), dtype=x.dtype, device=x.device)
    shares = None if bias is None else torch.empty(
        (sizes.shares, sizes.outputs), dtype=accumulation_dtype(x.dtype), device=x.device)
    triton_support.launch(launches.spread, grad, grad_products, shares)
    pixels = nhwc(x).view(-1, sizes.channels)
    grad_taps = wide_product(grad_products.t(), pixels)
    triton_support.launch(launches.unpack, grad_taps, shares, grad_weight, None if bias is None else grad_bias)
    rows = grad_x.permute(0, 2, 3, 1).view(-1, sizes.channels)
    # autocast leaves products alone that write to a tensor that they are given
    if into is None:
        torch.mm(grad_products, taps, out=rows)
    else:
        rows.addmm_(grad_products, taps)
    return grad_x, grad_weight, grad_bias


# without `into`, as an operator's result is not one of its arguments
few_outputs_conv2d_backward = torch.library.custom_op(
    'fadc_timm::few_outputs_conv2d_backward', gradient, mutates_args=(),
    schema='(Tensor grad, Tensor taps, Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, '
           'SymInt[] dilation) -> (Tensor, Tensor, Tensor)')


@few_outputs_conv2d_backward.register_fake
def _(grad, taps, x, weight, bias, stride, padding, dilation):
    return (empty_map(x), torch.empty_like(contiguous_weight(weight)),
            x.new_empty((0,)) if bias is None else bias.new_empty(bias.shape))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], x, weight, bias)


def _backward_with(gradient: Any, ctx: Any, grad: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    if grad is None:
        return (None,) * 6
    taps, *tensors = ctx.saved_tensors
    if wants_formula(grad):
        def formula(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
            return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *ctx.options)

        return *formula_gradients(formula, tensors, grad), None, None, None
    grads = gradient(grad.resolve_neg(), taps, *tensors, *ctx.options)
    return *[g if n else None for g, n in zip(grads, ctx.needs_input_grad)], None, None, None


def _backward(ctx: Any, grad: Optional[Tensor], _: Any) -> Tuple[Optional[Tensor], ...]:
    return _backward_with(few_outputs_conv2d_backward, ctx, grad)


few_outputs_conv2d.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator for eager calls: autograd alone sees it, which is faster than a registered operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tuple[Tensor, Tensor]:
        output = forward(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor], _: Any) -> Tuple[Optional[Tensor], ...]:
        return _backward_with(gradient, ctx, grad)


def call(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        stride: Tuple[int, ...],
        padding: Tuple[int, ...],
        dilation: Tuple[int, ...],
) -> Tensor:
    """`F.conv2d` of x in its dtype.

    Args:
        x: Map (B, C, H, W), best channels_last.
        weight: (O, C, k, k'), of any float dtype.
        bias: (O,) or None.
        stride, padding, dilation: Two integers each, of the rows and of the columns.

    Returns:
        (B, O, H', W') channels_last, in the dtype of x.

    Raises:
        ValueError: The map has not the weight's C.
    """
    args = x, weight, bias, list(stride), list(padding), list(dilation)
    return form_of_call(few_outputs_conv2d, _Eager, forward, args[:3])(*args)[0]
