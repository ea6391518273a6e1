"""Frequency-Adaptive Dilated Convolution (FADC, CVPR 2024) for timm.

Importing this package registers `<base>_fadc` models with timm.
"""
from . import losses
from .layers import AdaDR, AdaKern, FADConv2d, FreqSelect
from .models import LiftReport, lift_model

__version__ = '0.1.0'

__all__ = ['AdaDR', 'AdaKern', 'FADConv2d', 'FreqSelect', 'LiftReport', 'lift_model', 'losses']
