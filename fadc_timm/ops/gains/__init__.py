"""AdaKern's gains on a GPU: the map's mean through trunk, norm and heads, in a kernel each or in one."""
from .operator import (
    heads,
    heads_forward,
    heads_gradient,
    norm_forward,
    norm_gradient,
    trunk,
    trunk_and_heads,
    trunk_forward,
    trunk_gradient,
)

__all__ = [
    'heads', 'heads_forward', 'heads_gradient', 'norm_forward', 'norm_gradient', 'trunk', 'trunk_and_heads',
    'trunk_forward', 'trunk_gradient']
