"""Pairs of an image and a mask in files: what a data set is, and everything that can be wrong with one of its files."""
import colorsys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from fadc_timm.visualize.images import check_frames

IGNORE = 255  # label of pixels that neither train nor count
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')

Sample = tuple[np.ndarray, np.ndarray]


class DataError(ValueError):
    """A data set is not in its layout, or one of its files is not what it should be; the message names the file."""


class Split(Protocol):
    """Part of a data set: pairs of an image (H, W, 3) uint8 and a mask (H, W) uint8 of labels and `IGNORE`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def name(self, index: int) -> str:
        """Name of a pair, unique in its split; it may hold slashes."""


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


def colours(count: int) -> np.ndarray:
    """A palette (count, 3) uint8: hues a golden section apart, so that neighbours differ, at varying brightness."""
    rgb = [colorsys.hsv_to_rgb(0.618034 * i % 1, (0.85, 0.55)[i // 2 % 2], (0.95, 0.7)[i % 2]) for i in range(count)]
    return np.round(255 * np.array(rgb)).astype(np.uint8).reshape(count, 3)


class Stored(NamedTuple):
    """What the numbers in a mask's file mean."""

    table: np.ndarray  # (256,) int16: label of each stored number, -1 where it is not allowed
    allowed: str


def stored_as(labels: Mapping[int, int], allowed: str) -> Stored:
    """Numbers in a file as keys, their labels as values; `allowed` describes the keys in an error."""
    table = np.full(256, -1, dtype=np.int16)
    for number, label in labels.items():
        table[number] = label
    return Stored(table, allowed)


class Pair(NamedTuple):
    name: str
    image: Path
    mask: Path
    stored: Stored


def _open(path: Path, what: str, modes: Iterable[str], wanted: str) -> Image.Image:
    try:
        image = Image.open(path)
        check_frames(image)
        image.load()
    except FileNotFoundError:
        raise DataError(f'{path}: the {what} is no longer there') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(f'{path}: the {what} cannot be read ({e})') from e
    if image.mode not in modes:
        raise DataError(f'{path}: the {what} has Pillow mode {image.mode}; wanted is {wanted}')
    return image


def read_image(path: Path) -> np.ndarray:
    """Reads an image of 8 bits a channel as (H, W, 3) uint8; a rotation in its EXIF data is not applied."""
    modes = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr')
    return np.array(_open(path, 'image', modes, 'an image of 8 bits a channel').convert('RGB'))


def read_mask(path: Path, stored: Stored, size: tuple[int, int]) -> np.ndarray:
    """Reads a mask as (H, W) uint8 labels.

    Args:
        path: The file.
        stored: What its numbers mean.
        size: Height and width of its image.

    Raises:
        DataError: If it cannot be read, has colours instead of numbers, another size, or a number that means nothing.
    """
    wanted = 'one channel of class numbers (L, P, I;16), not colours'
    numbers = np.array(_open(path, 'mask', ('1', 'L', 'P', 'I', 'I;16', 'I;16B'), wanted)).astype(np.int32)
    if numbers.shape != size:
        raise DataError(
            f'{path}: the mask is {numbers.shape[1]} x {numbers.shape[0]} pixels (width x height), '
            f'its image {size[1]} x {size[0]}')
    in_table = (numbers >= 0) & (numbers < len(stored.table))
    labels = np.where(in_table, stored.table[numbers.clip(0, len(stored.table) - 1)], -1)
    if labels.min(initial=0) < 0:
        wrong = labels < 0
        y, x = np.argwhere(wrong)[0]
        others = np.setdiff1d(numbers[wrong], numbers[y, x])
        also = f', and also {", ".join(map(str, others[:5]))}{", ..." * (len(others) > 5)}' if len(others) else ''
        raise DataError(
            f'{path}: wrong label {numbers[y, x]} at row {y}, column {x} ({wrong.sum()} wrong pixels{also}); '
            f'allowed are {stored.allowed}')
    return labels.astype(np.uint8)


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


def files_in(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """All files below a folder by their path in it, without suffix; hidden ones are left out.

    Raises:
        DataError: If the folder is missing, or holds a file of another kind or two that differ in their suffix only.
    """
    if not folder.is_dir():
        raise DataError(f'{folder}: no such folder')
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob('*')):
        inside = path.relative_to(folder)
        if any(part.startswith('.') for part in inside.parts) or path.is_dir():
            continue
        if path.suffix.lower() not in suffixes:
            raise DataError(f'{path}: unexpected file; {folder} is for {", ".join(suffixes)}')
        name = inside.with_suffix('').as_posix()
        if name in found:
            raise DataError(f'{path}: {found[name].name} has the same name')
        found[name] = path
    return found


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
