"""Frequency-Adaptive Dilated Convolution (FADC, CVPR 2024) for timm.

Importing this package registers `<base>_fadc`, `<base>_dcn` and `<base>_dcn_fadc` models with timm.
"""
import importlib
from typing import TYPE_CHECKING, Any, List

from . import layers, losses, ops
from .layers import AdaDR, AdaKern, FADConv2d, FreeOffsets, FreqSelect
from .models import LiftReport, lift_model

if TYPE_CHECKING:
    from . import checkpoints, visualize
    from .checkpoints import official

__version__ = '0.1.0.dev0'

__all__ = [
    'AdaDR', 'AdaKern', 'FADConv2d', 'FreeOffsets', 'FreqSelect', 'LiftReport', 'checkpoints', 'layers', 'lift_model',
    'losses', 'official', 'ops', 'visualize']

# Modules that Python imports at their first use: building a model needs none of them.
_LAZY = {'checkpoints': '.checkpoints', 'official': '.checkpoints.official', 'visualize': '.visualize'}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = globals()[name] = importlib.import_module(_LAZY[name], __name__)
    return module


def __dir__() -> List[str]:
    return sorted({*globals(), *_LAZY})
