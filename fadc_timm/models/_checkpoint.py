"""Checks of a checkpoint that timm does not make: that its file can be read, and that its values are a network's."""
import os
import zipfile
from typing import Any, List, Mapping, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from torch import Tensor

__all__ = ['check_source', 'check_values', 'why_unreadable']


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
