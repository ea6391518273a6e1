"""Blocks that fold their own convolutions for inference, as RepVGG's do: FADC cannot be folded into a convolution."""
import logging
from typing import Any, Iterable

from torch import nn

__all__ = ['keep_unfolded']

_logger = logging.getLogger(__name__)

# What `timm.utils.reparameterize_model` calls; the first one gives back what takes the block's place.
_METHODS = ('fuse', 'reparameterize', 'switch_to_deploy')


class _Unfolded:
    """In place of a block's method that would make a plain convolution of a layer with FADC; it can be pickled."""

    def __init__(self, block: nn.Module, name: str) -> None:
        self.block = block
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        _logger.warning(f'{type(self.block).__name__}.{self.name} is left out: it would make a plain convolution of a '
                        'layer with FADC.')
        return self.block


def keep_unfolded(model: nn.Module, lifted: Iterable[str]) -> None:
    """Let blocks with layers that have FADC stay as they are when a network is folded, with a warning.

    Args:
        model: A network, changed in place.
        lifted: Names of its layers with FADC.
    """
    blocks = set()
    for layer in lifted:
        while layer:
            layer = layer.rpartition('.')[0]
            blocks.add(model.get_submodule(layer))
    for block in blocks:
        for name in _METHODS:
            if callable(getattr(type(block), name, None)):
                block.__dict__[name] = _Unfolded(block, name)
