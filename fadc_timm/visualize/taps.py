"""Where the taps of deformable convolutions lie, or the neighbours that are attended to, for some output positions."""
from dataclasses import dataclass
from typing import Any, List, Optional, Tuple, cast

import numpy as np
import torch
from torch import Tensor

from ..layers import FADNeighborhoodAttention
from ..layers.hooks import LayerCall
from ..ops.neighborhood_attention import neighbours

__all__ = ['LayerTaps', 'StageTaps', 'draw_taps', 'select_taps', 'taps_of']

_COLUMNS, _ROWS = 3, 2  # the output positions that are drawn
_WINDOWS = 2  # of an attention side by side, as its windows are large; one where two would overlap
_REST = '#ffffff'


@dataclass
class LayerTaps:
    """Where the taps of one layer lie, in one forward pass; tensors are float32 on the CPU.

    The taps of an attention are the neighbours of a position. They have no offset, and the mask is the mean over the
    heads of the attention weights times the number of neighbours: 1 where all of them have the same weight.

    Attributes:
        size: (H, W) of the layer's input map, whose pixels are the unit of the places. Pixel 0 has its centre at 0.
        rest: (H', W', k*k, 2) (y, x) of each tap without its offset.
        offset: (B, G, H', W', k*k, 2) (y, x).
        mask: (B, G, H', W', k*k), ones where the layer has none.
        attends: Whether the layer is an attention.
    """
    size: Tuple[int, int]
    rest: Tensor
    offset: Tensor
    mask: Tensor
    attends: bool = False


@dataclass
class StageTaps:
    """The taps of one layer for some output positions of one image, in units of the image's sides.

    Attributes:
        layer: Name of the layer.
        rest: (N, k*k, 2) (x, y) from 0 to 1 of the taps without their offsets, or of the position that attends.
        taps: (N, G*k*k, 2) likewise with their offsets.
        mask: (N, G*k*k).
        lengths: Mean and largest length of an offset of the layer, in pixels of its input map, over all positions.
        attends: Whether the layer is an attention.
    """
    layer: str
    rest: np.ndarray
    taps: np.ndarray
    mask: np.ndarray
    lengths: Tuple[float, float]
    attends: bool = False


def _neighbours_of(call: LayerCall) -> LayerTaps:
    """The neighbours of an attention, with their weights."""
    layer = cast(FADNeighborhoodAttention, call.layer)
    x = call.x if layer.freq_select_for == 'v' else call.selected
    weights = layer.attention_weights(x.permute(0, 2, 3, 1)).float().mean(1, keepdim=True).cpu()
    height, width, k = *x.shape[2:], layer.kernel_size
    rows, cols = (neighbours(max(n, k * d), k, d, torch.device('cpu'))[0][:n]
                  for n, d in zip((height, width), layer.dilation))
    rest = torch.stack((rows[:, None, :, None].expand(height, width, k, k),
                        cols[None, :, None, :].expand(height, width, k, k)), dim=-1).flatten(2, 3).float()
    offset = torch.zeros_like(rest).expand(len(weights), 1, -1, -1, -1, -1)
    return LayerTaps((height, width), rest, offset, weights * k * k, attends=True)


def taps_of(call: LayerCall) -> Optional[LayerTaps]:
    """The taps of a call of a deformable layer or of an attention; None of any other."""
    if isinstance(call.layer, FADNeighborhoodAttention):
        return _neighbours_of(call)
    layer, offset = call.layer, call.offset
    if offset is None:
        return None
    (k, _), (d, _), (stride, _) = layer.kernel_size, layer.dilation, layer.stride
    batch, _, height, width = offset.shape
    # without its offset a tap is where the plain convolution has it
    padding = layer.inner_padding + layer.outer_padding
    rows, cols = (torch.arange(n)[:, None] * stride - padding + torch.arange(k) * d for n in (height, width))
    rest = torch.stack((rows[:, None, :, None].expand(height, width, k, k),
                        cols[None, :, None, :].expand(height, width, k, k)), dim=-1).flatten(2, 3)
    offset = offset.float().cpu().unflatten(1, (-1, k * k, 2)).permute(0, 1, 4, 5, 2, 3)
    mask = torch.ones(offset.shape[:-1]) if call.mask is None else \
        call.mask.float().cpu().unflatten(1, (-1, k * k)).permute(0, 1, 3, 4, 2)
    height, width = call.selected.shape[-2:]
    return LayerTaps((height, width), rest.float(), offset, mask)


def select_taps(name: str, taps: LayerTaps, index: int = 0) -> StageTaps:
    """The taps for six output positions, spread over the map; for fewer on smaller maps.

    Of an attention they are the neighbours of two positions, or of one where the neighbours of two overlap.

    Places are scaled from the layer's input map to the image by the ratio of their sizes, as the dilation maps are.

    Args:
        name: Name of the layer.
        taps: Its taps.
        index: Which image of the batch.
    """
    height, width = taps.rest.shape[:2]

    def positions(down: int, across: int) -> Tuple[List[int], List[int]]:
        return (sorted({(2 * i + 1) * height // (2 * down) for i in range(down)}),
                sorted({(2 * i + 1) * width // (2 * across) for i in range(across)}))

    rows, cols = positions(1, _WINDOWS) if taps.attends else positions(_ROWS, _COLUMNS)
    if taps.attends:
        windows = taps.rest[rows][:, cols].flatten(0, 2)
        if len(windows.unique(dim=0)) < len(windows):
            rows, cols = positions(1, 1)
    size = torch.tensor(taps.size, dtype=torch.float32)

    def scaled(places: Tensor) -> np.ndarray:
        """(y, x) in pixels (..., 2) to (x, y) in units of the image."""
        return ((places + 0.5) / size).flip(-1).numpy()

    offset, mask = taps.offset[index], taps.mask[index]
    lengths = offset.norm(dim=-1)
    rest = taps.rest[rows][:, cols].flatten(0, 1)
    if taps.attends:
        own = torch.tensor([[i, j] for i in rows for j in cols], dtype=torch.float32)
        rest = own[:, None].expand_as(rest)
    places = (taps.rest + offset)[:, rows][:, :, cols].flatten(1, 2).transpose(0, 1).flatten(1, 2)
    weights = mask[:, rows][:, :, cols].flatten(1, 2).transpose(0, 1).flatten(1, 2)
    return StageTaps(
        name, scaled(rest), scaled(places), weights.numpy(), (lengths.mean().item(), lengths.max().item()),
        taps.attends)


def draw_taps(ax: Any, taps: StageTaps, width: float, height: float) -> Any:
    """Draw taps as dots in the colour of their mask, each with a line from its place without the offset, or from the
    position that attends, which has a ring.

    Args:
        ax: Axes of matplotlib that show the image.
        taps: From :func:`select_taps`.
        width, height: Of the image, in units of the axes.

    Returns:
        What a colour bar of the mask is made of.
    """
    from matplotlib.collections import LineCollection

    scale = np.array([width, height])
    ends = taps.taps * scale
    starts = np.tile(taps.rest * scale, (1, ends.shape[1] // taps.rest.shape[1], 1))
    lines = np.stack((starts, ends), axis=2).reshape(-1, 2, 2)
    ax.add_collection(LineCollection(list(lines), colors=_REST, linewidths=0.7, alpha=0.25 if taps.attends else 0.9))
    rest = (taps.rest[:, :1] if taps.attends else taps.rest) * scale
    ax.scatter(*rest.reshape(-1, 2).T, s=3, color=_REST, linewidths=0)
    if taps.attends:
        ax.scatter(*rest.reshape(-1, 2).T, s=110, facecolors='none', edgecolors=_REST, linewidths=1.6, zorder=3)
    dots = ax.scatter(
        *ends.reshape(-1, 2).T, c=taps.mask.reshape(-1), cmap='plasma', vmin=0, vmax=2, s=13, edgecolors='#222222',
        linewidths=0.3)
    ax.set(xlim=(0, width), ylim=(height, 0))
    return dots
