"""The cases of the operator's tests, the inputs they are run on, and their results beside the oracle's.

A new shape is a line in `CASES`; a new backend needs nothing here. `python -m tests.support.cases` prints the largest
error per backend, and `python -m tests.support.cases 300` that on random cases.
"""
import dataclasses
import functools
import math
import random
import sys
import zlib
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor

from fadc_timm.ops import BACKENDS, adaptive_dilated_conv2d, deform_conv2d, list_backends
from fadc_timm.ops.sampled_conv.arguments import ConvArgs
from tests.support.tolerances import TOLERANCES

GAINS = ('low_in', 'low_out', 'high_in', 'high_out')
OPTIONAL = ('mask', 'bias') + GAINS
SOURCES = ('dilation', 'offset')  # of the positions at which the taps read
INPUTS = ('x', 'weight') + SOURCES + OPTIONAL
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OpCase:
    """One call of an operator: without `spacing` of adaptive_dilated_conv2d, with it of deform_conv2d.

    `out` None is the output size of a convolution at dilation 1, or at `spacing`.
    """
    name: str
    x: Tuple[int, int, int, int]
    o: int
    k: int = 3
    stride: Tuple[int, int] = (1, 1)
    padding: Optional[Tuple[int, int]] = None
    groups: int = 1
    dilation_groups: int = 1  # or offset groups
    spacing: Optional[Tuple[int, int]] = None  # the dilation of the convolution whose taps the offsets move
    out: Optional[Tuple[int, int]] = None
    use: Tuple[str, ...] = OPTIONAL
    span: Tuple[float, float] = (-1., 5.)  # lowest and highest dilation or offset
    # In which dtypes Triton's interpreter runs the case outside of the sweep: 'all', 'float32', or 'sweep' for none.
    interpreted: str = 'sweep'

    @property
    def out_size(self) -> Tuple[int, int]:
        if self.out is not None:
            return self.out
        padding = self.padding or (self.k // 2, self.k // 2)
        h, w = ((n + 2 * p - d * (self.k - 1) - 1) // s + 1 for n, p, s, d in zip(
            self.x[2:], padding, self.stride, self.spacing or (1, 1)))
        return h, w

    @property
    def source(self) -> str:
        """The argument that says where the taps read."""
        return 'dilation' if self.spacing is None else 'offset'

    @property
    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        b, c = self.x[:2]
        maps = self.out_size
        return {
            'x': self.x,
            'weight': (self.o, c // self.groups, self.k, self.k),
            self.source: (b, self.dilation_groups * (1 if self.spacing is None else 2 * self.k * self.k), *maps),
            'mask': (b, self.dilation_groups * self.k * self.k, *maps),
            'bias': (self.o,),
            'low_in': (b, c), 'low_out': (b, self.o), 'high_in': (b, c), 'high_out': (b, self.o),
        }


_MAP = (2, 4, 7, 9)  # batch, channels, height, width

CASES = (
    # what is optional
    OpCase('plain', _MAP, 6, use=(), interpreted='float32'),
    OpCase('everything', _MAP, 6, interpreted='all'),
    *(OpCase(f'only_{name}', _MAP, 6, use=(name,)) for name in OPTIONAL),
    OpCase('gains', _MAP, 6, use=GAINS),
    OpCase('low_gains', _MAP, 6, use=('low_in', 'low_out')),
    OpCase('high_gains', _MAP, 6, use=('mask', 'high_in', 'high_out')),
    OpCase('input_gains', _MAP, 6, use=('bias', 'low_in', 'high_in')),
    OpCase('mask_bias', _MAP, 6, use=('mask', 'bias')),
    # kernels, strides, output sizes
    OpCase('k1', _MAP, 6, k=1),
    OpCase('k1_stride2', _MAP, 6, k=1, stride=(2, 2), use=('mask', 'bias'), interpreted='float32'),
    OpCase('k5', _MAP, 6, k=5, interpreted='float32'),
    OpCase('k7', _MAP, 6, k=7),
    OpCase('k7_stride2', (2, 4, 9, 11), 6, k=7, stride=(2, 2), use=('mask', 'bias')),
    OpCase('stride2', _MAP, 6, stride=(2, 2), interpreted='float32'),
    OpCase('stride2_even_map', (2, 4, 8, 6), 6, stride=(2, 2), use=('mask',)),
    OpCase('stride_rows', _MAP, 6, stride=(2, 1)),
    OpCase('stride_columns', _MAP, 6, stride=(1, 3), use=('mask', 'bias')),
    OpCase('padding0', _MAP, 6, padding=(0, 0)),
    OpCase('padding_wide', _MAP, 6, padding=(4, 3), use=('mask', 'bias')),
    OpCase('padding_negative', _MAP, 6, padding=(-1, -2), out=(5, 5)),
    OpCase('padding_mixed', _MAP, 6, padding=(2, -1), stride=(2, 1), out=(4, 5), use=('mask',), interpreted='float32'),
    OpCase('padding_far', _MAP, 6, padding=(-60, -60), out=(5, 5), span=(-62., -52.), use=('mask', 'bias')),
    OpCase('out_smaller', _MAP, 6, out=(3, 4)),
    OpCase('out_larger', _MAP, 6, out=(12, 13)),
    OpCase('out_larger_stride2', _MAP, 6, stride=(2, 2), out=(7, 3), use=('mask',)),
    OpCase('out_one', _MAP, 6, out=(1, 1)),
    # maps
    OpCase('wide_map', (2, 4, 3, 17), 6),
    OpCase('tall_map', (2, 4, 17, 3), 6, k=5, use=('mask', 'bias')),
    OpCase('one_pixel', (16, 4, 1, 1), 6, span=(-0.9, 0.9)),
    OpCase('one_pixel_k7', (16, 4, 1, 1), 6, k=7, span=(-0.3, 0.3)),
    OpCase('one_row', (2, 4, 1, 9), 6, span=(-0.9, 0.9)),
    OpCase('one_column', (2, 4, 9, 1), 6, k=5, use=('mask', 'bias'), span=(-0.9, 0.9)),
    OpCase('dilation_beyond_map', (2, 4, 2, 3), 6, span=(0.2, 9.), interpreted='float32'),
    OpCase('dilation_negative', _MAP, 6, span=(-4., 0.)),
    OpCase('dilation_large', (2, 4, 23, 21), 6, use=('mask', 'bias'), span=(8., 20.)),
    # groups
    OpCase('one_channel', (2, 1, 7, 9), 1),
    OpCase('one_input_channel', (2, 1, 7, 9), 3, use=('mask', 'bias')),
    OpCase('channels', (2, 64, 5, 6), 48),
    OpCase('groups2', _MAP, 6, groups=2, interpreted='float32'),
    OpCase('groups3_of_6', (2, 6, 7, 9), 9, groups=3, use=('mask', 'bias')),
    OpCase('dilation_groups2', _MAP, 6, dilation_groups=2),
    OpCase('dilation_groups_all', _MAP, 6, k=5, dilation_groups=4, use=('mask', 'bias')),
    OpCase('dilation_groups_across', (2, 6, 7, 9), 6, groups=3, dilation_groups=2),
    OpCase('dilation_groups_within', (2, 8, 7, 9), 4, stride=(2, 2), groups=2, dilation_groups=4,
           interpreted='float32'),
    OpCase('depthwise', (2, 6, 7, 9), 6, groups=6, interpreted='all'),
    OpCase('depthwise_plain', (2, 6, 7, 9), 6, groups=6, use=()),
    OpCase('depthwise_input_gains', (2, 6, 7, 9), 6, groups=6, use=('mask', 'low_in', 'high_in')),
    OpCase('depthwise_k7', (2, 6, 7, 9), 6, k=7, groups=6),
    OpCase('depthwise_stride2', (2, 6, 7, 9), 6, k=5, stride=(2, 2), groups=6, use=('mask', 'bias')),
    OpCase('depthwise_dilation_groups', (2, 6, 7, 9), 6, groups=6, dilation_groups=3),
    OpCase('depthwise_one_pixel', (16, 6, 1, 1), 6, groups=6, span=(-0.9, 0.9)),
    OpCase('depthwise_multiplier', _MAP, 8, groups=4),
    OpCase('depthwise_multiplier_plain', _MAP, 12, groups=4, dilation_groups=2, use=('mask', 'bias')),
    # batches
    OpCase('batch1', (1, 4, 7, 9), 6),
    OpCase('batch33', (33, 4, 5, 4), 6),
    OpCase('batch37', (37, 4, 3, 5), 6, groups=2, dilation_groups=2, stride=(2, 2)),
    OpCase('batch37_depthwise', (37, 4, 4, 3), 4, groups=4),
    OpCase('batch0', (0, 4, 7, 9), 6, interpreted='all'),
    OpCase('batch0_plain', (0, 4, 7, 9), 6, use=()),
    OpCase('batch0_depthwise', (0, 4, 7, 9), 4, groups=4, interpreted='float32'),
    # offsets
    OpCase('offset', _MAP, 6, spacing=(1, 1), interpreted='all'),
    OpCase('offset_plain', _MAP, 6, spacing=(1, 1), use=()),
    OpCase('offset_mask', _MAP, 6, spacing=(1, 1), use=('mask', 'bias')),
    OpCase('offset_gains', _MAP, 6, spacing=(2, 1), padding=(2, 1), use=GAINS, interpreted='float32'),
    OpCase('offset_k1', _MAP, 6, k=1, spacing=(1, 1), use=('mask', 'bias')),
    OpCase('offset_k2', _MAP, 6, k=2, spacing=(1, 1), interpreted='float32'),
    OpCase('offset_k4_groups', _MAP, 6, k=4, stride=(1, 2), groups=2, spacing=(1, 1)),
    OpCase('offset_k5', _MAP, 6, k=5, spacing=(1, 1), stride=(2, 2)),
    OpCase('offset_k7', _MAP, 6, k=7, spacing=(1, 1), use=('mask', 'bias'), span=(-4., 4.)),
    OpCase('offset_rectangular', _MAP, 6, spacing=(1, 2), stride=(2, 1), padding=(0, 3), dilation_groups=2,
           interpreted='float32'),
    OpCase('offset_spacing', (2, 4, 13, 15), 6, spacing=(4, 3), padding=(4, 2), stride=(2, 3), use=('mask', 'bias')),
    OpCase('offset_groups2', _MAP, 6, groups=2, dilation_groups=2, spacing=(1, 1), interpreted='float32'),
    OpCase('offset_groups_across', (2, 6, 7, 9), 6, groups=3, dilation_groups=2, spacing=(1, 1)),
    OpCase('offset_groups_all', _MAP, 6, dilation_groups=4, spacing=(1, 1), use=('mask',)),
    OpCase('offset_depthwise', (2, 6, 7, 9), 6, groups=6, dilation_groups=3, spacing=(1, 1), interpreted='float32'),
    OpCase('offset_depthwise_k7', (2, 6, 7, 9), 6, k=7, groups=6, spacing=(1, 1), use=('mask', 'bias')),
    OpCase('offset_depthwise_multiplier', _MAP, 8, groups=4, spacing=(1, 1), stride=(2, 2)),
    OpCase('offset_small', _MAP, 6, spacing=(1, 1), span=(-0.4, 0.4)),
    OpCase('offset_far', _MAP, 6, spacing=(1, 1), span=(-30., 30.), interpreted='float32'),
    OpCase('offset_one_pixel', (16, 4, 1, 1), 6, spacing=(1, 1), span=(-0.9, 0.9)),
    OpCase('offset_one_row', (2, 4, 1, 9), 6, k=5, spacing=(1, 1), use=('mask', 'bias')),
    OpCase('offset_batch1', (1, 4, 7, 9), 6, spacing=(1, 1)),
    OpCase('offset_batch33', (33, 4, 5, 4), 6, spacing=(1, 1)),
    OpCase('offset_batch37', (37, 4, 3, 5), 6, groups=2, dilation_groups=2, spacing=(1, 1), stride=(2, 2)),
    OpCase('offset_batch0', (0, 4, 7, 9), 6, spacing=(1, 1), interpreted='float32'),
)


def random_case(seed: int, offsets: bool = False) -> OpCase:
    """Any call, for sweeps; at least 8 samples, for gains of at least 8 numbers."""
    generator = random.Random(seed)
    groups, dilation_groups = generator.choice([1, 1, 2, 4]), generator.choice([1, 1, 2, 4])
    c = math.lcm(groups, dilation_groups) * generator.randint(1, 3)
    o = generator.choice([c, groups * generator.randint(1, 6)])
    if generator.random() < 0.2:
        groups = o = c
    k = generator.choice([1, 3, 3, 3, 5, 7])
    pair = [(generator.randint(1, 3), generator.randint(-3, 4)) for _ in range(2)]
    low = generator.uniform(-4, 4)
    case = OpCase(
        f'random_{seed}', (generator.randint(8, 12), c, generator.randint(1, 12), generator.randint(1, 12)), o, k=k,
        stride=(pair[0][0], pair[1][0]), padding=generator.choice([None, (pair[0][1], pair[1][1])]), groups=groups,
        dilation_groups=dilation_groups, out=(generator.randint(1, 12), generator.randint(1, 12)),
        use=tuple(name for name in OPTIONAL if generator.random() < 0.6), span=(low, low + generator.uniform(1, 6)))
    if not offsets:
        return case
    spacing, more = ((generator.randint(low, high), generator.randint(low, high)) for low, high in ((1, 3), (0, 2)))
    return with_offsets(case, generator.randint(1, 7), spacing, more)


def with_offsets(case: OpCase, k: int, spacing: Tuple[int, int], more: Tuple[int, int]) -> OpCase:
    """A case of dilations as one of offsets, padded as its map needs for an output, and by some pixels more."""
    rows, cols = (max(0, -(-(d * (k - 1) + 1 - n) // 2)) + m for d, n, m in zip(spacing, case.x[2:], more))
    return dataclasses.replace(
        case, name=f'{case.name}_offset', k=k, spacing=spacing, padding=(rows, cols), out=None)


def off_grid(
        shape: Tuple[int, ...],
        low: float,
        high: float,
        r: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        margin: float = 0.1,
) -> Tensor:
    """Random numbers whose multiples by 1..r miss the integers, the kinks of bilinear sampling, by the margin."""
    # rounded to dtype first, chosen then
    d = (torch.rand(20_000, dtype=torch.float64, generator=generator) * (high - low) + low).to(dtype)
    taps = d.double()[:, None] * torch.arange(1, r + 1)
    d = d[((taps - taps.round()).abs() > margin).all(1)]
    return d[torch.randint(len(d), shape, generator=generator)]


def make_inputs(
        case: OpCase,
        dtype: torch.dtype,
        steps_dtype: Optional[torch.dtype] = None,
        device: str = 'cpu',
) -> Dict[str, Tensor]:
    """The tensors of a case, leaves that require gradients; dilation or offset are float32 beside half dtypes."""
    if steps_dtype is None:
        steps_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    inputs = {}
    for name, shape in case.shapes.items():
        if name in OPTIONAL and name not in case.use:
            continue
        if name == case.source:
            t = off_grid(shape, *case.span, case.k // 2 if name == 'dilation' else 1, steps_dtype, generator)
        elif name == 'mask' or name in GAINS:
            t = torch.rand(shape, dtype=torch.float64, generator=generator) * 2
        else:
            t = torch.randn(shape, dtype=torch.float64, generator=generator)
            if name == 'weight':
                t /= (shape[1] * shape[2] * shape[3]) ** 0.5
        inputs[name] = t.to(device, steps_dtype if name == case.source else dtype).requires_grad_()
    return inputs


def call(case: OpCase, inputs: Dict[str, Tensor], backend: Optional[str]) -> Tensor:
    gains = tuple(inputs.get(name) for name in GAINS)
    tensors = [inputs['x'], inputs['weight'], inputs[case.source], inputs.get('mask'), inputs.get('bias')]
    if case.spacing is None:
        return adaptive_dilated_conv2d(
            *tensors, gains=gains, stride=case.stride, padding=case.padding, groups=case.groups, backend=backend)
    return deform_conv2d(
        *tensors, gains=gains, stride=case.stride, padding=(case.k // 2, case.k // 2) if case.padding is None else
        case.padding, dilation=case.spacing, groups=case.groups, backend=backend)


def checked(case: OpCase, inputs: Dict[str, Tensor]) -> ConvArgs:
    """The call as a backend receives it."""
    low_in, low_out, high_in, high_out = (inputs.get(name) for name in GAINS)
    return ConvArgs(
        inputs['x'], inputs['weight'], inputs[case.source], inputs.get('mask'), inputs.get('bias'),
        (low_in, low_out, high_in, high_out), case.stride, case.padding or (case.k // 2, case.k // 2), case.groups,
        case.spacing)


def why_not(case: OpCase, inputs: Dict[str, Tensor], backend: str) -> Optional[str]:
    """The backend's own reason why it cannot run a case, or None."""
    return BACKENDS[backend].why_not(checked(case, inputs))


def output_gradient(case: OpCase, y: Tensor) -> Tensor:
    """A random gradient for y that is the same number in every dtype."""
    generator = torch.Generator().manual_seed(len(case.name))
    return torch.randint(-64, 65, y.shape, generator=generator).to(y) / 32


def results(case: OpCase, inputs: Dict[str, Tensor], backend: Optional[str]) -> Dict[str, Tensor]:
    """The output, as `out`, and the gradient of each input under the input's name."""
    y = call(case, inputs, backend)
    grads = torch.autograd.grad(y, list(inputs.values()), output_gradient(case, y))
    return {'out': y.detach(), **dict(zip(inputs, grads))}


def oracle_results(case: OpCase, inputs: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """What :func:`results` should be: the reference in float64 on the same values."""
    exact = {name: t.detach().cpu().double().requires_grad_() for name, t in inputs.items()}
    return results(case, exact, 'reference')


@functools.cache
def oracle(case: OpCase, dtype: torch.dtype, steps_dtype: Optional[torch.dtype] = None) -> Dict[str, Tensor]:
    return oracle_results(case, make_inputs(case, dtype, steps_dtype))


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; absolute where zeros are expected. NaN counts as infinite."""
    assert actual.shape == expected.shape, f'got {tuple(actual.shape)}, expected {tuple(expected.shape)}'
    difference = (actual.cpu().double() - expected.cpu()).norm() / (expected.norm().item() or 1.)
    return difference.nan_to_num(nan=float('inf')).item()


def tolerance(name: str, dtype: torch.dtype) -> float:
    return TOLERANCES[dtype]['gain' if name in GAINS else name]


@functools.cache
def steps_rounded(case: OpCase, dtype: torch.dtype) -> Dict[str, float]:
    """How far each result moves, relatively, where each dilation or offset moves by the rounding of its dtype.

    In proportion to the number: a tap 20 pixels away has a position, and so weights of its pixels, four times as coarse
    as one 5 pixels away.
    """
    inputs = make_inputs(case, dtype)
    eps, step = torch.finfo(inputs[case.source].dtype).eps / 2, 2. ** -26  # which float64 resolves, and is linear there
    moved = {name: t.detach().double() for name, t in inputs.items()}
    signs = 2. * torch.randint(2, moved[case.source].shape, generator=torch.Generator().manual_seed(0)) - 1
    moved[case.source] = moved[case.source] * (1 + step * signs.double())
    changed, expected = oracle_results(case, moved), oracle(case, dtype)
    return {name: error(t, expected[name]) * eps / step for name, t in changed.items()}


def conditioned(case: OpCase, inputs: Dict[str, Tensor], expected: Dict[str, Tensor], dtype: torch.dtype) -> List[str]:
    """Names of the results of random cases whose relative error is meaningful.

    Not of so few numbers that all of them may have cancelled to anything; nor are the gradients of the gains, where
    another rounding of the map, the mask and the kernel would change them by more than is tolerated, as a part of the
    kernel has cancelled.
    """
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(dtype).eps
    moved = {}
    for name, t in inputs.items():
        t = t.detach().double()
        if name in ('x', 'weight', 'mask'):
            t = t * (1 + eps * (2 * torch.randint(2, t.shape, generator=generator) - 1))
        moved[name] = t
    changed = oracle_results(case, moved)
    return [name for name, t in expected.items()
            if t.numel() >= 8 and (name not in GAINS or error(changed[name], t) <= tolerance(name, dtype))]


def main(samples: int = 0) -> None:
    """Print the largest error of each backend, on the table or on random cases."""
    torch.set_num_threads(1)
    for dtype in DTYPES:
        largest: Dict[Tuple[str, str], Tuple[float, str]] = {}
        for case in [random_case(seed, offsets) for offsets in (False, True) for seed in range(samples)] or CASES:
            inputs = make_inputs(case, dtype)
            expected = oracle_results(case, inputs)
            for backend in list_backends():
                if backend == 'reference' or why_not(case, inputs, backend):
                    continue
                actual = results(case, inputs, backend)
                for name in conditioned(case, inputs, expected, dtype) if samples else actual:
                    key = 'gain' if name in GAINS else name, backend
                    e = error(actual[name], expected[name])
                    largest[key] = max(largest.get(key, (0., '')), (e, case.name))
        for name in TOLERANCES[dtype]:
            figures = (f'{backend} {e:.1e} {of}' for (of_name, backend), (e, of) in largest.items() if of_name == name)
            print(f'{str(dtype):15} {name:9}', *figures, sep='  ')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
