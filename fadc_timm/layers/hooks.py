"""Hooks that show what the FADC layers of a model compute, while it runs."""
import threading
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple

from torch import Tensor, nn

from ..ops.sampled_conv.arguments import NO_GAINS, Gains
from .fad_conv import PARTS, FADConv2d
from .neighborhood_attention import FADNeighborhoodAttention

__all__ = ['LayerCall', 'layers_of', 'watch_layers']


class LayerCall(NamedTuple):
    """One call of a layer with FADC, and the tensors themselves: in their dtypes, on their device, in autograd's graph.

    name: Name of the layer in the model.
    layer: The layer, an FADConv2d or a FADNeighborhoodAttention, whose maps (B, H, W, C) are views (B, C, H, W) here.
    x: (B, C, H, W) its input.
    selected: (B, C, H, W) what FreqSelect made of it, x where there is none.
    gains: AdaKern's, `(low_in (B, C), low_out (B, O), high_in (B, C), high_out (B, O))`, None for ones.
    dilation: (B, G, H', W') AdaDR's, in pixels of the input map, or None where there is none.
    output: (B, O, H', W').
    offset: (B, G*2*k*k, H', W') free offsets, (y, x) per tap in pixels of the input map, or None where there are none.
    mask: (B, G*k*k, H', W') the modulation of the taps that came with the dilation or the offsets, or None.
    """
    name: str
    layer: Any
    x: Tensor
    selected: Tensor
    gains: Gains
    dilation: Optional[Tensor]
    output: Tensor
    offset: Optional[Tensor] = None
    mask: Optional[Tensor] = None


def layers_of(model: nn.Module) -> Dict[str, Any]:
    """The FADConv2d and FADNeighborhoodAttention of a model, by their names."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (FADConv2d, FADNeighborhoodAttention))}


@contextmanager
def watch_layers(model: nn.Module, callback: Callable[[LayerCall], Any]) -> Iterator[None]:
    """Call back after every call of an FADConv2d or a FADNeighborhoodAttention inside of the `with` block.

    Hooks on the modules do it, so they have to run as modules: what `torch.compile` compiled before does not call them.
    With gradient checkpointing the layers run again in the backward pass: leave the block before it.

    Args:
        model: Any model with such layers, wrapped for distributed training or not.
        callback: What it returns is dropped, and what it keeps of the call stays in memory.

    Raises:
        ValueError: The model has no such layer; or, at the end of the block, none of them ran.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(
            f'{type(model).__name__} has no FADConv2d layer, nor another with FADC: nothing to collect')
    parts: Dict[Tuple[int, str], Dict[str, Any]] = {}  # by thread, as DataParallel's replicas run in threads
    count = 0

    def is_watched(module: nn.Module, watched: nn.Module) -> bool:
        # a copy that is made in the block, as an average of the weights is, has the hooks too, and keeps them
        return module is watched or getattr(module, '_is_replica', False)  # of DataParallel

    def keep(name: str, part: str, module: nn.Module, args: Any, output: Any) -> None:
        if is_watched(module, getattr(layers[name], part)):
            parts.setdefault((threading.get_ident(), name), {})[part] = output

    def call(name: str, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        nonlocal count
        if not is_watched(module, layers[name]):
            return
        count += 1
        seen = parts.pop((threading.get_ident(), name), {})
        dilation, of_dilation = seen.get('ada_dr', (None, None))
        offset, of_offset = seen.get('free_offsets', (None, None))
        x = args[0] if args else kwargs['x']
        if isinstance(module, FADNeighborhoodAttention):
            x, output = x.permute(0, 3, 1, 2), output.permute(0, 3, 1, 2)
        callback(LayerCall(
            name, module, x, seen.get('freq_select', x), seen.get('ada_kern', NO_GAINS), dilation, output,
            offset, of_dilation if offset is None else of_offset))

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(partial(call, name), with_kwargs=True))
            for part in PARTS:
                module = getattr(layer, part, None)
                if module is not None:
                    handles.append(module.register_forward_hook(partial(keep, name, part)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError(f'none of the {len(layers)} FADC layers of {type(model).__name__} ran. (A model that was '
                         'compiled before calls no hooks: run the one from before torch.compile.)')
