"""AdaKern's linear layers on a GPU: the trunk of the map's mean and both heads, in a kernel each or in one."""
from .operator import heads, heads_forward, heads_gradient, trunk, trunk_and_heads, trunk_forward, trunk_gradient

__all__ = ['heads', 'heads_forward', 'heads_gradient', 'trunk', 'trunk_and_heads', 'trunk_forward', 'trunk_gradient']
