"""A FADConv2d as one function of autograd, for eager calls whose parts all run in Triton's kernels.

By itself every part is a function of autograd, and torch takes longer to call these than the kernels take to be
launched. Here autograd sees one function, and the gradients of a map that several parts read are added in products.
"""
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..ops import few_outputs, gains
from ..ops.band_mix.triton import operator as band_mix
from ..ops.band_mix.triton.mix import means_shape
from ..ops.derivatives import refuse_more
from ..ops.runtime import as_dtype, is_plain_eager
from ..ops.sampled_conv.triton import ACTS
from ..ops.sampled_conv.triton import operator as sampled_conv
from .ada_dr import AdaDR
from .ada_kern import AdaKern, Head, mean_dtype
from .freq_select import FreqSelect
from .own_hooks import does_more, has_global_hooks
from .predictor_conv import PredictorConv2d

if TYPE_CHECKING:
    from .fad_conv import FADConv2d

__all__ = ['in_one_call']

_aten = torch.ops.aten
_NONE: Tuple[Any, ...] = (None,) * 10
# A tensor, or None where a layer lacks the part.
_Maybe = Any


class _Conv(NamedTuple):
    """A convolution without its tensors: stride, padding and dilation of the rows and of the columns."""
    stride: List[int]
    padding: List[int]
    dilation: List[int]
    groups: int


class _Norm(NamedTuple):
    """AdaKern's norm without its tensors. groups: Of a GroupNorm; 0 for a BatchNorm."""
    eps: float
    groups: int
    batch_statistics: bool
    momentum: float


class _Layer(NamedTuple):
    """A layer without its tensors. A part that it lacks is None, or its tensors are."""
    bands: List[int]
    map_groups: int
    maps: Optional[_Conv]
    norm: Optional[_Norm]
    high_alone: bool  # the only head is that of the high part
    o: _Conv
    mask_dw: Optional[_Conv]
    mask_pw: Optional[_Conv]
    act: int
    base: float
    conv: _Conv


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


def _convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor], conv: _Conv) -> Tuple[Tensor, Optional[Tensor]]:
    """The convolution in the dtype of x, and what the backward pass of one with few outputs reads, or None."""
    stride, padding, dilation, groups = conv
    if groups == 1 and few_outputs.fits(weight, x.dtype, x.device.type):
        return few_outputs.forward(x, weight, bias, stride, padding, dilation)
    bias = None if bias is None else as_dtype(bias, x.dtype)
    return _aten.convolution(
        x, as_dtype(weight, x.dtype), bias, stride, padding, dilation, False, [0, 0], groups), None


def _convolution_gradient(
        grad: Tensor,
        taps: Optional[Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        conv: _Conv,
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


def _normalize(norm: _Norm, t: _Tensors, y: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """AdaKern's norm of y (B, K), and the mean and the inverse deviation that its backward pass reads."""
    if norm.groups:
        batch, width = y.shape
        return torch.native_group_norm(y, t.norm_weight, t.norm_bias, batch, width, 1, norm.groups, norm.eps)
    return torch.native_batch_norm(
        y, t.norm_weight, t.norm_bias, t.running_mean, t.running_var, norm.batch_statistics, norm.momentum, norm.eps)


def _norm_gradient(
        norm: _Norm, t: _Tensors, between: _Between, grad: Tensor) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    y, mean, rstd = between.trunk, between.norm_mean, between.norm_rstd
    wanted = [True, t.norm_weight is not None, t.norm_bias is not None]
    if norm.groups:
        return _aten.native_group_norm_backward(
            grad, y, mean, rstd, t.norm_weight, *grad.shape, 1, norm.groups, wanted)
    return _aten.native_batch_norm_backward(
        grad, y, t.norm_weight, t.running_mean, t.running_var, mean, rstd, norm.batch_statistics, norm.eps, wanted)


def _forward(layer: _Layer, t: _Tensors, save: bool) -> Tuple[Tensor, _Between]:
    """The output (B, O, H', W') channels_last. save: Whether there will be a backward pass."""
    selected, maps, maps_taps, coefficients, means = t.x, None, None, None, None
    if layer.maps is not None:
        b, _, h, w = t.x.shape
        predicted, maps_taps = _convolve(t.x, t.maps_weight, t.maps_bias, layer.maps)
        maps = predicted.view(b, layer.map_groups, -1, h, w).transpose(1, 2)
        selected, means, coefficients = band_mix.forward(t.x, maps, layer.bands, True)
    mean, trunk, normalized, norm_mean, norm_rstd, low, high = (None,) * 7
    if t.fc_weight is not None:
        if means is None:
            means = t.x.mean(dim=(2, 3), dtype=t.fc_weight.dtype)[:, None]
        trunk, mean = gains.trunk_forward(means, t.fc_weight, t.fc_bias)
        normalized = trunk
        if layer.norm is not None:
            normalized, norm_mean, norm_rstd = _normalize(layer.norm, t, trunk)
        low, high = gains.heads_forward(normalized, t.head_weight, t.head_bias, t.head_weight_2, t.head_bias_2)
        if t.head_weight_2 is None:
            low, high = (None, low) if layer.high_alone else (low, None)
    o, o_taps = _convolve(selected, t.o_weight, t.o_bias, layer.o)
    mask_dw, mask, mask_taps = None, None, None
    if layer.mask_dw is not None and layer.mask_pw is not None:
        mask_dw, _ = _convolve(selected, t.dw_weight, None, layer.mask_dw)
        mask, mask_taps = _convolve(mask_dw, t.pw_weight, t.pw_bias, layer.mask_pw)
    stride, padding, _, groups = layer.conv
    y, high_part, low_part = sampled_conv.forward(
        selected, t.weight, t.bias, o, mask, low, high, layer.act, layer.base, True, save, stride, padding, [], groups)
    return y, _Between(
        selected, maps, maps_taps, coefficients, mean, trunk, normalized, norm_mean, norm_rstd, low, high, o, o_taps,
        mask_dw, mask, mask_taps, high_part, low_part)


def _gradient(layer: _Layer, t: _Tensors, between: _Between, grad: Tensor, wants_weight: bool) -> _Tensors:
    """The gradients of the tensors, None for buffers, and for the weight if it is not wanted."""
    stride, padding, _, groups = layer.conv
    selected, low, high = between.selected, between.low, between.high
    of_sampled: List[Any] = sampled_conv.gradient(
        grad, between.high_part, between.low_part, selected, t.weight, t.bias, between.o, between.mask, low, high,
        layer.act, layer.base, True, stride, padding, [], groups, wants_weight)
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


class _OneCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: _Layer, *tensors: Any) -> Tensor:
        t = _Tensors(*tensors)
        y, between = _forward(layer, t, True)
        if layer.norm is not None and layer.norm.batch_statistics:
            t = t._replace(running_mean=None, running_var=None)  # the next call changes them
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*t, *between)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        if grad is None:
            return (None,) * (1 + len(_Tensors._fields))
        refuse_more('triton', grad)
        saved, n = ctx.saved_tensors, len(_Tensors._fields)
        needed: Any = _Tensors(*ctx.needs_input_grad[1:])
        grads = _gradient(ctx.layer, _Tensors(*saved[:n]), _Between(*saved[n:]), grad, needed.weight)
        return None, *[g if wanted else None for g, wanted in zip(grads, needed)]


def _norm_of(norm: nn.Module, batch: int) -> Tuple[bool, Optional[_Norm]]:
    """Whether torch's function of a norm computes all that the module does for so many images, and the norm."""
    if type(norm) is nn.GroupNorm:
        return True, _Norm(norm.eps, norm.num_groups, False, 0.)
    if type(norm) is not nn.BatchNorm2d:
        return type(norm) is nn.Identity, None
    has_statistics = norm._buffers['running_mean'] is not None
    batch_statistics = norm.training or not has_statistics
    is_known = norm.track_running_stats == has_statistics and (
        not batch_statistics or (batch > 1 and norm.momentum is not None))
    return is_known, _Norm(norm.eps, 0, batch_statistics, norm.momentum or 0.)


def _is_own(module: Any, cls: Any) -> bool:
    """Whether a call of a module does what its class says, and no more."""
    return type(module) is cls and not does_more(module)


def _weight_and_bias(module: Any, cls: type) -> Optional[Sequence[Optional[Tensor]]]:
    """Of a convolution, a linear layer or a norm; or None if it is more than its class, or was taken apart."""
    if not _is_own(module, cls):
        return None
    parameters = module._parameters  # a module's attributes take longer
    if 'weight' not in parameters or 'bias' not in parameters:
        return None
    return parameters['weight'], parameters['bias']


def _conv_of(conv: Any, cls: type) -> Optional[Tuple[Any, ...]]:
    """A convolution, its weight and its bias; or None where :func:`_convolve` cannot take its place."""
    tensors = _weight_and_bias(conv, cls)
    if tensors is None or conv.padding_mode != 'zeros' or type(conv.padding) is not tuple:
        return None
    options: Any = conv.stride, conv.padding, conv.dilation, conv.groups
    return _Conv(*options), *tensors


def _kern_tensors(kern: AdaKern, dtype: torch.dtype) -> Optional[Sequence[Optional[Tensor]]]:
    """Those of :class:`_Tensors` from fc_weight to head_bias_2, or None where a module is not as it was made."""
    modules: Dict[str, Any] = kern._modules
    norm = modules['norm']
    if not _is_own(modules['act'], nn.ReLU) or not _is_own(norm, type(norm)):
        return None
    found = [_weight_and_bias(modules['fc'], nn.Linear)]
    if type(norm) is nn.Identity:
        found.append(_NONE[:4])
    else:
        of_norm, statistics = _weight_and_bias(norm, type(norm)), norm._buffers
        found.append(None if of_norm is None else (
            *of_norm, statistics.get('running_mean'), statistics.get('running_var')))
    heads = [_weight_and_bias(modules[name], Head) for name in ('low', 'high') if modules.get(name) is not None]
    if any(head is not None and head[1] is None for head in heads):
        return None  # their kernel adds a bias
    found += heads
    tensors: List[Optional[Tensor]] = []
    for some in found:
        if some is None:
            return None
        tensors += some
    if any(p is not None and p.dtype != dtype for p in tensors):
        return None
    return tensors if len(tensors) == 10 else [*tensors, None, None]


def in_one_call(layer: 'FADConv2d', x: Tensor) -> Optional[Tensor]:
    """The output of a layer whose predictions the Triton backend takes, without a call of its modules.

    Args:
        layer: Of sampling 'dilation'.
        x: Map (B, C, H, W), cast for autocast.

    Returns:
        (B, O, H', W') channels_last; or None where the parts have to be called one by one: where more than autograd
        looks at operators, if a module is not what the layer was made with, or has hooks, if a parameter does not fit x
        in dtype or device, and for what is rare (replicated padding, a padding that crops, empty batches).
    """
    if torch.compiler.is_compiling() or has_global_hooks():
        return None
    modules: Dict[str, Any] = layer._modules
    select, kern, dr = modules.get('freq_select'), modules.get('ada_kern'), modules['ada_dr']  # None is no module
    batch = x.shape[0]
    if layer.pads_itself or not batch or not _is_own(dr, AdaDR) or dr.crop:
        return None
    parts: Dict[str, Any] = dr._modules
    o = _conv_of(parts['conv'], PredictorConv2d)
    maps: Optional[Tuple[Any, ...]] = _NONE[:3]  # options, weight and bias
    dw: Optional[Tuple[Any, ...]] = _NONE[:3]
    pw: Optional[Tuple[Any, ...]] = _NONE[:3]
    bands, groups, norm = [], 1, None
    of_kern: Any = _NONE[:10]
    if select is not None:
        maps = _conv_of(select._modules['conv'], PredictorConv2d) if _is_own(select, FreqSelect) else None
        if maps is None:
            return None
        bands, groups = select.bands, select.spatial_group
    if kern is not None:
        is_known, norm = _norm_of(kern._modules['norm'], batch) if _is_own(kern, AdaKern) else (False, None)
        of_kern = _kern_tensors(kern, mean_dtype(x)) if is_known else None
    if parts.get('mask_dw') is not None:
        dw, pw = _conv_of(parts['mask_dw'], nn.Conv2d), _conv_of(parts['mask_pw'], PredictorConv2d)
    if maps is None or of_kern is None or o is None or dw is None or pw is None:
        return None
    if dw[2] is not None:  # it is made without a bias
        return None
    t = _Tensors._make((x, *maps[1:], *of_kern, *o[1:], dw[1], *pw[1:], layer.weight, layer.bias))
    if not is_plain_eager(*t):
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        t = t._replace(x=x.contiguous(memory_format=torch.channels_last))  # once for all parts
    dtype, device, amp = x.dtype, x.get_device(), torch.is_autocast_enabled(x.device.type)
    for p in t:
        if p is not None and p.get_device() != device:
            return None
    for p in t[1:3] + t[13:]:
        if p is not None and p.dtype != dtype and not (amp and p.dtype == torch.float32):
            return None
    if kern is not None and norm is not None and norm.batch_statistics:
        count = kern._modules['norm']._buffers['num_batches_tracked']
        if count is not None:
            count.add_(1)
    stride, padding = layer.stride[0], layer.inner_padding
    this = _Layer(
        bands, groups, maps[0], norm, kern is not None and kern._modules.get('low') is None, o[0], dw[0], pw[0],
        ACTS.index(dr.dilation_act), float(dr.dilation),
        _Conv([stride] * 2, [padding] * 2, [1] * 2, layer.groups))
    if torch.is_grad_enabled():
        for p in t:
            if p is not None and p.requires_grad:
                return _OneCall.apply(this, *t)
    return _forward(this, t, False)[0]
