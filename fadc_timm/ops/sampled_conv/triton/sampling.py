"""Bilinear sampling inside of Triton kernels: positions, taps, corners, and the transposes of these.

A tap t (in -r..r, times a dilation d) lies at a whole centre plus d*t, so its first pixel and the weight of the second
come from d*t alone; the tap 0 has no second pixel. Offsets in memory are int64, as maps may have more than 2^31
elements.

Needs Triton: imported by the `triton` backend when it is first used. With TRITON_INTERPRET=1 in the environment, set
before that, the kernels run on a CPU.
"""
import triton
import triton.language as tl

__all__ = ['corner_values', 'dot', 'locate', 'offset', 'sample', 'scatter', 'slopes', 'tap']

# Steps beyond are clamped, which keeps them in the range of int32: they are outside of any map, and stay there.
_FAR = tl.constexpr(2.0 ** 30)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b, a rounded to the dtype of b. UPCAST: in float32, as the interpreter has no products in bfloat16."""
    a = a.to(b.dtype)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def locate(p, out_h, out_w):
    """Sample, row and column of positions counted over the batch."""
    row = p // out_w
    return row // out_h, row % out_h, p % out_w


@triton.jit
def tap(d, t, centre):
    """First and second pixel of the tap on an axis, and the weight of the second, which is outside where t is zero."""
    step = d * t
    near = tl.minimum(tl.maximum(step, -_FAR), _FAR)
    whole = tl.floor(near)
    first = centre + whole.to(tl.int32)
    # minimum and maximum drop NaN, which is to be seen in the output
    return first, tl.where(t != 0, first + 1, -1), tl.where(step == step, near - whole, step)


@triton.jit
def offset(b, row, col, stride_b, stride_h, stride_w):
    """Of a pixel in memory, in elements: int64."""
    return b.to(tl.int64) * stride_b + row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w


@triton.jit
def _inside(row, col, height, width):
    return (row >= 0) & (row < height) & (col >= 0) & (col < width)


@triton.jit
def _corner(x, b, row, col, height, width, stride_b, stride_h, stride_w, channel, live, ACC: tl.constexpr):
    pixel = offset(b, row, col, stride_b, stride_h, stride_w)
    inside = _inside(row, col, height, width)
    return tl.load(x + pixel[:, None] + channel[None, :], mask=inside[:, None] & live, other=0.).to(ACC)


@triton.jit
def corner_values(x, b, row, row1, col, col1, height, width, stride_b, stride_h, stride_w, channel, live,
                  ACC: tl.constexpr):
    """The pixels at two rows and two columns, (P,) each: four of (P, C), zero outside of the map."""
    v00 = _corner(x, b, row, col, height, width, stride_b, stride_h, stride_w, channel, live, ACC)
    v01 = _corner(x, b, row, col1, height, width, stride_b, stride_h, stride_w, channel, live, ACC)
    v10 = _corner(x, b, row1, col, height, width, stride_b, stride_h, stride_w, channel, live, ACC)
    v11 = _corner(x, b, row1, col1, height, width, stride_b, stride_h, stride_w, channel, live, ACC)
    return v00, v01, v10, v11


@triton.jit
def sample(v00, v01, v10, v11, f, e):
    """Value between four pixels at the fractions f of a row and e of a column, (P,) each."""
    top, bottom = v00 + e[:, None] * (v01 - v00), v10 + e[:, None] * (v11 - v10)
    return top + f[:, None] * (bottom - top)


@triton.jit
def slopes(v00, v01, v10, v11, f, e, t, u):
    """Derivative of :func:`sample` for the dilation, of which the tap (t, u) is that many away."""
    down = (v10 - v00) + e[:, None] * ((v11 - v01) - (v10 - v00))
    across = (v01 - v00) + f[:, None] * ((v11 - v10) - (v01 - v00))
    return t * down + u * across


@triton.jit
def _add(into, b, row, col, height, width, stride_b, stride_h, stride_w, channel, live, value, scale,
         FIXED: tl.constexpr):
    pixel = offset(b, row, col, stride_b, stride_h, stride_w)
    inside = _inside(row, col, height, width)
    if FIXED:
        value = (value.to(tl.float64) * scale).to(tl.int64)
    tl.atomic_add(into + pixel[:, None] + channel[None, :], value, mask=inside[:, None] & live, sem='relaxed')


@triton.jit
def scatter(into, b, row, row1, col, col1, f, e, height, width, stride_b, stride_h, stride_w, channel, live, value,
            scale, FIXED: tl.constexpr):
    """Transpose of :func:`sample`: add value (P, C) to its four pixels. FIXED: as whole multiples of 1/scale.

    The order in which atomics add is not determined; whole numbers add up to the same in any order.
    """
    f, e = f[:, None], e[:, None]
    top, bottom = value * (1 - f), value * f
    _add(into, b, row, col, height, width, stride_b, stride_h, stride_w, channel, live, top * (1 - e), scale, FIXED)
    _add(into, b, row, col1, height, width, stride_b, stride_h, stride_w, channel, live, top * e, scale, FIXED)
    _add(into, b, row1, col, height, width, stride_b, stride_h, stride_w, channel, live, bottom * (1 - e), scale,
         FIXED)
    _add(into, b, row1, col1, height, width, stride_b, stride_h, stride_w, channel, live, bottom * e, scale, FIXED)
