"""A small data set in COCO's format, for the tests of the detection scripts."""
import json

import numpy as np

from tests.support.segmentation_cases import put

SIZES = ((64, 48), (48, 64), (64, 64), (64, 48))  # width, height


def content(split, sizes=SIZES, masks=True):
    """COCO's dictionary of a split, and its images: dark noise with a bright square and a bright wide rectangle."""
    rng = np.random.default_rng(len(split))
    made = {'categories': [{'id': 7, 'name': 'wide'}, {'id': 3, 'name': 'square'}], 'images': [], 'annotations': []}
    pictures = {}
    for i, (width, height) in enumerate(sizes):
        picture = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        name = f'{split[0]}{i}.png'
        made['images'].append({'id': 10 + i, 'file_name': name, 'width': width, 'height': height})
        for category, w, h in ((3, 20, 20), (7, 28, 12)):
            left, top = int(rng.integers(0, width // 2 - 20 + 1) + (category == 7) * 4), 4 if category == 3 else 30
            picture[top:top + h, left:left + w, category % 3] = 240
            made['annotations'].append({
                'id': len(made['annotations']) + 1, 'image_id': 10 + i, 'category_id': category, 'iscrowd': 0,
                'bbox': [left, top, w, h], 'area': w * h, **({'segmentation': [
                    [left, top, left + w, top, left + w, top + h, left, top + h]]} if masks else {})})
        pictures[name] = picture
    return made, pictures


def write(root, split, made, pictures):
    """Write a split in the layout `folder`."""
    for name, picture in pictures.items():
        put(root / split / name, picture)
    (root / split / 'annotations.json').write_text(json.dumps(made))


def write_folder(root, masks=True):
    """Write a data set in the layout `folder`, with four images to train and two to validate."""
    write(root, 'train', *content('train', masks=masks))
    write(root, 'val', *content('val', SIZES[:2], masks))
    return root
