"""Values that are not finite, which no call looks at: they show where they are read, and nowhere else."""
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

from fadc_timm.ops import adaptive_dilated_conv2d, deform_conv2d, list_backends
from fadc_timm.ops.triton_support import why_not_on
from tests.support.cases import error

pytestmark = pytest.mark.usefixtures('one_thread')

ON_CPU = [name for name in list_backends() if name != 'triton' or why_not_on('cpu') is None]


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.interpreted('1-nan', '4-nan')
def test_operator_passes_on_what_is_not_finite(backend, groups, value):
    """As a convolution: outputs that read the value are not finite, and no other sample is touched."""
    def call(**changed):
        torch.manual_seed(0)
        args = dict(x=torch.randn(3, 4, 9, 9), weight=torch.randn(4, 4 // groups, 3, 3),
                    dilation=torch.rand(3, 1, 9, 9) + 1.1, mask=torch.rand(3, 9, 9, 9))
        for name, index in changed.items():
            args[name][index] = value
        return adaptive_dilated_conv2d(**args, groups=groups, backend=backend)

    clean = call()
    assert clean.isfinite().all()
    for changed in (dict(x=(1, 0, 4, 4)), dict(mask=(1, 4, 4, 4)), dict(x=(1, 0, 4, 4), mask=(1, 4, 4, 4))):
        y = call(**changed)
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
        assert not y[1, 0, 4, 4].isfinite() and y[1, 0, 0, 0].isfinite()
    assert not call(weight=(0, 0, 1, 1))[:, 0, 4, 4].isfinite().any()
    if value != value:  # an infinite dilation lies outside of the map, or has no place at all
        y = call(dilation=(1, 0, 4, 4))
        assert torch.equal(y[[0, 2]], clean[[0, 2]]) and y[1, :, 4, 4].isnan().all()
        assert y.isnan().sum() == 4


@pytest.mark.parametrize('outputs', [8, 80])  # with many outputs gather centres the samples, else the kernel
@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.interpreted('8', '80')
def test_range_of_float16(backend, outputs):
    """It is that of a sample under gains too, as of a plain convolution, though all taps of a channel are added up."""
    torch.manual_seed(0)
    x, weight = torch.full((1, 16, 5, 6), 2e4).half(), (0.005 * torch.randn(outputs, 16, 3, 3)).half()
    gains = [torch.ones(1, n).half() for n in (16, outputs)] * 2
    call = partial(adaptive_dilated_conv2d, dilation=torch.ones(1, 1, 5, 6), padding=1, backend=backend)
    y, plain = call(x, weight, gains=gains), F.conv2d(x.double(), weight.double(), padding=1)
    assert error(y, plain) < 1e-3


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('width', [8, 9])
@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.interpreted('9-1-inf')
def test_positions_that_are_not_finite(backend, width, groups, value):
    """They read nowhere: their outputs are NaN, and no others. On odd widths torchvision's kernel would crash."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 9, width), torch.randn(4, 4 // groups, 3, 3)
    offset = torch.rand(3, 18, 9, width) - 0.5
    dilation = torch.rand(3, 1, 9, width) + 1.1
    for axis in (0, 1):
        clean = deform_conv2d(x, weight, offset, padding=1, groups=groups, backend=backend)
        bad = offset.clone()
        bad[1, 8 + axis, 4, 4] = value
        bad.requires_grad_()
        y = deform_conv2d(x, weight, bad, padding=1, groups=groups, backend=backend)
        assert y[1, :, 4, 4].isnan().all() and y.isnan().sum() == 4 and torch.equal(y[[0, 2]], clean[[0, 2]])
        grad, = torch.autograd.grad(y.sum(), bad)
        assert grad[[0, 2]].isfinite().all()
    dilation[1, 0, 4, 4] = value
    y = adaptive_dilated_conv2d(x, weight, dilation, groups=groups, backend=backend)
    assert y[1, :, 4, 4].isnan().all() and y.isnan().sum() == 4


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('name', ['test_resnet_fadc', 'test_convnext_fadc'])
@torch.no_grad()
def test_network_passes_on_what_is_not_finite(name, value):
    """One bad pixel shows in that image's logits, as in the base, and in no other image's."""
    net = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(3, 3, 64, 64)
    clean = net(x)
    x[1, 0, 30, 30] = value
    y = net(x)
    assert not y[1].isfinite().any()
    torch.testing.assert_close(y[[0, 2]], clean[[0, 2]])
    assert not timm.create_model(name.removesuffix('_fadc'), num_classes=10).eval()(x)[1].isfinite().any()
