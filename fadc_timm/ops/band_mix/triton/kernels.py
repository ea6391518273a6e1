"""Triton kernels of the band mix: ideal low-passes of a map, weighed at every position, and the gradients of that.

A program has some channels of one sample. It goes through the map in chunks of rows twice: to analyse it onto cosines
and sines, of the columns' axis and then of the rows', and to synthesise each low-pass of a chunk, weigh it and add it
up. All of these are matrix products of a basis and a chunk or a block of coefficients. In between the coefficients, a
quarter of the map, lie in global memory: there each filter takes its part of them and exchanges those that it couples,
by addresses alone. What a program holds is bounded by the block sizes, whatever the size of the map.

PASS says what of this a launch does: all of it in one program (0, for small maps, whose second reading finds them in
the cache), or the analysis (1) or the rest (2), each with a program for every block, on the grid's second axis.

Chunks are (WB, R, CB), columns, rows and channels; coefficients (IB, JB, CB), frequencies of the rows' and of the
columns' axis, in the synthesis (JB, JB, CB). Needs Triton: imported when the band mix first uses it.
"""
import triton
import triton.language as tl

__all__ = ['backward', 'forward', 'offset']

# columns of the table of filters
_ROWS, _COLS, _START, _TABLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def offset(a, b, stride_a, stride_b):
    """In memory, in elements: int64, as maps may have more than 2^31 of them."""
    return a.to(tl.int64) * stride_a + b.to(tl.int64) * stride_b


@triton.jit
def _operand(t, DT: tl.constexpr, PRECISION: tl.constexpr):
    """t as a factor of a product. To nearest where that takes ten bits of float32, which the hardware cuts off."""
    if PRECISION == 'tf32':
        return ((t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return t.to(DT)


@triton.jit
def _swap(t, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """(A, B*C) to (B, A*C)."""
    return tl.reshape(tl.permute(tl.reshape(t, (A, B, C)), (1, 0, 2)), (B, A * C))


@triton.jit
def _spread(t, WB: tl.constexpr, R: tl.constexpr, CB: tl.constexpr):
    """(WB, R, 1) or (1, 1, CB) to (WB, R*CB)."""
    return tl.reshape(tl.broadcast_to(t, (WB, R, CB)), (WB, R * CB))


@triton.jit
def _basis(basis, i, j, points, frequencies):
    return tl.load(basis + i * frequencies + j, mask=(i < points) & (j < frequencies), other=0.)


@triton.jit
def _step(weights, inside, stride, f, COUNT: tl.constexpr, ACC: tl.constexpr):
    """What low-pass f is multiplied by, the 0th being the map: (WB, R, 1), exactly 0 where two bands weigh the same.

    There are COUNT weights; after the last of them comes one band at most, which weighs 1.
    """
    at = weights + tl.cast(f, tl.int64) * stride
    step = tl.load(at, mask=inside & (f < COUNT), other=1.).to(ACC)
    return step - tl.load(at - stride, mask=inside & (f > 0), other=0.).to(ACC)


@triton.jit
def _frequencies(
        t, x, weights, h, w, w0, j, live, height, width, stride_h, stride_w, stride_m, stride_mh, stride_mw,
        basis, count, f,
        WEIGHED: tl.constexpr, COUNT: tl.constexpr, R: tl.constexpr, WB: tl.constexpr, CB: tl.constexpr,
        DT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """t (JB, R*CB) plus a chunk's share of the frequencies j of the columns' axis, under step f if WEIGHED."""
    inside = (h < height) & (w < width)
    chunk = tl.load(x + offset(h, w, stride_h, stride_w), mask=inside & live, other=0.)
    if WEIGHED:
        step = _step(weights + offset(h, w, stride_mh, stride_mw), inside, stride_m, f, COUNT, ACC)
        chunk = _operand(chunk.to(ACC) * step, DT, PRECISION)
    columns = _basis(basis, (w0 + tl.arange(0, WB))[None, :], j[:, None], width, count)
    return tl.dot(columns, tl.reshape(chunk.to(DT), (WB, R * CB)), t, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _analyse(
        x, weights, live, coefficients, rows, cols, ld, height, width, stride_h, stride_w, stride_m, stride_mh,
        stride_mw, basis_h, basis_w, count_h, count_w, f,
        WEIGHED: tl.constexpr, COUNT: tl.constexpr, R: tl.constexpr, WB: tl.constexpr, IB: tl.constexpr,
        JB: tl.constexpr, CB: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
        PASS: tl.constexpr):
    """The first (rows, cols) coefficients of x, or of x under step f if WEIGHED, to a matrix with ld columns."""
    across = tl.cdiv(cols, JB)
    for block in range(tl.program_id(1), tl.cdiv(rows, IB) * across, tl.num_programs(1)):
        i = block // across * IB + tl.arange(0, IB)
        j = block % across * JB + tl.arange(0, JB)
        acc = tl.zeros((IB, JB * CB), ACC)
        for h0 in range(0, height, R):
            h = (h0 + tl.arange(0, R))[None, :, None]
            t = tl.zeros((JB, R * CB), ACC)
            if PASS == 0:
                w = tl.arange(0, WB)[:, None, None]
                t = _frequencies(
                    t, x, weights, h, w, 0, j, live, height, width, stride_h, stride_w, stride_m, stride_mh, stride_mw,
                    basis_w, count_w, f, WEIGHED, COUNT, R, WB, CB, DT, ACC, PRECISION)
            else:
                for w0 in range(0, width, WB):
                    w = (w0 + tl.arange(0, WB))[:, None, None]
                    t = _frequencies(
                        t, x, weights, h, w, w0, j, live, height, width, stride_h, stride_w, stride_m, stride_mh,
                        stride_mw, basis_w, count_w, f, WEIGHED, COUNT, R, WB, CB, DT, ACC, PRECISION)
            # means, not sums: these stay in the range of float16
            t = _operand(_swap(t / width, JB, R, CB), DT, PRECISION)
            down = _basis(basis_h, (h0 + tl.arange(0, R))[None, :], i[:, None], height, count_h)
            acc = tl.dot(down, t, acc, input_precision=PRECISION, out_dtype=ACC)
        at = offset(i[:, None, None], j[None, :, None], ld * CB, CB) + tl.arange(0, CB)[None, None, :]
        inside = (i[:, None, None] < rows) & (j[None, :, None] < cols) & live
        tl.store(coefficients + at, tl.reshape(acc / height, (IB, JB, CB)), mask=inside)


@triton.jit
def _pass(coefficients, ld, filter_h, filter_w, i, j, live, count_h, count_w, f, CB: tl.constexpr):
    """What filter f leaves of coefficients (IB, JB, CB) but the mean; the adjoint is the same.

    Where both axes have a frequency of which the filter keeps only one sign, cos cos and sin sin come together there,
    and cos sin and sin cos. Cosines are at even places, sines at odd ones.
    """
    at_h, at_w = filter_h + 2 * f * count_h + i, filter_w + 2 * f * count_w + j
    keep_h = tl.load(at_h, mask=i < count_h, other=0.)
    keep_w = tl.load(at_w, mask=j < count_w, other=0.)
    side_h = tl.load(at_h + count_h, mask=i < count_h, other=0.)
    side_w = tl.load(at_w + count_w, mask=j < count_w, other=0.)
    c = tl.arange(0, CB)[None, None, :]
    inside = (keep_h * keep_w != 0) & (i + j > 0) & live
    value = tl.load(coefficients + offset(i, j, ld * CB, CB) + c, mask=inside, other=0.)
    other = tl.load(coefficients + offset(i ^ 1, j ^ 1, ld * CB, CB) + c, mask=(side_h * side_w != 0) & live, other=0.)
    return value * (keep_h * keep_w) - other * (side_h * side_w)


@triton.jit
def _mean(coefficients, filter_h, filter_w, live, count_h, count_w, f, CB: tl.constexpr):
    """What filter f leaves of the mean (1, 1, CB)."""
    keep = tl.load(filter_h + 2 * f * count_h) * tl.load(filter_w + 2 * f * count_w)
    return tl.load(coefficients + tl.arange(0, CB)[None, None, :], mask=live, other=0.) * keep


@triton.jit
def _synthesise(
        coefficients, table, filter_h, filter_w, basis_h, basis_w, count_h, count_w, h0, w0, live, height, width, f,
        FILTERS: tl.constexpr, R: tl.constexpr, WB: tl.constexpr, JB: tl.constexpr, CB: tl.constexpr,
        DT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Low-pass f on a chunk (WB, R*CB).

    If there are FILTERS > 0, their sum instead, each of coefficients of its own in the places that the table gives.
    """
    # the mean, as a rule the largest coefficient, is not rounded to be a factor of products
    if FILTERS > 0:
        rows, cols = count_h, count_w
        mean = tl.zeros((1, 1, CB), ACC)
        for own in range(FILTERS):
            start = tl.load(table + own * _TABLE + _START).to(tl.int64) * CB
            mean += _mean(coefficients + start, filter_h, filter_w, live, count_h, count_w, own, CB)
    else:
        mean = _mean(coefficients, filter_h, filter_w, live, count_h, count_w, f, CB)
        rows, cols = tl.load(table + f * _TABLE + _ROWS), tl.load(table + f * _TABLE + _COLS)
    low = _spread(mean, WB, R, CB)
    for j0 in range(0, cols, JB):
        j = j0 + tl.arange(0, JB)
        z = tl.zeros((R, JB * CB), ACC)
        for i0 in range(0, rows, JB):
            i = i0 + tl.arange(0, JB)
            if FILTERS > 0:
                k = tl.zeros((JB, JB, CB), ACC)
                for own in range(FILTERS):
                    start = tl.load(table + own * _TABLE + _START).to(tl.int64) * CB
                    k += _pass(coefficients + start, tl.load(table + own * _TABLE + _COLS), filter_h, filter_w,
                               i[:, None, None], j[None, :, None], live, count_h, count_w, own, CB)
            else:
                k = _pass(coefficients, count_w, filter_h, filter_w, i[:, None, None], j[None, :, None], live, count_h,
                          count_w, f, CB)
            down = _basis(basis_h, (h0 + tl.arange(0, R))[:, None], i[None, :], height, count_h)
            z = tl.dot(down, tl.reshape(_operand(k, DT, PRECISION), (JB, JB * CB)), z, input_precision=PRECISION,
                       out_dtype=ACC)
        columns = _basis(basis_w, (w0 + tl.arange(0, WB))[:, None], j[None, :], width, count_w)
        low = tl.dot(columns, _operand(_swap(z, R, JB, CB), DT, PRECISION), low, input_precision=PRECISION,
                     out_dtype=ACC)
    return low


@triton.jit
def forward(
        x, weights, out, basis_h, basis_w, filter_h, filter_w, table, coefficients,
        height, width, channels, groups, count_h, count_w,
        x_b, x_c, x_h, x_w, weights_b, weights_m, weights_s, weights_h, weights_w, out_b, out_c, out_h, out_w,
        FILTERS: tl.constexpr, COUNT: tl.constexpr, R: tl.constexpr, WB: tl.constexpr, IB: tl.constexpr,
        JB: tl.constexpr, CB: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
        PASS: tl.constexpr):
    """Grid: (B * groups * blocks of channels, 1) or with the blocks of the pass. channels: of a group."""
    blocks = tl.cdiv(channels, CB)
    sample, group = tl.program_id(0) // blocks // groups, tl.program_id(0) // blocks % groups
    channel = tl.program_id(0) % blocks * CB + tl.arange(0, CB)[None, None, :]
    live = channel < channels
    channel += group * channels
    x += offset(sample, channel, x_b, x_c)
    out += offset(sample, channel, out_b, out_c)
    weights += offset(sample, group, weights_b, weights_s)
    stride_m = tl.full((), 1, tl.int64) * weights_m
    coefficients += tl.program_id(0).to(tl.int64) * count_h * count_w * CB
    if PASS != 2:
        _analyse(x, weights, live, coefficients, count_h, count_w, count_w, height, width, x_h, x_w, stride_m,
                 weights_h, weights_w, basis_h, basis_w, count_h, count_w, 0, False, COUNT, R, WB, IB, JB, CB, DT, ACC,
                 PRECISION, PASS)
    if PASS == 0:
        tl.debug_barrier()
    if PASS != 1:
        across = tl.cdiv(width, WB)
        for chunk in range(tl.program_id(1), tl.cdiv(height, R) * across, tl.num_programs(1)):
            h0, w0 = chunk // across * R, chunk % across * WB
            h, w = (h0 + tl.arange(0, R))[None, :, None], (w0 + tl.arange(0, WB))[:, None, None]
            inside = (h < height) & (w < width)
            weigh = weights + offset(h, w, weights_h, weights_w)
            y = tl.zeros((WB, R * CB), ACC)
            for f in range(FILTERS):
                low = _synthesise(
                    coefficients, table, filter_h, filter_w, basis_h, basis_w, count_h, count_w, h0, w0, live, height,
                    width, f, 0, R, WB, JB, CB, DT, ACC, PRECISION)
                y += low * _spread(_step(weigh, inside, stride_m, f + 1, COUNT, ACC), WB, R, CB)
            y = tl.reshape(y, (WB, R, CB))
            chunk_x = tl.load(x + offset(h, w, x_h, x_w), mask=inside & live, other=0.).to(ACC)
            y += chunk_x * _step(weigh, inside, stride_m, 0, COUNT, ACC)
            tl.store(out + offset(h, w, out_h, out_w), y.to(out.dtype.element_ty), mask=inside & live)


@triton.jit
def backward(
        grad, x, weights, grad_x, shares, basis_h, basis_w, filter_h, filter_w, table, coefficients, size,
        height, width, channels, groups, count_h, count_w,
        grad_b, grad_c, grad_h, grad_w, x_b, x_c, x_h, x_w, weights_b, weights_m, weights_s, weights_h, weights_w,
        out_b, out_c, out_h, out_w,
        FILTERS: tl.constexpr, COUNT: tl.constexpr, R: tl.constexpr, WB: tl.constexpr, IB: tl.constexpr,
        JB: tl.constexpr, CB: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
        PASS: tl.constexpr):
    """As `forward`. shares (programs, COUNT, H, W): of the weights' gradient. size: of a program's coefficients."""
    blocks = tl.cdiv(channels, CB)
    sample, group = tl.program_id(0) // blocks // groups, tl.program_id(0) // blocks % groups
    channel = tl.program_id(0) % blocks * CB + tl.arange(0, CB)[None, None, :]
    live = channel < channels
    channel += group * channels
    grad += offset(sample, channel, grad_b, grad_c)
    x += offset(sample, channel, x_b, x_c)
    grad_x += offset(sample, channel, out_b, out_c)
    weights += offset(sample, group, weights_b, weights_s)
    stride_m = tl.full((), 1, tl.int64) * weights_m
    coefficients += tl.program_id(0).to(tl.int64) * size * CB
    plane = tl.full((), 1, tl.int64) * height * width
    shares += tl.program_id(0) * (COUNT * plane)
    if PASS != 2:
        _analyse(x, weights, live, coefficients, count_h, count_w, count_w, height, width, x_h, x_w, stride_m,
                 weights_h, weights_w, basis_h, basis_w, count_h, count_w, 0, False, COUNT, R, WB, IB, JB, CB, DT, ACC,
                 PRECISION, PASS)
        for f in range(FILTERS):
            row = table + f * _TABLE
            rows, cols = tl.load(row + _ROWS), tl.load(row + _COLS)
            own = coefficients + tl.load(row + _START).to(tl.int64) * CB
            _analyse(grad, weights, live, own, rows, cols, cols, height, width, grad_h, grad_w, stride_m, weights_h,
                     weights_w, basis_h, basis_w, count_h, count_w, f + 1, True, COUNT, R, WB, IB, JB, CB, DT, ACC,
                     PRECISION, PASS)
    if PASS == 0:
        tl.debug_barrier()
    if PASS != 1:
        across = tl.cdiv(width, WB)
        for chunk in range(tl.program_id(1), tl.cdiv(height, R) * across, tl.num_programs(1)):
            h0, w0 = chunk // across * R, chunk % across * WB
            h, w = (h0 + tl.arange(0, R))[None, :, None], (w0 + tl.arange(0, WB))[:, None, None]
            inside = (h < height) & (w < width)
            weigh = weights + offset(h, w, weights_h, weights_w)
            share = shares + h0.to(tl.int64) * width + (h - h0) * width + w
            g = tl.load(grad + offset(h, w, grad_h, grad_w), mask=inside & live, other=0.).to(ACC)
            chunk_x = tl.load(x + offset(h, w, x_h, x_w), mask=inside & live, other=0.).to(ACC)
            above = tl.sum(g * chunk_x, axis=2, keep_dims=True)
            for f in range(FILTERS):
                low = _synthesise(
                    coefficients, table, filter_h, filter_w, basis_h, basis_w, count_h, count_w, h0, w0, live, height,
                    width, f, 0, R, WB, JB, CB, DT, ACC, PRECISION)
                g = tl.load(grad + offset(h, w, grad_h, grad_w), mask=inside & live, other=0.).to(ACC)
                below = tl.sum(g * tl.reshape(low, (WB, R, CB)), axis=2, keep_dims=True)
                tl.store(share + f * plane, above - below, mask=inside)
                above = below
            if COUNT > FILTERS:
                tl.store(share + FILTERS * plane, above, mask=inside)
            low = _synthesise(
                coefficients, table, filter_h, filter_w, basis_h, basis_w, count_h, count_w, h0, w0, live, height,
                width, 0, FILTERS, R, WB, JB, CB, DT, ACC, PRECISION)
            g = tl.load(grad + offset(h, w, grad_h, grad_w), mask=inside & live, other=0.).to(ACC)
            y = g * _step(weigh, inside, stride_m, 0, COUNT, ACC) + tl.reshape(low, (WB, R, CB))
            tl.store(grad_x + offset(h, w, out_h, out_w), y.to(grad_x.dtype.element_ty), mask=inside & live)
