"""Triton kernels of the dense and grouped operator: forward, and its gradients in two.

Groups are bundled until a bundle has enough channels for matrix instructions; its kernel is block-diagonal. Channels
are visited in slices of `slice_width`, which lie in one bundle and in one dilation group. AdaKern's split costs one
product more: the mean over the taps sees the total of the samples, so there are ten products for nine taps and no
kernel for each sample.

Shapes: x (B, H, W, C), y and its gradient (B, H', W', O) contiguous, kernel (bundles, k*k, bundle_in, bundle_out), its
mean (bundles, bundle_in, bundle_out), gains (B, C) and (B, O).
"""
import triton
import triton.language as tl

from .sampling import corner_values, dot, locate, offset, sample, scatter, slopes, tap

__all__ = ['backward_kernel', 'backward_samples', 'forward']


@triton.jit
def forward(
        x, dilation, mask, kernel, mean, bias, low_in, low_out, high_in, high_out, y,
        positions, height, width, out_h, out_w, start_h, start_w, stride_h, stride_w,
        x_b, x_h, x_w, d_b, d_g, d_h, d_w, m_b, m_c, m_h, m_w,
        channels, out_channels, bundle_in, bundle_out, slice_width, dilation_width,
        K: tl.constexpr, SPLIT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
        INDEX: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Grid: blocks of positions, blocks of a bundle's output channels, bundles."""
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    bundle = tl.program_id(2).to(tl.int64)
    alive, o_live = p < positions, o < bundle_out
    b, i, j = locate(p, out_h, out_w)
    b = b.to(tl.int64)
    centre_row, centre_col = (i * stride_h + start_h).to(tl.int32), (j * stride_w + start_w).to(tl.int32)
    at_dilation, at_mask = offset(b, i, j, d_b, d_h, d_w), offset(b, i, j, m_b, m_h, m_w)
    acc = tl.zeros([BLOCK_P, BLOCK_O], dtype=ACC)
    acc_low = tl.zeros([BLOCK_P, BLOCK_O], dtype=ACC)
    for first in range(0, bundle_in, slice_width):
        group = (bundle * bundle_in + first) // dilation_width
        d = tl.load(dilation + at_dilation + group * d_g, mask=alive, other=0.).to(ACC)
        for start in range(first, first + slice_width, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            c_live = c < first + slice_width
            channel = bundle * bundle_in + c
            live = alive[:, None] & c_live[None, :]
            w_live = c_live[:, None] & o_live[None, :]
            at_gain = b[:, None] * channels + channel[None, :]
            if SPLIT:
                gain = tl.load(high_in + at_gain, mask=live, other=0.).to(ACC)
                total = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
            for k in range(0, K * K):
                t, u = k // K - K // 2, k % K - K // 2
                row, row1, f = tap(d, t, centre_row)
                col, col1, e = tap(d, u, centre_col)
                v00, v01, v10, v11 = corner_values(
                    x, b, row, row1, col, col1, height, width, x_b, x_h, x_w, channel, live, ACC)
                s = sample(v00, v01, v10, v11, f, e)
                if HAS_MASK:
                    m = tl.load(mask + at_mask + (group * (K * K) + k) * m_c, mask=alive, other=0.).to(ACC)
                    s = s * m[:, None]
                if SPLIT:
                    total += s
                    s = s * gain
                at = ((bundle * (K * K) + k) * bundle_in + c)[:, None] * bundle_out + o[None, :]
                acc = dot(s, tl.load(kernel + at, mask=w_live, other=0.), acc, PRECISION, UPCAST)
            if SPLIT:
                total = total * tl.load(low_in + at_gain, mask=live, other=0.).to(ACC)
                at = (bundle * bundle_in + c)[:, None] * bundle_out + o[None, :]
                acc_low = dot(total, tl.load(mean + at, mask=w_live, other=0.), acc_low, PRECISION, UPCAST)
    out = bundle * bundle_out + o
    live = alive[:, None] & o_live[None, :]
    if SPLIT:
        at_gain = b[:, None] * out_channels + out[None, :]
        acc = acc * tl.load(high_out + at_gain, mask=live, other=0.).to(ACC)
        acc += acc_low * tl.load(low_out + at_gain, mask=live, other=0.).to(ACC)
    if HAS_BIAS:
        acc += tl.load(bias + out, mask=o_live, other=0.).to(ACC)[None, :]
    tl.store(y + p.to(tl.int64)[:, None] * out_channels + out[None, :], acc.to(y.dtype.element_ty), mask=live)


@triton.jit
def backward_samples(
        grad, x, dilation, mask, kernel, mean, low_in, low_out, high_in, high_out, grad_x, grad_sampling, scale,
        positions, height, width, out_h, out_w, start_h, start_w, stride_h, stride_w,
        x_b, x_h, x_w, g_b, g_h, d_b, d_g, d_h, d_w, m_b, m_c, m_h, m_w,
        channels, out_channels, bundle_in, bundle_out, slice_width, dilation_width,
        K: tl.constexpr, SPLIT: tl.constexpr, HAS_MASK: tl.constexpr, ACC: tl.constexpr, FIXED: tl.constexpr,
        INDEX: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Gradients of x, and of mask and dilation: those of a block of channels, (blocks, k*k + 1, positions).

    grad_x (B, H, W, C) contiguous is added to. Grid: blocks of positions, blocks of channels.
    """
    p = tl.program_id(0).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    alive = p < positions
    b, i, j = locate(p, out_h, out_w)
    b = b.to(tl.int64)
    blocks = tl.cdiv(slice_width, BLOCK_C)
    piece = tl.program_id(1).to(tl.int64)
    first = piece // blocks * slice_width
    channel = first + piece % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    c_live = channel < first + slice_width
    bundle, group = first // bundle_in, first // dilation_width
    c = channel - bundle * bundle_in
    live = alive[:, None] & c_live[None, :]
    centre_row, centre_col = (i * stride_h + start_h).to(tl.int32), (j * stride_w + start_w).to(tl.int32)
    at_mask = offset(b, i, j, m_b, m_h, m_w)
    d = tl.load(dilation + offset(b, i, j, d_b, d_h, d_w) + group * d_g, mask=alive, other=0.).to(ACC)
    factor = 1.
    if FIXED:
        factor = tl.load(scale)
    if SPLIT:
        at_gain = b[:, None] * channels + channel[None, :]
        gain = tl.load(high_in + at_gain, mask=live, other=0.).to(ACC)
        low = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
        for start in range(0, bundle_out, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            o_live = o < bundle_out
            out = bundle * bundle_out + o
            g_live = alive[:, None] & o_live[None, :]
            g = tl.load(grad + p.to(tl.int64)[:, None] * out_channels + out[None, :], mask=g_live, other=0.).to(ACC)
            g = g * tl.load(low_out + b[:, None] * out_channels + out[None, :], mask=g_live, other=0.).to(ACC)
            at = (bundle * bundle_in + c)[None, :] * bundle_out + o[:, None]
            w = tl.load(mean + at, mask=o_live[:, None] & c_live[None, :], other=0.)
            low = dot(g, w, low, PRECISION, UPCAST)
        low = low * tl.load(low_in + at_gain, mask=live, other=0.).to(ACC)
    grad_d = tl.zeros([BLOCK_P], dtype=ACC)
    for k in range(0, K * K):
        acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
        for start in range(0, bundle_out, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            o_live = o < bundle_out
            out = bundle * bundle_out + o
            g_live = alive[:, None] & o_live[None, :]
            g = tl.load(grad + p.to(tl.int64)[:, None] * out_channels + out[None, :], mask=g_live, other=0.)
            if SPLIT:
                scale_out = tl.load(high_out + b[:, None] * out_channels + out[None, :], mask=g_live, other=0.)
                g = g.to(ACC) * scale_out.to(ACC)
            at = ((bundle * (K * K) + k) * bundle_in + c)[None, :] * bundle_out + o[:, None]
            w = tl.load(kernel + at, mask=o_live[:, None] & c_live[None, :], other=0.)
            acc = dot(g, w, acc, PRECISION, UPCAST)
        if SPLIT:
            acc = acc * gain + low
        t, u = k // K - K // 2, k % K - K // 2
        row, row1, f = tap(d, t, centre_row)
        col, col1, e = tap(d, u, centre_col)
        v00, v01, v10, v11 = corner_values(x, b, row, row1, col, col1, height, width, x_b, x_h, x_w, channel, live, ACC)
        into = grad_sampling + (piece * (K * K + 1) + k) * positions + p
        if HAS_MASK:
            tl.store(into, tl.sum(acc * sample(v00, v01, v10, v11, f, e), axis=1), mask=alive)
            m = tl.load(mask + at_mask + (group * (K * K) + k) * m_c, mask=alive, other=0.).to(ACC)
            acc = acc * m[:, None]
        grad_d += tl.sum(acc * slopes(v00, v01, v10, v11, f, e, t, u), axis=1)
        scatter(grad_x, b, row, row1, col, col1, f, e, height, width, g_b, g_h, channels, channel, live, acc,
                factor, FIXED)
    tl.store(grad_sampling + (piece * (K * K + 1) + K * K) * positions + p, grad_d, mask=alive)


@triton.jit
def _gain_gradients(product, own, other, into_in, into_out, in_live, out_live):
    """Of the gains of a block of channels, own (C,), and of output channels, other (O,), from kernel * its gradient."""
    tl.store(into_in, tl.sum(product * other[None, :], axis=1), mask=in_live)
    tl.store(into_out, tl.sum(product * own[:, None], axis=0), mask=out_live)


@triton.jit
def backward_kernel(
        grad, x, dilation, mask, kernel, mean, low_in, low_out, high_in, high_out,
        grad_kernel, grad_mean, grad_high_in, grad_low_in, grad_high_out, grad_low_out,
        batch, chunks, chunk, units_a_split, height, width, out_h, out_w, start_h, start_w, stride_h, stride_w,
        x_b, x_h, x_w, d_b, d_g, d_h, d_w, m_b, m_c, m_h, m_w,
        channels, out_channels, bundle_in, bundle_out, slice_width, dilation_width,
        K: tl.constexpr, SPLIT: tl.constexpr, HAS_MASK: tl.constexpr, ACC: tl.constexpr,
        PRECISION: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Gradients of the kernel, its mean and the gains.

    A unit is `chunk` positions of one sample, so that the gains are its own, and M = sum over its positions of the
    masked sample times the gradient; all of these gradients follow from M. A split takes some units and adds up what
    concerns the kernel: (splits, bundles, k*k, bundle_in, bundle_out). What concerns gains is kept for each unit:
    (rows, units, C) and (rows, units, O), a row for each tap and block of the other channels.
    Grid: blocks of channels times blocks of a bundle's output channels, taps, splits.
    """
    o_blocks = tl.cdiv(bundle_out, BLOCK_O)
    blocks = tl.cdiv(slice_width, BLOCK_C)
    piece = (tl.program_id(0) // o_blocks).to(tl.int64)
    o_block = tl.program_id(0) % o_blocks
    k = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    first = piece // blocks * slice_width
    channel = first + piece % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    c_live = channel < first + slice_width
    bundle, group = first // bundle_in, first // dilation_width
    c = channel - bundle * bundle_in
    o = o_block * BLOCK_O + tl.arange(0, BLOCK_O)
    o_live = o < bundle_out
    out = bundle * bundle_out + o
    w_live = c_live[:, None] & o_live[None, :]
    t, u = k // K - K // 2, k % K - K // 2
    units = batch * chunks
    area = out_h * out_w
    pieces_a_bundle = bundle_in // slice_width * blocks
    row_in = (k * o_blocks + o_block).to(tl.int64) * units
    row_out = (k * pieces_a_bundle + piece % pieces_a_bundle).to(tl.int64) * units
    at_kernel = (bundle * (K * K) + k) * bundle_in * bundle_out + c[:, None] * bundle_out + o[None, :]
    high = tl.zeros([BLOCK_C, BLOCK_O], dtype=ACC)
    low = tl.zeros([BLOCK_C, BLOCK_O], dtype=ACC)
    for unit in range(split * units_a_split, tl.minimum((split + 1) * units_a_split, units)):
        b = (unit // chunks).to(tl.int64)
        begin = unit % chunks * chunk
        end = tl.minimum(begin + chunk, area)
        acc = tl.zeros([BLOCK_C, BLOCK_O], dtype=ACC)
        for at in range(begin, end, BLOCK_P):
            q = at + tl.arange(0, BLOCK_P)
            alive = q < end
            i, j = q // out_w, q % out_w
            d = tl.load(dilation + offset(b, i, j, d_b, d_h, d_w) + group * d_g, mask=alive, other=0.).to(ACC)
            row, row1, f = tap(d, t, (i * stride_h + start_h).to(tl.int32))
            col, col1, e = tap(d, u, (j * stride_w + start_w).to(tl.int32))
            live = alive[:, None] & c_live[None, :]
            v00, v01, v10, v11 = corner_values(
                x, b, row, row1, col, col1, height, width, x_b, x_h, x_w, channel, live, ACC)
            s = sample(v00, v01, v10, v11, f, e)
            if HAS_MASK:
                at_mask = offset(b, i, j, m_b, m_h, m_w) + (group * (K * K) + k) * m_c
                s = s * tl.load(mask + at_mask, mask=alive, other=0.).to(ACC)[:, None]
            g = tl.load(grad + (b * area + q)[:, None] * out_channels + out[None, :],
                        mask=alive[:, None] & o_live[None, :], other=0.)
            acc = dot(tl.trans(s), g, acc, PRECISION, UPCAST)
        if SPLIT:
            own = tl.load(high_in + b * channels + channel, mask=c_live, other=0.).to(ACC)
            other = tl.load(high_out + b * out_channels + out, mask=o_live, other=0.).to(ACC)
            high += acc * own[:, None] * other[None, :]
            w = tl.load(kernel + at_kernel, mask=w_live, other=0.).to(ACC)
            _gain_gradients(
                acc * w, own, other, grad_high_in + (row_in + unit) * channels + channel,
                grad_high_out + (row_out + unit) * out_channels + out, c_live, o_live)
            own = tl.load(low_in + b * channels + channel, mask=c_live, other=0.).to(ACC)
            other = tl.load(low_out + b * out_channels + out, mask=o_live, other=0.).to(ACC)
            low += acc * own[:, None] * other[None, :]
            w = tl.load(mean + (bundle * bundle_in + c)[:, None] * bundle_out + o[None, :], mask=w_live, other=0.)
            _gain_gradients(
                acc * w.to(ACC), own, other, grad_low_in + (row_in + unit) * channels + channel,
                grad_low_out + (row_out + unit) * out_channels + out, c_live, o_live)
        else:
            high += acc
    at_split = split * (channels // bundle_in) * (K * K) * bundle_in * bundle_out + at_kernel
    tl.store(grad_kernel + at_split, high, mask=w_live)
    if SPLIT:
        tl.store(grad_mean + at_split, low, mask=w_live)
