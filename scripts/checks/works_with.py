#!/usr/bin/env python3
"""Run the tests of consumers of timm backbones, and write down what passed, with versions, for docs/integrations.md.

    pip install -e '.[test,integrations]' && python -m scripts.checks.works_with && python -m scripts.checks.doc_tables

Writes scripts/results/works_with.csv, and nothing where a test fails or a package is absent. Arguments are pytest's:
where they select whole lines of the table (-k compile), the others stay as they are, with the commit of their run.
"""
import argparse
import csv
import subprocess
import sys
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / 'scripts' / 'results' / 'works_with.csv'

COLUMNS = ('package', 'version', 'what', 'models', 'tests', 'date', 'commit')

Line = tuple[str, str]


class Collector:
    """A plugin of pytest that counts what became of the tests marked `integration`, by line of the table."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.models: dict[Line, list[str]] = {}
        self.passed: Counter[Line] = Counter()
        self.left_out: set[Line] = set()
        self.other: list[str] = []

    def pytest_deselected(self, items: Any) -> None:
        for item in items:
            mark = item.get_closest_marker('integration')
            if mark and not item.get_closest_marker('sweep'):
                self.left_out.add((mark.kwargs['package'], mark.kwargs['what']))

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            mark = item.get_closest_marker('integration')
            line = self.lines[item.nodeid] = (mark.kwargs['package'], mark.kwargs['what'])
            params = item.callspec.params if hasattr(item, 'callspec') else {}
            model = params.get('name') or (f'{params["base"]}_fadc' if 'base' in params else 'test_resnet_fadc')
            if model not in self.models.setdefault(line, []):
                self.models[line].append(model)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed and report.when == 'call':
            self.passed[self.lines[report.nodeid]] += 1
        elif not report.passed:
            self.other.append(f'{report.nodeid}: {report.outcome} {report.longrepr if report.skipped else ""}')


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage='%(prog)s [ARGUMENTS OF PYTEST]')
    _, arguments = parser.parse_known_args()
    try:
        import pytest
    except ImportError:
        print("works_with: pytest is not installed: pip install -e '.[test,integrations]'", file=sys.stderr)
        return 1
    collector = Collector()
    status = pytest.main(
        ['-m', 'integration and not sweep', '-q', '-n0', '--rootdir', str(ROOT), str(ROOT / 'tests'), *arguments],
        plugins=[collector])
    if status != 0 or collector.other:
        print('\n'.join(['Not written, as these did not pass:', *collector.other]), file=sys.stderr)
        return 1
    for line in sorted(collector.left_out & set(collector.passed)):
        print(f'Not written, as not all tests were selected of: {": ".join(line)}', file=sys.stderr)
        return 1
    kept: dict[Line, dict[str, object]] = {}
    if collector.left_out:
        with open(OUTPUT, newline='') as file:
            kept = {(old['package'], old['what']): {**old} for old in csv.DictReader(file)}
        kept = {line: row for line, row in kept.items() if line in collector.left_out}
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    def row(line: Line) -> dict[str, object]:
        package, what = line
        return kept.get(line) or dict(
            package=package, version=version(package).partition('+')[0], what=what,
            models=' '.join(collector.models[line]), tests=collector.passed[line], date=date.today(), commit=commit)

    # Not before the tests: it imports Triton, and they choose how its kernels run.
    from scripts.results import write_csv
    write_csv(OUTPUT, COLUMNS, map(row, sorted({*collector.passed, *kept})))
    print(f'wrote {OUTPUT.relative_to(ROOT)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
