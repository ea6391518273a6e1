"""Pairs of an image and a mask in files: what a data set is, and everything that can be wrong with one of its files."""
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from scripts.training.images import DataError, is_turned, open_file, open_image, read_image

IGNORE = 255  # label of pixels that neither train nor count

Sample = tuple[np.ndarray, np.ndarray]


class Inspected(NamedTuple):
    """What was found in a pair.

    problem: What is wrong with the pair, naming the file; empty if nothing is. Then the other fields may be empty.
    size: Height and width, in pixels.
    labels: Pixels by label, `IGNORE` among them.
    values: Pixels by the number that the mask's file stores.
    colours: The palette's colour of each number that occurs, for a mask with a palette.
    turned: The image's EXIF data name an orientation, which is not applied.
    digest: Of the image's file, empty where there is none.
    """
    problem: str = ''
    size: tuple[int, int] | None = None
    labels: Mapping[int, int] = {}
    values: Mapping[int, int] = {}
    colours: Mapping[int, tuple[int, ...]] = {}
    turned: bool = False
    digest: bytes = b''


class Split(Protocol):
    """Part of a data set: pairs of an image (H, W, 3) uint8 and a mask (H, W) uint8 of labels and `IGNORE`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def name(self, index: int) -> str:
        """Name of a pair, unique in its split; it may hold slashes."""

    def inspect(self, index: int) -> Inspected:
        """Read a pair as a whole and count its labels. Threads call this at the same time."""

    def stamp(self) -> str:
        """A text that changes when one of the files does, empty where there are no files."""


@dataclass(frozen=True)
class SegmentationData:
    """A data set for semantic segmentation."""

    name: str
    classes: tuple[str, ...]
    palette: np.ndarray  # (classes, 3) uint8
    train: Split
    val: Split
    test: Split  # `val` where nothing else is labelled
    fit: tuple[int, int] | None = None  # long and short side that images are fitted into first, in the usual recipe


class Stored(NamedTuple):
    """What the numbers in a mask's file mean."""

    table: np.ndarray  # (at least 256,) int16: label of each stored number, -1 where it is not allowed
    allowed: str

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """Labels of stored numbers of any integer dtype, -1 for those that are not allowed."""
        numbers = np.asarray(numbers, np.int32)
        in_table = (numbers >= 0) & (numbers < len(self.table))
        return np.where(in_table, self.table[numbers.clip(0, len(self.table) - 1)], -1)


def stored_as(labels: Mapping[int, int], allowed: str) -> Stored:
    """Numbers in a file as keys, their labels as values; `allowed` describes the keys in an error."""
    table = np.full(max(256, max(labels) + 1), -1, dtype=np.int16)
    for number, label in labels.items():
        table[number] = label
    return Stored(table, allowed)


class Pair(NamedTuple):
    name: str
    image: Path
    mask: Path
    stored: Stored


def _open_mask(path: Path) -> tuple[Image.Image, np.ndarray]:
    """A mask's picture and the numbers (H, W) that its file stores."""
    picture = open_file(
        path, 'mask', ('1', 'L', 'P', 'I', 'I;16', 'I;16B'),
        'one channel of class numbers (L, P, I;16), not colours; of a mask in shades of grey, save one '
        'channel: Image.open(...).getchannel(0)')
    if picture.format != 'PNG':
        raise DataError(f'{path}: the mask is a {picture.format} file, which may change numbers; wanted is a PNG file')
    numbers = np.array(picture)
    if picture.mode == '1':
        numbers = numbers.astype(np.uint8)
    if picture.mode == 'L':
        with path.open('rb') as file:
            depth, colour_type = file.read(26)[24:]
        if colour_type == 0 and depth < 8:
            numbers //= 255 // (2 ** depth - 1)  # Pillow stretches grey levels of 2 and 4 bits to 0 ... 255
    return picture, numbers


def _check_size(path: Path, numbers: np.ndarray, size: tuple[int, int], turned: bool = False) -> None:
    if numbers.shape != size:
        hint = ("; the image's EXIF data name an orientation, which is not applied: save image and mask the same way "
                "up" if turned and numbers.shape == size[::-1] else '')
        raise DataError(
            f'{path}: the mask is {numbers.shape[1]} x {numbers.shape[0]} pixels (width x height), '
            f'its image {size[1]} x {size[0]}{hint}')


def _to_labels(path: Path, numbers: np.ndarray, stored: Stored) -> np.ndarray:
    labels = stored.labels(numbers)
    if labels.min(initial=0) < 0:
        wrong = labels < 0
        y, x = np.argwhere(wrong)[0]
        others = np.setdiff1d(numbers[wrong], numbers[y, x])
        also = f', and also {", ".join(map(str, others[:5]))}{", ..." * (len(others) > 5)}' if len(others) else ''
        raise DataError(
            f'{path}: wrong label {numbers[y, x]} at row {y}, column {x} ({wrong.sum()} wrong pixels{also}); '
            f'allowed are {stored.allowed}')
    return labels.astype(np.uint8)


def read_mask(path: Path, stored: Stored, size: tuple[int, int]) -> np.ndarray:
    """Reads a mask as (H, W) uint8 labels.

    Args:
        path: The file.
        stored: What its numbers mean.
        size: Height and width of its image.

    Raises:
        DataError: If it cannot be read, has colours instead of numbers, another size, or a number that means nothing.
    """
    numbers = _open_mask(path)[1]
    _check_size(path, numbers, size)
    return _to_labels(path, numbers, stored)


def count(numbers: np.ndarray) -> dict[int, int]:
    """How often each number occurs in an array of integers."""
    if numbers.dtype == np.uint8:
        counts = np.bincount(numbers.ravel(), minlength=256)
        return {int(number): int(counts[number]) for number in np.flatnonzero(counts)}
    values, of_values = np.unique(numbers, return_counts=True)
    return dict(zip(values.tolist(), of_values.tolist()))


class Pairs(Dataset[Sample]):
    """A split whose images and masks are files, read and checked one by one."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self.pairs = tuple(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        image = read_image(pair.image)
        return image, read_mask(pair.mask, pair.stored, image.shape[:2])

    def name(self, index: int) -> str:
        return self.pairs[index].name

    def inspect(self, index: int) -> Inspected:
        pair = self.pairs[index]
        values: dict[int, int] = {}
        try:
            image = open_image(pair.image)
            turned, size = is_turned(image), (image.height, image.width)
            picture, numbers = _open_mask(pair.mask)
            values = count(numbers)
            _check_size(pair.mask, numbers, size, turned)
            if min(pair.stored.labels(np.array(list(values)))) < 0:
                _to_labels(pair.mask, numbers, pair.stored)
        except DataError as e:
            return Inspected(str(e), values=values)
        labels: Counter[int] = Counter()
        for value, pixels in values.items():
            labels[int(pair.stored.table[value])] += pixels
        colours = {}
        if picture.mode == 'P':
            palette = picture.getpalette('RGB') or []
            colours = {value: tuple(palette[3 * value:3 * value + 3]) for value in values}
        try:
            digest = hashlib.sha256(pair.image.read_bytes()).digest()
        except OSError as e:
            return Inspected(f'{pair.image}: the image cannot be read ({e})')
        return Inspected('', size, labels, values, colours, turned, digest)

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for pair in self.pairs:
            states = [path.stat() for path in (pair.image, pair.mask)]
            digest.update(repr((pair.name, *((s.st_size, s.st_mtime_ns) for s in states))).encode())
            digest.update(pair.stored.table.tobytes())
        return digest.hexdigest()


def match(images: Mapping[str, Path], masks: Mapping[str, Path], image_folder: Path, mask_folder: Path) -> list[str]:
    """Names that are in both, in order; anything that is in one only is an error.

    Raises:
        DataError: If there is no image, an image has no mask, or a mask no image; it names the first and their number.
    """
    if not images:
        raise DataError(f'{image_folder}: no images')
    for here, there, what, folder in (
            (images, masks, 'image without a mask', mask_folder),
            (masks, images, 'mask without an image', image_folder),
    ):
        alone = sorted(set(here) - set(there))
        if alone:
            more = f' ({len(alone)} such files)' if len(alone) > 1 else ''
            raise DataError(f'{here[alone[0]]}: {what}: {folder} has no {alone[0]!r}{more}')
    return sorted(images)
