"""What the package and its scripts write with: files that are whole or absent, and Markdown tables."""
import os
from pathlib import Path
from typing import Callable, Iterable, Sequence

__all__ = ['markdown_table', 'write_atomically']


def write_atomically(path: Path, write: Callable[[Path], object], make_folder: bool = True) -> None:
    """Write a file under a temporary name beside it, flush it to the disk, then give it its name.

    Args:
        path: The file.
        write: Writes the file whose path it is given.
        make_folder: Make the file's folder if it does not exist.

    Raises:
        OSError: The file cannot be written, for instance because its folder is missing.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        write(part)
        with part.open('rb+') as file:  # some systems flush only what is open for writing
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table: `left` columns aligned to the left, the others to the right."""
    lines = [header, ['---'] * left + ['---:'] * (len(header) - left), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
