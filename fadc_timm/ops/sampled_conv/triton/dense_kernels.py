"""Triton kernels around the matrix products of the dense and grouped operator.

Forward: `pack` splits the kernel into mean and rest. `columns` writes masked and scaled samples, and their totals. Two
products multiply the samples by the rest and the totals by the mean. `combine` applies the output gains.

Totals are divided by TAPS_UP, a power of two, and means multiplied by it: see `headroom`.

Backward: `spread` applies the output gains to the gradient. Two products and `scatter_columns` give the gradients of
map, steps and mask; two products and `unpack` give the gradient of the kernel. `sampling_gradient` and
`gains_gradient` add up the shares that the programs wrote.

A program of `columns` and `scatter_columns` has a block of positions of one sample and a block of channels of one step
group. A tile is what the workspace holds: some samples, or some positions of one.

Shapes: x (B, H, W, C) contiguous; steps, which are dilations (B, G, H', W') or with OFFSETS offsets (B, G*K*K*2, H',
W'), and mask (B, G*K*K, H', W') of any strides; low and high, AdaKern's gains (B, C + O), the input channels first. A
bundle is some groups together, with `width` input and `out_width` output channels and a block-diagonal kernel: rest
(bundles, out_width, K*K*width), mean (bundles, out_width, width). columns (positions of the tile, bundles, K*K, width),
totals (positions of the tile, C).
"""
import triton
import triton.language as tl

from ...triton_math import jit_of_any_size, round_to, twice_sigmoid
from .sampling import corners, dilation_slope, dilations, pixels, sample, scatter, slopes

__all__ = [
    'add_slopes', 'channels_of', 'columns', 'combine', 'gain', 'gain_gradient', 'gains_gradient', 'pack', 'place',
    'samples', 'sampling_gradient', 'scatter_columns', 'spread', 'steps_of', 'unpack', 'wide']


@triton.jit
def gain(gains, at, live, ACT: tl.constexpr, ACC: tl.constexpr):
    """The gains at some places, or ones if gains is None."""
    if gains is None:
        g = tl.full(at.shape, 1., dtype=ACC)
    else:
        g = twice_sigmoid(tl.load(gains + at, mask=live, other=0.).to(ACC), ACT)
    return g


@triton.jit
def pack(
        weight, rest, mean,
        channels_a_group, out_a_group, width, out_width, w_o, w_c, w_k,
        TAPS: tl.constexpr, TAPS_UP: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """Split the weight (O, C/groups, K*K) into its mean over the taps, and the rest without it.

    Without SPLIT the rest is the whole weight. Grid: output channels, blocks of a bundle's input channels.
    """
    o = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, TAPS_UP)
    own = c // channels_a_group == o % out_width // out_a_group
    at = o.to(tl.int64) * w_o + (c % channels_a_group)[:, None] * w_c + k[None, :] * w_k
    w = tl.load(weight + at, mask=own[:, None] & (c < width)[:, None] & (k < TAPS)[None, :], other=0.).to(ACC)
    if SPLIT:
        m = tl.sum(w, axis=1) / TAPS
        tl.store(mean + o.to(tl.int64) * width + c, round_to(m * TAPS_UP, mean, UPCAST), mask=c < width)
        w = w - m[:, None]
    at = o.to(tl.int64) * TAPS * width + k[None, :] * width + c[:, None]
    tl.store(rest + at, round_to(w, rest, UPCAST), mask=(c < width)[:, None] & (k < TAPS)[None, :])


@triton.jit
def unpack(
        grad_rest, grad_mean, grad_weight,
        channels_a_group, out_a_group, width, out_width, w_o, w_c, w_k,
        TAPS: tl.constexpr, TAPS_UP: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """Transpose of `pack`. Grid: output channels, blocks of a group's input channels."""
    o = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, TAPS_UP)
    live = c < channels_a_group
    all_live = live[:, None] & (k < TAPS)[None, :]
    place = o % out_width // out_a_group * channels_a_group + c
    at = o.to(tl.int64) * TAPS * width + k[None, :] * width + place[:, None]
    g = tl.load(grad_rest + at, mask=all_live, other=0.).to(ACC)
    if SPLIT:
        m = tl.load(grad_mean + o.to(tl.int64) * width + place, mask=live, other=0.).to(ACC) * TAPS_UP
        g = g + ((m - tl.sum(g, axis=1)) / TAPS)[:, None]
    at = o.to(tl.int64) * w_o + c[:, None] * w_c + k[None, :] * w_k
    tl.store(grad_weight + at, round_to(g, grad_weight, UPCAST), mask=all_live)


@triton.jit
def place(program, first_sample, first, count, BLOCK_P: tl.constexpr):
    """Sample of a program, and its positions within the sample and within the tile."""
    chunks = tl.cdiv(count, BLOCK_P)
    sample_of_tile = program // chunks
    q = program % chunks * BLOCK_P + tl.arange(0, BLOCK_P)
    return (first_sample + sample_of_tile).to(tl.int64), first + q, sample_of_tile.to(tl.int64) * count + q, q < count


@triton.jit
def channels_of(block, step_width, BLOCK_C: tl.constexpr):
    """Step group and channels of a block, and which of these channels exist."""
    blocks = tl.cdiv(step_width, BLOCK_C)
    group = block // blocks
    c = block % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return group, group * step_width + c, c < step_width


@triton.jit
def wide(s_c, s_w, m_c, m_w):
    """Strides of the steps and of the mask whose products with channels and columns may leave 32 bits."""
    # Triton makes an argument of 1 a plain number
    return tl.cast(s_c, tl.int64), tl.cast(s_w, tl.int64), tl.cast(m_c, tl.int64), tl.cast(m_w, tl.int64)


@triton.jit
def steps_of(steps, b, group, i, j, s_b, s_c, s_h, s_w, K: tl.constexpr, OFFSETS: tl.constexpr):
    """Addresses of the dilations, or of the first offsets, of a step group at some positions."""
    if OFFSETS:
        steps += group * (2 * K * K) * s_c
    else:
        steps += group * s_c
    return steps + b * s_b + i.to(tl.int64) * s_h + j * s_w


@triton.jit
def samples(
        x, steps, d, mask, alive, pixel_row, pixel_col, k, s_c, m_c, spacing_h, spacing_w, height, width, channels, c,
        live, K: tl.constexpr, OFFSETS: tl.constexpr, HAS_MASK: tl.constexpr, MASK_ACT: tl.constexpr, ACC: tl.constexpr,
        INDEX: tl.constexpr):
    """The four pixels of tap k, the row and column of the first, the fractions between them, and the mask (P,)."""
    row, col, f, e = pixels(
        steps, d, alive, pixel_row, pixel_col, k, s_c, spacing_h, spacing_w, K, OFFSETS, ACC)
    v00, v01, v10, v11 = corners(
        x, row, col, 1 if OFFSETS else k // K - K // 2, 1 if OFFSETS else k % K - K // 2, height, width, channels, c,
        live, ACC, INDEX)
    m = tl.full(d.shape, 1., dtype=ACC)
    if HAS_MASK:
        m = twice_sigmoid(tl.load(mask + k * m_c, mask=alive, other=0.).to(ACC), MASK_ACT)
    return v00, v01, v10, v11, row, col, f, e, m


@triton.jit
def add_slopes(v, v00, v01, v10, v11, f, e, k, into, grad_d, positions, alive, K: tl.constexpr, OFFSETS: tl.constexpr):
    """Write the gradient of tap k's offset, from that of its sample; or return that of the dilation with it added."""
    down, across = slopes(v00, v01, v10, v11, f, e)
    if OFFSETS:
        into += (K * K + 2 * k) * positions
        tl.store(into, tl.sum(v * down, axis=1), mask=alive)
        tl.store(into + positions, tl.sum(v * across, axis=1), mask=alive)
    else:
        grad_d += tl.sum(v * ((k // K - K // 2) * down + (k % K - K // 2) * across), axis=1)
    return grad_d


@triton.jit
def _write_tap(
        x, steps, d, mask, into, total, high_in, alive, pixel_row, pixel_col, k, s_c, m_c, spacing_h, spacing_w, height,
        width, channels, c, live, K: tl.constexpr, OFFSETS: tl.constexpr, SPLIT: tl.constexpr, HAS_MASK: tl.constexpr,
        MASK_ACT: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, UPCAST: tl.constexpr):
    """Write one tap's column, and return the total with its sample added."""
    v00, v01, v10, v11, row, col, f, e, m = samples(
        x, steps, d, mask, alive, pixel_row, pixel_col, k, s_c, m_c, spacing_h, spacing_w, height, width, channels, c,
        live, K, OFFSETS, HAS_MASK, MASK_ACT, ACC, INDEX)
    s = sample(v00, v01, v10, v11, f, e) * m[:, None]
    if SPLIT:
        total += s
        s = s * high_in[None, :]
    tl.store(into, round_to(s, into, UPCAST), mask=live)
    return total


@jit_of_any_size
def columns(
        x, steps, mask, low, high, cols, totals,
        first_sample, first, count, height, width, out_w, start_h, start_w, stride_h, stride_w, spacing_h, spacing_w,
        s_b, s_c, s_h, s_w, m_b, m_c, m_h, m_w, channels, gains_b, bundle_width, step_width, base,
        K: tl.constexpr, OFFSETS: tl.constexpr, SPLIT: tl.constexpr, HAS_MASK: tl.constexpr,
        DILATION_ACT: tl.constexpr, MASK_ACT: tl.constexpr, GAINS_ACT: tl.constexpr, ACC: tl.constexpr,
        INDEX: tl.constexpr, TAPS_UP: tl.constexpr, UPCAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Write each tap's sample times mask and high input gain; if SPLIT, also their total times the low input gain.

    Grid: blocks of positions, blocks of channels.
    """
    b, q, row_of_tile, alive = place(tl.program_id(0), first_sample, first, count, BLOCK_P)
    group, c, c_live = channels_of(tl.program_id(1), step_width, BLOCK_C)
    s_c, s_w, m_c, m_w = wide(s_c, s_w, m_c, m_w)
    live = alive[:, None] & c_live[None, :]
    i, j = q // out_w, q % out_w
    pixel_row, pixel_col = i * stride_h + start_h, j * stride_w + start_w
    x += b * height * width * channels
    steps = steps_of(steps, b, group, i, j, s_b, s_c, s_h, s_w, K, OFFSETS)
    d = dilations(steps, alive, base, OFFSETS, DILATION_ACT, ACC)
    mask += b * m_b + group * (K * K) * m_c
    at_mask = mask + i.to(tl.int64) * m_h + j * m_w
    at_column = c // bundle_width * (K * K * bundle_width) + c % bundle_width
    into = cols + row_of_tile[:, None] * (channels * K * K) + at_column[None, :]
    high_in = gain(high, b * gains_b + c, c_live, GAINS_ACT, ACC)
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    if K <= 3:
        for k in tl.static_range(K * K):
            total = _write_tap(
                x, steps, d, at_mask, into + k * bundle_width, total, high_in, alive, pixel_row, pixel_col, k, s_c, m_c,
                spacing_h, spacing_w, height, width, channels, c, live, K, OFFSETS, SPLIT, HAS_MASK, MASK_ACT, ACC,
                INDEX, UPCAST)
    else:
        for k in range(K * K):
            total = _write_tap(
                x, steps, d, at_mask, into + k * bundle_width, total, high_in, alive, pixel_row, pixel_col, k, s_c, m_c,
                spacing_h, spacing_w, height, width, channels, c, live, K, OFFSETS, SPLIT, HAS_MASK, MASK_ACT, ACC,
                INDEX, UPCAST)
    if SPLIT:
        total = total / TAPS_UP * gain(low, b * gains_b + c, c_live, GAINS_ACT, ACC)[None, :]
        tl.store(totals + row_of_tile[:, None] * channels + c[None, :], round_to(total, totals, UPCAST), mask=live)


@jit_of_any_size
def combine(
        high_part, low_part, low, high, bias, y,
        area, channels, out_channels, gains_b, numel,
        GAINS_ACT: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK: tl.constexpr,
):
    """y = high_out * high_part + low_out * low_part + bias, (P, O) each. Grid: blocks of elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < numel
    o = (at % out_channels).to(tl.int32)
    b = at // out_channels // area
    at_gain = b * gains_b + channels + o
    v = tl.load(high_part + at, mask=live, other=0.).to(ACC) * gain(high, at_gain, live, GAINS_ACT, ACC)
    v += tl.load(low_part + at, mask=live, other=0.).to(ACC) * gain(low, at_gain, live, GAINS_ACT, ACC)
    if bias is not None:
        v += tl.load(bias + o, mask=live, other=0.).to(ACC)
    tl.store(y + at, round_to(v, y, UPCAST), mask=live)


@jit_of_any_size
def spread(
        grad, high_part, low_part, low, high, grad_high_part, grad_low_part, sums,
        area, chunk, channels, out_channels, gains_b,
        GAINS_ACT: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Transpose of `combine`: the gradients of both parts (P, O), and sums over each chunk of positions of one sample.

    sums (chunks, 3, O): the shares of a chunk in the gradients of low_out, of high_out and of the bias.
    Grid: chunks of all samples, blocks of output channels.
    """
    chunks = tl.cdiv(area, chunk)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * chunk
    end = tl.minimum(begin + chunk, area)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_live = o < out_channels
    at_gain = b * gains_b + channels + o
    low_out = gain(low, at_gain, o_live, GAINS_ACT, ACC)
    high_out = gain(high, at_gain, o_live, GAINS_ACT, ACC)
    of_low = tl.zeros([BLOCK_P, BLOCK_O], dtype=ACC)
    of_high = tl.zeros([BLOCK_P, BLOCK_O], dtype=ACC)
    of_bias = tl.zeros([BLOCK_P, BLOCK_O], dtype=ACC)
    for start in range(begin, end, BLOCK_P):
        q = start + tl.arange(0, BLOCK_P)
        live = (q < end)[:, None] & o_live[None, :]
        at = (b * area + q)[:, None] * out_channels + o[None, :]
        g = tl.load(grad + at, mask=live, other=0.).to(ACC)
        tl.store(grad_high_part + at, round_to(g * high_out[None, :], grad_high_part, UPCAST), mask=live)
        tl.store(grad_low_part + at, round_to(g * low_out[None, :], grad_low_part, UPCAST), mask=live)
        if high_part is not None:
            of_high += g * tl.load(high_part + at, mask=live, other=0.).to(ACC)
            of_low += g * tl.load(low_part + at, mask=live, other=0.).to(ACC)
        of_bias += g
    into = sums + tl.program_id(0).to(tl.int64) * 3 * out_channels + o
    tl.store(into, tl.sum(of_low, axis=0), mask=o_live)
    tl.store(into + out_channels, tl.sum(of_high, axis=0), mask=o_live)
    tl.store(into + 2 * out_channels, tl.sum(of_bias, axis=0), mask=o_live)


@triton.jit
def _scatter_tap(
        x, steps, d, mask, from_column, from_total, grad_x, into, grad_d, of_high, total, high_in, alive, pixel_row,
        pixel_col, k, s_c, m_c, spacing_h, spacing_w, height, width, channels, c, live, positions, factor,
        K: tl.constexpr, OFFSETS: tl.constexpr, HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, MASK_ACT: tl.constexpr,
        FIXED: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr):
    """Scatter one tap's gradient, and return the sums of the block with this tap added."""
    v00, v01, v10, v11, row, col, f, e, m = samples(
        x, steps, d, mask, alive, pixel_row, pixel_col, k, s_c, m_c, spacing_h, spacing_w, height, width, channels, c,
        live, K, OFFSETS, HAS_MASK, MASK_ACT, ACC, INDEX)
    s = sample(v00, v01, v10, v11, f, e)
    g = tl.load(from_column, mask=live, other=0.).to(ACC)
    v = g
    if SPLIT:
        total += m[:, None] * s
        of_high += g * (m[:, None] * s)
        v = g * high_in[None, :] + from_total
    if HAS_MASK:
        tl.store(into + k * positions, tl.sum(v * s, axis=1), mask=alive)
        v = v * m[:, None]
    grad_d = add_slopes(v, v00, v01, v10, v11, f, e, k, into, grad_d, positions, alive, K, OFFSETS)
    scatter(
        grad_x, row, col, f, e, 1 if OFFSETS else k // K - K // 2, 1 if OFFSETS else k % K - K // 2, height, width,
        channels, c, live, v, factor, FIXED, INDEX)
    return grad_d, of_high, total


@jit_of_any_size
def scatter_columns(
        x, steps, mask, low, high, cols, totals, grad_x, sampling, gains, scale,
        first_sample, first, count, height, width, out_h, out_w, start_h, start_w, stride_h, stride_w, spacing_h,
        spacing_w, s_b, s_c, s_h, s_w, m_b, m_c, m_h, m_w, channels, gains_b, bundle_width, step_width, positions,
        first_block, base,
        K: tl.constexpr, OFFSETS: tl.constexpr, SPLIT: tl.constexpr, HAS_MASK: tl.constexpr,
        DILATION_ACT: tl.constexpr, MASK_ACT: tl.constexpr, GAINS_ACT: tl.constexpr, ACC: tl.constexpr,
        INDEX: tl.constexpr, TAPS_UP: tl.constexpr, FIXED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Transpose of `columns`, of which cols and totals hold the gradients.

    The program adds to grad_x (B, H, W, C). It writes the share of its channels in the gradients of mask and steps to
    sampling (blocks of channels, K*K + S, B*H'*W'), S = 1 for the dilation and 2*K*K for offsets, and the share of its
    positions in the gradients of low_in and high_in to gains (blocks of positions, 2, C). Grid: as in `columns`.
    """
    b, q, row_of_tile, alive = place(tl.program_id(0), first_sample, first, count, BLOCK_P)
    group, c, c_live = channels_of(tl.program_id(1), step_width, BLOCK_C)
    s_c, s_w, m_c, m_w = wide(s_c, s_w, m_c, m_w)
    live = alive[:, None] & c_live[None, :]
    i, j = q // out_w, q % out_w
    pixel_row, pixel_col = i * stride_h + start_h, j * stride_w + start_w
    x += b * height * width * channels
    grad_x += b * height * width * channels
    steps = steps_of(steps, b, group, i, j, s_b, s_c, s_h, s_w, K, OFFSETS)
    d = dilations(steps, alive, base, OFFSETS, DILATION_ACT, ACC)
    mask += b * m_b + group * (K * K) * m_c
    at_mask = mask + i.to(tl.int64) * m_h + j * m_w
    at_column = c // bundle_width * (K * K * bundle_width) + c % bundle_width
    at = cols + row_of_tile[:, None] * (channels * K * K) + at_column[None, :]
    positions = tl.cast(positions, tl.int64)  # Triton makes an argument of 1 a plain number
    rows = K * K + (2 * K * K if OFFSETS else 1)
    into = sampling + tl.program_id(1) * rows * positions + b * (out_h * out_w) + q
    factor = 1.
    if FIXED:
        factor = tl.load(scale)
    high_in = gain(high, b * gains_b + c, c_live, GAINS_ACT, ACC)
    of_total = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    from_total = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    if SPLIT:
        at_total = totals + row_of_tile[:, None] * channels + c[None, :]
        of_total = tl.load(at_total, mask=live, other=0.).to(ACC) / TAPS_UP
        from_total = of_total * gain(low, b * gains_b + c, c_live, GAINS_ACT, ACC)[None, :]
    grad_d = tl.zeros([BLOCK_P], dtype=ACC)
    of_high = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    if K <= 3:
        for k in tl.static_range(K * K):
            grad_d, of_high, total = _scatter_tap(
                x, steps, d, at_mask, at + k * bundle_width, from_total, grad_x, into, grad_d, of_high, total, high_in,
                alive, pixel_row, pixel_col, k, s_c, m_c, spacing_h, spacing_w, height, width, channels, c, live,
                positions, factor, K, OFFSETS, HAS_MASK, SPLIT, MASK_ACT, FIXED, ACC, INDEX)
    else:
        for k in range(K * K):
            grad_d, of_high, total = _scatter_tap(
                x, steps, d, at_mask, at + k * bundle_width, from_total, grad_x, into, grad_d, of_high, total, high_in,
                alive, pixel_row, pixel_col, k, s_c, m_c, spacing_h, spacing_w, height, width, channels, c, live,
                positions, factor, K, OFFSETS, HAS_MASK, SPLIT, MASK_ACT, FIXED, ACC, INDEX)
    if not OFFSETS:
        tl.store(into + K * K * positions, grad_d, mask=alive)
    if SPLIT:
        at_gain = gains + (first_block + tl.program_id(0)).to(tl.int64) * 2 * channels + c
        tl.store(at_gain, tl.sum(of_total * total, axis=0), mask=c_live)
        tl.store(at_gain + channels, tl.sum(of_high, axis=0), mask=c_live)


@jit_of_any_size
def sampling_gradient(
        sampling, steps, mask, grad_steps, grad_mask,
        positions, out_h, out_w, parts, s_b, s_c, s_h, s_w, m_b, m_c, m_h, m_w,
        gs_b, gs_c, gs_h, gs_w, gm_b, gm_c, gm_h, gm_w, base,
        TAPS: tl.constexpr, STEPS: tl.constexpr, HAS_MASK: tl.constexpr, DILATION_ACT: tl.constexpr,
        MASK_ACT: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_P: tl.constexpr, ROWS_UP: tl.constexpr,
):
    """Gradients of steps and mask, from sampling (G * parts, TAPS + STEPS, positions): sums over blocks of channels.

    STEPS: Channels of steps per group. A program has the rows of sampling of all taps and steps: sampling is contiguous
    along the positions, and the gradients along these rows. Grid: blocks of positions, step groups.
    """
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    group = tl.program_id(1)
    k = tl.arange(0, ROWS_UP)
    is_step = (k >= TAPS) & (k < TAPS + STEPS)
    alive = (p < positions)[:, None]
    b, i, j = p // out_w // out_h, p // out_w % out_h, p % out_w
    of_steps, of_mask = alive & is_step[None, :], alive & (k < TAPS)[None, :]
    total = tl.zeros([BLOCK_P, ROWS_UP], dtype=ACC)
    for part in range(parts):
        row = (group * parts + part).to(tl.int64) * (TAPS + STEPS) + k
        total += tl.load(sampling + row[None, :] * positions + p[:, None],
                         mask=of_steps | of_mask if HAS_MASK else of_steps, other=0.)
    channel = (group * STEPS + k - TAPS).to(tl.int64)
    at = (b * s_b + i * s_h + j * s_w)[:, None] + channel[None, :] * s_c
    o = tl.load(steps + at, mask=of_steps, other=0.).to(ACC)
    at = (b * gs_b + i * gs_h + j * gs_w)[:, None] + channel[None, :] * gs_c
    tl.store(grad_steps + at, round_to(total * dilation_slope(o, base, DILATION_ACT), grad_steps, UPCAST),
             mask=of_steps)
    if HAS_MASK:
        channel = (group * TAPS + k).to(tl.int64)
        if MASK_ACT:
            at = (b * m_b + i * m_h + j * m_w)[:, None] + channel[None, :] * m_c
            m = twice_sigmoid(tl.load(mask + at, mask=of_mask, other=0.).to(ACC), MASK_ACT)
            total = total * m * (1 - m / 2)
        at = (b * gm_b + i * gm_h + j * gm_w)[:, None] + channel[None, :] * gm_c
        tl.store(grad_mask + at, round_to(total, grad_mask, UPCAST), mask=of_mask)


@triton.jit
def gain_gradient(gains, grad_gains, at, total, live, ACT: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr):
    if gains is not None:
        if ACT:
            g = gain(gains, at, live, ACT, ACC)
            total = total * g * (1 - g / 2)
        tl.store(grad_gains + at, round_to(total, grad_gains, UPCAST), mask=live)


@jit_of_any_size
def gains_gradient(
        of_input, of_output, low, high, grad_low, grad_high,
        chunks, out_chunks, channels, out_channels, gains_b,
        ACT: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of low and high (B, C + O): the sums over chunks of positions.

    of_input (B, chunks, 2, C) and of_output (B, out_chunks, 3, O) have low before high. Grid: samples, blocks of C + O.
    """
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = n < channels + out_channels
    chunk = tl.arange(0, CHUNKS)
    of_low = tl.zeros([CHUNKS, BLOCK], dtype=ACC)
    of_high = tl.zeros([CHUNKS, BLOCK], dtype=ACC)
    if tl.program_id(1) * BLOCK < channels:
        for start in range(0, chunks, CHUNKS):
            at = of_input + (b * chunks + start + chunk)[:, None] * (2 * channels) + n[None, :]
            some = (start + chunk < chunks)[:, None] & (n < channels)[None, :]
            of_low += tl.load(at, mask=some, other=0.)
            of_high += tl.load(at + channels, mask=some, other=0.)
    if tl.program_id(1) * BLOCK + BLOCK > channels:
        for start in range(0, out_chunks, CHUNKS):
            at = of_output + (b * out_chunks + start + chunk)[:, None] * (3 * out_channels) + (n - channels)[None, :]
            some = (start + chunk < out_chunks)[:, None] & (live & (n >= channels))[None, :]
            of_low += tl.load(at, mask=some, other=0.)
            of_high += tl.load(at + out_channels, mask=some, other=0.)
    at = b * gains_b + n
    gain_gradient(low, grad_low, at, tl.sum(of_low, axis=0), live, ACT, ACC, UPCAST)
    gain_gradient(high, grad_high, at, tl.sum(of_high, axis=0), live, ACT, ACC, UPCAST)
