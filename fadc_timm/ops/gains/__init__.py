"""AdaKern's linear layers on a GPU: the trunk of the map's mean, and the heads of both parts, in one kernel each."""
from .operator import heads, heads_forward, heads_gradient, normalized_trunk, trunk, trunk_forward, trunk_gradient

__all__ = ['heads', 'heads_forward', 'heads_gradient', 'normalized_trunk', 'trunk', 'trunk_forward', 'trunk_gradient']
