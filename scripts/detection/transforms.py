"""The augmentation of detectors; all of its randomness comes from a generator that is handed in."""
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 as (3, H, W) float32 in [0, 1]; the detector normalises and resizes it."""
    return torch.from_numpy(image).permute(2, 0, 1).float().div_(255)


class TrainTransform:
    """Random flips. Detectors resize by themselves, to a size that torch's random numbers choose.

    Args:
        flip: Probability of a horizontal flip.
        flip_vertical: Probability of a vertical flip, for images from the air.
    """

    def __init__(self, flip: float = 0.5, flip_vertical: float = 0.0) -> None:
        for name, value in (('flip', flip), ('flip-vertical', flip_vertical)):
            if not 0 <= value <= 1:
                raise ValueError(f'--{name} is a probability, got {value}')
        self.flips = (2, flip), (1, flip_vertical)

    def __call__(
            self, image: np.ndarray, target: dict[str, np.ndarray], rng: np.random.Generator,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Transforms an image and its boxes.

        Args:
            image: (H, W, 3) uint8.
            target: `boxes` (N, 4), and maybe `masks` (N, H, W), besides others, which are left.
            rng: Source of all randomness.

        Returns:
            The image (3, H, W) float32 in [0, 1], and the target as tensors.
        """
        x = to_tensor(image)
        y = {key: torch.from_numpy(value) for key, value in target.items()}
        for axis, probability in self.flips:
            if rng.random() < probability:
                x = x.flip(axis)
                near, far = (0, 2) if axis == 2 else (1, 3)
                boxes = y['boxes'].clone()
                boxes[:, near], boxes[:, far] = x.shape[axis] - y['boxes'][:, far], x.shape[axis] - y['boxes'][:, near]
                y['boxes'] = boxes
                if 'masks' in y:
                    y['masks'] = y['masks'].flip(axis)
        return x, y


def collate(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch: images and targets as lists, as images differ in size."""
    return [x for x, _ in samples], [y for _, y in samples]
