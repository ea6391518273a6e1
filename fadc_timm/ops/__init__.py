"""Operators: adaptive dilated convolution with its backends, and ideal low-pass filters."""
from . import flops  # registers the FLOP formulas
from .band_mix import mix_bands
from .functional import adaptive_dilated_conv2d
from .low_pass import low_pass
from .registry import BACKENDS, choose_backend, list_backends, set_backend

__all__ = [
    'BACKENDS', 'adaptive_dilated_conv2d', 'choose_backend', 'flops', 'list_backends', 'low_pass', 'mix_bands',
    'set_backend']
