"""Scores of a segmentation."""
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from scripts.segmentation.pairs import IGNORE


class ConfusionMatrix:
    """Counts of pixels by true and predicted class.

    Args:
        classes: Their number.

    Attributes:
        matrix: (classes, classes) int64; rows are true classes, columns predicted ones.
    """

    def __init__(self, classes: int) -> None:
        self.matrix = np.zeros((classes, classes), dtype=np.int64)

    def update(self, predictions: np.ndarray, labels: np.ndarray) -> None:
        """Adds the pixels of one or more images, but those labelled `IGNORE`.

        Args:
            predictions: Predicted classes, integers.
            labels: True classes or `IGNORE`, integers of the same shape.

        Raises:
            ValueError: If shapes differ, or a number is no class.
        """
        if predictions.shape != labels.shape:
            raise ValueError(f'predictions of shape {predictions.shape} for labels of shape {labels.shape}')
        count = len(self.matrix)
        there = labels != IGNORE
        true, predicted = labels[there].astype(np.int64), predictions[there].astype(np.int64)
        for what, values in (('label', true), ('prediction', predicted)):
            if len(values) and not 0 <= values.min() <= values.max() < count:
                raise ValueError(f'{what}s from {values.min()} to {values.max()} for {count} classes')
        self.matrix += np.bincount(true * count + predicted, minlength=count * count).reshape(count, count)


def scores(matrix: np.ndarray | Tensor) -> dict[str, Any]:
    """Scores of a confusion matrix, in percent.

    Args:
        matrix: (classes, classes) counts; rows are true classes.

    Returns:
        `iou` and `class_accuracy` (recall), lists by class with None where they are 0 / 0; `miou` and `mean_accuracy`,
        their means over the other classes; `accuracy` of all pixels; `absent`, the classes that are in neither labels
        nor predictions and so are left out of both means. A class that is predicted but not there has IoU 0.
    """
    counts = np.asarray(matrix).astype(np.int64)
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = true + predicted - hits

    def percent(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
        return [100 * int(a) / int(b) if b else None for a, b in zip(part, whole)]

    def mean(values: list[float | None]) -> float:
        there = [value for value in values if value is not None]
        return sum(there) / len(there) if there else math.nan

    iou, accuracy = percent(hits, union), percent(hits, true)
    total = int(true.sum())
    return {
        'miou': mean(iou),
        'accuracy': 100 * int(hits.sum()) / total if total else math.nan,
        'mean_accuracy': mean(accuracy),
        'iou': iou,
        'class_accuracy': accuracy,
        'absent': np.flatnonzero(union == 0).tolist(),
    }


def table(result: dict[str, Any], classes: Sequence[str]) -> str:
    """A text of the result of `scores`: a line for each class, the means, and which classes are not in them."""
    width = max(map(len, (*classes, 'all pixels')))

    def row(name: str, *values: float | None) -> str:
        return f'{name:{width}}' + ''.join(f'{"-" if value is None else f"{value:.2f}":>10}' for value in values)

    lines = [f'{"class":{width}}{"IoU %":>10}{"acc. %":>10}']
    lines += map(row, classes, result['iou'], result['class_accuracy'])
    lines.append(row('mean', result['miou'], result['mean_accuracy']))
    lines.append(row('all pixels', None, result['accuracy']))
    if result['absent']:
        names = ', '.join(classes[i] for i in result['absent'])
        lines.append(f'in neither labels nor predictions, so not in the means: {names}')
    return '\n'.join(lines)
