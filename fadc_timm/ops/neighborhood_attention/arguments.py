"""The checked arguments of one call, as every backend receives them."""
from typing import NamedTuple, Optional, Tuple

from torch import Tensor

__all__ = ['AttentionArgs']


class AttentionArgs(NamedTuple):
    """Arguments of :func:`neighborhood_attention2d` after checking.

    Shapes: q, k and v (B, heads, H, W, c), where H and W are at least kernel size times dilation; bias
    (heads, 2*kh - 1, 2*kw - 1) or None.
    """
    q: Tensor
    k: Tensor
    v: Tensor
    kernel_size: Tuple[int, int]
    dilation: Tuple[int, int]
    bias: Optional[Tensor]
    dropout_p: float = 0.
