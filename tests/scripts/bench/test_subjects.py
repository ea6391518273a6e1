"""What the benchmark scripts compare: that today's way is our function, and that all networks have the same weights."""
import pytest
import timm
import torch
from torch import nn

from fadc_timm import FADConv2d
from scripts.bench import model as bench_model
from scripts.bench import subjects
from scripts.bench.today import make_today
from tests.support.small_model import MODEL

pytestmark = pytest.mark.usefixtures('one_thread')

LAYERS = (
    dict(),
    dict(stride=2),
    dict(groups=4),
    dict(groups=4, stride=2),
    dict(groups=16, kernel_size=7, padding=3),
    dict(groups=16, kernel_size=7, padding=3, stride=2),
    dict(dilation=2, padding=2, dilation_act='relu'),
    dict(dilation=4, padding='same', dilation_act='zero', stride=1),
    dict(dilation=3, padding=0),  # its inner padding is negative
    dict(padding=0, stride=2),
    dict(padding_mode='replicate', stride=2),
    dict(spatial_group=2, lowfreq_att=True, dilation_groups=2),
    dict(kernel_decompose='low'),
    dict(kernel_decompose='high', bias=False),
    dict(groups=16, ada_kern_norm='layernorm2d'),
    dict(freq_select=False, kernel_decompose='none'),
)


def ids(cfg):
    return ' '.join(f'{k}={v}' for k, v in cfg.items()) or 'default' if isinstance(cfg, dict) else None


def make_layer(cfg):
    layer = FADConv2d(16, 16, **{**dict(kernel_size=3, padding=1), **cfg})
    subjects.leave_identity(layer, seed=1, size=32)
    return layer


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('cfg', LAYERS, ids=ids)
def test_today_is_our_layer(cfg, batch):
    layer = make_layer(cfg)
    for training in (False, True):
        layer.train(training)
        today = make_today(layer)
        x = torch.randn(batch, 16, 17, 14, requires_grad=True)
        y, expected = today(x), layer(x)
        assert y.shape == expected.shape
        upstream = torch.randn_like(y)
        grad, expected_grad = (torch.autograd.grad(out, x, upstream)[0] for out in (y, expected))
        for a, b in ((y, expected), (grad, expected_grad)):
            # measured: 3e-6
            assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_today_shares_nothing_and_needs_ada_dr():
    model = timm.create_model(MODEL).eval()
    subjects.leave_identity(model)
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    today = make_today(model)
    assert not any(isinstance(m, FADConv2d) for m in today.modules())
    assert (today(x) - before).abs().max() < 1e-5 * before.abs().max()
    with torch.no_grad():
        for p in today.parameters():
            p.zero_()
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match='AdaDR'):
        make_today(FADConv2d(4, 4, 3, sampling='fixed'))


@pytest.mark.parametrize(
    'cfg', [dict(), dict(groups=16, kernel_size=7, padding=3), dict(dilation=2, padding=2),
            dict(ada_kern_norm='layernorm2d')], ids=ids)
def test_leave_identity(cfg):
    layer = FADConv2d(16, 16, **{**dict(kernel_size=3, padding=1), **cfg})
    fresh = {k: v.clone() for k, v in layer.state_dict().items()}
    subjects.leave_identity(layer, seed=3, size=64)
    assert layer.training
    for name, t in layer.state_dict().items():
        if name in ('weight', 'bias', 'ada_kern.norm.num_batches_tracked'):
            assert torch.equal(t, fresh[name]), name
        else:
            assert (t != fresh[name]).all(), name
    layer.eval()
    x, d = torch.randn(2, 16, 32, 32), layer.dilation[0]
    dilation, mask = layer.ada_dr(layer.freq_select(x))
    assert 0.5 * d <= dilation.min() and dilation.max() < d + 4
    assert dilation.std() > 0.2
    for t in (mask, layer.freq_select.band_weights(x), *layer.ada_kern(x)):
        if t is not None:
            assert t.std() > 0.1 and 0.5 < t.mean() < 1.5 and t.min() > 0 and t.max() < 2
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    subjects.leave_identity(layer.train(), seed=3, size=64)
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())


def test_models_have_the_same_weights():
    models = subjects.make_models(MODEL, ('plain', 'today', 'fadc'))
    plain, fadc = models['plain'].state_dict(), models['fadc'].state_dict()
    assert list(models) == ['plain', 'today', 'fadc']
    assert all(torch.equal(t, fadc[name]) for name, t in plain.items())
    # nothing that timm starts at zero hides a branch
    assert all((m.weight != 0).all() for m in models['plain'].modules() if isinstance(m, nn.BatchNorm2d))
    bench_model.check_same(models, torch.randn(1, 3, 64, 64), 'cpu')
    with torch.no_grad():
        models['today'].get_classifier().weight.mul_(1.1)
    with pytest.raises(RuntimeError, match='differ by'):
        bench_model.check_same(models, torch.randn(1, 3, 64, 64), 'cpu')
    with pytest.raises(ValueError, match='resnet18'):
        subjects.make_models('resnet18', ('plain',))


def test_networks_of_attention():
    """FADC beside its base; a network without a base beside its rival. Neither has convolutions of today's way."""
    models = subjects.make_models('test_dinat_fadc', ('plain', 'today', 'fadc'))
    assert list(models) == ['plain', 'fadc']
    fadc = models['fadc'].eval()
    x = torch.randn(1, 3, 64, 64)
    assert (fadc(x) - models['plain'].eval()(x)).abs().max() > 1e-3
    assert all((p != 0).any() for n, p in fadc.named_parameters() if '.freq_select.' in n)
    models = subjects.make_models('dinat_mini', ('plain', 'today', 'fadc'))
    assert [type(m).__name__ for m in models.values()] == ['SwinTransformer', 'DiNAT']
    assert bench_model.Case('dinat_mini', 'train', 4).name == 'dinat_mini 4x224 against swin_tiny_patch4_window7_224'
