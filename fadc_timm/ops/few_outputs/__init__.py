"""A convolution with few outputs, on a GPU: one product for all taps, then a sum of shifted maps. See README.md."""
from .operator import MOST_PRODUCTS, call, few_outputs_conv2d, fits, forward, gradient, pack, suits

__all__ = ['MOST_PRODUCTS', 'call', 'few_outputs_conv2d', 'fits', 'forward', 'gradient', 'pack', 'suits']
