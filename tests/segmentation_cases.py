"""Images and masks that the tests of the segmentation scripts share."""
import numpy as np


def picture_of(seed, height=6, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_of(values, height=6, width=8):
    return np.resize(np.asarray(values, dtype=np.uint8), (height, width))
