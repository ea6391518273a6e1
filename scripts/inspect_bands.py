"""Compile FreqSelect's Triton kernels for an H100 and read registers, spills, shared memory and matrix instructions.

Needs Triton but no GPU: `python scripts/inspect_bands.py` writes scripts/results/kernels_bands.csv, and fails if a
kernel spills registers or asks for more shared memory than a block of threads can have.
"""
import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict

from _bands_specimens import Specimen, specimens

RESULTS = Path(__file__).parent / 'results' / 'kernels_bands.csv'
SHARED = 227 * 1024  # bytes that a block of threads can have on compute capability 9.0


def _compile(specimen: Specimen) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = specimen.kernel.arg_names
    source = ASTSource(
        specimen.kernel, signature=specimen.signature,
        constexprs={(names.index(name),): value for name, value in specimen.constexprs.items()},
        attrs={(names.index(name),): [['tt.divisibility', 16]] for name in specimen.divisible})
    return triton.compile(source, target=GPUTarget('cuda', 90, 32), options=specimen.options)


def inspect(specimen: Specimen) -> Dict[str, Any]:
    """A row: resources by thread and block, and how many instructions of a kind there are in the program text."""
    import triton.backends.nvidia
    compiled = _compile(specimen)
    tools = Path(triton.backends.nvidia.__file__).parent / 'bin'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(compiled.asm['cubin'])
        f.flush()
        used = subprocess.run(
            [tools / 'cuobjdump', '--dump-resource-usage', f.name], capture_output=True, text=True, check=True).stdout
        text = subprocess.run([tools / 'nvdisasm', '-c', f.name], capture_output=True, text=True, check=True).stdout

    def resource(name: str) -> int:
        found = re.search(rf'{name}:(\d+)', used)
        assert found is not None, used
        return int(found.group(1))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    return {
        **specimen.label, 'registers': resource('REG'), 'stack_bytes': resource('STACK'),
        'shared_bytes': compiled.metadata.shared, 'wgmma': count(r'\bHGMMA'), 'mma': count(r'\bHMMA'),
        'fma': count(r'\bFFMA'), 'loads_128': count(r'\bLDG\.E\.128'), 'loads': count(r'\bLDG'),
        'spill_loads': count(r'\bLDL'), 'spill_stores': count(r'\bSTL')}


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for specimen in specimens():
        rows.append(inspect(specimen))
        print(*rows[-1].values(), flush=True)
    with RESULTS.with_suffix('.tmp').open('w', newline='') as f:
        writer = csv.DictWriter(f, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    RESULTS.with_suffix('.tmp').rename(RESULTS)
    failed = [r for r in rows if r['spill_loads'] or r['spill_stores'] or r['shared_bytes'] > SHARED]
    for row in failed:
        print('spills or too much shared memory:', *row.values(), file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
