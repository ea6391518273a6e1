"""Deriving a family from timm's: architectures, pretrained tags and Hub ids come from timm's registry.

`<base>_fadc` is built by the base's own entry point and lifted; a checkpoint of the base loads into it.
"""
import difflib
import re
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type

import timm
import torch
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    model_entrypoint,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from ..layers import FADConv2d
from ..layers.fad_conv import OPTIONS
from ._checkpoint import check_source, settle_head
from ._download import checked_download
from .lift import DEFAULT_STAGES, lift_model

__all__ = ['Family', 'create', 'derive_default_cfgs', 'derive_entrypoints', 'fadc_keys', 'family_of']

StateDict = Dict[str, Tensor]


class Family(NamedTuple):
    """What timm's registry does not say about one of its families.

    module: Name of timm's module.
    base_cls: Class of its models.
    fadc_cls: Our subclass of it, which the lifted models are.
    stages: Names of the modules of the four stages.
    checkpoint_filter_fn: As in timm, for a state dict and a model.
    feature_cfg: timm's defaults for features_only.
    kernel: The convolutions that FADC replaces, as the model card names them.
    citation: BibTeX entry of the paper on the base.
    headless_tags: Pretrained tags whose weights end before the head.
    head_norm: Name of the module before the classifier that these weights lack too, or None.
    """
    module: str
    base_cls: Type[nn.Module]
    fadc_cls: Type[nn.Module]
    stages: Tuple[str, ...]
    checkpoint_filter_fn: Callable[[StateDict, nn.Module], StateDict]
    feature_cfg: Dict[str, Any]
    kernel: str
    citation: str
    headless_tags: Tuple[str, ...] = ()
    head_norm: Optional[str] = None

    def bases(self) -> List[str]:
        """Names of timm's architectures of the family."""
        return timm.list_models(module=self.module)


def derive_default_cfgs(
        family: Family,
        own: Optional[Dict[str, Dict[str, PretrainedCfg]]] = None,
) -> Dict[str, DefaultCfg]:
    """Default configurations of `<base>_fadc`: the tags of the base in their order, and its weights, Hub ids included.

    Args:
        family: The family.
        own: For a base, tags with weights of our own, which come before the base's.
    """
    out = {}
    for base in family.bases():
        cfgs = dict((own or {}).get(base, {}))
        for name, cfg in get_arch_pretrained_cfgs(base).items():
            cfgs[name.partition('.')[2]] = replace(cfg, architecture=None, tag=None)
        if cfgs:
            has_weights = any(cfg.has_weights for cfg in cfgs.values())
            out[f'{base}_fadc'] = DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=has_weights)
    return out


# The families of which entry points were derived.
_families: List[Family] = []


def family_of(model: nn.Module) -> Family:
    """The family of an FADC model.

    Raises:
        ValueError: The model is of none of our families.
    """
    for family in _families:
        if isinstance(model, family.fadc_cls):
            return family
    raise ValueError(f'{type(model).__name__} is no FADC model of this package; they are listed by: fadc-timm list')


def _check_stages(family: Family, fadc_stages: Sequence[bool]) -> Tuple[str, ...]:
    n = len(family.stages)
    if not isinstance(fadc_stages, (list, tuple)) or len(fadc_stages) != n or \
            not all(isinstance(s, bool) for s in fadc_stages):
        raise ValueError(f'fadc_stages must be {n} booleans, one for each stage, got {fadc_stages!r}.')
    return tuple(name for name, on in zip(family.stages, fadc_stages, strict=True) if on)


def _unknown_argument(base: str, name: str) -> str:
    ours = ('fadc_stages', *OPTIONS)
    close = difflib.get_close_matches(name, ours, n=1)
    return (f'{base}_fadc has no argument {name!r}{f"; the closest is {close[0]!r}" if close else ""}. '
            f'Beside the arguments of {base} it has {", ".join(ours)}.')


def _build_lifted(
        family: Family,
        base: str,
        fadc_stages: Sequence[bool] = DEFAULT_STAGES,
        **kwargs: Any,
) -> nn.Module:
    """Build the base by its own entry point, lift it, and make it one of our class."""
    stages = _check_stages(family, fadc_stages)
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    try:
        model = model_entrypoint(base)(pretrained=False, **kwargs)
    except TypeError as e:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(e))
        if found is None or found[1] not in kwargs:
            raise
        raise TypeError(_unknown_argument(base, found[1])) from e
    if type(model) is not family.base_cls:
        raise TypeError(f'timm builds {base} as {type(model).__name__}, not as {family.base_cls.__name__}.')
    model.__class__ = family.fadc_cls
    if stages:
        lift_model(model, stages, **options)
    return model


def create(family: Family, base: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build `<base>_fadc`.

    Args:
        family: The family of the base.
        base: Name of timm's architecture.
        pretrained: Load weights: the base's, with FADC as the identity, or those of an FADC model.
        **kwargs: Arguments of the base, of timm's builder, `fadc_stages` (four booleans), options of FADConv2d.

    Raises:
        DownloadError: The weights are on the Hub, and could not be downloaded or are damaged.
        FileNotFoundError: There is no such checkpoint.
        RuntimeError: The checkpoint is cut off, or holds other keys or values than the model's, or a head of another
            number of classes than the model, which was not told one.
        TypeError: There is no argument of a name; the message names FADC's options.
        ValueError: An option has a value that is not one of its own.
    """
    if kwargs.get('pretrained_cfg') in family.headless_tags:
        # as timm does for its ConvNeXt V2
        kwargs.setdefault('pretrained_strict', False)
    name, features_only = f'{base}_fadc', bool(kwargs.get('features_only'))

    def filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
        state_dict = family.checkpoint_filter_fn(state_dict, model)
        if not features_only:
            settle_head(state_dict, model)
        return state_dict

    def build(pretrained: bool) -> nn.Module:
        return build_model_with_cfg(
            partial(_build_lifted, family, base), name, pretrained, pretrained_filter_fn=filter_fn,
            feature_cfg=dict(family.feature_cfg), **kwargs)

    if not pretrained:
        return build(False)
    cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    check_source(cfg)
    if features_only:  # timm looks at out_indices and the like only after it loaded the weights
        with torch.device('meta'):
            build(False)
    with checked_download(cfg, kwargs.get('cache_dir')):
        return build(True)


def derive_entrypoints(family: Family) -> Iterator[Callable[..., nn.Module]]:
    """An entry point `<base>_fadc(pretrained=False, **kwargs)` for each base, to be registered with timm."""
    _families.append(family)
    for base in family.bases():
        def entrypoint(pretrained: bool = False, *, _base: str = base, **kwargs: Any) -> nn.Module:
            return create(family, _base, pretrained, **kwargs)

        entrypoint.__name__ = entrypoint.__qualname__ = f'{base}_fadc'
        entrypoint.__module__ = family.fadc_cls.__module__
        entrypoint.__doc__ = f"timm's {base} with FADC convolutions in its stages 2 to 4."
        yield entrypoint


def fadc_keys(model: nn.Module) -> List[str]:
    """Names in the state dict of the parameters and buffers that FADC adds to the base."""
    modules = [name for name, m in model.named_modules() if isinstance(m, FADConv2d)]
    return [f'{name}.{key}' for name in modules for key in model.get_submodule(name).state_dict()
            if key not in ('weight', 'bias')]
