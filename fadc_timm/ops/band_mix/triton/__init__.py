"""The band mix for CUDA: matrix products of the library, and Triton kernels between them.

The factors of the products have the map's dtype; sums are in float32, or float64 for a float64 map. Both passes are
deterministic: the order of every sum is fixed. With TRITON_INTERPRET=1 in the environment, Triton interprets its
kernels on a CPU, slowly, as in the tests. Triton is optional: the first call imports it.
"""
from typing import List

from torch import Tensor

from ...triton_support import why_not
from .operator import call, mix_bands_triton

__all__ = ['call', 'forward', 'mix_bands_triton', 'why_not']


def forward(x: Tensor, weights: Tensor, factors: List[int]) -> Tensor:
    """The band mix of `mix_bands`; raises NotImplementedError with the reason where the kernels cannot run."""
    reason = why_not(x)
    if reason is not None:
        raise NotImplementedError(f"backend='triton' cannot mix these bands: {reason}.")
    return call(x, weights, factors, False)[0]
