"""Adaptive dilated and deformable convolution: the signatures, their checks, and the dispatch to a backend.

Paper: `Frequency-Adaptive Dilated Convolution for Semantic Segmentation` - https://arxiv.org/abs/2403.05369
"""
from typing import Any, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ..runtime import is_exporting, is_transformed, match_layout, under_autocast
from ..settings import check_name, named_backend
from ..triton_support import is_default_on
from . import triton
from .arguments import NO_GAINS, ConvArgs, Gains
from .backends import BACKENDS, choose_backend

__all__ = ['adaptive_dilated_conv2d', 'deform_conv2d', 'predicted_conv2d', 'takes_predictions']

IntOrPair = Union[int, Tuple[int, int]]


def _pair(name: str, value: Any, minimum: Optional[int] = None) -> Tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) for v in pair):
        raise TypeError(f'{name} must be an integer or a pair of integers, got {value!r}.')
    if minimum is not None and any(v < minimum for v in pair):
        raise ValueError(f'{name} must be at least {minimum}, got {value!r}.')
    return pair


def _check_tensor(
        name: str,
        t: Tensor,
        shape: Sequence[Optional[int]],
        want: str,
        like: Tensor,
        also: Optional[torch.dtype] = None,
) -> None:
    """Raise unless t has the given shape (None: any size), the device of `like`, and its dtype or `also`."""
    if not isinstance(t, Tensor):
        raise TypeError(f'{name} must be a tensor of shape {want}, got {type(t).__name__}.')
    if t.dim() != len(shape) or any(s is not None and n != s for n, s in zip(t.shape, shape)):
        sizes = ', '.join('any' if s is None else str(s) for s in shape)
        raise ValueError(f'{name} must have shape {want} = ({sizes}), got {tuple(t.shape)}.')
    if t.device != like.device:
        raise ValueError(f'{name} is on {t.device} and x is on {like.device}, they must be on one device.')
    if t.dtype != like.dtype and t.dtype != also:
        raise TypeError(f'{name} must have the dtype of x, {like.dtype}, got {t.dtype}.')


def _check_map_and_kernel(x: Tensor, weight: Tensor, groups: int) -> None:
    if x.dim() != 4:
        raise ValueError(f'x must have shape (B, C, H, W), got {tuple(x.shape)}.')
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f'x (B, C, H, W) must have at least one pixel, got {tuple(x.shape)}.')
    if x.shape[1] < 1:
        raise ValueError(f'x (B, C, H, W) must have a channel, got {tuple(x.shape)}.')
    if not x.is_floating_point():
        raise TypeError(f'x must have a floating point dtype, got {x.dtype}.')
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f'groups must be a positive integer, got {groups!r}.')
    c = x.shape[1]
    if c % groups:
        raise ValueError(f'groups={groups} does not divide the {c} channels of x {tuple(x.shape)}.')
    _check_tensor('weight', weight, (None, c // groups, None, None), '(O, C/groups, k, k)', x)
    o, _, k, kw = weight.shape
    if k != kw:
        raise ValueError(f'weight must be (O, C/groups, k, k) with one kernel size, got {tuple(weight.shape)}.')
    if o < 1:
        raise ValueError(f'weight (O, C/groups, k, k) must have an output channel, got {tuple(weight.shape)}.')
    if o % groups:
        raise ValueError(f'groups={groups} does not divide the {o} output channels of weight {tuple(weight.shape)}.')


def _check_dilation(x: Tensor, weight: Tensor, dilation: Tensor) -> None:
    if weight.shape[-1] % 2 == 0:
        raise ValueError(f'weight must be (O, C/groups, k, k) with one odd kernel size, got {tuple(weight.shape)}.')
    b, c = x.shape[:2]
    _check_tensor('dilation', dilation, (b, None, None, None), "(B, G, H', W')", x, also=torch.float32)
    g, h, w = dilation.shape[1:]
    if h < 1 or w < 1:
        raise ValueError(f"dilation (B, G, H', W') must have at least one position, got {tuple(dilation.shape)}.")
    if g < 1 or c % g:
        raise ValueError(f'dilation {tuple(dilation.shape)} has {g} groups, which do not divide the {c} channels of x.')


def _check_offset(
        x: Tensor,
        weight: Tensor,
        offset: Tensor,
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        spacing: Tuple[int, int],
) -> None:
    k = weight.shape[-1]
    b, c, *size = x.shape
    h, w = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, s, p, d in zip(size, stride, padding, spacing))
    if h < 1 or w < 1:
        raise ValueError(
            f'The output has size ({h}, {w}): x {tuple(x.shape)} with padding={padding} is too small for kernel size '
            f'{k} at dilation={spacing}.')
    _check_tensor('offset', offset, (b, None, h, w), "(B, G*k*k*2, H', W')", x, also=torch.float32)
    n, taps = offset.shape[1], k * k
    if n < 1 or n % (2 * taps):
        raise ValueError(
            f"offset must have shape (B, G*k*k*2, H', W') with a multiple of {2 * taps} channels, got "
            f'{tuple(offset.shape)}.')
    g = n // (2 * taps)
    if c % g:
        raise ValueError(f'offset {tuple(offset.shape)} has {g} groups, which do not divide the {c} channels of x.')


def _check_optional(args: ConvArgs) -> None:
    """Check mask, bias and gains."""
    x, (b, c), o = args.x, args.x.shape[:2], args.weight.shape[0]
    if args.mask is not None:
        shape = (b, args.step_groups * args.kernel_size ** 2, *args.out_size)
        _check_tensor('mask', args.mask, shape, "(B, G*k*k, H', W')", x)
    if args.bias is not None:
        _check_tensor('bias', args.bias, (o,), '(O,)', x)
    for name, gain, n in zip(('low_in', 'low_out', 'high_in', 'high_out'), args.gains, (c, o, c, o), strict=True):
        if gain is not None:
            _check_tensor(f'gains: {name}', gain, (b, n), '(B, C)' if name.endswith('in') else '(B, O)', x)


def _autocast(t: Any, dtype: torch.dtype) -> Any:
    """What autocast does to the arguments of a convolution: every real dtype but float64 becomes its own."""
    return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t


def adaptive_dilated_conv2d(
        x: Tensor,
        weight: Tensor,
        dilation: Tensor,
        mask: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
        *,
        gains: Optional[Gains] = None,
        stride: IntOrPair = 1,
        padding: Optional[IntOrPair] = None,
        groups: int = 1,
        backend: Optional[str] = None,
) -> Tensor:
    r"""Convolution with a dilation of its own at every output position (FADC paper, section 3).

    With k in {-r..r}^2, r = kernel_size // 2, and bilinear sampling that is zero outside the map,

    .. math::
        y(b, p, o) = bias(o) + \sum_k mask(b, p, k) \sum_c W'(b, o, c, k) \, x(b, c, p \cdot stride + r - padding
        + dilation(b, p) \cdot k)

    where :math:`W' = low_{out} low_{in} \bar W + high_{out} high_{in} (W - \bar W)` and :math:`\bar W` is the mean of W
    over the taps (AdaKern). Values are never inspected: any finite dilation is valid, zero and negative ones too.
    The result has the memory format of x. Under autocast the arguments are cast as those of a convolution.

    Args:
        x: Input (B, C, H, W), float32, float64, or a half dtype that the backend supports.
        weight: Weight (O, C/groups, k, k), k odd.
        dilation: Dilation in pixels (B, G, H', W'); H', W' are the size of the output, G (dilation groups) divides C.
            In the dtype of x, or float32.
        mask: Modulation (B, G*k*k, H', W'), taps in row-major order within a dilation group. None means ones.
        bias: Bias (O,).
        gains: AdaKern's gains (low_in (B, C), low_out (B, O), high_in (B, C), high_out (B, O)), each None for ones.
        stride: Distance of the kernel's centres, in pixels.
        padding: Padding at dilation 1, may be negative. None means k // 2: centres on the pixels of x. A layer with
            padding P and base dilation d passes P - k // 2 * (d - 1).
        groups: Convolution groups.
        backend: A name of :func:`list_backends`, or None for that of :class:`set_backend` or the environment variable
            FADC_TIMM_BACKEND, or else to choose one by device, dtype and shape.

    Returns:
        Output (B, O, H', W').

    Raises:
        TypeError: An argument is not a tensor, or has another dtype than x.
        ValueError: A shape or device does not fit the other arguments, or there is no such backend.
        NotImplementedError: The named backend, or the one that is set, cannot run this call.
    """
    return _sampled_conv2d(
        x, weight, dilation, mask, bias, gains, stride, padding, None, groups, backend)


def deform_conv2d(
        x: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
        *,
        gains: Optional[Gains] = None,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        backend: Optional[str] = None,
) -> Tensor:
    r"""Deformable convolution, version 1 or with a mask 2: `torchvision.ops.deform_conv2d` with AdaKern's gains.

    With i in {0..k-1}^2 and bilinear sampling that is zero outside the map,

    .. math::
        y(b, p, o) = bias(o) + \sum_i mask(b, p, i) \sum_c W'(b, o, c, i) \, x(b, c, p \cdot stride - padding
        + i \cdot dilation + offset(b, p, i))

    where :math:`W'` is that of :func:`adaptive_dilated_conv2d`, and W itself without gains. Values are never inspected:
    any finite offset is valid, and one that is not finite makes its outputs NaN. On a pixel, as at offset 0, the
    gradient of the offset is the slope below and to the right, as torchvision's; only `grid_sample` may take the other.
    The result has the memory format of x. Under autocast the arguments are cast as those of a convolution, the offset
    to float32.

    Paper: `Deformable ConvNets v2` - https://arxiv.org/abs/1811.11168

    Args:
        x: Input (B, C, H, W), float32, float64, or a half dtype that the backend supports.
        weight: Weight (O, C/groups, k, k).
        offset: Offsets in pixels (B, G*k*k*2, H', W'), taps in row-major order within an offset group, each with its
            row before its column; G divides C; H', W' are the size that a convolution's output has. In the dtype of x,
            or float32.
        mask: Modulation (B, G*k*k, H', W'), taps in row-major order within an offset group. None means ones.
        bias: Bias (O,).
        gains: AdaKern's gains (low_in (B, C), low_out (B, O), high_in (B, C), high_out (B, O)), each None for ones.
        stride, padding, dilation, groups: Of a convolution.
        backend: As in :func:`adaptive_dilated_conv2d`.

    Returns:
        Output (B, O, H', W').

    Raises:
        TypeError: An argument is not a tensor, or has another dtype than x.
        ValueError: A shape or device does not fit the other arguments, or there is no such backend.
        NotImplementedError: The named backend, or the one that is set, cannot run this call.
    """
    return _sampled_conv2d(
        x, weight, offset, mask, bias, gains, stride, _pair('padding', padding, 0), _pair('dilation', dilation, 1),
        groups, backend)


def _sampled_conv2d(
        x: Tensor,
        weight: Tensor,
        steps: Tensor,
        mask: Optional[Tensor],
        bias: Optional[Tensor],
        gains: Optional[Gains],
        stride: IntOrPair,
        padding: Optional[IntOrPair],
        spacing: Optional[Tuple[int, int]],
        groups: int,
        backend: Optional[str],
) -> Tensor:
    """Both operators: `steps` and `spacing` as in :class:`ConvArgs`."""
    if not isinstance(x, Tensor):
        raise TypeError(f'x must be a tensor of shape (B, C, H, W), got {type(x).__name__}.')
    gains = NO_GAINS if gains is None else gains
    want = 'gains must be four tensors or None (low_in, low_out, high_in, high_out)'
    if not isinstance(gains, (tuple, list)):
        raise TypeError(f'{want}, got {type(gains).__name__}.')
    if len(gains) != 4:
        raise ValueError(f'{want}, got {len(gains)} of them.')
    device_type = x.device.type
    autocast = device_type != 'meta' and torch.is_autocast_enabled(device_type)
    if autocast:
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, mask, bias = (_autocast(t, dtype) for t in (x, weight, mask, bias))
        gains = tuple(_autocast(t, dtype) for t in gains)
        steps = _autocast(steps, torch.float32)
    _check_map_and_kernel(x, weight, groups)
    stride = _pair('stride', stride, 1)
    r = weight.shape[-1] // 2  # in torch.jit.trace a tensor
    padding = (r, r) if padding is None else _pair('padding', padding)
    if spacing is None:
        _check_dilation(x, weight, steps)
    else:
        _check_offset(x, weight, steps, stride, padding, spacing)
    args = ConvArgs(
        x, weight, steps, mask, bias, tuple(gains), stride, padding, groups, spacing)  # type: ignore[arg-type]
    _check_optional(args)
    name = named_backend() if backend is None else check_name(backend)
    if name is None:
        name = choose_backend(args)
    else:
        reason = BACKENDS[name].why_not(args)
        if reason:
            raise NotImplementedError(f'The backend {name!r} cannot run this call: {reason}.')
    if not autocast:
        return BACKENDS[name].forward(args)
    with torch.autocast(device_type, enabled=False):
        return BACKENDS[name].forward(args)


def takes_predictions(x: Tensor, backend: Optional[str]) -> bool:
    """Whether :func:`predicted_conv2d` computes a call on x: whether its backend is `triton`, which can run it."""
    name = named_backend() if backend is None else backend
    if is_transformed():
        return False
    if name is None:
        return is_default_on(x.device.type) and not is_exporting() and triton.why_not_map(x) is None
    return name == 'triton' and triton.why_not_map(x) is None


def predicted_conv2d(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        steps: Tensor,
        mask: Optional[Tensor],
        low: Optional[Tensor],
        high: Optional[Tensor],
        *,
        dilation_act: Optional[str],
        dilation: int,
        stride: int,
        padding: int,
        groups: int,
) -> Tensor:
    """:func:`adaptive_dilated_conv2d` of what a layer predicts: the activations are in the kernels that read it.

    Or :func:`deform_conv2d` under the gains that AdaKern predicts.

    Args:
        x: Input (B, C, H, W).
        weight: Weight (O, C/groups, k, k).
        bias: Bias (O,).
        steps: Outputs of AdaDR's convolution (B, G, H', W'), or without `mask` with those for the mask behind them
            (B, G + G*k*k, H', W'). For the deformable convolution its offsets.
        mask: What the modulation is 2 * sigmoid of (B, G*k*k, H', W'). For the deformable convolution its mask.
        low, high: What AdaKern's gains are 2 * sigmoid of, (B, C + O), or (B, C) where the kernel is depthwise.
        dilation_act: AdaDR's activation; None for the deformable convolution.
        dilation: AdaDR's base dilation, or the deformable convolution's.
        stride, padding, groups: As there.

    Returns:
        Output (B, O, H', W').
    """
    x = under_autocast(x)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (low, high))
    act, base, spacing = (0, 1., [dilation, dilation]) if dilation_act is None else (
        triton.ACTS.index(dilation_act), float(dilation), [])
    y = triton.call(
        x, weight, bias, steps, mask, low, high, act, base, True, save, [stride, stride], [padding, padding], spacing,
        groups)
    return match_layout(y, x)
