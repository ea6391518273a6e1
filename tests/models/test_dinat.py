"""NAT and DiNAT: the authors' weights give the authors' outputs, at any size; what timm expects of a model."""
import copy
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from timm.optim import param_groups_layer_decay
from torch import nn

from fadc_timm.layers import NeighborhoodAttention
from fadc_timm.models.cost import model_cost
from fadc_timm.models.dinat import DiNAT
from tests.support.backbones import photos
from tests.support.cases import error
from tests.support.dinat_cases import NAMES, close, create, load

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('backend', [None, 'written_out'])
@pytest.mark.parametrize('name', NAMES)
def test_vectors(name, backend):
    """Logits, the input's gradient, and the maps as transformers orders them: a downsampler ends a stage there."""
    model, tensors = create(name)
    for m in model.modules():
        if isinstance(m, NeighborhoodAttention):
            m.backend = backend
    x = tensors['io.x'].requires_grad_()
    logits = model(x)
    assert close(logits, tensors['io.logits'])
    grad, = torch.autograd.grad((logits * tensors['io.cotangent']).sum(), x)
    assert close(grad, tensors['io.grad_x'])
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        seen = [model.patch_embed(x), *(s.downsample(m) for m, s in zip(maps, model.stages[1:])), maps[-1]]
    for i, feature in enumerate(seen):
        assert close(feature, tensors[f'io.feature{i}']), i


def test_checkpoint_files(tmp_path):
    """A file in the names of transformers, of the authors' code, or ours; what does not fit is named."""
    config, state, tensors = load('layer_scale_k5')
    model, _ = create('layer_scale_k5')
    authors = {}
    for key, value in model.state_dict().items():
        key = re.sub(r'^stages\.(\d+)\.downsample', lambda found: f'levels.{int(found[1]) - 1}.downsample', key)
        key = re.sub(r'^stages\.', 'levels.', key)
        key = re.sub(r'ls([12])\.gamma', r'gamma\1', key).replace('head.fc', 'head')
        key = re.sub(r'patch_embed\.conv([12])', lambda found: f'patch_embed.proj.{int(found[1]) - 1}', key)
        authors[key] = value
    nat = {key.replace('dinat.', 'nat.'): value for key, value in state.items()}
    kwargs = dict(num_classes=7, **config)
    for i, checkpoint in enumerate((state, nat, authors, model.state_dict())):
        path = tmp_path / f'{i}.safetensors'
        save_file({k: t.contiguous() for k, t in checkpoint.items()}, path)
        loaded = timm.create_model(
            'nat_mini', pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=7), **kwargs).eval()
        assert torch.equal(loaded(tensors['io.x']), model(tensors['io.x']))
    torch.save(authors, tmp_path / 'pickled.pth')
    timm.create_model('dinat_mini', pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'pickled.pth'), num_classes=7), **kwargs)
    del state['dinat.encoder.levels.1.layers.0.attention.self.key.bias']
    with pytest.raises(RuntimeError, match=r'missing keys: stages\.1\.blocks\.0\.attn\.qkv\.bias'):
        timm.create_model('dinat_mini', pretrained=True, pretrained_cfg_overlay=dict(state_dict=state), **kwargs)


@pytest.mark.parametrize('architecture, params, gmacs', [
    ('dinat_mini', 20.0, 2.7),
    *(pytest.param(*size, marks=pytest.mark.sweep) for size in (
        ('nat_mini', 20.0, 2.7), ('nat_tiny', 27.9, 4.3), ('nat_small', 50.7, 7.8), ('nat_base', 89.8, 13.7),
        ('dinat_tiny', 27.9, 4.3), ('dinat_small', 50.7, 7.8), ('dinat_base', 89.8, 13.7),
        ('dinat_large', 200.9, 30.6), ('dinat_large_384', 200.9, 89.7), ('dinat_large_k11_384', 201.1, 92.4)))])
def test_sizes(architecture, params, gmacs):
    """Parameters in millions and 1e9 multiply-adds as the authors give them."""
    cost = model_cost(architecture, 1000, get_pretrained_cfg(architecture).input_size)
    assert cost.params == pytest.approx(params, abs=0.15) and cost.gmacs == pytest.approx(gmacs, rel=0.02)


@pytest.mark.parametrize('architecture', [n for n in timm.list_models(module='dinat') if n != 'test_dinat'])
def test_weights(architecture):
    """The authors' own, by their tags, also of the FADC model."""
    cfg = get_pretrained_cfg(architecture)
    assert get_pretrained_cfg(f'{architecture}_fadc.{cfg.tag}').hf_hub_id == cfg.hf_hub_id
    assert cfg.hf_hub_id.startswith('shi-labs/') and cfg.license == 'mit' and cfg.num_classes == 1000
    assert cfg.hf_hub_id.endswith(str(cfg.input_size[-1])) and str(cfg.input_size[-1]) in cfg.tag


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 97), (160, 36)], ids=str)
@torch.no_grad()
def test_any_size(size):
    """Maps of odd sizes, and maps smaller than a window."""
    model, _ = create('mini')
    maps = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    for m, info in zip(maps, model.feature_info, strict=True):
        assert m.shape[1:] == (info['num_chs'], *(-(-n // info['reduction']) for n in size)) and m.isfinite().all()


@pytest.mark.parametrize('output_stride', [8, 16])
@torch.no_grad()
def test_output_stride(output_stride):
    """At the positions of the smaller map the dilated network computes what the strided one does."""
    model, tensors = create('mini')
    dilated, _ = create('mini', output_stride=output_stride)
    assert [info['reduction'] for info in dilated.feature_info] == [4, 8, min(16, output_stride), output_stride]
    for size in ((64, 80), (71, 90)):
        x = torch.randn(2, 3, *size)
        step = 32 // output_stride
        assert error(dilated.forward_features(x)[..., ::step, ::step], model.forward_features(x)) < 5e-6
    with pytest.raises(ValueError, match='output_stride must be 8, 16 or 32, got 4'):
        timm.create_model('dinat_mini', output_stride=4)


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter', 'fx'])
@torch.no_grad()
def test_features(feature_cls):
    """Maps (B, C, H, W) from every kind of feature network."""
    model = timm.create_model('test_dinat').eval()
    net = timm.create_model('test_dinat', features_only=True, feature_cls=feature_cls, out_indices=(1, 3)).eval()
    state = model.state_dict()
    net.load_state_dict({
        k: state[re.sub(r'^(model|graph_module)\.', '', k).replace('stages_', 'stages.')] for k in net.state_dict()})
    maps = net(photos())
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    expected = model.forward_intermediates(photos(), indices=[1, 3], intermediates_only=True)
    assert all(torch.equal(a, e) for a, e in zip(maps, expected, strict=True))
    assert net.feature_info.channels() == [64, 256] and net.feature_info.reduction() == [8, 32]


@torch.no_grad()
def test_intermediates():
    model = timm.create_model('test_dinat').eval()
    last, maps = model.forward_intermediates(photos())
    assert torch.equal(last, model.forward_features(photos())) and len(maps) == 4
    assert torch.equal(model.forward_intermediates(photos(), norm=True, intermediates_only=True)[3], last)
    assert model.prune_intermediate_layers([1, 2]) == [1, 2] and len(model.stages) == 3
    assert model.num_features == model.head_hidden_size == maps[2].shape[1]
    early = model.forward_intermediates(photos(), [1, 2], stop_early=True, intermediates_only=True)
    assert all(torch.equal(a, e) for a, e in zip(early, maps[1:3], strict=True))
    assert model(photos()[:0]).shape == (0, *maps[2].shape[1:])


@torch.no_grad()
def test_classifier():
    model = timm.create_model('test_dinat', num_classes=9, in_chans=2).eval()
    x = photos()[:, :2]
    assert model(x).shape == (6, 9) and model.forward_head(model.forward_features(x), pre_logits=True).shape == (6, 256)
    model.reset_classifier(0, 'max')
    assert model(x).shape == (6, 256) and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(5, 'avg')
    assert model(x).shape == (6, 5) and model.num_classes == 5
    assert timm.create_model('test_dinat', global_pool='fast', num_classes=3)(photos()).shape == (6, 3)
    model.double().reset_classifier(0)
    model.reset_classifier(4)
    assert model(x.double()).dtype == torch.float64


def test_training():
    """Every parameter has a finite gradient, with every kind of dropout; checkpointing changes none."""
    rates = dict(drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2, layer_scale_init_value=0.1)
    model = timm.create_model('test_dinat', num_classes=5, **rates)
    model(photos()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model('test_dinat', num_classes=5, drop_path_rate=0.)
        model.set_grad_checkpointing(enable)
        model(photos()).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_parameter_groups():
    """Depth grows from the stem to the norm; biases of positions are not decayed."""
    with torch.device('meta'):
        model = timm.create_model('dinat_mini')
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.9, no_weight_decay_list=model.no_weight_decay())
    of = {p: g for g in groups for p in g['params']}
    assert sum(len(g['params']) for g in groups) == len(of) == len(list(model.parameters()))
    scale = {n: of[p]['lr_scale'] for n, p in model.named_parameters()}
    path = ['patch_embed.conv1.weight', 'stages.0.blocks.0.attn.rpb', 'stages.0.blocks.2.mlp.fc1.weight',
            'stages.2.blocks.3.attn.qkv.weight', 'stages.3.blocks.4.attn.proj.weight']
    assert [scale[n] for n in path] == sorted(scale[n] for n in path) and scale['head.fc.weight'] == 1
    assert all(of[p]['weight_decay'] == 0 for n, p in model.named_parameters() if n.endswith('.rpb'))


@torch.no_grad()
def test_transforms():
    """TorchScript, torch.fx, copies, dtypes and devices."""
    model = timm.create_model('test_dinat', num_classes=9).eval()
    expected = model(photos())
    assert error(torch.jit.script(model)(photos()), expected) < 2e-6
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(photos()), expected)
    assert torch.equal(traced(photos(96)), model(photos(96)))
    assert torch.equal(copy.deepcopy(model)(photos()), expected)
    assert error(model(photos().contiguous(memory_format=torch.channels_last)), expected) < 2e-6
    assert error(copy.deepcopy(model).bfloat16()(photos().bfloat16()).float(), expected) < 0.05
    with torch.autocast('cpu', torch.bfloat16):
        assert error(model(photos()).float(), expected) < 0.05
    x = torch.zeros(2, 3, 96, 70, device='meta', dtype=torch.bfloat16)
    assert timm.create_model('dinat_tiny', device='meta', dtype=torch.bfloat16)(x).shape == (2, 1000)


def test_one_dilation_for_all():
    model = timm.create_model('test_dinat', dilations=2)
    assert {tuple(block.attn.dilation) for stage in model.stages for block in stage.blocks} == {(2, 2)}


def test_init_weights():
    model = timm.create_model('test_dinat', layer_scale_init_value=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3)
    model.init_weights()
    assert isinstance(model, DiNAT) and not any((p == 3).any() for p in model.parameters())
    assert (model.stages[0].blocks[0].ls1.gamma == 0.5).all()


@pytest.mark.parametrize('kwargs, message', [
    (dict(dilations=((1, 2),)), r'dilations must have a dilation for each block, \[1, 1, 2, 1\]'),
    (dict(dilations=(1, 1, (1, 2, 3), 1)), 'dilations must'), (dict(dilations='2'), 'dilations must'),
    (dict(num_heads=(1, 2)), 'num_heads must have one number for each of 4 stages'),
    (dict(num_heads=(3, 3, 3, 3)), 'num_heads=3 does not divide dim=32'),
    (dict(kernel_size=4), 'kernel_size must be an odd integer, got 4'),
    (dict(dilations=(0, 1, 1, 1)), 'dilation must be an integer of at least 1'),
    (dict(dilations=0), 'dilation must be an integer of at least 1'),
], ids=str)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_dinat', **kwargs)
