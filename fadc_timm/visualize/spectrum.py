"""Spectra of FADC layers: of the features before and after FreqSelect, of the kernels before and after AdaKern.

    layers = collect_spectra(model, x)                         # of every layer with FADC that ran
    save(spectrum_figure(first_of_stages(layers)), 'spectrum.png')

Frequencies (u, v) are in cycles per pixel of the layer's input map, -0.5 to 0.5. FreqSelect's bands are square rings
in the plane of these frequencies, so profiles go by max(|u|, |v|).
"""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import FADConv2d
from ..layers.hooks import LayerCall
from ..ops.runtime import accumulation_dtype
from ..ops.sampled_conv.folded_gains import sample_kernels
from ._common import GREY, INK, fitted, run_watched, stages_of, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['LayerSpectra', 'all_unchanged', 'collect_spectra', 'high_share', 'first_of_stages', 'profile',
           'spectrum_figure', 'spectrum_table']

_KERNEL_POINTS = 65  # frequencies along an axis at which a kernel's response is drawn, -0.5 and 0.5 among them


@dataclass
class LayerSpectra:
    """Power spectra of one call of a layer with FADC, float64, zero frequency in the middle; see `frequencies`.

    Attributes:
        name: Name of the layer in the model.
        stage: The layer's name up to the first part with a digit, except in the name of the network that has it.
        shape: (C, H, W) of its input.
        bands: The factors f of FreqSelect's bands, whose edges lie at 1/f of Nyquist; () without FreqSelect.
        features: (H, W), mean over images and channels of |DFT|^2 / (H*W) of the input.
        selected: (H, W), the same mean for FreqSelect's output; None without FreqSelect.
        kernel: (65, 65), mean over pairs of channels of the kernel's squared response, at dilation 1; None of an
            attention, which has no kernel.
        adapted: (65, 65), the same mean for the kernels that AdaKern makes for these images; None without AdaKern, and
            of an attention.
    """
    name: str
    stage: str
    shape: Tuple[int, int, int]
    bands: Tuple[int, ...]
    features: np.ndarray
    selected: Optional[np.ndarray]
    kernel: Optional[np.ndarray]
    adapted: Optional[np.ndarray]


def frequencies(n: int, kernel: bool = False) -> np.ndarray:
    """(n,) frequencies of an axis of a spectrum, in cycles per pixel."""
    return np.linspace(-0.5, 0.5, n) if kernel else np.fft.fftshift(np.fft.fftfreq(n))


def _feature_spectrum(x: Tensor) -> np.ndarray:
    """The power spectrum (H, W) of a map (B, C, H, W)."""
    x = x.cpu().to(accumulation_dtype(x.dtype))  # not every device has complex numbers and float64
    power = torch.fft.fft2(x, norm='ortho').abs().square().mean(dim=(0, 1))
    return torch.fft.fftshift(power).double().numpy()


def _kernel_spectrum(kernels: Tensor) -> np.ndarray:
    """The mean power spectrum (65, 65) of kernels (..., k, k), from the second moments of their taps: no kernel is
    transformed by itself."""
    k = kernels.shape[-1]
    taps = kernels.reshape(-1, k * k).cpu().double()
    moments = (taps.T @ taps / len(taps)).numpy()
    f = frequencies(_KERNEL_POINTS, kernel=True)
    axis = np.exp(-2j * np.pi * f[:, None] * np.arange(k))
    waves = (axis[:, None, :, None] * axis[None, :, None, :]).reshape(len(f) ** 2, k * k)
    return ((waves @ moments) * waves.conj()).sum(1).real.reshape(len(f), len(f)).clip(0)


def _adapted_kernels(call: LayerCall) -> Tensor:
    """The kernels that AdaKern makes for each image, (B, O, C/groups, k, k)."""
    low_in, low_out, high_in, high_out = (None if g is None else g.float() for g in call.gains)
    weight = call.layer.weight.float()
    return sample_kernels(weight, (low_in, low_out, high_in, high_out), call.layer.groups).view(-1, *weight.shape)


def collect_spectra(model: nn.Module, x: Tensor) -> List[LayerSpectra]:
    """Run a model once, in eval mode and without gradients, for the spectra of its FADC layers.

    Args:
        model: Any model with FADC layers; its training flags are restored afterwards.
        x: (B, C, H, W) input on the model's device, already normalised.

    Returns:
        One entry per call of a layer, in the order they ran.

    Raises:
        ValueError: The model has no FADC layer, or none of them ran.
    """
    out, stages = [], stages_of(model)

    def keep(call: LayerCall) -> None:
        fs, c, h, w = call.layer.freq_select, *call.x.shape[1:]
        is_conv = isinstance(call.layer, FADConv2d)
        out.append(LayerSpectra(
            call.name, stages[call.name], (c, h, w), () if fs is None else fs.bands, _feature_spectrum(call.x),
            None if fs is None else _feature_spectrum(call.selected),
            _kernel_spectrum(call.layer.weight) if is_conv else None,
            None if call.layer.ada_kern is None or not is_conv else _kernel_spectrum(_adapted_kernels(call))))

    run_watched(model, x, keep)
    return out


def first_of_stages(spectra: Sequence[LayerSpectra]) -> List[LayerSpectra]:
    """The first layer of each stage: in most networks it is strided, aliases most and has the largest input."""
    return list({s.stage: s for s in reversed(spectra)}.values())[::-1]


def all_unchanged(spectra: Sequence[LayerSpectra]) -> bool:
    """Whether every spectrum after is the one before, to a thousandth, as in a model that starts as its base."""
    return all(
        before is None or after is None or np.allclose(after, before, rtol=1e-3, atol=1e-6 * before.max())
        for s in spectra for before, after in ((s.features, s.selected), (s.kernel, s.adapted)))


def _rings(power: np.ndarray, kernel: bool) -> np.ndarray:
    """max(|u|, |v|) at each frequency of a spectrum (H, W)."""
    u, v = (np.abs(frequencies(n, kernel)) for n in power.shape)
    return np.maximum(u[:, None], v)


def profile(power: np.ndarray, kernel: bool = False) -> Tuple[np.ndarray, np.ndarray]:
    """Mean power on square rings: the frequency max(|u|, |v|) of each ring in cycles per pixel, and its mean power.

    Args:
        power: (H, W) spectrum; rings are as wide as its shorter axis resolves.
        kernel: Whether the spectrum is a kernel's.
    """
    n = min(power.shape) - int(kernel)  # a kernel's axis has both -0.5 and 0.5
    ring = np.minimum(np.round(_rings(power, kernel) * n), n // 2).astype(int).ravel()
    count = np.bincount(ring)
    used = np.flatnonzero(count)
    return used / n, np.bincount(ring, power.ravel())[used] / count[used]


def high_share(power: np.ndarray, kernel: bool = False) -> float:
    """Share of the power at max(|u|, |v|) above 1/4 cycle per pixel, without the zero frequency; NaN without power."""
    ring = _rings(power, kernel)
    rest = power[ring > 0].sum()
    return float(power[ring > 0.25].sum() / rest) if rest > 0 else float('nan')


def spectrum_table(spectra: Sequence[LayerSpectra]) -> str:
    """A text table: per layer the share of the power above 1/4 cycle per pixel, before and after."""
    rows = [['layer', 'input', 'features', 'after FreqSelect', 'kernel', 'after AdaKern']]
    for s in spectra:
        shares = [
            '-' if power is None else f'{100 * high_share(power, kernel):.1f} %'
            for power, kernel in ((s.features, False), (s.selected, False), (s.kernel, True), (s.adapted, True))]
        rows.append([s.name, 'x'.join(map(str, s.shape)), *shares])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return '\n'.join(['share of the power above 1/4 cycle per pixel, the zero frequency left out:', *lines])


def _log(power: np.ndarray, floor: float) -> np.ndarray:
    return np.log10(np.maximum(power, floor))


def spectrum_figure(spectra: Sequence[LayerSpectra], title: str = 'FADC', note: str = '') -> 'Figure':
    """Draw a column per layer: features before and after FreqSelect, kernels before and after AdaKern.

    Maps show log10 of the power, with one scale for before and after. Below them are the profiles over max(|u|, |v|).

    Args:
        spectra: From `collect_spectra`, one or more.
        title: Headline; note: the text below it, e.g. where the weights come from.

    Returns:
        A matplotlib Figure with the Agg canvas, as wide as its columns: 1600 pixels for three.

    Raises:
        ValueError: There are no spectra, or some are not finite.
    """
    if not spectra:
        raise ValueError('There are no spectra to draw.')
    for s in spectra:
        if not all(p is None or np.isfinite(p).all() for p in (s.features, s.selected, s.kernel, s.adapted)):
            raise ValueError(f'{s.name} has a spectrum that is not finite.')
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # lengths in inches from the upper left corner
    margin, left, gap, caption, labels = 0.3, 0.7, 0.3, 0.62, 0.52
    column = 3.78 if len(spectra) > 3 else 12.2 / 3
    side = (column - gap - left - 0.14) / 2
    line_h, bar = 1.45, 0.62
    block = caption + side + labels + bar + line_h + labels + 0.25
    width = len(spectra) * column - gap
    lines = wrapped(note, 10.5, width)
    head = 0.8 + 0.2 * max(1, len(lines))
    has_kernels = any(s.kernel is not None for s in spectra)
    # rounded, as matplotlib before 3.11 has one pixel less where a sum of floats is just below a whole number
    fig_w, fig_h = round(width + 2 * margin, 12), head + (2 if has_kernels else 1) * block
    fig = Figure((fig_w, fig_h), dpi=128, facecolor='white')
    FigureCanvasAgg(fig)

    def write(x: float, y: float, text: str, size: float, color: str = GREY, weight: str = 'normal') -> None:
        fig.text(x / fig_w, 1 - y / fig_h, text, fontsize=size, color=color, weight=weight)

    def axes(x: float, y: float, width: float, height: float, xlabel: str = '', ylabel: str = '') -> Any:
        ax = fig.add_axes((x / fig_w, 1 - (y + height) / fig_h, width / fig_w, height / fig_h))
        ax.set_xlabel(xlabel, fontsize=10, color=INK, labelpad=3)
        ax.set_ylabel(ylabel, fontsize=10, color=INK, labelpad=4)
        ax.tick_params(labelsize=9.5, colors=INK)
        return ax

    def draw(x: float, y: float, s: LayerSpectra, before: np.ndarray, after: Optional[np.ndarray],
             names: Tuple[str, str], kernel: bool) -> None:
        floor = before.max() * 1e-12 or 1e-12
        maps = [_log(p, floor) for p in (before, after) if p is not None]
        low, high = np.percentile(np.stack(maps), (0.5, 99.9))
        middle = (low + high) / 2
        low, high = min(low, middle - 0.05), max(high, middle + 0.05)  # a constant response has a scale too
        edges = [(f[0] - (f[1] - f[0]) / 2 if len(f) > 1 else -0.5, f[-1] + (f[-1] - f[-2]) / 2 if len(f) > 1 else 0.5)
                 for f in (frequencies(n, kernel) for n in before.shape)]
        extent = (*edges[1], edges[0][1], edges[0][0])
        mapped: Any = None
        for i, name in enumerate(names):
            ax = axes(x + left + i * (side + 0.14), y, side, side, 'u, cycles per pixel',
                      '' if i else 'v, cycles per pixel')
            ax.set_title(name, fontsize=10.5, color=INK, pad=5)
            ax.set(xlim=extent[:2], ylim=extent[2:], xticks=(-0.25, 0, 0.25), yticks=(-0.25, 0, 0.25))
            ax.set_xticklabels(('−¼', '0', '¼'))
            ax.set_yticklabels(('−¼', '0', '¼') if not i else ())
            if i < len(maps):
                mapped = ax.imshow(maps[i], cmap='magma', vmin=low, vmax=high, extent=extent, interpolation='nearest')
            else:
                ax.text(0, 0, 'switched off', ha='center', va='center', fontsize=10.5, color=GREY)
        y += side + labels
        ax = axes(x + left, y, 2 * side + 0.14, 0.11)
        drawn = fig.colorbar(mapped, cax=ax, orientation='horizontal', ticks=MaxNLocator(5), extend='both')
        drawn.set_label('log10 of the squared response' if kernel else 'log10 of the power', fontsize=10, color=INK)
        drawn.ax.tick_params(labelsize=9.5, colors=INK)
        drawn.outline.set_visible(False)
        y += bar
        ax = axes(x + left, y, 2 * side + 0.14, line_h, 'max(|u|, |v|), cycles per pixel',
                  'squared response' if kernel else 'mean power')
        for power, name, color, width in ((before, names[0], '#888888', 2.6), (after, names[1], '#c03a2b', 1.6)):
            if power is not None:
                ax.plot(*profile(power, kernel), label=name, color=color, linewidth=width)
        if kernel:
            ax.set_ylim(bottom=0)
        else:
            ax.set_yscale('log')
            for j, f in enumerate(s.bands):
                ax.axvline(0.5 / f, color='#bbbbbb', linewidth=0.9, linestyle='--', zorder=0,
                           label='_' if j else 'edges of the bands')
        ax.set_xlim(0, 0.5)
        ax.spines[['top', 'right']].set_visible(False)
        ax.legend(fontsize=9, frameon=False, loc='best')

    def share(before: np.ndarray, after: Optional[np.ndarray], kernel: bool) -> str:
        values = [f'{100 * high_share(p, kernel):.0f} %' for p in (before, after) if p is not None]
        return f'power above ¼: {" to ".join(values)}'

    write(margin, 0.42, title, fitted(15, title, width, bold=True), INK, 'bold')
    for i, line in enumerate(lines):
        write(margin, 0.72 + 0.2 * i, line, 10.5)
    for i, s in enumerate(spectra):
        x, y = margin + i * column, head
        name = f'{s.name}: features'
        write(x, y + 0.12, name, fitted(11.5, name, column - gap, bold=True), INK, 'bold')
        write(x, y + 0.32, f'{s.shape[0]} channels, {s.shape[2]} × {s.shape[1]}; '
              + share(s.features, s.selected, False), 9.5)
        draw(x, y + caption, s, s.features, s.selected, ('input', 'after FreqSelect'), False)
        y += block
        if s.kernel is None:
            if has_kernels:
                write(x, y + 0.12, f'{s.name} is an attention, without a kernel', 9.5)
            continue
        name = f'{s.name}: kernels'
        write(x, y + 0.12, name, fitted(11.5, name, column - gap, bold=True), INK, 'bold')
        write(x, y + 0.32, f'at dilation 1; {share(s.kernel, s.adapted, True)}', 9.5)
        draw(x, y + caption, s, s.kernel, s.adapted, ('weight', 'after AdaKern'), True)
    return fig
