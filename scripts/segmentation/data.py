"""The data sets that can be trained on, by name."""
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.bluemarble import segmentation as bluemarble
from scripts.segmentation import layouts
from scripts.segmentation.pairs import IGNORE, SegmentationData, Split
from scripts.training.images import DataError

__all__ = ['DATA_SETS', 'IGNORE', 'DataError', 'SegmentationData', 'Split', 'open_data']

_LAYOUTS: dict[str, Callable[..., SegmentationData]] = {
    'ade20k': layouts.ade20k, 'cityscapes': layouts.cityscapes, 'folder': layouts.folder}
DATA_SETS = ('bluemarble', *_LAYOUTS)


def open_data(
        name: str,
        root: str | Path | None = None,
        mask_values: Sequence[int] | None = None,
        ignore_values: Sequence[int] | None = None,
) -> SegmentationData:
    """Opens a data set: what is there is checked now, what is in a file by ``check.py``, or when it is read.

    Args:
        name: One of `DATA_SETS`; the layouts are described in ``layouts.py``.
        root: Folder of the data set. For 'bluemarble' the cache folder, None for ~/.cache/fadc_timm.
        mask_values: For 'folder': the number in the masks that stands for each class.
        ignore_values: For 'folder': the numbers in the masks for pixels to ignore.

    Raises:
        DataError: If the name is unknown, the folder is missing or not in its layout, or values of masks are given
            that do not fit it. Reading a pair raises it for a file that cannot be read, a mask with colours, of
            another size than its image or with a wrong label.
        RuntimeError: If Blue Marble's sources cannot be downloaded.
    """
    if name not in DATA_SETS:
        raise DataError(f'no data set {name!r}; there are {", ".join(DATA_SETS)}')
    values = {k: v for k, v in (('mask_values', mask_values), ('ignore_values', ignore_values)) if v is not None}
    if values and name != 'folder':
        raise DataError(f'--{next(iter(values)).replace("_", "-")} is for --data folder, not for {name}')
    if name == 'bluemarble':
        return bluemarble.load(root)
    if root is None:
        raise DataError(f'--data {name} needs --root: the folder of the data set is not given')
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f'{root}: no such folder; wanted is that of {name}')
    return _LAYOUTS[name](root, **values)
