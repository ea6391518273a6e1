#!/usr/bin/env python3
"""Count the cost of every model and tag of the zoo, and of its base, for `fadc-timm list` and docs/zoo.md.

    python -m scripts.checks.cost_table [--check]

It writes `fadc_timm/data/costs.csv`, in some minutes. --check writes nothing, and fails where the file differs.
"""
import argparse
import fnmatch
import sys
from collections.abc import Iterator

from timm.models import get_arch_pretrained_cfgs

from fadc_timm.models._family import list_architectures
from fadc_timm.models.cost import TABLE, Cost, model_cost
from scripts.results import write_csv

COLUMNS = ('architecture', 'classes', 'input', 'params', 'macs', 'activations')


def keys(pattern: str = '*') -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Architecture, classes and input size of the models and tags that match, each base before what is lifted of it."""
    seen = set()
    for arch in list_architectures():
        if not fnmatch.fnmatch(arch.name, pattern):
            continue
        found = {(cfg.num_classes, tuple(cfg.input_size)) for cfg in get_arch_pretrained_cfgs(arch.name).values()}
        for classes, size in sorted(found):
            for name in (arch.base, arch.name):
                if (name, classes, size) not in seen:
                    seen.add((name, classes, size))
                    yield name, classes, size


def row(arch: str, classes: int, size: tuple[int, ...], cost: Cost) -> dict[str, str]:
    """A row of the table, with whole numbers."""
    return {'architecture': arch, 'classes': str(classes), 'input': 'x'.join(map(str, size)),
            'params': str(round(cost.params * 1e6)), 'macs': str(round(cost.gmacs * 1e9)),
            'activations': str(round(cost.activations * 1e6))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='compare only')
    args = parser.parse_args()
    rows = [row(*key, model_cost(*key)) for key in keys()]
    if not args.check:
        write_csv(TABLE, COLUMNS, rows)
        print(f'wrote {len(rows)} rows to {TABLE}')
        return 0
    lines = [','.join(COLUMNS), *(','.join(r.values()) for r in rows)]
    same = TABLE.read_text().splitlines() == lines
    print('the table is up to date' if same else f'{TABLE} differs: run python -m scripts.checks.cost_table')
    return int(not same)


if __name__ == '__main__':
    sys.exit(main())
