"""Operators: adaptive dilated and deformable convolution with their backends, ideal low-pass filters, and neighbourhood
attention."""
from . import flops  # registers the FLOP formulas
from .band_mix import low_pass, mix_bands
from .neighborhood_attention import neighborhood_attention2d, neighborhood_mean2d
from .sampled_conv import BACKENDS, adaptive_dilated_conv2d, deform_conv2d, list_backends
from .settings import set_backend

__all__ = [
    'BACKENDS', 'adaptive_dilated_conv2d', 'deform_conv2d', 'flops', 'list_backends', 'low_pass', 'mix_bands',
    'neighborhood_attention2d', 'neighborhood_mean2d', 'set_backend']
