"""Pictures of a segmentation: labels over an image, and an image beside truth and prediction with a legend."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch

from fadc_timm.visualize import save
from scripts.segmentation.pairs import IGNORE

DPI = 100
GREY = 128
OPACITY = 0.9  # of labels beside their image: the legend has their colours, and edges still show through
FONT = 9  # points, 1/72 inch
# Inches: least and greatest long side of an image in a picture, least width of the picture, and room: between images,
# for their titles, between columns of the legend.
PANEL, LEAST_WIDTH = (3.6, 9.0), 7.2
GAP, TITLE, SPACE = 0.15, 0.3, 0.15


def overlay(image: np.ndarray, mask: np.ndarray, palette: np.ndarray, opacity: float = OPACITY) -> np.ndarray:
    """Lays the colours of labels over an image.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) labels; the image is left as it is where they are `IGNORE`.
        palette: (classes, 3) uint8.
        opacity: Of the colours.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: If sizes differ, or a label has no colour.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f'the mask of an image of shape {image.shape} has shape {mask.shape}')
    there = mask != IGNORE
    labels = mask[there]
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(palette):
        raise ValueError(f'labels from {labels.min()} to {labels.max()} for a palette of {len(palette)} colours')
    result = image.copy()
    result[there] = np.round((1 - opacity) * image[there] + opacity * palette[labels])
    return result


def prediction_figure(
        name: str,
        image: np.ndarray,
        truth: np.ndarray | None,
        prediction: np.ndarray,
        classes: Sequence[str],
        palette: np.ndarray,
) -> Figure:
    """An image, the truth over it, and the prediction over it, with a legend of the classes that occur.

    Args:
        name: Of the image.
        image: (H, W, 3) uint8.
        truth: (H, W) labels; pixels that are `IGNORE` are grey. None where it is not known.
        prediction: (H, W) labels.
        classes: Their names.
        palette: (classes, 3) uint8.
    """
    panels, right, ignored, labels = [(name, image)], '', False, np.unique(prediction)
    if truth is not None:
        labelled = truth != IGNORE
        if labelled.any():
            right = f', {100 * (prediction == truth)[labelled].mean():.1f} % right'
        shown_truth = overlay(image, truth, palette)
        shown_truth[~labelled] = GREY
        panels.append(('truth', shown_truth))
        ignored, labels = not labelled.all(), np.union1d(labels, truth[labelled])
    panels.append((f'prediction{right}', overlay(image, prediction, palette)))

    entries = [(classes[i], palette[i] / 255) for i in labels]
    if ignored:
        entries.append(('(ignored)', np.full(3, GREY / 255)))
    handles = [Patch(facecolor=colour, edgecolor='black', linewidth=0.5, label=text) for text, colour in entries]
    height, width = image.shape[:2]
    scale = min(max(1 / DPI, PANEL[0] / max(height, width)), PANEL[1] / max(height, width))
    fig = Figure(dpi=DPI)
    renderer = FigureCanvasAgg(fig).get_renderer()

    def legend(columns: int) -> tuple[Legend, float, float]:
        """The legend, its width and its height in inches."""
        made = fig.legend(handles=handles, loc='lower center', ncols=columns, fontsize=FONT, frameon=False,
                          columnspacing=SPACE * 72 / FONT, borderaxespad=0)
        box = made.get_window_extent(renderer)
        return made, box.width / DPI, box.height / DPI

    column, column_width, _ = legend(1)
    column.remove()
    across = max(len(panels) * (scale * width + GAP), LEAST_WIDTH, column_width)
    columns = min(int((across + SPACE) / (column_width + SPACE)), len(handles))
    rows = -(-len(handles) // columns)
    _, _, below = legend(-(-len(handles) // rows))
    tall = below + scale * height + TITLE
    fig.set_size_inches(across, tall)
    for i, (title, pixels) in enumerate(panels):
        left = across / 2 + (i - len(panels) / 2) * (scale * width + GAP) + GAP / 2
        ax = fig.add_axes((left / across, below / tall, scale * width / across, scale * height / tall))
        ax.imshow(pixels, interpolation='antialiased')
        ax.set_title(title, fontsize=FONT)
        ax.set_axis_off()
    return fig


def write_prediction(path: Path, *args, **kwargs) -> None:
    """Write a `prediction_figure`, whose arguments follow, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(prediction_figure(*args, **kwargs), path)
