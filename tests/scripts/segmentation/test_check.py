"""The check of a data set before a training: what is wrong or doubtful is refused, with the values found."""
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from scripts.segmentation.check import check_data, inspect, summary
from scripts.segmentation.data import DataError, open_data
from tests.support.segmentation_cases import mask_of, picture_of, put

pytestmark = pytest.mark.usefixtures('one_thread')


def make_folder(root, values=(0, 1), classes='cell\nwall\n', splits=('train', 'val'), pairs=3):
    """Random images, and masks in which all values occur."""
    root.mkdir(parents=True, exist_ok=True)
    (root / 'classes.txt').write_text(classes)
    for i, split in enumerate(splits):
        for j in range(pairs):
            put(root / split / 'images' / f'{j}.png', picture_of(10 * i + j))
            put(root / split / 'masks' / f'{j}.png', mask_of(values))
    return root


def check(root, anyway=False, splits=('train', 'val', 'test'), **values):
    return check_data(open_data('folder', root, **values), splits, anyway)


def refusal(root, **kwargs):
    with pytest.raises(DataError) as e:
        check(root, **kwargs)
    return str(e.value)


class TestValues:
    def test_0_and_255(self, tmp_path):
        """The commonest layout of two classes, in which 255 means "ignore": refused, and mapped on demand."""
        root = make_folder(tmp_path, (0, 0, 0, 255))
        text = refusal(root)
        assert "a class occurs in no training mask: 1 'wall'. The masks hold 0 (75 %), 255 (25 %)." in text
        assert '255 means: ignore this pixel.' in text and 'give --mask-values 0,255' in text
        data = open_data('folder', root, mask_values=[0, 255])
        assert np.array_equal(data.train[0][1], mask_of((0, 0, 0, 1)))
        assert 'wall       25.000        3    25.000        3' in check_data(data)

    def test_numbers_from_1(self, tmp_path):
        root = make_folder(tmp_path, (1, 2))
        text = refusal(root)
        assert text.count(': wrong label 2 at row 0, column 1') == 6
        assert 'the masks of train hold 1 (50 %), 2 (50 %)' in text and 'give --mask-values 1,2' in text
        assert '3 of the 3 pairs of val are wrong' in text and '--anyway' not in text
        check(root, mask_values=[1, 2])
        assert np.array_equal(open_data('folder', root, [2, 1]).val[0][1], mask_of((1, 0)))

    def test_ignored_values(self, tmp_path):
        """As of Oxford's pets: 1 and 2 are classes, 3 is the border."""
        root = make_folder(tmp_path, (1, 2, 3))
        assert 'and --ignore-values with those to ignore' in refusal(root)
        data = open_data('folder', root, [1, 2], [3])
        assert np.array_equal(data.train[0][1], mask_of((0, 1, 255))) and check_data(data)
        with pytest.raises(DataError, match='wrong label 3 .* allowed are 1, 2 .--mask-values. and 255 .ignored.'):
            open_data('folder', root, [1, 2]).train[0]

    def test_large_values(self, tmp_path):
        root = make_folder(tmp_path)
        for path in root.rglob('masks/*.png'):
            put(path, mask_of((0, 1)).astype(np.uint16) * 1000)
        put(root / 'val/masks/0.png', mask_of((0,)))  # of 8 bits
        assert not open_data('folder', root, [0, 1000]).val[0][1].any()
        assert np.array_equal(open_data('folder', root, [0, 1000]).train[0][1], mask_of((0, 1)))
        assert 'give --mask-values 0,1000' in refusal(root)

    @pytest.mark.parametrize('values, message', [
        (dict(mask_values=[0]), '--mask-values has 1 values for the 2 classes'),
        (dict(mask_values=[3, 3]), 'name 3 twice'), (dict(mask_values=[0, 3], ignore_values=[3]), 'name 3 twice'),
        (dict(mask_values=[0, 65536]), 'are from 0 to 65535, got 0 to 65536'),
        (dict(ignore_values=[-1]), 'are from 0 to 65535, got -1 to 1')])
    def test_bad_values(self, tmp_path, values, message):
        with pytest.raises(DataError, match=message):
            open_data('folder', make_folder(tmp_path), **values)

    @pytest.mark.parametrize('name', ['bluemarble', 'ade20k'])
    def test_only_of_folder(self, name):
        with pytest.raises(DataError, match=f'--mask-values is for --data folder, not for {name}'):
            open_data(name, None, [0, 1])


class TestFiles:
    def test_every_split(self, tmp_path):
        """A wrong pair of the test split is found before the training, as those of the others."""
        root = make_folder(tmp_path, splits=('train', 'val', 'test'))
        put(root / 'train/masks/0.png', mask_of((0, 1), 4, 4))
        (root / 'val/images/1.png').write_bytes((root / 'val/images/1.png').read_bytes()[:60])
        Image.fromarray(picture_of(0)).save(root / 'test/masks/2.png')
        text = refusal(root)
        assert f'{root}/train/masks/0.png: the mask is 4 x 4 pixels (width x height), its image 8 x 6' in text
        assert f'{root}/val/images/1.png: the image cannot be read' in text
        assert f'{root}/test/masks/2.png: the mask has Pillow mode RGB' in text and 'save one channel' in text
        assert '1 of the 3 pairs of val are wrong' in text
        assert f'{root}/test' in refusal(root, splits=['test']) and 'val' not in refusal(root, splits=['test'])

    def test_many(self, tmp_path):
        root = make_folder(tmp_path, (0, 9), pairs=8)
        text = refusal(root)
        assert text.count(': wrong label 9') == 10 and text.count('... and 3 more') == 2

    def test_grey_levels_of_few_bits(self, tmp_path):
        """PNGs of 2 and 4 bits hold class numbers as they stand; Pillow stretches them to 0 ... 255."""
        root = make_folder(tmp_path, classes='a\nb\nc\nd\n', values=(0, 1, 2, 3))
        for bits, name in ((2, '0'), (4, '1')):
            path, numbers = root / 'train/masks' / f'{name}.png', mask_of((0, 1, 2, 3))
            write_grey(path, numbers, bits)
            assert np.asarray(Image.open(path)).max() == 3 * 255 // (2 ** bits - 1)
            assert np.array_equal(open_data('folder', root).train[int(name)][1], numbers)
        check(root)

    def test_jpeg_named_png(self, tmp_path):
        root = make_folder(tmp_path)
        Image.fromarray(mask_of((0, 1))).save(root / 'train/masks/0.png', format='JPEG')
        assert '0.png: the mask is a JPEG file, which may change numbers' in refusal(root)

    def test_turned(self, tmp_path):
        """An orientation in EXIF data is told; where it makes the sizes differ, that is the reason given."""
        root = make_folder(tmp_path)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(picture_of(0)).save(root / 'train/images/0.png', exif=exif)
        assert 'note: the EXIF data of 1 images of train name an orientation' in check(root)
        put(root / 'train/masks/0.png', mask_of((0, 1), 8, 6))
        assert "its image 8 x 6; the image's EXIF data name an orientation" in refusal(root)


def write_grey(path, numbers, bits):
    """A grey PNG of fewer than 8 bits, which Pillow does not write."""
    rows = b''
    for row in numbers:
        number = 0
        for value in row:
            number = number << bits | int(value)
        rows += b'\0' + number.to_bytes(len(row) * bits // 8, 'big')

    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = struct.pack('>IIBBBBB', numbers.shape[1], numbers.shape[0], bits, 0, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(
        b'IEND', b''))


class TestDoubts:
    """Refused, and taken with `anyway`, which then says so."""

    def doubts(self, root, *words):
        text = refusal(root)
        assert all(word in text for word in words) and '--anyway takes the data as they are' in text, text
        passed = check(root, anyway=True)
        assert all(word in passed for word in words) and 'in doubt: ' in passed

    def test_absent_class(self, tmp_path):
        self.doubts(make_folder(tmp_path, (0, 2), 'a\nb\nc\nd\n'), "2 classes occur in no training mask: 1 'b', 3 'd'")

    def test_unlabelled_images(self, tmp_path):
        root = make_folder(tmp_path)
        put(root / 'val/masks/2.png', mask_of((255,)))
        self.doubts(root, '1 of the 3 images of val have no labelled pixel: 2')

    def test_palettes(self, tmp_path):
        """A program that chooses a palette per file gives the same class several numbers."""
        root = make_folder(tmp_path)
        for i, colours in enumerate(([0, 0, 0, 255, 0, 0], [255, 0, 0, 0, 0, 0])):
            image = Image.fromarray(mask_of((0, 1))).convert('P')
            image.putpalette(colours)
            image.save(root / 'train/masks' / f'{i}.png')
        self.doubts(root, 'the palettes of the masks differ', '0 is #000000 in train 0, #ff0000 in train 1')
        shutil.copy(root / 'train/masks/1.png', root / 'train/masks/0.png')
        check(root)

    def test_same_images(self, tmp_path):
        root = make_folder(tmp_path)
        shutil.copy(root / 'train/images/2.png', root / 'val/images/0.png')
        self.doubts(root, '1 images of val are those of train: train 2 is val 0')


def test_no_labelled_pixel(tmp_path):
    """Nothing to validate on is no doubt: there would be no score."""
    root = make_folder(tmp_path)
    for path in (root / 'val/masks').iterdir():
        put(path, mask_of((255,)))
    text = refusal(root, anyway=True)
    assert 'no pixel of val has a label: the masks of val hold 255 (100 %)' in text


def test_summary(tmp_path):
    root = make_folder(tmp_path, (0, 1, 1, 255))
    for path in (root / 'val/masks').iterdir():
        put(path, mask_of((0, 255)))
    data = open_data('folder', root)
    found = [inspect(name, getattr(data, name), threads=2) for name in ('train', 'val')]
    assert summary(data, found).splitlines() == [
        'train: 3 pairs, 8 x 6 pixels (width x height)', 'val: 3 pairs, 8 x 6 pixels (width x height)',
        'class     train %   images     val %   images',
        'cell       25.000        3    50.000        3',
        'wall       50.000        3     0.000        0',
        'ignored    25.000        3    50.000        3',
        'note: no pixel of val is wall']


def test_record(tmp_path, monkeypatch):
    """What has not changed is not read again; a file that has is, as are masks that mean something else."""
    root, record = make_folder(tmp_path / 'data', (0, 255)), tmp_path / 'data.json'
    values = dict(mask_values=[0, 255])

    def checked(**values):
        return check_data(open_data('folder', root, **values), record=record)

    assert 'wall' in checked(**values) and json.loads(record.read_text())['classes'] == ['cell', 'wall']
    with monkeypatch.context() as m:
        m.setattr(Image, 'open', lambda path: pytest.fail('read'))
        assert checked(**values) == 'the data have not changed since they were checked'
    assert 'wall' in checked(mask_values=[255, 0])
    with pytest.raises(DataError, match='occurs in no training mask'):
        checked()
    put(root / 'val/masks/1.png', mask_of((7,)))
    with pytest.raises(DataError, match='wrong label 7'):
        checked(mask_values=[255, 0])
    record.write_text('{')
    with pytest.raises(DataError, match='wrong label 7'):
        checked(mask_values=[255, 0])
