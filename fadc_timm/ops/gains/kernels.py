"""Triton kernels of AdaKern's linear layers.

A batch is tens of vectors, too few for a matrix product of the library to fill a GPU. So most programs here compute
one row of a result, the product of a vector with a block of a matrix. Every sum has a fixed order.
"""
import triton
import triton.language as tl

from ..triton_math import dot, jit_of_any_size, round_to

__all__ = ['heads', 'heads_gradient', 'norm', 'norm_gradient', 'trunk', 'trunk_and_heads', 'trunk_gradient']


@triton.jit
def _sum_of_parts(means, b, c, c_live, parts, channels, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_C: tl.constexpr):
    """Some channels c of the mean of sample b: the sum over n of means (B, n, C), n = parts."""
    total = tl.zeros([BLOCK_N, BLOCK_C], dtype=ACC)
    own = means + b * parts * channels
    for first in range(0, parts, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        live = (n < parts)[:, None] & c_live[None, :]
        total += tl.load(own + n[:, None] * channels + c[None, :], mask=live, other=0.).to(ACC)
    return tl.sum(total, axis=0)


@triton.jit
def _fixed_statistics(running_mean, running_var, k, live, EPS: tl.constexpr, ACC: tl.constexpr):
    """Of some channels k of a BatchNorm: the running mean, and the inverse deviation."""
    mean = tl.load(running_mean + k, mask=live, other=0.).to(ACC)
    return mean, 1. / tl.sqrt(tl.load(running_var + k, mask=live, other=1.).to(ACC) + EPS)


@triton.jit
def _normalized(value, mean, rstd, weight, bias, k, live, ACC: tl.constexpr):
    """Some channels k behind a BatchNorm, of one sample or of some; weight and bias may be None."""
    value = (value - mean) * rstd
    if weight is not None:
        value *= tl.load(weight + k, mask=live, other=0.).to(ACC)
    if bias is not None:
        value += tl.load(bias + k, mask=live, other=0.).to(ACC)
    return value


@jit_of_any_size
def trunk(
        means, weight, bias, y, mean,
        parts, channels, outputs,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
        BLOCK_O: tl.constexpr,
):
    """mean (B, C): the sum of means (B, parts, C); y (B, outputs): mean @ weight.T + bias.

    Grid: samples, blocks of outputs.
    """
    b, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_live = o < outputs
    acc = tl.zeros([BLOCK_O, BLOCK_C], dtype=ACC)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_live = c < channels
        m = _sum_of_parts(means, b, c, c_live, parts, channels, ACC, BLOCK_N, BLOCK_C)
        tl.store(mean + b * channels + c, m, mask=c_live & (tl.program_id(1) == 0))
        at = o[:, None] * channels + c[None, :]
        w = tl.load(weight + at, mask=o_live[:, None] & c_live[None, :], other=0.).to(ACC)
        acc += w * m[None, :]
    value = tl.sum(acc, axis=1)
    if bias is not None:
        value += tl.load(bias + o, mask=o_live, other=0.).to(ACC)
    tl.store(y + b * outputs + o, round_to(value, y, UPCAST), mask=o_live)


@triton.jit
def _trunk_parameters_gradient(
        o, grad, mean, grad_weight, grad_bias,
        batch, channels, outputs,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Row o of the weight's gradient, and the bias's: sums over the samples."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_live = c < channels
    acc = tl.zeros([BLOCK_I, BLOCK_C], dtype=ACC)
    total = tl.zeros([BLOCK_I], dtype=ACC)
    for start in range(0, batch, BLOCK_I):
        b = start + tl.arange(0, BLOCK_I)
        live, b = b < batch, b.to(tl.int64)
        g = tl.load(grad + b * outputs + o, mask=live, other=0.).to(ACC)
        m = tl.load(mean + b[:, None] * channels + c[None, :], mask=live[:, None] & c_live[None, :], other=0.).to(ACC)
        acc += g[:, None] * m
        total += g
    tl.store(grad_weight + o * channels + c, round_to(tl.sum(acc, axis=0), grad_weight, UPCAST), mask=c_live)
    if grad_bias is not None:
        if tl.program_id(1) == 0:
            tl.store(grad_bias + o, round_to(tl.sum(total, axis=0), grad_bias, UPCAST))


@triton.jit
def _times_matrix(vector, matrix, c, c_live, rows, columns, ACC: tl.constexpr, BLOCK_I: tl.constexpr,
                  BLOCK_C: tl.constexpr):
    """Some columns c of the product of a vector (rows,) with a matrix (rows, columns)."""
    acc = tl.zeros([BLOCK_I, BLOCK_C], dtype=ACC)
    for start in range(0, rows, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        live = i < rows
        v = tl.load(vector + i, mask=live, other=0.).to(ACC)
        m = tl.load(matrix + i[:, None] * columns + c[None, :], mask=live[:, None] & c_live[None, :], other=0.).to(ACC)
        acc += v[:, None] * m
    return tl.sum(acc, axis=0)


@triton.jit
def _mean_gradient(
        b, grad, weight, grad_mean,
        channels, outputs,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Row b of the mean's gradient: a sum over the outputs."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_live = c < channels
    total = _times_matrix(grad + b * outputs, weight, c, c_live, outputs, channels, ACC, BLOCK_I, BLOCK_C)
    tl.store(grad_mean + b * channels + c, round_to(total, grad_mean, UPCAST), mask=c_live)


@triton.jit
def trunk_gradient(
        grad, mean, weight, grad_mean, grad_weight, grad_bias,
        batch, channels, outputs,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Gradients of `trunk` for the mean, the weight and the bias.

    Grid: outputs, for the parameters, and then samples, for the mean; blocks of channels.
    """
    row = tl.program_id(0)
    if row < outputs:
        _trunk_parameters_gradient(
            row, grad, mean, grad_weight, grad_bias, batch, channels, outputs, ACC, UPCAST, BLOCK_I, BLOCK_C)
    else:
        _mean_gradient(
            (row - outputs).to(tl.int64), grad, weight, grad_mean, channels, outputs, ACC, UPCAST, BLOCK_I, BLOCK_C)


@triton.jit
def _update(running, k, live, value, share, UPCAST: tl.constexpr, ACC: tl.constexpr):
    """Move a running statistic by a share of the way to a value."""
    old = tl.load(running + k, mask=live, other=0.).to(ACC)
    tl.store(running + k, round_to(share * value + (1. - share) * old, running, UPCAST), mask=live)


@triton.jit
def _of_samples(start, k, k_live, batch, channels, BLOCK_B: tl.constexpr):
    """Where some channels k of BLOCK_B samples are, from a first one on, and which of them there are."""
    b = start + tl.arange(0, BLOCK_B)
    return b.to(tl.int64)[:, None] * channels + k[None, :], (b < batch)[:, None] & k_live[None, :]


@triton.jit
def norm(
        x, weight, bias, running_mean, running_var, y, mean, rstd,
        batch, channels, momentum, momentum_rest,
        EPS: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y (B, K): x (B, K) behind a BatchNorm; grid: blocks of channels.

    With mean and rstd, which are written, the statistics are the batch's, and the running ones, if there are any, are
    updated; the sum of both numbers is the momentum, as one has the digits of float32. Else the running ones are taken.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_live = k < channels
    if mean is not None:
        total = tl.zeros([BLOCK_B, BLOCK_K], dtype=ACC)
        for start in range(0, batch, BLOCK_B):
            at, live = _of_samples(start, k, k_live, batch, channels, BLOCK_B)
            total += tl.load(x + at, mask=live, other=0.).to(ACC)
        m = tl.sum(total, axis=0) / batch
        total = tl.zeros([BLOCK_B, BLOCK_K], dtype=ACC)
        for start in range(0, batch, BLOCK_B):
            at, live = _of_samples(start, k, k_live, batch, channels, BLOCK_B)
            distance = tl.where(live, tl.load(x + at, mask=live, other=0.).to(ACC) - m[None, :], 0.)
            total += distance * distance
        squares = tl.sum(total, axis=0)
        r = 1. / tl.sqrt(squares / batch + EPS)
        tl.store(mean + k, m, mask=k_live)
        tl.store(rstd + k, r, mask=k_live)
        if running_mean is not None:
            share = tl.cast(momentum, ACC) + tl.cast(momentum_rest, ACC)
            _update(running_mean, k, k_live, m, share, UPCAST, ACC)
            _update(running_var, k, k_live, squares / (batch - 1), share, UPCAST, ACC)
    else:
        m, r = _fixed_statistics(running_mean, running_var, k, k_live, EPS, ACC)
    for start in range(0, batch, BLOCK_B):
        at, live = _of_samples(start, k, k_live, batch, channels, BLOCK_B)
        value = tl.load(x + at, mask=live, other=0.).to(ACC)
        value = _normalized(value, m[None, :], r[None, :], weight, bias, k[None, :], k_live[None, :], ACC)
        tl.store(y + at, round_to(value, y, UPCAST), mask=live)


@triton.jit
def norm_gradient(
        grad, x, weight, running_mean, running_var, mean, rstd, grad_x, grad_weight, grad_bias,
        batch, channels,
        EPS: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Gradients of `norm` for x, weight and bias.

    Grid: blocks of channels. Without mean and rstd the statistics were the running ones, which do not depend on x.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_live = k < channels
    if mean is not None:
        m = tl.load(mean + k, mask=k_live, other=0.).to(ACC)
        r = tl.load(rstd + k, mask=k_live, other=0.).to(ACC)
    else:
        m, r = _fixed_statistics(running_mean, running_var, k, k_live, EPS, ACC)
    total = tl.zeros([BLOCK_B, BLOCK_K], dtype=ACC)
    product = tl.zeros([BLOCK_B, BLOCK_K], dtype=ACC)
    for start in range(0, batch, BLOCK_B):
        at, live = _of_samples(start, k, k_live, batch, channels, BLOCK_B)
        g = tl.load(grad + at, mask=live, other=0.).to(ACC)
        total += g
        product += g * (tl.load(x + at, mask=live, other=0.).to(ACC) - m[None, :])
    of_bias, of_weight = tl.sum(total, axis=0), tl.sum(product, axis=0) * r
    if grad_weight is not None:
        tl.store(grad_weight + k, round_to(of_weight, grad_weight, UPCAST), mask=k_live)
    if grad_bias is not None:
        tl.store(grad_bias + k, round_to(of_bias, grad_bias, UPCAST), mask=k_live)
    factor = r
    if weight is not None:
        factor *= tl.load(weight + k, mask=k_live, other=0.).to(ACC)
    for start in range(0, batch, BLOCK_B):
        at, live = _of_samples(start, k, k_live, batch, channels, BLOCK_B)
        g = tl.load(grad + at, mask=live, other=0.).to(ACC)
        if mean is not None:
            normalized = (tl.load(x + at, mask=live, other=0.).to(ACC) - m[None, :]) * r[None, :]
            g -= (of_bias[None, :] + normalized * of_weight[None, :]) / batch
        tl.store(grad_x + at, round_to(g * factor[None, :], grad_x, UPCAST), mask=live)


@triton.jit
def _relu(value):
    """ReLU; NaN stays NaN."""
    return tl.where(value <= 0., 0., value)


@triton.jit
def _head(
        x, weight, bias, y,
        first, inputs, width, outputs,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y = relu(x[:, first:first + width]) @ weight.T + bias, one sample and a block of outputs."""
    b, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_live = o < outputs
    acc = tl.zeros([BLOCK_O, BLOCK_K], dtype=ACC)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live = k < width
        r = _relu(tl.load(x + b * inputs + first + k, mask=live, other=0.).to(ACC))
        w = tl.load(weight + o[:, None] * width + k[None, :], mask=o_live[:, None] & live[None, :], other=0.).to(ACC)
        acc += w * r[None, :]
    value = tl.sum(acc, axis=1) + tl.load(bias + o, mask=o_live, other=0.).to(ACC)
    tl.store(y + b * outputs + o, round_to(value, y, UPCAST), mask=o_live)


@triton.jit
def heads(
        x, weight, bias, weight_2, bias_2, y, y_2,
        inputs, width, outputs,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The heads of both parts, of which each reads its `width` of the `inputs` channels of x, after ReLU.

    Grid: samples, blocks of outputs, parts. weight_2, bias_2 and y_2 are None if there is one part.
    """
    if weight_2 is None:
        _head(x, weight, bias, y, 0, inputs, width, outputs, ACC, UPCAST, BLOCK_O, BLOCK_K)
    else:
        if tl.program_id(2) == 0:
            _head(x, weight, bias, y, 0, inputs, width, outputs, ACC, UPCAST, BLOCK_O, BLOCK_K)
        else:
            _head(x, weight_2, bias_2, y_2, width, inputs, width, outputs, ACC, UPCAST, BLOCK_O, BLOCK_K)


@triton.jit
def _behind_the_trunk(
        k, live, b, means, fc_weight, fc_bias, norm_mean, norm_var, norm_weight, norm_bias,
        parts, channels,
        EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Some channels k of the trunk of sample b, behind the norm and ReLU; zero where they are not live."""
    acc = tl.zeros([BLOCK_K, BLOCK_C], dtype=ACC)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_live = c < channels
        m = _sum_of_parts(means, b, c, c_live, parts, channels, ACC, BLOCK_N, BLOCK_C)
        at = k[:, None] * channels + c[None, :]
        acc += tl.load(fc_weight + at, mask=live[:, None] & c_live[None, :], other=0.).to(ACC) * m[None, :]
    value = tl.sum(acc, axis=1)
    if fc_bias is not None:
        value += tl.load(fc_bias + k, mask=live, other=0.).to(ACC)
    if norm_mean is not None:
        mean, rstd = _fixed_statistics(norm_mean, norm_var, k, live, EPS, ACC)
        value = _normalized(value, mean, rstd, norm_weight, norm_bias, k, live, ACC)
    return tl.where(live, _relu(value), 0.)


@triton.jit
def _times_head(x, weight, o, o_live, start, width, ACC: tl.constexpr, BLOCK_K: tl.constexpr):
    """What some inputs x, from `start` on, add to some outputs o of a head."""
    k = start + tl.arange(0, BLOCK_K)
    at = o[:, None] * width + k[None, :]
    w = tl.load(weight + at, mask=o_live[:, None] & (k < width)[None, :], other=0.).to(ACC)
    return tl.sum(w * x[None, :], axis=1)


@triton.jit
def _trunk_and_head(
        means, fc_weight, fc_bias, norm_mean, norm_var, norm_weight, norm_bias, weight, bias, y,
        first, parts, channels, inputs, outputs, span,
        EPS: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Of one sample `span` outputs of a head, which reads `inputs` channels of the trunk, from `first` on.

    WIDE: These are more than BLOCK_K. Then those behind are computed again for every block of outputs.
    """
    b, low = tl.program_id(0).to(tl.int64), tl.program_id(1) * span
    k = tl.arange(0, BLOCK_K)
    x = _behind_the_trunk(
        first + k, k < inputs, b, means, fc_weight, fc_bias, norm_mean, norm_var, norm_weight, norm_bias, parts,
        channels, EPS, ACC, BLOCK_N, BLOCK_C, BLOCK_K)
    for start in range(low, min(low + span, outputs), BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        o_live = o < outputs
        value = _times_head(x, weight, o, o_live, 0, inputs, ACC, BLOCK_K)
        if WIDE:
            for more in range(BLOCK_K, inputs, BLOCK_K):
                k = more + tl.arange(0, BLOCK_K)
                others = _behind_the_trunk(
                    first + k, k < inputs, b, means, fc_weight, fc_bias, norm_mean, norm_var, norm_weight, norm_bias,
                    parts, channels, EPS, ACC, BLOCK_N, BLOCK_C, BLOCK_K)
                value += _times_head(others, weight, o, o_live, more, inputs, ACC, BLOCK_K)
        value += tl.load(bias + o, mask=o_live, other=0.).to(ACC)
        tl.store(y + b * outputs + o, round_to(value, y, UPCAST), mask=o_live)


@jit_of_any_size
def trunk_and_heads(
        means, fc_weight, fc_bias, norm_mean, norm_var, norm_weight, norm_bias, weight, bias, weight_2, bias_2, y, y_2,
        parts, channels, inputs, outputs, span,
        EPS: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """`trunk`, with norm_mean a BatchNorm of fixed statistics, and `heads`, of which each reads `inputs` channels.

    Every program computes the trunk's channels that its outputs read. Grid: samples, spans of outputs, which are
    multiples of BLOCK_O, parts of the kernel. weight_2, bias_2 and y_2 are None if there is one part.
    """
    if weight_2 is None:
        _trunk_and_head(
            means, fc_weight, fc_bias, norm_mean, norm_var, norm_weight, norm_bias, weight, bias, y, 0, parts, channels,
            inputs, outputs, span, EPS, ACC, UPCAST, WIDE, BLOCK_N, BLOCK_C, BLOCK_K, BLOCK_O)
    else:
        if tl.program_id(2) == 0:
            _trunk_and_head(
                means, fc_weight, fc_bias, norm_mean, norm_var, norm_weight, norm_bias, weight, bias, y, 0, parts,
                channels, inputs, outputs, span, EPS, ACC, UPCAST, WIDE, BLOCK_N, BLOCK_C, BLOCK_K, BLOCK_O)
        else:
            _trunk_and_head(
                means, fc_weight, fc_bias, norm_mean, norm_var, norm_weight, norm_bias, weight_2, bias_2, y_2, inputs,
                parts, channels, inputs, outputs, span, EPS, ACC, UPCAST, WIDE, BLOCK_N, BLOCK_C, BLOCK_K, BLOCK_O)


@triton.jit
def _head_parameters_gradient(
        x, grad, grad_weight, grad_bias,
        first, batch, inputs, width, outputs,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A block of the gradients of a head's weight and bias: a product over the samples."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_live, k_live = o < outputs, k < width
    acc = tl.zeros([BLOCK_O, BLOCK_K], dtype=ACC)
    total = tl.zeros([BLOCK_O, BLOCK_B], dtype=ACC)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        live, b = b < batch, b.to(tl.int64)
        at = b[None, :] * outputs + o[:, None]
        g = tl.load(grad + at, mask=o_live[:, None] & live[None, :], other=0.).to(ACC)
        at = b[:, None] * inputs + first + k[None, :]
        r = _relu(tl.load(x + at, mask=live[:, None] & k_live[None, :], other=0.).to(ACC))
        acc = dot(g, r, acc, 'ieee', False)
        total += g
    at = o[:, None] * width + k[None, :]
    tl.store(grad_weight + at, round_to(acc, grad_weight, UPCAST), mask=o_live[:, None] & k_live[None, :])
    bias_live = o_live & (tl.program_id(1) == 0)
    tl.store(grad_bias + o, round_to(tl.sum(total, axis=1), grad_bias, UPCAST), mask=bias_live)


@triton.jit
def _head_input_gradient(
        b, x, grad, weight, grad_x,
        first, inputs, width, outputs,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A sample's gradient of the channels that a head reads, through ReLU: a sum over the outputs."""
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_live = k < width
    total = _times_matrix(grad + b * outputs, weight, k, k_live, outputs, width, ACC, BLOCK_I, BLOCK_K)
    at = b * inputs + first + k
    value = tl.load(x + at, mask=k_live, other=0.).to(ACC)
    tl.store(grad_x + at, round_to(tl.where(value <= 0., 0., total), grad_x, UPCAST), mask=k_live)


@triton.jit
def _head_gradient(
        x, grad, weight, grad_x, grad_weight, grad_bias,
        first, batch, inputs, width, outputs,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(outputs, BLOCK_O)
    if tl.program_id(0) < blocks:
        _head_parameters_gradient(
            x, grad, grad_weight, grad_bias, first, batch, inputs, width, outputs, ACC, UPCAST, BLOCK_O, BLOCK_B,
            BLOCK_K)
    else:
        _head_input_gradient(
            (tl.program_id(0) - blocks).to(tl.int64), x, grad, weight, grad_x, first, inputs, width, outputs, ACC,
            UPCAST, BLOCK_I, BLOCK_K)


@triton.jit
def heads_gradient(
        x, grad, grad_2, weight, weight_2, grad_x, grad_weight, grad_bias, grad_weight_2, grad_bias_2,
        batch, inputs, width, outputs,
        ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    """Gradients of `heads` for x and all parameters.

    Grid: blocks of outputs, for the parameters, and then samples, for x; blocks of a head's channels; parts.
    """
    if weight_2 is None:
        _head_gradient(
            x, grad, weight, grad_x, grad_weight, grad_bias, 0, batch, inputs, width, outputs, ACC, UPCAST, BLOCK_O,
            BLOCK_B, BLOCK_I, BLOCK_K)
    else:
        if tl.program_id(2) == 0:
            _head_gradient(
                x, grad, weight, grad_x, grad_weight, grad_bias, 0, batch, inputs, width, outputs, ACC, UPCAST,
                BLOCK_O, BLOCK_B, BLOCK_I, BLOCK_K)
        else:
            _head_gradient(
                x, grad_2, weight_2, grad_x, grad_weight_2, grad_bias_2, width, batch, inputs, width, outputs, ACC,
                UPCAST, BLOCK_O, BLOCK_B, BLOCK_I, BLOCK_K)
