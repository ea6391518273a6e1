"""Detections in the images of a folder, which need no annotations."""
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from fadc_timm._writing import write_atomically
from scripts.detection.annotations import CocoImages, import_coco
from scripts.detection.evaluation import Detection, detect
from scripts.detection.pictures import write_detections
from scripts.training.images import spread
from scripts.training.world import World


def as_annotations(images: CocoImages, detections: list[Detection]) -> dict[str, Any]:
    """Detections as a whole file of COCO's format, with a `score` in each annotation."""
    area = import_coco().mask.area
    return {
        'info': {},
        'categories': [{'id': number, 'name': name} for number, name in images.categories.items()],
        'images': [{'id': e.id, 'width': e.width, 'height': e.height,
                    'file_name': e.path.relative_to(images.folder).as_posix()} for e in images.entries],
        'annotations': [
            {'id': i, **d, 'iscrowd': 0,
             'area': float(area(d['segmentation'])) if 'segmentation' in d else d['bbox'][2] * d['bbox'][3]}
            for i, d in enumerate(detections, start=1)]}


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
    """Write all detections to `predictions.json`, in COCO's format; each process takes every `world.size`-th image.

    Args:
        model: The detector.
        images: The images.
        world: This process.
        batch: Images at once.
        autocast: Context of the detector's calls.
        folder: Where `predictions.json` is written, and for pictures `pictures_predictions` is made.
        pictures: Their number, spread over the images.
        least_score: Of the detections in pictures.

    Raises:
        DataError: An image cannot be read; it is named.
    """
    chosen, own = spread(pictures, len(images)), []
    for i, found in detect(model, images, world.device, range(world.rank, len(images), world.size), batch, autocast):
        own += found
        if i in chosen:
            name = images.name(i)
            write_detections(
                folder / 'pictures_predictions' / f'{name.replace("/", "_")}.png', name, images.read(i), None,
                [d for d in found if d['score'] >= least_score], images.categories)
    parts = world.gather(own)
    if world.main:
        detections = sorted((d for part in parts for d in part), key=lambda d: d['image_id'])
        file = folder / 'predictions.json'
        content = as_annotations(images, detections)
        write_atomically(file, lambda part: part.write_text(json.dumps(content) + '\n'))
        world.say(f'{len(images)} images, {len(detections)} detections: {file}')
