"""The layouts of segmentation data on disk, and the errors of files that do not fit them."""
import re

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.segmentation.data import DataError, open_data
from scripts.segmentation.layouts import CITYSCAPES
from scripts.training.images import colours
from tests.support.segmentation_cases import mask_of, picture_of, put

pytestmark = pytest.mark.usefixtures('one_thread')


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

    @pytest.mark.parametrize('given', [{1: (255, 0, 0)}, {0: (240, 40, 40), 2: (25, 50, 180)}, {}])
    def test_colours_beside_given_ones(self, given, tmp_path):
        """A class without a colour gets none that is easily taken for a given one."""
        root = make_folder(tmp_path)
        names = ('road', 'sky', 'tree', 'house')
        (root / 'classes.txt').write_text('\n'.join(
            name + (f'\t#{bytes(given[i]).hex()}' if i in given else '') for i, name in enumerate(names)))
        palette = open_data('folder', root).palette.astype(float)
        for i, colour in enumerate(palette):
            assert i not in given or tuple(colour) == given[i]
            assert all(np.linalg.norm(colour - other) > 75 for other in np.delete(palette, i, 0))
        if not given:
            assert np.array_equal(palette, colours(4))

    def test_byte_order_mark(self, tmp_path):
        """Windows' editors write it; it is no part of a name."""
        root = make_folder(tmp_path)
        (root / 'classes.txt').write_text('road\nsky\ntree\n', encoding='utf-8-sig')
        assert open_data('folder', root).classes == ('road', 'sky', 'tree')

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

    @pytest.mark.parametrize('what', ('image', 'mask'))
    def test_several_frames(self, tmp_path, what):
        root = make_folder(tmp_path)
        pixels = picture_of(0) if what == 'image' else mask_of([0, 1])
        path = root / 'train' / f'{what}s' / 'a.png'
        Image.fromarray(pixels).save(path, save_all=True, append_images=[Image.fromarray(255 - pixels)])
        with pytest.raises(DataError, match=f'a.png: the {what} cannot be read .it has 2 frames'):
            open_data('folder', root).train[0]

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
        self.opens_not(None, f'--data {name} needs --root', name=name)
        self.opens_not(tmp_path / 'none', tmp_path / 'none', name, name=name)
        (tmp_path / 'classes.txt').write_text('a\nb')
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
        ('', '0 classes'), ('a\n', '1 classes'), ('a\n\nb\n', 'line 2'),
        ('a\nb\na\n', "line 3: 'a'"), ('a\tred\n', '#rrggbb'),
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
