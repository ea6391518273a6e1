"""Adaptive dilated and deformable convolution: over bilinear samples, with AdaKern's gains, and their backends."""
from .backends import BACKENDS, choose_backend, list_backends
from .functional import adaptive_dilated_conv2d, deform_conv2d, predicted_conv2d, takes_predictions

__all__ = [
    'BACKENDS', 'adaptive_dilated_conv2d', 'choose_backend', 'deform_conv2d', 'list_backends', 'predicted_conv2d',
    'takes_predictions']
