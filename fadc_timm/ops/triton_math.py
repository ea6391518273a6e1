"""What Triton kernels of several operators compute, and a kernel of no operator. Importing this needs Triton."""
import functools

import triton
import triton.language as tl

__all__ = ['dot', 'jit_of_any_size', 'probe', 'round_to', 'twice_sigmoid']

# Numbers that follow from the size of the map. Triton compiles a kernel anew for a number that is 1, and for one that
# is a multiple of 16: images of many sizes would have many kernels.
_SIZES = (
    'first_sample', 'first', 'first_block', 'count', 'area', 'chunks', 'out_chunks', 'parts', 'pixels', 'programs',
    'height', 'width', 'out_h', 'out_w', 's_b', 's_h', 'm_b', 'm_h', 'gs_b', 'gs_h', 'gm_b', 'gm_h', 'g_b', 'g_m',
    'g_s', 'g_h', 'n_b')

jit_of_any_size = functools.partial(triton.jit, do_not_specialize=_SIZES)


@triton.jit
def probe(out):
    """Write a 1. Running it shows whether Triton works on this machine."""
    tl.store(out, 1)


@triton.jit
def twice_sigmoid(a, ACT: tl.constexpr):
    """2 * sigmoid(a) if ACT, otherwise a itself."""
    if ACT:
        a = 2. / (1. + tl.exp(-a))
    return a


@triton.jit
def round_to(value, into, UPCAST: tl.constexpr):
    """value in the dtype of the memory `into`. UPCAST: round to bfloat16 here, as the interpreter truncates."""
    if UPCAST:
        if into.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.float32).to(tl.int32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            bits &= -0x10000  # or else the interpreter makes 1e-38 of 0
            value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(into.dtype.element_ty)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b. UPCAST: in float32, because Triton's interpreter has no products in bfloat16."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
