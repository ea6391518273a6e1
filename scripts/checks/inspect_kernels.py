"""Compile the Triton kernels for a GPU that need not be there, and read what the compiler made of them.

    python -m scripts.checks.inspect_kernels [--arch 90] [--only FILTER | --variants]

For each kernel, as it is launched for some layers: registers a thread, bytes of stack (spilled registers), shared
memory, matrix instructions, and how many programs a multiprocessor can hold. Written to scripts/results/kernels.csv.
With --variants other calls of the same kernels are compiled, which shows that they can be: the interpreter, in which
the tests run, accepts programs that the compiler does not.
"""
import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fadc_timm.ops.sampled_conv.triton import launch
from fadc_timm.ops.sampled_conv.triton.call import Call
from scripts.results import RESULTS, write_csv

BINARIES = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
POINTERS = {torch.float16: '*fp16', torch.bfloat16: '*bf16', torch.float32: '*fp32', torch.float64: '*fp64',
            torch.int32: '*i32', torch.int64: '*i64'}
HALF, SINGLE = (torch.float16,), (torch.float16, torch.float32)


@dataclass(frozen=True)
class Layer:
    name: str
    b: int
    c: int
    o: int
    side: int
    stride: int = 1
    k: int = 3
    groups: int = 1
    gains: bool = True
    mask: bool = True
    bias: bool = False
    dilation_groups: int = 1
    deterministic: bool = False
    dtypes: tuple[torch.dtype, ...] = SINGLE


LAYERS = (
    Layer('resnet50 stage 2', 32, 128, 128, 28),
    Layer('resnet50 stage 3', 32, 256, 256, 14),
    Layer('resnet50 stage 4', 32, 512, 512, 7),
    Layer('resnet50 stage 3, strided', 32, 256, 256, 28, stride=2),
    Layer('resnet50 stage 2, no gains', 32, 128, 128, 28, gains=False),
    Layer('resnext50_32x4d stage 2', 32, 256, 256, 28, groups=32),
    Layer('dense 7x7', 32, 64, 64, 28, k=7, dtypes=HALF),
    Layer('convnext_tiny stage 2', 64, 192, 192, 28, k=7, groups=192),
    Layer('convnext_tiny stage 4', 64, 768, 768, 7, k=7, groups=768, dtypes=HALF),
)
VARIANTS = (
    Layer('bfloat16, bias, no mask', 2, 32, 48, 9, mask=False, bias=True, dtypes=(torch.bfloat16,)),
    Layer('float64', 2, 16, 16, 7, dtypes=(torch.float64,)),
    Layer('one pixel', 1, 1, 1, 1, dtypes=HALF),
    Layer('one channel, no gains', 1, 1, 2, 5, gains=False, dtypes=HALF),
    Layer('dilation groups', 2, 12, 6, 7, dilation_groups=3, dtypes=HALF),
    Layer('deterministic', 2, 32, 32, 7, deterministic=True, dtypes=HALF),
    Layer('more than 2**31 positions', 70_000, 16, 16, 224, dtypes=HALF),
    Layer('depthwise, bfloat16, bias, no mask', 2, 24, 24, 9, groups=24, mask=False, bias=True,
          dtypes=(torch.bfloat16,)),
    Layer('depthwise, deterministic', 2, 24, 24, 9, k=7, groups=24, deterministic=True, dtypes=HALF),
    Layer('depthwise, one pixel', 1, 2, 2, 1, groups=2, dilation_groups=2, dtypes=(torch.float64,)),
)
# of a multiprocessor of compute capability 9.0
REGISTERS, SHARED, MAX_WARPS = 65536, 227 * 1024, 64


def launches(layer: Layer, dtype: torch.dtype) -> list[tuple[Any, Any, Any, Any, Any]]:
    """What a layer launches forward and backward: kernel, grid, arguments, constants, configuration."""
    b, c, o, k = layer.b, layer.c, layer.o, layer.k
    side, g = (layer.side - 1) // layer.stride + 1, layer.dilation_groups
    depthwise = layer.groups == c > 1

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device='meta')

    weight = empty(b, c, 1, k, k) if depthwise else empty(o, c // layer.groups, k, k)
    mask = empty(b, g * k * k, side, side).to(memory_format=torch.channels_last) if layer.mask else None
    call = Call(
        empty(b, c, layer.side, layer.side).to(memory_format=torch.channels_last),
        empty(b, g, side, side, dtype=torch.float32), mask, weight, [layer.stride] * 2, [k // 2] * 2, layer.groups)
    gains = (empty(b, c), empty(b, o), empty(b, c), empty(b, o)) if layer.gains and not depthwise else (None,) * 4
    found: list[Any] = []
    original, launch.run = launch.run, lambda *args: found.append(args)
    try:
        torch.use_deterministic_algorithms(layer.deterministic)
        y, bias = empty(b, side, side, o), empty(o) if layer.bias else None
        (launch.depthwise_forward if depthwise else launch.dense_forward)(call, bias, gains, y)
        (launch.depthwise_backward if depthwise else launch.dense_backward)(call, y, gains, True, True)
    finally:
        launch.run = original
        torch.use_deterministic_algorithms(False)
    return found


def source(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """The kernel specialised as at a launch with these arguments, which are in the order of its parameters."""
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = constants[name] if name in constants else args[i]
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], values[(i,)] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [['tt.divisibility', 16]]
        else:
            signature[name] = 'i32' if abs(value) < 2 ** 31 else 'i64'
            if value % 16 == 0:
                attributes[(i,)] = [['tt.divisibility', 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)


def inspect(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], config: dict[str, int], arch: int) -> dict:
    options = {n: v for n, v in config.items() if not n.isupper()}
    constants = {**constants, **{n: v for n, v in config.items() if n.isupper()}}
    compiled = triton.compile(source(kernel, args, constants), target=GPUTarget('cuda', arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(compiled.asm['cubin'])
        f.flush()
        usage, sass = (subprocess.run([BINARIES / 'cuobjdump', flag, f.name], capture_output=True, text=True,
                                      check=True).stdout for flag in ('--dump-resource-usage', '--dump-sass'))
    found = re.search(r'REG:(\d+) STACK:(\d+)', usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    warps, shared = options['num_warps'], compiled.metadata.shared
    # registers are given out to a warp in units of 256
    a_warp = -(-registers * 32 // 256) * 256
    programs = min(REGISTERS // (a_warp * warps), SHARED // max(shared + 1024, 1), MAX_WARPS // warps)
    matrix = sorted(set(re.findall(r'\b(HGMMA|HMMA|DMMA|QGMMA|IMMA)[.\w]*', sass)))
    widths = sorted({int(w or 32) for w in re.findall(r'\bLDG\.E(?:\.(\d+))?', sass)}
                    | {int(w or 32) for w in re.findall(r'\bLDGSTS\.E(?:\.BYPASS)?(?:\.LTC128B)?(?:\.(\d+))?', sass)})
    return {'warps': warps, 'registers': registers, 'stack_bytes': stack, 'shared_bytes': shared,
            'programs_a_multiprocessor': programs, 'matrix_instructions': ' '.join(matrix) or 'none',
            'widest_load_bits': widths[-1] if widths else 0,
            'blocks': ' '.join(f'{n.removeprefix("BLOCK_")}{v}' for n, v in config.items() if n.startswith('BLOCK_')),
            'stages': options['num_stages']}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', type=int, default=90, help='compute capability, 90 for H100 and H200')
    parser.add_argument('--only', default='', help='layers whose name contains this')
    parser.add_argument('--variants', action='store_true', help='compile other calls instead, and write nothing')
    args = parser.parse_args()
    rows = []
    for layer in VARIANTS if args.variants else LAYERS:
        if args.only not in layer.name:
            continue
        for dtype in layer.dtypes:
            for kernel, _, arguments, constants, config in launches(layer, dtype):
                name = f'{kernel.fn.__module__.rpartition(".")[2]} {kernel.fn.__name__}'
                row = {'layer': layer.name, 'kernel': name, 'dtype': str(dtype).removeprefix('torch.'),
                       'arch': args.arch, 'triton': triton.__version__,
                       **inspect(kernel, arguments, constants, config, args.arch)}
                print(*row.values(), sep=', ', flush=True)
                rows.append(row)
    if not args.only and not args.variants:
        write_csv(RESULTS / 'kernels.csv', list(rows[0]), rows)


if __name__ == '__main__':
    main()
