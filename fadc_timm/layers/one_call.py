"""A FADConv2d as one function of autograd, for eager calls whose parts all run in Triton's kernels.

By itself every part is a function of autograd, and torch takes longer to call these than the kernels take to be
launched. Here autograd sees one function, and the gradients of a map that several parts read are added in products.
"""
from typing import TYPE_CHECKING, Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..ops import few_outputs, gains, settings, triton_support
from ..ops.band_mix.triton import operator as band_mix
from ..ops.band_mix.triton.mix import means_shape
from ..ops.derivatives import refuse_more
from ..ops.latest import Latest
from ..ops.recorded import Program, Programs, addresses_of
from ..ops.runtime import (
    allows_tf32,
    as_dtype,
    below_autograd,
    convolution_dtype,
    is_plain_eager,
    match_layout,
    under_autocast,
)
from ..ops.sampled_conv import takes_predictions
from ..ops.sampled_conv.triton import operator as sampled_conv
from .ada_kern import mean_dtype
from .frame import Conv, Frame, Layer, Norm, frame_of
from .own_hooks import has_global_hooks

if TYPE_CHECKING:
    from .fad_conv import FADConv2d

__all__ = ['in_one_call', 'programs']

_aten = torch.ops.aten
# A tensor, or None where a layer lacks the part.
_Maybe = Any


class _Tensors(NamedTuple):
    """The tensors of a call: the map (B, C, H, W), then parameters and buffers, those of a missing part None."""
    x: Tensor
    maps_weight: _Maybe
    maps_bias: _Maybe
    fc_weight: _Maybe
    fc_bias: _Maybe
    norm_weight: _Maybe
    norm_bias: _Maybe
    running_mean: _Maybe
    running_var: _Maybe
    head_weight: _Maybe
    head_bias: _Maybe
    head_weight_2: _Maybe
    head_bias_2: _Maybe
    o_weight: Tensor
    o_bias: _Maybe
    dw_weight: _Maybe
    pw_weight: _Maybe
    pw_bias: _Maybe
    weight: Tensor
    bias: _Maybe


class _Between(NamedTuple):
    """What the forward pass computes on the way, for the backward pass."""
    selected: Tensor  # the map behind FreqSelect
    maps: _Maybe
    maps_taps: _Maybe
    coefficients: _Maybe
    mean: _Maybe
    trunk: _Maybe
    normalized: _Maybe
    norm_mean: _Maybe
    norm_rstd: _Maybe
    low: _Maybe
    high: _Maybe
    o: Tensor
    o_taps: _Maybe
    mask_dw: _Maybe
    mask: _Maybe
    mask_taps: _Maybe
    high_part: _Maybe
    low_part: _Maybe
    packed: _Maybe
    packed_mean: _Maybe


def _taps(layer: Layer, t: _Tensors) -> List[Optional[Tensor]]:
    """What the convolutions with few outputs multiply by: of the maps, of o and of the pointwise one of the mask."""
    dtype, device_type = t.x.dtype, t.x.device.type
    convolutions = (t.maps_weight, layer.maps), (t.o_weight, layer.o), (t.pw_weight, layer.mask_pw)
    weights = [
        weight if conv is not None and conv.groups == 1 and few_outputs.fits(weight, dtype, device_type) else None
        for weight, conv in convolutions]
    wanted = [weight for weight in weights if weight is not None]
    taps = iter(few_outputs.pack(wanted, dtype) if wanted else ())
    return [None if weight is None else next(taps) for weight in weights]


def _convolve(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        conv: Conv,
        taps: Optional[Tensor] = None,
) -> Tensor:
    """The convolution in the dtype of x. taps: Of one with few outputs."""
    stride, padding, dilation, groups = conv
    if taps is not None:
        return few_outputs.forward(x, weight, bias, stride, padding, dilation, taps)[0]
    bias = None if bias is None else as_dtype(bias, x.dtype)
    return _aten.convolution(
        x, as_dtype(weight, x.dtype), bias, stride, padding, dilation, False, [0, 0], groups)


def _convolution_gradient(
        grad: Tensor,
        taps: Optional[Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        conv: Conv,
        into: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """Gradients of :func:`_convolve`; that of x is added to `into`, if there is one."""
    stride, padding, dilation, groups = conv
    if taps is not None:
        of_x, of_weight, of_bias = few_outputs.gradient(grad, taps, x, weight, bias, stride, padding, dilation, into)
        return of_x, of_weight, None if bias is None else of_bias
    of_x, of_weight, of_bias = _aten.convolution_backward(
        grad, x, as_dtype(weight, x.dtype), None if bias is None else bias.shape, stride, padding, dilation, False,
        [0, 0], groups, [True, True, bias is not None])
    return of_x if into is None else into.add_(of_x), of_weight, of_bias


def _normalize(norm: Norm, t: _Tensors, y: Tensor) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """AdaKern's norm of y (B, K), and the mean and the inverse deviation that its backward pass reads, if any."""
    if norm.groups:
        batch, width = y.shape
        return torch.native_group_norm(y, t.norm_weight, t.norm_bias, batch, width, 1, norm.groups, norm.eps)
    return gains.norm_forward(
        y, t.norm_weight, t.norm_bias, t.running_mean, t.running_var, norm.batch_statistics, norm.momentum, norm.eps)


def _norm_gradient(
        norm: Norm, t: _Tensors, between: _Between, grad: Tensor) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    y, mean, rstd = between.trunk, between.norm_mean, between.norm_rstd
    if norm.groups:
        wanted = [True, t.norm_weight is not None, t.norm_bias is not None]
        return _aten.native_group_norm_backward(
            grad, y, mean, rstd, t.norm_weight, *grad.shape, 1, norm.groups, wanted)
    return gains.norm_gradient(
        grad, y, t.norm_weight, t.norm_bias, t.running_mean, t.running_var, mean, rstd, norm.eps)


def _forward(layer: Layer, t: _Tensors, save: bool) -> Tuple[Tensor, _Between]:
    """The output (B, O, H', W') channels_last. save: Whether there will be a backward pass."""
    selected, maps, coefficients, means = t.x, None, None, None
    maps_taps, o_taps, mask_taps = _taps(layer, t)
    if layer.maps is not None:
        b, _, h, w = t.x.shape
        predicted = _convolve(t.x, t.maps_weight, t.maps_bias, layer.maps, maps_taps)
        maps = predicted.view(b, layer.map_groups, -1, h, w).transpose(1, 2)
        selected, means, coefficients = band_mix.forward(t.x, maps, layer.bands, True)
    mean, trunk, normalized, norm_mean, norm_rstd, low, high = (None,) * 7
    if t.fc_weight is not None:
        if means is None:
            means = t.x.mean(dim=(2, 3), dtype=t.fc_weight.dtype)[:, None]
        norm, heads = layer.norm, (t.head_weight, t.head_bias, t.head_weight_2, t.head_bias_2)
        if not save and (norm is None or not (norm.groups or norm.batch_statistics)):
            statistics, eps = (t.running_mean, t.running_var, t.norm_weight, t.norm_bias), norm.eps if norm else 0.
            low, high = gains.trunk_and_heads(means, t.fc_weight, t.fc_bias, statistics, eps, *heads)
        else:
            trunk, mean = gains.trunk_forward(means, t.fc_weight, t.fc_bias)
            normalized = trunk
            if norm is not None:
                normalized, norm_mean, norm_rstd = _normalize(norm, t, trunk)
            low, high = gains.heads_forward(normalized, *heads)
        if t.head_weight_2 is None:
            low, high = (None, low) if layer.high_alone else (low, None)
    o = _convolve(selected, t.o_weight, t.o_bias, layer.o, o_taps)
    mask_dw, mask = None, None
    if layer.mask_dw is not None and layer.mask_pw is not None:
        mask_dw = _convolve(selected, t.dw_weight, None, layer.mask_dw)
        mask = _convolve(mask_dw, t.pw_weight, t.pw_bias, layer.mask_pw, mask_taps)
    stride, padding, _, groups = layer.conv
    y, *of_products = sampled_conv.forward(
        selected, t.weight, t.bias, o, mask, low, high, layer.act, layer.base, True, save, stride, padding, [], groups)
    return y, _Between(
        selected, maps, maps_taps, coefficients, mean, trunk, normalized, norm_mean, norm_rstd, low, high, o, o_taps,
        mask_dw, mask, mask_taps, *of_products)


def _gradient(layer: Layer, t: _Tensors, between: _Between, grad: Tensor, wants_weight: bool) -> _Tensors:
    """The gradients of the tensors, None for buffers, and for the weight if it is not wanted."""
    stride, padding, _, groups = layer.conv
    selected, low, high = between.selected, between.low, between.high
    of_sampled: List[Any] = sampled_conv.gradient(
        grad, between.high_part, between.low_part, selected, t.weight, t.bias, between.o, between.mask, low, high,
        layer.act, layer.base, True, stride, padding, [], groups, wants_weight, (between.packed, between.packed_mean))
    of_selected, of_weight, of_bias, of_o, of_mask, of_low, of_high = of_sampled
    of_dw = of_pw = of_pw_bias = None
    if layer.mask_dw is not None and layer.mask_pw is not None:
        of_between, of_pw, of_pw_bias = _convolution_gradient(
            of_mask, between.mask_taps, between.mask_dw, t.pw_weight, t.pw_bias, layer.mask_pw)
        _, of_dw, _ = _convolution_gradient(
            of_between, None, selected, t.dw_weight, None, layer.mask_dw, of_selected)
    _, of_o_weight, of_o_bias = _convolution_gradient(
        of_o, between.o_taps, selected, t.o_weight, t.o_bias, layer.o, of_selected)
    of_mean = of_fc = of_fc_bias = of_norm = of_norm_bias = None
    of_heads: List[Any] = [None] * 4
    if t.fc_weight is not None:
        first, second = (of_high, None) if low is None else (of_low, of_high)
        of_trunk, *of_heads = gains.heads_gradient(
            first, second, between.normalized, t.head_weight, t.head_weight_2)
        if layer.norm is not None:
            of_trunk, of_norm, of_norm_bias = _norm_gradient(layer.norm, t, between, of_trunk)
        of_mean, of_fc, of_fc_bias = gains.trunk_gradient(of_trunk, between.mean, t.fc_weight, t.fc_bias)
    of_x, of_maps_weight, of_maps_bias = of_selected, None, None
    if layer.maps is not None:
        of_means = None if of_mean is None else of_mean[:, None].expand(-1, means_shape(*t.x.shape)[1], -1)
        of_x, of_maps = band_mix.gradient(
            of_selected, of_means, t.x, between.maps, between.coefficients, layer.bands, True)
        of_maps = of_maps.transpose(1, 2).flatten(1, 2)
        of_x, of_maps_weight, of_maps_bias = _convolution_gradient(
            of_maps, between.maps_taps, t.x, t.maps_weight, t.maps_bias, layer.maps, of_x)
    elif of_mean is not None:
        of_x += (of_mean / t.x[0, 0].numel()).to(of_x.dtype)[:, :, None, None]
    of_heads = [None if p is None else g for p, g in zip(t[9:13], of_heads)]
    return _Tensors._make((
        of_x, of_maps_weight, of_maps_bias, of_fc, None if t.fc_bias is None else of_fc_bias, of_norm, of_norm_bias,
        None, None, *of_heads, of_o_weight, of_o_bias, of_dw, of_pw, of_pw_bias, of_weight, of_bias))


_COUNT = len(_Tensors._fields)
_BIASES = tuple(i for i, name in enumerate(_Tensors._fields) if 'bias' in name)
_PLAIN = Tensor, nn.Parameter
# What gives the hooks on saved tensors that are set; torch before 2.9 may lack it, as it is private.
_saved_tensors_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
programs = Programs()


class _Kind(NamedTuple):
    """What determines all that a call does, except for the values.

    tensors: Shape, strides and dtype of each. settings: Those that the operators read.
    """
    layer: Layer
    tensors: Tuple[Any, ...]
    device: int
    amp: Optional[torch.dtype]
    settings: Tuple[Any, ...]


def _amp(x: Tensor) -> Optional[torch.dtype]:
    """Autocast's dtype on the device of x, or None where it is off."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def _settings(dtype: torch.dtype) -> Tuple[Any, ...]:
    return settings.workspace_bytes(), dtype == torch.float32 and allows_tf32()


def _can_replay(first: Tensor, addresses: Sequence[int]) -> bool:
    """Whether recorded launches are right for tensors: kernels differ where an address is no multiple of 16 bytes."""
    some = 0
    for address in addresses:
        some |= address
    if some & 15 or torch.are_deterministic_algorithms_enabled():
        return False
    # a CUDA graph would read tables that a program need not keep as long as the graph
    return not first.is_cuda or (
        first.get_device() == triton_support.current_device() and not torch.cuda.is_current_stream_capturing()
        and not triton_support.has_launch_hooks())


def _is_of_kind(kind: _Kind, t: Sequence[Optional[Tensor]]) -> bool:
    """Whether tensors have the forms that they had in the forward pass. `p.data = ...` changes them without a word."""
    for p, form in zip(t, kind.tensors):
        if p is not None and ((p.shape, p.stride(), p.dtype) != form or p.get_device() != kind.device):
            return False
    return True


def _call(kind: _Kind, t: _Tensors, save: bool) -> Tuple[Any, Optional[Program], List[Any]]:
    """The output; and for the backward pass a program and the tensors that it saves, or None and :class:`_Between`."""
    def function(*tensors: Any) -> List[Any]:
        y, between = _forward(kind.layer, _Tensors(*tensors), save)
        return [y, *between] if save else [y]

    addresses = addresses_of(t)
    if not _can_replay(t.x, addresses):
        y, *between = function(*t)
        return y, None, between
    key = kind, save
    program = programs.find(key)
    if program is None:
        y, *between = programs.run(key, function, t, 1)
        return y, None, between
    with below_autograd(t.x):
        (y,), saved = program(t, addresses)
    if save and (_saved_tensors_hooks is None or _saved_tensors_hooks(False) is not None):
        # checkpointing and the like want as many tensors, of the same shapes, from each call
        return y, None, program.others(t, saved)
    return y, program, saved


class _OneCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: _Kind, *tensors: Any) -> Tensor:
        t = _Tensors(*tensors)
        y, ctx.program, saved = _call(kind, t, True)
        if kind.layer.norm is not None and kind.layer.norm.batch_statistics:
            t = t._replace(running_mean=None, running_var=None)  # the next call changes them
        # of biases the backward pass reads shape and dtype alone, so they may change before it, as elsewhere in torch
        ctx.kind, ctx.biases = kind, [t[i] for i in _BIASES]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[None if i in _BIASES else p for i, p in enumerate(t)], *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        if grad is None:
            return (None,) * (1 + _COUNT)
        refuse_more('triton', grad)
        grad = grad.resolve_neg()  # kernels read memory
        saved = list(ctx.saved_tensors)
        for i, bias in zip(_BIASES, ctx.biases):
            saved[i] = bias
        layer, program, needed = ctx.kind.layer, ctx.program, ctx.needs_input_grad[1:]
        wanted: Any = _Tensors(*needed)

        def function(grad: Tensor, *tensors: Any) -> List[Any]:
            t, rest = tensors[:_COUNT], tensors[_COUNT:]
            between = rest if program is None else program.others(t, rest)
            grads = _gradient(layer, _Tensors(*t), _Between(*between), grad, wanted.weight)
            return [g if n else None for g, n in zip(grads, needed)]

        inputs = grad, *saved
        if program is None or not is_plain_eager(grad):
            return None, *function(*inputs)
        amp, latest = _amp(grad), program.programs.latest
        facts = needed, amp, allows_tf32()
        is_like = latest is not None and latest.holds(facts, inputs[:1 + _COUNT])
        if not is_like and not _is_of_kind(ctx.kind, saved[:_COUNT]):
            return None, *function(*inputs)
        addresses = addresses_of(inputs)
        if not _can_replay(grad, addresses):
            return None, *function(*inputs)
        if not is_like:
            key = grad.shape, grad.stride(), grad.dtype, *facts
            replay = program.programs.find(key)
            if replay is None:
                return None, *program.programs.run(key, function, inputs, _COUNT)
            latest = program.programs.latest = Latest(facts, inputs[:1 + _COUNT], replay)
        with below_autograd(grad):
            return None, *latest.value(inputs, addresses)[0]


def _tensors(frame: Frame, x: Tensor) -> Optional[_Tensors]:
    """The tensors of a call, or None where a module was taken apart."""
    try:
        return _Tensors._make((x, *[None if place is None else place[0][place[1]] for place in frame.places]))
    except KeyError:
        return None


def _facts(layer: 'FADConv2d', x: Tensor) -> Tuple[Any, ...]:
    """What a call depends on besides its tensors, and the layer."""
    name = settings.named_backend() if layer.backend is None else layer.backend
    return name, _amp(x), torch.is_grad_enabled(), *_settings(x.dtype)


def _run(frame: Frame, kind: _Kind, t: _Tensors, save: bool, cast: Tensor) -> Tensor:
    """The output in the memory format of cast, which takes the place of x in t."""
    is_last = cast.is_contiguous(memory_format=torch.channels_last)
    inside = cast if is_last else cast.contiguous(memory_format=torch.channels_last)  # once for all parts
    if inside is not t.x:
        t = t._replace(x=inside)
    if frame.batches is not None:
        number = frame.batches[0].get(frame.batches[1])
        if number is not None:
            number.add_(1)
        # for what was saved of them in other calls: a launch changes them, of which autograd is not told
        torch.autograd.graph.increment_version((t.running_mean, t.running_var))
    y = _OneCall.apply(kind, *t) if save else _call(kind, t, False)[0]
    return y if is_last and not cast.is_contiguous() else match_layout(y, cast)


def _again(layer: 'FADConv2d', x: Tensor) -> Optional[Tensor]:
    """The output for a call like the latest one of :func:`_anew`, about which less has to be asked, or None."""
    frame: Optional[Frame] = layer.__dict__.get('_frame')
    latest = None if frame is None else frame.latest
    if frame is None or latest is None or not is_plain_eager(x) or frame_of(layer) is not frame:
        return None
    t = _tensors(frame, x)
    if t is None or not latest.holds(_facts(layer, x), t):
        return None
    kind, save = latest.value
    return _run(frame, kind, t, save, x if kind.amp is None or kind.amp == x.dtype else under_autocast(x))


def _anew(layer: 'FADConv2d', x: Tensor) -> Optional[Tensor]:
    """The output, or None where the parts have to be called one by one."""
    frame = frame_of(layer)
    if frame is None:
        return None
    batch, norm = x.shape[0], frame.layer.norm
    if not batch or (norm is not None and norm.batch_statistics and batch == 1) or not is_plain_eager(x):
        return None
    t = _tensors(frame, x)
    if t is None:
        return None
    device, amp, dtype, of_kern = x.get_device(), _amp(x), convolution_dtype(x), mean_dtype(x)
    for i, p in enumerate(t[1:], 1):
        if p is None:
            continue
        fits = p.dtype == of_kern if 3 <= i < 13 else p.dtype == dtype or (amp is not None and p.dtype == torch.float32)
        if not fits or p.get_device() != device or type(p) not in _PLAIN or p.is_meta or p.is_neg():
            return None
    # the heads' kernel adds a bias
    if (t.head_weight is not None and t.head_bias is None) or (t.head_weight_2 is not None and t.head_bias_2 is None):
        return None
    cast = as_dtype(x, dtype)  # once for all parts, as FreqSelect computes in this dtype too
    is_last = cast.is_contiguous(memory_format=torch.channels_last)
    inside = cast if is_last else torch.empty_like(cast, device='meta', memory_format=torch.channels_last)
    forms = tuple([None if p is None else (p.shape, p.stride(), p.dtype) for p in (inside, *t[1:])])
    kind = _Kind(frame.layer, forms, device, amp, _settings(dtype))
    save = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in t)
    frame.latest = Latest(_facts(layer, x), t, (kind, save))
    return _run(frame, kind, t, save, cast)


def in_one_call(layer: 'FADConv2d', x: Tensor) -> Optional[Tensor]:
    """The output of a layer whose predictions the Triton backend takes, without a call of its modules.

    Args:
        layer: Of sampling 'dilation'.
        x: Map (B, C, H, W).

    Returns:
        (B, O, H', W') in the memory format of x; or None where the parts have to be called one by one: where another
        backend runs, or more than autograd looks at operators, if a module is not what the layer was made with, or has
        hooks, if a parameter does not fit x in dtype or device, and for what is rare (replicated padding, a padding
        that crops, empty batches).
    """
    if torch.compiler.is_compiling() or has_global_hooks():
        return None
    y = _again(layer, x)
    return y if y is not None or not takes_predictions(x, layer.backend) else _anew(layer, x)
