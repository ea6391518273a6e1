"""Images in files, everything that can be wrong with one of them, and colours to draw classes in."""
import colorsys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from fadc_timm.visualize.images import check_frames

SPLITS = ('train', 'val', 'test')  # of a data set

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')

NEAR = 80  # distance of two colours in RGB that are easily taken for each other


class DataError(ValueError):
    """A data set is not in its layout, or one of its files is not what it should be; the message names the file."""


def open_file(path: Path, what: str, modes: Iterable[str], wanted: str) -> Image.Image:
    """Open and load a picture.

    Args:
        path: The file.
        what: What it is, for messages.
        modes: Pillow's modes that are allowed.
        wanted: These modes in words.

    Raises:
        DataError: It cannot be read, or has another mode.
    """
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


def open_image(path: Path) -> Image.Image:
    """Open an image of 8 bits a channel, and no other one."""
    modes = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr')
    return open_file(path, 'image', modes, 'an image of 8 bits a channel')


def read_image(path: Path) -> np.ndarray:
    """Reads an image of 8 bits a channel as (H, W, 3) uint8; a rotation in its EXIF data is not applied."""
    return np.array(open_image(path).convert('RGB'))


def files_in(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """All files below a folder by their path in it, without suffix; hidden ones are left out.

    Raises:
        DataError: If the folder is missing, or holds a file of another kind or two that differ in their suffix only.
    """
    if not folder.is_dir():
        raise DataError(f'{folder}: {"a file; wanted is a folder" if folder.exists() else "no such folder"}')
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


def images_in(folder: Path, written: Iterable[Path]) -> dict[str, Path]:
    """All images below a folder, as :func:`files_in`.

    Args:
        folder: The folder.
        written: Files or folders that will be written.

    Raises:
        DataError: There are none, or what will be written lies among them, or they in it.
    """
    for path in written:
        inner, outer = path.resolve(), folder.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise DataError(f'{path} will be written, and the images are those in {folder}: give another --output')
    found = files_in(folder, IMAGE_SUFFIXES)
    if not found:
        raise DataError(f'{folder}: no images')
    return found


def spread(count: int, total: int) -> set[int]:
    """The places of some images, at most `count`, spread over `total` of them."""
    n = min(count, total)
    return {round(i * (total - 1) / max(n - 1, 1)) for i in range(n)}


def is_turned(image: Image.Image) -> bool:
    """Whether an image's EXIF data name an orientation."""
    try:
        return image.getexif().get(Base.Orientation, 1) != 1
    except Exception:  # EXIF data that Pillow cannot read, of whatever kind, turn nothing
        return False


def colours(count: int) -> np.ndarray:
    """A palette (count, 3) uint8: hues a golden section apart, so that neighbours differ, at varying brightness."""
    rgb = [colorsys.hsv_to_rgb(0.618034 * i % 1, (0.85, 0.55)[i // 2 % 2], (0.95, 0.7)[i % 2]) for i in range(count)]
    return np.round(255 * np.array(rgb)).astype(np.uint8).reshape(count, 3)


def colours_beside(count: int, given: Mapping[int, tuple[int, int, int]]) -> np.ndarray:
    """A palette (count, 3) uint8 in which some colours are given, and the others are not near these if that can be."""
    made = colours(4 * count)
    distances = [np.linalg.norm(made - np.array(colour, dtype=float), axis=1) for colour in given.values()]
    near = np.min([np.full(len(made), np.inf), *distances], axis=0) < NEAR
    spare = iter(made[count:][~near[count:]])
    for i in range(count):
        if i in given:
            made[i] = given[i]
        elif near[i]:
            made[i] = next(spare, made[i])
    return made[:count]
