"""Compile the Triton kernels for a GPU that need not be there, and read what the compiler made of them.

    python -m scripts.checks.inspect_kernels [--arch 90] [--only FILTER | --variants | --sizes 120]

For each kernel that some layers and maps launch: its blocks, warps, registers a thread, bytes of stack (spilled
registers), shared memory, how many programs a multiprocessor can hold, and its atomic and matrix instructions. Written
to scripts/results/kernels.csv. Fails if one spills registers or does not fit on a multiprocessor. With --variants other
calls of the same kernels are compiled, which shows that they can be: the interpreter, in which the tests run, accepts
programs that the compiler does not. With --sizes nothing is compiled: it counts the kernels that training the layers of
ResNet-50 needs on square images of so many random sizes.
"""
import argparse
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fadc_timm.ops import triton_support
from fadc_timm.ops.band_mix.triton import operator as band_operator
from fadc_timm.ops.few_outputs import operator as predictor_operator
from fadc_timm.ops.gains import operator as gains_operator
from fadc_timm.ops.sampled_conv.triton import ACTS
from fadc_timm.ops.sampled_conv.triton import operator as conv_operator
from fadc_timm.ops.triton_support import Launch, cdiv
from scripts.results import RESULTS, write_csv

BINARIES = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
POINTERS = {torch.float16: '*fp16', torch.bfloat16: '*bf16', torch.float32: '*fp32', torch.float64: '*fp64',
            torch.int32: '*i32', torch.int64: '*i64'}
HALF, SINGLE = (torch.float16,), (torch.float16, torch.float32)
Launches = list[tuple[Launch, tuple[Tensor | None, ...]]]


@dataclass(frozen=True)
class Layer:
    """A layer that predicts its dilations and, unless act is 'none', leaves the activations to the operator.

    With offsets it predicts these instead, and act is 'none'.
    """
    name: str
    b: int
    c: int
    o: int
    side: int
    stride: int = 1
    k: int = 3
    groups: int = 1
    gains: bool = True
    bias: bool = False
    mask: bool = True
    act: str = 'abs'
    dilation_groups: int = 1
    offsets: bool = False
    deterministic: bool = False
    dtypes: tuple[torch.dtype, ...] = SINGLE

    def run(self, dtype: torch.dtype) -> None:
        """Forward and backward, on shapes alone."""
        b, c, o, taps = self.b, self.c, self.o, self.k ** 2
        side, g = (self.side - 1) // self.stride + 1, self.dilation_groups
        depthwise, act = 1 < self.groups == c == o, ACTS.index(self.act)
        x, weight = empty_map(b, c, self.side, self.side, dtype), empty(o, c // self.groups, self.k, self.k)
        joint = act > 0 and not depthwise
        channels = 2 * taps if self.offsets else 1 + taps * joint
        steps = empty_map(b, g * channels, side, side, dtype if act else torch.float32)
        mask = empty_map(b, g * taps, side, side, dtype) if self.mask and not joint else None
        gains = [empty(b, c if depthwise else c + o) if self.gains else None] * 2
        tensors = x, weight, empty(o) if self.bias else None, steps, mask, *gains
        options = [self.stride] * 2, [self.k // 2] * 2, [1, 1] if self.offsets else [], self.groups
        torch.use_deterministic_algorithms(self.deterministic)
        try:
            y, *parts = conv_operator.two_step_conv2d._init_fn(*tensors, act, 1., act > 0, True, *options)
            conv_operator.two_step_conv2d_backward._init_fn(y, *parts, *tensors, act, 1., act > 0, *options)
        finally:
            torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Bands:
    """A map of which FreqSelect mixes the bands."""
    name: str
    b: int
    c: int
    h: int
    w: int
    count: int = 3
    groups: int = 1
    factors: tuple[int, ...] = (2, 4, 8)
    act: bool = True
    dtypes: tuple[torch.dtype, ...] = SINGLE

    def run(self, dtype: torch.dtype) -> None:
        x = empty_map(self.b, self.c, self.h, self.w, dtype)
        maps = empty_map(self.b, self.groups * self.count, self.h, self.w, dtype)
        maps = maps.unflatten(1, (self.groups, self.count)).transpose(1, 2)
        options = list(self.factors), self.act
        y, means, coefficients = band_operator.mix_bands_triton._init_fn(x, maps, *options)
        band_operator.mix_bands_triton_backward._init_fn(y, means, x, maps, coefficients, *options)


@dataclass(frozen=True)
class Predictor:
    """A convolution with few outputs, as FreqSelect and AdaDR predict by it."""
    name: str
    b: int
    c: int
    side: int
    outputs: int
    k: int = 3
    stride: int = 1
    bias: bool = True
    dtypes: tuple[torch.dtype, ...] = HALF

    def run(self, dtype: torch.dtype) -> None:
        x, weight = empty_map(self.b, self.c, self.side, self.side, dtype), empty(self.outputs, self.c, self.k, self.k)
        bias = empty(self.outputs) if self.bias else None
        options = [self.stride] * 2, [self.k // 2] * 2, [1, 1]
        y, taps = predictor_operator.few_outputs_conv2d._init_fn(x, weight, bias, *options)
        predictor_operator.few_outputs_conv2d_backward._init_fn(y, taps, x, weight, bias, *options)


@dataclass(frozen=True)
class Packed:
    """The weights of convolutions with few outputs, (O, C, k) each, in one launch."""
    name: str
    weights: tuple[tuple[int, int, int], ...]
    dtypes: tuple[torch.dtype, ...] = HALF

    def run(self, dtype: torch.dtype) -> None:
        predictor_operator.pack([empty(o, c, k, k) for o, c, k in self.weights], dtype)


@dataclass(frozen=True)
class Gains:
    """Trunk, BatchNorm and heads that predict AdaKern's gains, from n parts of the mean of a map of c channels."""
    name: str
    b: int
    n: int
    c: int
    width: int
    outputs: int
    parts: int = 2
    bias: bool = False
    means_dtype: torch.dtype = torch.float32
    dtypes: tuple[torch.dtype, ...] = SINGLE
    inference: bool = False  # in one kernel, with a BatchNorm of fixed statistics
    fixed: bool = False  # the statistics of the BatchNorm in training

    def run(self, dtype: torch.dtype) -> None:
        width = self.parts * self.width
        weight, bias = empty(width, self.c, dtype=dtype), empty(width, dtype=dtype) if self.bias else None
        means = empty(self.b, self.n, self.c, dtype=self.means_dtype)
        head = empty(self.outputs, self.width, dtype=dtype), empty(self.outputs, dtype=dtype)
        other = head if self.parts == 2 else (None, None)
        some = empty(width, dtype=dtype)
        if self.inference:
            gains_operator.trunk_and_heads(means, weight, bias, (some,) * 4, 1e-5, *head, *other)
            return
        y, mean = gains_operator.gains_trunk._init_fn(means, weight, bias)
        gains_operator.gains_trunk_backward._init_fn(y, mean, weight, bias)
        _, *of_batch = gains_operator.norm_forward(y, some, some, some, some, not self.fixed, 0.1, 1e-5)
        gains_operator.norm_gradient(y, y, some, some, some, some, of_batch[0], of_batch[1], 1e-5)
        low, high = gains_operator.gains_heads._init_fn(y, *head, *other)
        gains_operator.gains_heads_backward._init_fn(low, high if self.parts == 2 else None, y, head[0], other[0])


Case = Layer | Bands | Predictor | Packed | Gains

LAYERS: tuple[Case, ...] = (
    Layer('resnet50 stage 2', 64, 128, 128, 28),
    Layer('resnet50 stage 3', 64, 256, 256, 14),
    Layer('resnet50 stage 4', 64, 512, 512, 7),
    Layer('resnet50 stage 3, strided', 64, 256, 256, 28, stride=2),
    Layer('resnet50 stage 2, no gains', 64, 128, 128, 28, gains=False),
    Layer('resnext50_32x4d stage 2', 64, 256, 256, 28, groups=32),
    Layer('dense 7x7', 64, 64, 64, 28, k=7, dtypes=HALF),
    Layer('resnet50_dcn stage 2', 64, 128, 128, 28, gains=False, act='none', offsets=True),
    Layer('resnet50_dcn_fadc stage 2', 64, 128, 128, 28, act='none', offsets=True),
    Layer('convnext_tiny stage 2', 64, 192, 192, 28, k=7, groups=192),
    Layer('convnext_tiny stage 4', 64, 768, 768, 7, k=7, groups=768, dtypes=HALF),
    Bands('bands, resnet50 stage 2, strided', 64, 128, 56, 56),
    Bands('bands, resnet50 stage 2', 64, 128, 28, 28),
    Bands('bands, resnet50 stage 4', 64, 512, 7, 7),
    Predictor('FreqSelect in resnet50 stage 2', 64, 128, 28, 3),
    Predictor('AdaDR in resnet50 stage 3, strided', 64, 256, 28, 10, stride=2),
    Predictor('AdaDR in convnext_tiny stage 2', 64, 192, 28, 1, k=7),
    Predictor('mask in convnext_tiny stage 2', 64, 192, 28, 49, k=1),
    Packed('predictors of resnet50 stage 2', ((3, 128, 3), (10, 128, 3))),
    Gains('AdaKern, resnet50 stage 2', 64, 28, 128, 16, 256),
    Gains('AdaKern, resnet50 stage 4', 64, 7, 512, 32, 1024),
    Gains('AdaKern, convnext_tiny stage 4', 64, 7, 768, 48, 768),
    Gains('AdaKern in inference, resnet50 stage 2', 64, 28, 128, 16, 256, inference=True),
    Gains('AdaKern in inference, resnet50 stage 4', 64, 7, 512, 32, 1024, inference=True),
    Gains('AdaKern in inference, convnext_tiny stage 4', 64, 7, 768, 48, 768, inference=True),
)
VARIANTS: tuple[Case, ...] = (
    Layer('bfloat16, bias, no mask', 2, 32, 48, 9, mask=False, bias=True, act='none', dtypes=(torch.bfloat16,)),
    Layer('float64', 2, 16, 16, 7, act='relu', dtypes=(torch.float64,)),
    Layer('one pixel', 1, 1, 1, 1, dtypes=HALF),
    Layer('one channel, no gains', 1, 1, 2, 5, gains=False, act='zero', dtypes=HALF),
    Layer('dilation groups', 2, 12, 6, 7, dilation_groups=3, dtypes=HALF),
    Layer('deterministic', 2, 32, 32, 7, deterministic=True, dtypes=HALF),
    Layer('many positions and pixels', 700, 16, 16, 12_000, act='none', dtypes=HALF),
    Layer('depthwise, bfloat16, bias, no mask', 2, 24, 24, 9, groups=24, mask=False, bias=True, act='none',
          dtypes=(torch.bfloat16,)),
    Layer('depthwise, deterministic', 2, 24, 24, 9, k=7, groups=24, deterministic=True, dtypes=HALF),
    Layer('offsets, bfloat16, no mask', 2, 32, 48, 9, mask=False, act='none', offsets=True, dtypes=(torch.bfloat16,)),
    Layer('offsets, 5x5, groups', 2, 32, 32, 9, k=5, groups=2, dilation_groups=2, act='none', offsets=True,
          dtypes=HALF),
    Layer('offsets, deterministic', 2, 32, 32, 7, act='none', offsets=True, deterministic=True, dtypes=HALF),
    Layer('offsets, depthwise', 2, 24, 24, 9, groups=24, act='none', offsets=True, dtypes=SINGLE),
    Layer('offsets, one pixel', 1, 1, 1, 1, act='none', offsets=True, dtypes=(torch.float64,)),
    Layer('depthwise, one pixel', 1, 2, 2, 1, groups=2, dilation_groups=2, dtypes=(torch.float64,)),
    Bands('bands, one pixel', 1, 1, 1, 1, dtypes=HALF),
    Bands('bands, few pixels', 1, 1, 2, 1, dtypes=(torch.bfloat16, torch.float32)),
    Bands('bands, float64', 2, 12, 9, 14, 4, 2, act=False, dtypes=(torch.float64,)),
    Packed('three predictors', ((3, 192, 3), (1, 192, 7), (49, 192, 1)), (torch.bfloat16, torch.float32)),
    Gains('AdaKern in inference, one pixel', 1, 1, 1, 1, 1, inference=True, dtypes=HALF),
    Gains('AdaKern in inference, one wide part, bfloat16', 2, 130, 40, 130, 70, 1, True, dtypes=(torch.bfloat16,),
          inference=True),
    Gains('AdaKern in inference, float64', 2, 33, 2048, 128, 4096, bias=True, means_dtype=torch.float64,
          dtypes=(torch.float64,), inference=True),
    Gains('AdaKern, one pixel', 1, 1, 1, 1, 1, bias=True, dtypes=HALF, fixed=True),
    Gains('AdaKern, one part, bfloat16', 2, 130, 40, 80, 70, parts=1, bias=True, dtypes=(torch.bfloat16,)),
    Gains('AdaKern, fixed statistics', 700, 3, 48, 48, 70, fixed=True, dtypes=(torch.float32, torch.float64)),
    Gains('AdaKern, float64', 33, 3, 200, 16, 130, means_dtype=torch.float64, dtypes=(torch.float64,)),
    Bands('bands, one factor', 2, 200, 20, 65, 2, factors=(2,), dtypes=HALF),
    Predictor('predictor, bfloat16, no bias', 2, 12, 9, 27, bias=False, dtypes=(torch.bfloat16,)),
    Predictor('predictor, one pixel', 1, 1, 1, 1, k=1, dtypes=(torch.float32, torch.float64)),
)
# of a multiprocessor of compute capability 9.0
REGISTERS, SHARED, MAX_WARPS = 65536, 227 * 1024, 64


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device='meta')


def empty_map(b: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return empty(b, c, h, w, dtype=dtype).to(memory_format=torch.channels_last)


def launches(layer: Case, dtype: torch.dtype) -> Launches:
    """What a layer launches forward and backward, each kernel once: tiles differ in numbers alone."""
    found: Launches = []
    original = triton_support.launch
    triton_support.launch = lambda this, *tensors: found.append((this, tensors))
    try:
        layer.run(dtype)
    finally:
        triton_support.launch = original
    return list({(this.kernel, this.constants): (this, tensors) for this, tensors in found[::-1]}.values())[::-1]


def source(this: Launch, tensors: tuple[Tensor | None, ...]) -> ASTSource:
    """The kernel specialised as at this launch."""
    args = *tensors, *this.numbers, *this.constants
    names, constants_from = this.kernel.arg_names, len(tensors) + len(this.numbers)
    assert len(names) == len(args), f'{this.kernel} has {len(names)} parameters, and is given {len(args)} values'
    signature, values, attributes = {}, {}, {}
    for i, (name, value, parameter) in enumerate(zip(names, args, this.kernel.params)):
        specialised = not parameter.do_not_specialize
        if i >= constants_from or value is None or (isinstance(value, int) and value == 1 and specialised):
            signature[name], values[(i,)] = 'constexpr', value
        elif isinstance(value, Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [['tt.divisibility', 16]]
        elif isinstance(value, float):
            signature[name] = 'fp32'
        else:
            signature[name] = 'i32' if abs(value) < 2 ** 31 else 'i64'
            if value % 16 == 0 and specialised:
                attributes[(i,)] = [['tt.divisibility', 16]]
    return ASTSource(fn=this.kernel, signature=signature, constexprs=values, attrs=attributes)


def _layers_of_resnet50(side: int) -> Iterator[Case]:
    for c, reduction in ((128, 8), (256, 16), (512, 32)):
        for at, stride in ((cdiv(2 * side, reduction), 2), (cdiv(side, reduction), 1)):
            yield Layer('', 2, c, c, at, stride)
            yield Bands('', 2, c, at, at)
            yield Predictor('', 2, c, at, 3)
            yield Predictor('', 2, c, at, 10, stride=stride)


def count_kernels(sides: Iterable[int]) -> int:
    """How many kernels Triton compiles for the layers of ResNet-50 in training, float16, on images of these sides."""
    found = set()
    for case in (case for side in sides for case in _layers_of_resnet50(side)):
        for this, tensors in launches(case, torch.float16):
            kernel = source(this, tensors)
            found.add((this.kernel, *map(str, (kernel.signature, kernel.attrs, kernel.constants))))
    return len(found)


def inspect(this: Launch, tensors: tuple[Tensor | None, ...], arch: int) -> dict[str, Any]:
    compiled = triton.compile(
        source(this, tensors), target=GPUTarget('cuda', arch, 32),
        options={'num_warps': this.num_warps, 'num_stages': this.num_stages})
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(compiled.asm['cubin'])
        f.flush()
        usage, sass = (subprocess.run([BINARIES / 'cuobjdump', flag, f.name], capture_output=True, text=True,
                                      check=True).stdout for flag in ('--dump-resource-usage', '--dump-sass'))
    found = re.search(r'REG:(\d+) STACK:(\d+)', usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    shared = compiled.metadata.shared
    # registers are given out to a warp in units of 256
    a_warp = -(-registers * 32 // 256) * 256
    programs = min(
        REGISTERS // (a_warp * this.num_warps), SHARED // max(shared + 1024, 1), MAX_WARPS // this.num_warps)
    atomics, matrix = (sorted(set(re.findall(pattern, sass))) for pattern in (
        r'\b(?:REDG?|ATOMG?)\.[\w.]+', r'\b(HGMMA|HMMA|DMMA|QGMMA|IMMA)[.\w]*'))
    blocks = dict(zip(this.kernel.arg_names[-len(this.constants):], this.constants))
    return {
        'blocks': ' '.join(f'{n.removeprefix("BLOCK_")}{v}' for n, v in blocks.items() if n.startswith('BLOCK')),
        'warps': this.num_warps, 'registers': registers, 'stack_bytes': stack, 'shared_bytes': shared,
        'programs_a_multiprocessor': programs, 'matrix_instructions': ' '.join(matrix) or 'none',
        'atomics': ' '.join(atomics) or 'none'}


def rows_of(layer: Case, arch: int) -> Iterator[dict[str, Any]]:
    for dtype in layer.dtypes:
        for this, tensors in launches(layer, dtype):
            name = f'{this.kernel.fn.__module__.rpartition(".")[2]} {this.kernel.fn.__name__}'
            yield {'layer': layer.name, 'kernel': name, 'dtype': str(dtype).removeprefix('torch.'), 'arch': arch,
                   'triton': triton.__version__, **inspect(this, tensors, arch)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', type=int, default=90, help='compute capability, 90 for H100 and H200')
    parser.add_argument('--only', default='', help='layers whose name contains this')
    parser.add_argument('--variants', action='store_true', help='compile other calls instead, and write nothing')
    parser.add_argument('--sizes', type=int, default=0, help='count the kernels for so many sizes of images')
    args = parser.parse_args()
    if args.sizes:
        draw = random.Random(0)
        print(count_kernels(draw.randrange(480, 1334) for _ in range(args.sizes)), 'kernels')
        return 0
    rows = []
    for layer in VARIANTS if args.variants else LAYERS:
        for row in rows_of(layer, args.arch) if args.only in layer.name else ():
            print(*row.values(), sep=', ', flush=True)
            rows.append(row)
    if args.variants:
        return 0
    if not args.only:
        write_csv(RESULTS / 'kernels.csv', list(rows[0]), rows)
    failed = [row for row in rows if row['stack_bytes'] or not row['programs_a_multiprocessor']]
    for row in failed:
        print('SPILLS OR DOES NOT FIT', *row.values(), sep=', ')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
