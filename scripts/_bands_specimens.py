"""Compilations that stand for the launches of FreqSelect's Triton kernels, for scripts that inspect these."""
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import torch

from fadc_timm.ops import _triton_bands
from fadc_timm.ops._frequencies import frequencies

# channels, height and width of FreqSelect's maps: stages 2-4 of ResNet-50 and ConvNeXt-T at 224, ResNet-50 at 512
SHAPES = [
    (128, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7), (192, 28, 28), (384, 14, 14), (768, 7, 7), (128, 64, 64),
    (256, 32, 32), (512, 16, 16)]
LARGE = [(128, 128, 256)]
DTYPES = {torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.float32: 'fp32'}
FACTORS = (2, 4, 8)


class Specimen(NamedTuple):
    """signature and constexprs, by name, are for `triton.compiler.ASTSource`, options for `triton.compile`."""
    kernel: Any
    label: Dict[str, Any]
    signature: Dict[str, str]
    constexprs: Dict[str, Any]
    divisible: List[str]
    options: Dict[str, int]


def _integers(c: int, h: int, w: int, rows: int, cols: int) -> Dict[str, int]:
    """In channels_last; three weights from a convolution in channels_last."""
    known = {'height': h, 'width': w, 'channels': c, 'groups': 1, 'count_h': rows, 'count_w': cols, 'size': rows * cols}
    for name in ('x', 'grad', 'out'):
        known.update({f'{name}_b': c * h * w, f'{name}_c': 1, f'{name}_h': c * w, f'{name}_w': c})
    known.update(weights_b=3 * h * w, weights_m=1, weights_s=3, weights_h=3 * w, weights_w=3)
    return known


def _specimen(kernel: Any, shape: Tuple[int, int, int], dtype: torch.dtype, number: int) -> Specimen:
    import triton.language as tl
    c, h, w = shape
    cpu = torch.device('cpu')
    rows, cols = (frequencies(n, FACTORS, cpu).basis.shape[1] + 1 for n in (h, w))
    factors, precision = _triton_bands.precision(dtype, False)
    config = _triton_bands.default_config(h, w, c, rows, dtype.itemsize == 2)
    options = {name: config.pop(name) for name in ('num_warps', 'num_stages')}
    name = DTYPES[dtype]
    integers = _integers(c, h, w, rows, cols)
    ones = {n: 1 for n, value in integers.items() if value == 1 and n in kernel.arg_names}
    constants: Dict[str, Any] = {
        'FILTERS': len(FACTORS), 'COUNT': 3, 'DT': tl.float16 if factors == torch.float16 else tl.float32,
        'ACC': tl.float32, 'PRECISION': precision, 'PASS': number, **config, **ones}
    basis = {'basis_h': f'*{DTYPES[factors]}', 'basis_w': f'*{DTYPES[factors]}', 'table': '*i32'}
    wide = dict.fromkeys(('filter_h', 'filter_w', 'coefficients', 'shares'), '*fp32')
    signature, divisible = {}, []
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = 'constexpr'
        elif argument in integers:
            signature[argument] = 'i32'
        else:
            signature[argument] = {**basis, **wide}.get(argument, f'*{name}')
        if argument not in constants and integers.get(argument, 16) % 16 == 0:
            divisible.append(argument)
    label = {'kernel': f'bands.{kernel.__name__}', 'pass': number, 'dtype': name, 'channels': c, 'height': h,
             'width': w, 'channel_block': config['CB'], 'warps': options['num_warps']}
    return Specimen(kernel, label, signature, constants, divisible, options)


def specimens() -> Iterator[Specimen]:
    """Of all shapes, dtypes and kernels with the default block sizes."""
    from fadc_timm.ops import _triton_bands_kernels as kernels
    for kernel in (kernels.forward, kernels.backward):
        for dtype in DTYPES:
            for shape in SHAPES:
                yield _specimen(kernel, shape, dtype, 0)
            for shape in LARGE:
                for number in (1, 2):
                    yield _specimen(kernel, shape, dtype, number)
