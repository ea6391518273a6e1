"""The data half of the segmentation scripts: layouts and their errors, the Blue Marble task, transforms, scores."""
import colorsys
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'scripts'))

import bluemarble as sources  # noqa: E402
import bluemarble_segmentation as picture  # noqa: E402
from _files import write_atomically  # noqa: E402
from segmentation import bluemarble  # noqa: E402
from segmentation.data import IGNORE, DataError, open_data  # noqa: E402
from segmentation.layouts import CITYSCAPES  # noqa: E402
from segmentation.metrics import ConfusionMatrix, overlay, scores, table, write_overlay  # noqa: E402
from segmentation.transforms import (  # noqa: E402
    EvalTransform,
    TrainTransform,
    adjust_saturation,
    fitted_size,
    photometric_distortion,
)

pytestmark = pytest.mark.usefixtures('one_thread')

PLAIN = dict(scale=(1, 1), flip=0, photometric=False, mean=(0, 0, 0), std=(1, 1, 1))


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


def picture_of(seed, height=6, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_of(values, height=6, width=8):
    return np.resize(np.asarray(values, dtype=np.uint8), (height, width))


def make_folder(root, splits=('train', 'val')):
    root.mkdir(parents=True, exist_ok=True)
    (root / 'classes.txt').write_text('road\nsky blue\t#0080ff\ntree\n')
    for i, split in enumerate(splits):
        for j, name in enumerate(('a', 'town/b')):
            put(root / split / 'images' / f'{name}.png', picture_of(10 * i + j))
            put(root / split / 'masks' / f'{name}.png', mask_of([0, 1, 2, 255]))
    return root


def make_ade20k(root):
    for i, split in enumerate(('training', 'validation')):
        for j in range(2):
            name = f'ADE_{split[:5]}_{j:08}'
            put(root / 'images' / split / f'{name}.jpg', picture_of(10 * i + j))
            put(root / 'annotations' / split / f'{name}.png', mask_of([0, 1, 2, 150]))
    return root


def make_cityscapes(root):
    for split, city in (('train', 'aachen'), ('val', 'bonn')):
        for j in range(2):
            name = f'{city}_{j:06}_000019'
            put(root / 'leftImg8bit' / split / city / f'{name}_leftImg8bit.png', picture_of(j))
            fine = root / 'gtFine' / split / city
            put(fine / f'{name}_gtFine_labelIds.png', mask_of([0, 7, 8, 33, 14]))
            put(fine / f'{name}_gtFine_color.png', picture_of(j))
            put(fine / f'{name}_gtFine_instanceIds.png', mask_of([1, 2]).astype(np.uint16))
            (fine / f'{name}_gtFine_polygons.json').write_text('{}')
    return root


class TestLayouts:
    def test_folder(self, tmp_path):
        root = make_folder(tmp_path)
        (root / 'train' / 'images' / '.hidden').write_text('')
        data = open_data('folder', root)
        assert data.classes == ('road', 'sky blue', 'tree') and data.fit is None
        assert data.palette.shape == (3, 3) and data.palette.dtype == np.uint8
        assert data.palette[1].tolist() == [0, 128, 255]
        assert len(data.train) == len(data.val) == 2 and data.test is data.val
        assert [data.train.name(i) for i in range(2)] == ['a', 'town/b']
        image, mask = data.val[1]
        assert image.dtype == mask.dtype == np.uint8
        assert np.array_equal(image, picture_of(11)) and np.array_equal(mask, mask_of([0, 1, 2, 255]))

    def test_folder_with_test_split(self, tmp_path):
        data = open_data('folder', str(make_folder(tmp_path, ('train', 'val', 'test'))))
        assert np.array_equal(data.test[0][0], picture_of(20))

    @pytest.mark.parametrize('stored', ('palette', 'uint16', 'bool'))
    def test_masks_of_other_modes(self, tmp_path, stored):
        root = make_folder(tmp_path)
        path = root / 'train' / 'masks' / 'a.png'
        labels = mask_of([0, 1] if stored == 'bool' else [0, 1, 2, 255])
        if stored == 'palette':
            image = Image.fromarray(labels).convert('P')
            image.putpalette(list(range(256)) * 3)
        else:
            image = Image.fromarray(labels.astype(stored))
        image.save(path)
        assert np.array_equal(open_data('folder', root).train[0][1], labels)

    @pytest.mark.parametrize('mode', ('L', 'P', 'RGBA'))
    def test_images_of_other_modes(self, tmp_path, mode):
        root = make_folder(tmp_path)
        image = Image.fromarray(picture_of(0)).convert(mode)
        image.save(root / 'train' / 'images' / 'a.png')
        assert np.array_equal(open_data('folder', root).train[0][0], np.array(image.convert('RGB')))

    def test_ade20k(self, tmp_path):
        data = open_data('ade20k', make_ade20k(tmp_path))
        assert data.classes[0] == '1' and len(data.classes) == len(data.palette) == 150
        assert data.fit == (2048, 512) and data.test is data.val
        assert data.val.name(1) == 'ADE_valid_00000001'
        assert np.array_equal(data.train[0][1], mask_of([255, 0, 1, 149]))
        assert data.train[0][0].shape == (6, 8, 3)
        assert len(np.unique(data.palette, axis=0)) == 150

    def test_ade20k_names(self, tmp_path):
        make_ade20k(tmp_path)
        lines = [f'{i}\t0.1\t10\t5\t0\tthing {i}, object  ' for i in range(1, 151)]
        info = tmp_path / 'objectInfo150.txt'
        info.write_text('\n'.join(['Idx\tRatio\tTrain\tVal\tStuff\tName', *lines]) + '\n')
        assert open_data('ade20k', tmp_path).classes[149] == 'thing 150, object'
        info.write_text('\n'.join(lines))
        with pytest.raises(DataError, match='objectInfo150.txt: wanted'):
            open_data('ade20k', tmp_path)

    def test_cityscapes(self, tmp_path):
        data = open_data('cityscapes', make_cityscapes(tmp_path))
        assert len(data.classes) == 19 and data.classes[18] == 'bicycle' and data.palette[0].tolist() == [128, 64, 128]
        assert data.train.name(0) == 'aachen/aachen_000000_000019' and data.test is data.val
        assert np.array_equal(data.train[0][1], mask_of([255, 0, 1, 18, 255]))

    def test_cityscapes_train_ids(self, tmp_path):
        make_cityscapes(tmp_path)
        put(tmp_path / 'gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png', mask_of([3, 18, 255]))
        data = open_data('cityscapes', tmp_path)
        assert len(data.train) == 2
        assert np.array_equal(data.train[1][1], mask_of([3, 18, 255]))
        assert np.array_equal(data.train[0][1], mask_of([255, 0, 1, 18, 255]))

    def test_cityscapes_ids(self):
        """Against the definition: what is evaluated, in ascending order of its number."""
        numbers = [row[0] for row in CITYSCAPES]
        void = {0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30}
        assert numbers == sorted(set(range(34)) - void)




class TestErrors:
    """One bad thing each; the message names the file."""

    @pytest.fixture
    def root(self, tmp_path):
        return make_folder(tmp_path)

    def opens_not(self, root, *words, name='folder'):
        with pytest.raises(DataError) as e:
            open_data(name, root)
        for word in words:
            assert str(word) in str(e.value)

    def reads_not(self, root, *words, name='folder', index=0):
        data = open_data(name, root)
        with pytest.raises(DataError) as e:
            data.train[index]
        for word in words:
            assert str(word) in str(e.value)

    def test_unknown_name(self, root):
        self.opens_not(root, "'voc'", 'bluemarble, ade20k, cityscapes, folder', name='voc')

    @pytest.mark.parametrize('name', ('ade20k', 'cityscapes', 'folder'))
    def test_no_folder(self, tmp_path, name):
        self.opens_not(None, name, 'not given', name=name)
        self.opens_not(tmp_path / 'none', tmp_path / 'none', name, name=name)
        (tmp_path / 'classes.txt').write_text('a')
        self.opens_not(tmp_path, tmp_path, 'no such folder', name=name)

    def test_missing_mask(self, root):
        (root / 'train' / 'masks' / 'town' / 'b.png').unlink()
        self.opens_not(root, root / 'train' / 'images' / 'town' / 'b.png', 'image without a mask',
                       root / 'train' / 'masks')

    def test_missing_masks_are_counted(self, root):
        for path in (root / 'train' / 'masks').rglob('*.png'):
            path.unlink()
        self.opens_not(root, root / 'train' / 'images' / 'a.png', '2 such files')

    def test_mask_without_image(self, root):
        put(root / 'val' / 'masks' / 'c.png', mask_of([0]))
        self.opens_not(root, root / 'val' / 'masks' / 'c.png', 'mask without an image')

    def test_no_images(self, root):
        for path in (root / 'val').rglob('*.png'):
            path.unlink()
        self.opens_not(root, root / 'val' / 'images', 'no images')

    def test_unexpected_file(self, root):
        (root / 'train' / 'images' / 'notes.doc').write_text('')
        self.opens_not(root, root / 'train' / 'images' / 'notes.doc', '.jpg')

    def test_jpeg_mask(self, root):
        put(root / 'train' / 'masks' / 'a.jpg', mask_of([0]))
        self.opens_not(root, root / 'train' / 'masks' / 'a.jpg', '.png')

    def test_same_name(self, root):
        put(root / 'train' / 'images' / 'a.jpg', picture_of(0))
        self.opens_not(root, 'a.jpg', 'a.png', 'same name')

    @pytest.mark.parametrize('text, word', (
        ('', '0 classes'), ('a\n\nb\n', 'line 2'), ('a\nb\na\n', "line 3: 'a'"), ('a\tred\n', '#rrggbb'),
        ('\n'.join(map(str, range(256))), '256 classes')))
    def test_classes(self, root, text, word):
        (root / 'classes.txt').write_text(text)
        self.opens_not(root, root / 'classes.txt', word)

    def test_no_classes(self, root):
        (root / 'classes.txt').unlink()
        self.opens_not(root, root / 'classes.txt', 'no such file')

    def test_wrong_label(self, root):
        mask = mask_of([0, 1, 2])
        mask[2, 5], mask[3, 1:3], mask[4, 4] = 3, 17, 254
        put(root / 'train' / 'masks' / 'a.png', mask)
        self.reads_not(root, root / 'train' / 'masks' / 'a.png', 'wrong label 3 at row 2, column 5',
                       '4 wrong pixels, and also 17, 254', 'allowed are 0 to 2 (classes.txt) and 255')

    @pytest.mark.parametrize('value', (256, 1000, 65535))
    def test_large_label(self, root, value):
        put(root / 'train' / 'masks' / 'a.png', np.full((6, 8), value, dtype=np.uint16))
        self.reads_not(root, f'wrong label {value} ')

    def test_wrong_label_of_ade20k(self, tmp_path):
        make_ade20k(tmp_path)
        path = tmp_path / 'annotations/training/ADE_train_00000001.png'
        put(path, mask_of([0, 151]))
        self.reads_not(tmp_path, path, '151', '0 (ignored) and 1 to 150', name='ade20k', index=1)

    @pytest.mark.parametrize('kind, value, allowed', (
        ('labelIds', 34, '0 to 33'), ('labelTrainIds', 19, '0 to 18 and 255')))
    def test_wrong_label_of_cityscapes(self, tmp_path, kind, value, allowed):
        make_cityscapes(tmp_path)
        path = tmp_path / f'gtFine/train/aachen/aachen_000000_000019_gtFine_{kind}.png'
        put(path, mask_of([0, value]))
        self.reads_not(tmp_path, path, value, allowed, name='cityscapes')

    def test_missing_mask_of_cityscapes(self, tmp_path):
        """The other files of the annotation are no substitute."""
        make_cityscapes(tmp_path)
        (tmp_path / 'gtFine/val/bonn/bonn_000001_000019_gtFine_labelIds.png').unlink()
        self.opens_not(
            tmp_path, tmp_path / 'leftImg8bit/val/bonn/bonn_000001_000019_leftImg8bit.png', 'image without a mask',
            name='cityscapes')

    def test_strange_image_in_cityscapes(self, tmp_path):
        put(make_cityscapes(tmp_path) / 'leftImg8bit/train/aachen/x.png', picture_of(0))
        self.opens_not(tmp_path, 'aachen/x.png', '*_leftImg8bit.png', name='cityscapes')

    def test_size(self, root):
        put(root / 'train' / 'masks' / 'a.png', mask_of([0], 8, 6))
        self.reads_not(root, root / 'train' / 'masks' / 'a.png', 'mask is 6 x 8', 'image 8 x 6')

    @pytest.mark.parametrize('mode', ('RGB', 'RGBA', 'LA'))
    def test_colours(self, root, mode):
        Image.fromarray(picture_of(0)).convert(mode).save(root / 'train' / 'masks' / 'a.png')
        self.reads_not(root, root / 'train' / 'masks' / 'a.png', f'mode {mode}', 'not colours')

    def test_image_of_16_bits(self, root):
        put(root / 'train' / 'images' / 'a.png', np.full((6, 8), 3000, dtype=np.uint16))
        self.reads_not(root, root / 'train' / 'images' / 'a.png', '8 bits')

    @pytest.mark.parametrize('what', ('image', 'mask'))
    @pytest.mark.parametrize('how', ('text', 'truncated', 'empty', 'gone'))
    def test_unreadable(self, root, what, how):
        path = root / 'train' / f'{what}s' / 'a.png'
        put(path, picture_of(0, 64, 64) if what == 'image' else mask_of([0, 1, 2, 1], 64, 64) * picture_of(0, 64, 64)[
            ..., 0] % 3)
        content = path.read_bytes()
        path.write_bytes({'text': b'not an image', 'truncated': content[:len(content) // 2]}.get(how, b''))
        if what == 'mask':
            put(root / 'train' / 'images' / 'a.png', picture_of(0, 64, 64))
        data = open_data('folder', root)
        if how == 'gone':
            path.unlink()
        with pytest.raises(DataError, match=re.escape(str(path))):
            data.train[0]

    def test_through_workers(self, root):
        put(root / 'train' / 'masks' / 'a.png', mask_of([9]))
        loader = torch.utils.data.DataLoader(open_data('folder', root).train, num_workers=1)
        with pytest.raises(DataError, match='wrong label 9'):
            list(loader)


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


def smooth_pair(height=40, width=56):
    """Image whose red says the label: 7 areas with straight borders."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, width // 3:] = 1
    mask[height // 2:, :] += 2
    mask[5:15, 30:50] = 6
    image = np.stack([mask * 40, 255 - mask * 30, np.zeros_like(mask)], -1)
    return image, mask


class TestTransforms:
    @pytest.mark.parametrize('seed', range(8))
    def test_mask_follows_image(self, seed):
        """Resized, cropped, flipped: inside areas, away from blended borders, the colour is that of the label."""
        image, mask = smooth_pair()
        transform = TrainTransform(48, 7, photometric=False, mean=(0, 0, 0), std=(1, 1, 1))
        x, y = transform(image, mask, np.random.default_rng(seed))
        assert x.shape == (3, 48, 48) and x.dtype == torch.float32
        assert y.shape == (48, 48) and y.dtype == torch.int64
        there = y != IGNORE
        assert (x[:, ~there] == 0).all()
        exact = (x[0] * 255 - y * 40).abs() < 1
        assert exact[there].float().mean() > 0.8
        # Where it is not, a border of areas is next to it, if only in what was cropped off.
        flat = torch.nn.functional.max_pool2d(y[None].float(), 5, 1, 2) == -torch.nn.functional.max_pool2d(
            -y[None].float(), 5, 1, 2)
        assert exact[1:-1, 1:-1][(flat[0] & there)[1:-1, 1:-1]].all()

    @pytest.mark.parametrize('factor', (3 / 5, 5 / 3))  # with these no sample lies just between two pixels
    def test_resize_is_centred(self, factor):
        """A step lands at the same column of image and mask, wherever it is: half a pixel of shift would show."""
        width = round(60 * factor)
        transform = TrainTransform(width, 2, **{**PLAIN, 'scale': (factor, factor), 'cat_max_ratio': 1})
        for step in range(1, 60):
            mask = np.zeros((5, 60), dtype=np.uint8)
            mask[:, step:] = 1
            x, y = transform(np.repeat((mask * 255)[..., None], 3, 2), mask, np.random.default_rng(0))
            assert torch.equal((x[0, 0] > 0.5).long(), y[0]) and abs(y[0].sum() - (60 - step) * factor) < 0.51

    def test_flip(self):
        image, mask = smooth_pair(40, 40)
        plain = TrainTransform(40, 7, **PLAIN)(image, mask, np.random.default_rng(0))
        flipped = TrainTransform(40, 7, **{**PLAIN, 'flip': 1})(image, mask, np.random.default_rng(0))
        assert np.array_equal(plain[1], mask)
        assert all(torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped))
        rng = np.random.default_rng(0)
        half = TrainTransform(40, 7, **{**PLAIN, 'flip': 0.5})
        count = sum(torch.equal(half(image, mask, rng)[1], flipped[1]) for _ in range(200))
        assert 70 < count < 130

    def test_rng_decides_all(self):
        image, mask = smooth_pair(80, 90)
        image = (image // 2 + picture_of(0, 80, 90) // 2).astype(np.uint8)
        kept = image.copy(), mask.copy()
        transform = TrainTransform(32, 7)
        torch.manual_seed(1)
        first = [transform(image, mask, np.random.default_rng(s)) for s in range(6)]
        torch.manual_seed(2)
        np.random.seed(3)
        again = [transform(image, mask, np.random.default_rng(s)) for s in range(6)]
        assert all(torch.equal(a, b) for one, other in zip(first, again) for a, b in zip(one, other))
        assert not any(torch.equal(first[i][0], first[j][0]) for i in range(6) for j in range(i))
        assert np.array_equal(image, kept[0]) and np.array_equal(mask, kept[1])

    def test_torch_rng_is_left_alone(self):
        image, mask = smooth_pair()
        state = torch.get_rng_state()
        TrainTransform(32, 7)(image, mask, np.random.default_rng(0))
        assert torch.equal(state, torch.get_rng_state())

    def test_scale(self):
        """A square's side follows the factor, which is spread over its range."""
        mask = np.full((40, 40), IGNORE, dtype=np.uint8)
        mask[:, :] = 1
        transform = TrainTransform(90, 3, cat_max_ratio=1, photometric=False, flip=0)
        sides = [int((transform(np.zeros((40, 40, 3), np.uint8), mask, np.random.default_rng(s))[1] == 1).sum()) ** 0.5
                 for s in range(200)]
        assert 20 <= min(sides) < 23 and 77 < max(sides) <= 80
        assert abs(np.mean(sides) - 50) < 3

    def test_cat_max_ratio(self):
        """Two thirds of the places show one class only: ten tries hardly ever end in one."""
        mask = np.zeros((16, 96), dtype=np.uint8)
        mask[:, 48:] = 1
        image = np.zeros((16, 96, 3), dtype=np.uint8)

        def largest(ratio):
            transform = TrainTransform(16, 2, **{**PLAIN, 'cat_max_ratio': ratio})
            return np.array([
                transform(image, mask, np.random.default_rng(s))[1].flatten().bincount().max().item() / 256
                for s in range(300)])

        assert (largest(1) >= 0.75).mean() > 0.8
        # 7 of 81 windows are below 0.75: the chance that ten tries miss is (74 / 81)^10 = 0.40
        assert abs((largest(0.75) >= 0.75).mean() - (74 / 81) ** 10) < 0.08

    def test_cat_max_ratio_counts_no_ignored_pixels(self):
        """Ignored pixels are no class: an area of one class among them stays one class."""
        mask = np.full((16, 64), IGNORE, dtype=np.uint8)
        mask[:, 30:32], mask[:, 32:34] = 0, 1
        transform = TrainTransform(16, 2, **PLAIN)
        labels = [transform(np.zeros((16, 64, 3), np.uint8), mask, np.random.default_rng(s))[1] for s in range(50)]
        assert sum(set(y.unique().tolist()) == {0, 1, IGNORE} for y in labels) > 40

    def test_nothing_labelled(self):
        mask = np.full((20, 20), IGNORE, dtype=np.uint8)
        _, y = TrainTransform(16, 2)(np.zeros((20, 20, 3), np.uint8), mask, np.random.default_rng(0))
        assert (y == IGNORE).all()

    def test_padding(self):
        image, mask = smooth_pair(10, 14)
        x, y = TrainTransform(20, 7, **{**PLAIN, 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4)})(
            np.maximum(image, 1), mask % 7, np.random.default_rng(0))
        assert (y[10:] == IGNORE).all() and (y[:, 14:] == IGNORE).all() and (y[:10, :14] != IGNORE).all()
        assert (x[:, 10:] == 0).all() and (x[:, :, 14:] == 0).all()
        counted = ConfusionMatrix(7)
        counted.update(np.zeros((20, 20), dtype=int), y.numpy())
        assert counted.matrix.sum() == 140

    def test_normalisation(self):
        image, mask = picture_of(0), mask_of([0, 1])
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        wanted = torch.tensor((image / 255 - mean) / std).permute(2, 0, 1).float()
        x, y = EvalTransform(mean, std)(image, mask)
        assert torch.allclose(x, wanted, atol=1e-6) and y.dtype == torch.int64 and np.array_equal(y, mask)
        x, _ = TrainTransform(8, 2, **{**PLAIN, 'mean': mean, 'std': std})(image, mask, np.random.default_rng(0))
        assert torch.allclose(x[:, :6], wanted, atol=1e-6)

    def test_fit(self):
        assert fitted_size((683, 1024), (2048, 512)) == [512, 768]
        assert fitted_size((1024, 683), (2048, 512), 0.5) == [384, 256]
        assert fitted_size((100, 1000), (2048, 512)) == [205, 2048]
        assert fitted_size((7, 5), None, 1.5) == [11, 8]
        assert fitted_size((1, 100), None, 0.1) == [1, 10]
        image, mask = smooth_pair(40, 60)
        x, y = EvalTransform(fit=(90, 30))(image, mask)
        assert x.shape == (3, 30, 45) and y.shape == (40, 60)
        y = TrainTransform(90, 7, **PLAIN, fit=(90, 30))(image, mask, np.random.default_rng(0))[1]
        assert (y != IGNORE).sum() == 30 * 45

    @pytest.mark.parametrize('dtype', (np.uint8, np.int64, np.int32))
    def test_mask_dtypes(self, dtype):
        image, mask = smooth_pair()
        one, other = (TrainTransform(32, 7)(image, m, np.random.default_rng(0)) for m in (mask, mask.astype(dtype)))
        assert torch.equal(one[1], other[1])

    def test_photometric(self):
        """Every change stays in its published range; half of the images get each."""
        grey, rng = torch.full((3, 1, 1), 0.5), np.random.default_rng(0)
        values = torch.stack([photometric_distortion(grey, rng).flatten() for _ in range(2000)])
        assert torch.allclose(values[:, :1], values, atol=1e-5)  # grey stays grey
        v = values[:, 0]
        low, high = (0.5 - 32 / 255) * 0.5, (0.5 + 32 / 255) * 1.5
        assert low <= v.min() < low + 0.1 and high - 0.1 < v.max() <= high
        assert 0.22 < (v - 0.5).abs().lt(1e-6).float().mean() < 0.28  # neither brightness nor contrast

    def test_hue(self, monkeypatch):
        """Up to 36 degrees either way, at constant saturation and value."""
        import segmentation.transforms as module
        monkeypatch.setattr(module, 'BRIGHTNESS', 0)
        monkeypatch.setattr(module, 'CONTRAST', (1, 1))
        monkeypatch.setattr(module, 'SATURATION', (1, 1))
        colour = torch.tensor(colorsys.hsv_to_rgb(0.4, 0.7, 0.8)).view(3, 1, 1)
        rng = np.random.default_rng(0)
        colours = [photometric_distortion(colour, rng).flatten().tolist() for _ in range(200)]
        hsv = np.array([colorsys.rgb_to_hsv(*c) for c in colours])
        shift = 360 * (hsv[:, 0] - 0.4)
        assert np.allclose(hsv[:, 1:], (0.7, 0.8), atol=1e-3)
        assert -36.1 < shift.min() < -30 and 30 < shift.max() < 36.1
        assert 0.35 < (np.abs(shift) < 0.01).mean() < 0.65

    @pytest.mark.parametrize('factor', (0, 0.5, 1, 1.5, 9))
    def test_saturation(self, factor):
        image = torch.rand(3, 5, 5)
        image[:, 0, 0], image[:, 0, 1], image[:, 0, 2] = 0, 1, torch.tensor([1.0, 0, 0])
        result = adjust_saturation(image, factor)
        for before, after in zip(image.flatten(1).T.tolist(), result.flatten(1).T.tolist()):
            h, s, v = colorsys.rgb_to_hsv(*before)
            assert np.allclose(after, colorsys.hsv_to_rgb(h, min(s * factor, 1), v), atol=1e-5)

    def test_photometric_leaves_the_mask(self):
        image, mask = smooth_pair(40, 40)
        y = TrainTransform(40, 7, **{**PLAIN, 'photometric': True})(image, mask, np.random.default_rng(0))[1]
        assert np.array_equal(y, mask)

    @pytest.mark.parametrize('bad', (
        dict(crop=0), dict(classes=0), dict(classes=256), dict(scale=(0, 1)), dict(scale=(2, 1)),
        dict(cat_max_ratio=0), dict(cat_max_ratio=1.1), dict(flip=-0.1), dict(flip=2)))
    def test_bad_arguments(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrainTransform(**{'crop': 8, 'classes': 2, **bad})

    def test_bad_pairs(self):
        image, mask = smooth_pair()
        rng = np.random.default_rng(0)
        for args, words in (
                ((image, mask[1:]), 'mask of an image'), ((image / 255, mask), 'float64'),
                ((image[..., 0], mask), r'\(40, 56\)'), ((image, mask + 1), 'label 7 in a mask of 7 classes')):
            with pytest.raises(ValueError, match=words):
                TrainTransform(64, 7, scale=(1, 1))(*args, rng)
        with pytest.raises(ValueError, match='mask of an image'):
            EvalTransform()(image, mask[1:])


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
