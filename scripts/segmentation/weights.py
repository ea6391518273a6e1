"""Initial weights of a backbone: a tag of timm's, a local checkpoint, or one of the authors of FADC."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor, nn

from fadc_timm.checkpoints import RELEASES, convert, read_checkpoint
from scripts.segmentation.variants import added_keys

_SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.tar')


@dataclass(frozen=True)
class Initial:
    """Weights of a backbone.

    state_dict: Under timm's names.
    source: Where it is from, in words.
    lifted: It has parameters of FADC, so it is for a lifted backbone.
    options: Options of FADConv2d that it wants.
    """
    state_dict: dict[str, Tensor]
    source: str
    lifted: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _is_lifted(state_dict: dict[str, Tensor]) -> bool:
    return any(part in key for key in state_dict for part in ('.ada_dr.', '.ada_kern.', '.freq_select.'))


def _from_tag(base: str, tag: str) -> Initial:
    own = {name.partition('.')[2]: name for name, cfg in get_arch_pretrained_cfgs(base).items() if cfg.has_weights}
    for name, cfg in get_arch_pretrained_cfgs(f'{base}_fadc').items() if timm.is_model(f'{base}_fadc') else ():
        if cfg.has_weights:
            own.setdefault(name.partition('.')[2], name)
    if tag == 'default' and own:
        tag = next(iter(own))
    if tag not in own:
        raise ValueError(f'{tag!r} is neither a file nor a tag of {base}, whose tags are {", ".join(own) or "none"}')
    model = timm.create_model(own[tag], pretrained=True)
    state_dict = model.state_dict()
    return Initial(state_dict, own[tag], _is_lifted(state_dict))


def _from_file(base: str, path: Path, options: dict[str, Any]) -> Initial:
    checkpoint = read_checkpoint(path)
    where = f'{path}{f" ({checkpoint.entry})" if checkpoint.entry else ""}'
    if checkpoint.official:
        release = next((r for r, act in RELEASES.items() if act == options.get('dilation_act')), 'december2024')
        args = {k: v for k, v in options.items() if k not in ('dilation_act', 'padding_mode')}
        converted = convert(checkpoint, f'{base}_fadc', args, release)
        wanted = {'padding_mode': 'replicate', 'dilation_act': RELEASES[release]}
        return Initial(converted.model.state_dict(), f'{where}, authors, {release}', True, wanted)
    return Initial(checkpoint.state_dict, where, _is_lifted(checkpoint.state_dict))


def read_init(base: str, init: str, variant: str, options: dict[str, Any]) -> Initial:
    """Read what `--init` names.

    Args:
        base: Plain backbone.
        init: A tag of timm's (of the backbone, or of its FADC model), `default` for the first, or a file.
        variant: Variant of the backbone; weights of FADC go with `fadc` only.
        options: Options of FADConv2d; `dilation_act='relu'` says that a checkpoint of the authors is of April 2024.

    Raises:
        FileNotFoundError, RuntimeError: No such file, or it holds no weights.
        ValueError: There is no such tag, or the weights are of FADC and the variant is another.
    """
    path = Path(init).expanduser()
    initial = _from_file(base, path, options) if path.suffix in _SUFFIXES or path.exists() else _from_tag(base, init)
    if initial.lifted and variant != 'fadc':
        raise ValueError(f'{initial.source} has weights of FADC, for the variant fadc, not for {variant}')
    return initial


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
    own = net.state_dict()
    # timm flattens the names of sequences in feature networks: stages.0 is stages_0
    names = {key: key if key in own else key.replace('.', '_', 1) for key in initial.state_dict}
    state_dict = {names[key]: value for key, value in initial.state_dict.items() if names[key] in own}
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
