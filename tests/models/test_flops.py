"""FLOPs of the models: the base's and those of the modules that FADC adds, in torch's counter and in fvcore's."""
import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

from fadc_timm import FADConv2d
from fadc_timm.models.cost import model_cost
from fadc_timm.ops import list_backends, set_backend
from fadc_timm.ops.band_mix.fused import multiply_adds
from fadc_timm.ops.flops import fvcore_handlers, layer_multiply_adds
from tests.support.backbones import REPRESENTATIVES, fad_convs

pytestmark = pytest.mark.usefixtures('one_thread')


def flops(f, *args):
    with FlopCounterMode(display=False) as counter:
        f(*args)
    return counter.get_total_flops()


def own_flops(m, x, y):
    """What FADC adds to a convolution from x to y, from shapes."""
    (b, c, h, w), o, p = x.shape, y.shape[1], y.shape[0] * y.shape[2] * y.shape[3]
    taps, depthwise = m.kernel_size[0] ** 2, m.groups == c
    maps, width = len(m.freq_select.bands), max(c // 16, 16)
    freq_select = b * h * w * 9 * c * maps
    ada_kern = b * 2 * width * (c + (c if depthwise else c + o))
    ada_dr = p * c * taps * (3 if depthwise else 1 + taps)
    mean_kernel = 0 if depthwise else p * o * c // m.groups
    mix = multiply_adds(x.shape, m.freq_select.bands)
    return 2 * (freq_select + ada_kern + ada_dr + mean_kernel + mix)


@pytest.mark.parametrize('base, size', [
    ('resnet10t', 64), ('resnet10t', 288), ('convnext_atto', 64), ('convnext_atto', 288), ('resnext50_32x4d', 64),
    ('seresnet18', 64)])
@torch.no_grad()
def test_flops(base, size):
    """The base and the modules."""
    kwargs = dict(num_classes=9, **REPRESENTATIVES[base])
    x = torch.zeros(2, 3, size, size)
    plain, model = timm.create_model(base, **kwargs).eval(), timm.create_model(f'{base}_fadc', **kwargs).eval()
    total = flops(model, x)
    own = []
    for m in fad_convs(model).values():
        m.register_forward_hook(lambda m, args, y: own.append(own_flops(m, args[0], y)))
    model(x)
    assert len(own) == len(fad_convs(model))
    assert total == flops(plain, x) + sum(own)


@pytest.mark.parametrize('base, backend', [
    ('test_resnet', None), ('test_resnet', 'torchvision'), ('test_convnext', None)])
@torch.no_grad()
def test_flops_of_fvcore(base, backend):
    x = torch.zeros(1, 3, 64, 64)
    plain = FlopCountAnalysis(timm.create_model(base).eval(), x).unsupported_ops_warnings(False)
    model = timm.create_model(f'{base}_fadc', num_classes=1000, backend=backend).eval()
    analysis = FlopCountAnalysis(model, x).set_op_handle(**fvcore_handlers()).unsupported_ops_warnings(False)
    analysis = analysis.uncalled_modules_warnings(False)
    assert analysis.total() >= plain.total()
    assert not {op for op in analysis.unsupported_ops() if op.startswith(('torchvision', 'fadc_timm'))}
    lifted = sum(plain.by_module()[n] for n in fad_convs(model))
    by_operator = analysis.by_operator()
    if backend == 'torchvision':
        assert by_operator['deform_conv2d'] == lifted  # the only sample has a kernel of its own
    elif base == 'test_convnext':
        assert by_operator['sampled_conv2d'] == lifted


@pytest.mark.parametrize('arch', ['test_resnet_fadc', 'test_convnext_fadc'])
def test_cost_under_every_backend(arch):
    """A count needs no backend that runs on this machine, and is the same for all."""
    cost = model_cost(arch, 5, (3, 64, 64))
    layer = FADConv2d(4, 4, 3, padding=1)
    x = torch.randn(1, 4, 8, 8)
    counted = layer_multiply_adds(layer, x)
    for backend in list_backends():
        model_cost.cache_clear()
        with set_backend(backend):
            assert model_cost(arch, 5, (3, 64, 64)) == cost
        layer.backend = backend
        assert layer_multiply_adds(layer, x) == counted and layer.backend == backend
