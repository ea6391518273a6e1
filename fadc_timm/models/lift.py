"""Lifting: walk the stages of a network and let a FADConv2d take over each k x k convolution; or, where there is
neighbourhood attention, a FADNeighborhoodAttention each of these."""
import logging
from collections import Counter
from collections.abc import Sequence as SequenceABC
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple, Type, Union

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..layers import FADC_LAYERS, FADConv2d, FADNeighborhoodAttention, NeighborhoodAttention
from ..layers.fad_conv import OPTIONS, PARTS, refuse_old_options
from ..layers.neighborhood_attention import ATTENTION_OPTIONS
from ._folding import keep_unfolded

__all__ = ['DEFAULT_STAGES', 'KINDS', 'Kind', 'LiftReport', 'NothingToLift', 'lift_model', 'liftable_names']

_logger = logging.getLogger(__name__)

_FADC = (*FADC_LAYERS, *PARTS.values())


class Kind(NamedTuple):
    """Layers that are lifted.

    plain: Their class; subclasses may compute something else, and are left.
    lifted: The class that takes them over.
    lift: Makes a layer of that class out of a plain one and options.
    options: Its options.
    name: What the plain ones are called, in the plural.
    """
    plain: Type[nn.Module]
    lifted: Type[nn.Module]
    lift: Callable[..., nn.Module]
    options: Tuple[str, ...]
    name: str


_CONVOLUTIONS = Kind(nn.Conv2d, FADConv2d, FADConv2d.from_conv, OPTIONS, 'convolutions')
_ATTENTIONS = Kind(
    NeighborhoodAttention, FADNeighborhoodAttention, FADNeighborhoodAttention.from_attention, ATTENTION_OPTIONS,
    'neighbourhood attentions')
# Where a network has several of these, the first kind is lifted.
KINDS = (_ATTENTIONS, _CONVOLUTIONS)
_PLAIN = tuple(kind.plain for kind in KINDS)

# Stages 2 to 4, as in the paper.
DEFAULT_STAGES = (False, True, True, True)

Stages = Union[Sequence[bool], Sequence[str]]


class LiftReport(NamedTuple):
    """What :func:`lift_model` did.

    replaced: Names of the convolutions that are FADConv2d now, or of the neighbourhood attentions that are
        FADNeighborhoodAttention.
    left: Name and reason of each other `nn.Conv2d`, subclasses too, and of each other neighbourhood attention.
    """
    replaced: Tuple[str, ...]
    left: Dict[str, str]

    def __str__(self) -> str:
        lines = [f'replaced {len(self.replaced)} layers: {", ".join(self.replaced) or "none"}']
        reasons: Dict[str, List[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f'left {len(names)} layers ({reason}): {", ".join(names)}' for reason, names in reasons.items()]
        return '\n'.join(lines)


class NothingToLift(ValueError):
    """The network, or the part of it that was selected, has no layer that FADC can take over."""


def _names(model: nn.Module) -> List[str]:
    """Names of all modules; a module that stands in two places has both names."""
    return [name for name, _ in model.named_modules(remove_duplicate=False)]


def _place(model: nn.Module, name: str) -> Tuple[nn.Module, str]:
    """Where a module stands: its parent, which may have several names, and its name in it."""
    parent, _, child = name.rpartition('.')
    return model.get_submodule(parent), child


def _parts(model: nn.Module) -> Set[nn.Module]:
    """What FADC is made of: its layers are none of the network's."""
    return {part for m in model.modules() if isinstance(m, _FADC) for part in m.modules() if part is not m}


def _norm_of(model: nn.Module) -> str:
    """AdaKern's norm for a network: a BatchNorm where the network has some, frozen ones too; else one per image."""
    parts = _parts(model)
    kinds = (m for m in model.modules() if m not in parts and not isinstance(m, _InstanceNorm))
    has_batch_norm = any(isinstance(m, _BatchNorm) or 'running_mean' in m._buffers for m in kinds)
    return 'batchnorm2d' if has_batch_norm else 'layernorm2d'


def liftable_names(model: nn.Module) -> List[str]:
    """Names of the plain layers that FADC could take over."""
    parts = _parts(model)
    return [name for name, m in model.named_modules(remove_duplicate=False)
            if isinstance(m, _PLAIN) and _why_left(m, parts) is None and _why_misfit(m) is None]


def _tops(names: Iterable[str]) -> str:
    """The top modules of some modules, as a text."""
    return ', '.join(dict.fromkeys(name.partition('.')[0] for name in names))


def _name_the_stages(model: nn.Module) -> str:
    return f'give stages as names of modules, of which these have layers to lift: {_tops(liftable_names(model))}'


def _stages_of(model: nn.Module) -> List[Tuple[str, Tuple[str, ...]]]:
    """Each stage: its feature, and all modules after the feature before it in timm's feature_info.

    Each feature at stride 4 or more is a stage, whether or not a feature network puts it out. The modules at stride 2
    before the first stage are the stem. A feature network lacks what comes after its last output.
    """
    info = getattr(model, 'feature_info', None)
    if info is None:
        raise ValueError(f'{type(model).__name__} has no feature_info: {_name_the_stages(model)}.')
    features, outputs = (info, info) if isinstance(info, (list, tuple)) else (info.info, info.get_dicts())
    names = _names(model)
    order = {name: i for i, name in enumerate(names)}
    stages, start = [], 0
    for feature in features:
        # feature networks flatten 'stages.0' to 'stages_0'
        name = next((n for n in (feature['module'], feature['module'].replace('.', '_')) if n in order), None)
        if name is None and feature not in outputs:
            continue
        if name is None:
            raise ValueError(f'The feature {feature["module"]!r} of {type(model).__name__} is no module of it: '
                             f'{_name_the_stages(model)}.')
        end = max(i for n, i in order.items() if n == name or n.startswith(name + '.')) + 1
        if feature['reduction'] >= 4:
            stages.append((name, tuple(names[start:end])))
        start = max(start, end)
    return stages


def _selected(model: nn.Module, stages: Stages) -> Set[str]:
    """Names of all modules in the selected stages."""
    if isinstance(stages, str) or not isinstance(stages, SequenceABC):
        raise ValueError(f'stages must be a sequence of names or booleans, got {stages!r}.')
    if stages and all(isinstance(s, str) for s in stages):
        selected: Set[str] = set()
        for prefix in stages:
            inside = {n for n in _names(model) if prefix and (n == prefix or n.startswith(f'{prefix}.'))}
            if not inside:
                top = ', '.join(n for n, _ in model.named_children())
                raise ValueError(f'{type(model).__name__} has no module {prefix!r}; its top modules are {top}.')
            selected |= inside
        return selected
    if not all(isinstance(s, bool) for s in stages):
        raise ValueError(f'stages must be booleans, one for each stage, or names of modules, got {stages!r}.')
    found = _stages_of(model)
    if len(stages) != len(found):
        raise ValueError(
            f'{type(model).__name__} has {len(found)} stages, got {len(stages)} booleans: {stages!r}. The stages end '
            f'with {", ".join(name for name, _ in found)}; names of modules are taken too.')
    return {name for (_, stage), on in zip(found, stages, strict=True) if on for name in stage}


def _kind_of(module: nn.Module) -> Kind:
    return next(kind for kind in KINDS if isinstance(module, kind.plain))


def _why_left(module: nn.Module, parts: Set[nn.Module]) -> Optional[str]:
    plain = _kind_of(module).plain
    if module in parts:
        return 'a part of FADC'
    if isinstance(module, FADC_LAYERS):
        return f'a {type(module).__name__} already'
    if type(module) is not plain:
        name = 'nn.Conv2d' if plain is nn.Conv2d else plain.__name__
        return f'of class {type(module).__name__}, which may not compute what {name} computes'
    if isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1:
        return 'a 1x1 kernel, which has no taps to dilate'
    return None


def _why_misfit(module: nn.Module, **cfg: Any) -> Optional[str]:
    try:
        _kind_of(module).lift(module, **cfg)
    except ValueError as e:
        return str(e).rstrip('.')
    return None


def _check_has_layers(model: nn.Module) -> None:
    """Raise if a network has nothing to lift in any stage: then it does not matter how its stages are selected."""
    if any(isinstance(m, NeighborhoodAttention) for m in model.modules()):
        return
    parts = _parts(model)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m not in parts}
    for m in convs.values():
        # without building one, which would draw random numbers
        if isinstance(m, FADConv2d) or (_why_left(m, parts) is None and all(k % 2 for k in m.kernel_size)):
            return
    reasons = [f'{n}: {_why_left(m, parts) or _why_misfit(m)}' for n, m in convs.items() if max(m.kernel_size) > 1]
    left = '; '.join(reasons[:3]) + ('; ...' if len(reasons) > 3 else '')
    raise NothingToLift(
        f'{type(model).__name__} has no k x k convolution that FADC can take over{left and f" ({left})"}. '
        'FreqSelect works without one: fadc_timm.FreqSelect(C) takes a map (B, C, H, W) and returns one of the same '
        'shape, for instance before an attention, and starts as the identity.')


def _selected_kind(model: nn.Module, selected: Set[str], cfg: Dict[str, Any]) -> Kind:
    """The kind of layers that is lifted in a part of a network.

    Raises:
        TypeError: An option is none of its options.
    """
    parts = _parts(model)
    modules = [m for n, m in model.named_modules(remove_duplicate=False) if n in selected and m not in parts]
    found = next((kind for kind in KINDS if any(isinstance(m, kind.plain) for m in modules)), _CONVOLUTIONS)
    unknown = sorted(set(cfg) - set(found.options))
    if unknown:
        raise TypeError(f'lift_model got unknown options {", ".join(unknown)}; {found.lifted.__name__} has '
                        f'{", ".join(found.options)}.')
    return found


def lift_model(model: nn.Module, stages: Stages = DEFAULT_STAGES, **cfg: Any) -> LiftReport:
    """Let FADConv2d take over the k x k convolutions of a network, in place. The network computes the same as before.

    Where the selected stages have neighbourhood attention (:class:`fadc_timm.layers.NeighborhoodAttention`),
    FADNeighborhoodAttention takes over that, and the convolutions between stay.

    Args:
        model: Any network of these. Its other modules and the names of its parameters stay as they are. Blocks that
            `timm.utils.reparameterize_model` would fold are left unfolded where they hold what was lifted.
        stages: Booleans, one for each feature of timm's `feature_info` at stride 4 or more (four in most networks);
            or names of modules, which select everything inside of them.
        **cfg: Options of FADConv2d; `sampling='deform'` makes deformable convolutions. Or options of
            FADNeighborhoodAttention. By default AdaKern has a BatchNorm where the network has some, and else a norm per
            image (`ada_kern_norm='layernorm2d'`).

    Returns:
        Which layers were replaced, and which were left and why.

    Raises:
        TypeError: model is no module, or an option is none of the layers'.
        NothingToLift: The network, or what was selected of it, has no layer that FADC can take over. It is a
            ValueError.
        ValueError: The stages do not fit the model, or an option has a value that the layers refuse. The model is left
            as it was, as by all errors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'lift_model wants a module, got {type(model).__name__}.')
    refuse_old_options(cfg)
    unknown = sorted(set(cfg) - set(OPTIONS) - set(ATTENTION_OPTIONS))
    if unknown:
        raise TypeError(f'lift_model got unknown options {", ".join(unknown)}; FADConv2d has {", ".join(OPTIONS)}.')
    _check_has_layers(model)
    selected = _selected(model, stages)
    kind = _selected_kind(model, selected, cfg)
    cfg.setdefault('ada_kern_norm', _norm_of(model))
    replaced: Dict[str, nn.Module] = {}
    left: Dict[str, str] = {}
    lifted: Dict[nn.Module, nn.Module] = {}  # a layer that stands in two places stays one module
    parts = _parts(model)
    inside = {_place(model, name) for name in selected if name}
    for name, m in model.named_modules(remove_duplicate=False):
        if not isinstance(m, _PLAIN):
            continue
        reason = _why_left(m, parts) if _place(model, name) in inside else 'outside of the selected stages'
        if reason is None and not isinstance(m, kind.plain):
            reason = f'beside {kind.name}, which are lifted'
        if reason is None and m not in lifted:
            try:
                lifted[m] = kind.lift(m, **cfg)
            except ValueError as e:
                # either the layer does not fit, and is left, or an option is wrong
                reason = _why_misfit(m, **({'padding_mode': 'zeros'} if 'padding_mode' in cfg else {}))
                if reason is None:
                    raise ValueError(f'{name}: {e}') from e
        if reason is not None:
            left[name] = reason
        else:
            replaced[name] = lifted[m]
    report = LiftReport(tuple(replaced), left)
    if selected and not replaced:
        reasons = Counter(reason for name, reason in left.items() if name in selected)
        what = '; '.join(f'{number} layers are left ({reason})' for reason, number in reasons.items())
        elsewhere = _tops(n for n in liftable_names(model) if n not in selected)
        raise NothingToLift(
            f'Nothing was lifted in {type(model).__name__} with stages={stages!r}: '
            f'{what or "there are no layers for it in them"}. '
            f'{f"There are layers to lift in {elsewhere}." if elsewhere else ""}'.rstrip())
    synced = next((m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)), None)
    for name, new in replaced.items():
        if synced is not None:  # AdaKern's BatchNorms too
            nn.SyncBatchNorm.convert_sync_batchnorm(new, synced.process_group)
        setattr(*_place(model, name), new)
    keep_unfolded(model, replaced)
    _logger.debug('Lifted %s: %s', type(model).__name__, report)
    return report
