"""Test of a network on a split: mIoU, accuracies, pictures."""
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from scripts.segmentation.metrics import ConfusionMatrix, scores
from scripts.segmentation.pictures import write_prediction
from scripts.segmentation.slide import predictions
from scripts.training.images import spread
from scripts.training.world import World


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
        folder: Where pictures go: image, truth, prediction.
        overlays: Their number, spread over the split.
        **kwargs: Of `slide.slide`.

    Returns:
        `classes`, `images` (their number), and what `metrics.scores` says.

    Raises:
        ValueError: The split has no images.
    """
    images = getattr(data, split)
    if not len(images):
        raise ValueError(f'{data.name} has no images in its split {split!r}.')
    n = len(data.classes)
    chosen = spread(overlays, len(images))
    counted = ConfusionMatrix(n)
    for i, labels, mask in predictions(
            model, images, transform, world.device, range(world.rank, len(images), world.size), **kwargs):
        counted.update(labels.numpy(), mask.numpy())
        if folder is not None and i in chosen:
            name = images.name(i)
            write_prediction(folder / f'{name}.png', name, images[i][0], mask.numpy(),
                             labels.numpy(), data.classes, data.palette)
    matrix = torch.from_numpy(counted.matrix)
    if world.size > 1:
        on_device = matrix.to(world.device)
        dist.all_reduce(on_device)
        matrix = on_device.cpu()
    return {'classes': list(data.classes), 'images': len(images), **scores(matrix)}
