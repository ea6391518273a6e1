"""The backbones that are compared: a plain one, FADC piece by piece, and the same effort spent otherwise.

All of them are made in place from the plain backbone, and replace or change the same convolutions.
"""
import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import timm
from torch import nn

from fadc_timm import lift_model
from fadc_timm.layers import NeighborhoodAttention
from fadc_timm.layers.fad_conv import read_options
from fadc_timm.models._family import DCN, DCN_FADC, FADC, architecture_of, fadc_keys
from fadc_timm.models.lift import DEFAULT_STAGES, NothingToLift

# options of FADConv2d by variant
FADC_VARIANTS: dict[str, dict[str, Any]] = {
    'adadr': {'kernel_decompose': 'none', 'freq_select': False},
    'adadr_adakern': {'freq_select': False},
    'fadc': {},
    'dcnv2_fadc': {'sampling': 'deform'},
}
_LIFTED: dict[str, dict[str, Any]] = {
    **FADC_VARIANTS, 'dcnv2': {'sampling': 'deform', 'kernel_decompose': 'none', 'freq_select': False}}
VARIANTS = ('plain', *_LIFTED, 'dilation2')
_BARE = {'sampling': 'fixed', 'kernel_decompose': 'none', 'freq_select': False}
_OWN = {FADC.suffix: 'fadc', DCN.suffix: 'dcnv2', DCN_FADC.suffix: 'dcnv2_fadc'}  # of our models


def split_name(backbone: str, variant: str) -> tuple[str, str]:
    """Plain backbone and variant of a name: `resnet50_fadc` is `resnet50` with the variant `fadc`, `resnet50_dcn` and
    `resnet50_dcn_fadc` are that with `dcnv2` and `dcnv2_fadc`.

    Raises:
        ValueError: timm has no such backbone; or a model of ours is to become another variant.
    """
    base, _, tag = backbone.partition('.')
    if tag:
        raise ValueError(f'{backbone!r} names a tag of weights: give --backbone {base} --init {tag}')
    arch = architecture_of(base)
    if arch is not None:
        own = _OWN[arch.variant.suffix]
        if variant not in ('plain', own):
            raise ValueError(f'{backbone} is the variant {own}: give --backbone {arch.base}')
        base, variant = arch.base, own
    if not timm.is_model(base):
        close = ', '.join(timm.list_models(f'*{base}*')[:5])
        raise ValueError(f'timm has no model {base!r}{f"; close to it are {close}" if close else ""}')
    return base, variant


def stage_names(net: nn.Module) -> list[tuple[bool, ...] | tuple[str, ...]]:
    """How `lift_model` is told each of the stages 2 to 4, those of them that the network has."""
    info = net.feature_info
    features = [f for f in info.get_dicts() if f['reduction'] >= 4]  # type: ignore[union-attr, operator]
    n = len(DEFAULT_STAGES)
    if len(features) == n and len(info.out_indices) >= n:  # type: ignore[arg-type, union-attr]
        return [tuple(i == stage for i in range(n)) for stage in range(n) if DEFAULT_STAGES[stage]]
    # a backbone that was cut off, as some decoders want it
    names = [name.replace('.', '_') if not hasattr(net, name) else name
             for name, r in zip(info.module_name(), info.reduction()) if r >= 4]  # type: ignore[union-attr, operator]
    return [(name,) for name in names[1:]]


def _read_old_offsets(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Rename what checkpoints of `dcnv2` had while its module belonged to the scripts; the outputs are the same."""
    for name in ('weight', 'bias'):
        old = f'{prefix}offset.{name}'
        if old in state_dict:
            state_dict[f'{prefix}free_offsets.conv.{name}'] = state_dict.pop(old)


def apply_variant(
        net: nn.Module,
        variant: str,
        fadc: dict[str, Any] | None = None,
        freq_select_stages: Sequence[int] = (2, 3, 4),
) -> list[str]:
    """Turn a plain backbone into a variant, in place.

    Args:
        net: Backbone of timm, with `feature_info`.
        variant: One of `VARIANTS`.
        fadc: More options of FADConv2d, for the variants of FADC; maybe from a configuration, under older names.
        freq_select_stages: Stages, of 2 to 4, in which the variants `fadc` and `dcnv2_fadc` have FreqSelect.

    Returns:
        Names of the layers that are others now.

    Raises:
        ValueError: There is no such variant, an option is given to a variant without FADC, there is nothing to replace,
            or the variant is none of a network of attention.
    """
    if variant not in VARIANTS:
        raise ValueError(f'There is no variant {variant!r}: the variants are {", ".join(VARIANTS)}.')
    if variant not in FADC_VARIANTS and fadc:
        raise ValueError(f'The variant {variant!r} has no FADC, which the options {", ".join(fadc)} are for.')
    if set(freq_select_stages) - {2, 3, 4}:
        raise ValueError(f'freq_select_stages must be among 2, 3 and 4, got {list(freq_select_stages)}.')
    if variant == 'plain':
        return []
    if variant != 'fadc' and any(isinstance(m, NeighborhoodAttention) for m in net.modules()):
        raise ValueError(f'The variant {variant!r} is for convolutions, and {type(net).__name__} has neighbourhood '
                         "attention: its variants are 'plain' and 'fadc'.")
    stages = stage_names(net)
    names: list[str] = []
    if variant in _LIFTED:
        options = {**_LIFTED[variant], **read_options(fadc or {})}
        for number, stage in enumerate(stages, start=2):
            without = {} if number in freq_select_stages else {'freq_select': False}
            with suppress(NothingToLift):  # some networks have convolutions in some of their stages only
                names += lift_model(net, stage, **{**options, **without}).replaced
        for name in names if variant == 'dcnv2' else ():
            net.get_submodule(name).register_load_state_dict_pre_hook(_read_old_offsets)
    else:
        trial = copy.deepcopy(net)
        for stage in stages:
            with suppress(NothingToLift):
                names += lift_model(trial, stage, **_BARE).replaced
        for name in names:
            conv: Any = net.get_submodule(name)
            # that keeps the size: k // 2 pixels more for each pixel of dilation more
            more = [k // 2 * d for k, d in zip(conv.kernel_size, conv.dilation)]
            conv.padding = tuple(p + m for p, m in zip(conv.padding, more))
            conv.dilation = tuple(2 * d for d in conv.dilation)
    if not names:
        raise ValueError(f'{type(net).__name__} has no convolutions in its stages 2 to 4 that {variant!r} replaces.')
    return names


def added_keys(model: nn.Module) -> list[str]:
    """Names in the state dict of what a variant added to the plain network."""
    return fadc_keys(model)
