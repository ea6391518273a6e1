"""Initial weights of a backbone: a tag of timm's, a local checkpoint, or one of the authors of FADC."""
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor, nn

from fadc_timm.checkpoints import RELEASES, convert, read_checkpoint
from scripts.training.variants import added_keys

_SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.tar')


@dataclass(frozen=True)
class Initial:
    """Weights of a backbone.

    source: Where they are from, in words.
    read: Gives them under timm's names; downloads what is not on this machine.
    lifted: They have parameters of FADC, so they are for a lifted backbone.
    options: Options of FADConv2d that they want.
    """
    source: str
    read: Callable[[], dict[str, Tensor]]
    lifted: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _is_lifted(state_dict: dict[str, Tensor]) -> bool:
    parts = ('.ada_dr.', '.ada_kern.', '.freq_select.', '.free_offsets.')
    return any(part in key for key in state_dict for part in parts)


def _download(name: str) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name, pretrained=True).state_dict()


def _is_file(init: str) -> bool:
    path = Path(init).expanduser()
    return path.suffix in _SUFFIXES or path.exists()


def _named(base: str, tag: str, variant: str) -> str:
    """timm's name of the model that has a tag's weights: the base or its FADC model, a dot, the tag."""
    fadc = f'{base}_fadc' if timm.is_model(f'{base}_fadc') else None
    own = {name.partition('.')[2]: name for name, cfg in get_arch_pretrained_cfgs(base).items() if cfg.has_weights}
    for name, cfg in get_arch_pretrained_cfgs(fadc).items() if fadc else ():
        if cfg.has_weights:
            own.setdefault(name.partition('.')[2], name)
    if tag == 'default':
        # what timm.create_model(..., pretrained=True) takes
        default = timm.get_pretrained_cfg(fadc if fadc and variant == 'fadc' else base)
        tag = default.tag or tag if default is not None and default.has_weights else tag
    if tag not in own:
        raise ValueError(f'{tag!r} is neither a file nor a tag of {base}, whose tags are {", ".join(own) or "none"}')
    return own[tag]


def normalisation_of(base: str, init: str, variant: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, of images in [0, 1], that initial weights expect.

    Args:
        base: Plain backbone.
        init: What `--init` names. A tag has its own; a file, or nothing, has those of the backbone.
        variant: Variant of the backbone.

    Raises:
        ValueError: There is no such tag.
    """
    name = base if not init or _is_file(init) else _named(base, init, variant)
    cfg = timm.get_pretrained_cfg(name)
    data = resolve_data_config({}, pretrained_cfg=cfg.to_dict() if cfg is not None else {})
    return list(data['mean']), list(data['std'])


def _from_file(base: str, path: Path, options: dict[str, Any]) -> Initial:
    checkpoint = read_checkpoint(path)
    where = f'{path}{f" ({checkpoint.entry})" if checkpoint.entry else ""}'
    if checkpoint.official:
        release = next((r for r, act in RELEASES.items() if act == options.get('dilation_act')), 'december2024')
        args = {k: v for k, v in options.items() if k not in ('dilation_act', 'padding_mode')}
        converted = convert(checkpoint, f'{base}_fadc', args, release)
        wanted = {'padding_mode': 'replicate', 'dilation_act': RELEASES[release]}
        return Initial(f'{where}, authors, {release}', converted.model.state_dict, True, wanted)
    return Initial(where, lambda: checkpoint.state_dict, _is_lifted(checkpoint.state_dict))


def find_init(base: str, init: str, variant: str, options: dict[str, Any]) -> Initial:
    """Find what `--init` names: a file is read, a tag is looked up, and nothing is downloaded yet.

    Args:
        base: Plain backbone.
        init: A tag of timm's (of the backbone, or of its FADC model), a file, or `default`: the tag that
            `timm.create_model` takes with `pretrained=True`, for the variant `fadc` that of the FADC model.
        variant: Variant of the backbone. A tag of an FADC model is for `fadc`. What a file has beyond the plain network
            must be what the variant has, as `load_backbone` checks.
        options: Options of FADConv2d; `dilation_act='relu'` says that a checkpoint of the authors is of April 2024.

    Raises:
        FileNotFoundError, RuntimeError: No such file, or it holds no weights.
        ValueError: There is no such tag, or the weights are of FADC and the variant has none of it.
    """
    if _is_file(init):
        initial = _from_file(base, Path(init).expanduser(), options)
    else:
        name = _named(base, init, variant)
        initial = Initial(name, partial(_download, name), name.partition('.')[0] != base)
    if initial.lifted and (variant in ('plain', 'dilation2') or variant != 'fadc' and not _is_file(init)):
        raise ValueError(f'{initial.source} has weights of FADC, for the variant fadc, not for {variant}')
    return initial


def options_for(base: str, init: str, variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of FADConv2d that initial weights want, under those that are given: what --eval builds without weights.

    Args:
        base: Plain backbone.
        init: What `--init` names.
        variant: Variant of the backbone.
        options: Options that are given.

    Raises:
        As `find_init`, for a file.
    """
    return {**find_init(base, init, variant, options).options, **options} if init and _is_file(init) else options


def load_backbone(net: nn.Module, initial: Initial) -> str:
    """Load weights into timm's feature network.

    Args:
        net: A `features_only` model, lifted if the weights are.
        initial: The weights.

    Returns:
        What was loaded and what was left, in words.

    Raises:
        RuntimeError: Keys of the network are missing, or keys of a module that it has are left over.
    """
    own, given = net.state_dict(), initial.read()
    # timm flattens the names of sequences in feature networks: stages.0 is stages_0
    names = {key: key if key in own else key.replace('.', '_', 1) for key in given}
    state_dict = {names[key]: value for key, value in given.items() if names[key] in own}
    optional = set() if initial.lifted else set(added_keys(net))
    missing = [key for key in own if key not in state_dict and key not in optional
               and not key.endswith('num_batches_tracked')]
    children = {name for name, _ in net.named_children()}
    left = [key for key, name in names.items() if name not in own]
    unexpected = [key for key in left if children & {key.partition('.')[0], names[key].partition('.')[0]}]
    if missing or unexpected:
        raise RuntimeError(
            f'{initial.source} does not fit the backbone: missing keys: {", ".join(missing) or "none"}; '
            f'unexpected keys: {", ".join(unexpected) or "none"}')
    net.load_state_dict({**own, **state_dict})
    heads = sorted({key.partition('.')[0] for key in left})
    return f'{initial.source}: {len(state_dict)} tensors' + (f', without {", ".join(heads)}' if heads else '')
