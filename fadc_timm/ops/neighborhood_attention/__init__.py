"""Neighbourhood attention: every position attends to the window of positions around it, maybe a dilated one."""
from .backends import BACKENDS, choose_backend
from .functional import neighborhood_attention2d, neighborhood_mean2d
from .neighbours import neighbours

__all__ = ['BACKENDS', 'choose_backend', 'neighborhood_attention2d', 'neighborhood_mean2d', 'neighbours']
