#!/usr/bin/env python3
"""How good the default's weights are as general features, and the photograph of its card.

    python -m scripts.studies.default_features          # figures
    python -m scripts.studies.default_features --image  # fadc_timm/data/blue_marble.jpg, from a held-out tile

Task: handwritten digits (scikit-learn's, 1797 images of 8 x 8, ten classes), resized to the network's size. A logistic
regression is fitted to the pooled features of the frozen network, five-fold. Rows: the default's weights, the same
network with random weights (three seeds), and the pixels alone. Needs scikit-learn (`[integrations]`).
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import fadc_timm
from fadc_timm._writing import write_atomically
from scripts.bluemarble.globe import CACHE_DIR, CELL, CLASS_NAMES, TILE, crop, load_rasters, split_tiles
from scripts.studies.train_default import SIZE

MODEL = 'test_resnet_fadc'
IMAGE = Path(fadc_timm.__file__).parent / 'data' / 'blue_marble.jpg'


def write_image(data: Path) -> None:
    """Write the typical one of the held-out tropical tiles: its mean colour is nearest to that of all of them."""
    rgb, zones, _ = load_rasters(data)
    _, tiles, _ = split_tiles(zones)
    image = Image.fromarray(rgb)
    pictures = [crop(image, centre, TILE * CELL, SIZE)
                for centre in tiles.centres[tiles.labels == CLASS_NAMES.index('tropical')]]
    colours = np.stack([np.asarray(picture).mean(axis=(0, 1)) for picture in pictures])
    chosen = pictures[np.square(colours - colours.mean(0)).sum(1).argmin()]
    write_atomically(IMAGE, partial(chosen.save, format='JPEG', quality=92))
    print(f'{IMAGE}: {IMAGE.stat().st_size} bytes')


@torch.inference_mode()
def pooled_features(x: torch.Tensor, seed: int | None) -> np.ndarray:
    """The pooled features of the frozen network, (N, channels).

    Args:
        x: (N, 3, H, W), normalised.
        seed: Seed of random weights; None for the default's weights.
    """
    torch.manual_seed(seed or 0)
    model = timm.create_model(MODEL, pretrained=seed is None, num_classes=0).eval()
    return torch.cat([model(part) for part in x.split(64)]).numpy()


def accuracy(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Accuracy of a logistic regression in each of five folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return cross_val_score(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), features, labels, cv=5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=CACHE_DIR, help='cache folder of the rasters')
    parser.add_argument('--image', action='store_true', help='write the photograph instead')
    args = parser.parse_args()
    if args.image:
        write_image(args.data)
        return 0

    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = torch.from_numpy(digits.images).float().div(16).unsqueeze(1).expand(-1, 3, -1, -1)
    x = F.interpolate(gray, (SIZE, SIZE), mode='bicubic').clamp(0, 1).sub(0.5).div(0.5)
    rows = [('default weights', pooled_features(x, None))]
    rows += [(f'random weights, seed {seed}', pooled_features(x, seed)) for seed in range(3)]
    rows += [('pixels', digits.data)]
    for name, features in rows:
        folds = accuracy(features, digits.target)
        print(f'{name}: {features.shape[1]} features, accuracy {folds.mean():.3f} (folds {folds.min():.3f} to '
              f'{folds.max():.3f})', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
