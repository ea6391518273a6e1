"""The usual augmentation of semantic segmentation; all of its randomness comes from a generator that is handed in."""
from collections.abc import Sequence

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from scripts.segmentation.pairs import IGNORE

CROP_TRIES = 10
# Each with probability 1/2, as for SSD (Liu et al. 2016) and in mmsegmentation. Its hue shift is up to 18 steps of
# OpenCV's 8-bit hue, of which 180 make a circle.
BRIGHTNESS = 32 / 255
CONTRAST = 0.5, 1.5
SATURATION = 0.5, 1.5
HUE = 18 / 180


def fitted_size(size: Sequence[int], fit: tuple[int, int] | None, factor: float = 1.0) -> list[int]:
    """Height and width after resizing to `factor` times the size, or times the largest that fits.

    Args:
        size: Height and width of the image.
        fit: Long and short side of a box, whichever way round, that the image is fitted into; None for its own size.
        factor: Of both sides.
    """
    if fit is not None:
        factor *= min(max(fit) / max(size), min(fit) / min(size))
    return [max(1, int(side * factor + 0.5)) for side in size]


def _as_tensors(image: np.ndarray, mask: np.ndarray) -> tuple[Tensor, Tensor]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f'an image of shape (H, W, 3) in uint8 is wanted, not {image.shape} in {image.dtype}')
    if mask.shape != image.shape[:2]:
        raise ValueError(f'the mask of an image of shape {image.shape} has shape {mask.shape}')
    return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask).long()


def _resize(image: Tensor, size: list[int]) -> Tensor:
    # Without antialiasing, as OpenCV's INTER_LINEAR, with which the published figures were made.
    return F.resize(image, size, InterpolationMode.BILINEAR, antialias=False)


def _normalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(mean), list(std))


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiplies the saturation in HSV space, up to 1, at constant hue and value.

    torchvision's function of that name blends with the grey image, which changes the value.

    Args:
        image: (3, H, W) float in [0, 1].
        factor: Not negative.
    """
    value, low = image.amax(0), image.amin(0)
    saturation = (value - low) / value.clamp(min=1e-12)
    return value - (value - image) * (1 / saturation.clamp(min=1e-12)).clamp(max=factor)


def photometric_distortion(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each changed in every other image; contrast first or last of the rest.

    Args:
        image: (3, H, W) float in [0, 1].
        rng: Source of the randomness.
    """
    def chance() -> bool:
        return bool(rng.random() < 0.5)

    if chance():
        image = (image + rng.uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 1)
    # torchvision's brightness is a factor, which is what contrast is here.
    contrast = rng.uniform(*CONTRAST) if chance() else None
    contrast_first = chance()
    if contrast is not None and contrast_first:
        image = F.adjust_brightness(image, contrast)
    if chance():
        image = adjust_saturation(image, rng.uniform(*SATURATION))
    if chance():
        image = F.adjust_hue(image, rng.uniform(-HUE, HUE))
    if contrast is not None and not contrast_first:
        image = F.adjust_brightness(image, contrast)
    return image


class TrainTransform:
    """Random resize, crop, flip and photometric distortion, then normalisation and padding to the crop's size.

    Args:
        crop: Height and width of the output, in pixels.
        classes: Number of classes.
        scale: Least and greatest factor of the random resize.
        cat_max_ratio: A crop is drawn anew, up to `CROP_TRIES` times in all, while one class has this share of its
            labelled pixels or more; 1 takes the first.
        flip: Probability of a horizontal flip.
        photometric: Whether colours are distorted.
        mean: Of the red, green and blue channel, for images in [0, 1].
        std: Likewise.
        fit: Long and short side of the box that an image fits into at scale 1 (`SegmentationData.fit`); None for its
            own size.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
            self,
            crop: int,
            classes: int,
            scale: tuple[float, float] = (0.5, 2.0),
            cat_max_ratio: float = 0.75,
            flip: float = 0.5,
            photometric: bool = True,
            mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
            std: Sequence[float] = IMAGENET_DEFAULT_STD,
            fit: tuple[int, int] | None = None,
    ) -> None:
        if crop < 1:
            raise ValueError(f'crop is at least 1, not {crop}')
        if not 1 <= classes <= IGNORE:
            raise ValueError(f'classes is 1 to {IGNORE}, not {classes}')
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f'scale is the least and the greatest factor, above 0, not {scale}')
        if not 0 < cat_max_ratio <= 1:
            raise ValueError(f'cat_max_ratio is in (0, 1], not {cat_max_ratio}')
        if not 0 <= flip <= 1:
            raise ValueError(f'flip is a probability, not {flip}')
        self.crop, self.classes, self.scale, self.cat_max_ratio = crop, classes, scale, cat_max_ratio
        self.flip, self.photometric, self.mean, self.std, self.fit = flip, photometric, mean, std, fit

    def _is_varied(self, labels: Tensor) -> bool:
        """Whether no class has too large a share of a crop (h, w)."""
        counts = torch.bincount(labels[labels != IGNORE], minlength=self.classes)
        if len(counts) > self.classes:
            raise ValueError(f'label {len(counts) - 1} in a mask of {self.classes} classes')
        return bool(counts.max() < self.cat_max_ratio * counts.sum())

    def _crop(self, image: Tensor, mask: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        for _ in range(CROP_TRIES):
            y, x = (int(rng.integers(max(side - self.crop, 0) + 1)) for side in mask.shape)
            window = slice(y, y + self.crop), slice(x, x + self.crop)
            if self._is_varied(mask[window]) or self.cat_max_ratio == 1:
                break
        return image[(slice(None), *window)], mask[window]

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Transforms a pair.

        Args:
            image: (H, W, 3) uint8.
            mask: (H, W) labels in any integer dtype that torch has, `IGNORE` where there is none.
            rng: Source of all randomness: the same state gives the same output.

        Returns:
            Image (3, crop, crop) in float32, 0 where padded, and labels (crop, crop) in int64, `IGNORE` where padded.

        Raises:
            ValueError: If shapes or dtypes are not these, or a label is not below `classes`.
        """
        x, y = _as_tensors(image, mask)
        size = fitted_size(mask.shape, self.fit, rng.uniform(*self.scale))
        # NEAREST_EXACT samples at pixel centres as BILINEAR does; NEAREST would shift the labels by half a pixel.
        x, y = _resize(x, size), F.resize(y[None], size, InterpolationMode.NEAREST_EXACT)[0]
        x, y = self._crop(x, y, rng)
        if rng.random() < self.flip:
            x, y = F.horizontal_flip(x), F.horizontal_flip(y)
        x = F.to_dtype(x, torch.float32, scale=True)
        if self.photometric:
            x = photometric_distortion(x, rng)
        padding = [0, 0, self.crop - x.shape[2], self.crop - x.shape[1]]
        x = F.pad(_normalize(x, self.mean, self.std), padding)
        return x, F.pad(y[None], padding, fill=IGNORE)[0]


class EvalTransform:
    """Normalises the whole image.

    Args:
        mean: Of the red, green and blue channel, for images in [0, 1].
        std: Likewise.
        fit: Long and short side of the box that the image, not the mask, is fitted into; None for its own size.
    """

    def __init__(
            self,
            mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
            std: Sequence[float] = IMAGENET_DEFAULT_STD,
            fit: tuple[int, int] | None = None,
    ) -> None:
        self.mean, self.std, self.fit = mean, std, fit

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns the image (3, h, w) in float32, of the mask's size unless `fit`, and labels (H, W) in int64.

        Args:
            image: (H, W, 3) uint8.
            mask: (H, W) labels, `IGNORE` where there is none.
        """
        x, y = _as_tensors(image, mask)
        if self.fit is not None:
            x = _resize(x, fitted_size(mask.shape, self.fit))
        return _normalize(x, self.mean, self.std), y
