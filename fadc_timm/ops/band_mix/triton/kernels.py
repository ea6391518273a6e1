"""Triton kernels of the band mix, which run between matrix products of the library.

The library multiplies the map by the cosines and sines of both axes: the coefficients (B, J, J', C) are means over the
map. `synthesise_rows` turns the coefficients back into points along the height: rows (B, H, columns, C), with one
column per filter and frequency along the width that the filter keeps. `mix` makes of the rows the weighted low-passes
and adds them up. The other kernels are the transposes.

A column has a frequency along the width, `frequency[column]`, and a matrix of `rows_basis` (matrices, H, J). A filter
with one-sided frequencies on both axes has two more columns, which couple cosines and sines of both axes.
"""
import triton
import triton.language as tl

from ...triton_math import dot, jit_of_any_size, round_to, twice_sigmoid

__all__ = ['mix', 'mix_gradient', 'rows_gradient', 'synthesise_rows', 'synthesise_rows_gradient']


@triton.jit
def _band(maps, m, live, stride_m, COUNT: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr):
    """The weight of band m at some places. A band without a map, which can only be the lowest, weighs 1."""
    band = tl.full(live.shape, 1., dtype=ACC)
    if m < COUNT:
        band = twice_sigmoid(tl.load(maps + m * tl.cast(stride_m, tl.int64), mask=live, other=0.).to(ACC), ACT)
    return band


@jit_of_any_size
def synthesise_rows(
        coefficients, rows_basis, frequency, matrix, rows,
        height, count_h, count_w, columns, channels,
        ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """Synthesis along the height: coefficients to rows.

    Grid: columns of all samples, blocks of channels, blocks of rows.
    """
    b, column = (tl.program_id(0) // columns).to(tl.int64), tl.program_id(0) % columns
    j, basis = tl.load(frequency + column), rows_basis + tl.load(matrix + column) * height * count_h
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    c_live, h_live = c < channels, h < height
    acc = tl.zeros([BLOCK_H, BLOCK_C], dtype=ACC)
    for start in range(0, count_h, BLOCK_J):
        i = start + tl.arange(0, BLOCK_J)
        i_live = i < count_h
        s = tl.load(basis + h[:, None] * count_h + i[None, :], mask=h_live[:, None] & i_live[None, :], other=0.)
        at = ((b * count_h + i)[:, None] * count_w + j) * channels + c[None, :]
        k = tl.load(coefficients + at, mask=i_live[:, None] & c_live[None, :], other=0.)
        acc = dot(s, k, acc, PRECISION, UPCAST)
    at = ((b * height + h)[:, None] * columns + column) * channels + c[None, :]
    tl.store(rows + at, round_to(acc, rows, UPCAST), mask=h_live[:, None] & c_live[None, :])


@jit_of_any_size
def synthesise_rows_gradient(
        grad_rows, rows_basis, columns_of, matrix, grad_coefficients,
        height, count_h, count_w, columns, channels,
        MOST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_H: tl.constexpr,
        BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Transpose of `synthesise_rows`, over the height. columns_of (J', MOST): the columns of each frequency, then -1.

    Grid: frequencies along the width of all samples, blocks of channels, blocks of frequencies along the height.
    """
    b, j = (tl.program_id(0) // count_w).to(tl.int64), tl.program_id(0) % count_w
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    c_live, i_live = c < channels, i < count_h
    acc = tl.zeros([BLOCK_J, BLOCK_C], dtype=ACC)
    for n in range(MOST):
        column = tl.load(columns_of + j * MOST + n)
        if column >= 0:
            basis = rows_basis + tl.load(matrix + column) * height * count_h
            for start in range(0, height, BLOCK_H):
                h = start + tl.arange(0, BLOCK_H)
                h_live = h < height
                s = tl.load(basis + h[None, :] * count_h + i[:, None], mask=h_live[None, :] & i_live[:, None], other=0.)
                at = ((b * height + h)[:, None] * columns + column) * channels + c[None, :]
                g = tl.load(grad_rows + at, mask=h_live[:, None] & c_live[None, :], other=0.)
                acc = dot(s, g, acc, PRECISION, UPCAST)
    at = ((b * count_h + i)[:, None] * count_w + j) * channels + c[None, :]
    tl.store(grad_coefficients + at, round_to(acc / height, grad_coefficients, UPCAST),
             mask=i_live[:, None] & c_live[None, :])


@triton.jit
def _steps(maps, filters, w_live, stride_m, FILTERS: tl.constexpr, COUNT: tl.constexpr, ACT: tl.constexpr,
           ACC: tl.constexpr):
    """By column of the rows, the step A_f+1 - A_f of its filter f at some places (W, J): the low-pass's factor."""
    before = _band(maps, 0, w_live, stride_m, COUNT, ACT, ACC)
    steps = before[:, None] * tl.zeros(filters.shape, dtype=ACC)[None, :]
    for f in tl.static_range(FILTERS):
        band = _band(maps, f + 1, w_live, stride_m, COUNT, ACT, ACC)
        steps = tl.where((filters == f)[None, :], (band - before)[:, None], steps)
        before = band
    return steps


@jit_of_any_size
def mix(
        x, maps, rows, basis, filter_of, y, means,
        height, width, columns, channels, groups, m_b, m_m, m_s, m_h, m_w,
        FILTERS: tl.constexpr, COUNT: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
        UPCAST: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """y = A_1 x + the sum of (A_f+1 - A_f) low-pass_f, and what each block adds to the mean of y, (B, H * blocks, C).

    The synthesis along the width takes the steps into its matrix, so that one product makes all low-passes.
    Grid: rows of all samples, blocks of columns, blocks of channels. A block of channels lies within one group, and
    each group has its own maps of weights.
    """
    row = tl.program_id(0).to(tl.int64)
    b, h = row // height, row % height
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    blocks = tl.cdiv(channels // groups, BLOCK_C)
    group = tl.program_id(2) // blocks
    c = tl.program_id(2) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    c_live = c < channels // groups
    c += group * (channels // groups)
    w_live = w < width
    live = w_live[:, None] & c_live[None, :]
    maps += b * m_b + group.to(tl.int64) * m_s + h * m_h + w * m_w
    rows += row * columns * channels
    first = row * width * channels
    at = w[:, None] * channels + c[None, :]
    acc = tl.load(x + first + at, mask=live, other=0.).to(ACC) * _band(maps, 0, w_live, m_m, COUNT, ACT, ACC)[:, None]
    for start in range(0, columns, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        j_live = j < columns
        s = tl.load(basis + w[:, None] * columns + j[None, :], mask=w_live[:, None] & j_live[None, :], other=0.)
        filters = tl.load(filter_of + j, mask=j_live, other=0)
        s = s.to(ACC) * _steps(maps, filters, w_live, m_m, FILTERS, COUNT, ACT, ACC)
        z = tl.load(rows + j[:, None] * channels + c[None, :], mask=j_live[:, None] & c_live[None, :], other=0.)
        acc = dot(round_to(s, rows, UPCAST), z, acc, PRECISION, UPCAST)
    tl.store(y + first + at, round_to(acc, y, UPCAST), mask=live)
    at_means = (row * tl.num_programs(1) + tl.program_id(1)) * channels + c
    tl.store(means + at_means, tl.sum(tl.where(live, acc, 0.), axis=0) / (height * width), mask=c_live)


@triton.jit
def _with_mean(grad, grad_means, at, at_means, live, c_live, height, width, ACC: tl.constexpr):
    """The gradient of y at some places, plus what the gradient of the mean of y (C,) adds, if there is one."""
    g = tl.load(grad + at, mask=live, other=0.)
    if grad_means is not None:
        m = tl.load(grad_means + at_means, mask=c_live, other=0.).to(ACC) / (height * width)
        g = tl.where(live, g.to(ACC) + m[None, :], 0.).to(g.dtype)
    return g


@jit_of_any_size
def mix_gradient(
        grad, grad_means, x, maps, rows, basis, filter_of, grad_x, grad_maps,
        height, width, columns, channels, groups, m_b, m_m, m_s, m_h, m_w, n_b, n_r, n_c, g_b, g_m, g_s, g_h, g_w,
        FILTERS: tl.constexpr, STEPS_UP: tl.constexpr, COUNT: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
        PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_J: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """The gradient of the maps, and the part of the gradient of x that passes no filter.

    Grid: rows of all samples, blocks of columns as in `mix`, groups.
    """
    row = tl.program_id(0).to(tl.int64)
    b, h = row // height, row % height
    group = tl.program_id(2)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    w_live = w < width
    maps += b * m_b + group.to(tl.int64) * m_s + h * m_h + w * m_w
    rows += row * columns * channels
    first_band = _band(maps, 0, w_live, m_m, COUNT, ACT, ACC)
    first = row * width * channels
    at_block = b * n_b + (h * tl.num_programs(1) + tl.program_id(1)) * n_r
    step = tl.arange(0, STEPS_UP)
    steps = tl.zeros([BLOCK_W, STEPS_UP], dtype=ACC)  # gradients of the steps: of x, and of the low-passes
    width_of_group = channels // groups
    for start in range(0, columns, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        j_live = j < columns
        products = tl.zeros([BLOCK_W, BLOCK_J], dtype=ACC)  # of the gradient and the rows, over the channels
        of_x = tl.zeros([BLOCK_W], dtype=ACC)
        for start_c in range(0, width_of_group, BLOCK_C):
            c = start_c + tl.arange(0, BLOCK_C)
            c_live = c < width_of_group
            c += group * width_of_group
            live = w_live[:, None] & c_live[None, :]
            at = w[:, None] * channels + c[None, :]
            g = _with_mean(grad + first, grad_means, at, at_block + c * n_c, live, c_live, height, width, ACC)
            z = tl.load(rows + j[None, :] * channels + c[:, None], mask=j_live[None, :] & c_live[:, None], other=0.)
            products = dot(g, z, products, PRECISION, UPCAST)
            if start == 0:
                tl.store(grad_x + first + at, round_to(g.to(ACC) * first_band[:, None], grad_x, UPCAST), mask=live)
                of_x += tl.sum(g.to(ACC) * tl.load(x + first + at, mask=live, other=0.).to(ACC), axis=1)
        s = tl.load(basis + w[:, None] * columns + j[None, :], mask=w_live[:, None] & j_live[None, :], other=0.)
        products *= s.to(ACC)
        filters = tl.load(filter_of + j, mask=j_live, other=0)
        steps += tl.where(step[None, :] == 0, of_x[:, None], 0.)
        for f in tl.static_range(FILTERS):
            of_low = tl.sum(tl.where((filters == f)[None, :], products, 0.), axis=1)
            steps += tl.where(step[None, :] == f + 1, of_low[:, None], 0.)
    grad_maps += b * g_b + group.to(tl.int64) * g_s + h * g_h + w * g_w
    for m in tl.static_range(COUNT):
        # band m enters step m with sign +, and step m + 1 with sign -
        of_band = tl.sum(tl.where(step[None, :] == m, steps, 0.) - tl.where(step[None, :] == m + 1, steps, 0.), axis=1)
        if ACT:
            band = _band(maps, m, w_live, m_m, COUNT, ACT, ACC)
            of_band = of_band * band * (1 - band / 2)
        tl.store(grad_maps + m * tl.cast(g_m, tl.int64), round_to(of_band, grad_maps, UPCAST), mask=w_live)


@jit_of_any_size
def rows_gradient(
        grad, grad_means, maps, basis, filter_of, grad_rows,
        height, width, columns, channels, groups, m_b, m_m, m_s, m_h, m_w, n_b, n_r, n_c,
        FILTERS: tl.constexpr, COUNT: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
        UPCAST: tl.constexpr, MEANS_W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_J: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """Transpose of the low-passes' last step, over the width: grad_rows (B, H, columns, C).

    MEANS_W: Columns of a block of `mix`, and so of one mean.
    Grid: rows of all samples, blocks of columns, blocks of channels.
    """
    row = tl.program_id(0).to(tl.int64)
    b, h = row // height, row % height
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    j_live = j < columns
    blocks = tl.cdiv(channels // groups, BLOCK_C)
    group = tl.program_id(2) // blocks
    c = tl.program_id(2) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    c_live = c < channels // groups
    c += group * (channels // groups)
    maps += b * m_b + group.to(tl.int64) * m_s + h * m_h
    filters = tl.load(filter_of + j, mask=j_live, other=0)
    acc = tl.zeros([BLOCK_J, BLOCK_C], dtype=ACC)
    for start in range(0, width, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        w_live = w < width
        s = tl.load(basis + w[:, None] * columns + j[None, :], mask=w_live[:, None] & j_live[None, :], other=0.)
        s = s.to(ACC) * _steps(maps + w * m_w, filters, w_live, m_m, FILTERS, COUNT, ACT, ACC)
        at_grad = w[:, None] * channels + c[None, :]
        at_means = b * n_b + (h * tl.cdiv(width, MEANS_W) + start // MEANS_W) * n_r + c * n_c
        live = w_live[:, None] & c_live[None, :]
        g = _with_mean(
            grad + row * width * channels, grad_means, at_grad, at_means, live, c_live, height, width, ACC)
        acc = dot(tl.trans(round_to(s, grad_rows, UPCAST)), g, acc, PRECISION, UPCAST)
    grad_rows += row * columns * channels
    at = j[:, None] * channels + c[None, :]
    tl.store(grad_rows + at, round_to(acc / width, grad_rows, UPCAST), mask=j_live[:, None] & c_live[None, :])
