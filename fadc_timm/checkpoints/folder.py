"""The folder of a model: written as a whole or not at all, and loaded again before anyone relies on it."""
import ctypes
import errno
import json
import math
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable, Collection, Dict, Optional, Tuple, Union

import timm
import torch
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

__all__ = ['check_cfg', 'fixed_input', 'fixed_logits', 'is_model_folder', 'reload', 'write_folder']

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'
CARD = 'README.md'

# Entries of timm's configurations that say where the weights are: here they are beside the configuration.
_SOURCES = ('file', 'hf_hub_filename', 'hf_hub_id', 'source', 'state_dict', 'url')

# Recommendations for other weights, which an entry of one's own replaces.
_REPLACED = {
    'input_size': ('test_input_size', 'min_input_size', 'pool_size', 'test_pool_size'), 'crop_pct': ('test_crop_pct',)}

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def fixed_input(size: Tuple[int, ...]) -> Tensor:
    """The image on which logits are compared: waves of several frequencies, from a formula.

    Args:
        size: (C, H, W).

    Returns:
        (1, C, H, W) in float32, values in -2..2 as after normalisation.
    """
    c, h, w = size
    turn = 2 * math.pi
    channel = torch.arange(1, c + 1, dtype=torch.float64).view(c, 1, 1)
    y = torch.arange(h, dtype=torch.float64).view(1, h, 1) / h
    x = torch.arange(w, dtype=torch.float64).view(1, 1, w) / w
    waves = (turn * (channel * y + x)).sin() + 0.5 * (turn * (7 * x - channel * y)).cos() + \
        0.5 * (turn * (23 * x + 17 * y)).sin()
    return waves.float().unsqueeze(0)


@torch.no_grad()
def fixed_logits(model: nn.Module, size: Tuple[int, ...]) -> Tensor:
    """Logits of a model for :func:`fixed_input`.

    Args:
        model: A classifier; it is put into eval mode.
        size: (C, H, W).

    Returns:
        (num_classes,)
    """
    return model.eval()(fixed_input(size))[0]


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, where the system can: Linux, on most file systems."""
    if os.name != 'posix':
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), 'renameat2', None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _put(new: Path, out: Path, aside: Path) -> None:
    """Put a new folder in the place of an old one."""
    if not out.exists():
        new.rename(out)
    elif not _exchange(new, out):
        out.rename(aside)
        try:
            new.rename(out)
        except OSError:
            aside.rename(out)
            raise


def check_cfg(given: Dict[str, Any], num_classes: int, in_chans: int) -> None:
    """Raises ValueError for entries of a configuration that timm does not know, or that do not fit the model.

    Args:
        given: The entries.
        num_classes: Of the model.
        in_chans: Of the model.
    """
    unknown = sorted(set(given) - {field.name for field in fields(PretrainedCfg)})
    if unknown:
        raise ValueError(f'timm has no entry {", ".join(unknown)} in its configurations.')
    labels = given.get('label_names')
    if labels is not None and len(labels) != num_classes:
        raise ValueError(f'label_names has {len(labels)} names, and the model {num_classes} classes.')
    if labels is not None and len(set(labels)) != len(labels):
        twice = sorted({name for name in labels if list(labels).count(name) > 1})
        raise ValueError(f'label_names has the same name for several classes: {", ".join(twice)}.')
    for name in ('mean', 'std'):
        value = given.get(name)
        if value is not None and not (len(value) == in_chans and all(
                isinstance(v, (int, float)) and math.isfinite(v) and (name == 'mean' or v > 0) for v in value)):
            positive = '' if name == 'mean' else ' above 0'
            raise ValueError(f'{name} must be {in_chans} numbers{positive}, one per input channel, got {value!r}.')
        large = next((v for v in value or () if v > 1), None)
        if large is not None:
            # numbers of images in [0, 255] are the usual mistake
            as_wanted = f': {large} is {large / 255:.3f}' if 2 < large <= 255 else ''
            raise ValueError(f'{name} is of images in [0, 1], so at most 1, got {list(value or ())}{as_wanted}.')
    crop = given.get('crop_pct')
    if crop is not None and not (isinstance(crop, (int, float)) and 0 < crop <= 1):
        as_wanted = f': {crop} % is {crop / 100:g}' if isinstance(crop, (int, float)) and 1 < crop <= 100 else ''
        raise ValueError(f'crop_pct is a share of the image, above 0 and up to 1, got {crop!r}{as_wanted}.')
    size = given.get('input_size')
    if size is not None and not (len(size) == 3 and size[0] == in_chans and all(
            isinstance(n, int) and n > 0 for n in size)):
        raise ValueError(f'input_size must be ({in_chans}, height, width) in pixels, got {size!r}.')


def is_model_folder(path: Path) -> bool:
    """Whether :func:`write_folder` may replace a folder: it holds a model, or is empty."""
    return path.is_dir() and ((path / CONFIG).is_file() or not any(path.iterdir()))


def write_folder(
        model: nn.Module,
        out: Union[str, Path],
        *,
        architecture: Optional[str] = None,
        pretrained_cfg: Optional[Dict[str, Any]] = None,
        model_args: Optional[Dict[str, Any]] = None,
        outdated: Collection[str] = (),
        card: Optional[str] = None,
        check: Optional[Callable[[Path], None]] = None,
) -> Path:
    """Write config.json and model.safetensors, for `local-dir:`, `hf-hub:` and transformers' TimmWrapper.

    The new folder is written beside `out` under a temporary name, and then takes its place: in one step on Linux, in
    two renames where the system cannot exchange folders. A process that is killed before leaves the old folder there.

    Args:
        model: A model of timm.
        out: The folder. A folder of a model that is already there is replaced.
        architecture: Name of the entry point that builds the model; by default the one that built it.
        pretrained_cfg: Entries that differ from the model's own; an entry of None is left out.
        model_args: Arguments of `timm.create_model` that the model was built with, except `num_classes`.
            Newer timm adds those that it recorded.
        outdated: Arguments that timm may have recorded, and that no longer hold.
        card: Text of README.md.
        check: Called with the new folder before it takes its place. If it raises, the old folder stays.

    Returns:
        The folder.

    Raises:
        FileExistsError: `out` is there and is no folder of a model.
        ValueError: `pretrained_cfg` has an entry that timm does not know, or one that does not fit the model.
    """
    out = Path(out)
    given = {k: v for k, v in (pretrained_cfg or {}).items() if v is not None}
    if out.exists() and not is_model_folder(out):
        raise FileExistsError(f'{out} exists and is no folder of a model.')
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    new = temporary / 'new'
    try:
        own_cfg: Dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # a dictionary, not a module
        cfg = {**own_cfg, **(pretrained_cfg or {})}
        in_chans = (model_args or {}).get('in_chans', getattr(model, 'in_chans', own_cfg['input_size'][0]))
        check_cfg(given, int(model.num_classes), in_chans)  # type: ignore[arg-type]
        cfg['input_size'] = (in_chans, *cfg['input_size'][1:])  # newer timm does it itself
        labels = cfg.pop('label_names', None)
        cfg = {k: v for k, v in cfg.items() if k not in _SOURCES and v is not None}
        named = labels and len(labels) == model.num_classes
        config = dict(pretrained_cfg=cfg, **(dict(label_names=list(labels)) if named else {}))
        new.mkdir()
        save_config_for_hf(
            model, new / CONFIG,  # type: ignore[arg-type]  # timm calls it a string, and opens it as a path
            model_config=config, model_args=model_args or {})
        # timm's save_for_hf refuses channels_last, and leaves out the entry `format` that other loaders look for
        tensors: Dict[str, Tensor] = {}
        storages = set()
        for name, tensor in model.state_dict().items():
            tensors[name] = tensor.contiguous()
            storage = tensors[name].untyped_storage().data_ptr()
            if storage in storages:  # of a module that stands in two places, where safetensors refuses shared memory
                tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
            storages.add(storage)
        save_file(tensors, new / WEIGHTS, metadata=dict(format='pt'))
        content = json.loads((new / CONFIG).read_text(encoding='utf-8'))
        # timm repeats these beside the entries that count; transformers' wrapper then passes num_classes twice
        for name in ('num_classes', *outdated):
            content.get('model_args', {}).pop(name, None)
        absent = {k for k, v in (pretrained_cfg or {}).items() if v is None}
        # timm takes the preprocessing from the model, and keeps what was recommended for other weights
        content['pretrained_cfg'].update(given)
        for name, old in _REPLACED.items():
            if name in given:
                absent |= {k for k in old if k not in given}
        if in_chans != 3:
            absent.add('first_conv')  # timm before 1.0.31 would convert its weights, as if they were of three channels
        for name in ('label_names', 'num_classes', *absent):
            content['pretrained_cfg'].pop(name, None)
        content['architecture'] = architecture or content['architecture']
        (new / CONFIG).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
        if card is not None:
            (new / CARD).write_text(card, encoding='utf-8')
        for path in new.iterdir():
            path.chmod(0o644)  # safetensors makes its file readable for the owner only
        if check is not None:
            check(new)
        _put(new, out, temporary / 'old')
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def reload(folder: Union[str, Path]) -> nn.Module:
    """The model in a folder, as a user gets it."""
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
