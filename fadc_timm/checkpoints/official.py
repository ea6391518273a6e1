"""The authors' FADC, and deformable convolution as mmcv has it: layers rebuilt, and checkpoints converted.

The authors' code: https://github.com/Linwei-Chen/FADC, releases of April and December 2024. The conventions differ in
three ways: the names; some of our convolutions join several of theirs; their mask is sigmoid(o) and ours 2*sigmoid(o),
so the weights are halved.

mmdetection's and mmsegmentation's `dcn=dict(type='DCNv2')` is mmcv's layer, whose `conv_offset` is the convolution of
our FreeOffsets, output by output: the offsets (y, x) of every tap, then the mask before its sigmoid. Its mask is
sigmoid(o) too; `type='DCN'` (version 1) has no mask.
"""
import logging
import re
from typing import Any, Dict, List, Mapping, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import FADConv2d
from ..models._family import fadc_keys
from ..ops.runtime import is_depthwise

__all__ = ['convert_checkpoint', 'convert_layer', 'load_layer', 'refuse_caffe', 'refuse_dilated', 'rename_stem']

_logger = logging.getLogger(__name__)

StateDict = Dict[str, Tensor]

# Options of which one value is supported. It is also the default in the authors' code.
_FIXED_OPTIONS: Dict[str, Any] = dict(
    offset_freq=None, conv_type='conv', sp_att=False, pre_fs=True, use_dct=False, normal_conv_dim=0, use_BFM=False,
    norm_cfg=None)
_FIXED_FS_OPTIONS: Dict[str, Any] = dict(
    fs_feat='feat', lp_type='freq', act='sigmoid', spatial='conv', spatial_kernel=3, init='zero',
    global_selection=False)
_PADDING_MODES = {'repeat': 'replicate', 'zero': 'zeros', None: 'zeros'}
_CLASSES = ('AdaptiveDilatedConv', 'AdaptiveDilatedDWConv')


def _refuse(options: Dict[str, Any], fixed: Mapping[str, Any], what: str) -> None:
    """Take the fixed options out. Raise if one has another value, or if other options are left."""
    for name, value in fixed.items():
        if name in options and options.pop(name) != value:
            raise NotImplementedError(f'{what} with {name} other than {value!r} is not supported.')
    if options:
        raise NotImplementedError(f'{what} has no supported option {", ".join(sorted(options))}.')


def _freq_select_cfg(fs_cfg: Any) -> Dict[str, Any]:
    """Options of FADConv2d for the authors' fs_cfg, where None means no FreqSelect."""
    if fs_cfg is None:
        return dict(freq_select=False)
    fs_cfg = dict(fs_cfg)
    cfg = dict(
        freq_select=True,
        bands=tuple(fs_cfg.pop('k_list', (2,))),
        lowfreq_att=bool(fs_cfg.pop('lowfreq_att', True)),
        spatial_group=fs_cfg.pop('spatial_group', 1))
    _refuse(fs_cfg, _FIXED_FS_OPTIONS, 'fs_cfg')
    return cfg


def _one(name: str, value: Any) -> int:
    values = set(value) if isinstance(value, (tuple, list)) else {value}
    if len(values) != 1:
        raise NotImplementedError(f'{name}={value!r}: only one value for both axes is supported.')
    return values.pop()


def _build_layer(class_name: str, kwargs: Mapping[str, Any]) -> FADConv2d:
    """The FADConv2d of the authors' constructor arguments."""
    if class_name not in _CLASSES:
        raise NotImplementedError(f'There is no class {class_name!r} of layers, the classes are {", ".join(_CLASSES)}.')
    depthwise = class_name == 'AdaptiveDilatedDWConv'
    options = dict(kwargs)
    in_channels, out_channels = options.pop('in_channels'), options.pop('out_channels')
    k = _one('kernel_size', options.pop('kernel_size'))
    stride = _one('stride', options.pop('stride', 1))
    padding = _one('padding', options.pop('padding', 0))
    dilation = _one('dilation', options.pop('dilation', 1))
    groups = options.pop('groups', 1)
    dilation_groups = options.pop('deform_groups', 1)
    bias = options.pop('bias', True)
    padding_mode = options.pop('padding_mode', 'repeat')
    kernel_decompose = options.pop('kernel_decompose', 'both')
    use_zero_dilation = options.pop('use_zero_dilation', False)
    eps = options.pop('epsilon', 1e-4)
    dilation_act = options.pop('dilation_act', 'relu' if depthwise else 'abs')
    fs_cfg = _freq_select_cfg(options.pop('fs_cfg', dict(k_list=(2, 4, 8), lowfreq_att=False)))
    _refuse(options, _FIXED_OPTIONS, class_name)
    if padding_mode not in _PADDING_MODES:
        raise NotImplementedError(f'padding_mode={padding_mode!r} is not supported; these are: {list(_PADDING_MODES)}.')
    if kernel_decompose not in ('both', 'low', 'high', None):
        raise NotImplementedError(f'kernel_decompose={kernel_decompose!r} is not supported.')
    if bias == 'auto':
        bias = True  # mmcv decides by norm_cfg, which is None here
    if depthwise != is_depthwise(in_channels, out_channels, groups):
        raise NotImplementedError(
            f'{class_name} with in_channels={in_channels}, out_channels={out_channels}, groups={groups} '
            'is not supported.')
    if depthwise and fs_cfg.get('lowfreq_att'):
        # the copy of FreqSelect beside that class leaves the lowest band's weight without its activation
        raise NotImplementedError(f'{class_name} with lowfreq_att is not supported.')
    if depthwise and kernel_decompose is None and dilation != 1:
        raise NotImplementedError(f'{class_name} with dilation={dilation} and without AdaKern is not supported.')
    # their layers pad k // 2 pixels whatever `padding` says, except the depthwise one without a padding_mode
    inner = padding if depthwise and padding_mode is None else k // 2
    return FADConv2d(
        in_channels, out_channels, k, stride, inner + (k // 2) * (dilation - 1), dilation, groups, bias,
        padding_mode=_PADDING_MODES[padding_mode], kernel_decompose=kernel_decompose or 'none',
        dilation_act='zero' if use_zero_dilation else dilation_act, dilation_groups=dilation_groups, eps=eps, **fs_cfg)


class _Keys:
    """A state dict whose keys are taken out one by one, and that knows which keys were missing."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self.left = dict(state_dict)
        self.missing: List[str] = []

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            self.missing.append(name)
            return torch.zeros(0)
        return self.left.pop(name)

    def cat(self, names: List[str]) -> Tensor:
        tensors = [self.take(name) for name in names]
        return torch.cat(tensors) if all(t.dim() == tensors[0].dim() for t in tensors) else tensors[0]

    def check(self, what: str) -> None:
        if self.missing or self.left:
            raise RuntimeError(
                f'The state dict does not fit {what}: missing keys: {", ".join(self.missing) or "none"}; '
                f'unexpected keys: {", ".join(sorted(self.left)) or "none"}.')


def _matrix(t: Tensor) -> Tensor:
    """The weight of the authors' 1x1 convolution of a vector as the matrix of our product; a bias stays as it is."""
    return t.flatten(1) if t.dim() > 1 else t


def _check_offsets(weight: Tensor, layer: FADConv2d) -> None:
    """Raise unless mmcv's conv_offset (outputs, C, k, k) has the offsets and the mask that the layer wants."""
    assert layer.free_offsets is not None
    if layer.free_offsets.dw is not None:
        raise NotImplementedError('A depthwise deformable convolution predicts its offsets in another way than mmcv.')
    wanted = layer.free_offsets.conv.weight.shape
    if weight.shape != wanted:
        outputs, taps = weight.shape[0], layer.kernel_size[0] ** 2
        versions = [f'{outputs // n} offset groups with modulated={modulated}'
                    for n, modulated in ((3 * taps, True), (2 * taps, False)) if outputs % n == 0]
        raise RuntimeError(
            f'conv_offset.weight has shape {tuple(weight.shape)} = {" or ".join(versions) or "another kernel"}; '
            f'the layer has {layer.free_offsets.extra_repr()} and wants {tuple(wanted)}.')


def _convert_deformable(keys: _Keys, layer: FADConv2d) -> StateDict:
    """A deformable convolution of mmcv. AdaKern and FreqSelect, which it lacks, keep their values in the layer."""
    assert layer.free_offsets is not None
    out = {k: v for k, v in layer.state_dict().items() if k.startswith(('ada_kern.', 'freq_select.'))}
    # mmcv's mask sigmoid(o) is half of ours, and the operator is linear in the weight
    out['weight'] = keys.take('weight') / (2 if layer.free_offsets.modulated else 1)
    if layer.bias is not None:
        out['bias'] = keys.take('bias')
    for p in ('weight', 'bias'):
        out[f'free_offsets.conv.{p}'] = keys.take(f'conv_offset.{p}')
    keys.check(f'a deformable layer ({layer.extra_repr()})')
    _check_offsets(out['free_offsets.conv.weight'], layer)
    return out


def convert_layer(state_dict: Mapping[str, Tensor], layer: FADConv2d) -> StateDict:
    """Convert the state dict of one of the authors' layers, or of a deformable convolution of mmcv, to one for an
    FADConv2d. Gradients flow through.

    Args:
        state_dict: The state dict, with the names of the authors or of mmcv.
        layer: The layer that the result is for; for mmcv's it has `sampling='deform'`.

    Raises:
        NotImplementedError: The layer is a depthwise deformable convolution.
        RuntimeError: Keys are missing or left over, the offsets have another number, or the layer's AdaKern has no
            BatchNorm; the message names them.
    """
    keys = _Keys(state_dict)
    if layer.free_offsets is not None:
        return _convert_deformable(keys, layer)
    # their mask sigmoid(o) is half of ours, and the operator is linear in the weight
    out = {'weight': keys.take('weight') / (1 if layer.ada_dr is None else 2)}
    if layer.bias is not None:
        out['bias'] = keys.take('bias')
    if layer.freq_select is not None:
        fs = layer.freq_select
        for p in ('weight', 'bias'):
            maps = [keys.take(f'FS.freq_weight_conv_list.{i}.{p}') for i in range(fs.num_maps)]
            if not keys.missing:
                # (S, ...) for each map -> group by group (S*M, ...)
                out[f'freq_select.conv.{p}'] = torch.stack(maps, dim=1).flatten(0, 1)
    if layer.ada_kern is not None:
        if not isinstance(layer.ada_kern.norm, _BatchNorm):
            raise RuntimeError(
                "The authors' AdaKern has a BatchNorm, and that of the layer another norm: build the layer, or the "
                "model, with ada_kern_norm='batchnorm2d'.")
        parts = ['OMNI_ATT1', 'OMNI_ATT2'] if layer.ada_kern.parts == 2 else ['OMNI_ATT']
        out['ada_kern.fc.weight'] = _matrix(keys.cat([f'{part}.fc.weight' for part in parts]))
        for t in ('weight', 'bias', 'running_mean', 'running_var'):
            out[f'ada_kern.norm.{t}'] = keys.cat([f'{part}.bn.{t}' for part in parts])
        heads = ['channel_fc'] if layer.ada_kern.depthwise else ['channel_fc', 'filter_fc']
        for part, name in zip(parts, [n for n in ('low', 'high') if getattr(layer.ada_kern, n) is not None]):
            for t in ('weight', 'bias'):
                out[f'ada_kern.{name}.{t}'] = _matrix(keys.cat([f'{part}.{h}.{t}' for h in heads]))
        counts = [keys.left.pop(f'{part}.bn.num_batches_tracked', torch.tensor(0)) for part in parts]
        out['ada_kern.norm.num_batches_tracked'] = counts[0]
    if layer.ada_dr is not None:
        if layer.ada_dr.depthwise:
            out['ada_dr.conv.weight'] = keys.take('conv_offset.weight')
            out['ada_dr.conv.bias'] = keys.take('conv_offset.bias')
            out['ada_dr.mask_dw.weight'] = keys.take('conv_mask.0.weight')
            out['ada_dr.mask_pw.weight'] = keys.take('conv_mask.1.weight')
            out['ada_dr.mask_pw.bias'] = keys.take('conv_mask.1.bias')
        else:
            for p in ('weight', 'bias'):
                out[f'ada_dr.conv.{p}'] = keys.cat([f'conv_offset.{p}', f'conv_mask.{p}'])
        keys.left.pop('dilated_offset', None)  # a constant buffer: the taps
    keys.check(f'a layer ({layer.extra_repr()})')
    return out


def load_layer(class_name: str, kwargs: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> FADConv2d:
    """Rebuild one of the authors' layers.

    Args:
        class_name: 'AdaptiveDilatedConv' or 'AdaptiveDilatedDWConv'.
        kwargs: The constructor arguments of the authors' layer; add `dilation_act='relu'` for the code of April 2024.
        state_dict: The state dict of the authors' layer.

    Returns:
        The layer in eval mode.

    Raises:
        NotImplementedError: An option, or its value, is not supported; the message names it.
        RuntimeError: Keys are missing or left over; the message names them.
    """
    layer = _build_layer(class_name, kwargs)
    layer.load_state_dict(convert_layer({k: v.detach() for k, v in state_dict.items()}, layer))
    return layer.eval()


def _strip(state_dict: Mapping[str, Any]) -> Tuple[StateDict, int]:
    """The backbone of an mmsegmentation checkpoint, and the number of other tensors."""
    if isinstance(state_dict.get('state_dict'), Mapping):
        state_dict = state_dict['state_dict']
    tensors = {k.removeprefix('module.'): v for k, v in state_dict.items() if isinstance(v, Tensor)}
    backbone = {k.removeprefix('backbone.'): v for k, v in tensors.items() if k.startswith('backbone.')}
    if not backbone:
        raise RuntimeError('The checkpoint has no keys under "backbone.", as mmsegmentation names them.')
    return backbone, len(tensors) - len(backbone)


def rename_stem(key: str, conv1_is_deep: bool) -> str:
    """mmsegmentation's deep stem is one Sequential: convolutions at 0, 3, 6; timm's last norm stands apart as bn1."""
    index, _, rest = key.removeprefix('stem.').partition('.')
    if not conv1_is_deep:
        return key
    return f'bn1.{rest}' if index == '7' else f'conv1.{index}.{rest}'


def _configuration(meta: Any) -> str:
    """The configuration in the `meta` of a checkpoint of mmdetection or mmsegmentation."""
    texts = [meta.get(k) for k in ('config', 'cfg')] if isinstance(meta, Mapping) else []
    return '\n'.join(text for text in texts if isinstance(text, str))


def refuse_dilated(meta: Any) -> None:
    """Raise NotImplementedError where the `meta` of a checkpoint says that its backbone has dilations for strides."""
    found = re.search(
        r"""\bdilations['"]?\s*[=:]\s*[(\[]\s*1,\s*1,\s*(1,\s*2|2,\s*4)\s*,?\s*[)\]]""", _configuration(meta))
    if found:
        stride = 8 if found[1].startswith('2') else 16
        raise NotImplementedError(
            f"The checkpoint's configuration says {' '.join(found[0].split())}: its backbone has an output stride of "
            f'{stride}. Give output_stride={stride}, or another one to have another network.')


def refuse_caffe(meta: Any) -> None:
    """Raise NotImplementedError where the `meta` of a checkpoint of mmdetection says that its strides are in 1x1
    convolutions."""
    if re.search(r"""\bstyle['"]?\s*[=:]\s*['"]caffe['"]""", _configuration(meta)):
        raise NotImplementedError(
            "The checkpoint has style='caffe', strides in its 1x1 convolutions; timm's networks have them in the 3x3 "
            "convolutions, as style='pytorch'.")


def convert_checkpoint(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Convert a checkpoint of the authors, or one of mmdetection or mmsegmentation with deformable convolutions, to a
    state dict for a timm model.

    Where the model has `sampling='deform'` the checkpoint is one with `dcn=dict(type='DCNv2')`, or with
    `modulated=False` one of `type='DCN'`. AdaKern and FreqSelect, which it lacks, keep their values in the model.

    Args:
        state_dict: The checkpoint, with or without its outer 'state_dict'. Heads are ignored; the log says how many.
        model: An FADC ResNet. Its classifier, which no such checkpoint has, keeps its values. Strides are in its 3x3
            convolutions, as with `style='pytorch'`; tensors alone do not tell a checkpoint of `style='caffe'`.

    Returns:
        A state dict that loads strictly.

    Raises:
        NotImplementedError: The checkpoint's configuration says `style='caffe'`.
        RuntimeError: Keys are missing or left over, or offsets have another number; the message names them.
    """
    refuse_caffe(state_dict.get('meta'))
    backbone, heads = _strip(state_dict)
    _logger.info('Ignored %d tensors outside of the backbone.', heads)
    own = model.state_dict()
    conv1_is_deep = isinstance(model.get_submodule('conv1'), nn.Sequential)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FADConv2d)}
    out: StateDict = {}
    for name, layer in layers.items():
        # before version 2 of mmcv's layers the convolution stood beside them: conv2_offset
        before = {f'{name}_offset.{p}': f'{name}.conv_offset.{p}' for p in ('weight', 'bias')}
        backbone.update({new: backbone.pop(old) for old, new in before.items() if old in backbone})
        inside = {k: backbone.pop(k) for k in list(backbone) if k.startswith(f'{name}.')}
        try:
            converted = convert_layer({k.removeprefix(f'{name}.'): v for k, v in inside.items()}, layer)
        except RuntimeError as e:
            raise RuntimeError(f'{name}: {e}') from None
        out.update({f'{name}.{k}': v for k, v in converted.items()})
    for key, value in backbone.items():
        out[rename_stem(key, conv1_is_deep) if key.startswith('stem.') else key] = value
    classifier = [k for k in own if k not in out and k.startswith('fc.')]
    if classifier:
        _logger.info('The classifier keeps its values: %s.', ', '.join(classifier))
        out.update({k: own[k] for k in classifier})
    missing = [k for k in own if k not in out and not k.endswith('num_batches_tracked')]
    unexpected = [k for k in out if k not in own]
    if missing or unexpected:
        raise RuntimeError(
            f'The checkpoint does not fit {type(model).__name__}: missing keys: {", ".join(missing) or "none"}; '
            f'unexpected keys: {", ".join(unexpected) or "none"}.')
    _logger.info('Converted %d tensors, %d of them of FADC.', len(out), len(fadc_keys(model)))
    return {k: out.get(k, own[k]) for k in own}
