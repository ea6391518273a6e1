"""Bilinear sampling inside Triton kernels: positions, taps, corners; and its transpose.

The tap (t, u), each in -r..r, reads at an integer centre plus (d*t, d*u). So d*t alone determines the offset of the
first pixel and the weight of the second. An axis with t = 0 has no second pixel: its corners are never read. If t and u
are constants of the compiler, as in unrolled loops, the compiler drops the code for these corners.
"""
import triton
import triton.language as tl

__all__ = ['corners', 'dilation_of', 'dilation_slope', 'inside', 'sample', 'scatter', 'slopes', 'tap']

# Larger steps are clamped to this, so that they fit into int32. They point outside of any map before and after.
_FAR = tl.constexpr(2.0 ** 30)


@triton.jit
def dilation_of(o, base, ACT: tl.constexpr):
    """AdaDR's dilation from the output o of its convolution. ACT: 0 none, o is the dilation; 1 abs; 2 relu; 3 zero."""
    d = o
    if ACT == 1:
        d = 1 + tl.where(o < 0, -o, o) * base
    elif ACT == 2:
        d = 1 + tl.where(o < 0, 0., o) * base
    elif ACT == 3:
        d = 1 + (tl.where(o + 1 < 0, 0., o + 1) - 1) * base
    return d


@triton.jit
def dilation_slope(o, base, ACT: tl.constexpr):
    """Derivative of :func:`dilation_of` with respect to o."""
    slope = tl.full(o.shape, 1., dtype=o.dtype)
    if ACT == 1:
        slope = tl.where(o < 0, -base, base).to(o.dtype)
    elif ACT == 2:
        slope = tl.where(o < 0, 0., base).to(o.dtype)
    elif ACT == 3:
        slope = tl.where(o + 1 > 0, base, 0.).to(o.dtype)
    return slope


@triton.jit
def tap(d, t, centre):
    """The first pixel that a tap reads on an axis, and the weight of the second."""
    step = d * t
    near = tl.minimum(tl.maximum(step, -_FAR), _FAR)
    whole = tl.floor(near)
    # minimum and maximum drop NaN, but NaN must reach the output
    return centre + whole.to(tl.int32), tl.where(step == step, near - whole, step)


@triton.jit
def inside(row, col, height, width):
    return (row >= 0) & (row < height) & (col >= 0) & (col < width)


@triton.jit
def _corner(x, row, col, height, width, channels, c, live, ACC: tl.constexpr, INDEX: tl.constexpr):
    pixel = row.to(INDEX) * width + col
    return tl.load(x + pixel[:, None] * channels + c[None, :],
                   mask=inside(row, col, height, width)[:, None] & live, other=0.).to(ACC)


@triton.jit
def corners(x, row, col, t, u, height, width, channels, c, live, ACC: tl.constexpr, INDEX: tl.constexpr):
    """The pixels at two rows and two columns of a sample x (H, W, C): four of (P, C), zero outside the map."""
    v00 = _corner(x, row, col, height, width, channels, c, live, ACC, INDEX)
    v01 = tl.zeros_like(v00)
    v10 = tl.zeros_like(v00)
    v11 = tl.zeros_like(v00)
    if u != 0:
        v01 = _corner(x, row, col + 1, height, width, channels, c, live, ACC, INDEX)
    if t != 0:
        v10 = _corner(x, row + 1, col, height, width, channels, c, live, ACC, INDEX)
        if u != 0:
            v11 = _corner(x, row + 1, col + 1, height, width, channels, c, live, ACC, INDEX)
    return v00, v01, v10, v11


@triton.jit
def sample(v00, v01, v10, v11, f, e):
    """Value between four pixels at the fractions f of a row and e of a column, (P,) each."""
    top, bottom = v00 + e[:, None] * (v01 - v00), v10 + e[:, None] * (v11 - v10)
    return top + f[:, None] * (bottom - top)


@triton.jit
def slopes(v00, v01, v10, v11, f, e, t, u):
    """Derivative of :func:`sample` with respect to the dilation, at the tap (t, u)."""
    down = (v10 - v00) + e[:, None] * ((v11 - v01) - (v10 - v00))
    across = (v01 - v00) + f[:, None] * ((v11 - v10) - (v01 - v00))
    return t * down + u * across


@triton.jit
def _add(into, row, col, height, width, channels, c, live, value, scale, FIXED: tl.constexpr, INDEX: tl.constexpr):
    if FIXED:
        value = (value.to(tl.float64) * scale).to(tl.int64)
    pixel = row.to(INDEX) * width + col
    tl.atomic_add(into + pixel[:, None] * channels + c[None, :], value.to(into.dtype.element_ty),
                  mask=inside(row, col, height, width)[:, None] & live, sem='relaxed')


@triton.jit
def scatter(into, row, col, f, e, t, u, height, width, channels, c, live, value, scale, FIXED: tl.constexpr,
            INDEX: tl.constexpr):
    """Transpose of :func:`sample`: add value (P, C) to its pixels in a sample (H, W, C).

    FIXED: add whole multiples of 1/scale. Atomics add in any order, and the sum of whole numbers does not depend on it.
    """
    f, e = f[:, None], e[:, None]
    _add(into, row, col, height, width, channels, c, live, value * ((1 - f) * (1 - e)), scale, FIXED, INDEX)
    if u != 0:
        _add(into, row, col + 1, height, width, channels, c, live, value * ((1 - f) * e), scale, FIXED, INDEX)
    if t != 0:
        _add(into, row + 1, col, height, width, channels, c, live, value * (f * (1 - e)), scale, FIXED, INDEX)
        if u != 0:
            _add(into, row + 1, col + 1, height, width, channels, c, live, value * (f * e), scale, FIXED, INDEX)
