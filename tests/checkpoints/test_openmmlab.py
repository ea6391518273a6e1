"""Checkpoints of mmdetection and mmsegmentation with deformable convolutions, by mmcv's names and conventions."""

import pytest
import timm
import torch

from fadc_timm import FADConv2d
from fadc_timm.checkpoints import Checkpoint, convert
from fadc_timm.checkpoints.official import convert_checkpoint, convert_layer
from fadc_timm.cli import main
from fadc_timm.ops import set_backend
from tests.support.backbones import THIN, awaken, photos
from tests.support.openmmlab import (
    DeformConv2dPack,
    ModulatedDeformConv2dPack,
    backbone,
    checkpoint,
    close,
    features,
    vector,
)

pytestmark = pytest.mark.usefixtures('one_thread')


def from_state(name, state, **kwargs):
    model = timm.create_model(name, num_classes=0, **kwargs).eval()
    model.load_state_dict(convert_checkpoint(state, model), strict=True)
    return model


def features_and_gradient(model, tensors, dtype=torch.float32):
    x = tensors['io.x'].to(dtype, copy=True).requires_grad_()
    ys = features(model.to(dtype), x)
    sum((y * tensors[f'io.cotangent{i}'].to(dtype)).sum() for i, y in enumerate(ys)).backward()
    return ys, x.grad


@pytest.mark.parametrize('name', ['resnet50_dcn', 'resnet50_dcn_fadc'])
def test_vector(name):
    """Features and the input's gradient; with AdaKern and FreqSelect at their start the same.

    In the first sample the vector's gradient is not that of float64: they differ by 1.5e-3, and what is computed in
    float32 agrees with the one or the other, as rounding has it.
    """
    kwargs, state, tensors = vector()
    model = from_state(name, state, **kwargs)
    ys, grad = features_and_gradient(model, tensors)
    assert len(ys) == 4
    for i, y in enumerate(ys):
        assert close(y, tensors[f'io.feature{i}']), i  # 3.2e-7
    assert close(grad[1], tensors['io.grad_x'][1])
    with set_backend('reference'):
        exact = features_and_gradient(from_state(name, state, **kwargs), tensors, torch.float64)[1]
    assert close(grad, tensors['io.grad_x']) or close(grad, exact.float())  # 3.6e-7, 3.7e-7
    by_list = timm.create_model(
        name, features_only=True, out_indices=(1, 2, 3, 4), pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=model.state_dict()), **kwargs).eval()
    assert all(close(y, tensors[f'io.feature{i}']) for i, y in enumerate(by_list(tensors['io.x'])))


@pytest.mark.parametrize('base, kwargs, deform_groups, modulated', [
    ('resnet50', dict(layers=(1, 2, 1, 1)), 1, False),
    ('resnet50', dict(**THIN, output_stride=8), 4, True),
    ('resnet50c', THIN, 2, False),
    ('resnet50d', THIN, 4, True),
    ('resnext50_32x4d', THIN, 1, True),
    ('resnext50_32x4d', THIN, 8, False),
], ids=str)
def test_networks(base, kwargs, deform_groups, modulated):
    """Versions, groups, deep stems, dilated and grouped convolutions; in float64, where rounding passes no kink."""
    theirs = awaken(backbone(base, deform_groups, modulated, **kwargs))
    model = from_state(f'{base}_dcn', checkpoint(theirs), offset_groups=deform_groups, modulated=modulated, **kwargs)
    model, theirs = model.double(), theirs.double()
    leaves = [photos(64)[:2].double().requires_grad_() for _ in range(2)]
    grads = []
    for net, x in zip((model, theirs), leaves):
        ys = features(net, x)
        sum(y.square().mean() for y in ys).backward()
        grads.append((ys, x.grad))
    for i, (y, expected) in enumerate(zip(grads[0][0], grads[1][0], strict=True)):
        assert close(y, expected), i
    assert close(grads[0][1], grads[1][1])


@pytest.mark.parametrize('cls', [ModulatedDeformConv2dPack, DeformConv2dPack])
@torch.no_grad()
def test_layer(cls):
    theirs = cls(8, 6, 3, 2, 2, 2, 2, deform_groups=4)
    for p in theirs.parameters():
        p.normal_(std=0.3)
    layer = FADConv2d(8, 6, 3, 2, 2, 2, 2, sampling='deform', freq_select=False, kernel_decompose='none',
                      offset_groups=4, modulated=cls is ModulatedDeformConv2dPack)
    layer.load_state_dict(convert_layer(theirs.state_dict(), layer))
    x = torch.randn(2, 8, 13, 12)
    assert close(layer(x), theirs(x))


def test_names_before_version_2_of_the_layer():
    """The convolution of the offsets stood beside the layer: `conv2_offset`."""
    kwargs, state, tensors = vector()
    old = {k.replace('conv2.conv_offset', 'conv2_offset'): v for k, v in state.items()}
    assert old.keys() != state.keys()
    model = from_state('resnet50_dcn', old, **kwargs)
    assert close(features(model, tensors['io.x'])[-1], tensors['io.feature3'])


def test_what_does_not_fit():
    kwargs, state, _ = vector()
    for changed, message in (
            (dict(modulated=False), r'layer2\.0\.conv2: conv_offset.weight has shape \(27, 24, 3, 3\) = 1 offset '
                                    r'groups with modulated=True; the layer has .*modulated=False and wants \(18, '),
            (dict(offset_groups=2), r'conv_offset.*1 offset groups with modulated=True; .*wants \(54, '),
            (dict(fadc_stages=(False, False, True, True)), r'unexpected keys: layer2\.0\.conv2\.conv_offset\.'),
            (dict(fadc_stages=(True,) * 4), r'layer1\.0\.conv2: .*missing keys: conv_offset\.weight'),
            (dict(layers=[1, 1, 2, 1]), r'layer3\.1\.conv2: .*missing keys: weight, conv_offset'),
            (dict(sampling='fixed'), r'layer2\.0\.conv2: .*unexpected keys: conv_offset\.bias, conv_offset\.weight')):
        with pytest.raises(RuntimeError, match=message):
            from_state('resnet50_dcn', state, **{**kwargs, **changed})
    caffe = dict(state_dict=state, meta=dict(config="model = dict(backbone=dict(type='ResNet', style='caffe'))"))
    with pytest.raises(NotImplementedError, match="style='caffe'"):
        from_state('resnet50_dcn', caffe, **kwargs)
    caffe['meta']['config'] = caffe['meta']['config'].replace('caffe', 'pytorch')
    from_state('resnet50_dcn', caffe, **kwargs)
    depthwise = FADConv2d(4, 4, 3, groups=4, sampling='deform')
    with pytest.raises(NotImplementedError, match='depthwise'):
        convert_layer(ModulatedDeformConv2dPack(4, 4, 3, groups=4).state_dict(), depthwise)


@pytest.mark.parametrize('name', ['resnet50_dcn', 'resnet50_dcn_fadc'])
@pytest.mark.parametrize('modulated', [True, False])
@torch.no_grad()
def test_command(name, modulated, tmp_path, capsys):
    theirs = awaken(backbone('resnet50', 1, modulated, **THIN))
    torch.save(checkpoint(theirs, optimizer=dict(state={})), tmp_path / 'x.pth')
    args = ['convert', str(tmp_path / 'x.pth'), '--model', name, '--out', str(tmp_path / 'out'), '--model-kwargs',
            'layers=(1, 1, 1, 1)', f'modulated={modulated}']
    assert main(args) == 0
    assert "A checkpoint of mmdetection or mmsegmentation, its tensors under 'state_dict'." in capsys.readouterr().out
    keys = (tmp_path / 'out.keys.txt').read_text()
    assert 'taken  backbone.layer2.0.conv2.conv_offset.weight -> layer2.0.conv2.free_offsets.conv.weight' in keys
    assert 'taken  backbone.layer2.0.conv2.weight -> layer2.0.conv2.weight' in keys
    assert 'left   rpn_head.rpn_conv.weight' in keys
    assert ('added  layer4.0.conv2.ada_kern.fc.weight' in keys) == name.endswith('_fadc')
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert {m.padding_mode for m in model.modules() if isinstance(m, FADConv2d)} == {'zeros'}
    assert all(close(a, b) for a, b in zip(features(model, photos()), features(theirs, photos()), strict=True))
    assert not any(model.pretrained_cfg.get(k) for k in ('paper_ids', 'origin_url', 'tag', 'license'))
    assert main([*args, '--release', 'april2024']) == 2
    assert "--release is for checkpoints of the authors' code" in capsys.readouterr().err
    caffe = checkpoint(theirs)
    caffe['meta']['cfg'] = "style='caffe'"
    torch.save(caffe, tmp_path / 'x.pth')
    assert main(args) == 2 and "style='caffe'" in capsys.readouterr().err


def test_plain_checkpoint_of_timm_is_lifted():
    """A model with deformable convolutions takes timm's checkpoints as well."""
    plain = timm.create_model('test_resnet')
    converted = convert(Checkpoint(plain.state_dict(), '', []), 'test_resnet_dcn_fadc')
    assert converted.writer == 'timm' and any('free_offsets' in key for key in converted.added)
