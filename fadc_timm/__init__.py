"""Frequency-Adaptive Dilated Convolution (FADC, CVPR 2024) for timm.

Importing this package registers `<base>_fadc`, `<base>_dcn` and `<base>_dcn_fadc` models with timm.
"""
import importlib
from typing import TYPE_CHECKING, Any, List

from . import layers, losses, models, ops
from .layers import AdaDR, AdaKern, FADConv2d, FreeOffsets, FreqSelect
from .models import LiftReport, lift_model, param_groups

if TYPE_CHECKING:
    from . import checkpoints, hub, visualize
    from .checkpoints import load, official, save

__version__ = '0.1.0.dev0'

__all__ = [
    'AdaDR', 'AdaKern', 'FADConv2d', 'FreeOffsets', 'FreqSelect', 'LiftReport', 'checkpoints', 'hub', 'layers',
    'lift_model', 'load', 'losses', 'models', 'official', 'ops', 'param_groups', 'save', 'visualize']

# Modules, and functions of them, that Python imports at their first use: building a model needs none of them.
_LAZY = {
    'checkpoints': '.checkpoints', 'hub': '.hub', 'official': '.checkpoints.official', 'visualize': '.visualize'}
_LAZY_FUNCTIONS = {'load': '.checkpoints', 'save': '.checkpoints'}


def __getattr__(name: str) -> Any:
    if name in _LAZY_FUNCTIONS:
        function = globals()[name] = getattr(importlib.import_module(_LAZY_FUNCTIONS[name], __name__), name)
        return function
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = globals()[name] = importlib.import_module(_LAZY[name], __name__)
    return module


def __dir__() -> List[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith('__'))])
