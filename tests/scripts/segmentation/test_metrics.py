"""Segmentation scores and their table; files are written as a whole or not at all."""
import re

import numpy as np
import pytest
import torch

from fadc_timm._writing import write_atomically
from scripts.segmentation.metrics import ConfusionMatrix, scores, table

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

    def test_failed_write_leaves_the_old_file(self, tmp_path):
        path = tmp_path / 'x'
        path.write_text('old')

        def write(part):
            part.write_text('new')
            raise OSError('disk full')

        with pytest.raises(OSError, match='disk full'):
            write_atomically(path, write)
        assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
