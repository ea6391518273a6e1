"""The folder of a run has one owner at a time, whose death ends the ownership, and signals ask a run to end."""
import os
import signal
import subprocess
import sys
import time

import pytest

from scripts.training.batches import Samples, step_batches
from scripts.training.run_folder import Interruption, owned
from tests.support.processes import ROOT
from tests.support.segmentation_cases import Pictures, transform

OWNER = """
import os, sys, time
from pathlib import Path
from scripts.training.run_folder import owned
with owned(Path(sys.argv[1])):
    if sys.argv[2] == 'child':
        child = os.fork()
        if child:
            print(child, flush=True)
        else:
            os.close(1)
    else:
        print('owns', flush=True)
    time.sleep(60)
"""


def start(folder, what):
    owner = subprocess.Popen([sys.executable, '-c', OWNER, folder, what], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return owner, owner.stdout.readline().strip()


def test_owned(tmp_path):
    """The second is refused, naming the first; when that is killed, no lock is left, though a process of it lives."""
    folder = tmp_path / 'run'
    owner, child = start(folder, 'child')
    try:
        message = f'run is in use by another run .process {owner.pid} on .*--output'
        with pytest.raises(RuntimeError, match=message), owned(folder):
            pass
        owner.kill()
        owner.wait()
        os.kill(int(child), 0)  # lives
        with owned(folder):
            other = subprocess.run([sys.executable, '-c', OWNER, folder, ''], capture_output=True, text=True, cwd=ROOT)
            assert f'in use by another run (process {os.getpid()} on ' in other.stderr
        with owned(folder):
            pass
    finally:
        owner.kill()
        os.kill(int(child), signal.SIGKILL)


def test_interruption(monkeypatch, capfd):
    """Once asks; once more within a second is the same one, as from a terminal through torchrun; later it ends."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT):
        with Interruption() as interruption:
            assert not interruption.asked
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.asked
        assert 'ending after this step, with a checkpoint' in capfd.readouterr().err
    now = time.monotonic()
    with Interruption(says_so=False) as interruption, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(time, 'monotonic', lambda: now + 10)
        os.kill(os.getpid(), signal.SIGINT)
    assert interruption.asked and not capfd.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_loading_processes_outlive_ctrl_c():
    """A terminal sends Ctrl-C to all processes; those that load go on for the step that is to end."""
    with Interruption(says_so=False):
        loader = step_batches(Samples(Pictures(), transform, 7), 0, 4, 2, workers=1)
        batches = iter(loader)
        next(batches)
        worker = batches._workers[0]
        os.kill(worker.pid, signal.SIGINT)
        assert sum(1 for _ in batches) == 3 and worker.is_alive()
