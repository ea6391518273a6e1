"""A plugin of pytest that writes failures as they happen: a run that is killed has told of those that it saw.

The file of GPU_CHECK_FAILURES gets a line for each, `NODE WHEN SECONDS :: MESSAGE`, and now and then a line
`# N passed, N failed, N skipped`.
"""
from __future__ import annotations

import collections
import os
import time
from typing import Any

MOST_MESSAGE = 600
# Seconds between two lines of numbers.
EVERY = 2.


class Failures:
    """Reports of all processes come to the one that started them, where this is registered."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.counts: collections.Counter[str] = collections.Counter()
        self.last = time.monotonic()

    def write(self, line: str) -> None:
        with open(self.path, 'a') as file:
            file.write(line + '\n')

    def write_counts(self) -> None:
        self.write('# ' + ', '.join(f'{self.counts[name]} {name}' for name in ('passed', 'failed', 'skipped')))
        self.last = time.monotonic()

    def write_failure(self, node: str, when: str, seconds: float, report: Any) -> None:
        crash = getattr(report.longrepr, 'reprcrash', None)
        message = ' '.join(str(crash.message if crash else report.longrepr).split())
        self.write(f'{node} {when} {seconds:.1f}s :: {message[:MOST_MESSAGE]}')

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.write_failure(report.nodeid, report.when, report.duration, report)
        if report.when == 'call' or not report.passed:
            self.counts[report.outcome] += 1
        if time.monotonic() - self.last > EVERY:
            self.write_counts()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.counts['failed'] += 1
            self.write_failure(report.nodeid, 'collection', 0., report)

    def pytest_sessionfinish(self) -> None:
        self.write_counts()


def pytest_configure(config: Any) -> None:
    path = os.environ.get('GPU_CHECK_FAILURES')
    if path and not hasattr(config, 'workerinput'):
        config.pluginmanager.register(Failures(path), 'gpu-check-failures')
