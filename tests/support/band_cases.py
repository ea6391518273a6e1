"""Inputs of FreqSelect's mix of bands, and its definition."""
import torch

from fadc_timm.ops import low_pass


def make_inputs(h, w, count, groups=1, dtype=torch.float64, b=2, c=4):
    generator = torch.Generator().manual_seed(h * 100 + w)
    x = torch.randn(b, c, h, w, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.rand(b, count, groups, h, w, generator=generator, dtype=torch.float64) * 2
    return x, weights.to(dtype).requires_grad_()


def definition(x, weights, factors):
    """Bands as differences of low-passes, weighed and added up, in double precision."""
    x, weights = x.double(), weights.double()
    maps = [x, *low_pass(x, factors, 'fft')]
    bands = [maps[i] - maps[i + 1] for i in range(len(factors))] + [maps[-1]]
    groups = weights.shape[2]
    y = torch.zeros_like(x)
    for i, band in enumerate(bands):
        weight = weights[:, i].repeat_interleave(x.shape[1] // groups, 1) if i < weights.shape[1] else 1.
        y = y + band * weight
    return y


def check(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * max(1., e.abs().max())
