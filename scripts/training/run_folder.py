"""The folder of a run belongs to one process, and Ctrl-C ends a run between two steps."""
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

LOCK = 'run.lock'


class Interrupted(Exception):
    """A run was ended by a signal, after a checkpoint; the first process's message says how it goes on."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own the folder of a run, which is made if it does not exist.

    The system ends the lock with the process, however that ends. The processes that load images do not hold it. Its
    file stays.

    Raises:
        RuntimeError: Another process owns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    refusal = f'{folder} is in use by another run{{}}: wait for it or end it, or give another --output'
    if sys.platform == 'win32':
        import filelock
        lock = filelock.FileLock(path)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise RuntimeError(refusal.format('')) from None
        try:
            yield
        finally:
            lock.release()
    else:
        import fcntl
        # lockf, not flock: a fork does not inherit it. This process must not open the file twice.
        with path.open('a+') as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip()
                raise RuntimeError(refusal.format(f' ({holder})' if holder else '')) from None
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
            file.flush()
            yield


class Interruption:
    """While it is entered, SIGINT (Ctrl-C) and SIGTERM set `asked`. Ctrl-C more than a second later ends at once."""

    def __init__(self, says_so: bool = True) -> None:
        """
        Args:
            says_so: Answer the first signal with a line on stderr.
        """
        self.asked, self.says_so, self._since = False, says_so, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> 'Interruption':
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
            if self.says_so:
                # print may be in the middle of another line
                os.write(2, b'\nending after this step, with a checkpoint; Ctrl-C again ends at once\n')
        # torchrun passes on what all processes have from the terminal: that is one Ctrl-C
        elif number == signal.SIGINT and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def leave_to_parent() -> None:
    """In a process that loads images: Ctrl-C is for the run's own process, which needs images until its step ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
