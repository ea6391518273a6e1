"""Photographs of every mode as RGB: scaled by the range of the mode, or refused by name."""
import os
from typing import Union

import numpy as np
from PIL import Image, ImageOps

__all__ = ['check_frames', 'read_image', 'to_rgb']

# Pillow scales these itself.
_EIGHT_BITS = ('1', 'L', 'P', 'RGB', 'RGBX', 'CMYK', 'YCbCr', 'HSV')
_ALPHA = ('LA', 'La', 'PA', 'RGBA', 'RGBa')

# Formats whose files of 16 bits per pixel Pillow opens in mode I.
_SIXTEEN_BITS_AS_I = ('PNG', 'PPM')

# Formats in which the first frame is the whole picture: the others are previews or layers.
_FIRST_IS_WHOLE = ('MPO', 'PSD')


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in mode RGB.

    Numbers are scaled by the range of their mode: 16 bits from 0..65535, floats from 0..1. Transparent pixels are laid
    over white, as viewers show them.

    Raises:
        ValueError: Floats lie outside of 0..1, or the mode has no known range.
    """
    mode = image.mode
    if mode in _ALPHA or (mode in _EIGHT_BITS and 'transparency' in image.info):
        # Pillow converts La to LA only
        image = image.convert('LA').convert('RGBA') if mode == 'La' else image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    if mode in _EIGHT_BITS:
        return image.convert('RGB')
    if mode.startswith('I;16') or (mode == 'I' and image.format in _SIXTEEN_BITS_AS_I):
        values = np.asarray(image) / 65535
    elif mode == 'F':
        values = np.asarray(image)
    else:
        raise ValueError(f'Pillow mode {mode} has no known range; wanted are 8 or 16 bits per channel, or floats')
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f'its floats go from {values.min():g} to {values.max():g}; wanted are 0 to 1')
    return Image.fromarray(np.round(values * 255).astype(np.uint8)).convert('RGB')


def check_frames(image: Image.Image) -> None:
    """Raise ValueError if an opened file has several frames: an animation, or pages."""
    frames = getattr(image, 'n_frames', 1)
    if frames > 1 and image.format not in _FIRST_IS_WHOLE:
        raise ValueError(f'it has {frames} frames; wanted is one image')


def read_image(path: Union[str, os.PathLike]) -> Image.Image:
    """The photograph in a file, in mode RGB, upright as its EXIF data say. See :func:`to_rgb`.

    Raises:
        OSError: There is no such file, or it is no image that Pillow reads.
        ValueError: The file has several frames, or values without a known range.
        PIL.Image.DecompressionBombError: The image is too large for Pillow's limit.
    """
    with Image.open(path) as image:
        check_frames(image)
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format
        return to_rgb(upright)
