"""Triton kernels of the depthwise operator: one that packs the weight, forward, and four for its gradients.

The operator has no matrix product. A program has a block of positions of one sample and a block of channels of one
step group, and reads the pixels through the cache. The programs apply AdaKern's gains to the kernel.

Shapes: x (B, H, W, C), y and its gradient (B, H', W', C) contiguous; steps, which are dilations (B, G, H', W') or with
OFFSETS offsets (B, G*K*K*2, H', W'), and mask (B, G*K*K, H', W') of any strides; kernel (K*K, C) and its mean over the
taps (C,); low and high, the gains (B, C).
"""
import triton
import triton.language as tl

from ...triton_math import jit_of_any_size, round_to
from .dense_kernels import add_slopes, channels_of, gain, gain_gradient, place, samples, steps_of, wide
from .sampling import dilations, sample, scatter

__all__ = ['backward', 'forward', 'kernel_gradient', 'pack', 'products', 'unpack']


@triton.jit
def pack(
        weight, kernel, mean,
        channels,
        TAPS: tl.constexpr, TAPS_UP: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Transpose the weight (C, K*K) to the kernel (K*K, C); if SPLIT take its mean over the taps (C,).

    Grid: blocks of channels.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, TAPS_UP)
    c_live = c < channels
    live = (k < TAPS)[:, None] & c_live[None, :]
    w = tl.load(weight + c[None, :] * TAPS + k[:, None], mask=live, other=0.).to(ACC)
    tl.store(kernel + k[:, None] * channels + c[None, :], w, mask=live)
    if SPLIT:
        tl.store(mean + c, tl.sum(w, axis=0) / TAPS, mask=c_live)


@triton.jit
def unpack(
        sums, grad_weight, grad_bias,
        samples, channels,
        TAPS: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Gradients of the weight (C, K*K) and of the bias (C,): sums over the samples of sums (B, rows, C).

    Grid: rows, blocks of channels.
    """
    k = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_live = c < channels
    total = tl.zeros([BLOCK_B, BLOCK_C], dtype=ACC)
    for start in range(0, samples, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        at = (b.to(tl.int64) * tl.num_programs(0) + k)[:, None] * channels + c[None, :]
        total += tl.load(sums + at, mask=(b < samples)[:, None] & c_live[None, :], other=0.)
    of_row = tl.sum(total, axis=0)
    tl.store(grad_weight + c * TAPS + k, round_to(of_row, grad_weight, UPCAST), mask=c_live & (k < TAPS))
    if grad_bias is not None:
        tl.store(grad_bias + c, round_to(of_row, grad_bias, UPCAST), mask=c_live & (k == TAPS))


@triton.jit
def _kernel_of_sample(kernel, mean, low_in, high_in, c, c_live, SPLIT: tl.constexpr, ACC: tl.constexpr):
    """A tap of the kernel with the gains applied (C,)."""
    w = tl.load(kernel + c, mask=c_live, other=0.).to(ACC)
    if SPLIT:
        w = high_in * (w - mean) + low_in * mean
    return w


@jit_of_any_size
def forward(
        x, steps, mask, low, high, kernel, mean, bias, y,
        height, width, out_h, out_w, start_h, start_w, stride_h, stride_w, spacing_h, spacing_w,
        s_b, s_c, s_h, s_w, m_b, m_c, m_h, m_w, channels, step_width, base,
        K: tl.constexpr, OFFSETS: tl.constexpr, SPLIT: tl.constexpr, HAS_MASK: tl.constexpr,
        DILATION_ACT: tl.constexpr, MASK_ACT: tl.constexpr, GAINS_ACT: tl.constexpr, ACC: tl.constexpr,
        INDEX: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Write the output y. Grid: blocks of positions, blocks of channels."""
    b, q, p, alive = place(tl.program_id(0), 0, 0, out_h * out_w, BLOCK_P)
    group, c, c_live = channels_of(tl.program_id(1), step_width, BLOCK_C)
    s_c, s_w, m_c, m_w = wide(s_c, s_w, m_c, m_w)
    live = alive[:, None] & c_live[None, :]
    i, j = q // out_w, q % out_w
    pixel_row, pixel_col = i * stride_h + start_h, j * stride_w + start_w
    x += b * height * width * channels
    steps = steps_of(steps, b, group, i, j, s_b, s_c, s_h, s_w, K, OFFSETS)
    d = dilations(steps, alive, base, OFFSETS, DILATION_ACT, ACC)
    at_mask = mask + b * m_b + group * (K * K) * m_c + i.to(tl.int64) * m_h + j * m_w
    low_in = gain(low, b * channels + c, c_live, GAINS_ACT, ACC)
    high_in = gain(high, b * channels + c, c_live, GAINS_ACT, ACC)
    m_of_kernel = tl.zeros([BLOCK_C], dtype=ACC)
    if SPLIT:
        m_of_kernel = tl.load(mean + c, mask=c_live, other=0.).to(ACC)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for k in range(K * K):
        v00, v01, v10, v11, row, col, f, e, m = samples(
            x, steps, d, at_mask, alive, pixel_row, pixel_col, k, s_c, m_c, spacing_h, spacing_w, height, width,
            channels, c, live, K, OFFSETS, HAS_MASK, MASK_ACT, ACC, INDEX)
        w = _kernel_of_sample(kernel + k * channels, m_of_kernel, low_in, high_in, c, c_live, SPLIT, ACC)
        acc += sample(v00, v01, v10, v11, f, e) * m[:, None] * w[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + c, mask=c_live, other=0.).to(ACC)[None, :]
    tl.store(y + p[:, None] * channels + c[None, :], round_to(acc, y, UPCAST), mask=live)


@jit_of_any_size
def backward(
        grad, x, steps, mask, low, high, kernel, mean, grad_x, sampling, scale,
        height, width, out_h, out_w, start_h, start_w, stride_h, stride_w, spacing_h, spacing_w,
        s_b, s_c, s_h, s_w, m_b, m_c, m_h, m_w, channels, step_width, positions, base,
        K: tl.constexpr, OFFSETS: tl.constexpr, SPLIT: tl.constexpr, HAS_MASK: tl.constexpr,
        DILATION_ACT: tl.constexpr, MASK_ACT: tl.constexpr, GAINS_ACT: tl.constexpr, ACC: tl.constexpr,
        INDEX: tl.constexpr, FIXED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Add the gradient of x to grad_x, and write each block's share in the gradients of mask and steps to sampling.

    sampling (blocks of channels, K*K + S, positions), S as in `scatter_columns`. Grid: as in `forward`.
    """
    b, q, p, alive = place(tl.program_id(0), 0, 0, out_h * out_w, BLOCK_P)
    group, c, c_live = channels_of(tl.program_id(1), step_width, BLOCK_C)
    s_c, s_w, m_c, m_w = wide(s_c, s_w, m_c, m_w)
    live = alive[:, None] & c_live[None, :]
    i, j = q // out_w, q % out_w
    pixel_row, pixel_col = i * stride_h + start_h, j * stride_w + start_w
    x += b * height * width * channels
    grad_x += b * height * width * channels
    steps = steps_of(steps, b, group, i, j, s_b, s_c, s_h, s_w, K, OFFSETS)
    d = dilations(steps, alive, base, OFFSETS, DILATION_ACT, ACC)
    at_mask = mask + b * m_b + group * (K * K) * m_c + i.to(tl.int64) * m_h + j * m_w
    low_in = gain(low, b * channels + c, c_live, GAINS_ACT, ACC)
    high_in = gain(high, b * channels + c, c_live, GAINS_ACT, ACC)
    m_of_kernel = tl.zeros([BLOCK_C], dtype=ACC)
    if SPLIT:
        m_of_kernel = tl.load(mean + c, mask=c_live, other=0.).to(ACC)
    factor = 1.
    if FIXED:
        factor = tl.load(scale)
    positions = tl.cast(positions, tl.int64)  # Triton makes an argument of 1 a plain number
    rows = K * K + (2 * K * K if OFFSETS else 1)
    into = sampling + tl.program_id(1) * rows * positions + p
    g = tl.load(grad + p[:, None] * channels + c[None, :], mask=live, other=0.).to(ACC)
    grad_d = tl.zeros([BLOCK_P], dtype=ACC)
    for k in range(K * K):
        v00, v01, v10, v11, row, col, f, e, m = samples(
            x, steps, d, at_mask, alive, pixel_row, pixel_col, k, s_c, m_c, spacing_h, spacing_w, height, width,
            channels, c, live, K, OFFSETS, HAS_MASK, MASK_ACT, ACC, INDEX)
        w = _kernel_of_sample(kernel + k * channels, m_of_kernel, low_in, high_in, c, c_live, SPLIT, ACC)
        v = g * w[None, :]
        if HAS_MASK:
            tl.store(into + k * positions, tl.sum(v * sample(v00, v01, v10, v11, f, e), axis=1), mask=alive)
            v = v * m[:, None]
        grad_d = add_slopes(v, v00, v01, v10, v11, f, e, k, into, grad_d, positions, alive, K, OFFSETS)
        scatter(
            grad_x, row, col, f, e, 1 if OFFSETS else k // K - K // 2, 1 if OFFSETS else k % K - K // 2, height, width,
            channels, c, live, v, factor, FIXED, INDEX)
    if not OFFSETS:
        tl.store(into + K * K * positions, grad_d, mask=alive)


@jit_of_any_size
def products(
        grad, x, steps, mask, into,
        height, width, out_h, out_w, start_h, start_w, stride_h, stride_w, spacing_h, spacing_w,
        s_b, s_c, s_h, s_w, m_b, m_c, m_h, m_w, channels, step_width, base,
        K: tl.constexpr, OFFSETS: tl.constexpr, HAS_MASK: tl.constexpr, DILATION_ACT: tl.constexpr,
        MASK_ACT: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Sum, over the positions of each sample, the gradient times the masked samples of a tap; into is (B, rows, C).

    There are K*K rows, or one more, which is the sum of the gradient. Grid: samples, rows, blocks of channels.
    """
    b, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, c, c_live = channels_of(tl.program_id(2), step_width, BLOCK_C)
    s_c, s_w, m_c, m_w = wide(s_c, s_w, m_c, m_w)
    x += b * height * width * channels
    mask += b * m_b + group * (K * K) * m_c
    area = out_h * out_w
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    if k == K * K:
        for start in range(0, area, BLOCK_P):
            q = start + tl.arange(0, BLOCK_P)
            live = (q < area)[:, None] & c_live[None, :]
            acc += tl.load(grad + (b * area + q)[:, None] * channels + c[None, :], mask=live, other=0.).to(ACC)
    else:
        for start in range(0, area, BLOCK_P):
            q = start + tl.arange(0, BLOCK_P)
            alive = q < area
            live = alive[:, None] & c_live[None, :]
            i, j = q // out_w, q % out_w
            at_steps = steps_of(steps, b, group, i, j, s_b, s_c, s_h, s_w, K, OFFSETS)
            d = dilations(at_steps, alive, base, OFFSETS, DILATION_ACT, ACC)
            v00, v01, v10, v11, row, col, f, e, m = samples(
                x, at_steps, d, mask + i.to(tl.int64) * m_h + j * m_w, alive, i * stride_h + start_h,
                j * stride_w + start_w, k, s_c, m_c, spacing_h, spacing_w, height, width, channels, c, live, K, OFFSETS,
                HAS_MASK, MASK_ACT, ACC, INDEX)
            g = tl.load(grad + (b * area + q)[:, None] * channels + c[None, :], mask=live, other=0.).to(ACC)
            acc += g * sample(v00, v01, v10, v11, f, e) * m[:, None]
    tl.store(into + (b * tl.num_programs(1) + k) * channels + c, tl.sum(acc, axis=0), mask=c_live)


@triton.jit
def kernel_gradient(
        sums, kernel, mean, low, high, grad_low, grad_high,
        channels, rows,
        TAPS: tl.constexpr, TAPS_UP: tl.constexpr, GAINS_ACT: tl.constexpr, ACC: tl.constexpr,
        UPCAST: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Gradients of the gains from the sums (B, rows, C) of `products`. Each image's share in the gradient of the kernel
    replaces its sums.

    Grid: samples, blocks of channels.
    """
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, TAPS_UP)
    c_live = c < channels
    live = (k < TAPS)[:, None] & c_live[None, :]
    at = k[:, None] * channels + c[None, :]
    total = tl.load(sums + b * rows * channels + at, mask=live, other=0.)
    m = tl.load(mean + c, mask=c_live, other=0.).to(ACC)
    w = tl.load(kernel + at, mask=live, other=0.).to(ACC) - m[None, :]
    of_all = tl.sum(total, axis=0)
    at_gain = b * channels + c
    gain_gradient(low, grad_low, at_gain, of_all * m, c_live, GAINS_ACT, ACC, UPCAST)
    gain_gradient(high, grad_high, at_gain, tl.sum(total * w, axis=0), c_live, GAINS_ACT, ACC, UPCAST)
    high_in = gain(high, at_gain, c_live, GAINS_ACT, ACC)
    of_mean = (gain(low, at_gain, c_live, GAINS_ACT, ACC) - high_in) * of_all
    total = total * high_in[None, :] + (of_mean / TAPS)[None, :]
    tl.store(sums + b * rows * channels + at, total, mask=live)
