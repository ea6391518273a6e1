"""What Triton kernels of several operators compute, and a kernel of no operator. Importing this needs Triton."""
import triton
import triton.language as tl

__all__ = ['dot', 'probe', 'round_to', 'twice_sigmoid']


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
            value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(into.dtype.element_ty)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b. UPCAST: in float32, because Triton's interpreter has no products in bfloat16."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
