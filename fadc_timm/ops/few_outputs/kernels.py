"""Triton kernels around the matrix products of a convolution with few outputs.

Forward: `pack` writes the kernel as a matrix, and those of other convolutions beside it. One product multiplies all
pixels by it. `add_taps` adds up the products that meet at a position.

Backward: `spread` is the transpose of `add_taps`. Two products give the gradients of the map and of the matrix, and
`unpack` brings the latter into the kernel's layout.

Shapes: x (B, H, W, C) and y (B, H', W', O) contiguous; taps (columns, C), whose row k*O + o is tap k of output o, with
rows of zeros behind; products and their gradient (B*H*W, columns).
"""
import triton
import triton.language as tl

from ..triton_math import jit_of_any_size, round_to

__all__ = ['add_taps', 'pack', 'spread', 'unpack']


@triton.jit
def _pack_one(weight, taps, outputs, channels, columns, w_o, w_c, w_k, TAPS: tl.constexpr, UPCAST: tl.constexpr,
              BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column, c = at // channels, at % channels
    k, o = column // outputs, column % outputs
    w = tl.load(weight + o.to(tl.int64) * w_o + c * w_c + k * w_k, mask=(column < columns) & (k < TAPS), other=0.)
    tl.store(taps + at, round_to(w, taps, UPCAST), mask=column < columns)


@triton.jit
def pack(
        weight, taps, weight_2, taps_2, weight_3, taps_3,
        outputs, channels, columns, w_o, w_c, w_k,
        outputs_2, channels_2, columns_2, w_o_2, w_c_2, w_k_2,
        outputs_3, channels_3, columns_3, w_o_3, w_c_3, w_k_3,
        TAPS: tl.constexpr, TAPS_2: tl.constexpr, TAPS_3: tl.constexpr, UPCAST: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write one to three weights (O, C, K*K) as taps. Grid: blocks of elements of the largest taps; weights."""
    if tl.program_id(1) == 0:
        _pack_one(weight, taps, outputs, channels, columns, w_o, w_c, w_k, TAPS, UPCAST, BLOCK)
    if weight_2 is not None:
        if tl.program_id(1) == 1:
            _pack_one(weight_2, taps_2, outputs_2, channels_2, columns_2, w_o_2, w_c_2, w_k_2, TAPS_2, UPCAST, BLOCK)
    if weight_3 is not None:
        if tl.program_id(1) == 2:
            _pack_one(weight_3, taps_3, outputs_3, channels_3, columns_3, w_o_3, w_c_3, w_k_3, TAPS_3, UPCAST, BLOCK)


@triton.jit
def _shifted(products, b, i, j, k, o, live, height, width, start_h, start_w, stride_h, stride_w, step_h, step_w,
             outputs, columns, K_W: tl.constexpr, ACC: tl.constexpr):
    """The products of tap k at the pixels that it reaches from some positions."""
    h, w = i * stride_h + start_h + k // K_W * step_h, j * stride_w + start_w + k % K_W * step_w
    inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
    at = ((b * height + h).to(tl.int64) * width + w) * columns + k * outputs
    return tl.load(products + at[:, None] + o[None, :], mask=inside[:, None] & live, other=0.).to(ACC)


@jit_of_any_size
def add_taps(
        products, bias, y,
        height, width, out_h, out_w, start_h, start_w, stride_h, stride_w, step_h, step_w, positions, outputs, columns,
        K_W: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Add up the products of all taps, and the bias. Grid: blocks of positions."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.arange(0, BLOCK_O)
    live = (p < positions)[:, None] & (o < outputs)[None, :]
    b, i, j = p // out_w // out_h, p // out_w % out_h, p % out_w
    acc = tl.zeros([BLOCK_P, BLOCK_O], dtype=ACC)
    if TAPS <= 49:
        # unrolled, the reads do not wait for each other
        for k in tl.static_range(TAPS):
            acc += _shifted(products, b, i, j, k, o, live, height, width, start_h, start_w, stride_h, stride_w, step_h,
                            step_w, outputs, columns, K_W, ACC)
    else:
        for k in range(TAPS):
            acc += _shifted(products, b, i, j, k, o, live, height, width, start_h, start_w, stride_h, stride_w, step_h,
                            step_w, outputs, columns, K_W, ACC)
    if HAS_BIAS:
        acc += tl.load(bias + o, mask=o < outputs, other=0.).to(ACC)[None, :]
    tl.store(y + p.to(tl.int64)[:, None] * outputs + o[None, :], round_to(acc, y, UPCAST), mask=live)


@triton.jit
def _share(grad, share, p, out_h, out_w, positions, outputs, g_b, g_o, g_h, g_w, ACC: tl.constexpr,
           BLOCK_O: tl.constexpr):
    """The sum of the gradient over some positions (O,)."""
    o = tl.arange(0, BLOCK_O)
    b, i, j = p // out_w // out_h, p // out_w % out_h, p % out_w
    at = grad + (b.to(tl.int64) * g_b + i.to(tl.int64) * g_h + j * g_w)[:, None] + o.to(tl.int64)[None, :] * g_o
    g = tl.load(at, mask=(p < positions)[:, None] & (o < outputs)[None, :], other=0.).to(ACC)
    tl.store(share + o, tl.sum(g, axis=0), mask=o < outputs)


@jit_of_any_size
def spread(
        grad, grad_products, shares,
        height, width, out_h, out_w, start_h, start_w, stride_h, stride_w, step_h, step_w, positions, outputs, columns,
        pixels, g_b, g_o, g_h, g_w,
        K_W: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_O: tl.constexpr,
):
    """The gradient of the products and, if shares is not None, the shares (O,) of some programs in that of the bias.

    grad (B, O, H', W') has any strides. Grid: blocks of pixels or, with shares, of pixels or positions, whichever are
    more; blocks of columns.
    """
    q = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, o = n // outputs, n % outputs
    b, h, w = q // width // height, q // width % height, q % width
    down = h[:, None] - start_h - (k // K_W * step_h)[None, :]
    across = w[:, None] - start_w - (k % K_W * step_w)[None, :]
    i, j = down // stride_h, across // stride_w
    reached = (down >= 0) & (down % stride_h == 0) & (i < out_h)
    reached &= (across >= 0) & (across % stride_w == 0) & (j < out_w)
    at = grad + b.to(tl.int64)[:, None] * g_b + o.to(tl.int64)[None, :] * g_o + i.to(tl.int64) * g_h + j * g_w
    live = (q < pixels)[:, None] & (n < columns)[None, :]
    g = tl.load(at, mask=live & (k < TAPS)[None, :] & reached, other=0.)
    tl.store(grad_products + q.to(tl.int64)[:, None] * columns + n[None, :], g, mask=live)
    if shares is not None:
        if (tl.program_id(1) == 0) & (tl.program_id(0) * BLOCK_P < positions):
            _share(grad, shares + tl.program_id(0) * outputs, q, out_h, out_w, positions, outputs, g_b, g_o, g_h, g_w,
                   ACC, BLOCK_O)


@triton.jit
def _sum_of_shares(shares, grad_bias, count, outputs, ACC: tl.constexpr, UPCAST: tl.constexpr,
                   BLOCK_O: tl.constexpr, ROWS: tl.constexpr):
    o = tl.arange(0, BLOCK_O)
    acc = tl.zeros([ROWS, BLOCK_O], dtype=ACC)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < count)[:, None] & (o < outputs)[None, :]
        acc += tl.load(shares + row[:, None] * outputs + o[None, :], mask=live, other=0.)
    tl.store(grad_bias + o, round_to(tl.sum(acc, axis=0), grad_bias, UPCAST), mask=o < outputs)


@jit_of_any_size
def unpack(
        grad_taps, shares, grad_weight, grad_bias,
        outputs, channels, numel, count, w_o, w_c, w_k,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_O: tl.constexpr, ROWS: tl.constexpr,
):
    """The gradient of the weight from that of taps, and in the first program that of the bias from `count` shares.

    Grid: blocks of elements of the weight.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k, o, c = at // channels // outputs, at // channels % outputs, at % channels
    g = tl.load(grad_taps + at, mask=at < numel, other=0.)
    at_weight = grad_weight + o.to(tl.int64) * w_o + c * w_c + k * w_k
    tl.store(at_weight, round_to(g, grad_weight, UPCAST), mask=at < numel)
    if grad_bias is not None:
        if tl.program_id(0) == 0:
            _sum_of_shares(shares, grad_bias, count, outputs, ACC, UPCAST, BLOCK_O, ROWS)
