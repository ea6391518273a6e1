"""Data sets for segmentation in the folder layouts in which they are published, and one of your own."""
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.segmentation.pairs import IGNORE, Pair, Pairs, SegmentationData, Stored, match, stored_as
from scripts.training.images import IMAGE_SUFFIXES, DataError, colours, colours_beside, files_in

# The 19 evaluated classes of Cityscapes in the order of their train ids: number in *_labelIds.png, name, colour.
CITYSCAPES = (
    (7, 'road', 0x804080),
    (8, 'sidewalk', 0xF423E8),
    (11, 'building', 0x464646),
    (12, 'wall', 0x66669C),
    (13, 'fence', 0xBE9999),
    (17, 'pole', 0x999999),
    (19, 'traffic light', 0xFAAA1E),
    (20, 'traffic sign', 0xDCDC00),
    (21, 'vegetation', 0x6B8E23),
    (22, 'terrain', 0x98FB98),
    (23, 'sky', 0x4682B4),
    (24, 'person', 0xDC143C),
    (25, 'rider', 0xFF0000),
    (26, 'car', 0x00008E),
    (27, 'truck', 0x000046),
    (28, 'bus', 0x003C64),
    (31, 'train', 0x005064),
    (32, 'motorcycle', 0x0000E6),
    (33, 'bicycle', 0x770B20),
)
ADE20K_CLASSES = 150
# Long and short side that images are fitted into first, in the usual recipe.
FITS = {'ade20k': (2048, 512), 'cityscapes': (2048, 1024)}


def _rgb(colour: int) -> tuple[int, int, int]:
    return colour >> 16, colour >> 8 & 255, colour & 255


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding='utf-8-sig').rstrip().splitlines()
    except FileNotFoundError:
        raise DataError(f'{path}: no such file') from None
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f'{path}: cannot be read ({e})') from e


def ade20k(root: Path) -> SegmentationData:
    """ADE20K as in the scene parsing challenge (ADEChallengeData2016).

    ``images/{training,validation}/*.jpg`` and ``annotations/{training,validation}/*.png``; a mask's 0 is ignored, its
    1 to 150 are labels 0 to 149. Names come from ``objectInfo150.txt`` where it is there, else they are these numbers.
    """
    info = root / 'objectInfo150.txt'
    names = tuple(str(i) for i in range(1, ADE20K_CLASSES + 1))
    if info.is_file():
        rows = [line.split('\t') for line in _lines(info)[1:]]  # below a line of headings
        if [row[0].strip() for row in rows] != list(names):
            raise DataError(f'{info}: wanted a line of headings and {ADE20K_CLASSES} lines that start with 1, 2, ...')
        names = tuple(row[-1].strip() for row in rows)
    stored = stored_as(
        {0: IGNORE, **{i + 1: i for i in range(ADE20K_CLASSES)}}, f'0 (ignored) and 1 to {ADE20K_CLASSES}')

    def split(part: str) -> Pairs:
        folders = root / 'images' / part, root / 'annotations' / part
        images, masks = files_in(folders[0], ('.jpg',)), files_in(folders[1], ('.png',))
        return Pairs(Pair(name, images[name], masks[name], stored) for name in match(images, masks, *folders))

    val = split('validation')
    return SegmentationData(
        'ade20k', names, colours(ADE20K_CLASSES), split('training'), val, val, FITS['ade20k'])


def cityscapes(root: Path) -> SegmentationData:
    """Cityscapes with fine annotations.

    ``leftImg8bit/{train,val}/CITY/*_leftImg8bit.png`` and ``gtFine/{train,val}/CITY/*_gtFine_labelIds.png``, or
    ``*_gtFine_labelTrainIds.png``, which is taken where both are there. The published test masks are empty.
    """
    ids = dict.fromkeys(range(34), IGNORE)
    ids.update({number: label for label, (number, *_) in enumerate(CITYSCAPES)})
    by_suffix = {
        'labelIds': stored_as(ids, '0 to 33'),
        'labelTrainIds': stored_as(
            {**{i: i for i in range(len(CITYSCAPES))}, IGNORE: IGNORE}, f'0 to 18 and {IGNORE} (ignored)')}

    def split(part: str) -> Pairs:
        folders = root / 'leftImg8bit' / part, root / 'gtFine' / part
        images, masks, stored = {}, {}, {}
        for name, path in files_in(folders[0], ('.png',)).items():
            if not name.endswith('_leftImg8bit'):
                raise DataError(f'{path}: unexpected file; wanted are *_leftImg8bit.png')
            images[name.removesuffix('_leftImg8bit')] = path
        for name, path in files_in(folders[1], ('.png', '.json')).items():
            found = re.fullmatch(r'(.+)_gtFine_(labelIds|labelTrainIds)', name)
            if found and (found[1] not in masks or found[2] == 'labelTrainIds'):
                masks[found[1]], stored[found[1]] = path, by_suffix[found[2]]
        return Pairs(Pair(name, images[name], masks[name], stored[name]) for name in match(images, masks, *folders))

    val = split('val')
    classes = tuple(name for _, name, _ in CITYSCAPES)
    palette = np.array([_rgb(colour) for *_, colour in CITYSCAPES], dtype=np.uint8)
    return SegmentationData('cityscapes', classes, palette, split('train'), val, val, FITS['cityscapes'])


def _classes_txt(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    lines = _lines(path)
    names: list[str] = []
    given = {}
    for i, line in enumerate(lines):
        found = re.fullmatch(r'\s*([^\t]*[^\t ])\s*(?:\t\s*#([0-9a-fA-F]{6})\s*)?', line)
        if not found:
            raise DataError(f'{path}, line {i + 1}: {line!r}; wanted is a class name, or a name, a tab and #rrggbb')
        if found[1] in names:
            raise DataError(f'{path}, line {i + 1}: {found[1]!r} is there twice')
        names.append(found[1])
        if found[2]:
            given[i] = _rgb(int(found[2], 16))
    if not 2 <= len(names) <= IGNORE:
        hint = '; the background is a class too' if len(names) == 1 else ''
        raise DataError(f'{path}: {len(names)} classes; wanted are 2 to {IGNORE}, one per line{hint}')
    return tuple(names), colours_beside(len(names), given)


def _folder_values(classes: int, mask_values: Sequence[int] | None, ignore_values: Sequence[int] | None) -> Stored:
    """What the numbers in the masks of `folder` mean."""
    numbers = range(classes) if mask_values is None else mask_values
    ignored = ignore_values if ignore_values is not None else [n for n in (IGNORE,) if n not in numbers]
    if len(numbers) != classes:
        raise DataError(f'--mask-values has {len(numbers)} values for the {classes} classes of classes.txt')
    everything = [*numbers, *ignored]
    twice = sorted({n for n in everything if everything.count(n) > 1})
    if twice:
        raise DataError(f'--mask-values and --ignore-values name {", ".join(map(str, twice))} twice')
    if not 0 <= min(everything) <= max(everything) < 2 ** 16:
        raise DataError(f'--mask-values and --ignore-values are from 0 to 65535, got {min(everything)} to '
                        f'{max(everything)}')
    if mask_values is None:
        allowed = f'0 to {classes - 1} (classes.txt)'
    else:
        allowed = f'{", ".join(map(str, mask_values))} (--mask-values)'
    if ignored:
        allowed += f' and {", ".join(map(str, ignored))} (ignored)'
    return stored_as({**{n: i for i, n in enumerate(numbers)}, **dict.fromkeys(ignored, IGNORE)}, allowed)


def folder(
        root: Path,
        mask_values: Sequence[int] | None = None,
        ignore_values: Sequence[int] | None = None,
) -> SegmentationData:
    """A folder of your own, in this layout:

        classes.txt               the names of classes 0, 1, ..., one per line; after a tab, a colour as #rrggbb
        train/images/NAME.jpg     JPEG, PNG, BMP, TIFF or WebP of 8 bits per channel; folders may lie inside
        train/masks/NAME.png      one channel of class numbers from 0, and 255 for pixels to ignore
        val/images/  val/masks/   for validation
        test/images/ test/masks/  for the test; without them the test is on val

    Args:
        root: The folder.
        mask_values: The number in the masks that stands for each class; None for 0, 1, ...
        ignore_values: The numbers for pixels to ignore; None for 255, unless it stands for a class.
    """
    names, palette = _classes_txt(root / 'classes.txt')
    stored = _folder_values(len(names), mask_values, ignore_values)

    def split(part: str) -> Pairs:
        folders = root / part / 'images', root / part / 'masks'
        images, masks = files_in(folders[0], IMAGE_SUFFIXES), files_in(folders[1], ('.png',))
        return Pairs(Pair(name, images[name], masks[name], stored) for name in match(images, masks, *folders))

    train, val = split('train'), split('val')
    return SegmentationData(
        'folder', names, palette, train, val, split('test') if (root / 'test').exists() else val)
