"""Images with boxes in COCO's format: what a data set is, and everything that can be wrong with its annotations."""
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from scripts.results import cores
from scripts.training.images import SPLITS, DataError, images_in, is_turned, open_image, read_image

MARGIN = 1.0  # pixels that a box may reach over its image, as boxes are rounded; it is clipped
LEAST = 1e-3  # pixels of the shortest side of a box with an area
NAMED = 5  # problems that a message names

Sample = tuple[np.ndarray, dict[str, np.ndarray]]


def import_coco() -> Any:
    """pycocotools, or an error that says how to get it."""
    try:
        import pycocotools
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError as e:
        raise ImportError("Detection needs pycocotools: pip install -e '.[detection]'") from e
    return pycocotools


class Entry(NamedTuple):
    """An image of a split.

    boxes: (N, 4) float32: left, top, right and bottom, in pixels; without crowds.
    labels: (N,) int64: 1 for the first class.
    annotations: COCO's, crowds among them, but for those that are left out.
    """
    id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    annotations: tuple[dict[str, Any], ...]


def _some(problems: list[str], what: str) -> str:
    """A text of problems, the first of which it names."""
    if len(problems) == 1:
        return problems[0]
    more = [f'... and {len(problems) - NAMED} more'] if len(problems) > NAMED else []
    return '\n  '.join([f'{len(problems)} {what}:', *problems[:NAMED], *more])


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The lists of a COCO file, each of dictionaries with an integer `id`, which no two of a list share."""
    try:
        content = json.loads(file.read_text(encoding='utf-8-sig'))
    except FileNotFoundError:
        raise DataError(f'{file}: no such file') from None
    except (OSError, ValueError) as e:
        raise DataError(f'{file}: cannot be read as JSON ({e})') from e
    lists = {}
    for name in ('categories', 'images', 'annotations'):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(f"{file}: COCO's format has a list {name!r}, and this file has none")
        seen = set()
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict) or type(entry.get('id')) is not int:
                raise DataError(f'{file}: entry {i} of {name} has no id that is an integer')
            if entry['id'] in seen:
                raise DataError(f'{file}: {name} has the id {entry["id"]} twice')
            seen.add(entry['id'])
        lists[name] = entries
    return lists


def _categories(file: Path, entries: list[dict[str, Any]]) -> dict[int, str]:
    """Names by id, in the order of the ids."""
    names: dict[int, str] = {}
    for entry in sorted(entries, key=lambda entry: entry['id']):
        name = entry.get('name')
        if not isinstance(name, str) or not name:
            raise DataError(f'{file}: category {entry["id"]} has no name')
        if name in names.values():
            raise DataError(f'{file}: category {entry["id"]} has the name of another one, {name!r}')
        names[entry['id']] = name
    if not names:
        raise DataError(f'{file}: there are no categories')
    return names


def _wrong_box(box: Any, width: int, height: int) -> str:
    """What is wrong with a box of COCO's (left, top, width, height), empty if nothing is."""
    if not isinstance(box, list) or len(box) != 4 or not all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in box):
        return f'bbox must be four numbers (left, top, width, height), got {box!r}'
    left, top, w, h = box
    text = f'the box {box} (left, top, width, height)'
    if w < 0 or h < 0:
        return f'{text} has a negative side'
    right, bottom = left + w, top + h
    if left < -MARGIN or top < -MARGIN or right > width + MARGIN or bottom > height + MARGIN:
        return f'{text} is outside of the image, which is {width} x {height} pixels'
    if min(right, width) - max(left, 0) < LEAST or min(bottom, height) - max(top, 0) < LEAST:
        return f'{text} has no area'
    return ''


class CocoImages(Dataset[Sample]):
    """A split: a file in COCO's format, and the folder of its images.

    Images are read as they are stored: a rotation in their EXIF data is not applied.

    Args:
        file: The annotations. Of an annotation `bbox`, `category_id` and `image_id` are needed; `iscrowd` is 0 and
            `area` that of the box, where they are missing.
        folder: The images, at their `file_name`.
        anyway: Leave out annotations whose box is wrong. How many they are is in `left_out`.

    Raises:
        DataError: The file is not in COCO's format; an image is missing; an annotation has a wrong box or an unknown
            category or image. The message names file and id.
    """

    def __init__(self, file: Path, folder: Path, anyway: bool = False) -> None:
        self.file, self.folder, self.left_out, self.with_masks = file, folder, 0, False
        lists = _read(file)
        self.categories = _categories(file, lists['categories'])
        labels = {number: label for label, number in enumerate(self.categories, start=1)}
        images = {entry['id']: entry for entry in lists['images']}
        missing = []
        for number, entry in images.items():
            name, size = entry.get('file_name'), (entry.get('width'), entry.get('height'))
            if not isinstance(name, str) or not name:
                raise DataError(f'{file}: image {number} has no file_name')
            if any(type(side) is not int or side < 1 for side in size):
                raise DataError(f'{file}: image {number} ({name}) has the width and height {size[0]!r} and '
                                f'{size[1]!r}; wanted are positive integers')
            if not (folder / name).is_file():
                missing.append(f'{file}: image {number}: there is no file {folder / name}')
        if missing:
            raise DataError(_some(missing, f'of {len(images)} images are missing'))
        wrong = []
        of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in lists['annotations']:
            image, category = (annotation.get(key) for key in ('image_id', 'category_id'))
            image = images.get(image) if type(image) is int else None
            where = f'{file}: annotation {annotation["id"]}'
            if image is None:
                raise DataError(f'{where} is of the image {annotation.get("image_id")!r}, which is not in the file')
            where += f' of image {image["id"]} ({image["file_name"]})'
            if type(category) is not int or category not in labels:
                raise DataError(f'{where} is of the unknown category {category!r}; there are '
                                f'{", ".join(map(str, list(labels)[:20]))}{", ..." * (len(labels) > 20)}')
            problem = _wrong_box(annotation.get('bbox'), image['width'], image['height'])
            if problem:
                wrong.append(f'{where}: {problem}')
                continue
            box = annotation['bbox']
            of_image[image['id']].append({
                **annotation, 'iscrowd': int(annotation.get('iscrowd') or 0),
                'area': annotation.get('area', box[2] * box[3])})
        if wrong and not anyway:
            raise DataError(f'{_some(wrong, "boxes are wrong")}\n--anyway leaves these annotations out')
        self.left_out = len(wrong)
        self.entries = tuple(self._entry(image, of_image[number], labels) for number, image in images.items())

    def _entry(self, image: dict[str, Any], annotations: list[dict[str, Any]], labels: Mapping[int, int]) -> Entry:
        alone = [a for a in annotations if not a['iscrowd']]
        boxes = np.array([a['bbox'] for a in alone], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.array([image['width'], image['height']] * 2, np.float32))
        return Entry(
            image['id'], self.folder / image['file_name'], image['width'], image['height'], boxes,
            np.array([labels[a['category_id']] for a in alone], np.int64), tuple(annotations))

    @classmethod
    def unlabelled(cls, folder: Path, written: Iterable[Path], classes: Sequence[str]) -> 'CocoImages':
        """The images below a folder, without annotations; the ids of the classes and of the images are 1, 2, ...

        Args:
            folder: Of the images.
            written: Files or folders that will be written.
            classes: Names of the classes.

        Raises:
            DataError: There is no such folder, no image in it, or a file that is none or cannot be read; or what will
                be written lies in it, or it in that.
        """
        files = images_in(folder, written).values()
        sizes = [open_image(path).size for path in files]
        made = object.__new__(cls)
        made.file, made.folder, made.left_out, made.with_masks = folder, folder, 0, False
        made.categories = dict(enumerate(classes, start=1))
        made.entries = tuple(
            made._entry({'id': i, 'file_name': path.relative_to(folder), 'width': width, 'height': height}, [], {})
            for i, (path, (width, height)) in enumerate(zip(files, sizes), start=1))
        return made

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.categories.values())

    @property
    def boxes(self) -> int:
        """Number of the boxes that are to be found, so without crowds."""
        return sum(len(entry.labels) for entry in self.entries)

    def with_boxes(self) -> 'CocoImages':
        """The same split without the images that have no box, on which there is little to learn."""
        part = object.__new__(CocoImages)
        part.__dict__.update(self.__dict__, entries=tuple(e for e in self.entries if len(e.labels)))
        return part

    def need_masks(self) -> None:
        """Give masks with the boxes from now on.

        Raises:
            As `check_masks`.
        """
        self.check_masks()
        self.with_masks = True

    def check_masks(self) -> None:
        """Raises DataError where an annotation has no `segmentation`."""
        for entry in self.entries:
            for a in entry.annotations:
                if not a.get('segmentation'):
                    raise DataError(f'{self.file}: annotation {a["id"]} of image {entry.id} ({entry.path.name}) has no '
                                    'segmentation, which a detector of masks needs')

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return self.entries[index].path.relative_to(self.folder).with_suffix('').as_posix()

    def read(self, index: int) -> np.ndarray:
        """An image (H, W, 3) uint8."""
        entry = self.entries[index]
        image = read_image(entry.path)
        if image.shape[:2] != (entry.height, entry.width):
            raise DataError(_size_problem(self.file, entry, (image.shape[1], image.shape[0])))
        return image

    def __getitem__(self, index: int) -> Sample:
        """An image (H, W, 3) uint8, and `boxes` (N, 4), `labels` (N,) and maybe `masks` (N, H, W) uint8."""
        entry = self.entries[index]
        target = {'boxes': entry.boxes.copy(), 'labels': entry.labels.copy()}
        if self.with_masks:
            target['masks'] = self._masks(entry)
        return self.read(index), target

    def _masks(self, entry: Entry) -> np.ndarray:
        mask = import_coco().mask
        masks = np.zeros((len(entry.labels), entry.height, entry.width), np.uint8)
        for i, a in enumerate(a for a in entry.annotations if not a['iscrowd']):
            shape = a['segmentation']
            if isinstance(shape, list):  # polygons
                coded = mask.merge(mask.frPyObjects(shape, entry.height, entry.width))
            elif isinstance(shape.get('counts'), list):
                coded = mask.frPyObjects(shape, entry.height, entry.width)
            else:
                coded = shape
            masks[i] = mask.decode(coded)
        return masks

    def content(self, annotations: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """The content of a file in COCO's format, with these annotations of the images."""
        return {
            'info': {}, 'categories': [{'id': number, 'name': name} for number, name in self.categories.items()],
            'images': [{'id': e.id, 'width': e.width, 'height': e.height,
                        'file_name': e.path.relative_to(self.folder).as_posix()} for e in self.entries],
            'annotations': list(annotations)}

    def ground_truth(self) -> Any:
        """The annotations as pycocotools wants them."""
        coco = import_coco().coco.COCO()
        coco.dataset = self.content(a for e in self.entries for a in e.annotations)
        coco.createIndex()
        return coco

    def check_files(self, whole: bool = False, threads: int = 0) -> None:
        """Look into every image.

        Args:
            whole: Read the images, in place of their headers alone.
            threads: That read; 0 for one per core.

        Raises:
            DataError: An image cannot be opened or read, or has another size than in the annotations.
        """
        def problem(entry: Entry) -> str:
            try:
                with open_image(entry.path) if whole else Image.open(entry.path) as image:
                    size, turned = image.size, is_turned(image)
            except DataError as e:
                return f'{self.file}: image {entry.id}: {e}'
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
                return f'{self.file}: image {entry.id}: {entry.path} cannot be opened ({e})'
            return '' if size == (entry.width, entry.height) else _size_problem(self.file, entry, size, turned)

        with ThreadPoolExecutor(threads or cores()) as pool:
            # no bar where nobody sees it
            found = tqdm(pool.map(problem, self.entries), f'checking {self.file.name}', len(self), unit='image',
                         disable=None, leave=False)
            problems = [text for text in found if text]
        if problems:
            raise DataError(_some(problems, f'of {len(self)} images are wrong'))


def _size_problem(file: Path, entry: Entry, size: tuple[int, int], turned: bool = False) -> str:
    hint = ("; the image's EXIF data name an orientation, which is not applied"
            if turned and size == (entry.height, entry.width) else '')
    return (f'{file}: image {entry.id} is {entry.width} x {entry.height} pixels (width x height), its file '
            f'{entry.path} {size[0]} x {size[1]}{hint}')


@dataclass(frozen=True)
class DetectionData:
    """A data set for object detection."""

    name: str
    train: CocoImages
    val: CocoImages
    test: CocoImages  # `val` where nothing else is labelled

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    def check(
            self,
            names: Iterable[str] = SPLITS,
            masks: bool = False,
            whole: Collection[str] = ('val', 'test'),
    ) -> str:
        """Look into the files of some splits.

        Args:
            names: The splits.
            masks: All annotations need a `segmentation`.
            whole: Splits whose images are read; of others it is their headers.

        Returns:
            What is in them, in words.

        Raises:
            DataError: A split has other categories than `train`, no images or no boxes; an annotation has no
                `segmentation` where it needs one; or a file is wrong.
        """
        lines: list[str] = []
        seen: list[CocoImages] = []
        for name in names:
            split = getattr(self, name)
            if any(split is other for other in seen):
                continue
            seen.append(split)
            if split.categories != self.train.categories:
                raise DataError(f'{split.file} has other categories than {self.train.file}: {split.categories} and '
                                f'{self.train.categories}')
            if not split.boxes:
                raise DataError(f'{split.file}: there are no boxes')
            if masks:
                split.check_masks()
            split.check_files(name in whole)
            empty = sum(not len(e.labels) for e in split.entries)
            left = f', {split.left_out} annotations with a wrong box left out' if split.left_out else ''
            lines.append(f'{name}: {len(split)} images, {split.boxes} boxes, {empty} images without a box{left}')
        return '\n'.join(lines)
