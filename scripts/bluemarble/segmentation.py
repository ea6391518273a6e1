"""Seven classes on the Blue Marble: sea, the five main Koeppen climates, lakes.

96 tiles of 256 px, those with the most land, cut from a grid of which each 512 px block holds four. Whole blocks belong
to one split, so no pixel is in two, and what training does to a tile stays in it. Test blocks are those that
`globe.split_tiles` holds out of the training of the package's own weights: those have not seen them either.
Validation blocks are drawn from the rest in the same way; those weights have seen them, as they have the training
blocks. Blocks of different splits do share borders, and climates reach over them: scores are for unseen regions among
seen ones.
"""
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from fadc_timm._writing import write_atomically
from scripts.bluemarble.globe import (
    BLOCK,
    CACHE_DIR,
    CELL,
    CLASS_NAMES,
    HEIGHT,
    SOURCES,
    SPLIT_SEED,
    WIDTH,
    choose_blocks,
    climate_classes,
    load_rasters,
    split_tiles,
)
from scripts.segmentation.pairs import IGNORE, Inspected, Sample, SegmentationData, count
from scripts.training.images import SPLITS, DataError

CLASSES = (*CLASS_NAMES, 'lake')
PALETTE = np.array(
    [[32, 64, 160], [0, 128, 60], [228, 160, 40], [160, 212, 70], [132, 84, 172], [236, 236, 244], [0, 220, 232]],
    dtype=np.uint8)
TILE = 256  # px
BLOCK_TILES = BLOCK * CELL // TILE  # tiles along a side of a block
TILES = 96
ROWS = 9  # of tiles, from 90 N to 64 S; further south the zones call white ice shelves sea
VAL_SHARE = 0.15  # of the blocks that are not held out, and about that of their pixels of every class but sea
VERSION = 1  # of what the code below makes of the sources


@dataclass(frozen=True)
class World:
    """The tiles and where they lie."""

    images: np.ndarray  # (N, 256, 256, 3) uint8
    masks: np.ndarray  # (N, 256, 256) uint8
    places: np.ndarray  # (N, 2) row and column on the grid of tiles
    splits: np.ndarray  # (N,) index into SPLITS


class Tiles(Dataset[Sample]):
    """The tiles of one split, named after the latitude and longitude of their centre."""

    def __init__(self, world: World, split: str) -> None:
        chosen = world.splits == SPLITS.index(split)
        self.images, self.masks = world.images[chosen], world.masks[chosen]
        centres = (world.places[chosen] + 0.5) * TILE
        latitudes, longitudes = 90 - 180 * centres[:, 0] / HEIGHT, 360 * centres[:, 1] / WIDTH - 180
        self.names = [
            f'{abs(y):02.0f}{"NS"[int(y < 0)]}_{abs(x):03.0f}{"EW"[int(x < 0)]}' for y, x in zip(latitudes, longitudes)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index].copy(), self.masks[index].copy()

    def name(self, index: int) -> str:
        return self.names[index]

    def inspect(self, index: int) -> Inspected:
        labels = count(self.masks[index])
        return Inspected('', (TILE, TILE), labels, labels)

    def stamp(self) -> str:
        return ''


def labels_of(zones: np.ndarray, water: np.ndarray) -> np.ndarray:
    """Labels (H, W) uint8 of zones and water as `load_rasters` gives them.

    GSHHG says what is sea, lake and land, as its coasts are finer; land that the coarser zones call sea has no climate
    and is ignored.
    """
    climates = climate_classes(zones)
    labels = np.where(climates == 0, IGNORE, climates)
    labels[water == 0] = 0
    labels[water == 2] = CLASSES.index('lake')
    return labels.astype(np.uint8)


def _tiled(raster: np.ndarray, rows: int) -> np.ndarray:
    """(H, W, ...) -> (rows, columns, 256, 256, ...), as many columns as are whole."""
    columns = raster.shape[1] // TILE
    part = raster[: rows * TILE, : columns * TILE]
    return part.reshape(rows, TILE, columns, TILE, *raster.shape[2:]).swapaxes(1, 2)


def cut(rgb: np.ndarray, labels: np.ndarray, held: np.ndarray) -> World:
    """Cuts the tiles and assigns their blocks to the splits.

    Args:
        rgb: (H, W, 3) uint8.
        labels: (H, W) uint8 from `labels_of`.
        held: (H, W) bool, the test blocks.
    """
    tiles = _tiled(labels, min(ROWS, len(labels) // TILE))
    rows, columns = tiles.shape[:2]
    land = (tiles != 0).sum((2, 3))
    order = np.argsort(-land, axis=None, kind='stable')[:TILES]
    y, x = np.divmod(np.sort(order[land.flat[order] > 0]), columns)
    masks = tiles[y, x]

    counts = np.stack([(masks == label).sum((1, 2)) for label in range(len(CLASSES))], 1)
    block = y // BLOCK_TILES * -(-columns // BLOCK_TILES) + x // BLOCK_TILES
    test = held[y * TILE, x * TILE]
    by_block = np.zeros((int(block.max()) + 1, len(CLASSES)))
    np.add.at(by_block, block[~test], counts[~test])
    val = np.isin(block, choose_blocks(by_block, VAL_SHARE))
    splits = np.select([test, val], [SPLITS.index('test'), SPLITS.index('val')], SPLITS.index('train'))
    return World(_tiled(rgb, rows)[y, x], masks, np.stack([y, x], 1), splits)


def class_shares(world: World) -> np.ndarray:
    """Shares (splits, classes + 1) of the pixels of each split; the last column is what is ignored."""
    numbers = (*range(len(CLASSES)), IGNORE)
    of_tiles = np.stack([(world.masks == number).mean((1, 2)) for number in numbers], 1)
    return np.stack([of_tiles[world.splits == i].mean(0) for i in range(len(SPLITS))])


def _cache_path(folder: Path) -> Path:
    """A name that changes with everything that the tiles depend on."""
    settings = ({name: tuple(source) for name, source in SOURCES.items()}, CLASSES, TILE, BLOCK, CELL, TILES, ROWS,
                VAL_SHARE, SPLIT_SEED, VERSION)
    return folder / f'bluemarble_segmentation-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}.npz'


def load_world(cache_dir: str | Path | None = None) -> World:
    """Loads the tiles from the cache folder, where they are cut from the rasters the first time.

    Args:
        cache_dir: Cache folder, None for ~/.cache/fadc_timm.

    Raises:
        DataError: If the cached file is broken.
        RuntimeError: If the sources cannot be downloaded.
    """
    folder = Path(cache_dir or CACHE_DIR).expanduser()
    path = _cache_path(folder)
    if not path.is_file():
        rgb, zones, water = load_rasters(folder)
        world = cut(rgb, labels_of(zones, water), split_tiles(zones)[2])

        def write(part: Path) -> None:
            with part.open('wb') as file:
                np.savez(file, **vars(world))

        write_atomically(path, write)
    try:
        with np.load(path) as arrays:
            return World(**arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f'{path}: cannot be read ({e}); delete it and run again') from e


def load(cache_dir: str | Path | None = None) -> SegmentationData:
    """The data set of the tiles; see `load_world`."""
    world = load_world(cache_dir)
    train, val, test = (Tiles(world, split) for split in SPLITS)
    return SegmentationData('bluemarble', CLASSES, PALETTE, train, val, test)
