"""Frequency-Adaptive Dilated Convolution: FreqSelect, AdaDR (or free offsets) and AdaKern around the operator.

Paper: `Frequency-Adaptive Dilated Convolution for Semantic Segmentation` - https://arxiv.org/abs/2403.05369
"""
from functools import wraps
from inspect import signature
from numbers import Integral
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, TypeVar, Union, cast

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops import adaptive_dilated_conv2d, deform_conv2d, list_backends
from ..ops.runtime import is_depthwise, under_autocast
from ..ops.sampled_conv import predicted_conv2d, takes_predictions
from ..ops.sampled_conv.arguments import Gains, scale_channels, split_kernel
from ..ops.sampled_conv.scripted import scripted_conv2d
from .ada_dr import AdaDR
from .ada_kern import AdaKern, NormLayer
from .free_offsets import FreeOffsets
from .freq_select import FreqSelect
from .one_call import in_one_call
from .onnx_capture import captures_whole, whole_layer
from .own_hooks import has_hooks, why_not_taken_over

__all__ = ['OPTIONS', 'PARTS', 'SAMPLINGS', 'FADConv2d', 'read_options', 'refuse_old_options']

# What a layer has beside its convolution, by name; each may be None.
PARTS = {'freq_select': FreqSelect, 'ada_kern': AdaKern, 'ada_dr': AdaDR, 'free_offsets': FreeOffsets}

SAMPLINGS = ('dilation', 'deform', 'fixed')

# What the parts of a layer are made for.
_GEOMETRY = ('kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')

_Init = TypeVar('_Init', bound=Callable[..., None])


def refuse_old_options(options: Mapping[str, Any]) -> None:
    """Raise where an option has a name that it no longer has.

    Raises:
        TypeError: The message names the option of today.
    """
    if 'ada_dr' in options:
        raise TypeError(f"ada_dr={options['ada_dr']!r} is now the option sampling: 'dilation' is with AdaDR, 'fixed' "
                        'without it.')


def _with_old_options_refused(init: _Init) -> _Init:
    """A constructor that says what became of an argument which it no longer has."""
    @wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse_old_options(kwargs)
        init(self, *args, **kwargs)

    return cast(_Init, wrapped)


def read_options(stored: Mapping[str, Any]) -> Dict[str, Any]:
    """Options from a stored configuration, under the names of today: `ada_dr` became `sampling`.

    Args:
        stored: The options, or arguments of a model with options among them. `sampling` comes before `ada_dr`.

    Raises:
        ValueError: ada_dr is neither true nor false.
    """
    options = dict(stored)
    if 'ada_dr' in options:
        ada_dr = options.pop('ada_dr')
        if not isinstance(ada_dr, bool):
            raise ValueError(
                f'ada_dr, which is sampling today, must be true or false in a stored configuration, got {ada_dr!r}.')
        options.setdefault('sampling', 'dilation' if ada_dr else 'fixed')
    return options


def _one_int(name: str, value: Any, minimum: int) -> int:
    values = value if isinstance(value, (tuple, list)) else (value,)
    if len(set(values)) != 1 or isinstance(values[0], bool) or not isinstance(values[0], Integral) or (
            values[0] < minimum):
        raise ValueError(f'{name} must be one integer for both axes, at least {minimum}, got {value!r}.')
    return int(values[0])


def reset_parts(module: nn.Module) -> None:
    """Make what FADC added to a layer the identity again."""
    for name in PARTS:
        part = getattr(module, name, None)  # nn.Conv2d resets its parameters before there are modules
        if part is not None:
            part.reset_parameters()


@register_notrace_module
class FADConv2d(nn.Conv2d):
    """A convolution whose dilation, kernel and input spectrum adapt to the input, in place of an `nn.Conv2d`.

    `weight` and `bias` are those of the plain convolution, and at the start the output is its output, up to the `eps`
    of AdaDR. With `sampling='deform'` it is a deformable convolution with FreqSelect and AdaKern, and there is no eps;
    without these two it is deformable convolution v2. In graphs of torch.fx, of timm's feature extractors too, it is a
    leaf.
    """
    qconfig = None  # torch.ao.quantization would swap what is inside of the leaf, and then drop its observers

    @_with_old_options_refused
    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]],
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[int, Tuple[int, int], str] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            freq_select: bool = True,
            bands: Tuple[int, ...] = (2, 4, 8),
            lowfreq_att: bool = False,
            spatial_group: int = 1,
            kernel_decompose: str = 'both',
            ada_kern_norm: NormLayer = 'batchnorm2d',
            sampling: str = 'dilation',
            dilation_act: str = 'abs',
            dilation_groups: int = 1,
            eps: float = 1e-5,
            offset_groups: int = 1,
            modulated: bool = True,
            backend: Optional[str] = None,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_channels: Number of input channels.
            out_channels: Number of output channels.
            kernel_size: Odd kernel size k.
            stride: Stride.
            padding: Padding in pixels, 'same' or 'valid', as the plain convolution's.
            dilation: Base dilation, in pixels.
            groups: Convolution groups; where they equal both channel counts, the kernel is depthwise.
            bias: Add a bias.
            padding_mode: 'zeros', or 'replicate': replicated for the padding at dilation 1 (k // 2 pixels, where the
                convolution keeps the size) and zero beyond, as in the authors' code; with every sampling alike.
            freq_select: Use FreqSelect.
            bands: FreqSelect's split frequencies, fractions 1/f of Nyquist.
            lowfreq_att: FreqSelect weighs the lowest band too.
            spatial_group: FreqSelect's groups of channels, above 64 one per channel.
            kernel_decompose: The parts of the kernel with AdaKern's gains: 'both', 'low', 'high' or 'none'.
            ada_kern_norm: AdaKern's norm: 'batchnorm2d', 'layernorm2d' (per image), or see :class:`AdaKern`.
            sampling: Where the taps lie: 'dilation' is AdaDR's dilation per position; 'deform' is an offset per
                position and tap, see :class:`FreeOffsets`; with 'fixed' they stay at the base dilation without a mask.
            dilation_act: AdaDR's activation: 'abs', 'relu' or 'zero'.
            dilation_groups: AdaDR's groups of channels, 1 with other samplings.
            eps: AdaDR's distance from the base dilation at the start, in pixels.
            offset_groups: Groups of channels with free offsets of their own, 1 with other samplings.
            modulated: With free offsets, a mask too (deformable convolution v2), else none (v1).
            backend: Backend of the operator, None to choose by device, dtype and shape. 'triton' goes for FreqSelect
                too; with 'grid_sample' and 'reference' FreqSelect is in torch's operators.

        Raises:
            TypeError: An argument is none of these.
            ValueError: A value is outside of what is said above; the message names it.
        """
        dd = {'device': device, 'dtype': dtype}
        k, s, d = (_one_int(n, v, 1) for n, v in
                   (('kernel_size', kernel_size), ('stride', stride), ('dilation', dilation)))
        if k % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {kernel_size!r}.')
        if padding_mode not in ('zeros', 'replicate'):
            raise ValueError(f"padding_mode must be 'zeros' or 'replicate', got {padding_mode!r}.")
        if not isinstance(freq_select, bool):
            raise ValueError(f'freq_select must be true or false, got {freq_select!r}.')
        if sampling not in SAMPLINGS:
            raise ValueError(f'sampling must be one of {SAMPLINGS}, got {sampling!r}.')
        for name, number, of in (
                ('dilation_groups', dilation_groups, 'dilation'), ('offset_groups', offset_groups, 'deform')):
            if number != 1 and sampling != of:
                raise ValueError(f'{name} is an option of sampling={of!r}, got {number!r} with {sampling!r}.')
        if backend is not None and backend not in list_backends():
            raise ValueError(f'backend must be None or one of {", ".join(list_backends())}, got {backend!r}.')
        super().__init__(in_channels, out_channels, k, s, padding, d, groups, bias, padding_mode, **dd)  # type: ignore
        if isinstance(self.padding, str):
            p = d * (k // 2) if self.padding == 'same' else 0
        else:
            p = _one_int('padding', self.padding, 0)
        # where a kernel of dilation 1 must be centred for the output to have the plain convolution's size
        self.outer_padding = (k // 2) * (d - 1)
        self.inner_padding = p - self.outer_padding
        self.pads_itself = padding_mode == 'replicate' and self.inner_padding > 0
        self.sampling = sampling
        self.backend = backend
        depthwise = is_depthwise(in_channels, out_channels, groups)
        self.freq_select = FreqSelect(in_channels, bands, lowfreq_att, spatial_group, **dd) if freq_select else None
        self.ada_kern = None
        if kernel_decompose != 'none':
            self.ada_kern = AdaKern(
                in_channels, out_channels, kernel_decompose, depthwise, norm_layer=ada_kern_norm, **dd)
        self.ada_dr = None
        self.free_offsets = None
        padding = 0 if self.pads_itself else self.inner_padding
        if sampling == 'dilation':
            self.ada_dr = AdaDR(
                in_channels, k, s, padding, d, dilation_groups, dilation_act, depthwise, eps, **dd)
        elif sampling == 'deform':
            self.free_offsets = FreeOffsets(
                in_channels, k, s, padding + self.outer_padding, d, offset_groups, modulated, depthwise, **dd)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **cfg: Any) -> 'FADConv2d':
        """Take over a plain convolution: its arguments, its parameters (the objects themselves), and its mode.

        Args:
            conv: A convolution of exactly the class `nn.Conv2d`.
            **cfg: Arguments of FADConv2d beyond those of `nn.Conv2d`; padding_mode replaces the convolution's.

        Raises:
            TypeError: conv is of another class, whose forward may compute something else; or an argument is one of
                `nn.Conv2d`.
            ValueError: conv has a kernel, stride, padding or dtype that FADConv2d has not, or hooks or methods of its
                own, which would be lost.
        """
        if type(conv) is not nn.Conv2d:
            raise TypeError(f'from_conv takes an nn.Conv2d, got {type(conv).__module__}.{type(conv).__name__}.')
        lost = why_not_taken_over(conv)
        if lost is not None:
            raise ValueError(f'The convolution {lost}.')
        if not isinstance(conv.weight, nn.Parameter) or not conv.weight.is_floating_point():
            raise ValueError(
                'The weight of the convolution must be a parameter of real numbers, got a '
                f'{type(conv.weight).__name__} of {conv.weight.dtype}.')
        replicates = conv.padding_mode == 'replicate' and conv.padding not in ('valid', (0, 0))
        if replicates and 'padding_mode' not in cfg and conv.dilation != (1, 1):
            raise ValueError(
                f"padding_mode='replicate' of a convolution of dilation {conv.dilation} replicates more than that of "
                'FADConv2d does: choose a padding_mode.')
        args = dict(
            in_channels=conv.in_channels, out_channels=conv.out_channels, kernel_size=conv.kernel_size,
            stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
            bias=conv.bias is not None, padding_mode=conv.padding_mode,
            device=conv.weight.device, dtype=conv.weight.dtype)
        wrong = sorted((set(args) - {'padding_mode', 'device', 'dtype'}) & set(cfg))
        if wrong:
            raise TypeError(f'FADConv2d.from_conv takes {", ".join(wrong)} from the convolution.')
        new = cls(**{**args, **cfg})
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _GEOMETRY and 'inner_padding' in self.__dict__ and value != self.__dict__[name]:
            raise AttributeError(
                f'{name} of an FADConv2d is {self.__dict__[name]!r} for good, as its parts are made for it, got '
                f'{value!r}. Change the plain convolution, and make the FADConv2d from that (from_conv, lift_model).')
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Conv2d` does, and reset what FADC added (:meth:`reset_fadc_parameters`)."""
        super().reset_parameters()
        self.reset_fadc_parameters()

    def reset_fadc_parameters(self) -> None:
        """Make FreqSelect, AdaKern, AdaDR and the free offsets the identity again; weight and bias stay."""
        reset_parts(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) to (B, O, H', W'), of the size that the plain convolution gives."""
        if not torch.jit.is_scripting():
            tracer: Any = getattr(x, 'tracer', None)
            if tracer is not None:  # a proxy of torch.fx, and what follows branches on sizes
                return tracer.create_proxy('call_module', tracer.path_of_module(self), (x,), {})
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(f'FADConv2d wants (B, {self.in_channels}, H, W), got {list(x.shape)}.')
        if not torch.jit.is_scripting():
            y = self._by_kernels(x)
            if y is not None:
                return y
            if captures_whole(self, x):
                return whole_layer(self, x)
        return self.by_parts(x)

    def by_parts(self, x: Tensor) -> Tensor:
        """The output part by part."""
        if self.freq_select is not None:
            x = self.freq_select(x, self.backend)
        gains: Gains = (None, None, None, None)
        if self.ada_kern is not None:
            gains = self.ada_kern(x)
        padding = self.inner_padding
        if self.pads_itself:
            x = F.pad(x, [padding, padding, padding, padding], mode='replicate')
            padding = 0
        if self.free_offsets is not None:
            return self._deform(x, gains, padding + self.outer_padding)
        if self.ada_dr is None:
            return self._plain(x, gains, padding + self.outer_padding)
        dilation, mask = self.ada_dr(x)
        if torch.jit.is_scripting():
            return scripted_conv2d(
                x, self.weight, dilation, mask, self.bias, gains, self.stride[0], padding, self.groups)
        return self._operator(x, dilation, mask, gains, padding)

    @torch.jit.unused
    def _by_kernels(self, x: Tensor) -> Optional[Tensor]:
        """The output where the Triton backend computes all parts, or None."""
        if self.sampling == 'dilation':
            y = in_one_call(self, x)
            if y is not None:
                return y
        if self.sampling == 'fixed' or not takes_predictions(x, self.backend):
            return None
        # hooks on AdaDR and AdaKern want their outputs, whose activations are in the kernels here
        return None if has_hooks(self.ada_dr, self.ada_kern) else self._fused(under_autocast(x))

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        """The output part by part, of x cast for autocast."""
        means: Optional[Tensor] = None
        if self.freq_select is not None:
            hooked = has_hooks(self.freq_select)
            x, means = (self.freq_select(x, self.backend), None) if hooked else self.freq_select.mix(x, self.backend)
        low, high = None, None
        if self.ada_kern is not None:
            low, high = self.ada_kern.predict_in_kernels(x, means)
        padding = self.inner_padding
        if self.pads_itself:
            x = F.pad(x, [padding, padding, padding, padding], mode='replicate')
            padding = 0
        act: Optional[str] = None
        if self.free_offsets is not None:
            steps, mask = self.free_offsets(x)
            padding += self.outer_padding
        else:
            assert self.ada_dr is not None
            steps, mask = self.ada_dr.predict(x)
            act = self.ada_dr.dilation_act
        return predicted_conv2d(
            x, self.weight, self.bias, steps, mask, low, high, dilation_act=act, dilation=self.dilation[0],
            stride=self.stride[0], padding=padding, groups=self.groups)

    @torch.jit.unused
    def _operator(self, x: Tensor, dilation: Tensor, mask: Tensor, gains: Gains, padding: int) -> Tensor:
        return adaptive_dilated_conv2d(
            x, self.weight, dilation, mask, self.bias, gains=gains, stride=self.stride[0], padding=padding,
            groups=self.groups, backend=self.backend)

    def _deform(self, x: Tensor, gains: Gains, padding: int) -> Tensor:
        """The deformable convolution, under the gains."""
        assert self.free_offsets is not None
        offset, mask = self.free_offsets(x)
        if torch.jit.is_scripting():
            return scripted_conv2d(
                x, self.weight, offset, mask, self.bias, gains, self.stride[0], padding, self.groups, self.dilation[0])
        return self._deform_operator(x, offset, mask, gains, padding)

    @torch.jit.unused
    def _deform_operator(
            self,
            x: Tensor,
            offset: Tensor,
            mask: Optional[Tensor],
            gains: Gains,
            padding: int,
    ) -> Tensor:
        return deform_conv2d(
            x, self.weight, offset, mask, self.bias, gains=gains, stride=self.stride[0], padding=padding,
            dilation=self.dilation[0], groups=self.groups, backend=self.backend)

    def _plain(self, x: Tensor, gains: Gains, padding: int) -> Tensor:
        """The convolution at the base dilation, under the gains."""
        if self.ada_kern is None:
            return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        low_in, low_out, high_in, high_out = gains
        mean, rest = split_kernel(self.weight)
        low = F.conv2d(
            scale_channels(x, low_in), mean.expand_as(self.weight), None, self.stride, padding, self.dilation,
            self.groups)
        high = F.conv2d(
            scale_channels(x, high_in), rest, None, self.stride, padding, self.dilation, self.groups)
        # under autocast the gains are float32
        y = (scale_channels(low, low_out) + scale_channels(high, high_out)).to(low.dtype)
        bias = self.bias
        if bias is not None:
            y = y + bias.to(y.dtype)[:, None, None]  # under autocast the bias is float32
        return y


def _names(cls: type) -> Tuple[str, ...]:
    return tuple(signature(cls).parameters)


# Arguments of FADConv2d that a model passes to all of its layers: those that nn.Conv2d lacks, and padding_mode.
OPTIONS = ('padding_mode', *(name for name in _names(FADConv2d) if name not in _names(nn.Conv2d)))
