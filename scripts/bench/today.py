"""The baseline of the benchmarks: an FADC layer without this package, for the same function as `FADConv2d`.

It is in torch's and torchvision's operators.

What makes it what it is: a convolution of its own for each band map, for the offsets and for the mask; a complex FFT of
the whole map, shifted, masked and transformed back for each band; a trunk and heads for each part of the kernel; a
kernel for each sample, so that the batch is folded into groups; and a pair of offsets for each tap, for
`torchvision.ops.deform_conv2d`. Without AdaKern there is one kernel for all samples, and nothing is folded.
"""
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from fadc_timm import AdaDR, AdaKern, FADConv2d, FreeOffsets, FreqSelect

__all__ = ['TodayFADConv2d', 'make_today']


def _full(t: Tensor) -> Tensor:
    """float32 for the half dtypes, which neither the FFT nor torchvision's kernel has everywhere, autocast or not."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _parameter(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach().clone(memory_format=torch.contiguous_format))


def _conv(
        weight: Tensor,
        bias: Tensor | None,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
) -> nn.Conv2d:
    """A convolution with copies of the given parameters; weight (O, C/groups, k, k)."""
    conv = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], weight.shape[-1], stride, padding, dilation, groups,
        bias=bias is not None)
    conv.weight = _parameter(weight)
    conv.bias = None if bias is None else _parameter(bias)
    return conv


class TodayFreqSelect(nn.Module):
    """FreqSelect with a complex FFT: x (B, C, H, W) to the same shape."""

    def __init__(self, module: FreqSelect) -> None:
        super().__init__()
        self.bands = module.bands
        self.groups = s = module.spatial_group
        m, conv = module.num_maps, module.conv
        assert conv.bias is not None
        # there the maps of a group of channels are neighbours
        self.convs = nn.ModuleList(_conv(conv.weight[i::m], conv.bias[i::m], padding=1, groups=s) for i in range(m))

    @staticmethod
    def _edges(n: int, f: int) -> slice:
        return slice(round(n / 2 - n / (2 * f)), round(n / 2 + n / (2 * f)))

    def _weigh(self, x: Tensor, weight: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return (x.reshape(b, self.groups, -1, h, w) * weight.reshape(b, self.groups, 1, h, w)).reshape(b, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        full = _full(x)
        spectrum = torch.fft.fftshift(torch.fft.fft2(full), dim=(-2, -1))
        maps = [2 * torch.sigmoid(conv(x)) for conv in self.convs]
        parts, above = [], full
        for i, f in enumerate(self.bands):
            mask = torch.zeros(1, 1, h, w, dtype=full.dtype, device=x.device)
            mask[:, :, self._edges(h, f), self._edges(w, f)] = 1
            low = torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))).real
            parts.append(self._weigh(above - low, maps[i]))
            above = low
        parts.append(self._weigh(above, maps[-1]) if len(maps) > len(self.bands) else above)
        return torch.stack(parts).sum(0).to(x.dtype)


class TodayGains(nn.Module):
    """The gains of one part of the kernel: x (B, C, H, W) to (B, C) and (B, O) or None."""

    def __init__(self, module: AdaKern, part: int) -> None:
        super().__init__()
        norm, parts = module.norm, module.parts

        def chunk(t: Tensor | None) -> Tensor:
            assert t is not None
            return t.detach().chunk(parts)[part]

        self.fc = _conv(chunk(module.fc.weight)[:, :, None, None], None)
        width = self.fc.out_channels
        self.norm: nn.Module = nn.GroupNorm(norm.num_groups // parts, width, norm.eps) \
            if isinstance(norm, nn.GroupNorm) else nn.BatchNorm2d(width, norm.eps, norm.momentum)
        self.norm.load_state_dict({
            name: t if t.dim() == 0 else chunk(t) for name, t in norm.state_dict().items()})
        head = [h for h in (module.low, module.high) if h is not None][part]
        weight, bias, c = head.weight.detach()[:, :, None, None], head.bias.detach(), module.in_channels
        self.in_gain = _conv(weight[:c], bias[:c])
        self.out_gain = None if module.depthwise else _conv(weight[c:], bias[c:])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.fc(F.adaptive_avg_pool2d(x, 1))
        norm = self.norm
        if isinstance(norm, nn.BatchNorm2d) and self.training and x.shape[0] == 1:  # one value a channel: no variance
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0., norm.eps)
        else:
            x = norm(x)
        x = F.relu(x)
        out = None if self.out_gain is None else 2 * torch.sigmoid(self.out_gain(x).flatten(1))
        return 2 * torch.sigmoid(self.in_gain(x).flatten(1)), out


class TodayAdaDR(nn.Module):
    """x (B, C, H, W), padded, to offsets (B, G*k*k*2, H', W') from the base dilation, and mask (B, G*k*k, H', W')."""

    def __init__(self, module: AdaDR) -> None:
        super().__init__()
        self.crop, self.dilation, self.act = module.crop, module.dilation, module.dilation_act
        self.groups = g = module.dilation_groups
        conv = module.conv
        assert conv.bias is not None
        cfg = dict(stride=conv.stride[0], padding=int(conv.padding[0]))
        self.offset = _conv(conv.weight[:g], conv.bias[:g], **cfg)
        if module.mask_dw is not None and module.mask_pw is not None:
            self.mask: nn.Module = nn.Sequential(
                _conv(module.mask_dw.weight, None, groups=module.mask_dw.groups, **cfg),
                _conv(module.mask_pw.weight, module.mask_pw.bias))
        else:
            self.mask = _conv(conv.weight[g:], conv.bias[g:], **cfg)
        r = conv.kernel_size[0] // 2
        tap = torch.arange(-r, r + 1)
        self.register_buffer('taps', torch.stack(torch.meshgrid(tap, tap, indexing='ij'), dim=-1).flatten())
        self.taps: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.crop:
            x = x[:, :, self.crop:-self.crop, self.crop:-self.crop]
        o = self.offset(x)
        if self.act == 'abs':
            dilation = 1 + o.abs() * self.dilation
        elif self.act == 'relu':
            dilation = 1 + F.relu(o) * self.dilation
        else:
            dilation = 1 + (F.relu(o + 1) - 1) * self.dilation
        b, _, h, w = o.shape
        offset = (dilation - self.dilation)[:, :, None] * self.taps.to(o.dtype)[:, None, None]
        return offset.reshape(b, -1, h, w), 2 * torch.sigmoid(self.mask(x))


class TodayFreeOffsets(nn.Module):
    """As TodayAdaDR, with free offsets: one convolution for these and the mask, as in mmcv. The mask may be None."""

    def __init__(self, module: FreeOffsets) -> None:
        super().__init__()
        self.offsets = module.num_offsets
        parts = [] if module.dw is None else [module.dw]
        self.conv = nn.Sequential(*(
            _conv(m.weight, m.bias, m.stride[0], int(m.padding[0]), m.dilation[0], m.groups)
            for m in (*parts, module.conv)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.conv(x)
        offset, mask = y[:, :self.offsets], y[:, self.offsets:]
        return offset, 2 * torch.sigmoid(mask) if mask.shape[1] else None


class TodayFADConv2d(nn.Module):
    """The function of a `FADConv2d`, from copies of its parameters."""

    def __init__(self, layer: FADConv2d) -> None:
        """
        Args:
            layer: The layer to copy.

        Raises:
            ValueError: The layer has neither AdaDR nor free offsets, and so no deformable convolution.
        """
        super().__init__()
        if layer.sampling == 'fixed':
            raise ValueError('A FADConv2d without AdaDR or free offsets has no deformable convolution.')
        self.weight = _parameter(layer.weight)
        self.bias = None if layer.bias is None else _parameter(layer.bias)
        self.stride, self.dilation, self.groups = layer.stride[0], layer.dilation[0], layer.groups
        self.replicate = layer.inner_padding if layer.pads_itself else 0
        # the padding of the plain convolution, less what is padded before
        self.padding = layer.inner_padding - self.replicate + layer.kernel_size[0] // 2 * (self.dilation - 1)
        self.freq_select = None if layer.freq_select is None else TodayFreqSelect(layer.freq_select)
        parts = [] if layer.ada_kern is None else list(range(layer.ada_kern.parts))
        self.parts = nn.ModuleList(TodayGains(layer.ada_kern, i) for i in parts if layer.ada_kern is not None)
        self.decompose = None if layer.ada_kern is None else layer.ada_kern.kernel_decompose
        self.positions: nn.Module
        if layer.ada_dr is not None:
            self.positions = TodayAdaDR(layer.ada_dr)
        else:
            assert layer.free_offsets is not None
            self.positions = TodayFreeOffsets(layer.free_offsets)
        self.train(layer.training)

    def _kernels(self, x: Tensor) -> Tensor:
        """A kernel for each sample: (B, O, C/groups, k, k)."""
        o, c, k, _ = self.weight.shape
        b, g = x.shape[0], self.groups
        mean = self.weight.mean(dim=(2, 3), keepdim=True)
        low, high = mean.expand(b, o, c, k, k), (self.weight - mean).expand(b, o, c, k, k)
        gains = [part(x) for part in self.parts]
        parts: list[Tensor] = []
        for kernel, name, i in ((low, 'low', 0), (high, 'high', -1)):
            if self.decompose in ('both', name):
                in_gain, out_gain = gains[i]
                # (B, C) to a gain for each of the O/groups kernels of each group
                in_gain = in_gain.reshape(b, g, 1, c, 1, 1).expand(b, g, o // g, c, 1, 1).reshape(b, o, c, 1, 1)
                kernel = kernel * in_gain
                if out_gain is not None:
                    kernel = kernel * out_gain[:, :, None, None, None]
            parts.append(kernel)
        return parts[0] + parts[1]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) to (B, O, H', W')."""
        if self.freq_select is not None:
            x = self.freq_select(x)
        kernels = self._kernels(x) if self.parts else self.weight[None]
        if self.replicate:
            x = F.pad(x, [self.replicate] * 4, mode='replicate')
        offset, mask = self.positions(x)
        b, _, h, w = x.shape
        out, n = offset.shape[2:], 1 if self.parts else b  # samples with kernels of their own become groups of one
        y = deform_conv2d(
            _full(x.reshape(n, -1, h, w)), _full(offset.reshape(n, -1, *out)), _full(kernels.flatten(0, 1)), None,
            self.stride, self.padding, self.dilation, None if mask is None else _full(mask.reshape(n, -1, *out)))
        y = y.reshape(b, -1, *out)
        return (y if self.bias is None else y + self.bias[:, None, None]).to(x.dtype)


def make_today(model: nn.Module) -> nn.Module:
    """A copy of a network, or of a layer, whose FADC layers are computed today's way; the network itself stays."""
    if isinstance(model, FADConv2d):
        return TodayFADConv2d(model)
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, FADConv2d):
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, TodayFADConv2d(module))
    return model
