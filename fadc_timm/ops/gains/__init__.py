"""AdaKern's linear layers on a GPU: the trunk of the map's mean, and the heads of both parts, in one kernel each."""
from .operator import heads, trunk

__all__ = ['heads', 'trunk']
