"""The data sets that can be trained on, by name."""
from collections.abc import Callable
from pathlib import Path

from scripts.detection import trees
from scripts.detection.annotations import CocoImages, DetectionData
from scripts.training.images import DataError


def coco(root: Path, anyway: bool = False) -> DetectionData:
    """COCO 2017 as published: ``annotations/instances_{train,val}2017.json``, ``train2017/`` and ``val2017/``."""
    train, val = (CocoImages(root / 'annotations' / f'instances_{part}2017.json', root / f'{part}2017', anyway)
                  for part in ('train', 'val'))
    return DetectionData('coco', train, val, val)


def folder(root: Path, anyway: bool = False) -> DetectionData:
    """A folder of your own, in this layout:

        train/annotations.json   COCO's format: categories, images, and annotations with bbox and category_id
        train/NAME.jpg           the images beside it, at their file_name; folders may lie between
        val/                     likewise, for validation, with the same categories
        test/                    likewise, for the test; without it the test is on val

    Args:
        root: The folder.
        anyway: Leave out annotations whose box is wrong.
    """
    train, val = (CocoImages(root / part / 'annotations.json', root / part, anyway) for part in ('train', 'val'))
    test = CocoImages(root / 'test' / 'annotations.json', root / 'test', anyway) if (root / 'test').exists() else val
    return DetectionData('folder', train, val, test)


_LAYOUTS: dict[str, Callable[..., DetectionData]] = {'coco': coco, 'folder': folder}
DATA_SETS = ('trees', *_LAYOUTS)


def open_data(name: str, root: str | Path | None = None, anyway: bool = False) -> DetectionData:
    """Opens a data set: its annotations are read and checked now, its files by `DetectionData.check`.

    Args:
        name: One of `DATA_SETS`.
        root: Folder of the data set. For 'trees' the cache folder, None for ~/.cache/fadc_timm.
        anyway: Leave out annotations whose box is wrong.

    Raises:
        DataError: If the name is unknown, the folder is missing or not in its layout, or an annotation is wrong.
        RuntimeError: If the package of the trees cannot be downloaded.
    """
    if name not in DATA_SETS:
        raise DataError(f'no data set {name!r}; there are {", ".join(DATA_SETS)}')
    if name == 'trees':
        data = folder(trees.build(root), anyway)
        return DetectionData('trees', data.train, data.val, data.test)
    if root is None:
        raise DataError(f'--data {name} needs --root: the folder of the data set is not given')
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f'{root}: no such folder; wanted is that of {name}')
    return _LAYOUTS[name](root, anyway)
