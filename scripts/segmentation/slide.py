"""Slide inference and evaluation on a data set."""
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

Autocast = Callable[[], AbstractContextManager]


def windows(size: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` pixels begin on an axis of `size` pixels: the last one ends with it."""
    count = max(math.ceil((size - crop) / stride), 0) + 1
    return [max(min(i * stride, size - crop), 0) for i in range(count)]


@torch.inference_mode()
def slide(
        model: nn.Module,
        image: Tensor,
        crop: int,
        stride: int,
        batch: int = 4,
        autocast: Autocast = nullcontext,
) -> Tensor:
    """Logits of an image of any size, the mean over the windows that cover a pixel.

    Args:
        model: Maps (B, 3, crop, crop) to (B, N, crop, crop), in eval mode.
        image: (3, H, W), normalised; a side below the crop is padded with zeros, which normalised is the mean.
        crop: Side of the windows, in pixels.
        stride: Distance of the windows, in pixels, at most the crop.
        batch: Windows that the model gets at once.
        autocast: Context of the model's calls.

    Returns:
        (N, H, W), float32.
    """
    if not 0 < stride <= crop:
        raise ValueError(f'The stride of the windows must be from 1 to the crop of {crop}, got {stride}.')
    h, w = image.shape[-2:]
    x = F.pad(image, (0, max(crop - w, 0), 0, max(crop - h, 0)))
    places = [(top, left) for top in windows(x.shape[1], crop, stride) for left in windows(x.shape[2], crop, stride)]
    total, count = None, x.new_zeros(x.shape[1:])
    for i in range(0, len(places), batch):
        part = places[i:i + batch]
        with autocast():
            logits = model(torch.stack([x[:, t:t + crop, s:s + crop] for t, s in part])).float()
        if total is None:
            total = logits.new_zeros(logits.shape[1], *x.shape[1:])
        for (t, s), one in zip(part, logits):
            total[:, t:t + crop, s:s + crop] += one
            count[t:t + crop, s:s + crop] += 1
    assert total is not None
    return (total / count)[:, :h, :w]


def predictions(
        model: nn.Module,
        split: Dataset[tuple[Any, Any]],
        transform: Callable[..., tuple[Any, Any]],
        device: torch.device,
        indices: Sequence[int],
        **kwargs: Any,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Predict images of a split.

    Args:
        model: The network.
        split: Pairs of an image and a mask.
        transform: An EvalTransform; where it resizes images, their logits are resized to the masks.
        device: Of the network.
        indices: Which images.
        **kwargs: Of `slide`.

    Yields:
        (index, predicted labels, mask), both (H, W) int64 on the CPU.
    """
    training = model.training
    model.eval()
    try:
        for i in indices:
            image, mask = transform(*split[i])
            logits = slide(model, image.to(device), **kwargs)
            if logits.shape[1:] != mask.shape:
                logits = F.interpolate(logits[None], mask.shape, mode='bilinear', align_corners=False)[0]
            yield i, logits.argmax(0).cpu(), mask
    finally:
        model.train(training)
