"""What the FADC layers of a model do to one image: dilation maps and FreqSelect band weights, as numbers and a picture.

Of deformable layers it shows where their taps lie in place of the dilation.

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
from torch import nn

from ..layers.hooks import LayerCall
from ._common import GREY, INK, run_watched, stage_name, stride_of
from .taps import LayerTaps, StageTaps, draw_taps, select_taps, taps_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['LayerRecord', 'StageSummary', 'collect', 'figure', 'summarize', 'table']

_CONSTANT = 0.01  # a map that varies by less is called constant: FADC at its identity varies by eps = 1e-5


@dataclass
class LayerRecord:
    """What one FADConv2d did in one forward pass; tensors are float32 on the CPU.

    Attributes:
        name: Name of the layer in the model.
        stage: The layer's name up to the first part with a digit.
        stride: Stride of the layer's output with respect to the model's input.
        shape: (C, H', W') of the layer's output.
        dilation: (B, G, H', W') in pixels of the layer's input map; the layer's base dilation where it has no AdaDR.
        bands: FreqSelect's frequency bands, () where the layer has no FreqSelect.
        weights: (B, M, S, H, W) FreqSelect band weights at the layer's input, or None.
        taps: Where the taps of a deformable layer lie, or None.
    """
    name: str
    stage: str
    stride: int
    shape: Tuple[int, int, int]
    dilation: torch.Tensor
    bands: Tuple[int, ...]
    weights: Optional[torch.Tensor]
    taps: Optional[LayerTaps] = None


@dataclass
class StageSummary:
    """The layers of a stage averaged to one map of each kind, for one image of the batch.

    Attributes:
        name, stride, shape: As in the records; the last layer's shape.
        layers: Names of its layers.
        dilation: (H', W') map, the mean over the layers.
        dilation_range: Smallest and largest dilation over all layers, before any averaging.
        weights: Band ('1/2-1', in units of Nyquist) to (H', W') map, high to low frequency; {} without FreqSelect.
        taps: The taps of the last layer, if it is deformable, or None.
    """
    name: str
    stride: int
    shape: Tuple[int, int, int]
    layers: List[str]
    dilation: np.ndarray
    dilation_range: Tuple[float, float]
    weights: Dict[str, np.ndarray]
    taps: Optional[StageTaps] = None


def _band_labels(bands: Sequence[int], maps: int) -> List[str]:
    """(2, 4, 8), 4 -> ['1/2-1', '1/4-1/2', '1/8-1/4', '0-1/8'], fractions of Nyquist, one label per map."""
    edges = ['1', *(f'1/{b:g}' for b in bands), '0']
    return [f'{low}-{high}' for high, low in zip(edges, edges[1:])][:maps]


def collect(model: nn.Module, x: torch.Tensor) -> List[LayerRecord]:
    """Run a model once, in eval mode and without gradients, and record what its FADC layers chose.

    Args:
        model: Any model with FADConv2d layers; its training flags are restored afterwards.
        x: (B, C, H, W) input on the model's device, already normalised.

    Returns:
        One record per call of an FADConv2d, in the order they ran.

    Raises:
        ValueError: The model has no FADConv2d layer, or none of them ran.
    """
    records = []

    def keep(call: LayerCall) -> None:
        batch, channels, height, width = call.output.shape
        dilation = call.dilation
        if dilation is None:
            dilation = torch.full((batch, 1, height, width), float(call.layer.dilation[0]))
        fs = call.layer.freq_select
        weights = None if fs is None else fs.band_weights(call.x).float().cpu()
        records.append(LayerRecord(
            call.name, stage_name(call.name), stride_of(call.output, x), (channels, height, width),
            dilation.float().cpu(), () if fs is None else fs.bands, weights, taps_of(call)))

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
        weighted = [(r.bands, r.weights[index].mean(1)) for r in rs if r.weights is not None]
        labels = _band_labels(weighted[0][0], len(weighted[0][1])) if weighted else []
        maps = [m for bands, m in weighted if _band_labels(bands, len(m)) == labels]
        maps = [F.interpolate(m[None], (height, width), mode='area')[0] for m in maps]
        weights = dict(zip(labels, torch.stack(maps).mean(0).numpy())) if maps else {}
        last, names = rs[-1], [r.name for r in rs]
        taps = None if last.taps is None else select_taps(last.name, last.taps, index)
        out.append(StageSummary(stage, last.stride, last.shape, names, dilation, (low, high), weights, taps))
    return out


def table(stages: Sequence[StageSummary]) -> str:
    """The stages as a text table: layers, output, stride, mean dilation (its range over the layers), band weights. Of
    deformable layers the offsets of the last one take the place of the dilation.
    """
    labels = list(dict.fromkeys(label for s in stages for label in s.weights))
    rows = [['stage', 'layers', 'output', 'stride', 'dilation (min to max)', *(f'w {label}' for label in labels)]]
    for s in stages:
        low, high = s.dilation_range
        rows.append([
            s.name, str(len(s.layers)), 'x'.join(map(str, s.shape)), str(s.stride),
            f'{s.dilation.mean():.2f} ({low:.2f} to {high:.2f})' if s.taps is None else
            f'offsets {s.taps.lengths[0]:.2f} (to {s.taps.lengths[1]:.2f})',
            *(f'{s.weights[label].mean():.2f}' if label in s.weights else '-' for label in labels)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _spread(values: np.ndarray) -> Tuple[str, float, float]:
    """A caption and a colour range. The range is made of percentiles, so that no lone pixel at the border sets it."""
    low, high = float(values.min()), float(values.max())
    if high - low < _CONSTANT:
        return f'constant {values.mean():.2f}', low - 0.5, high + 0.5
    p1, p99 = np.percentile(values, (1, 99))
    pad = max(0.0, 0.1 - (p99 - p1)) / 2
    return f'mean {values.mean():.2f}, {low:.2f} to {high:.2f}', p1 - pad, p99 + pad


def figure(image: Any, stages: Sequence[StageSummary], title: str = 'FADC', note: str = '') -> 'Figure':
    """Draw the image, and for each stage the dilation map, or where the taps of a deformable layer lie, and the band
    weights.

    Args:
        image: What the model saw: a PIL image, or an (H, W) or (H, W, 3) array, uint8 or float in [0, 1].
        stages: From `summarize`; one column each.
        title: Headline; note: the line below it, e.g. where the weights come from.

    Returns:
        A matplotlib Figure with the Agg canvas, 1600 pixels wide (more from six stages on).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    photo = np.asarray(image)
    photo = photo / 255. if photo.dtype == np.uint8 else photo.astype(float)
    grey = photo if photo.ndim == 2 else photo[..., :3] @ (0.299, 0.587, 0.114)
    extent = (0, photo.shape[1], photo.shape[0], 0)
    labels = list(dict.fromkeys(label for s in stages for label in s.weights))
    # lengths in inches from the upper left corner, at 100 pixels per inch
    margin, gap, head, caption, bar = 0.3, 0.25, 0.95, 0.5, 0.8
    fig_w = max(16., 2 * margin + (len(stages) + 1) * (2.8 + gap))
    w = (fig_w - 2 * margin - len(stages) * gap) / max(4, len(stages) + 1)
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
        write(x, y + 0.21, name, 11 * min(1., 10 * w / len(name)), INK, 'bold')  # 10 and 14 characters per inch
        write(x, y + 0.41, line, 9.5 * min(1., 14 * w / len(line)))
        ax = axes(x, y + caption, w, h)
        ax.set_axis_off()
        return ax

    def over_photo(ax: Any, values: np.ndarray, cmap: str, low: float, high: float) -> Any:
        ax.imshow(grey, cmap='gray', vmin=-0.3, vmax=1.3, extent=extent)
        return ax.imshow(values, cmap=cmap, vmin=low, vmax=high, alpha=0.72, extent=extent, interpolation='nearest')

    def colour_bar(mapped: Any, ax: Any, label: str, **kwargs: Any) -> None:
        drawn = fig.colorbar(mapped, cax=ax, orientation='horizontal', **kwargs)
        drawn.set_label(label, fontsize=9.5, color=INK)
        drawn.ax.tick_params(labelsize=9, colors=INK)
        drawn.outline.set_visible(False)

    write(margin, 0.45, title, 16, INK, 'bold')
    write(margin, 0.75, note, 11)
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
    reach = max((float(np.percentile(abs(m - 1), 99)) for s in stages for m in s.weights.values()), default=0)
    reach = min(1., max(0.1, math.ceil(reach * 10) / 10))
    weights = None
    for column, s in enumerate(stages, 1):
        count = '1 layer' if len(s.layers) == 1 else f'average of {len(s.layers)} layers'
        if s.taps is None:
            text, low, high = _spread(s.dilation)
            ax = panel(column, head, f'{s.name}: dilation, stride {s.stride}', f'{count}; {text}')
            mapped = over_photo(ax, s.dilation, 'viridis', low, high)
            label, extend = 'dilation, pixels of the layer\'s input map', 'both'
        else:
            text = f'{s.taps.layer}; offsets: mean {s.taps.lengths[0]:.2f}, to {s.taps.lengths[1]:.2f} pixels'
            ax = panel(column, head, f'{s.name}: taps, stride {s.stride}', text)
            ax.imshow(grey, cmap='gray', vmin=-0.3, vmax=1.3, extent=extent)
            mapped = draw_taps(ax, s.taps, photo.shape[1], photo.shape[0])
            label, extend = 'mask of the tap; line: its offset', 'neither'
        ax = axes(margin + column * (w + gap), head + caption + h + 0.12, w, 0.12)
        colour_bar(mapped, ax, label, ticks=MaxNLocator(5), extend=extend)
        for row, label in enumerate(labels, 1):
            if label in s.weights:
                ax = panel(column, rows[row], f'{s.name}: band {label}', f'weight: {_spread(s.weights[label])[0]}')
                weights = over_photo(ax, s.weights[label], 'RdBu_r', 1 - reach, 1 + reach)
            else:
                panel(column, rows[row], f'{s.name}: band {label}', 'has no weight')
    if weights is not None:
        x = margin + w + gap
        colour_bar(weights, axes(x, fig_h - bar, len(stages) * (w + gap) - gap, 0.14),
                   'FreqSelect weight of the band: 1 leaves it as it is, 0 removes it, 2 doubles it',
                   ticks=np.linspace(1 - reach, 1 + reach, 5))
    return fig
