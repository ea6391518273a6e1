"""Deriving a family from timm's: architectures, pretrained tags and Hub ids come from timm's registry.

`<base>_fadc` is built by the base's own entry point and lifted; a checkpoint of the base loads into it. A family may
have more variants, such as `<base>_dcn`: another ending of the name, and other options of the layers.
"""
import difflib
import re
import sys
import warnings
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import timm
from timm.models import DefaultCfg, PretrainedCfg, build_model_with_cfg, model_entrypoint
from torch import Tensor, nn

from ..layers import FADC_LAYERS
from ..layers.fad_conv import OPTIONS, PARTS, read_options
from ._checkpoint import settle_head
from ._download import build_checked
from .lift import DEFAULT_STAGES, lift_model

__all__ = [
    'DCN', 'DCN_FADC', 'FADC', 'FADC_ATTENTION', 'Architecture', 'Family', 'Paper', 'Variant', 'architecture_name',
    'architecture_of', 'create', 'derive_default_cfgs', 'derive_entrypoints', 'fadc_keys', 'family_of',
    'list_architectures']

StateDict = Dict[str, Tensor]


class Paper(NamedTuple):
    """A paper: its title, its address, and its BibTeX entry."""
    title: str
    address: str
    citation: str


class Variant(NamedTuple):
    """What is lifted into each base of a family.

    suffix: What the base's name gets.
    options: Of the layers, where they differ from their defaults.
    name: In words, as the entry points and the model card have it.
    effect: What its layers do, as the model card says it.
    tags: Its tags on the Hub.
    papers: The papers on it.
    """
    suffix: str
    options: Dict[str, Any]
    name: str
    effect: str
    tags: Tuple[str, ...]
    papers: Tuple[Paper, ...]


_FADC_PAPER = Paper(
    'Frequency-Adaptive Dilated Convolution for Semantic Segmentation', 'https://arxiv.org/abs/2403.05369',
    '''@inproceedings{chen2024frequency,
  title     = {Frequency-Adaptive Dilated Convolution for Semantic Segmentation},
  author    = {Chen, Linwei and Gu, Lin and Zheng, Dezhi and Fu, Ying},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2024}
}''')
_DCN_PAPER = Paper(
    'Deformable ConvNets v2: More Deformable, Better Results', 'https://arxiv.org/abs/1811.11168',
    '''@inproceedings{zhu2019deformable,
  title     = {Deformable {ConvNets} v2: More Deformable, Better Results},
  author    = {Zhu, Xizhou and Hu, Han and Lin, Stephen and Dai, Jifeng},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2019}
}''')

FADC = Variant(
    suffix='_fadc',
    options={},
    name='Frequency-Adaptive Dilated Convolution (FADC)',
    effect='layers that predict their dilation at every position',
    tags=('fadc', 'dilated-convolution'),
    papers=(_FADC_PAPER,),
)
# The same in neighbourhood attention, which has no taps to dilate.
FADC_ATTENTION = FADC._replace(
    name="FADC's Frequency Selection (FreqSelect)",
    effect='layers that weigh the frequency bands of their input at every position',
    tags=('fadc', 'neighborhood-attention'),
)
DCN = Variant(
    suffix='_dcn',
    options=dict(sampling='deform', freq_select=False, kernel_decompose='none'),
    name='modulated deformable convolution (DCNv2)',
    effect='layers that predict an offset and a weight for each tap at every position',
    tags=('deformable-convolution',),
    papers=(_DCN_PAPER,),
)
DCN_FADC = Variant(
    suffix='_dcn_fadc',
    options=dict(sampling='deform'),
    name="modulated deformable convolution (DCNv2) with FADC's AdaKern and FreqSelect",
    effect='layers that predict an offset and a weight for each tap at every position, and adapt their kernel and the '
           'spectrum of their input to the image',
    tags=('fadc', 'deformable-convolution'),
    papers=(_DCN_PAPER, _FADC_PAPER),
)


class Family(NamedTuple):
    """What timm's registry does not say about one of its families.

    module: Name of timm's module.
    base_cls: Class of its models.
    fadc_cls: Our subclass of it, which the lifted models are.
    stages: Names of the modules of the four stages.
    checkpoint_filter_fn: As in timm, for a state dict and a model.
    feature_cfg: timm's defaults for features_only.
    place: Where FADC is, as the model card has it: 'in place of the 3x3 convolutions'.
    citation: BibTeX entry of the paper on the base.
    headless_tags: Pretrained tags whose weights end before the head.
    head_norm: Name of the norm before the classifier that these weights, and those of a backbone alone, lack too, or
        None.
    variants: What is lifted into each base.
    options: Options of the layers.
    owner: Whose models the bases are.
    """
    module: str
    base_cls: Type[nn.Module]
    fadc_cls: Type[nn.Module]
    stages: Tuple[str, ...]
    checkpoint_filter_fn: Callable[[StateDict, nn.Module], StateDict]
    feature_cfg: Dict[str, Any]
    place: str
    citation: str
    headless_tags: Tuple[str, ...] = ()
    head_norm: Optional[str] = None
    variants: Tuple[Variant, ...] = (FADC,)
    options: Tuple[str, ...] = OPTIONS
    owner: str = "timm's"

    def bases(self) -> List[str]:
        """Names of the architectures of the family, as timm's registry has them."""
        return timm.list_models(module=self.module)


def _with_hub_id(cfg: PretrainedCfg, architecture: str, tag: str) -> PretrainedCfg:
    """A configuration whose Hub id `timm/` is completed, as timm's registry completes it."""
    if cfg.hf_hub_id != 'timm/':
        return cfg
    return replace(cfg, hf_hub_id='timm/' + (f'{architecture}.{tag}' if tag else architecture))


def derive_default_cfgs(
        family: Family,
        own: Optional[Dict[str, Dict[str, PretrainedCfg]]] = None,
) -> Dict[str, DefaultCfg]:
    """Default configurations of our architectures: the tags of the base in their order, and its weights, Hub ids
    included.

    Args:
        family: The family.
        own: For an architecture, tags with weights of our own, which come before the base's.
    """
    out = {}
    # those of the base's module, as timm's registry copies each configuration that it is asked for
    default_cfgs = sys.modules[family.base_cls.__module__].default_cfgs
    for base in family.bases():
        default = default_cfgs.get(base, DefaultCfg())
        of_base = {tag: _with_hub_id(default.cfgs[tag], base, tag) for tag in default.tags}
        for variant in family.variants:
            arch = base + variant.suffix
            cfgs = dict((own or {}).get(arch, {}))
            cfgs.update(of_base)
            if cfgs:
                has_weights = any(cfg.has_weights for cfg in cfgs.values())
                out[arch] = DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=has_weights)
    return out


class Architecture(NamedTuple):
    """An architecture of this package.

    name: As registered with timm.
    base: timm's architecture that is lifted.
    family: The family of the base.
    variant: What is lifted into the base.
    """
    name: str
    base: str
    family: Family
    variant: Variant


# The architectures by their names.
_architectures: Dict[str, Architecture] = {}


def list_architectures() -> List[Architecture]:
    """All architectures of this package, by family and variant, in the order of their bases."""
    return list(_architectures.values())


def architecture_of(name: str) -> Optional[Architecture]:
    """The architecture of a model of this package, whose name may have a tag; None for any other name."""
    return _architectures.get(name.partition('.')[0])


def architecture_name(model: nn.Module) -> str:
    """The name by which timm knows a model."""
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    return cfg.get('architecture') or type(model).__name__


def family_of(model: nn.Module) -> Family:
    """The family of an FADC model.

    Raises:
        ValueError: The model is of none of our families.
    """
    for family in {id(a.family): a.family for a in _architectures.values()}.values():
        if isinstance(model, family.fadc_cls):
            return family
    raise ValueError(f'{type(model).__name__} is no FADC model of this package; they are listed by: fadc-timm list')


def _check_stages(family: Family, fadc_stages: Sequence[bool]) -> Tuple[str, ...]:
    n = len(family.stages)
    if not isinstance(fadc_stages, (list, tuple)) or len(fadc_stages) != n or \
            not all(isinstance(s, bool) for s in fadc_stages):
        raise ValueError(f'fadc_stages must be {n} booleans, one for each stage, got {fadc_stages!r}.')
    return tuple(name for name, on in zip(family.stages, fadc_stages, strict=True) if on)


def _unknown_argument(arch: Architecture, name: str) -> str:
    ours = ('fadc_stages', *arch.family.options)
    close = difflib.get_close_matches(name, ours, n=1)
    return (f'{arch.name} has no argument {name!r}{f"; the closest is {close[0]!r}" if close else ""}. '
            f'Beside the arguments of {arch.base} it has {", ".join(ours)}.')


def _build_lifted(
        arch: Architecture,
        fadc_stages: Sequence[bool] = DEFAULT_STAGES,
        **kwargs: Any,
) -> nn.Module:
    """Build the base by its own entry point, lift it, and make it one of our class."""
    base, family = arch.base, arch.family
    stages = _check_stages(family, fadc_stages)
    options = {**arch.variant.options, **{name: kwargs.pop(name) for name in family.options if name in kwargs}}
    try:
        model = model_entrypoint(base)(pretrained=False, **kwargs)
    except TypeError as e:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(e))
        if found is None or found[1] not in kwargs:
            raise
        raise TypeError(_unknown_argument(arch, found[1])) from e
    if type(model) is not family.base_cls:
        raise TypeError(f'timm builds {base} as {type(model).__name__}, not as {family.base_cls.__name__}.')
    model.__class__ = family.fadc_cls
    parent = family.stages[0].rpartition('.')[0]
    built = len(list(model.get_submodule(parent).children())) if parent else len(family.stages)
    if built != len(family.stages):
        raise ValueError(f'{arch.name} has {len(family.stages)} stages, got {built}. For another network: lift_model '
                         f'on {base}.')
    if stages:
        lift_model(model, stages, **options)
    return model


def _with_options_of_today(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments in which the options have the names of today, as a config.json may have been written before.

    timm mixes the options of a config.json with those of the call, and so does transformers.
    """
    stored: Mapping[str, Any] = kwargs.get('pretrained_model_args') or {}
    if 'ada_dr' in kwargs and 'ada_dr' not in stored:
        warnings.warn("The option ada_dr is now sampling: 'dilation' is with AdaDR, 'fixed' without it.",
                      FutureWarning, stacklevel=2)
    kwargs = read_options(kwargs)
    if stored:
        kwargs['pretrained_model_args'] = read_options(stored)
    return kwargs


def create(arch: Architecture, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build an architecture of this package.

    Args:
        arch: The architecture.
        pretrained: Load weights: the base's, with FADC as the identity, or those of an FADC model.
        **kwargs: Arguments of the base, of timm's builder, `fadc_stages` (four booleans), options of the layers.

    Raises:
        DownloadError: The weights are on the Hub, and could not be downloaded or are damaged.
        FileNotFoundError: There is no such checkpoint.
        RuntimeError: The checkpoint is cut off, or holds other keys or values than the model's, or a head of another
            number of classes than the model, which was not told one.
        TypeError: There is no argument of a name; the message names FADC's options.
        ValueError: An option has a value that is not one of its own.
    """
    family, name = arch.family, arch.name
    kwargs = _with_options_of_today(kwargs)
    if kwargs.get('pretrained_cfg') in family.headless_tags:
        # as timm does for its ConvNeXt V2
        kwargs.setdefault('pretrained_strict', False)
    features_only = bool(kwargs.get('features_only'))

    def filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
        state_dict = family.checkpoint_filter_fn(state_dict, model)
        if not features_only:
            settle_head(state_dict, model)
        return state_dict

    def build(pretrained: bool) -> nn.Module:
        return build_model_with_cfg(
            partial(_build_lifted, arch), name, pretrained, pretrained_filter_fn=filter_fn,
            feature_cfg=dict(family.feature_cfg), **kwargs)

    return build_checked(build, name, pretrained, kwargs)


_HELP = """{owner} {base} with {variant} in its stages 2 to 4.

Args:
    pretrained: Load weights: the base's, with FADC as the identity, or those of an FADC model.
    **kwargs: Arguments of {base} and of timm's builder; `fadc_stages`, four booleans that say which of the stages
        have such layers; and the options of :class:`fadc_timm.layers.{layer}`, such as `freq_select` and `backend`.
"""


def _entrypoint(arch: Architecture) -> Callable[..., nn.Module]:
    """The entry point of an architecture: it has the name, the module and the docstring of one that is written out."""
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(arch, pretrained, **kwargs)

    family = arch.family
    entrypoint.__name__ = entrypoint.__qualname__ = arch.name
    entrypoint.__module__ = family.fadc_cls.__module__
    entrypoint.__doc__ = _HELP.format(
        owner=family.owner, base=arch.base, variant=arch.variant.name,
        layer='FADConv2d' if family.options is OPTIONS else 'FADNeighborhoodAttention')
    return entrypoint


def derive_entrypoints(family: Family) -> Iterator[Callable[..., nn.Module]]:
    """An entry point `<base>_fadc(pretrained=False, **kwargs)` for each base, to be registered with timm; likewise for
    the other variants.
    """
    for variant in family.variants:
        for base in family.bases():
            arch = Architecture(base + variant.suffix, base, family, variant)
            _architectures[arch.name] = arch
            yield _entrypoint(arch)


def fadc_keys(model: nn.Module) -> List[str]:
    """Names in the state dict of the parameters and buffers that FADC adds to the base."""
    modules = [name for name, m in model.named_modules() if isinstance(m, FADC_LAYERS)]
    return [f'{name}.{key}' for name in modules for key in model.get_submodule(name).state_dict()
            if key.partition('.')[0] in PARTS]
