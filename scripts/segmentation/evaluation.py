"""Test of a network on a split: mIoU, accuracies, overlays."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .engine import World
from .metrics import ConfusionMatrix, write_overlay
from .slide import predictions


def evaluate(
        model: nn.Module,
        data: Any,
        split: str,
        transform: Any,
        world: World,
        folder: Path | None = None,
        overlays: int = 0,
        **kwargs: Any,
) -> dict[str, Any]:
    """Evaluate on a split; each process takes every `world.size`-th image, and all get the result.

    Args:
        model: The network.
        data: A SegmentationData.
        split: 'val' or 'test'.
        transform: An EvalTransform.
        world: This process.
        folder: Where overlays go.
        overlays: Their number, spread over the split.
        **kwargs: Of `slide.predict`.

    Returns:
        `classes`; `miou` and `accuracy` (of pixels), `mean_accuracy` (of classes), `iou` and `class_accuracy` by class,
        in percent, None for a class without pixels; `images`.

    Raises:
        ValueError: The split has no images.
    """
    images = getattr(data, split)
    if not len(images):
        raise ValueError(f'{data.name} has no images in its split {split!r}.')
    n = len(data.classes)
    matrix = torch.zeros(n, n, dtype=torch.int64)
    chosen = {round(i * (len(images) - 1) / max(overlays - 1, 1)) for i in range(min(overlays, len(images)))}
    counted = ConfusionMatrix(n)
    for i, labels, mask in predictions(
            model, images, transform, world.device, range(world.rank, len(images), world.size), **kwargs):
        counted.update(labels.numpy(), mask.numpy())
        if folder is not None and i in chosen:
            folder.mkdir(parents=True, exist_ok=True)
            write_overlay(folder / f'{Path(images.name(i)).stem}.png', images[i][0], labels.numpy(), data.palette)
    matrix += torch.as_tensor(counted.matrix)
    if world.size > 1:
        on_device = matrix.to(world.device)
        dist.all_reduce(on_device)
        matrix = on_device.cpu()
    return {'classes': list(data.classes), 'images': len(images), **scores(matrix)}


def scores(matrix: torch.Tensor) -> dict[str, Any]:
    """Scores in percent of a confusion matrix (true class, predicted class)."""
    hits, true, predicted = matrix.diag().double(), matrix.sum(1).double(), matrix.sum(0).double()
    union = true + predicted - hits

    def percent(a: torch.Tensor, b: torch.Tensor) -> list[float | None]:
        return [None if math.isnan(v) else 100 * v for v in (a / b).tolist()]

    iou, accuracy = percent(hits, union), percent(hits, true)

    def mean(values: list[float | None]) -> float:
        there = [v for v in values if v is not None]
        return sum(there) / len(there) if there else math.nan

    return {'miou': mean(iou), 'accuracy': (100 * hits.sum() / true.sum()).item(), 'mean_accuracy': mean(accuracy),
            'iou': iou, 'class_accuracy': accuracy}
