#!/usr/bin/env python3
"""Time of the operator, of the layer and of its parts, on the shapes of three networks, against the plain convolution.

    python -m scripts.bench.op [--shapes 'resnet50*'] [--size 512] [--device cuda] [--amp float16] [--check]

Everything is compared with `F.conv2d` of the same shape. FADC parameters are off the identity, and the inputs of the
operator are what such a layer makes: `op NAME` is the operator with gains and mask on each backend that can run the
case (the oracle aside), `layer` is `FADConv2d`, `layer today` the same function as everyone runs it today
(bench/today.py), `freq_select` is that module, `low_pass FORM` its filters; and `roofline`, of the operator forward,
is what its products would take at the speed of a large matrix product, or its bytes at that of a copy, measured in the
same run, whichever is longer. What: forward, or forward+backward with the gradients of the inputs and of the
parameters. Rows go to scripts/results/bench_op.csv, as those of bench/model.py.

The shapes of `resnet50_dcn` are those of deformable convolution, with offsets and a mask as in DCNv2. Everything there
is compared with torchvision's own operator, the variant `torchvision.ops`: `plain` is the convolution, `deform NAME`
our operator on each backend, and `deform NAME gains` the same with AdaKern's gains.
"""
import argparse
import fnmatch
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn

from fadc_timm import FADConv2d
from fadc_timm.ops import adaptive_dilated_conv2d, deform_conv2d, list_backends, low_pass
from scripts.bench.measure import Clock, add_options, environment, formats_to_try, interleave, pick_format, run_jobs
from scripts.bench.subjects import AMP_DTYPES, FORMATS, Setting, Step, leave_identity, place
from scripts.bench.today import make_today
from scripts.results import RESULTS, Row, make_rows

OUTPUT = RESULTS / 'bench_op.csv'
FORMS = ('fft', 'matmul')
WHAT = ('forward', 'forward+backward')


class Shape(NamedTuple):
    """A convolution of a network: channels in and out, side of its input, in the table for images of 224x224."""
    net: str
    channels: int
    side: int
    stride: int = 1
    kernel_size: int = 3
    groups: int = 1
    deform: bool = False

    @property
    def name(self) -> str:
        return f'{self.net} {self.channels}@{self.side}' + (f' s{self.stride}' if self.stride > 1 else '')


SHAPES = (
    *(Shape('resnet50', c, n, s) for c, n, s in (
        (128, 56, 2), (128, 28, 1), (256, 28, 2), (256, 14, 1), (512, 14, 2), (512, 7, 1))),
    *(Shape('resnext50_32x4d', c, n, s, groups=32) for c, n, s in (
        (256, 56, 2), (256, 28, 1), (512, 28, 2), (512, 14, 1), (1024, 14, 2), (1024, 7, 1))),
    *(Shape('convnext_tiny', c, n, kernel_size=7, groups=c) for c, n in ((192, 28), (384, 14), (768, 7))),
)

# of deformable convolution
DEFORM = 'resnet50_dcn'
DEFORM_SHAPES = tuple(s._replace(net=DEFORM, deform=True) for s in SHAPES if s.net == 'resnet50')
# The largest ratios to torchvision's operator.
DEFORM_TARGETS = {'forward': {'deform gather': 1 / 3}, 'forward+backward': {'deform gather': 1 / 5}}

SMALL = 224
# sides of the matrices, and elements of the vector, whose product and copy are timed for the roofline
MATRIX, VECTOR = {'cpu': 1024, 'cuda': 8192}, {'cpu': 2 ** 25, 'cuda': 2 ** 29}

Function = Callable[..., Tensor | list[Tensor]]
Called = tuple[Function, list[Tensor | None]]  # a function, and what it is called with and differentiated for


def make_layer(shape: Shape) -> FADConv2d:
    """The layer in place of the convolution, off the identity."""
    layer = FADConv2d(
        shape.channels, shape.channels, shape.kernel_size, shape.stride, shape.kernel_size // 2, groups=shape.groups)
    leave_identity(layer, size=shape.side)
    return layer.eval()


def runs(function: Function, tensors: list[Tensor | None], setting: Setting) -> bool:
    """Whether a backend can run the case."""
    try:
        with torch.no_grad(), setting.autocast():
            function(*tensors)
    except NotImplementedError:
        return False
    return True


def functions(shape: Shape, batch: int, setting: Setting, memory_format: str) -> dict[str, Called]:
    """What is measured, by variant."""
    torch.manual_seed(0)
    layer, x = make_layer(shape), torch.randn(batch, shape.channels, shape.side, shape.side)
    layer_today, _ = place(make_today(layer), x, setting.device, memory_format)
    placed, x = place(layer, x, setting.device, memory_format)
    assert isinstance(placed, FADConv2d)
    layer, padding, stride = placed, shape.kernel_size // 2, shape.stride
    fs, kern, dr = layer.freq_select, layer.ada_kern, layer.ada_dr
    assert fs is not None and kern is not None and dr is not None
    with torch.no_grad():
        selected = fs(x)
        maps = [selected, layer.weight, *dr(selected), layer.bias, *kern(selected)]

    made: dict[str, Called] = {
        'plain': (lambda x, w, b: F.conv2d(x, w, b, stride, padding, 1, shape.groups), [x, layer.weight, layer.bias])}
    for name in list_backends():
        def operator(*t: Tensor, name: str = name) -> Tensor:
            return adaptive_dilated_conv2d(
                *t[:5], gains=(t[5], t[6], t[7], t[8]), stride=stride, padding=padding, groups=shape.groups,
                backend=name)

        if name != 'reference' and runs(operator, maps, setting):
            made[f'op {name}'] = operator, maps
    modules: dict[str, nn.Module] = {'layer today': layer_today, 'layer': layer, 'freq_select': fs}
    for name, module in modules.items():
        # the module has its parameters, they are named to be differentiated for
        made[name] = (lambda x, *_, module=module: module(x)), [x, *module.parameters()]
    for form in FORMS:
        made[f'low_pass {form}'] = functools.partial(low_pass, factors=list(fs.bands), form=form), [x]
    return made


def deform_functions(shape: Shape, batch: int, setting: Setting, memory_format: str) -> dict[str, Called]:
    """As :func:`functions`, of deformable convolution."""
    torch.manual_seed(0)
    c, k, stride, padding = shape.channels, shape.kernel_size, shape.stride, shape.kernel_size // 2
    out = (shape.side - 1) // stride + 1
    # offsets of a few pixels, as a trained layer has them
    made_of = (
        torch.randn(batch, c, shape.side, shape.side),
        torch.randn(c, c // shape.groups, k, k) / (c // shape.groups * k * k) ** 0.5,
        2 * torch.randn(batch, 2 * k * k, out, out), 2 * torch.randn(batch, k * k, out, out).sigmoid())
    x, weight, offset, mask = (t.to(setting.device, memory_format=FORMATS[memory_format]) for t in made_of)
    gains = [2 * torch.randn(batch, c, device=setting.device).sigmoid() for _ in range(4)]

    made: dict[str, Called] = {
        'torchvision.ops': (lambda x, w, o, m: torchvision.ops.deform_conv2d(
            x, o, w, stride=stride, padding=padding, mask=m), [x, weight, offset, mask]),
        'plain': (lambda x, w: F.conv2d(x, w, None, stride, padding, 1, shape.groups), [x, weight])}
    for name in list_backends():
        def operator(*t: Tensor, name: str = name) -> Tensor:
            gains = (t[4], t[5], t[6], t[7]) if t[4:] else None
            return deform_conv2d(
                *t[:4], gains=gains, stride=stride, padding=padding, groups=shape.groups, backend=name)

        if name != 'reference' and runs(operator, [x, weight, offset, mask], setting):
            made[f'deform {name}'] = operator, [x, weight, offset, mask]
            made[f'deform {name} gains'] = operator, [x, weight, offset, mask, *gains]
    return made


@functools.cache
def machine(setting: Setting) -> tuple[float, float]:
    """Multiply-adds and bytes that the device can do in a millisecond."""
    dtype = AMP_DTYPES[setting.amp] if setting.amp else torch.float32
    clock, n = Clock(setting.device), MATRIX[setting.device]
    a, b = (torch.randn(n, n, device=setting.device, dtype=dtype) for _ in range(2))
    x = torch.ones(VECTOR[setting.device], device=setting.device, dtype=dtype)
    y = torch.empty_like(x)
    product, copy = (min(clock(step) for _ in range(10)) for step in (lambda: a @ b, lambda: y.copy_(x)))
    return n ** 3 / product, 2 * x.nbytes / copy


def roofline(shape: Shape, batch: int, setting: Setting) -> float:
    """Milliseconds of the operator forward, with gains and mask, where nothing but products or bytes counts."""
    k, out = shape.kernel_size, (shape.side - 1) // shape.stride + 1
    depthwise = shape.groups == shape.channels
    weights = shape.channels ** 2 // shape.groups
    multiply_adds = batch * out ** 2 * weights * (k ** 2 + (not depthwise))
    size = AMP_DTYPES[setting.amp].itemsize if setting.amp else 4
    maps = batch * (shape.channels * (shape.side ** 2 + out ** 2) + k ** 2 * out ** 2)
    nbytes = size * (maps + weights * k ** 2) + 4 * batch * out ** 2  # the dilation is float32
    products, copies = machine(setting)
    return max(multiply_adds / products, nbytes / copies)


def make_step(called: Called, what: str, setting: Setting) -> Step:
    """One call, or one call and the gradients of all tensors."""
    function, tensors = called
    tensors = [t if t is None or isinstance(t, nn.Parameter) else t.detach().clone().requires_grad_() for t in tensors]

    def forward() -> object:
        with torch.inference_mode(), setting.autocast():
            return function(*tensors)

    def outputs() -> tuple[Tensor, ...]:
        with setting.autocast():
            y = function(*tensors)
        return (y,) if isinstance(y, Tensor) else tuple(y)

    if what == 'forward':
        return forward
    inputs = [t for t in tensors if t is not None]
    grads = [torch.randn_like(y) for y in outputs()]
    return lambda: torch.autograd.grad(outputs(), inputs, grads)


def measure(shape: Shape, what: str, args: argparse.Namespace) -> list[Row]:
    setting = Setting(args.device, args.amp)
    clock = Clock(setting.device)
    make_functions = deform_functions if shape.deform else functions
    made = {f: make_functions(shape, args.batch, setting, f) for f in formats_to_try(args.memory_format)}
    formats: dict[str, str] = {}
    steps: dict[str, Step] = {}
    for variant in next(iter(made.values())):
        def make(memory_format: str, variant: str = variant) -> Step:
            return make_step(made[memory_format][variant], what, setting)

        formats[variant], steps[variant] = pick_format(make, clock, list(made))
    samples = interleave(steps, clock, args.repeats, args.max_time, min_sample=args.min_sample)
    if what == 'forward' and not shape.deform:
        samples['roofline'] = [roofline(shape, args.batch, setting)] * len(samples['plain'])
    targets = DEFORM_TARGETS[what] if shape.deform and setting.device == 'cpu' else {}
    return make_rows(f'{shape.name} b{args.batch}', what, samples, formats, environment(setting), targets)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', nargs='+', default=['*'], help="name patterns, 'resnet50*' or '*@14'")
    parser.add_argument('--what', nargs='+', default=WHAT, choices=WHAT)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--size', type=int, default=SMALL, help='side of the images, a multiple of 32 (default: 224)')
    parser.add_argument(
        '--min-sample', type=float, default=10., metavar='MS', help='shorter steps are repeated to this (default: 10)')
    add_options(parser, repeats=11, max_time=5.)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.size < 32 or args.size % 32:
        parser.error(f'--size must be a multiple of 32, got {args.size}')
    table = [s._replace(side=s.side * args.size // SMALL) for s in (*SHAPES, *DEFORM_SHAPES)]
    shapes = [s for s in table if any(fnmatch.fnmatch(s.name, pattern) for pattern in args.shapes)]
    if not shapes:
        names = ', '.join(s.name for s in table)
        raise SystemExit(f'No shape is called {" or ".join(args.shapes)}; the shapes are {names}.')
    jobs = [(f'{s.name}, {what}', functools.partial(measure, s, what, args)) for s in shapes for what in args.what]
    return run_jobs(jobs, args.output or OUTPUT, args.check, args.margin)


if __name__ == '__main__':
    sys.exit(main())
