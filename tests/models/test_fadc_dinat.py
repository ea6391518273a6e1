"""FADC in neighbourhood attention: lossless at the start, its options, its checkpoints, and lift_model."""
import pytest
import timm
import torch
from torch import nn

import fadc_timm
from fadc_timm import lift_model
from fadc_timm.layers import FADConv2d, FADNeighborhoodAttention, NeighborhoodAttention
from fadc_timm.models.lift import NothingToLift
from fadc_timm.ops import neighborhood_attention2d, neighborhood_mean2d
from tests.support.backbones import check_learns, photos
from tests.support.cases import error
from tests.support.dinat_cases import close, create, load
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')

ROUNDING = 1e-6  # 0: band weights and gains are one
ALL = dict(kernel_decompose='both')


def attentions(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, FADNeighborhoodAttention)}


@pytest.mark.parametrize('depths', [(1, 1, 1), (1, 1, 1, 1, 1)], ids=str)
def test_number_of_stages(depths):
    """None is left without FADC in silence."""
    args = dict(depths=depths, num_heads=(2,) * len(depths), dilations=1)
    timm.create_model('test_dinat', **args)
    with pytest.raises(ValueError, match=f'test_dinat_fadc has 4 stages, got {len(depths)}. For another network: lift'):
        timm.create_model('test_dinat_fadc', **args)


@pytest.mark.parametrize('options', [{}, dict(freq_select_for='v'), ALL, dict(freq_select=False, **ALL)], ids=str)
@pytest.mark.parametrize('name', ['mini', 'layer_scale_k5'])
def test_lossless(name, options):
    """With the authors' weights it gives the authors' outputs and gradients."""
    if name == 'layer_scale_k5':  # it has three stages
        model, tensors = create(name)
        lift_model(model, (False, True, True), **options)
    else:
        model, tensors = create(name, 'dinat_mini_fadc', **options)
    assert len(attentions(model)) == (2 if name == 'layer_scale_k5' else 4)
    x = tensors['io.x'].requires_grad_()
    logits = model(x)
    assert close(logits, tensors['io.logits'])
    assert close(torch.autograd.grad((logits * tensors['io.cotangent']).sum(), x)[0], tensors['io.grad_x'])
    plain, _ = create(name)
    assert error(logits.detach(), plain(x).detach()) < ROUNDING


def make_layer(**options):
    torch.manual_seed(0)
    layer = FADNeighborhoodAttention(16, 2, 3, (1, 2), dtype=torch.float64, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return off_identity(layer).eval()


@pytest.mark.parametrize('decompose', ['both', 'low', 'high'])
@pytest.mark.parametrize('target', ['qkv', 'v'])
@pytest.mark.parametrize('size', [(7, 9), (2, 5)], ids=str)
@torch.no_grad()
def test_definition(size, target, decompose):
    """Written out from the parts, off the identity; a small map is padded before the projections."""
    layer = make_layer(freq_select_for=target, kernel_decompose=decompose)
    x = torch.randn(3, *size, 16, dtype=torch.float64)
    selected = layer.freq_select(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    low, _, high, _ = (None if g is None else g[:, None, None] for g in layer.ada_kern(selected.permute(0, 3, 1, 2)))
    low, high = 1. if low is None else low, 1. if high is None else high
    pad = (0, 0, 0, max(0, 6 - size[1]), 0, max(0, 3 - size[0]))
    padded, values = nn.functional.pad(x, pad), nn.functional.pad(selected, pad)
    weight, bias = layer.qkv.weight, layer.qkv.bias
    q, k, v = (nn.functional.linear(t, w, b).unflatten(-1, (2, 8)).permute(0, 3, 1, 2, 4) for t, w, b in zip(
        [values if target == 'qkv' else padded] * 2 + [values], weight.chunk(3), bias.chunk(3)))
    y = neighborhood_attention2d(q, k, v, 3, (1, 2), layer.rpb, 'reference')
    y, v = (t.permute(0, 2, 3, 1, 4).flatten(3) for t in (y, v))
    y = high * y + (low - high) * neighborhood_mean2d(v, 3, (1, 2))
    assert error(layer(x), layer.proj(y[:, :size[0], :size[1]])) < 1e-13
    assert error(torch.jit.script(layer)(x), layer(x)) < 1e-13


def test_gradients():
    """Of everything that FADC adds, and of the input, by differences."""
    layer = make_layer(kernel_decompose='both')
    x = torch.randn(1, 4, 7, 16, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, x, fast_mode=True)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_reads_a_view():
    """FreqSelect gets a view of the map, and returns one in the same layout."""
    layer = FADNeighborhoodAttention(16, 2, 3)
    seen = []
    layer.freq_select.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    x = torch.randn(2, 8, 8, 16)
    layer(x)
    assert seen[0].data_ptr() == x.data_ptr() and all(t.permute(0, 2, 3, 1).is_contiguous() for t in seen)


def test_options():
    """They reach every layer of the stages, and no other; AdaKern is off by default, as it is derived."""
    model = timm.create_model('test_dinat_fadc')
    found = attentions(model)
    assert {n.split('.')[1] for n in found} == {'1', '2', '3'} and len(found) == 4
    assert all(m.ada_kern is None and m.freq_select_for == 'qkv' for m in found.values())
    assert not any(isinstance(m, FADConv2d) for m in model.modules())
    cfg = dict(bands=(2,), lowfreq_att=True, spatial_group=4, freq_select_for='v', kernel_decompose='low',
               backend='written_out', fadc_stages=(True, False, False, False))
    m, = attentions(timm.create_model('test_dinat_fadc', **cfg)).values()
    assert (m.freq_select.bands, m.freq_select.lowfreq_att, m.freq_select.spatial_group) == ((2,), True, 4)
    assert (m.freq_select_for, m.ada_kern.kernel_decompose, m.backend) == ('v', 'low', 'written_out')
    assert m.ada_kern.low.out_features == 32 and m.ada_kern.high is None


@pytest.mark.parametrize('kwargs, exception, message', [
    (dict(sampling='deform'), TypeError, "test_dinat_fadc has no argument 'sampling'.*freq_select_for"),
    (dict(freq_select_for='k'), ValueError, "freq_select_for must be 'qkv' or 'v', got 'k'"),
    (dict(freq_select=1), ValueError, 'freq_select must be true or false, got 1'),
    (dict(kernel_decompose='mid'), ValueError, "kernel_decompose.*'mid'"),
    (dict(backend='gather'), ValueError, "backend must be None or one of reference, windows.*'gather'"),
    (dict(bands=(1,)), ValueError, 'bands'),
], ids=str)
def test_bad_options(kwargs, exception, message):
    with pytest.raises(exception, match=message):
        timm.create_model('test_dinat_fadc', **kwargs)


@torch.no_grad()
def test_lift():
    """As in the models of their own; the convolutions between stay, unless a selection has nothing else."""
    model = timm.create_model('test_dinat').eval()
    expected, parameters = model(photos()), set(model.parameters())
    report = lift_model(model, kernel_decompose='both', freq_select_for='v')
    assert set(report.replaced) == set(attentions(model)) and len(report.replaced) == 4
    assert error(model(photos()), expected) < ROUNDING and parameters <= set(model.parameters())
    assert 'beside neighbourhood attentions' in report.left['stages.1.downsample.reduction']
    assert 'outside' in report.left['stages.0.blocks.0.attn'] and 'stages.0.blocks.0.attn' in str(report)
    with pytest.raises(NothingToLift, match=r'4 layers are left \(a FADNeighborhoodAttention already\)'):
        lift_model(model)
    with pytest.raises(TypeError, match='unknown options dilation_act; FADNeighborhoodAttention has freq_select, '):
        lift_model(timm.create_model('test_dinat'), dilation_act='relu')
    assert lift_model(model, ['stages.1.downsample'], sampling='deform').replaced == ('stages.1.downsample.reduction',)
    own = nn.Sequential(NeighborhoodAttention(8, 2, 3), nn.GELU(), NeighborhoodAttention(8, 2, 3, dilation=(1, 2)))
    assert lift_model(own, ['0', '2']).replaced == ('0', '2') and own[2].dilation == (1, 2)


class Own(NeighborhoodAttention):
    pass


def test_what_is_left():
    model = nn.Sequential(NeighborhoodAttention(8, 2, 3), Own(8, 2, 3))
    report = lift_model(model, ['0', '1'])
    assert report.replaced == ('0',)
    assert 'class Own, which may not compute what NeighborhoodAttention' in report.left['1']
    hooked = nn.Sequential(NeighborhoodAttention(8, 2, 3), NeighborhoodAttention(8, 2, 3))
    hooked[1].register_forward_hook(lambda *args: None)
    assert 'hooks' in lift_model(hooked, ['0', '1']).left['1']


@pytest.mark.parametrize('name, lifted', [('test_dinat_fadc', None), ('test_dinat', ('stages.2.blocks.1', 'stages.3'))])
def test_save_and_load(name, lifted, tmp_path):
    model = timm.create_model(name, num_classes=5, **({} if lifted else ALL))
    if lifted:
        lift_model(model, lifted, freq_select_for='v', spatial_group=2)
    off_identity(model).eval()
    folder = fadc_timm.save(model, tmp_path / 'model')
    loaded = fadc_timm.load(folder).eval()
    assert torch.equal(loaded(photos()), model(photos())) and attentions(loaded).keys() == attentions(model).keys()
    net, whole = fadc_timm.load(folder, features_only=True).eval(), model.forward_intermediates(photos())[1]
    assert all(torch.equal(a, e) for a, e in zip(net(photos()), whole, strict=True))


def test_loads_the_base():
    """A base's checkpoint makes FADC the identity again; FADC's own checkpoint needs FADC's keys."""
    base = timm.create_model('test_dinat').eval()
    model = off_identity(timm.create_model('test_dinat_fadc')).eval()
    assert not torch.equal(model(photos()), base(photos()))
    model.load_state_dict(base.state_dict())
    assert torch.equal(model(photos()), base(photos()))
    state = off_identity(model).state_dict()
    del state['stages.1.blocks.0.attn.freq_select.conv.bias']
    with pytest.raises(RuntimeError, match='FreqSelect.*see the option freq_select'):
        timm.create_model('test_dinat_fadc', pretrained=True, pretrained_cfg_overlay=dict(state_dict=state))


def test_convert(tmp_path):
    """`fadc-timm convert` takes a checkpoint in the names of transformers, and says where each tensor came from."""
    from fadc_timm.checkpoints.convert import convert, read_checkpoint
    config, state, tensors = load('mini')
    torch.save(state, tmp_path / 'dinat.bin')
    converted = convert(read_checkpoint(tmp_path / 'dinat.bin'), 'dinat_mini_fadc', config)
    assert close(converted.model(tensors['io.x']), tensors['io.logits']) and not converted.left
    attention = 'dinat.encoder.levels.1.layers.0.attention.self'
    assert converted.taken['stages.1.blocks.0.attn.qkv.weight'] == [
        f'{attention}.{part}.weight' for part in ('key', 'query', 'value')]
    assert all('.freq_select.' in key for key in converted.added)


def test_init_weights():
    model = off_identity(timm.create_model('test_dinat_fadc', **ALL))
    model.init_weights()
    base = timm.create_model('test_dinat').eval()
    base.load_state_dict({k: model.state_dict()[k] for k in base.state_dict()})
    assert error(model.eval()(photos()).detach(), base(photos()).detach()) < ROUNDING


def test_training():
    """Learns the photographs by heart; then batch 1."""
    model = timm.create_model('test_dinat_fadc', num_classes=6, drop_path_rate=0., attn_drop_rate=0.1, **ALL)
    groups = fadc_timm.param_groups(model, 2e-3)
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(groups)
    check_learns(model, optimizer)
    model(photos()[:1]).sum().backward()
