"""Bilinear sampling inside Triton kernels: positions, taps, corners; and its transpose.

A tap reads at a pixel plus a step, so the step alone determines on each axis how far the first of two pixels is away
and the weight of the second. With offsets the step is the tap's offset. With a dilation d the tap (t, u), each in
-r..r, has the step (d*t, d*u). Then an axis with t = 0 has no second pixel: its corners are never read. If t and u are
constants of the compiler, as in unrolled loops, the compiler drops the code for these corners.
"""
import triton
import triton.language as tl

__all__ = [
    'corners', 'dilation_of', 'dilation_slope', 'dilations', 'inside', 'pixels', 'sample', 'scatter', 'slopes']

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
def dilations(steps, alive, base, OFFSETS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr):
    """The dilation of each position (P,), whose address is steps; with OFFSETS, which are read tap by tap, zeros."""
    d = tl.zeros(steps.shape, dtype=ACC)
    if not OFFSETS:
        d = dilation_of(tl.load(steps, mask=alive, other=0.).to(ACC), base, ACT)
        d = tl.minimum(tl.maximum(d, -_FAR), _FAR) + (d - d)  # what is not finite is NaN, not far
    return d


@triton.jit
def _neighbours(step, pixel):
    """The first pixel that a tap reads on an axis, and the weight of the second."""
    near = tl.minimum(tl.maximum(step, -_FAR), _FAR)
    whole = tl.floor(near)
    # minimum and maximum drop NaN, but it must reach the output, and so must infinity as NaN
    return pixel + whole.to(tl.int32), near - whole + (step - step)


@triton.jit
def pixels(steps, d, alive, row, col, k, s_c, spacing_h, spacing_w, K: tl.constexpr, OFFSETS: tl.constexpr,
           ACC: tl.constexpr):
    """Row and column of the first pixel of tap k, and the weights of the second of either axis.

    row, col: The pixel of each position (P,), from which the tap starts.
    """
    if OFFSETS:
        down = tl.load(steps + 2 * k * s_c, mask=alive, other=0.).to(ACC)
        across = tl.load(steps + (2 * k + 1) * s_c, mask=alive, other=0.).to(ACC)
        row, f = _neighbours(down, row + k // K * spacing_h)
        col, e = _neighbours(across, col + k % K * spacing_w)
    else:
        row, f = _neighbours(d * (k // K - K // 2), row)
        col, e = _neighbours(d * (k % K - K // 2), col)
    return row, col, f, e


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
def slopes(v00, v01, v10, v11, f, e):
    """Derivatives of :func:`sample` with respect to the row and to the column."""
    down = (v10 - v00) + e[:, None] * ((v11 - v01) - (v10 - v00))
    across = (v01 - v00) + f[:, None] * ((v11 - v10) - (v01 - v00))
    return down, across


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
