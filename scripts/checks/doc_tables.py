#!/usr/bin/env python3
"""Write the tables of the README between their markers, from the registry and the files that measurements left.

    python -m scripts.checks.doc_tables [--check]

--check writes nothing and fails where the README differs.
"""
import argparse
import csv
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, List

import timm
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

import fadc_timm  # noqa: F401  registers the models
from fadc_timm.models.cost import model_cost
from scripts.bench import tables as speed_tables
from scripts.results import write_atomically
from scripts.segmentation import tables as segmentation_tables

README = Path(__file__).parents[2] / 'README.md'


def _table(header: List[str], rows: List[List[str]]) -> str:
    lines = [header, ['---'] * 2 + ['---:'] * (len(header) - 2), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def zoo() -> str:
    """All architectures with their cost, beside their base's."""
    rows = []
    for name in timm.list_models('*_fadc'):
        base = name.removesuffix('_fadc')
        cfg = get_pretrained_cfg(name, allow_unregistered=False)
        assert cfg is not None
        size = tuple(cfg.input_size)
        params, gmacs, _ = model_cost(name, cfg.num_classes, size)
        base_params, base_gmacs, _ = model_cost(base, cfg.num_classes, size)
        tags = sum(bool(c.has_weights) for c in get_arch_pretrained_cfgs(name).values())
        rows.append([
            f'`{name}`', f'`{base}`', f'{params:.2f}', f'{base_params:.2f}', f'{gmacs:.2f}', f'{base_gmacs:.2f}',
            str(size[-1]), str(tags)])
    return _table(['model', 'base', 'M params', "base's", 'GMACs', "base's", 'input', 'tags with weights'], rows)


def works_with() -> str:
    """What was run with other packages, from the file that checks/works_with.py left."""
    with open(README.parent / 'scripts' / 'results' / 'works_with.csv', newline='') as file:
        lines = list(csv.DictReader(file))
    rows = [[f'{line["package"]} {line["version"]}', line['what'],
             ', '.join(f'`{model}`' for model in line['models'].split()), line['tests']] for line in lines]
    runs = Counter((line['date'], line['commit']) for line in lines)
    where = 'Run ' + ', '.join(
        f'{day} at commit {commit}' + (f' ({n} of the lines)' if len(runs) > 1 else '')
        for (day, commit), n in runs.most_common())
    return f'{where}:\n\n{_table(["package", "what", "models", "tests passed"], rows)}'


TABLES: Dict[str, Callable[[], str]] = {
    'speed': speed_tables.speed, 'operator': speed_tables.operator, 'zoo': zoo,
    'works_with': works_with, 'segmentation': segmentation_tables.segmentation}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='compare only')
    args = parser.parse_args()
    old = new = README.read_text()
    for name, make in TABLES.items():
        start, end = f'<!-- table: {name} -->\n', f'\n<!-- end of table: {name} -->'
        if start not in new or end not in new:
            raise SystemExit(f'README.md has no markers {start.strip()} ... {end.strip()}')
        head, tail = new.partition(start)[0], new.partition(end)[2]
        new = f'{head}{start}{make()}{end}{tail}'
    if args.check:
        print('README.md is up to date' if new == old else 'README.md differs: run scripts/checks/doc_tables.py')
        return int(new != old)
    write_atomically(README, lambda part: part.write_text(new))
    return 0


if __name__ == '__main__':
    sys.exit(main())
