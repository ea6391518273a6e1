"""Triton kernels of the depthwise operator: forward, and all of its gradients in one.

There is no matrix product in it: a program reads the pixels of its positions, a block of channels at a time, through
the cache. A unit is BLOCK_P positions of one sample, which has a kernel of its own or shares one.

Shapes: x (B, H, W, C), y and its gradient (B, H', W', C) contiguous, kernel (B or 1, k*k, C).
"""
import triton
import triton.language as tl

from .sampling import corner_values, offset, sample, scatter, slopes, tap

__all__ = ['backward', 'forward']


@triton.jit
def channels_of_part(dilation_width, part_width, parts_a_group):
    """Dilation group, first channel and end of the program's part."""
    part = tl.program_id(1).to(tl.int64)
    group = part // parts_a_group
    first = group * dilation_width + part % parts_a_group * part_width
    return group, first, tl.minimum(first + part_width, (group + 1) * dilation_width)


@triton.jit
def forward(
        x, dilation, mask, kernel, bias, y,
        chunks, height, width, out_h, out_w, start_h, start_w, stride_h, stride_w,
        x_b, x_h, x_w, d_b, d_g, d_h, d_w, m_b, m_c, m_h, m_w, w_b,
        channels, dilation_width, part_width, parts_a_group,
        K: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Grid: units, parts: `part_width` channels of one dilation group."""
    unit = tl.program_id(0).to(tl.int64)
    b = unit // chunks
    area = out_h * out_w
    q = (unit % chunks * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int32)
    alive = q < area
    group, first, last = channels_of_part(dilation_width, part_width, parts_a_group)
    i, j = q // out_w, q % out_w
    d = tl.load(dilation + offset(b, i, j, d_b, d_h, d_w) + group * d_g, mask=alive, other=0.).to(ACC)
    for start in range(first, last, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        c_live = channel < last
        live = alive[:, None] & c_live[None, :]
        acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
        for k in range(0, K * K):
            t, u = k // K - K // 2, k % K - K // 2
            row, row1, f = tap(d, t, i * stride_h + start_h)
            col, col1, e = tap(d, u, j * stride_w + start_w)
            v00, v01, v10, v11 = corner_values(
                x, b, row, row1, col, col1, height, width, x_b, x_h, x_w, channel, live, ACC)
            s = sample(v00, v01, v10, v11, f, e)
            if HAS_MASK:
                at_mask = offset(b, i, j, m_b, m_h, m_w) + (group * (K * K) + k) * m_c
                s = s * tl.load(mask + at_mask, mask=alive, other=0.).to(ACC)[:, None]
            acc += s * tl.load(kernel + b * w_b + k * channels + channel, mask=c_live, other=0.).to(ACC)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias + channel, mask=c_live, other=0.).to(ACC)[None, :]
        into = y + (b * area + q)[:, None] * channels + channel[None, :]
        tl.store(into, acc.to(y.dtype.element_ty), mask=live)


@triton.jit
def backward(
        grad, x, dilation, mask, kernel, grad_x, grad_sampling, grad_kernel, scale,
        positions, chunks, height, width, out_h, out_w, start_h, start_w, stride_h, stride_w,
        x_b, x_h, x_w, g_b, g_h, d_b, d_g, d_h, d_w, m_b, m_c, m_h, m_w, w_b,
        channels, dilation_width, part_width, parts_a_group,
        K: tl.constexpr, HAS_MASK: tl.constexpr, ACC: tl.constexpr, FIXED: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Gradients of x (added to grad_x), of mask and dilation of a part's channels (parts, k*k + 1, positions), and of
    the kernel of a unit (units, k*k, C). Grid: units, parts.
    """
    unit = tl.program_id(0).to(tl.int64)
    b = unit // chunks
    area = out_h * out_w
    q = (unit % chunks * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int32)
    alive = q < area
    group, first, last = channels_of_part(dilation_width, part_width, parts_a_group)
    i, j = q // out_w, q % out_w
    d = tl.load(dilation + offset(b, i, j, d_b, d_h, d_w) + group * d_g, mask=alive, other=0.).to(ACC)
    factor = 1.
    if FIXED:
        factor = tl.load(scale)
    grad_d = tl.zeros([BLOCK_P], dtype=ACC)
    into = grad_sampling + tl.program_id(1).to(tl.int64) * (K * K + 1) * positions + b * area + q
    for k in range(0, K * K):
        t, u = k // K - K // 2, k % K - K // 2
        row, row1, f = tap(d, t, i * stride_h + start_h)
        col, col1, e = tap(d, u, j * stride_w + start_w)
        m = tl.full([BLOCK_P], 1., dtype=ACC)
        if HAS_MASK:
            at_mask = offset(b, i, j, m_b, m_h, m_w) + (group * (K * K) + k) * m_c
            m = tl.load(mask + at_mask, mask=alive, other=0.).to(ACC)
        grad_m = tl.zeros([BLOCK_P], dtype=ACC)
        for start in range(first, last, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            c_live = channel < last
            live = alive[:, None] & c_live[None, :]
            g = tl.load(grad + (b * area + q)[:, None] * channels + channel[None, :], mask=live, other=0.).to(ACC)
            v00, v01, v10, v11 = corner_values(
                x, b, row, row1, col, col1, height, width, x_b, x_h, x_w, channel, live, ACC)
            s = sample(v00, v01, v10, v11, f, e)
            at = k * channels + channel
            tl.store(grad_kernel + unit * (K * K) * channels + at, tl.sum(g * s * m[:, None], axis=0), mask=c_live)
            g = g * tl.load(kernel + b * w_b + at, mask=c_live, other=0.).to(ACC)[None, :]
            grad_m += tl.sum(g * s, axis=1)
            g = g * m[:, None]
            grad_d += tl.sum(g * slopes(v00, v01, v10, v11, f, e, t, u), axis=1)
            scatter(grad_x, b, row, row1, col, col1, f, e, height, width, g_b, g_h, channels, channel, live,
                    g, factor, FIXED)
        if HAS_MASK:
            tl.store(into + k * positions, grad_m, mask=alive)
    tl.store(into + K * K * positions, grad_d, mask=alive)
