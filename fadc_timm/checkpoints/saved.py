"""A model of one's own: saved in a folder, and loaded from the folder or from a checkpoint."""
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.models import is_model
from timm.utils import unwrap_model
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ..layers import FADC_LAYERS
from ..layers.fad_conv import OPTIONS
from ..layers.neighborhood_attention import ATTENTION_OPTIONS
from ..models._family import Family, architecture_name, architecture_of, family_of
from ..models.lift import KINDS, liftable_names
from ..models.lifted import ARCHITECTURE, layer_options, lifted_layers
from .convert import convert, read_checkpoint
from .folder import CONFIG, write_folder

__all__ = ['load', 'load_checkpoint', 'save']

# They act in training only.
_TRAINING_ONLY = ('Identity', 'Dropout', 'DropPath', 'DropBlock2d')

# In inference the classes of a line are one: timm and torch exchange them for training in several processes, or frozen.
_BATCH_NORMS = (
    (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d), (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d))

def _fadc_stages(model: nn.Module, family: Family) -> Optional[Tuple[bool, ...]]:
    """Which stages have FADC; None where a stage has it in a part of its layers, or other modules have it."""
    kinds: Dict[str, List[bool]] = {stage: [] for stage in family.stages}
    lifts = next(kind.plain for kind in KINDS if kind.options == family.options)
    plain = {name for name in liftable_names(model) if isinstance(model.get_submodule(name), lifts)}
    for name, m in model.named_modules():
        stage = next((s for s in family.stages if name.startswith(f'{s}.')), None)
        if isinstance(m, FADC_LAYERS):
            if stage is None:
                return None
            kinds[stage].append(True)
        elif stage is not None and name in plain:
            kinds[stage].append(False)
    if any(len(set(found)) > 1 for found in kinds.values()):
        return None
    return tuple(True in found for found in kinds.values())


def _description(model: nn.Module) -> Tuple[str, Dict[str, Any]]:
    """The architecture and the arguments with which timm builds a model again.

    Raises:
        ValueError: The model is none of timm's, or has no FADC layer.
    """
    what = type(model).__name__
    cfg: Any = getattr(model, 'pretrained_cfg', None)
    architecture = cfg.get('architecture') if isinstance(cfg, dict) else None
    if architecture and not hasattr(model, 'num_classes'):
        raise ValueError(f'{what} is a feature network, which lacks the head: save the network that it was made of.')
    if not architecture or not is_model(architecture):
        raise ValueError(
            f'{what} is no network of timm, so no configuration can describe it: save the state dict, and lift the '
            'network before it is loaded.')
    lifted = lifted_layers(model)
    if not lifted:
        raise ValueError(f'{what} has no FADC layer: lift_model adds them. timm.models.save_for_hf saves plain models.')
    try:
        family = family_of(model)
    except ValueError:
        return ARCHITECTURE, dict(base=architecture, lifted=lifted)
    stages = _fadc_stages(model, family)
    if stages is None or len(lifted) > 1:
        own = architecture_of(architecture)
        return ARCHITECTURE, dict(base=own.base if own is not None else architecture, lifted=lifted)
    return architecture, dict(fadc_stages=list(stages), **lifted[0]['options'])


def _kind(m: Any) -> Tuple[str, ...]:
    """Class and arguments of a module, as far as inference depends on them."""
    for kinds in _BATCH_NORMS:
        if type(m) in kinds:
            return kinds[0].__name__, f'{len(m.running_mean)}, eps={m.eps}' if m.running_mean is not None else ''
    return type(m).__name__, m.extra_repr(), *((str(layer_options(m)),) if isinstance(m, FADC_LAYERS) else ())


def _modules(model: nn.Module) -> Dict[str, Tuple[str, ...]]:
    """The modules that compute something in inference."""
    return {name: _kind(m) for name, m in model.named_modules() if name and type(m).__name__ not in _TRAINING_ONLY}


def _check_same(model: nn.Module, folder: Path) -> None:
    """Raise unless a folder holds a model."""
    hint = ('Arguments of timm.create_model that this version of timm does not record are given as model_args. A '
            'configuration has no place for modules that were exchanged afterwards.')
    try:
        loaded = load(folder)
    except (RuntimeError, TypeError, ValueError) as e:
        raise RuntimeError(f'The saved model cannot be loaded again: {e} {hint}') from e
    a, b = _modules(model), _modules(loaded)
    other = next((name for name in [*a, *b] if a.get(name) != b.get(name)), None)
    if other is not None:
        raise RuntimeError(
            f'Loaded again, the model differs in {other}: {b.get(other)} in place of {a.get(other)}. {hint}')
    state = loaded.state_dict()
    for key, value in model.state_dict().items():
        if not torch.equal(value.cpu(), state[key].to(value.dtype)):
            raise RuntimeError(f'Loaded again, the model has other values in {key}.')


def save(
        model: nn.Module,
        folder: Union[str, Path],
        *,
        pretrained_cfg: Optional[Dict[str, Any]] = None,
        model_args: Optional[Dict[str, Any]] = None,
) -> Path:
    """Save a model in a folder, from which :func:`load` and timm's `local-dir:` build it again.

    config.json says which network it is, and which of its convolutions are FADC with which options. The folder is
    loaded again before it takes its place, and compared with the model.

    Args:
        model: A network of timm with FADC: `<base>_fadc`, or any network after `lift_model`. Of a compiled model, of
            one in DataParallel and of an average of timm's or torch's, the network inside is saved. SyncBatchNorm and
            frozen norms are saved as the BatchNorm that they are in inference.
        folder: Where to save it. A folder of a model that is already there is replaced.
        pretrained_cfg: Entries of timm's configuration that are the model's own: `label_names`, `mean`, `std`,
            `input_size`, `license` and others. The licence is else that of the base's weights.
        model_args: Arguments of `timm.create_model` that the model was built with, such as `output_stride`. Newer
            versions of timm (1.0.31) record them.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder is there, and is no folder of a model.
        RuntimeError: What was saved is another model, for instance because of a module that was put in by hand.
        ValueError: The model is no network of timm or has no FADC layer, or the configuration does not fit it.
    """
    model = unwrap_model(model)
    cfg = {'tag': None, 'description': None, 'notes': None, **(pretrained_cfg or {})}
    with torch.random.fork_rng(devices=[]):  # layers and the model are built anew, which draws numbers
        architecture, args = _description(model)
        args.update(model_args or {})
        return write_folder(
            model, folder, architecture=architecture, pretrained_cfg=cfg, model_args=args,
            outdated={'fadc_stages', *OPTIONS, *ATTENTION_OPTIONS} - set(args), check=partial(_check_same, model))


def load(folder: Union[str, Path], **kwargs: Any) -> nn.Module:
    """Load a model from the folder that :func:`save` or `fadc-timm convert` wrote, or from its copy on the Hub.

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
            or a folder that :func:`save` or `fadc-timm convert` wrote, which says itself which model it is.
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
    architecture = architecture_name(model)
    if name is not None and name.partition('.')[0] != architecture:
        raise ValueError(f"The folder '{path}' holds the model {architecture}, not {name}.")
    return model
