"""What the FADC layers of a model do to one image: dilation maps and FreqSelect band weights, as numbers and a picture.

In place of the dilation it shows where the taps of deformable layers lie, and which neighbours some positions of an
attention attend to.

    records = collect(model, x)                     # one record per call of an FADConv2d, in the order they run
    stages = summarize(records)                     # one entry per stage
    save(figure(photo, stages), 'fadc.png')

Only `figure` imports matplotlib, so that importing fadc_timm does not take longer.
"""
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..layers.hooks import LayerCall
from ._common import GREY, INK, fitted, run_watched, stages_of, stride_of, wrapped
from .images import to_rgb
from .taps import LayerTaps, StageTaps, draw_taps, select_taps, taps_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['LayerRecord', 'StageSummary', 'all_at_start', 'collect', 'figure', 'summarize', 'table']

_CONSTANT = 0.01  # a map that varies by less is called constant: FADC at its identity varies by eps = 1e-5


@dataclass
class LayerRecord:
    """What one FADC layer did in one forward pass; tensors are float32 on the CPU.

    Attributes:
        name: Name of the layer in the model.
        stage: The layer's name up to the first part with a digit, except in the name of the network that has it.
        stride: Stride of the layer's output with respect to the model's input.
        shape: (C, H', W') of the layer's output.
        dilation: (B, G, H', W') in pixels of the layer's input map; the layer's base dilation where it has no AdaDR.
        bands: FreqSelect's frequency bands, () where the layer has no FreqSelect.
        weights: (B, M, S, H, W) FreqSelect band weights at the layer's input, or None.
        taps: Where the taps of a deformable layer or of an attention lie, or None.
        change: (B,) how far the layer is from its start at most: the dilation from its base, the band weights, the
            masks of taps and AdaKern's gains from 1, the offsets from 0.
    """
    name: str
    stage: str
    stride: int
    shape: Tuple[int, int, int]
    dilation: torch.Tensor
    bands: Tuple[int, ...]
    weights: Optional[torch.Tensor]
    taps: Optional[LayerTaps]
    change: torch.Tensor


@dataclass
class StageSummary:
    """The layers of a stage averaged to one map of each kind, for one image of the batch.

    Attributes:
        name, stride, shape: As in the records; the last layer's shape.
        layers: Names of its layers, each once.
        dilation: (H', W') map, the mean over the layers.
        dilation_range: Smallest and largest dilation over all layers, before any averaging.
        weights: Band ('1/2-1', in units of Nyquist) to (H', W') map, high to low frequency; {} without FreqSelect.
        weight_ranges: Band to its smallest and largest weight over all layers, before any averaging.
        taps: The taps of the last of the layers with the largest base dilation, if it has any, or None.
        offset_lengths: Mean and largest length of an offset over all layers, in pixels of their input maps, or None.
        change: How far its layers are from their start at most, see the records.
    """
    name: str
    stride: int
    shape: Tuple[int, int, int]
    layers: List[str]
    dilation: np.ndarray
    dilation_range: Tuple[float, float]
    weights: Dict[str, np.ndarray]
    weight_ranges: Dict[str, Tuple[float, float]]
    taps: Optional[StageTaps]
    offset_lengths: Optional[Tuple[float, float]]
    change: float


def _change(
        call: LayerCall, dilation: torch.Tensor, weights: Optional[torch.Tensor], taps: Optional[LayerTaps],
) -> torch.Tensor:
    """`change` of a record."""
    values = [dilation - call.layer.dilation[0], *(g.float().cpu() - 1 for g in call.gains if g is not None)]
    if weights is not None:
        values.append(weights - 1)
    if taps is not None and not taps.attends:
        values += [taps.offset, taps.mask - 1]
    return torch.stack([v.abs().flatten(1).amax(1) for v in values]).amax(0)


def _band_labels(bands: Sequence[int], maps: int) -> List[str]:
    """(2, 4, 8), 4 -> ['1/2-1', '1/4-1/2', '1/8-1/4', '0-1/8'], fractions of Nyquist, one label per map."""
    edges = ['1', *(f'1/{b:g}' for b in bands), '0']
    return [f'{low}-{high}' for high, low in zip(edges, edges[1:])][:maps]


def collect(model: nn.Module, x: torch.Tensor) -> List[LayerRecord]:
    """Run a model once, in eval mode and without gradients, and record what its FADC layers chose.

    Args:
        model: Any model with FADC layers; its training flags are restored afterwards.
        x: (B, C, H, W) input on the model's device, already normalised.

    Returns:
        One record per call of a layer, in the order they ran.

    Raises:
        ValueError: The model has no FADC layer, or none of them ran.
    """
    records, stages = [], stages_of(model)

    def keep(call: LayerCall) -> None:
        batch, channels, height, width = call.output.shape
        dilation = torch.full((batch, 1, height, width), float(call.layer.dilation[0])) \
            if call.dilation is None else call.dilation.float().cpu()
        fs = call.layer.freq_select
        weights = None if fs is None else fs.band_weights(call.x).float().cpu()
        taps = taps_of(call)
        records.append(LayerRecord(
            call.name, stages[call.name], stride_of(call.output, x), (channels, height, width), dilation,
            () if fs is None else fs.bands, weights, taps, _change(call, dilation, weights, taps)))

    run_watched(model, x, keep)
    return records


def summarize(records: Sequence[LayerRecord], index: int = 0) -> List[StageSummary]:
    """Average records to one map of each kind per stage.

    Groups (AdaDR's G, FreqSelect's S) are averaged too. Weight maps are resized to the stage's output, because the
    weight maps of a strided layer are finer. Only layers with the same bands as the stage's first layer count for its
    weights.

    Args:
        records: From `collect`.
        index: Which image of the batch.

    Returns:
        One summary per stage, in the order of the calls; layers of different output sizes form different stages.
    """
    groups: Dict[Tuple[str, int, int], List[LayerRecord]] = {}
    for r in records:
        groups.setdefault((r.stage, *r.shape[1:]), []).append(r)
    out = []
    for (stage, height, width), rs in groups.items():
        dilation = torch.stack([r.dilation[index].mean(0) for r in rs]).mean(0).numpy()
        low = min(r.dilation[index].min().item() for r in rs)
        high = max(r.dilation[index].max().item() for r in rs)
        weighted = [(_band_labels(r.bands, r.weights.shape[1]), r.weights[index])
                    for r in rs if r.weights is not None]
        labels = weighted[0][0] if weighted else []
        same = [w for bands, w in weighted if bands == labels]
        maps = [F.interpolate(w.mean(1)[None], (height, width), mode='area')[0] for w in same]
        weights = dict(zip(labels, torch.stack(maps).mean(0).numpy())) if maps else {}
        ranges = {label: (min(w[i].min().item() for w in same), max(w[i].max().item() for w in same))
                  for i, label in enumerate(labels)}
        last, names = rs[-1], list(dict.fromkeys(r.name for r in rs))
        lengths = [r.taps.offset[index].norm(dim=-1) for r in rs if r.taps is not None and not r.taps.attends]
        moved = (sum(v.mean().item() for v in lengths) / len(lengths), max(v.max().item() for v in lengths)) \
            if lengths else None
        widest = max(reversed(rs), key=lambda r: 0. if r.taps is None else r.dilation.max().item())
        taps = None if widest.taps is None else select_taps(widest.name, widest.taps, index)
        out.append(StageSummary(
            stage, last.stride, last.shape, names, dilation, (low, high), weights, ranges, taps, moved,
            max(r.change[index].item() for r in rs)))
    return out


def _is_constant(low: float, high: float) -> bool:
    return high - low < _CONSTANT


def all_at_start(stages: Sequence[StageSummary]) -> bool:
    """Whether all layers do what they did before any training: see `change` of the records."""
    return all(s.change < _CONSTANT for s in stages)


def table(stages: Sequence[StageSummary]) -> str:
    """The stages as a text table: layers, output, stride, mean dilation (its range over the layers), band weights. Of
    deformable layers the lengths of the offsets take the place of the dilation.
    """
    labels = list(dict.fromkeys(label for s in stages for label in s.weights))
    rows = [['stage', 'layers', 'output', 'stride', 'dilation (min to max)', *(f'w {label}' for label in labels)]]
    for s in stages:
        low, high = s.dilation_range
        rows.append([
            s.name, str(len(s.layers)), 'x'.join(map(str, s.shape)), str(s.stride),
            f'{s.dilation.mean():.2f} ({low:.2f} to {high:.2f})' if s.offset_lengths is None else
            f'offsets {s.offset_lengths[0]:.2f} (to {s.offset_lengths[1]:.2f})',
            *(f'{s.weights[label].mean():.2f}' if label in s.weights else '-' for label in labels)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _caption(values: np.ndarray, low: float, high: float) -> str:
    """The mean of a stage's map, and the range over its layers: what the table says too."""
    mean, text = f'{values.mean():.2f}', f'{low:.2f} to {high:.2f}'
    if _is_constant(low, high):
        return f'constant {mean}'
    drawn = f'{values.min():.2f} to {values.max():.2f}'
    return f'mean {mean}, {text}{"" if text == drawn else " before averaging"}'


def _colour_range(values: np.ndarray) -> Tuple[float, float]:
    """Ends of the colour bar: percentiles, so that no lone pixel at the border sets them."""
    low, high = float(values.min()), float(values.max())
    if _is_constant(low, high):
        return low - 0.5, high + 0.5
    p1, p99 = np.percentile(values, (1, 99))
    pad = max(0.0, 0.1 - (p99 - p1)) / 2
    return p1 - pad, p99 + pad


def _pixels(image: Any) -> np.ndarray:
    """(H, W) or (H, W, 3) floats in [0, 1] of what `figure` takes."""
    values = np.asarray(to_rgb(image) if isinstance(image, Image.Image) else image)
    if values.ndim != 2 and (values.ndim != 3 or values.shape[2] != 3):
        raise ValueError(f'The image must be (H, W) or (H, W, 3), got {values.shape}.')
    if not values.size:
        raise ValueError(f'The image has no pixels: {values.shape}.')
    if values.dtype == np.uint8:
        return values / 255.
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f'The image must be uint8 or float, got {values.dtype}.')
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f'The image must lie in [0, 1], got {values.min():g} to {values.max():g}.')
    return values.astype(float)


def figure(image: Any, stages: Sequence[StageSummary], title: str = 'FADC', note: str = '') -> 'Figure':
    """Draw the image, and for each stage the dilation map, or where the taps of a deformable layer or the neighbours of
    an attention lie, and the band weights.

    Args:
        image: What the model saw: a PIL image of any mode, or an (H, W) or (H, W, 3) array, uint8 or float in [0, 1].
        stages: From `summarize`; one column each.
        title: Headline; note: the text below it, e.g. where the weights come from.

    Returns:
        A matplotlib Figure with the Agg canvas, 1600 pixels wide for three or four stages: narrower for fewer, wider
        for more.

    Raises:
        ValueError: The image has another shape, dtype or range, or a mode without a known range; or what is drawn is
            not finite.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    photo = _pixels(image)
    for s in stages:
        maps = [*s.weights.values(), *([s.dilation] if s.taps is None else [s.taps.taps, s.taps.mask])]
        if not all(np.isfinite(m).all() for m in maps):
            raise ValueError(f'{s.name} has dilations, taps or band weights that are not finite.')
    grey = photo if photo.ndim == 2 else photo @ (0.299, 0.587, 0.114)
    extent = (0, photo.shape[1], photo.shape[0], 0)
    labels = list(dict.fromkeys(label for s in stages for label in s.weights))
    # lengths in inches from the upper left corner, at 100 pixels per inch
    margin, gap, caption, bar = 0.3, 0.25, 0.5, 0.8
    columns = len(stages) + 1
    w = max(2.8, (16 - 2 * margin + gap) / max(4, columns) - gap)
    fig_w = 2 * margin + columns * (w + gap) - gap
    lines = wrapped(note, 11, fig_w - 2 * margin)
    head = 0.75 + 0.2 * max(1, len(lines))
    h = w * min(max(photo.shape[0] / photo.shape[1], 0.3), 1.25)
    rows = [head, *(head + caption + h + bar + i * (caption + h + gap / 2) for i in range(len(labels)))]
    fig_h = rows[-1] + caption + h + bar + 0.2
    fig = Figure((fig_w, fig_h), dpi=100, facecolor='white')
    FigureCanvasAgg(fig)

    def write(x: float, y: float, text: str, size: float, color: str = GREY, weight: str = 'normal') -> None:
        fig.text(x / fig_w, 1 - y / fig_h, text, fontsize=size, color=color, weight=weight)

    def axes(x: float, y: float, width: float, height: float) -> Any:
        return fig.add_axes((x / fig_w, 1 - (y + height) / fig_h, width / fig_w, height / fig_h))

    def panel(column: int, y: float, name: str, line: str) -> Any:
        x = margin + column * (w + gap)
        write(x, y + 0.21, name, fitted(11, name, w, bold=True), INK, 'bold')
        write(x, y + 0.41, line, fitted(9.5, line, w))
        ax = axes(x, y + caption, w, h)
        ax.set_axis_off()
        return ax

    def over_photo(ax: Any, values: np.ndarray, cmap: str, low: float, high: float) -> Any:
        ax.imshow(grey, cmap='gray', vmin=-0.3, vmax=1.3, extent=extent)
        return ax.imshow(values, cmap=cmap, vmin=low, vmax=high, alpha=0.72, extent=extent, interpolation='nearest')

    def colour_bar(mapped: Any, ax: Any, label: str, **kwargs: Any) -> None:
        drawn = fig.colorbar(mapped, cax=ax, orientation='horizontal', **kwargs)
        drawn.set_label('\n'.join(wrapped(label, 9.5, ax.get_position().width * fig_w)), fontsize=9.5, color=INK)
        drawn.ax.tick_params(labelsize=9, colors=INK)
        drawn.outline.set_visible(False)
        if not isinstance(kwargs['ticks'], MaxNLocator):  # at both ends, where labels of two bars would touch
            first, *_, last = drawn.ax.get_xticklabels()
            first.set_horizontalalignment('left')
            last.set_horizontalalignment('right')

    write(margin, 0.45, title, fitted(16, title, fig_w - 2 * margin, bold=True), INK, 'bold')
    for i, line in enumerate(lines):
        write(margin, 0.75 + 0.2 * i, line, 11)
    ax = panel(0, head, 'Input', f'{photo.shape[1]} × {photo.shape[0]} pixels')
    ax.imshow(photo, cmap='gray', vmin=0, vmax=1)
    for row, label in enumerate(labels, 1):
        low, high = (float(Fraction(edge)) for edge in label.split('-'))
        ax = panel(0, rows[row], f'Band {label} of Nyquist', 'in the spectrum of a layer\'s input')
        ax.set(xlim=(-1.06, 1.06), ylim=(-1.06, 1.06), aspect='equal')
        for edge, color in ((1, '#e8e8e8'), (high, '#4a5a6a'), (low, '#e8e8e8')):
            ax.add_patch(Rectangle((-edge, -edge), 2 * edge, 2 * edge, facecolor=color))
        ax.plot((-1, 1), (0, 0), (0, 0), (-1, 1), color='white', linewidth=0.8)

    # one scale for all weights, centred at 1
    changes = [abs(m - 1) for s in stages for m in s.weights.values()]
    reach = max((float(np.percentile(change, 99)) for change in changes), default=0)
    reach = min(1., max(0.1, math.ceil(reach * 10) / 10))
    beyond = any(float(change.max()) > reach for change in changes)
    weights = None
    for column, s in enumerate(stages, 1):
        ticks: Any = MaxNLocator(5) if s.taps is None else np.linspace(0, 2, 5)
        count = '1 layer' if len(s.layers) == 1 else f'average of {len(s.layers)} layers'
        if s.taps is None:
            ax = panel(column, head, f'{s.name}: dilation, stride {s.stride}',
                       f'{count}; {_caption(s.dilation, *s.dilation_range)}')
            mapped = over_photo(ax, s.dilation, 'viridis', *_colour_range(s.dilation))
            label, extend = 'dilation, pixels of the layer\'s input map', 'both'
        elif s.taps.attends:
            positions = 'one position' if len(s.taps.rest) == 1 else f'{len(s.taps.rest)} positions'
            ax = panel(column, head, f'{s.name}: neighbours, stride {s.stride}', f'{s.taps.layer}, of {positions}')
            ax.imshow(grey, cmap='gray', vmin=-0.3, vmax=1.3, extent=extent)
            mapped = draw_taps(ax, s.taps, photo.shape[1], photo.shape[0])
            label, extend = 'attention weight, times the number of neighbours', 'max'
        else:
            text = f'{s.taps.layer}; offsets: mean {s.taps.lengths[0]:.2f}, to {s.taps.lengths[1]:.2f} pixels'
            ax = panel(column, head, f'{s.name}: taps, stride {s.stride}', text)
            ax.imshow(grey, cmap='gray', vmin=-0.3, vmax=1.3, extent=extent)
            mapped = draw_taps(ax, s.taps, photo.shape[1], photo.shape[0])
            label, extend = 'mask of the tap; line: its offset', 'neither'
        ax = axes(margin + column * (w + gap), head + caption + h + 0.12, w, 0.12)
        colour_bar(mapped, ax, label, ticks=ticks, extend=extend)
        for row, label in enumerate(labels, 1):
            if label in s.weights:
                ax = panel(column, rows[row], f'{s.name}: band {label}',
                           f'weight: {_caption(s.weights[label], *s.weight_ranges[label])}')
                weights = over_photo(ax, s.weights[label], 'RdBu_r', 1 - reach, 1 + reach)
            else:
                panel(column, rows[row], f'{s.name}: band {label}', 'has no weight')
    if weights is not None:
        x = margin + w + gap
        colour_bar(weights, axes(x, fig_h - bar, len(stages) * (w + gap) - gap, 0.14),
                   'FreqSelect weight of the band: 1 leaves it as it is, 0 removes it, 2 doubles it',
                   ticks=np.linspace(1 - reach, 1 + reach, 5), extend='both' if beyond else 'neither')
    return fig
