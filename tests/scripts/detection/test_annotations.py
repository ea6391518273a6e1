"""Data sets for detection: what is read, and one clear error per mistake, with the file and the id."""
import json
import re

import numpy as np
import pytest

from scripts.detection.annotations import CocoImages
from scripts.detection.data import open_data
from scripts.training.images import SPLITS, DataError
from tests.support.detection_cases import content, write, write_folder
from tests.support.segmentation_cases import put


def test_folder(tmp_path):
    """Classes in the order of their ids, boxes as corners, and the test on val."""
    data = open_data('folder', write_folder(tmp_path))
    assert data.classes == ('square', 'wide') and data.test is data.val and len(data.train) == 4
    made, pictures = content('train')
    image, target = data.train[1]
    assert np.array_equal(image, pictures['t1.png']) and target['labels'].tolist() == [1, 2]
    left, top, w, h = made['annotations'][3]['bbox']
    assert target['boxes'][1].tolist() == [left, top, left + w, top + h] and target['boxes'].dtype == np.float32
    assert data.check() == ('train: 4 images, 8 boxes, 0 images without a box\n'
                            'val: 2 images, 4 boxes, 0 images without a box')
    assert data.train.name(1) == 't1'


def test_coco(tmp_path):
    """The published layout."""
    for part, split in (('train2017', 'train'), ('val2017', 'val')):
        made, pictures = content(split)
        for name, picture in pictures.items():
            put(tmp_path / part / name, picture)
        (tmp_path / 'annotations').mkdir(exist_ok=True)
        (tmp_path / 'annotations' / f'instances_{part}.json').write_text(json.dumps(made))
    data = open_data('coco', tmp_path)
    assert (len(data.train), len(data.val)) == (4, 4) and data.test is data.val
    data.check()


def test_crowds_and_empty_images(tmp_path):
    """A crowd is not to be learned, and is kept for the evaluation; images without a box can be left out."""
    made, pictures = content('train')
    for annotation in made['annotations'][:2]:
        annotation['iscrowd'] = 1
    del made['annotations'][2]['area'], made['annotations'][3]['iscrowd']
    write(tmp_path, 'train', made, pictures)
    split = CocoImages(tmp_path / 'train' / 'annotations.json', tmp_path / 'train')
    assert [len(e.labels) for e in split.entries] == [0, 2, 2, 2] and split.boxes == 6
    assert len(split.entries[0].annotations) == 2 and len(split.with_boxes()) == 3 and len(split) == 4
    assert split[0][1]['boxes'].shape == (0, 4)
    first, second = split.entries[1].annotations
    assert first['area'] == 400 and second['iscrowd'] == 0


def change(**values):
    """Change annotation 4, that of a wide rectangle in image 11."""
    return lambda made: made['annotations'][3].update(values)


WHERE = 'annotations.json: annotation 4 of image 11 (t1.png)'


@pytest.mark.parametrize('spoil, message', [
    (change(bbox=[40, 0, 20, 5]), f'{WHERE}: the box [40, 0, 20, 5] (left, top, width, height) is outside of the '
     'image, which is 48 x 64 pixels'),
    (change(bbox=[-3, 0, 20, 5]), f'{WHERE}: the box [-3, 0, 20, 5] (left, top, width, height) is outside'),
    (change(bbox=[9, 9, -4, 5]), f'{WHERE}: the box [9, 9, -4, 5] (left, top, width, height) has a negative side'),
    (change(bbox=[9, 9, 4, 0]), f'{WHERE}: the box [9, 9, 4, 0] (left, top, width, height) has no area'),
    (change(bbox=[48.5, 9, 0.4, 5]), 'has no area'),
    (change(bbox=[1, 2, 3]), f'{WHERE}: bbox must be four numbers (left, top, width, height), got [1, 2, 3]'),
    (change(bbox=[1, 2, 3, float('nan')]), 'bbox must be four numbers'),
    (change(bbox=None), 'bbox must be four numbers'),
])
def test_wrong_boxes(spoil, message, tmp_path):
    """They are refused, or left out where that is asked for."""
    root = write_folder(tmp_path)
    made, pictures = content('train')
    spoil(made)
    write(root, 'train', made, pictures)
    with pytest.raises(DataError, match=re.escape(message)) as e:
        open_data('folder', root)
    assert '--anyway leaves these annotations out' in str(e.value)
    data = open_data('folder', root, anyway=True)
    assert data.train.boxes == 7 and '1 annotations with a wrong box left out' in data.check()


def test_box_at_the_border(tmp_path):
    """Rounded boxes may reach over the border by a pixel, and are clipped."""
    made, pictures = content('train')
    change(bbox=[-0.4, 50.3, 20.0, 14.2])(made)
    write(tmp_path, 'train', made, pictures)
    split = CocoImages(tmp_path / 'train' / 'annotations.json', tmp_path / 'train')
    np.testing.assert_allclose(split[1][1]['boxes'][1], [0, 50.3, 19.6, 64], rtol=1e-6)


@pytest.mark.parametrize('spoil, message', [
    (change(category_id=9), f'{WHERE} is of the unknown category 9; there are 3, 7'),
    (change(category_id=None), 'is of the unknown category None'),
    (change(image_id=99), 'annotations.json: annotation 4 is of the image 99, which is not in the file'),
    (change(image_id=[1]), 'is of the image [1], which'),
    (change(id=3), 'annotations has the id 3 twice'),
    (change(id='4'), 'entry 3 of annotations has no id that is an integer'),
    (lambda made: made['images'][2].update(file_name='none.png'), 'image 12: there is no file'),
    (lambda made: made['images'][2].update(file_name=None), 'image 12 has no file_name'),
    (lambda made: made['images'][2].pop('width'),
     'image 12 (t2.png) has the width and height None and 64; wanted are positive integers'),
    (lambda made: made['images'][2].update(width=0), 'image 12 (t2.png) has the width and height 0 and 64'),
    (lambda made: made['images'][2].update(id=10), 'images has the id 10 twice'),
    (lambda made: made['categories'][1].update(name='wide'), "category 7 has the name of another one, 'wide'"),
    (lambda made: made['categories'][1].pop('name'), 'category 3 has no name'),
    (lambda made: made.pop('images'), "COCO's format has a list 'images', and this file has none"),
    (lambda made: made['categories'].clear(), 'there are no categories'),
])
def test_wrong_annotations(spoil, message, tmp_path):
    """What is no matter of boxes is refused in any case."""
    root = write_folder(tmp_path)
    made, pictures = content('train')
    spoil(made)
    write(root, 'train', made, pictures)
    for anyway in (False, True):
        with pytest.raises(DataError, match=re.escape(message)) as e:
            open_data('folder', root, anyway)
        assert f'{root}/train/annotations.json' in str(e.value)


def test_wrong_files(tmp_path):
    root = write_folder(tmp_path)
    put(root / 'train' / 't2.png', np.zeros((20, 30, 3), np.uint8))
    (root / 'train' / 't3.png').write_bytes(b'no image')
    data = open_data('folder', root)
    with pytest.raises(DataError) as e:
        data.check()
    assert '2 of 4 images are wrong:' in str(e.value) and 'image 13:' in str(e.value)
    assert f'image 12 is 64 x 64 pixels (width x height), its file {root}/train/t2.png 30 x 20' in str(e.value)
    with pytest.raises(DataError, match='image 12 is 64 x 64'):
        data.train[2]
    with pytest.raises(DataError, match='t3.png: the image cannot be read'):
        data.train[3]


@pytest.mark.parametrize('split, where', [('train', 't2.png'), ('val', 'v1.png')])
def test_cut_image(split, where, tmp_path):
    """A header that is whole says nothing of the pixels: images to validate are read, those to train if asked for."""
    path = write_folder(tmp_path) / split / where
    path.write_bytes(path.read_bytes()[:-path.stat().st_size // 2])
    data = open_data('folder', tmp_path)
    if split == 'train':
        data.check()
    with pytest.raises(DataError, match=f'{where}: the image cannot be read'):
        data.check(whole=SPLITS if split == 'train' else ('val', 'test'))


def test_other_categories(tmp_path):
    root = write_folder(tmp_path)
    made, pictures = content('val')
    made['categories'][0]['name'] = 'tall'
    write(root, 'val', made, pictures)
    with pytest.raises(DataError, match='val/annotations.json has other categories than .*train/annotations.json'):
        open_data('folder', root).check()


@pytest.mark.parametrize('args, message', [
    (('other',), "no data set 'other'; there are trees, coco, folder"),
    (('coco',), '--data coco needs --root'),
    (('coco', '/none'), '/none: no such folder'),
    (('folder', '/tmp'), '/tmp/train/annotations.json: no such file'),
])
def test_open_errors(args, message):
    with pytest.raises(DataError, match=message):
        open_data(*args)


def test_broken_json(tmp_path):
    root = write_folder(tmp_path)
    (root / 'val' / 'annotations.json').write_text('{"images": [')
    with pytest.raises(DataError, match='val/annotations.json: cannot be read as JSON'):
        open_data('folder', root)


def test_masks(tmp_path):
    """Polygons, and run lengths of both kinds, as masks; without them a detector of masks is refused."""
    mask = pytest.importorskip('pycocotools.mask')
    made, pictures = content('train')
    box = made['annotations'][3]['bbox']
    full = np.zeros((64, 48), np.uint8)
    full[box[1]:box[1] + box[3], box[0]:box[0] + box[2]] = 1
    coded = mask.encode(np.asfortranarray(full))
    lengths = np.diff(np.flatnonzero(np.diff(full.ravel('F'), prepend=1 - full[0, 0], append=2))).tolist()
    shapes = (made['annotations'][3]['segmentation'], {**coded, 'counts': coded['counts'].decode()},
              {'size': [64, 48], 'counts': lengths})
    for shape in shapes:
        change(segmentation=shape)(made)
        write(tmp_path, 'train', made, pictures)
        split = CocoImages(tmp_path / 'train' / 'annotations.json', tmp_path / 'train')
        split.need_masks()
        assert np.array_equal(split[1][1]['masks'][1], full)
    del made['annotations'][3]['segmentation']
    write(tmp_path, 'train', made, pictures)
    split = CocoImages(tmp_path / 'train' / 'annotations.json', tmp_path / 'train')
    with pytest.raises(DataError, match=re.escape('annotation 4 of image 11 (t1.png) has no segmentation')):
        split.need_masks()
