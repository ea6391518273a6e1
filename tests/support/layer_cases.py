"""What the tests of layers share: arguments, gradients, and how near results have to be."""
import torch

from fadc_timm import FADConv2d
from tests.support.cases import error

SIZES = [(1, 1), (1, 7), (2, 3), (4, 4), (8, 8), (9, 16), (33, 40), (5, 70)]
HALF = [torch.bfloat16, torch.float16]
EXACT = 1e-12  # float64 against float64
AT_START = 1e-4  # of a layer against its convolution, AdaDR's eps of 1e-5: 5e-5

FAD_CONV = [
    dict(),
    dict(padding=1),
    dict(padding=2, stride=2, bias=False, dilation_groups=2),
    dict(kernel_size=5, padding='same', dilation_act='relu'),
    dict(kernel_size=7, padding=3, groups=4, out_channels=4, spatial_group=2),  # depthwise
    dict(padding=1, groups=4, out_channels=8),  # depthwise with a multiplier
    dict(padding='same', dilation=2, groups=2, dilation_act='zero', kernel_decompose='low', lowfreq_att=True),
    dict(padding=1, dilation=3, kernel_decompose='high', bands=(2, 3)),  # crops
    dict(kernel_size=1, kernel_decompose='low'),
    dict(padding=1, ada_kern_norm='layernorm2d'),
    dict(kernel_size=5, padding=2, groups=4, out_channels=4, ada_kern_norm='layernorm2d'),
    dict(padding=1, padding_mode='replicate'),
    dict(padding='same', dilation=2, padding_mode='replicate', stride=1),
    dict(kernel_size=5, padding=4, dilation=2, padding_mode='replicate', stride=2, groups=4, out_channels=4),
    dict(padding=1, dilation=2, padding_mode='replicate'),  # nothing left to replicate
    dict(padding=1, freq_select=False),
    dict(padding=2, dilation=2, kernel_decompose='none'),
    dict(padding=2, dilation=2, stride=2, sampling='fixed'),
    dict(padding=2, dilation=2, sampling='fixed', bias=False, groups=4, out_channels=4, kernel_decompose='low'),
    dict(padding='same', dilation=2, sampling='fixed', padding_mode='replicate'),
    dict(padding='same', dilation=2, sampling='fixed', kernel_decompose='none', padding_mode='replicate'),
    dict(padding=1, sampling='deform'),
    dict(padding=1, sampling='deform', freq_select=False, kernel_decompose='none', bias=False),  # DCNv2
    dict(sampling='deform', freq_select=False, kernel_decompose='none', modulated=False, stride=2),  # DCNv1
    dict(padding=4, dilation=2, sampling='deform', offset_groups=2, groups=2, kernel_size=5, lowfreq_att=True),
    dict(padding=3, sampling='deform', kernel_size=7, groups=4, out_channels=4, stride=2),  # depthwise
    dict(padding=2, dilation=2, sampling='deform', padding_mode='replicate', kernel_decompose='high', modulated=False),
    dict(kernel_size=1, sampling='deform', kernel_decompose='low', freq_select=False),
]


def make(out_channels=6, kernel_size=3, **cfg):
    return FADConv2d(4, out_channels, kernel_size, **cfg)


def ids(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix('torch.')
    if isinstance(value, dict):
        return ','.join(f'{k}={v}' for k, v in value.items()) or 'default'
    return None


def grads(y, inputs):
    """Gradients of a fixed random projection of y."""
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return torch.autograd.grad((y * cotangent).sum(), list(inputs), allow_unused=True)


def assert_same(actual, expected, tolerance):
    """Tensors (or None) pairwise: the same shapes, and all together within the relative error."""
    assert [None if t is None else t.shape for t in actual] == [None if t is None else t.shape for t in expected]
    actual, expected = (torch.cat([t.detach().flatten() for t in ts if t is not None]) for ts in (actual, expected))
    assert error(actual, expected) <= tolerance
