"""Segmentation scores, their table and overlays, written as a whole or not at all."""
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fadc_timm._writing import write_atomically
from scripts.segmentation.metrics import ConfusionMatrix, overlay, scores, table, write_overlay
from tests.support.segmentation_cases import mask_of, picture_of

pytestmark = pytest.mark.usefixtures('one_thread')


class TestMetrics:
    def test_against_a_loop(self):
        rng = np.random.default_rng(0)
        counted, matrix = ConfusionMatrix(6), np.zeros((6, 6), dtype=int)
        everything = []
        for _ in range(3):
            labels = rng.choice([0, 1, 2, 4, 255], (9, 7)).astype(np.uint8)
            predictions = rng.choice([0, 1, 2, 3], (9, 7))
            counted.update(predictions, labels)
            everything += zip(labels.flatten().tolist(), predictions.flatten().tolist())
        pairs = [(a, b) for a, b in everything if a != 255]
        for a, b in pairs:
            matrix[a, b] += 1
        assert counted.matrix.dtype == np.int64 and np.array_equal(counted.matrix, matrix)

        iou, accuracy = [], []
        for c in range(6):
            hit = sum(a == b == c for a, b in pairs)
            either = sum(a == c or b == c for a, b in pairs)
            true = sum(a == c for a, b in pairs)
            iou.append(100 * hit / either if either else None)
            accuracy.append(100 * hit / true if true else None)
        for given in (counted.matrix, torch.from_numpy(counted.matrix)):
            result = scores(given)
            assert result['iou'] == iou and result['class_accuracy'] == accuracy
            assert iou[3] == 0 and iou[4] == 0 and iou[5] is None  # only predicted, never predicted, absent
            assert accuracy[3] is None and result['absent'] == [5]
            assert result['miou'] == pytest.approx(sum(iou[:5]) / 5)
            assert result['mean_accuracy'] == pytest.approx(sum(accuracy[c] for c in (0, 1, 2, 4)) / 4)
            assert result['accuracy'] == pytest.approx(100 * sum(a == b for a, b in pairs) / len(pairs))

    def test_large_counts(self):
        counted = ConfusionMatrix(2)
        counted.matrix[0, 0] = 2**53
        counted.update(np.array([0, 1]), np.array([0, 0]))
        assert counted.matrix.tolist() == [[2**53 + 1, 1], [0, 0]]

    def test_nothing_counted(self):
        result = scores(np.zeros((2, 2), dtype=np.int64))
        assert np.isnan(result['miou']) and np.isnan(result['accuracy']) and result['absent'] == [0, 1]

    def test_table(self):
        matrix = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
        text = table(scores(matrix), ('road', 'sky', 'dog'))
        assert re.search(r'road +75\.00 +75\.00', text) and re.search(r'dog +- +-', text)
        assert re.search(r'mean +77\.50 +87\.50', text) and re.search(r'all pixels +- +87\.50', text)
        assert text.endswith('not in the means: dog')
        assert 'not in the means' not in table(scores(matrix[:2, :2]), ('road', 'sky'))

    @pytest.mark.parametrize('predictions, labels, words', (
        ([0, 1], [[0], [1]], 'shape'), ([0, 3], [0, 1], 'predictions from 0 to 3 for 3'),
        ([0, 0], [0, 3], 'labels from 0 to 3 for 3'), ([-1, 0], [0, 0], 'predictions from -1')))
    def test_bad_input(self, predictions, labels, words):
        with pytest.raises(ValueError, match=words):
            ConfusionMatrix(3).update(np.array(predictions), np.array(labels))

    def test_overlay(self, tmp_path):
        image, mask = picture_of(0), mask_of([0, 1, 255])
        palette = np.array([[255, 0, 0], [0, 0, 255]], dtype=np.uint8)
        result = overlay(image, mask, palette, 0.25)
        assert result.dtype == np.uint8 and np.array_equal(result[mask == 255], image[mask == 255])
        for label in (0, 1):
            wanted = 0.75 * image[mask == label] + 0.25 * palette[label]
            assert np.abs(result[mask == label] - wanted).max() <= 0.5
        path = tmp_path / 'new' / 'x.png'
        write_overlay(path, image, mask, palette)
        assert np.array_equal(np.asarray(Image.open(path)), overlay(image, mask, palette))
        assert list(path.parent.iterdir()) == [path]
        with pytest.raises(ValueError, match='palette of 2'):
            overlay(image, mask_of([2]), palette)
        with pytest.raises(ValueError, match='mask of an image'):
            overlay(image, mask[1:], palette)

    def test_failed_write_leaves_the_old_file(self, tmp_path):
        path = tmp_path / 'x'
        path.write_text('old')

        def write(part):
            part.write_text('new')
            raise OSError('disk full')

        with pytest.raises(OSError, match='disk full'):
            write_atomically(path, write)
        assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
