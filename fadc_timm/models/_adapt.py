"""Checkpoints of bases and of FADC models, as an FADC model loads them."""
import logging
import re
from contextlib import suppress
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from torch import Tensor, nn

from ..layers import FADC_LAYERS
from ._checkpoint import check_keys, check_values
from ._family import StateDict, architecture_name, fadc_keys, family_of

__all__ = ['LoadsBase', 'adapt_checkpoint']

_logger = logging.getLogger(__name__)


class _Part(NamedTuple):
    """A module of FADC in a layer: its title, the option that it is there by, and those that its sizes follow."""
    title: str
    option: str
    sizes: str


_PARTS = {
    'freq_select': _Part('FreqSelect', 'freq_select', 'bands, lowfreq_att and spatial_group'),
    'ada_kern': _Part('AdaKern', 'kernel_decompose', 'kernel_decompose'),
    'ada_dr': _Part('AdaDR', 'sampling', 'dilation_groups'),
    'free_offsets': _Part('free offsets', 'sampling', 'offset_groups and modulated'),
}


def _part_of(key: str) -> Optional[Tuple[str, str]]:
    """The layer and the module of FADC that a key belongs to, if any."""
    match = re.match(rf'(.+)\.({"|".join(_PARTS)})\.', key)
    return (match[1], match[2]) if match else None


def _with_statistics(keys: Sequence[str]) -> Set[str]:
    """The layers to which running statistics of AdaKern's norm belong."""
    return {m[1] for m in (re.fullmatch(r'(.+)\.ada_kern\.norm\.running_(mean|var)', k) for k in keys) if m}


def _explain(missing: List[str], unexpected: List[str], model: nn.Module, stages: Sequence[str]) -> str:
    """Which options of FADC differ between a checkpoint and a model, from the keys that do not match."""
    own = {name: m for name, m in model.named_modules() if isinstance(m, FADC_LAYERS)}
    batch_there = {layer for layer in _with_statistics(unexpected) if getattr(own.get(layer), 'ada_kern', None)}
    batch_here = {layer for layer in _with_statistics(missing) if f'{layer}.ada_kern.norm.weight' not in missing}
    missing, unexpected = (
        [k for k in keys if not _with_statistics([k]) & layers]
        for keys, layers in ((missing, batch_here), (unexpected, batch_there)))
    extra, lacking = ({part for part in map(_part_of, keys) if part} for keys in (unexpected, missing))
    plain_here = {layer for layer, _ in extra if layer not in own}
    added, absent = fadc_keys(model), set(missing)
    plain_there = {layer for layer, _ in lacking if all(
        k in absent or k.endswith('num_batches_tracked') for k in added if k.startswith(f'{layer}.'))}

    def names(layers: Set[str]) -> str:
        """The stages with some layers; empty where these are of no stage, as in a checkpoint by other names."""
        return ', '.join(s for s in stages if any(layer.startswith(f'{s}.') for layer in layers))

    sentences = []
    if batch_there or batch_here:
        sentences.append(f'AdaKern has a BatchNorm in the {"weights" if batch_there else "model"}, and another norm in '
                         f'the {"model" if batch_there else "weights"}: see the option ada_kern_norm.')
    if names(plain_here):
        sentences.append(f'The weights have FADC in {names(plain_here)}, where the model has none: see fadc_stages.')
    if names(plain_there):
        sentences.append(f'The model has FADC in {names(plain_there)}, where the weights have none: see fadc_stages.')
    for name, part in _PARTS.items():
        here = {layer for layer, p in extra if p == name} - plain_here
        there = {layer for layer, p in lacking if p == name} - plain_there
        if here and all(getattr(own[layer], name, None) is None for layer in here):
            what = f'The weights have {part.title}, and the model was created without it'
        elif there and not here:
            what = f'The model has {part.title}, which the weights lack in part or as a whole'
        elif here:
            what = f'The weights and the model have different parts of {part.title}'
        else:
            continue
        sentences.append(f'{what}: see the option {part.option}.')
    return ' '.join(sentences)


def _check_sizes(state_dict: StateDict, own: StateDict, name: str) -> None:
    """Raise where the modules of FADC have other sizes, and name the options that these follow."""
    wrong: Dict[str, List[str]] = {}
    for key, value in state_dict.items():
        part = _part_of(key)
        if part and key in own and isinstance(value, Tensor) and value.shape != own[key].shape:
            wrong.setdefault(part[1], []).append(f'{key} ({tuple(value.shape)}, wanted {tuple(own[key].shape)})')
    if wrong:
        texts = [f'{_PARTS[part].title} follows the options {_PARTS[part].sizes}, and the checkpoint differs in '
                 f'{", ".join(keys)}' for part, keys in wrong.items()]
        raise RuntimeError(f'The checkpoint does not fit {name}, size mismatch: {"; ".join(texts)}.')


def adapt_checkpoint(
        state_dict: StateDict,
        model: nn.Module,
        base_filter: Optional[Callable[[StateDict, nn.Module], StateDict]] = None,
) -> StateDict:
    """A checkpoint of the base, or of the FADC model, as the FADC model loads it.

    To a base's checkpoint the FADC parameters are added as the model has them: the identity. timm loads without
    strictness where the classes differ, so keys are compared here.

    Args:
        state_dict: The checkpoint.
        model: The FADC model, as it was built.
        base_filter: timm's filter for checkpoints of the base.

    Raises:
        RuntimeError: Keys are missing or left over, or values are none of a network's; the message names them.
    """
    own = model.state_dict()
    added = fadc_keys(model)
    if not any(key in state_dict for key in added):
        if base_filter is not None:
            with suppress(KeyError):  # it looks up a key that the model has not: named below
                state_dict = base_filter(state_dict, model)
        state_dict = {**state_dict, **{key: own[key] for key in added}}
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    loose = cfg.get('classifier') or ()
    loose = (loose,) if isinstance(loose, str) else tuple(loose)
    family = family_of(model)
    if cfg.get('tag') in family.headless_tags and family.head_norm is not None:
        loose += (family.head_norm,)
    name = architecture_name(model)
    check_keys(
        state_dict, own, f'fits neither {name} nor its base', loose, lambda m, u: _explain(m, u, model, family.stages))
    _check_sizes(state_dict, own, name)
    check_values(state_dict, own)
    return state_dict


def _follow_weight(layer: nn.Module) -> None:
    """Bring what FADC adds to a layer to the device and dtype of the others, off meta too; values are left open."""
    like = next(p for name, p in layer.named_parameters() if name.partition('.')[0] not in _PARTS)
    for name in _PARTS:
        part = getattr(layer, name, None)
        if part is not None:
            if any(p.is_meta for p in part.parameters()):
                part.to_empty(device=like.device)
            part.to(device=like.device, dtype=like.dtype)


class LoadsBase:
    """For the classes of FADC models: `load_state_dict`, and with it `checkpoint_path=`, takes a base's checkpoint."""

    def load_state_dict(self: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As that of `nn.Module`, except that FADC is the identity after a strict load of the base, with a warning."""
        added = fadc_keys(self)
        is_base = strict and bool(added) and not any(key in state_dict for key in added)
        if is_base:
            state_dict = family_of(self).checkpoint_filter_fn(dict(state_dict), self)
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]
        if is_base:
            for m in self.modules():
                if isinstance(m, FADC_LAYERS):
                    if assign:
                        _follow_weight(m)
                    m.reset_fadc_parameters()
            _logger.warning('The checkpoint is of the base, without FADC: FADC is the identity now.')
        return result
