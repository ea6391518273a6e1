"""Predictions for the images in a folder, which need no masks."""
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from fadc_timm._writing import write_atomically
from scripts.segmentation.pairs import IGNORE, Sample
from scripts.segmentation.pictures import write_prediction
from scripts.segmentation.slide import predictions
from scripts.segmentation.transforms import EvalTransform
from scripts.training.images import colours, images_in, open_image, read_image, spread
from scripts.training.world import World

PREDICTIONS, OVERLAYS = 'predictions', 'overlays_predictions'  # folders in that of the output


class Unlabelled(Dataset[Sample]):
    """The images below a folder, with masks in which no pixel is labelled.

    Args:
        folder: Of the images.
        output: Of :func:`predict`.

    Raises:
        DataError: There is no such folder, no image in it, or a file that is none or cannot be read; or what will be
            written lies in it, or it in that.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        self.files = images_in(folder, [output / PREDICTIONS, output / OVERLAYS])
        self.names = tuple(self.files)
        for path in self.files.values():  # for its errors, before any image is predicted
            open_image(path)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.files[self.names[index]])
        return image, np.full(image.shape[:2], IGNORE, np.uint8)


def predict(
        model: nn.Module,
        images: Unlabelled,
        classes: list[str],
        transform: EvalTransform,
        world: World,
        folder: Path,
        overlays: int = 0,
        **kwargs: Any,
) -> None:
    """Write the label of each pixel; each process takes every `world.size`-th image.

    `predictions/masks/NAME.png` has the numbers of the classes, 0 for the first, and colours for them as a palette;
    `predictions/classes.txt` has their names and these colours. Both are as the layout `folder` of data sets wants
    them. The colours follow from the number of classes, as a checkpoint has none.

    Args:
        model: The network.
        images: The images.
        classes: Names of the classes.
        transform: What prepares an image.
        world: This process.
        folder: Of the output.
        overlays: Number of pictures, image beside prediction, spread over the images.
        **kwargs: Of `slide.slide`.
    """
    palette, chosen = colours(len(classes)), spread(overlays, len(images))
    names = ''.join(f'{name}\t#{bytes(colour).hex()}\n' for name, colour in zip(classes, palette))
    made = folder / PREDICTIONS
    if world.main:
        write_atomically(made / 'classes.txt', lambda part: part.write_text(names, encoding='utf-8'))
    for i, labels, _ in predictions(
            model, images, transform, world.device, range(world.rank, len(images), world.size), **kwargs):
        name = images.names[i]
        mask = Image.fromarray(labels.numpy().astype(np.uint8))
        mask.putpalette(palette.tobytes())
        write_atomically(made / 'masks' / f'{name}.png', partial(mask.save, format='PNG'))
        if i in chosen:
            write_prediction(
                folder / OVERLAYS / f'{name}.png', name, images[i][0], None, labels.numpy(), classes, palette)
    world.gather(None)  # all have written theirs
    world.say(f'{len(images)} images of {len(classes)} classes: {made}')
