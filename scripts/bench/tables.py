"""Tables of speed for README.md, docs/speed.md and docs/gpu.md, from the CSV files of the three benchmarks."""
from collections.abc import Sequence

from fadc_timm._writing import markdown_table
from scripts.bench import bands as bench_bands
from scripts.bench import model as bench_model
from scripts.bench import op as bench_op
from scripts.results import Row, read_rows

__all__ = ['bands', 'deform', 'headlines', 'operator', 'speed']

NOT_MEASURED = 'not measured'
KINDS = ('cpu', 'cuda')

_COMPILED = {
    'no': '', 'yes': ', compiled', 'graph': ', in a CUDA graph', 'reduce-overhead': ', compiled to reduce overhead'}


def _kind(device: str) -> str:
    """'cpu' or 'cuda', of a device such as 'cuda: NVIDIA H100'."""
    return device.partition(':')[0]


def _groups(rows: list[Row], kinds: Sequence[str]) -> dict[tuple[str, str], list[Row]]:
    """Rows of these kinds of device, by device and dtype."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if _kind(row['device']) in kinds:
            groups.setdefault((row['device'], row['dtype']), []).append(row)
    return groups


def _not_measured(groups: dict[tuple[str, str], list[Row]], kinds: Sequence[str]) -> list[str]:
    """A line for each kind of device without rows."""
    measured = {_kind(device) for device, _ in groups}
    return [f'{kind.upper()}: {NOT_MEASURED}.' for kind in kinds if kind not in measured]


def _caption(rows: list[Row]) -> str:
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


def _line(
        case: str, what: str, compiled: str, rows: list[Row], target: str = '', with_triton: bool = False) -> list[str]:
    """The line of one case and quantity, from the rows of one device, which may lack some of its variants or all."""
    found = {r['variant']: r for r in rows if (r['case'], r['what'], r['compile']) == (case, what, compiled)}
    against_eager = what.endswith('/eager')
    plain, today, fadc, triton = (found.get(v) for v in ('plain', 'today', 'fadc', 'triton'))
    quantity = what.removesuffix('/eager') + _COMPILED[compiled]
    quantity += ', against itself eager' if against_eager else ''
    if fadc is not None:
        target = fadc['target']
    unit = ' s' if what == 'import' else ''

    def ratio(row: Row | None) -> str:
        return NOT_MEASURED if row is None else _ratio(row)

    met = [row['met'] for row in (fadc, triton) if row is not None]
    return [
        case, quantity,
        NOT_MEASURED if plain is None else _ratio(plain) if against_eager else _value(plain),
        '' if what == 'import' or against_eager else ratio(today),
        ratio(fadc), *([ratio(triton)] if with_triton else []),
        f'<= {target}{unit}' if target else '',
        met[0] if len(set(met)) == 1 else ', '.join(met)]


def _known(cases: Sequence[bench_model.Case]) -> list[tuple[str, str, str, str]]:
    """Case, quantity, compile and target of each line that a table of cases wants."""
    known = []
    for c in cases:
        known.append((c.name, c.what, c.compile, '' if c.target is None else f'{c.target:g}'))
        if c.eager_target is not None:
            known.append((c.name, f'{c.what}/eager', c.compile, f'{c.eager_target:g}'))
    return known


# The dtype that the targets of a kind of device are for, and its cases.
_WANTED = {'cpu': ('float32', bench_model.CASES), 'cuda': ('float16', bench_model.CUDA_CASES)}


def speed(kinds: Sequence[str] = KINDS) -> str:
    """The networks on these kinds of device: every case of the benchmark's table, and whatever else was measured."""
    header = ['case', 'what', 'plain', 'without this package', 'FADC', 'target', 'met']
    groups = _groups(read_rows(bench_model.OUTPUT), kinds)
    parts = []
    for (device, dtype), rows in groups.items():
        dtype_of_targets, cases = _WANTED[_kind(device)]
        wanted = _known(cases) if dtype == dtype_of_targets else []
        others = dict.fromkeys((r['case'], r['what'], r['compile'], '') for r in rows)
        lines = [*wanted, *(o for o in others if o[:3] not in {w[:3] for w in wanted})]
        triton = any(r['variant'] == 'triton' for r in rows)
        columns = [*header[:5], 'FADC, `triton`', *header[5:]] if triton else header
        parts.append(_caption(rows) + '\n\n' + markdown_table(
            columns, [_line(*line[:3], rows, line[3], triton) for line in lines], left=2))
    if 'cpu' in kinds and not any(_kind(device) == 'cpu' and dtype == 'float32' for device, dtype in groups):
        parts.insert(0, 'CPU:\n\n' + markdown_table(
            header, [_line(*line[:3], [], line[3]) for line in _known(bench_model.CASES)], left=2))
        kinds = [kind for kind in kinds if kind != 'cpu']
    return '\n\n'.join(parts + _not_measured(groups, kinds))


# Lines of README.md: where, case, quantity and compile.
_HEADLINES = (
    ('cpu', 'resnet50_fadc 4x224', 'inference', 'no'), ('cpu', 'resnet50_fadc 4x224', 'train', 'no'),
    ('cpu', 'convnext_tiny_fadc 4x224', 'inference', 'no'), ('cpu', 'convnext_tiny_fadc 2x224', 'train', 'no'),
    *(('cuda', case, what, compiled) for compiled in ('no', 'graph')
      for case in ('resnet50_fadc 64x224', 'convnext_tiny_fadc 64x224') for what in ('inference', 'train')),
    ('cuda', 'resnet50_fadc 64x224', 'memory', 'no'))


def headlines() -> str:
    """Some lines of :func:`speed`, wins and losses, with medians alone: each of the machine that was measured last."""
    groups = _groups(read_rows(bench_model.OUTPUT), KINDS)
    lines = []
    for kind, case, what, compiled in _HEADLINES:
        measured = []
        for (device, dtype), rows in groups.items():
            found = {r['variant']: r for r in rows if (r['case'], r['what'], r['compile']) == (case, what, compiled)}
            if _kind(device) == kind and 'plain' in found:
                measured.append((found['plain']['date'], device, dtype, found))
        if measured:
            _, device, dtype, found = max(measured, key=lambda m: m[0])
            ratios = (found.get(variant) for variant in ('today', 'fadc'))
            lines.append([
                f'{case}, {what}{_COMPILED[compiled]}', f'{device.partition(": ")[2]}, {dtype}', _value(found['plain']),
                *('' if r is None else f'{float(r["ratio"]):.2f}' for r in ratios)])
    return markdown_table(['model, batch and size', 'machine', 'plain', 'without this package', 'FADC'], lines, left=2)


def _shapes(rows: list[Row], base: str) -> str:
    """Every variant by shape, as ratios to the variant `base`, whose time is the third column."""
    variants = list(dict.fromkeys(r['variant'] for r in rows if r['variant'] != base))
    cells = {(r['case'], r['what'], r['variant']): r for r in rows}
    lines = []
    for case, what in dict.fromkeys((r['case'], r['what']) for r in rows):
        first = cells.get((case, what, base))
        line = [case, what, NOT_MEASURED if first is None else _value(first)]
        for variant in variants:
            row = cells.get((case, what, variant))
            line.append('' if row is None else f'{float(row["ratio"]):.2f}')
        lines.append(line)
    return _caption(rows) + '\n\n' + markdown_table(['shape', 'what', base, *variants], lines, left=2)


def _is_deform(row: Row) -> bool:
    return row['case'].startswith(f'{bench_op.DEFORM} ')


def operator(kinds: Sequence[str] = KINDS) -> str:
    """The operator, the layer and its parts by shape, as ratios to the plain convolution."""
    groups = _groups([row for row in read_rows(bench_op.OUTPUT) if not _is_deform(row)], kinds)
    return '\n\n'.join([_shapes(rows, 'plain') for rows in groups.values()] + _not_measured(groups, kinds))


def deform(kinds: Sequence[str] = KINDS) -> str:
    """Deformable convolution by shape, as ratios to torchvision's operator."""
    groups = _groups(list(filter(_is_deform, read_rows(bench_op.OUTPUT))), kinds)
    return '\n\n'.join(
        [_shapes(rows, 'torchvision.ops') for rows in groups.values()] + _not_measured(groups, kinds))


def bands(kinds: Sequence[str] = KINDS) -> str:
    """FreqSelect's band mix by shape, as ratios to a copy of the map."""
    groups = _groups(read_rows(bench_bands.OUTPUT), kinds)
    return '\n\n'.join([_shapes(rows, 'copy') for rows in groups.values()] + _not_measured(groups, kinds))
