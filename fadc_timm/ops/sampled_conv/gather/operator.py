"""Convolution over bilinear samples, as an operator of torch that autograd, torch.compile and FLOP counters can see.

The forward pass makes the samples of one tile, multiplies them by the kernel and forgets them; the backward pass makes
them again. So neither pass holds k*k values per pixel, and the tile stays in cache.

AdaKern splits the kernel into its mean over the taps and the rest. The mean sees only the total of the samples, see
`headroom`. For the rest, centring the samples of a position over the taps does the same as centring the kernel. We
centre whichever tensor is smaller: the samples or the kernel.
"""
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ...derivatives import formula_gradients, wants_formula
from ...runtime import empty_map, exact_products, nhwc
from .. import grid_sample
from ..arguments import NO_GAINS, ConvArgs, split_kernel
from .tiles import Scatter, Tiling, bags_of_total, corner_dots

__all__ = ['sampled_conv2d']


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _scaled(x: Tensor, gain: Optional[Tensor]) -> Tensor:
    """x (B, H, W, C) times a gain (B, C)."""
    return x if gain is None else x * gain[:, None, None]


def _centres_samples(tiling: Tiling, weight: Tensor) -> bool:
    return not tiling.as_image and len(weight) > tiling.b * tiling.out_h * tiling.out_w


def _center(taps: Tensor, mean: Tensor) -> None:
    """Take the mean over the taps (b, n, W', C) off samples (b, n, W', k, k, C), in place."""
    taps -= mean[:, :, :, None, None]


def _split(tiling: Tiling, weight: Tensor) -> Tuple[Tensor, Tensor, bool]:
    """The kernel (O, C, k, k) for the samples, its mean (O, C, 1, 1), and whether the samples are to be centred.

    The mean is multiplied by what the totals are divided by.
    """
    if _centres_samples(tiling, weight):  # the rest is as large as the kernel, and not wanted
        return weight, weight.mean((2, 3), keepdim=True) * tiling.headroom, True
    mean, rest = split_kernel(weight)
    return rest, mean * tiling.headroom, False


class _Gains:
    """The gains of some samples."""

    def __init__(self, samples: slice, *gains: Optional[Tensor]) -> None:
        self.low_in, self.low_out, self.high_in, self.high_out = (None if g is None else g[samples] for g in gains)


@torch.library.custom_op('fadc_timm::sampled_conv2d', mutates_args=())
@exact_products
def sampled_conv2d(
        x: Tensor,
        steps: Tensor,
        mask: Optional[Tensor],
        weight: Tensor,
        bias: Optional[Tensor],
        low_in: Optional[Tensor],
        low_out: Optional[Tensor],
        high_in: Optional[Tensor],
        high_out: Optional[Tensor],
        split: bool,
        save: bool,
        stride: List[int],
        padding: List[int],
        spacing: List[int],
        groups: int,
) -> Tuple[Tensor, Tensor]:
    """Convolution over bilinear samples at the taps of each output position.

    Args:
        x: Map (B, C, H, W), best channels_last; another layout costs one copy.
        steps: Dilations (B, G, H', W'), or with spacing offsets (B, G*k*k*2, H', W'); see :class:`ConvArgs`.
        mask: (B, G*k*k, H', W') or None.
        weight: (O, C/groups, k, k), or (B, O, C/groups, k, k), a kernel for each sample.
        bias: (O,) or None.
        low_in, low_out, high_in, high_out: AdaKern's gains (B, C), (B, O), (B, C), (B, O), None for ones.
        split: Whether there are gains. If not, the gains are not read.
        save: Whether the second result is wanted.
        stride: Of the rows and of the columns.
        padding: Of the rows and of the columns, of dilations at dilation 1.
        spacing: Of the rows and of the columns of taps that offsets move; empty for dilations.
        groups: Convolution groups.

    Returns:
        The convolution (B, O, H', W'), channels_last; and the output of the high part before `high_out`
        (B, H', W', O), kept for that gain's gradient, or nothing.
    """
    tiling = Tiling(x, steps, mask, weight.shape[-1], stride, padding, spacing, groups, weight.dim() == 5)
    result = empty_map(x, (tiling.b, weight.shape[-4], tiling.out_h, tiling.out_w))
    x, y = nhwc(x), result.permute(0, 2, 3, 1)
    high = torch.empty_like(y) if save else x.new_empty((0,))
    kernel, mean, centres_samples = _split(tiling, weight) if split else (weight, None, False)
    for samples in tiling.batches():
        own = _Gains(samples, low_in, low_out, high_in, high_out)
        table = tiling.table(x[samples])
        table_high = tiling.table(_scaled(x[samples], own.high_in)) if split else table
        for tile in tiling.tiles(samples):
            taps, out = tile.sample(table_high), tile.of(y)
            total = None if mean is None else tile.total(table)
            if total is not None and centres_samples:
                _center(taps, _scaled(total, own.high_in) / tiling.totals_per_mean)
            part = tile.convolve(taps, kernel[samples.start] if kernel.dim() == 5 else kernel)
            if save:
                tile.of(high).copy_(part)
            if own.high_out is None:
                out.copy_(part)
            else:
                torch.mul(part, own.high_out[:, None, None], out=out)
            if mean is not None and total is not None:
                part = tile.convolve(_scaled(total, own.low_in), mean)
                if own.low_out is None:
                    out += part
                else:
                    out.addcmul_(part, own.low_out[:, None, None])
            if bias is not None:
                out += bias
            del taps, part, total  # so that the next tile finds their memory, still in cache
    return result, high


@sampled_conv2d.register_fake
def _(x, steps, mask, weight, bias, low_in, low_out, high_in, high_out, split, save, stride, padding, spacing,
      groups):
    b, _, h, w = steps.shape
    y = empty_map(x, (b, weight.shape[-4], h, w))
    return y, torch.empty_like(y.permute(0, 2, 3, 1)) if save else x.new_empty((0,))


@torch.library.custom_op('fadc_timm::sampled_conv2d_backward', mutates_args=())
@exact_products
def sampled_conv2d_backward(
        grad: Tensor,
        high: Tensor,
        x: Tensor,
        steps: Tensor,
        mask: Optional[Tensor],
        weight: Tensor,
        low_in: Optional[Tensor],
        low_out: Optional[Tensor],
        high_in: Optional[Tensor],
        high_out: Optional[Tensor],
        split: bool,
        stride: List[int],
        padding: List[int],
        spacing: List[int],
        groups: int,
) -> List[Tensor]:
    """Gradients of :func:`sampled_conv2d` for x, steps, mask, weight and the gains; empty for those that are None.

    grad (B, O, H', W') is that of the result, and high the second result, without which high_out gets no gradient.
    """
    tiling = Tiling(x, steps, mask, weight.shape[-1], stride, padding, spacing, groups, weight.dim() == 5)
    x, grad = nhwc(x), nhwc(grad)
    width = tiling.c // tiling.step_groups
    rest, mean, centres_samples = _split(tiling, weight) if split else (weight, None, False)
    grad_weight, grad_mean = torch.zeros_like(rest), None if mean is None else torch.zeros_like(mean)
    grad_sampling, grad_x = torch.empty_like(tiling.sampling), torch.zeros_like(x)
    grad_low_in, grad_low_out, grad_high_in = (
        x.new_zeros((0,) if t is None else t.shape) for t in (low_in, low_out, high_in))
    for samples in tiling.batches():
        own = _Gains(samples, low_in, low_out, high_in, high_out)
        kernel, into_kernel = (t[samples.start] if t.dim() == 5 else t for t in (rest, grad_weight))
        table = tiling.table(x[samples])
        table_high = tiling.table(_scaled(x[samples], own.high_in)) if split else table
        grad_low, grad_high = tiling.table(grad_x[samples]), torch.zeros_like(table)
        for tile in tiling.tiles(samples):
            g, taps, scatter = tile.of(grad), tile.sample(table_high), Scatter(tile, table)
            total = None if mean is None else tile.total(table)
            if total is not None and centres_samples:
                _center(taps, _scaled(total, own.high_in) / tiling.totals_per_mean)
            bags, more = tile.convolve_backward(_scaled(g, own.high_out) if split else g, taps, kernel)
            into_kernel += more
            if centres_samples:
                _center(bags, bags.mean((3, 4)))
            bags = bags.view(-1, width)
            scatter.add(grad_high, bags)
            dots = corner_dots(tile, table_high, bags)
            if mean is not None and grad_mean is not None and total is not None:
                scaled_total = _scaled(total, own.low_in)
                if low_out is not None:
                    grad_low_out[samples] += (tile.convolve(scaled_total, mean) * g).sum((1, 2))
                into_total, more = tile.convolve_backward(_scaled(g, own.low_out), scaled_total, mean)
                grad_mean += more
                if low_in is not None:
                    grad_low_in[samples] += (into_total * total).sum((1, 2))
                bags = (_scaled(into_total, own.low_in) / tiling.headroom).reshape(-1, width)
                bag_of = bags_of_total(tile)
                scatter.add(grad_low, bags, bag_of)
                dots += corner_dots(tile, table, bags, bag_of)
            tile.of(grad_sampling).copy_(dots)
            del taps, bags, more, total, scatter, dots  # as above
        grad_high = grad_high.view(x[samples].shape)
        if split and high_in is not None:
            grad_high_in[samples] = (grad_high * x[samples]).sum((1, 2))
        grad_x[samples] += _scaled(grad_high, own.high_in) if split else grad_high
    grad_steps, grad_mask = tiling.backward(grad_sampling)
    empty = x.new_empty((0,))
    if grad_mean is not None:
        grad_mean /= tiling.totals_per_mean
        if not centres_samples:
            grad_mean -= grad_weight.mean((2, 3), keepdim=True)
        grad_weight += grad_mean
    return [
        _nchw(grad_x), grad_steps.to(steps.dtype).contiguous(),
        empty.clone() if mask is None or grad_mask is None else grad_mask.to(mask.dtype).contiguous(),
        grad_weight, grad_low_in, grad_low_out, grad_high_in,
        empty.clone() if high.dim() == 1 else (grad * high).sum((1, 2))]


@sampled_conv2d_backward.register_fake
def _(grad, high, x, steps, mask, weight, low_in, low_out, high_in, high_out, split, stride, padding, spacing,
      groups):
    def like(t):
        return x.new_empty((0,)) if t is None else t.new_empty(t.shape)

    return [torch.empty_like(x, memory_format=torch.channels_last), like(steps), like(mask),
            torch.empty_like(weight), *map(like, (low_in, low_out, high_in, None if high.dim() == 1 else high_out))]


_ARGUMENTS = [a.name for a in torch.ops.fadc_timm.sampled_conv2d.default._schema.arguments]
# What sampled_conv2d_backward takes behind `grad` and `high`, and returns the gradients of.
_DIFFERENTIABLE = ('x', 'steps', 'mask', 'weight', 'low_in', 'low_out', 'high_in', 'high_out')


def _setup_context(ctx, inputs, output) -> None:
    call = dict(zip(_ARGUMENTS, inputs, strict=True))
    ctx.options = [call[name] for name in ('split', 'stride', 'padding', 'spacing', 'groups')]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *(call[name] for name in _DIFFERENTIABLE))


def _formula(
        x, steps, mask, weight, low_in, low_out, high_in, high_out, split, stride, padding, spacing, groups) -> Tensor:
    """:func:`sampled_conv2d` without bias in torch's own operators."""
    b, (h, w) = x.shape[0], steps.shape[2:]
    own_kernels = weight.dim() == 5
    if own_kernels:  # the samples are groups of one
        x, steps, mask = (None if t is None else t.reshape(1, -1, *t.shape[2:]) for t in (x, steps, mask))
        weight, groups = weight.flatten(0, 1), b * groups
    y = grid_sample.differentiable(ConvArgs(
        x, weight, steps, mask, None, (low_in, low_out, high_in, high_out) if split else NO_GAINS, tuple(stride),
        tuple(padding), groups, tuple(spacing) or None))
    return y.reshape(b, -1, h, w) if own_kernels else y


def _backward(ctx, grad: Optional[Tensor], _):
    grads, needed = {}, dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=True))
    if grad is not None:
        if wants_formula(grad):
            found = formula_gradients(lambda *tensors: _formula(*tensors, *ctx.options), ctx.saved_tensors[1:], grad)
        else:
            found = sampled_conv2d_backward(grad, *ctx.saved_tensors, *ctx.options)
        grads = dict(zip(_DIFFERENTIABLE, found, strict=True))
        if needed['bias']:
            grads['bias'] = grad.sum((0, 2, 3))
    return tuple(grads.get(name) if needed[name] else None for name in _ARGUMENTS)


sampled_conv2d.register_autograd(_backward, setup_context=_setup_context)
