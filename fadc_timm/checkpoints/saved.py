"""A model of one's own: loaded from the folder that it was saved in, or from a checkpoint."""
from pathlib import Path
from typing import Any, Optional, Union

import timm
from torch import nn

from .convert import convert, read_checkpoint
from .folder import CONFIG

__all__ = ['load', 'load_checkpoint']


def load(folder: Union[str, Path], **kwargs: Any) -> nn.Module:
    """Load a model from the folder that `fadc-timm convert` wrote, or from its copy on the Hub.

    Args:
        folder: The folder, or `hf-hub:OWNER/NAME`.
        **kwargs: Arguments of `timm.create_model` that shall differ, such as `num_classes` or `features_only`.

    Returns:
        The model as `timm.create_model` returns it, in training mode.

    Raises:
        FileNotFoundError: There is no such folder, or it has no config.json.
        RuntimeError: The weights do not fit the model.
    """
    name = str(folder)
    if not name.startswith('hf-hub:'):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"There is no folder '{folder}' of a model.")
        if not Path(folder, CONFIG).is_file():
            raise FileNotFoundError(f"The folder '{folder}' has no {CONFIG}, so it is no folder of a model.")
        name = f'local-dir:{folder}'
    return timm.create_model(name, pretrained=True, **kwargs)


def load_checkpoint(path: Union[str, Path], name: Optional[str] = None) -> nn.Module:
    """Load an FADC model from a checkpoint or from the folder of a model, with as many classes as it has.

    Args:
        path: A file (.safetensors, .pth, .pth.tar, .bin) of an FADC model, of its plain base or of the authors' code;
            or a folder that `fadc-timm convert` wrote, which says itself which model it is.
        name: The FADC model, `<arch>_fadc` or `<arch>_fadc.<tag>`. Wanted for a file; for a folder, its architecture.

    Returns:
        The model in eval mode.

    Raises:
        OSError: The file or folder is not there, or cannot be read.
        RuntimeError: The weights cannot be read, or do not fit the model; the message names the keys.
        ValueError: `name` is missing for a file, is no FADC model, or is another model than the folder's.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint or folder '{path}'.")
    if not path.is_dir():
        if name is None:
            raise ValueError(f"A checkpoint does not say which model it is of: '{path}' wants the model's name.")
        return convert(read_checkpoint(path), name).model
    model = load(path).eval()
    architecture = architecture_of(model)
    if name is not None and name.partition('.')[0] != architecture:
        raise ValueError(f"The folder '{path}' holds the model {architecture}, not {name}.")
    return model


def architecture_of(model: nn.Module) -> str:
    """The name by which timm knows a model."""
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    return cfg.get('architecture') or type(model).__name__
