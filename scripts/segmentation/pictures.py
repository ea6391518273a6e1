"""Pictures of a segmentation: labels over an image, and an image beside truth and prediction with a legend."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fadc_timm.visualize import save
from scripts.segmentation.pairs import IGNORE

PANEL = 3.6, 9.0  # inches: least and greatest long side of an image in a picture
DPI = 100


def overlay(image: np.ndarray, mask: np.ndarray, palette: np.ndarray, opacity: float = 0.5) -> np.ndarray:
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
        truth: np.ndarray,
        prediction: np.ndarray,
        classes: Sequence[str],
        palette: np.ndarray,
) -> Figure:
    """An image, the truth over it, and the prediction over it, with a legend of the classes that occur.

    Args:
        name: Of the image.
        image: (H, W, 3) uint8.
        truth: (H, W) labels; pixels that are `IGNORE` are grey.
        prediction: (H, W) labels.
        classes: Their names.
        palette: (classes, 3) uint8.
    """
    labelled = truth != IGNORE
    right = f', {100 * (prediction == truth)[labelled].mean():.1f} % right' if labelled.any() else ''
    shown_truth = overlay(image, truth, palette)
    shown_truth[~labelled] = 128
    panels = {name: image, 'truth': shown_truth, f'prediction{right}': overlay(image, prediction, palette)}

    labels = [int(label) for label in np.union1d(truth, prediction) if label != IGNORE]
    handles = [Patch(facecolor=palette[i] / 255, edgecolor='black', linewidth=0.5, label=classes[i]) for i in labels]
    if not labelled.all():
        handles.append(Patch(facecolor='#808080', edgecolor='black', linewidth=0.5, label='(ignored)'))
    height, width = image.shape[:2]
    scale = min(max(1 / DPI, PANEL[0] / max(height, width)), PANEL[1] / max(height, width))
    across = 3 * scale * width
    columns = max(1, int(across / (0.6 + 0.085 * max(len(handle.get_label()) for handle in handles))))
    rows = -(-len(handles) // columns)
    fig = Figure(figsize=(across + 0.4, scale * height + 0.6 + 0.22 * rows), dpi=DPI, layout='constrained')
    for ax, (title, pixels) in zip(fig.subplots(1, 3), panels.items()):
        ax.imshow(pixels, interpolation='antialiased')
        ax.set_title(title, fontsize=9)
        ax.set_axis_off()
    fig.legend(handles=handles, loc='outside lower center', ncols=columns, fontsize=9, frameon=False)
    return fig


def write_prediction(path: Path, *args, **kwargs) -> None:
    """Write a `prediction_figure`, whose arguments follow, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(prediction_figure(*args, **kwargs), path)
