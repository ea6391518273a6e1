"""The README's tables of speed, from the CSV files of bench/model.py and bench/op.py."""
from typing import Dict, List, Tuple

from scripts.bench import model as bench_model
from scripts.bench import op as bench_op
from scripts.results import Row, read_rows

__all__ = ['operator', 'speed']

NOT_MEASURED = 'not measured'

_COMPILED = {
    'no': '', 'yes': ', compiled', 'graph': ', in a CUDA graph', 'reduce-overhead': ', compiled to reduce overhead'}


def _table(header: List[str], left: int, rows: List[List[str]]) -> str:
    """A table whose columns but the first `left` are aligned to the right."""
    lines = [header, ['---'] * left + ['---:'] * (len(header) - left), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _groups(rows: List[Row]) -> Dict[Tuple[str, str], List[Row]]:
    """Rows by device and dtype."""
    groups: Dict[Tuple[str, str], List[Row]] = {}
    for row in rows:
        groups.setdefault((row['device'], row['dtype']), []).append(row)
    return groups


def _caption(rows: List[Row]) -> str:
    def of(column: str) -> str:
        return ', '.join(sorted({row[column] for row in rows}))
    device, name = rows[0]['device'].split(': ', 1)
    return (f'{name} ({device}), {of("threads")} threads, {of("dtype")}; torch {of("torch")}, torchvision '
            f'{of("torchvision")}, timm {of("timm")}; commit {of("commit")}; {of("date")}:')


def _ratio(row: Row) -> str:
    if row['what'] == 'import':
        return f'+{float(row["ratio"]):.3f} s'
    return f'{float(row["ratio"]):.2f} ({float(row["ratio_q25"]):.2f} to {float(row["ratio_q75"]):.2f})'


def _value(row: Row) -> str:
    value = float(row['median'])
    return f'{value:.0f} {row["unit"]}' if value >= 1000 else f'{value:.3g} {row["unit"]}'


def _line(case: str, what: str, compiled: str, rows: List[Row], target: str = '') -> List[str]:
    """The line of one case and quantity, from the rows of one device, of which it may have none."""
    found = {r['variant']: r for r in rows if (r['case'], r['what'], r['compile']) == (case, what, compiled)}
    against_eager = what.endswith('/eager')
    plain, today, fadc = (found.get(v) for v in ('plain', 'today', 'fadc'))
    triton = found.get('triton')
    quantity = what.removesuffix('/eager') + _COMPILED[compiled]
    quantity += ', against itself eager' if against_eager else ''
    if fadc is not None:
        target = fadc['target']
    unit = ' s' if what == 'import' else ''
    return [
        case, quantity,
        NOT_MEASURED if plain is None else _ratio(plain) if against_eager else _value(plain),
        '' if what == 'import' or against_eager else NOT_MEASURED if today is None else _ratio(today),
        NOT_MEASURED if fadc is None else _ratio(fadc) + ('' if triton is None else f'; Triton: {_ratio(triton)}'),
        f'<= {target}{unit}' if target else '',
        '' if fadc is None else fadc['met']]


def speed() -> str:
    """The networks: every case of the CPU's table, measured or not, and what else was measured."""
    stored = read_rows(bench_model.OUTPUT)
    header = ['case', 'what', 'plain', "today's way", 'FADC', 'target', 'met']
    known = []
    for c in bench_model.CASES:
        known.append((c.name, c.what, c.compile, '' if c.target is None else f'{c.target:g}'))
        if c.eager_target is not None:
            known.append((c.name, f'{c.what}/eager', c.compile, f'{c.eager_target:g}'))
    groups = _groups(stored)
    parts = []
    for (device, dtype), rows in groups.items():
        wanted = known if device.startswith('cpu') and dtype == 'float32' else []
        others = dict.fromkeys((r['case'], r['what'], r['compile'], '') for r in rows)
        lines = [*wanted, *(o for o in others if o[:3] not in {w[:3] for w in wanted})]
        parts.append(_caption(rows) + '\n\n' + _table(header, 2, [_line(*line[:3], rows, line[3]) for line in lines]))
    if not any(device.startswith('cpu') and dtype == 'float32' for device, dtype in groups):
        parts.insert(0, 'CPU:\n\n' + _table(header, 2, [_line(*line[:3], [], line[3]) for line in known]))
    if not any(device.startswith('cuda') for device, _ in groups):
        parts.append(f'CUDA: {NOT_MEASURED}.')
    return '\n\n'.join(parts)


def operator() -> str:
    """The operator, the layer and its parts by shape, as ratios to the plain convolution."""
    groups = _groups(read_rows(bench_op.OUTPUT))
    parts = []
    for rows in groups.values():
        variants = list(dict.fromkeys(r['variant'] for r in rows if r['variant'] != 'plain'))
        cells = {(r['case'], r['what'], r['variant']): r for r in rows}
        lines = []
        for case, what in dict.fromkeys((r['case'], r['what']) for r in rows):
            plain = cells.get((case, what, 'plain'))
            line = [case, what, NOT_MEASURED if plain is None else _value(plain)]
            for variant in variants:
                row = cells.get((case, what, variant))
                line.append('' if row is None else f'{float(row["ratio"]):.2f}')
            lines.append(line)
        parts.append(_caption(rows) + '\n\n' + _table(['shape', 'what', 'plain', *variants], 2, lines))
    for kind in ('cpu', 'cuda'):
        if not any(device.startswith(kind) for device, _ in groups):
            parts.append(f'{kind.upper()}: {NOT_MEASURED}.')
    return '\n\n'.join(parts)
