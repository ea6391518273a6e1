#!/usr/bin/env python3
"""Write the tables of README.md and docs/ between their markers, from the registry and the files of measurements.

    python -m scripts.checks.doc_tables [--check] [PAGE ...]     # all pages, or for instance docs/gpu.md

--check writes nothing, and fails where a page differs. docs/zoo.md has the costs that `scripts.checks.cost_table`
counted.
"""
import argparse
import csv
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from fadc_timm._writing import markdown_table, write_atomically
from fadc_timm.models._family import list_architectures
from fadc_timm.models.cost import listed_cost
from scripts.bench import tables as speed_tables
from scripts.results import RESULTS
from scripts.segmentation import tables as segmentation_tables
from scripts.studies import from_imagenet

ROOT = Path(__file__).parents[2]


def zoo() -> str:
    """All architectures with their cost, beside their base's."""
    rows = []
    bases = {a.name: a.base for a in list_architectures()}
    for name in timm.list_models():
        if name not in bases:
            continue
        base = bases[name]
        cfg = get_pretrained_cfg(name, allow_unregistered=False)
        assert cfg is not None
        size = tuple(cfg.input_size)
        params, gmacs, _ = listed_cost(name, cfg.num_classes, size)
        base_params, base_gmacs, _ = listed_cost(base, cfg.num_classes, size)
        tags = sum(bool(c.has_weights) for c in get_arch_pretrained_cfgs(name).values())
        rows.append([
            f'`{name}`', f'`{base}`', f'{params:.2f}', f'{base_params:.2f}', f'{gmacs:.2f}', f'{base_gmacs:.2f}',
            str(size[-1]), str(tags)])
    header = ['model', 'base', 'M params', "base's", 'GMACs', "base's", 'input', 'tags with weights']
    return markdown_table(header, rows, left=2)


def works_with() -> str:
    """What was run with other packages, from the file that works_with.py left."""
    with (RESULTS / 'works_with.csv').open(newline='') as file:
        lines = list(csv.DictReader(file))
    rows = [[f'{line["package"]} {line["version"]}', line['what'],
             ', '.join(f'`{model}`' for model in line['models'].split()), line['tests']] for line in lines]
    runs = Counter((line['date'], line['commit']) for line in lines)
    where = 'Run ' + ', '.join(
        f'{day} at commit {commit}' + (f' ({n} of the lines)' if len(runs) > 1 else '')
        for (day, commit), n in runs.most_common())
    return f'{where}:\n\n{markdown_table(["package", "what", "models", "tests passed"], rows, left=2)}'


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    'README.md': {'headlines': speed_tables.headlines},
    'docs/speed.md': {
        'speed': partial(speed_tables.speed, ['cpu']), 'operator': partial(speed_tables.operator, ['cpu']),
        'deform': partial(speed_tables.deform, ['cpu'])},
    'docs/gpu.md': {
        'speed': partial(speed_tables.speed, ['cuda']), 'operator': partial(speed_tables.operator, ['cuda']),
        'bands': partial(speed_tables.bands, ['cuda'])},
    'docs/segmentation.md': {'segmentation': segmentation_tables.segmentation},
    'docs/evidence.md': {'from_imagenet': from_imagenet.tables},
    'docs/integrations.md': {'works_with': works_with},
    'docs/zoo.md': {'zoo': zoo},
}


def with_tables(page: str, text: str) -> str:
    """The text of a page with its tables as they are now.

    Raises:
        ValueError: The text lacks the markers of a table, or has them twice.
    """
    for name, make in PAGES[page].items():
        start, end = f'<!-- table: {name} -->\n', f'\n<!-- end of table: {name} -->'
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f'{page} must have the markers {start.strip()} and {end.strip()} once each.')
        head, tail = text.partition(start)[0], text.partition(end)[2]
        text = f'{head}{start}{make()}{end}{tail}'
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='compare only')
    parser.add_argument('pages', nargs='*', metavar='PAGE', help=f'of {", ".join(PAGES)} (default: all)')
    args = parser.parse_args()
    unknown = set(args.pages) - set(PAGES)
    if unknown:
        parser.error(f'no tables for {", ".join(sorted(unknown))}; the pages are {", ".join(PAGES)}')
    differing = []
    for page in args.pages or PAGES:
        path = ROOT / page
        old = path.read_text()
        new = with_tables(page, old)
        if new != old:
            differing.append(page)
            if not args.check:
                write_atomically(path, partial(Path.write_text, data=new))
    if args.check:
        print(f'differ from their tables: {", ".join(differing)}: run python -m scripts.checks.doc_tables' if differing
              else 'the tables are up to date')
        return int(bool(differing))
    print(f'wrote the tables of {", ".join(differing) or "no page"}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
