"""Checks of a checkpoint that timm does not make: that its file can be read, and that its values are a network's."""
import logging
import os
import zipfile
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from torch import Tensor, nn

__all__ = ['check_keys', 'check_source', 'check_values', 'settle_head', 'why_unreadable']

_logger = logging.getLogger(__name__)


# What timm takes first from a folder.
_PREFERRED = ('model.safetensors', 'pytorch_model.bin', 'pytorch_model.pth')


def why_unreadable(path: str) -> Optional[str]:
    """Why a file is no whole file of safetensors (by its suffix) or of `torch.save`, or None. No tensor is read."""
    if str(path).endswith('.safetensors'):
        try:
            with safe_open(path, 'pt'):
                return None
        except SafetensorError as e:
            return f'cut off, or not in the format of safetensors ({e})'
    with open(path, 'rb') as file:
        start = file.read(4)
    # a zip archive, whose directory is at the end; before torch 1.6 a pickle
    whole = zipfile.is_zipfile(path) if start == b'PK\x03\x04' else start[:1] == b'\x80'
    return None if whole else 'cut off, or not a file of torch.save'


def check_file(path: str) -> None:
    """Raise unless a file can be a checkpoint.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: It is empty, cut off, or of another format.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint '{path}'.")
    reason = why_unreadable(path)
    if reason:
        raise RuntimeError(f"The checkpoint '{path}' is {reason}.")


def check_source(cfg: PretrainedCfg) -> None:
    """As :func:`check_file` for the local file, or the main file of the local folder, that timm will load; if any."""
    if not cfg.file or cfg.state_dict:
        return
    if cfg.source != 'local-dir':
        check_file(cfg.file)
        return
    for name in _PREFERRED:
        path = os.path.join(cfg.file, name)
        if os.path.exists(path):
            check_file(path)
            return


def check_keys(
        state_dict: Mapping[str, Any],
        own: Mapping[str, Tensor],
        misfit: str,
        loose: Union[str, Sequence[str], None] = (),
        explain: Callable[[List[str], List[str]], str] = lambda missing, unexpected: '',
) -> None:
    """Raise where a checkpoint has other keys than a model. timm loads without strictness where the classes differ.

    Args:
        state_dict: The checkpoint.
        own: State dict of the model that it is for.
        misfit: What the checkpoint does then, for the message.
        loose: Modules that may be missing or left over. timm drops or demands the classifier, by the number of classes.
        explain: Given the missing and the unexpected keys, a sentence on where they come from, or nothing.

    Raises:
        RuntimeError: With the names.
    """
    modules = (loose,) if isinstance(loose, str) else tuple(loose or ())

    def lacking(a: Mapping[str, Any], b: Mapping[str, Any]) -> List[str]:
        return [k for k in a if k not in b and not k.endswith('num_batches_tracked')
                and k.rpartition('.')[0] not in modules]

    missing, unexpected = lacking(own, state_dict), lacking(state_dict, own)
    if missing or unexpected:
        reason = explain(missing, unexpected)
        raise RuntimeError(
            f'The checkpoint {misfit}: missing keys: {", ".join(missing) or "none"}; '
            f'unexpected keys: {", ".join(unexpected) or "none"}.{" " if reason else ""}{reason}')


def _differing(values: Tensor, name: str) -> str:
    return f'{name} ({int((~values.isfinite()).sum())} of {values.numel()})'


def check_values(state_dict: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """Raise where a checkpoint holds what is no weight: no tensor, integers for reals, infinities or NaN.

    Args:
        state_dict: The checkpoint.
        own: State dict of the model that it is for.

    Raises:
        RuntimeError: With the names, and how many values of each are not finite.
    """
    wrong: List[Tuple[str, str]] = []
    for name, value in state_dict.items():
        if name not in own:
            continue
        if not isinstance(value, Tensor):
            wrong.append(('no tensors', f'{name} ({type(value).__name__})'))
        elif own[name].is_floating_point() and not value.is_floating_point():
            wrong.append(('integers', f'{name} ({value.dtype})'))
        elif value.is_floating_point() and value.device.type != 'meta' and not torch.isfinite(value).all():
            wrong.append(('values that are not finite', _differing(value, name)))
    if wrong:
        kinds = {kind: [name for k, name in wrong if k == kind] for kind, _ in wrong}
        raise RuntimeError('The checkpoint holds ' + '; '.join(f'{k}: {", ".join(v)}' for k, v in kinds.items()) + '.')


def settle_head(state_dict: Mapping[str, Any], model: nn.Module) -> None:
    """Keep a checkpoint's head where it has the model's number of classes; else say that it goes.

    timm keeps or drops the head by `num_classes` of the configuration. A tag's configuration does not know how many
    classes a file of the user's has.

    Args:
        state_dict: The checkpoint, with the model's names.
        model: The model, with the configuration from which timm loads it; corrected in place.

    Raises:
        RuntimeError: The head has another number of classes than the model, which took its number from the
            configuration.
    """
    cfg: Dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # a dictionary, not a module
    names = cfg.get('classifier') or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    weight = next((state_dict[f'{n}.weight'] for n in names if isinstance(state_dict.get(f'{n}.weight'), Tensor)), None)
    wanted, stated = getattr(model, 'num_classes', 0), cfg.get('num_classes')
    if weight is None or not wanted or stated is None or cfg.get('label_offset'):
        return
    found = len(weight)
    if found == stated:
        return
    if stated == wanted:
        raise RuntimeError(
            f"The checkpoint's head has {found} classes, and the model {wanted}, the number of its configuration: "
            f'create the model with num_classes={found}, or with another number and a new head.')
    if found == wanted and stated >= 0:
        cfg['num_classes'] = found
        for name in ('label_names', 'label_descriptions'):  # those of other classes
            cfg.pop(name, None)
        return
    reason = (f'num_classes={stated} in the configuration asks for a new one' if found == wanted
              else f'the model has {wanted} classes')
    _logger.warning(f"The checkpoint's head of {found} classes is left out, and the model's is drawn anew: {reason}.")
