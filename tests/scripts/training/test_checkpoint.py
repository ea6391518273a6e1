"""The files of a segmentation run, its checkpoint and its log, whenever it is killed."""
import os
import signal

import pytest
import torch

from scripts.training import checkpoint as files
from scripts.training.checkpoint import Log, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('moment', ['half of it', 'before the exchange', 'after the exchange'])
def test_killed_while_saving(moment, tmp_path, monkeypatch):
    """SIGKILL, which no `finally` sees: the checkpoint is the old one or the new one."""
    path = tmp_path / 'last.pt'
    states = [{'step': i, 'config': {}, 'model': {'w': torch.full((1000,), float(i))}} for i in range(3)]
    save_checkpoint(path, states[0])
    child = os.fork()
    if child == 0:
        def kill(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        save, replace = torch.save, os.replace
        if moment == 'half of it':
            files.torch.save = lambda state, part: (save(state, part), os.truncate(part, 1000), kill())
        else:
            os.replace = (lambda *args: (replace(*args), kill())) if moment.startswith('after') else kill
        save_checkpoint(path, states[1])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load_checkpoint(path, {})['step'] == (1 if moment.startswith('after') else 0)
    save_checkpoint(path, states[2])
    assert [p.name for p in tmp_path.iterdir()] == ['last.pt']
    assert torch.equal(load_checkpoint(path, {})['model']['w'], states[2]['model']['w'])


def test_checkpoint_errors(tmp_path):
    path = tmp_path / 'last.pt'
    save_checkpoint(path, {'step': 1, 'config': {'lr': 0.1, 'crop': 32}})
    with pytest.raises(RuntimeError, match='is of another run: crop is 64, was 32; lr is 0.2, was 0.1'):
        load_checkpoint(path, {'lr': 0.2, 'crop': 64})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RuntimeError, match='cannot be read as a checkpoint'):
        load_checkpoint(path, {})
    for content, message in ((b'import torch', 'it is cut off, or not a file of torch.save'), (b'', 'it is cut off')):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=f'last.pt cannot be read as a checkpoint: {message}'):
            load_checkpoint(path, {})
    torch.save({'step': 1, 'config': {}, 'model': os.system}, path)
    with pytest.raises(RuntimeError, match='weights_only=True blocked it [^\n]*system[^\n]*$') as e:
        load_checkpoint(path, {})
    assert 'arbitrary code' not in str(e.value)
    torch.save([1], path)
    with pytest.raises(RuntimeError, match='is no checkpoint of a training script'):
        load_checkpoint(path, {})


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has a disk that is always full')
def test_full_disk(tmp_path, monkeypatch):
    """The message names the file, and the old one stays."""
    path, save = tmp_path / 'last.pt', torch.save
    save_checkpoint(path, {'step': 1, 'config': {}})
    monkeypatch.setattr(files.torch, 'save', lambda state, part: save(state, '/dev/full'))
    with pytest.raises(RuntimeError, match='last.pt cannot be written, is the disk full[^\n]*$') as e:
        save_checkpoint(path, {'step': 2, 'config': {}, 'model': torch.zeros(100_000)})
    assert e.value.__cause__ is not None and load_checkpoint(path, {})['step'] == 1


def test_log(tmp_path):
    """Rows after the checkpoint, and the half of a row that a killed process wrote, are taken back."""
    path = tmp_path / 'log.csv'
    log = Log(path, ('step', 'loss'), 0)
    for step in range(1, 5):
        log.add({'step': step, 'loss': step / 3})
    path.write_text(path.read_text() + '5')
    Log(path, ('step', 'loss'), 3).add({'step': 4, 'loss': 0.25})
    assert path.read_text() == 'step,loss\n1,0.333333333\n2,0.666666667\n3,1\n4,0.25\n'
    Log(path, ('step', 'loss'), 0)
    assert path.read_text() == 'step,loss\n'
