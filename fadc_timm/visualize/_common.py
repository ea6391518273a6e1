"""What the pictures of FADC layers share: one forward pass that is watched, names of stages, whole files."""
import math
import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Union

import torch
from torch import nn

from .._writing import write_atomically
from ..layers.hooks import LayerCall, layers_of, watch_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GREY = '#222222', '#666666'


def run_watched(model: nn.Module, x: torch.Tensor, callback: Callable[[LayerCall], Any]) -> None:
    """Run a model once, in eval mode, without gradients or torch.compile, with a callback for each FADC layer.

    Args:
        model: Its training flags are restored afterwards.
        x: (B, C, H, W) input on the model's device, already normalised.
        callback: See :func:`fadc_timm.layers.hooks.watch_layers`.

    Raises:
        ValueError: x is empty, or the model has no FADC layer, or none of them ran.
    """
    if not x.numel():
        raise ValueError(f'There is nothing to run the model on: the input is empty, {list(x.shape)}.')
    modes = {m: m.training for m in model.modules()}
    try:
        # what is compiled calls no hooks
        with watch_layers(model, callback), torch.no_grad(), torch.compiler.set_stance('force_eager'):
            model.eval()(x)
    finally:
        for m, training in modes.items():
            m.training = training


def _network_of(model: nn.Module, layer: str) -> str:
    """The name of the network within a model that a layer is of; '' if the model is that itself."""
    inside = [name for name, m in model.named_modules() if hasattr(m, 'feature_info') and layer.startswith(f'{name}.')]
    if inside:  # of timm
        return max(inside, key=len)
    convs = [name.split('.')[:-1] for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return '.'.join(os.path.commonprefix(convs))


def stage_name(layer: str, network: str = '') -> str:
    """A layer's name up to the first part with a digit, other than those of the network's own name.

    Args:
        layer: The layer's name in the model.
        network: Name of the network that has the layer.
    """
    outer = len(network.split('.')) if network else 0
    parts = layer.split('.')
    first = next((i for i, part in enumerate(parts) if i >= outer and re.search(r'\d', part)), 0)
    # a flat trunk (`features.3`) has no stages: all its layers at one size then count as one
    return '.'.join(parts[:first + 1] if first + 1 < len(parts) else parts[:-1]) or layer


def stages_of(model: nn.Module) -> Dict[str, str]:
    """The stage of each layer with FADC, by the layer's name."""
    return {layer: stage_name(layer, _network_of(model, layer)) for layer in layers_of(model)}


def stride_of(output: torch.Tensor, x: torch.Tensor) -> int:
    """Stride of a layer's output (B, O, H', W') with respect to the model's input (B, C, H, W)."""
    # maps of odd sizes are rounded up, so the ratio of sizes is only near the stride, a power of two
    ratio = max(a / b for a, b in zip(x.shape[-2:], output.shape[-2:]))
    return int(2 ** max(0, round(math.log2(ratio))))


def fitted(size: float, text: str, width: float, bold: bool = False) -> float:
    """The font size in points at which a line fits into a width in inches, `size` at most."""
    return size * min(1., _per_inch(size, bold) * width / max(1, len(text)))


def wrapped(text: str, size: float, width: float) -> List[str]:
    """The lines of a text at a font size in points, in a width in inches."""
    return textwrap.wrap(text, max(1, int(_per_inch(size) * width)))


def _per_inch(size: float, bold: bool = False) -> float:
    """Characters per inch, of matplotlib's default font."""
    return (110 if bold else 133) / size


def save(fig: 'Figure', path: Union[str, os.PathLike]) -> Path:
    """Write a figure as PNG, whole or not at all.

    Raises:
        OSError: The folder is missing or cannot be written to.
    """
    path = Path(path)
    write_atomically(
        path, lambda part: fig.savefig(part, format='png', metadata={'Software': None}), make_folder=False)
    return path
