"""Files that are either whole or not there."""
from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, then give it its name.

    Args:
        path: The file; its folder is made if it does not exist.
        write: Writes the file whose path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        write(part)
        with part.open('rb') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV file as a whole; an entry that a row lacks is empty.

    Args:
        path: The file.
        columns: Its columns; a row that has others is refused.
        rows: Values by column.

    Raises:
        ValueError: A row has a column that is not one of the file's.
    """
    def write(part: Path) -> None:
        with part.open('w', newline='') as file:
            writer = csv.DictWriter(file, columns, lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
