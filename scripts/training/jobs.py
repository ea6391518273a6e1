"""Lists of runs: each is a process of a training script, that is resumed, and done once its result has its row."""
import csv
import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from scripts.results import Row, read_csv, write_csv
from scripts.training.script import ORIGIN


@dataclass(frozen=True)
class Job:
    """A run of a training script.

    key: Values of the key columns of its row.
    script: Module of the script.
    options: Those that decide the result.
    further: Those that do not, as the folder of the data.
    """
    key: tuple[str, ...]
    script: str
    options: tuple[str, ...]
    further: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ', '.join(self.key)

    @property
    def command(self) -> str:
        return shlex.join(self.options)

    def folder(self, runs: Path) -> Path:
        """Where the run keeps its files: of another command, elsewhere."""
        digest = hashlib.sha256(self.command.encode()).hexdigest()[:8]
        return runs / self.key[0] / '-'.join([*self.key[1:], digest])


def store(path: Path, columns: Sequence[str], keys: Sequence[str], new: Row) -> None:
    """Put a row in the place of the one with its key, or at the end."""
    rows = {tuple(row[k] for k in keys): row for row in read_csv(path)}
    rows[tuple(new[k] for k in keys)] = new
    write_csv(path, columns, rows.values())


def unfinished(jobs: Iterable[Job], path: Path, keys: Sequence[str]) -> list[Job]:
    """The jobs without a row. One of another command does not count, and is replaced later."""
    done = {(*(row[k] for k in keys), row['command']) for row in read_csv(path)}
    left = []
    for job in jobs:
        if (*job.key, job.command) in done:
            print(f'{job.name}: has its row', flush=True)
        else:
            left.append(job)
    return left


class Children:
    """The running processes, so that none outlives an interrupted list."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.lock, self.stopped = threading.Lock(), False

    def run(self, arguments: list[str], log: Path, env: dict[str, str]) -> int:
        with log.open('a') as file:
            with self.lock:
                if self.stopped:
                    return 1
                process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=env)
                self.running.add(process)
            status = process.wait()
        with self.lock:
            self.running.discard(process)
        return status

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


def _read_result(folder: Path) -> dict:
    """Of a run that has ended: what :func:`run_one` returns.

    Raises:
        RuntimeError: A file of the run is not there, cannot be read, or does not say what made it.
    """
    path, log = folder / 'result.json', folder / 'log.csv'
    try:
        result = json.loads(path.read_text())
        lacking = [name for name in ORIGIN if name not in result]
        with log.open(newline='') as file:
            last = list(csv.DictReader(file))[-1]
        merged = {**result, 'loss': last['loss'], 'seconds': last['seconds']}
    except (OSError, ValueError, TypeError, LookupError) as e:
        raise RuntimeError(f'{path} and {log} cannot be read as those of a run that has ended '
                           f'({type(e).__name__}: {e}). Move the folder away, and the run is made anew.') from e
    if lacking:
        raise RuntimeError(f'{path} does not say its {", ".join(lacking)}, which the row wants: an older version of '
                           'the script wrote it. Move the folder away, and the run is made anew.')
    return merged


def run_one(job: Job, folder: Path, threads: int, children: Children) -> dict:
    """Run, or resume, a training.

    Returns:
        What is in its `result.json`, with `loss` and `seconds` of the last row of its log.

    Raises:
        RuntimeError: It failed; the message has the end of what it printed. Or its files are not those of a run that
            has ended, or do not say what made it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / 'result.json').exists():
        env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'MKL_NUM_THREADS': str(threads)}
        log = folder / 'output.txt'
        arguments = [sys.executable, '-m', job.script, *job.options, *job.further, '--output', str(folder),
                     '--threads', str(threads)]
        if children.run(arguments, log, env):
            raise RuntimeError(f'{job.command}\n  failed: ' + '\n  '.join(log.read_text().splitlines()[-5:]))
    return _read_result(folder)


def run_jobs(
        jobs: Sequence[Job],
        runs: Path,
        at_once: int,
        threads: int,
        finished: Callable[[Job, dict], None],
) -> int:
    """Run jobs, the first ones first.

    Args:
        jobs: The jobs.
        runs: Folder of all runs.
        at_once: Processes at a time.
        threads: Of each process.
        finished: Called, in this thread, with each job that ended and its result; it raises an error where it cannot
            store the result.

    Returns:
        The exit status: 1 if a run failed, whatever the error, which is told, while the others still run.
    """
    children, failures = Children(), 0
    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(run_one, job, job.folder(runs), threads, children): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                try:
                    finished(job, future.result())
                except Exception as e:
                    failures += 1
                    kind = '' if isinstance(e, RuntimeError) else f'{type(e).__name__}: '
                    print(f'{job.name}: {kind}{e}', file=sys.stderr, flush=True)
        except BaseException:
            children.stop()
            pool.shutdown(cancel_futures=True)
            raise
    print(f'{len(jobs) - failures} runs done, {failures} failed', flush=True)
    return int(failures > 0)
