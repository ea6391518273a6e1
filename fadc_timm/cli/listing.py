"""`fadc-timm list`: the models, their size and cost, and where their weights are."""
import argparse
import difflib
import fnmatch
from typing import Any, List

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg

from ..models._family import list_architectures
from ..models.cost import listed_cost
from ._common import CommandError

__all__ = ['add_parser']


def _list(args: argparse.Namespace) -> int:
    bases = {a.name: a.base for a in list_architectures()}
    archs = [n for n in timm.list_models() if n in bases]
    names = [n for n in timm.list_models(include_tags=True) if n.partition('.')[0] in bases] if args.tags else archs

    def matching(pattern: str) -> List[str]:  # what matches the architecture finds its tags too
        return [n for n in names if fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(n.partition('.')[0], pattern)]

    names = matching(args.filter) or matching(f'*{args.filter}*')
    if not names:
        close = difflib.get_close_matches(args.filter, archs, n=3, cutoff=0.5)
        hint = f"close matches: {', '.join(close)}" if close else f'there are {len(archs)} models'
        raise CommandError(f"no FADC model matches '{args.filter}'; {hint}")
    rows = [('name', 'base', 'params (M)', 'GMACs', 'input', 'licence', 'weights')]
    for name in names:
        arch, cfg = name.partition('.')[0], get_pretrained_cfg(name) or PretrainedCfg()
        params, gmacs, _ = listed_cost(arch, cfg.num_classes, tuple(cfg.input_size))
        weights = 'in the package' if cfg.file else cfg.hf_hub_id or '-'
        rows.append((name, bases[arch], f'{params:.2f}', f'{gmacs:.2f}',
                     'x'.join(map(str, cfg.input_size[1:])), cfg.license or '-', weights))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [text.rjust(w) if 2 <= i <= 4 else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths))]
        print('  '.join(cells).rstrip())
    return 0


def add_parser(commands: Any) -> None:
    p = commands.add_parser('list', help='the models, their size and cost, their licence, and where their weights are',
                            description='List the FADC models, with the input size that the costs are for, the licence '
                                        "of the weights and the Hub repository that they come from. The costs are in a "
                                        'table of the package. A model or tag that a newer timm adds is counted, which '
                                        'takes a second.')
    p.add_argument('filter', nargs='?', default='*', metavar='FILTER',
                   help='wildcards as in timm.list_models, or a part of the name')
    p.add_argument('--tags', action='store_true', help='a row for each pretrained tag')
    p.set_defaults(run=_list)
