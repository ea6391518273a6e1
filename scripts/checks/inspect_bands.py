"""Compile FreqSelect's Triton kernels for a GPU that need not be there, and read what the compiler made of them.

    python -m scripts.checks.inspect_bands [--arch 90] [--only FILTER | --variants]

As inspect_kernels.py does for the operator's: the kernels as they are launched for the maps of some stages, to
scripts/results/kernels_bands.csv. Fails if one spills registers or does not fit on a multiprocessor. With --variants
other calls of the same kernels are compiled, which shows that they can be.
"""
import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from fadc_timm.ops.band_mix import triton as bands
from scripts.checks.inspect_kernels import inspect
from scripts.results import RESULTS, write_csv

HALF, ALL = (torch.float16, torch.bfloat16), (torch.float16, torch.bfloat16, torch.float32)


class Map(NamedTuple):
    """A map and how it is split and weighed."""
    name: str
    b: int
    c: int
    h: int
    w: int
    dtypes: tuple[torch.dtype, ...] = ALL
    weights: int = 3
    groups: int = 1
    factors: tuple[int, ...] = (2, 4, 8)
    memory_format: torch.memory_format = torch.channels_last


MAPS = (
    Map('resnet50 stage 2, strided', 64, 128, 56, 56),
    Map('resnet50 stage 2', 64, 128, 28, 28),
    Map('resnet50 stage 3', 64, 256, 14, 14),
    Map('resnet50 stage 4', 64, 512, 7, 7),
    Map('resnet50 stage 2 at 512', 16, 128, 64, 64, HALF),
    Map('resnet50 stage 3 at 512', 16, 256, 32, 32, HALF),
    Map('convnext_tiny stage 2', 64, 192, 28, 28),
    Map('in two passes', 2, 128, 128, 256),
)
VARIANTS = (
    Map('float64', 2, 16, 7, 7, (torch.float64,)),
    Map('one pixel, one channel', 1, 1, 1, 1),
    Map('contiguous, 4 weights', 2, 20, 14, 9, HALF, 4, memory_format=torch.contiguous_format),
    Map('groups, 4 weights', 2, 24, 33, 12, HALF, 4, 8),
    Map('one filter', 2, 16, 28, 28, HALF, 1, 1, (2,)),
    Map('more than 2**31 elements', 70_000, 128, 28, 28, HALF),
)


def launches(m: Map, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """What is launched forward and backward: kernel, grid, arguments, constants, configuration."""
    x = torch.empty(m.b, m.c, m.h, m.w, dtype=dtype, device='meta').to(memory_format=m.memory_format)
    # as FreqSelect has them, of a convolution
    weights = torch.empty(m.b, m.groups * m.weights, m.h, m.w, dtype=dtype, device='meta').to(
        memory_format=m.memory_format).unflatten(1, (m.groups, m.weights)).transpose(1, 2)
    found: list[tuple[Any, ...]] = []
    original, bands.run = bands.run, lambda *args: found.append(args)
    try:
        y = bands.mix_bands_fused._init_fn(x, weights, list(m.factors))
        bands.mix_bands_fused_backward._init_fn(y, x, weights, list(m.factors))
    finally:
        bands.run = original
    return found


def rows_of(m: Map, arch: int) -> Iterator[dict]:
    for dtype in m.dtypes:
        for kernel, _, arguments, constants, config in launches(m, dtype):
            row = inspect(kernel, arguments, constants, config, arch)
            row['blocks'] = ' '.join(f'{name}{config[name]}' for name in ('WB', 'R', 'IB', 'JB', 'CB'))
            yield {'map': m.name, 'channels': m.c, 'height': m.h, 'width': m.w, 'kernel': kernel.fn.__name__,
                   'pass': constants['PASS'], 'dtype': str(dtype).removeprefix('torch.'), 'arch': arch,
                   'triton': triton.__version__, **row}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', type=int, default=90, help='compute capability, 90 for H100 and H200')
    parser.add_argument('--only', default='', help='maps whose name contains this')
    parser.add_argument('--variants', action='store_true', help='compile other calls instead, and write nothing')
    args = parser.parse_args()
    rows = []
    for m in VARIANTS if args.variants else MAPS:
        for row in rows_of(m, args.arch) if args.only in m.name else ():
            print(*row.values(), sep=', ', flush=True)
            rows.append(row)
    if args.variants:
        return 0
    if not args.only:
        write_csv(RESULTS / 'kernels_bands.csv', list(rows[0]), rows)
    failed = [row for row in rows if row['stack_bytes'] or not row['programs_a_multiprocessor']]
    for row in failed:
        print('SPILLS OR DOES NOT FIT', *row.values(), sep=', ')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
