"""The kernels of samples against their definition, eager and in an exported graph."""
import pytest
import torch

from fadc_timm.ops.sampled_conv import folded_gains as module
from fadc_timm.ops.sampled_conv.folded_gains import sample_kernels
from tests.support.cases import error


@pytest.mark.parametrize('given', [(0, 1, 2, 3), (0, 2), (1,), (3, 0)])
@pytest.mark.parametrize('outputs, channels, groups', [(4, 6, 1), (6, 4, 2), (5, 5, 5), (10, 5, 5), (3, 1, 1)])
@pytest.mark.parametrize('exports', [False, True])
def test_sample_kernels(exports, outputs, channels, groups, given, monkeypatch):
    monkeypatch.setattr(module, 'is_exporting', lambda: exports)
    weight = torch.randn(outputs, channels // groups, 3, 3, dtype=torch.float64)
    all_gains = [torch.randn(2, n, dtype=torch.float64) for n in (channels, outputs) * 2]
    gains = [g if i in given else None for i, g in enumerate(all_gains)]
    low_in, low_out, high_in, high_out = (
        g if g is not None else torch.ones(2, n, dtype=torch.float64) for g, n in zip(gains, (channels, outputs) * 2))
    expected = torch.empty(2, *weight.shape, dtype=torch.float64)
    for b in range(2):
        for o in range(outputs):
            first = o // (outputs // groups) * (channels // groups)
            for i in range(channels // groups):
                mean, c = weight[o, i].mean(), first + i
                expected[b, o, i] = (low_out[b, o] * low_in[b, c] * mean
                                     + high_out[b, o] * high_in[b, c] * (weight[o, i] - mean))
    kernels = sample_kernels(weight, tuple(gains), groups)
    assert kernels.shape[1:] == (groups, outputs // groups, channels // groups * 9)
    assert error(kernels.reshape(-1, *weight.shape).expand(2, *weight.shape), expected) < 1e-13
