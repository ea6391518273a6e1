"""FreqSelect's operator: a map's frequency bands, weighed at every position and summed; and ideal low-pass filters."""
from .exported import mix_exported_bands
from .functional import choose_backend, mix_bands, mix_predicted_bands
from .low_pass import low_pass

__all__ = ['choose_backend', 'low_pass', 'mix_bands', 'mix_exported_bands', 'mix_predicted_bands']
