"""Networks that lift_model changed, as timm builds them again: what was lifted, as data, and an entry point for it.

`fadc_timm.save` writes the data into config.json, under the architecture `fadc_lifted`.
"""
from typing import Any, Dict, List, Optional, Sequence, Union

from timm.models import build_model_with_cfg, is_model, model_entrypoint, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from ..layers import FADC_LAYERS, FADConv2d, FADNeighborhoodAttention
from ..layers.fad_conv import OPTIONS, read_options
from ..layers.neighborhood_attention import ATTENTION_OPTIONS
from ._checkpoint import check_keys, check_source, check_values, settle_head
from ._download import checked_download
from .lift import lift_model

__all__ = ['ARCHITECTURE', 'layer_options', 'lifted_layers']

ARCHITECTURE = 'fadc_lifted'

# More than 64 groups of FreqSelect mean one per channel, whatever the number of channels.
_PER_CHANNEL = 65


def layer_options(layer: Union[FADConv2d, FADNeighborhoodAttention]) -> Dict[str, Any]:
    """The options with which a layer is built again, as config.json keeps them.

    `eps` and `backend` say how it starts and where it runs, not what it computes.
    """
    options: Dict[str, Any] = dict(
        freq_select=layer.freq_select is not None,
        kernel_decompose=layer.ada_kern.kernel_decompose if layer.ada_kern is not None else 'none')
    if layer.ada_kern is not None:
        options.update(ada_kern_norm=layer.ada_kern.norm_layer)
    fs = layer.freq_select
    if fs is not None:
        groups = _PER_CHANNEL if fs.spatial_group == fs.in_channels else fs.spatial_group
        options.update(bands=list(fs.bands), lowfreq_att=fs.lowfreq_att, spatial_group=groups)
    if isinstance(layer, FADNeighborhoodAttention):
        options.update(freq_select_for=layer.freq_select_for)
        return options
    options.update(padding_mode=layer.padding_mode, sampling=layer.sampling)
    dr, offsets = layer.ada_dr, layer.free_offsets
    if dr is not None:
        options.update(dilation_act=dr.dilation_act, dilation_groups=dr.dilation_groups)
    if offsets is not None:
        options.update(offset_groups=offsets.offset_groups, modulated=offsets.modulated)
    return options


def lifted_layers(model: nn.Module) -> List[Dict[str, Any]]:
    """What was lifted: groups of layers with the same options, each `{'layers': [names], 'options': {...}}`."""
    groups: List[Dict[str, Any]] = []
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, FADC_LAYERS):
            options = layer_options(layer)
            group = next((g for g in groups if g['options'] == options), None)
            if group is None:
                groups.append(group := {'layers': [], 'options': options})
            group['layers'].append(name)
    return groups


def _lift(model: nn.Module, lifted: Sequence[Dict[str, Any]], names: Optional[Dict[str, str]] = None) -> None:
    """Lift the layers again; `names` maps their names to those in this model, without the layers that it lacks."""
    for group in lifted:
        layers = group['layers'] if names is None else [names[n] for n in group['layers'] if n in names]
        if not layers:
            continue
        # where it is not stored, it was no option yet, and every AdaKern had a BatchNorm
        options = {'ada_kern_norm': 'batchnorm2d', **read_options(group['options'])}
        report = lift_model(model, layers, **options)
        lost = sorted(set(layers) - set(report.replaced))
        if lost:
            raise RuntimeError(f'{type(model).__name__} has no layers that can be lifted at: {", ".join(lost)}.')


def _key_in(features: Dict[str, Any], key: str) -> Optional[str]:
    """The name in a feature network of what the whole network calls `key`, or None where it was cut off.

    timm's feature networks keep the name, hold the whole network under a name of their own, or flatten 'stages.0' to
    'stages_0'.
    """
    names = key, *(f'{network}.{key}' for network in ('model', 'body', 'graph_module')), key.replace('.', '_', 1)
    return next((name for name in names if name in features), None)


def _fill_features(net: nn.Module, model: nn.Module, lifted: Sequence[Dict[str, Any]]) -> nn.Module:
    """Lift the feature network of the base, and give it the parameters of the whole network."""
    modules = dict(net.named_modules(remove_duplicate=False))
    found = {n: _key_in(modules, n) for group in lifted for n in group['layers']}
    _lift(net, lifted, {n: inside for n, inside in found.items() if inside is not None})
    own = net.state_dict()
    state = {inside: t for k, t in model.state_dict().items() if (inside := _key_in(own, k)) is not None}
    net.load_state_dict(state, strict=True)
    return net.train(model.training)


_FEATURE_ARGS = ('out_indices', 'feature_cls', 'output_fmt')


def _check_lifted(base: Any, lifted: Any, kwargs: Dict[str, Any]) -> None:
    if not base or not lifted:
        raise TypeError(
            f'{ARCHITECTURE} is the architecture of the folders that fadc_timm.save writes: fadc_timm.load(FOLDER) '
            "builds it. For another network: timm.create_model('NAME'), then fadc_timm.lift_model.")
    if not is_model(base):
        raise RuntimeError(f'This version of timm has no model {base}, of which the lifted network was made.')
    stored = [name for name in kwargs if name in OPTIONS or name in ATTENTION_OPTIONS]
    if stored:
        raise TypeError(f'A lifted network takes no {", ".join(stored)}: the options of its layers stand in its '
                        'config.json, under "lifted". Of these options only backend can be given.')


@register_model
def fadc_lifted(
        pretrained: bool = False,
        *,
        base: str = '',
        lifted: Sequence[Dict[str, Any]] = (),
        backend: Optional[str] = None,
        **kwargs: Any,
) -> nn.Module:
    """A network of timm with lifted convolutions, as config.json describes it.

    Args:
        pretrained: Load the weights of `pretrained_cfg`.
        base: Name of timm's architecture.
        lifted: The layers and their options, see :func:`lifted_layers`.
        backend: Backend of the layers' operator, None to choose.
        **kwargs: Arguments of the base and of timm's builder, `features_only` too.

    Raises:
        DownloadError: The weights are on the Hub, and could not be downloaded or are damaged.
        RuntimeError: This timm lacks the base or one of its layers, or the weights do not fit.
        TypeError: `base` or `lifted` is missing, or an argument is an option of the layers other than backend.
        ValueError: The layers have no such backend.
    """
    _check_lifted(base, lifted, kwargs)
    if backend is not None:
        lifted = [{**group, 'options': {**group['options'], 'backend': backend}} for group in lifted]
    given = {name: kwargs.pop(name, None) for name in ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir')}
    features_only = kwargs.pop('features_only', False)
    feature_args = {name: kwargs.pop(name) for name in _FEATURE_ARGS if features_only and name in kwargs}

    def build(**args: Any) -> nn.Module:
        model = model_entrypoint(base)(pretrained=False, **args)
        _lift(model, lifted)
        return model

    def check(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
        own = model.state_dict()
        cfg: Any = model.pretrained_cfg
        check_keys(state_dict, own, f'does not fit the lifted {base}', cfg.get('classifier'))
        check_values(state_dict, own)
        if not features_only:
            settle_head(state_dict, model)
        return state_dict

    net = None
    if features_only:  # before a download, as the arguments may be wrong
        cfg_args = {k: v for k, v in given.items() if k != 'cache_dir'}
        net = model_entrypoint(base)(pretrained=False, features_only=True, **kwargs, **cfg_args, **feature_args)
    if pretrained:
        cfg = resolve_pretrained_cfg(base, given['pretrained_cfg'], given['pretrained_cfg_overlay'])
        check_source(cfg)
        with checked_download(cfg, given['cache_dir']):
            model = build_model_with_cfg(build, base, True, pretrained_filter_fn=check, **given, **kwargs)
    else:
        model = build_model_with_cfg(build, base, False, **given, **kwargs)
    return model if net is None else _fill_features(net, model, lifted)
