"""The check of a data set, which comes before a training: every file of every split is read, every label counted.

What is wrong is refused: files that cannot be read, modes, sizes, labels, a split without a labelled pixel. What is
doubtful is refused too, except with `--anyway`: a class in no training mask, images without a labelled pixel, palettes
that differ, images that are in two splits.
"""
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from fadc_timm._writing import write_atomically
from scripts.results import cores
from scripts.segmentation.pairs import IGNORE, SegmentationData, Split
from scripts.training.images import SPLITS, DataError

NAMED = 5  # files, or numbers, that a message names


@dataclass
class Findings:
    """What the files of a split hold; counts of pixels, except for `images_with`.

    split: Its name.
    images: Number of pairs.
    labels, values: Pixels by label (`IGNORE` among them), and by the number that the masks store.
    images_with: Number of images in which a label occurs.
    sides: Smallest and largest (height, width), by area.
    problems: A text per pair that is wrong.
    unlabelled: Names of pairs without a labelled pixel.
    turned: Names of images whose EXIF data name an orientation.
    colours: By number in the masks: the palettes' colours of it, each with the name of the first pair that has it.
    digests: Name of the pair by digest of its image's file.
    """
    split: str
    images: int
    labels: Counter[int] = field(default_factory=Counter)
    values: Counter[int] = field(default_factory=Counter)
    images_with: Counter[int] = field(default_factory=Counter)
    sides: list[tuple[int, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
    colours: dict[int, dict[tuple[int, ...], str]] = field(default_factory=dict)
    digests: dict[bytes, str] = field(default_factory=dict)

    @property
    def labelled(self) -> int:
        return self.labels.total() - self.labels[IGNORE]


def splits_of(data: SegmentationData, names: Sequence[str] = SPLITS) -> dict[str, Split]:
    """The splits by name, without those that are another one of them."""
    found: dict[str, Split] = {}
    for name in names:
        split = getattr(data, name)
        if all(split is not other for other in found.values()):
            found[name] = split
    return found


def inspect(name: str, split: Split, threads: int = 0) -> Findings:
    """Read and count all pairs of a split.

    Args:
        name: Its name.
        split: The pairs.
        threads: That read; 0 for one per core. Decoding and counting run outside of Python's lock.
    """
    findings = Findings(name, len(split))
    pool = ThreadPoolExecutor(threads or cores())
    try:
        read = pool.map(split.inspect, range(len(split)))
        # no bar where nobody sees it
        for i, pair in enumerate(tqdm(read, f'checking {name}', len(split), unit='pair', disable=None, leave=False)):
            findings.values.update(pair.values)
            if pair.problem:
                findings.problems.append(pair.problem)
                continue
            findings.labels.update(pair.labels)
            findings.images_with.update(list(pair.labels))
            if not set(pair.labels) - {IGNORE}:
                findings.unlabelled.append(split.name(i))
            if pair.turned:
                findings.turned.append(split.name(i))
            for value, colour in pair.colours.items():
                findings.colours.setdefault(value, {}).setdefault(colour, split.name(i))
            if pair.digest:
                findings.digests.setdefault(pair.digest, split.name(i))
            assert pair.size is not None
            findings.sides = _extremes([*findings.sides, pair.size])
    finally:
        pool.shutdown(cancel_futures=True)
    return findings


def _extremes(sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    return [by_area[0], by_area[-1]]


def _some(names: Sequence[str]) -> str:
    more = f', and {len(names) - NAMED} more' if len(names) > NAMED else ''
    return ', '.join(names[:NAMED]) + more


def _shares(values: Counter[int]) -> str:
    total = values.total()
    shown = [f'{value} ({100 * pixels / total:.3g} %)' for value, pixels in sorted(values.items())[:4 * NAMED]]
    return ', '.join(shown) + (f', and {len(values) - len(shown)} more' if len(values) > len(shown) else '')


def _hint(data: SegmentationData, values: Counter[int]) -> str:
    """How the numbers in the masks of a `folder` can be given their classes."""
    if data.name != 'folder':
        return ''
    n = len(data.classes)
    if len(values) == n and sorted(values) != list(range(n)):
        return (f'{"255 means: ignore this pixel. " if IGNORE in values else ""}If these numbers are the classes in '
                f'the order of classes.txt, give --mask-values {",".join(map(str, sorted(values)))}')
    return (f'classes.txt has {n} names. If the masks number them otherwise than 0, 1, ..., give --mask-values '
            'with the number of each class in the order of classes.txt, and --ignore-values with those to ignore')


def faults(data: SegmentationData, found: Iterable[Findings]) -> list[str]:
    """What is wrong, a text each; none is for `--anyway` to pass over."""
    texts = []
    for f in found:
        numbers = f'the masks of {f.split} hold {_shares(f.values)}'
        if f.problems:
            lines = [f'{len(f.problems)} of the {f.images} pairs of {f.split} are wrong:', *f.problems[:NAMED]]
            if len(f.problems) > NAMED:
                lines.append(f'... and {len(f.problems) - NAMED} more')
            if any(': wrong label ' in problem for problem in f.problems):
                lines.append(f'{numbers}. {_hint(data, f.values)}'.rstrip())
            texts.append('\n  '.join(lines))
        elif not f.labelled:
            texts.append(f'no pixel of {f.split} has a label: {numbers}. {_hint(data, f.values)}'.rstrip())
    return texts


def doubts(data: SegmentationData, found: Sequence[Findings]) -> list[str]:
    """What is hardly meant, a text each."""
    texts = []
    for f in found:
        absent = [f'{i} {name!r}' for i, name in enumerate(data.classes) if not f.labels[i]]
        if f.split == 'train' and absent:
            texts.append(
                f'{"a class occurs" if len(absent) == 1 else f"{len(absent)} classes occur"} in no training mask: '
                f'{_some(absent)}. The masks hold {_shares(f.values)}. {_hint(data, f.values)}'.rstrip())
        if f.unlabelled:
            texts.append(f'{len(f.unlabelled)} of the {f.images} images of {f.split} have no labelled pixel: '
                         f'{_some(f.unlabelled)}')
    colours: dict[int, dict[tuple[int, ...], str]] = {}
    for f in found:
        for value, names in f.colours.items():
            for colour, name in names.items():
                colours.setdefault(value, {}).setdefault(colour, f'{f.split} {name}')
    differing = {value: names for value, names in sorted(colours.items()) if len(names) > 1}
    if differing:
        value, names = next(iter(differing.items()))
        shown = [f'#{bytes(colour).hex()} in {name}' for colour, name in names.items()]
        texts.append(f'the palettes of the masks differ, and only the number of a pixel counts: {value} is '
                     f'{_some(shown)}')
    for i, f in enumerate(found):
        for other in found[:i]:
            same = [f'{other.digests[digest]} is {f.split} {name}'
                    for digest, name in f.digests.items() if digest in other.digests]
            if same:
                texts.append(f'{len(same)} images of {f.split} are those of {other.split}: {other.split} {_some(same)}')
    return texts


def notes(data: SegmentationData, found: Iterable[Findings]) -> list[str]:
    """What should be known, a text each."""
    texts = []
    for f in found:
        absent = [name for i, name in enumerate(data.classes) if not f.labels[i]]
        if f.split != 'train' and absent:
            texts.append(f'no pixel of {f.split} is {_some(absent)}')
        if f.turned:
            texts.append(f'the EXIF data of {len(f.turned)} images of {f.split} name an orientation, which is not '
                         f'applied, so their masks must be as the images are stored: {_some(f.turned)}')
    return texts


def summary(data: SegmentationData, found: Sequence[Findings]) -> str:
    """A table: shares of the classes, and images that have them, by split; sizes above."""
    lines = []
    for f in found:
        sizes = ' to '.join(dict.fromkeys(f'{w} x {h}' for h, w in f.sides)) or 'none'
        lines.append(f'{f.split}: {f.images} pairs, {sizes} pixels (width x height)')
    width = max(map(len, (*data.classes, 'class', 'ignored')))
    lines.append(f'{"class":{width}}' + ''.join(f'{f.split + " %":>10}{"images":>9}' for f in found))
    for label, name in (*enumerate(data.classes), (IGNORE, 'ignored')):
        lines.append(f'{name:{width}}' + ''.join(
            f'{100 * f.labels[label] / max(f.labels.total(), 1):10.3f}{f.images_with[label]:9}' for f in found))
    return '\n'.join(lines + [f'note: {text}' for text in notes(data, found)])


def check_data(
        data: SegmentationData,
        names: Sequence[str] = SPLITS,
        anyway: bool = False,
        record: Path | None = None,
) -> str:
    """Check a data set.

    Args:
        data: The data set.
        names: The splits to check.
        anyway: Pass over doubts, which then stand in the text that is returned.
        record: A file that remembers what was checked: files that have not changed since are not read again.

    Returns:
        Tables and notes in words; with a record of the same files, that they are unchanged.

    Raises:
        DataError: Something is wrong, or doubtful without `anyway`; the message has all of it, with remedies.
    """
    splits = splits_of(data, names)
    stamps = {name: split.stamp() for name, split in splits.items()}
    known = {'classes': list(data.classes), 'stamps': stamps}
    if record is not None and record.exists() and all(stamps.values()):
        try:
            old = json.loads(record.read_text())
        except ValueError:
            old = {}
        if isinstance(old, dict) and {key: old.get(key) for key in known} == known:
            return 'the data have not changed since they were checked'
    found = [inspect(name, split) for name, split in splits.items()]
    wrong = faults(data, found)
    doubtful = [] if wrong else doubts(data, found)
    if wrong or doubtful and not anyway:
        lines = [f'{data.name} cannot be used as it is:', *(f'- {text}' for text in wrong + doubtful)]
        raise DataError('\n'.join(lines if wrong else [*lines, '--anyway takes the data as they are']))
    text = '\n'.join([summary(data, found), *(f'in doubt: {t}' for t in doubtful)])
    if record is not None:
        content = json.dumps({**known, 'summary': text.splitlines()}, indent=1) + '\n'
        write_atomically(record, lambda part: part.write_text(content))
    return text
