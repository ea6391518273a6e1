"""The Blue Marble segmentation task: its labels, tiles and splits, and its cache on disk."""
import re

import numpy as np
import pytest

from scripts.bluemarble import globe as sources
from scripts.bluemarble import picture
from scripts.bluemarble import segmentation as bluemarble
from scripts.segmentation.data import IGNORE, DataError, open_data

pytestmark = pytest.mark.usefixtures('one_thread')


def small_world(seed=0, rows=5, columns=9):
    """Rasters of a made-up planet: a patchwork of zones with seas, lakes, and land that the zones call sea."""
    rng = np.random.default_rng(seed)
    side = bluemarble.TILE // 2
    zones = rng.choice([1, 5, 9, 18, 30, 32], (2 * rows, 2 * columns)).astype(np.uint8).repeat(side, 0).repeat(side, 1)
    water = np.where(zones == 32, 0, 1).astype(np.uint8)
    for y, x in rng.integers(0, (len(zones) - 20, zones.shape[1] - 20), (60, 2)):
        water[y: y + 20, x: x + 20] = rng.integers(0, 3)
    held = np.zeros(zones.shape, dtype=bool)
    held[:512, 512:1024] = held[512:1024, 2048:] = True
    rgb = np.stack([zones * 7, water * 100, rng.integers(0, 256, zones.shape, dtype=np.uint8)], -1)
    return rgb, zones, water, held


class TestBlueMarble:
    def test_labels(self):
        zones = np.array([[1, 4, 5, 8, 9, 17, 18, 29, 30, 31, 32]] * 3, dtype=np.uint8)
        water = np.array([0, 1, 2], dtype=np.uint8)[:, None].repeat(zones.shape[1], 1)
        labels = bluemarble.labels_of(zones, water)
        assert labels[0].tolist() == [0] * 11 and labels[2].tolist() == [6] * 11
        assert labels[1].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, IGNORE]

    def test_tiles_are_where_they_say(self):
        rgb, zones, water, held = small_world()
        labels = bluemarble.labels_of(zones, water)
        world = bluemarble.cut(rgb, labels, held)
        land = [(labels[y:y + 256, x:x + 256] != 0).sum() for y in range(0, 1280, 256) for x in range(0, 2304, 256)]
        assert len(world.places) == min(96, np.count_nonzero(land))
        for image, mask, (y, x) in zip(world.images, world.masks, world.places * 256):
            assert np.array_equal(image, rgb[y:y + 256, x:x + 256])
            assert np.array_equal(mask, labels[y:y + 256, x:x + 256])

    def test_most_land(self, monkeypatch):
        monkeypatch.setattr(bluemarble, 'TILES', 10)
        rgb, zones, water, held = small_world()
        labels = bluemarble.labels_of(zones, water)
        world = bluemarble.cut(rgb, labels, held)
        land = np.sort([(labels[y:y + 256, x:x + 256] != 0).sum()
                        for y in range(0, 1280, 256) for x in range(0, 2304, 256)])
        assert (world.masks != 0).sum((1, 2)).min() == land[-10] and len(world.places) == 10

    @pytest.mark.parametrize('seed', range(3))
    def test_splits_share_no_block(self, seed):
        rgb, zones, water, held = small_world(seed)
        world = bluemarble.cut(rgb, bluemarble.labels_of(zones, water), held)
        blocks = [set(map(tuple, world.places[world.splits == i] * 256 // 512)) for i in range(3)]
        assert all(blocks) and sum(map(len, blocks)) == len(set.union(*blocks))
        assert blocks[2] <= {(0, 1), (1, 4)}
        assert np.array_equal(held[tuple(world.places.T * 256)], world.splits == 2)

    def test_held_blocks_are_those_of_the_climate_tiles(self):
        """Whole blocks of the same grid, also for the real size of the world."""
        zones = np.full((sources.HEIGHT, sources.WIDTH), 32, dtype=np.uint8)
        rng = np.random.default_rng(0)
        for number, (y, x) in enumerate(rng.integers((100, 0), (1900, 5000), (120, 2))):
            zones[y: y + 300, x: x + 300] = (1, 5, 9, 18, 30)[number % 5]
        held = sources.split_tiles(zones)[2]
        blocks = held[:2560, :5120].reshape(5, 512, 10, 512).mean((1, 3))
        assert set(np.unique(blocks)) == {0, 1}
        world = bluemarble.cut(np.zeros((*zones.shape, 3), dtype=np.uint8), bluemarble.labels_of(
            zones, (zones != 32).astype(np.uint8)), held)
        assert len(world.places) == 96 and len(set(world.splits)) == 3
        for (y, x), split in zip(world.places * 256, world.splits):
            assert held[y:y + 256, x:x + 256].all() if split == 2 else not held[y:y + 256, x:x + 256].any()

    def test_choose_blocks(self):
        counts = np.array([[9, 2, 3], [9, 0, 0], [9, 2, 3], [9, 2, 3], [9, 2, 3]])
        for share in (0.25, 0.5):
            chosen = sources.choose_blocks(counts, share)
            assert len(chosen) == 4 * share and 1 not in chosen

    @pytest.fixture
    def cached(self, tmp_path, monkeypatch):
        rgb, zones, water, held = small_world()
        calls = []
        monkeypatch.setattr(bluemarble, 'load_rasters', lambda folder: calls.append(folder) or (rgb, zones, water))
        monkeypatch.setattr(bluemarble, 'split_tiles', lambda zones: (None, None, held))
        return tmp_path, calls

    def test_cache(self, cached):
        folder, calls = cached
        data = open_data('bluemarble', folder)
        first = next(folder.iterdir()).read_bytes()
        again = open_data('bluemarble', folder)
        assert calls == [folder] and len(list(folder.iterdir())) == 1
        for split in ('train', 'val', 'test'):
            one, other = getattr(data, split), getattr(again, split)
            assert len(one) == len(other) > 0
            for i in range(len(one)):
                assert one.name(i) == other.name(i) and re.fullmatch(r'\d\d[NS]_\d{3}[EW]', one.name(i))
                assert all(np.array_equal(a, b) for a, b in zip(one[i], other[i]))
            assert len({one.name(i) for i in range(len(one))}) == len(one)
        next(folder.iterdir()).unlink()
        open_data('bluemarble', folder)
        assert next(folder.iterdir()).read_bytes() == first  # deterministic

    def test_what_is_read_cannot_harm_the_data(self, cached):
        data = open_data('bluemarble', cached[0])
        image, mask = data.train[0]
        image[:], mask[:] = 0, 0
        assert data.train[0][0].any() and data.train[0][1].any()
        assert image.shape == (256, 256, 3) and mask.shape == (256, 256) and image.dtype == mask.dtype == np.uint8
        assert len(data.classes) == 7 and data.palette.shape == (7, 3)

    def test_other_settings_are_another_file(self, cached, monkeypatch):
        before = bluemarble._cache_path(cached[0])
        monkeypatch.setattr(bluemarble, 'VAL_SHARE', 0.2)
        assert bluemarble._cache_path(cached[0]) != before

    def test_broken_cache(self, cached):
        open_data('bluemarble', cached[0])
        path = next(cached[0].iterdir())
        for content in (b'', b'text', path.read_bytes()[:1000]):
            path.write_bytes(content)
            with pytest.raises(DataError, match=f'{path.name}.*delete it'):
                open_data('bluemarble', cached[0])

    def test_killed_while_writing(self, cached, monkeypatch):
        def fail(file, **_arrays):
            file.write(b'half')
            raise KeyboardInterrupt

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(np, 'savez', fail)
            open_data('bluemarble', cached[0])
        assert not list(cached[0].iterdir())

    def test_picture(self, cached):
        world = bluemarble.load_world(cached[0])
        text = picture.share_table(world)
        rows = [[float(cell) for cell in line.split('|')[3:-1]] for line in text.splitlines()[2:]]
        assert np.allclose(np.sum(rows, 1), 100, atol=0.05) and len(rows) == 3
        chosen = picture.telling(world, 1, 4)
        assert len(set(chosen)) == 4 and (world.splits[chosen] == 1).all()
        fig = picture.figure(world, np.zeros((2700, 5400, 3), dtype=np.uint8))
        assert len(fig.subfigs[1].axes) == 24
