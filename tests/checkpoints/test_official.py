"""The authors' layers and checkpoints against vectors of their own code, see data/official_vectors/README.md."""
import json
import logging

import pytest
import timm
import torch

from fadc_timm import FADConv2d
from fadc_timm.checkpoints.official import convert_checkpoint, convert_layer, load_layer
from fadc_timm.ops import BACKENDS
from tests.support.official_cases import VECTORS, assert_features, close, load, mini_backbone, part

LAYERS = sorted(p.stem for p in VECTORS.glob('*.safetensors') if p.stem != 'mini_backbone')


def layer_of(name):
    meta, tensors = load(name)
    kwargs = json.loads(meta['kwargs'])
    if name == 'relu_dilation':
        kwargs['dilation_act'] = 'relu'
    return meta['class'], kwargs, tensors


def weight_of(name):
    """The weight of the convolution that a one-dimensional parameter belongs to: a norm belongs to the layer's."""
    owner = name.rpartition('.')[0]
    return 'weight' if not owner or owner.endswith('.bn') else f'{owner}.weight'


def test_there_are_sixteen_layers():
    assert len(LAYERS) == 16


# Triton's interpreter takes seconds per layer.
INTERPRETED = ('ade20k_config_odd',)


@pytest.mark.parametrize('name, backend', [
    pytest.param(name, backend, marks=[pytest.mark.sweep] if backend == 'triton' and name not in INTERPRETED else [])
    for name in LAYERS for backend in BACKENDS])
def test_layer(name, backend):
    class_name, kwargs, tensors = layer_of(name)
    grads = part(tensors, 'grad.')
    state = {k: v.requires_grad_(k in grads) for k, v in part(tensors, 'state.').items()}
    layer = load_layer(class_name, kwargs, state)
    layer.backend = backend
    assert not layer.training

    x = tensors['io.x'].requires_grad_()
    assert close(layer(x), tensors['io.y'])
    # the conversion is linear, so autograd takes the gradients back through it to the authors' parameters
    y = torch.func.functional_call(layer, convert_layer(state, layer), (x,))
    (y * tensors['io.cotangent']).sum().backward()
    assert close(y, tensors['io.y'])
    assert close(x.grad, tensors['io.grad_x'])
    for key, want in grads.items():
        norm = want if want.dim() > 1 else grads[weight_of(key)]
        assert close(state[key].grad, want, norm), key


def test_layer_refuses_leftover_and_missing_keys():
    class_name, kwargs, tensors = layer_of('ade20k_config')
    state = part(tensors, 'state.')
    with pytest.raises(RuntimeError, match=r'unexpected keys: extra\.weight'):
        load_layer(class_name, kwargs, {**state, 'extra.weight': torch.zeros(1)})
    for key in state:
        if key in ('dilated_offset',) or key.endswith('num_batches_tracked'):
            continue
        with pytest.raises(RuntimeError, match=f'missing keys: .*{key}'):
            load_layer(class_name, kwargs, {k: v for k, v in state.items() if k != key})


def test_layer_with_another_norm_is_refused():
    """The authors' AdaKern has a BatchNorm, in their depthwise layer too."""
    class_name, kwargs, tensors = layer_of('depthwise3')
    state = part(tensors, 'state.')
    c = kwargs['in_channels']
    with pytest.raises(RuntimeError, match="BatchNorm, .* ada_kern_norm='batchnorm2d'"):
        convert_layer(state, FADConv2d(c, c, 3, padding=1, groups=c, ada_kern_norm='layernorm2d'))


@pytest.mark.parametrize('class_name', ['AdaptiveDilatedConv', 'AdaptiveDilatedDWConv'])
@pytest.mark.parametrize('options, named', [
    (dict(sp_att=True), 'sp_att'),
    (dict(use_dct=True), 'use_dct'),
    (dict(pre_fs=False), 'pre_fs'),
    (dict(conv_type='multifreqband'), 'conv_type'),
    (dict(offset_freq='FLC_high'), 'offset_freq'),
    (dict(normal_conv_dim=4), 'normal_conv_dim'),
    (dict(use_BFM=True), 'use_BFM'),
    (dict(kernel_decompose='all'), 'kernel_decompose'),
    (dict(padding_mode='circular'), 'padding_mode'),
    (dict(stride=(1, 2)), 'stride'),
    (dict(new_option=1), 'new_option'),
    (dict(fs_cfg=dict(lp_type='avgpool')), 'lp_type'),
    (dict(fs_cfg=dict(lp_type='laplacian')), 'lp_type'),
    (dict(fs_cfg=dict(act='softmax')), 'act'),
    (dict(fs_cfg=dict(global_selection=True)), 'global_selection'),
    (dict(fs_cfg=dict(spatial='cbam')), 'spatial'),
    (dict(fs_cfg=dict(other=1)), 'other'),
])
def test_unsupported_options_are_named(class_name, options, named):
    kwargs = dict(in_channels=16, out_channels=16, kernel_size=3, padding=1)
    if class_name == 'AdaptiveDilatedDWConv':
        kwargs['groups'] = 16
    with pytest.raises(NotImplementedError, match=named):
        load_layer(class_name, {**kwargs, **options}, {})


def test_unsupported_layers_are_named():
    with pytest.raises(NotImplementedError, match='DeformConv'):
        load_layer('DeformConv', dict(in_channels=4, out_channels=4, kernel_size=3), {})
    depthwise = dict(in_channels=16, out_channels=16, kernel_size=3, padding=1, groups=16)
    with pytest.raises(NotImplementedError, match='groups=4'):
        load_layer('AdaptiveDilatedDWConv', {**depthwise, 'groups': 4}, {})
    with pytest.raises(NotImplementedError, match='lowfreq_att'):  # on unless fs_cfg says otherwise
        load_layer('AdaptiveDilatedDWConv', {**depthwise, 'fs_cfg': dict(k_list=[2, 4])}, {})
    with pytest.raises(NotImplementedError, match='dilation=2'):
        load_layer('AdaptiveDilatedDWConv', {**depthwise, 'kernel_decompose': None, 'dilation': 2}, {})


@pytest.mark.parametrize('wrapped', [False, True])
def test_backbone(wrapped, caplog):
    kwargs, state, tensors = mini_backbone()
    model = timm.create_model('resnet50c_fadc', num_classes=0, padding_mode='replicate', **kwargs).eval()
    with caplog.at_level(logging.INFO, 'fadc_timm'):
        converted = convert_checkpoint(dict(state_dict=state, meta=dict(epoch=1)) if wrapped else state, model)
    heads = sum(not k.startswith('backbone.') for k in state)
    assert heads == 4 and f'Ignored {heads} tensors' in caplog.text
    model.load_state_dict(converted, strict=True)
    with torch.no_grad():
        features = model.forward_intermediates(tensors['io.x'], intermediates_only=True)[1:]
        assert_features(features, tensors)
        by_list = timm.create_model(
            'resnet50c_fadc', features_only=True, out_indices=(1, 2, 3, 4), pretrained=True, padding_mode='replicate',
            pretrained_cfg_overlay=dict(state_dict=converted), **kwargs).eval()
        assert_features(by_list(tensors['io.x']), tensors)


def test_backbone_with_a_classifier_keeps_it(caplog):
    kwargs, state, _ = mini_backbone()
    model = timm.create_model('resnet50c_fadc', num_classes=7, padding_mode='replicate', **kwargs)
    with caplog.at_level(logging.INFO, 'fadc_timm'):
        converted = convert_checkpoint(state, model)
    assert 'classifier keeps its values: fc.weight, fc.bias' in caplog.text
    assert torch.equal(converted['fc.weight'], model.fc.weight)
    model.load_state_dict(converted, strict=True)


def test_backbone_of_another_shape_is_refused():
    kwargs, state, _ = mini_backbone()
    model = timm.create_model('resnet50c_fadc', num_classes=0, padding_mode='replicate', **kwargs)
    key = 'backbone.layer3.0.conv2.FS.freq_weight_conv_list.1.weight'
    with pytest.raises(RuntimeError, match=r'layer3\.0\.conv2: .*missing keys: FS\.freq_weight_conv_list\.1\.weight'):
        convert_checkpoint({k: v for k, v in state.items() if k != key}, model)
    with pytest.raises(RuntimeError, match=r'missing keys: layer1\.0\.bn1\.bias'):
        convert_checkpoint({k: v for k, v in state.items() if k != 'backbone.layer1.0.bn1.bias'}, model)
    with pytest.raises(RuntimeError, match=r'unexpected keys: norm\.weight'):
        convert_checkpoint({**state, 'backbone.norm.weight': torch.zeros(1)}, model)
    with pytest.raises(RuntimeError, match='no keys under "backbone."'):
        convert_checkpoint({'conv1.weight': torch.zeros(1)}, model)
