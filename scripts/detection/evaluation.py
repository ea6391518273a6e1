"""Test of a detector on a split: COCO's twelve numbers, a file of the detections, pictures."""
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fadc_timm._writing import write_atomically
from scripts.detection.annotations import CocoImages, import_coco
from scripts.detection.pictures import write_detections
from scripts.detection.transforms import to_tensor
from scripts.training.images import spread
from scripts.training.world import World

# of pycocotools' summary, in its order
SCORES = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large', 'ar1', 'ar10', 'ar100', 'ar_small', 'ar_medium',
          'ar_large')
MASK_THRESHOLD = 0.5

Detection = dict[str, Any]


@torch.inference_mode()
def detect(
        model: nn.Module,
        split: CocoImages,
        device: torch.device,
        indices: range,
        batch: int,
        autocast: Callable[[], AbstractContextManager],
) -> Iterator[tuple[int, list[Detection]]]:
    """Detect the objects in images of a split.

    Args:
        model: The detector.
        split: The images.
        device: Of the detector.
        indices: Which images.
        batch: Images at once.
        autocast: Context of the detector's calls.

    Yields:
        (index, detections), the latter in COCO's format: `image_id`, `category_id`, `bbox`, `score`, and with masks
        `segmentation`. Detections of the background are left out.
    """
    categories, training = list(split.categories), model.training
    model.eval()
    try:
        for start in range(0, len(indices), batch):
            part = indices[start:start + batch]
            with autocast():
                outputs = model([to_tensor(split.read(i)).to(device) for i in part])
            for i, output in zip(part, outputs):
                # label 0 is the background, for which torchvision's RetinaNet has a score too
                objects = output['labels'] > 0
                output = {key: value[objects] for key, value in output.items()}
                boxes = output['boxes'].float().cpu()
                boxes[:, 2:] -= boxes[:, :2]
                found = [
                    {'image_id': split.entries[i].id, 'category_id': categories[label - 1], 'bbox': box, 'score': score}
                    for label, box, score in zip(
                        output['labels'].tolist(), boxes.tolist(), output['scores'].float().tolist())]
                for detection, mask in zip(found, output.get('masks', ())):
                    coded = import_coco().mask.encode(
                        np.asfortranarray((mask[0] > MASK_THRESHOLD).cpu().numpy().astype(np.uint8)))
                    detection['segmentation'] = {**coded, 'counts': coded['counts'].decode('ascii')}
                yield i, found
    finally:
        model.train(training)


def coco_scores(split: CocoImages, detections: list[Detection], kind: str = 'bbox') -> tuple[dict[str, float], str]:
    """pycocotools' summary.

    Args:
        split: With the ground truth.
        detections: In COCO's format.
        kind: 'bbox' or 'segm'.

    Returns:
        `SCORES` in percent, -1 where there is no object of that size, as pycocotools has it; and its twelve lines.
        Sizes are areas: of the boxes, or with 'segm' of the masks.
    """
    coco = import_coco()
    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = split.ground_truth()
        if detections:
            # loadRes takes the areas of detections that have a box from the box, those of masks too
            own = [{key: d[key] for key in d if kind == 'bbox' or key != 'bbox'} for d in detections]
            results = truth.loadRes(own)
        else:  # loadRes refuses an empty list
            results = coco.coco.COCO()
            results.dataset = {**truth.dataset, 'annotations': []}
            results.createIndex()
        evaluation = coco.cocoeval.COCOeval(truth, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.redirect_stdout(printed):
            evaluation.summarize()
    scores = {name: float(100 * value if value >= 0 else value) for name, value in zip(SCORES, evaluation.stats)}
    return scores, printed.getvalue().rstrip()


def detect_all(
        model: nn.Module,
        split: CocoImages,
        world: World,
        batch: int,
        autocast: Callable[[], AbstractContextManager],
        folder: Path | None = None,
        pictures: int = 0,
        least_score: float = 0.5,
        known: bool = True,
) -> list[Detection]:
    """Detect the objects in all images of a split; each process takes every `world.size`-th one.

    Args:
        model: The detector.
        split: The images.
        world: This process.
        batch: Images at once.
        autocast: Context of the detector's calls.
        folder: Where pictures go.
        pictures: Their number, spread over the split.
        least_score: Of the detections in pictures.
        known: Pictures have the true boxes beside the detections.

    Returns:
        The detections in COCO's format, of all processes, in the order of the images.
    """
    chosen = spread(pictures, len(split))
    own = []
    for i, found in detect(model, split, world.device, range(world.rank, len(split), world.size), batch, autocast):
        own += found
        if folder is not None and i in chosen:
            name = split.name(i)
            write_detections(folder / f'{name}.png', name, split.read(i), split.entries[i] if known else None,
                             [d for d in found if d['score'] >= least_score], split.categories)
    order = {entry.id: place for place, entry in enumerate(split.entries)}
    return sorted((d for part in world.gather(own) for d in part), key=lambda d: order[d['image_id']])


def evaluate(
        model: nn.Module,
        split: CocoImages,
        world: World,
        batch: int,
        autocast: Callable[[], AbstractContextManager],
        file: Path | None = None,
        folder: Path | None = None,
        pictures: int = 0,
        least_score: float = 0.5,
) -> dict[str, Any]:
    """Evaluate on a split; each process takes every `world.size`-th image.

    Args:
        model: The detector.
        split: The split.
        world: This process.
        batch: Images at once.
        autocast: Context of the detector's calls.
        file: Where the detections go, in COCO's format; None for nowhere.
        folder: Where pictures go, truth beside detections.
        pictures: Their number, spread over the split.
        least_score: Of the detections in pictures.

    Returns:
        In the first process `images`, `boxes`, `detections` (their numbers), `SCORES` in percent and `lines`,
        pycocotools' summary; with masks also `masks`, the same of them. In other processes nothing.
    """
    detections = detect_all(model, split, world, batch, autocast, folder, pictures, least_score)
    if not world.main:
        return {}
    if file is not None:
        write_atomically(file, lambda part: part.write_text(json.dumps(detections) + '\n'))
    scores, lines = coco_scores(split, detections)
    result = {'images': len(split), 'boxes': split.boxes, 'detections': len(detections), **scores, 'lines': lines}
    if any('segmentation' in d for d in detections):
        masks, mask_lines = coco_scores(split, detections, 'segm')
        result['masks'] = {**masks, 'lines': mask_lines}
    return result
