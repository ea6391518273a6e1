"""Pictures of detections: an image with its true boxes beside the same image with the detected ones."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fadc_timm.visualize import save
from scripts.detection.annotations import Entry
from scripts.training.images import colours

DPI, FONT = 100, 8  # dots per inch, points
SIDE = 5.0  # inches of the long side of an image
TITLE, GAP = 0.3, 0.1  # inches above an image, and between the two


def detections_figure(
        name: str,
        image: np.ndarray,
        entry: Entry | None,
        detections: Sequence[dict[str, Any]],
        categories: Mapping[int, str],
) -> Figure:
    """An image with its true boxes, if they are known, and with the detected ones, each with its class and score.

    Args:
        name: Of the image.
        image: (H, W, 3) uint8.
        entry: Its annotations; a crowd is dashed. None where there are none.
        detections: In COCO's format.
        categories: Names by id.
    """
    colour = dict(zip(categories, colours(len(categories)) / 255))
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    found = [(d, f'{categories[d["category_id"]]} {d["score"]:.2f}') for d in detections]
    if entry is None:
        panels = [(found, f'{name}: {len(found)} detections')]
    else:
        truth = [(a, categories[a['category_id']] if len(categories) > 1 else '') for a in entry.annotations]
        panels = [(truth, f'{name}: {len(entry.labels)} boxes'), (found, f'{len(found)} detections')]
    across, tall = len(panels) * (scale * width + GAP) - GAP, scale * height + TITLE
    fig = Figure(figsize=(across, tall), dpi=DPI)
    FigureCanvasAgg(fig)
    for i, (boxes, title) in enumerate(panels):
        ax = fig.add_axes((i * (scale * width + GAP) / across, 0, scale * width / across, scale * height / tall))
        ax.imshow(image, interpolation='antialiased', extent=(0, width, height, 0))  # boxes are between pixels
        for box, text in boxes:
            left, top, w, h = box['bbox']
            ax.add_patch(Rectangle((left, top), w, h, fill=False, linewidth=1.2, edgecolor=colour[box['category_id']],
                                   linestyle='--' if box.get('iscrowd') else '-'))
            if text:
                ax.text(left, top, text, fontsize=FONT - 3, color='white', verticalalignment='bottom', clip_on=True,
                        bbox=dict(facecolor=colour[box['category_id']], edgecolor='none', pad=0.5))
        ax.set_xlim(0, width)
        ax.set_ylim(height, 0)
        ax.set_title(title, fontsize=FONT)
        ax.set_axis_off()
    return fig


def write_detections(path: Path, *args: Any) -> None:
    """Write a `detections_figure`, whose arguments follow, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(detections_figure(*args), path)
