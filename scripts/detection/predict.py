"""Detections in the images of a folder, which need no annotations."""
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from fadc_timm._writing import write_atomically
from scripts.detection.annotations import CocoImages, import_coco
from scripts.detection.evaluation import Detection, detect_all
from scripts.training.world import World

FILE, PICTURES = 'predictions.json', 'pictures_predictions'  # in the folder of the output


def unlabelled(folder: Path, output: Path, classes: list[str]) -> CocoImages:
    """The images below a folder, see `CocoImages.unlabelled`; output is the folder of :func:`predict`."""
    return CocoImages.unlabelled(folder, [output / FILE, output / PICTURES], classes)


def _annotation(number: int, detection: Detection) -> dict[str, Any]:
    """A detection with all that an annotation of COCO's has."""
    left, top, width, height = detection['bbox']
    mask = detection.get('segmentation')
    area = width * height if mask is None else float(import_coco().mask.area(mask))
    return {'id': number, **detection, 'iscrowd': 0, 'area': area}


def predict(
        model: nn.Module,
        images: CocoImages,
        world: World,
        batch: int,
        autocast: Callable[[], AbstractContextManager],
        folder: Path,
        pictures: int = 0,
        least_score: float = 0.5,
) -> None:
    """Write all detections to `predictions.json`, a file of COCO's format with a `score` in each annotation.

    Args:
        model: The detector.
        images: The images.
        world: This process.
        batch: Images at once.
        autocast: Context of the detector's calls.
        folder: Of the output.
        pictures: Number of pictures in `pictures_predictions`, spread over the images.
        least_score: Of the detections in pictures.
    """
    detections = detect_all(
        model, images, world, batch, autocast, folder / PICTURES, pictures, least_score, known=False)
    if world.main:
        content = images.content(_annotation(i, d) for i, d in enumerate(detections, start=1))
        write_atomically(folder / FILE, lambda part: part.write_text(json.dumps(content) + '\n'))
        world.say(f'{len(images)} images, {len(detections)} detections: {folder / FILE}')
