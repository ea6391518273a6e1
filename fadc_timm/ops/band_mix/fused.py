"""Mixing of frequency bands: a map plus its low-passes, each under a weight of its own at every position.

A low-pass at 1/f of Nyquist keeps few frequencies, and those of a lower filter are among those of a higher one. So one
analysis onto the cosines and sines of the widest filter, of which a quarter remains, serves all filters. The last
synthesis step, along the rows, applies the weights, so no low-pass map is stored.
"""
import sys
from typing import Iterator, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from ..derivatives import formula_gradients, wants_formula
from ..kept_tables import KeptTables, prepare
from ..runtime import empty_map, exact_products, fold_groups, nhwc, unfold_groups
from .frequencies import frequencies
from .low_pass import edges, low_pass

__all__ = ['forward', 'mix_low_passes', 'mix_low_passes_backward', 'multiply_adds']

# Bytes of the map in a tile; see ../sampled_conv/gather/tiles.py.
_TILE_BYTES = 4 * 2 ** 20


class _Axis(NamedTuple):
    """The filters along one axis of n points, in real frequencies.

    analysis: (J, n), onto the frequencies of the widest filter.
    synthesis: (n, J_f) for each filter, which keeps the first J_f.
    one_sided: For each filter (k, sign) if it keeps only +k or only -k; (0, 0) otherwise.
    """
    analysis: Tensor
    synthesis: List[Tensor]
    one_sided: List[Tuple[int, int]]


def _make_axis(n: int, factors: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Axis:
    basis, kept, one_sided = frequencies(n, factors, device)
    synthesis = [(basis[:, :len(k)] * (k / n)).to(dtype).to(device) for k in kept]
    return _Axis(basis.t().contiguous().to(dtype).to(device), synthesis, one_sided)


def _make_opposites(sign: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a pair of one-sided frequencies adds of the opposite product, (2, 2, 1): see :meth:`_Plan.couple`."""
    out = torch.full((2, 2, 1), sign, dtype=dtype, device=device)
    for i in range(2):
        out[i, i].fill_(-sign)
    return out


_axis, _opposites = KeptTables(_make_axis), KeptTables(_make_opposites)


class _Plan:
    """What both passes share: the filters of a call, and the tiles to work in."""

    def __init__(self, x: Tensor, factors: List[int]) -> None:
        self.b, self.c, self.h, self.w = x.shape
        # Filters with equal edges, as small maps have them, are stored once; `place` maps each factor to its filter.
        passed = [(edges(self.h, f), edges(self.w, f)) for f in factors]
        self.place = [passed.index(p) for p in passed]
        distinct = sorted(set(self.place))
        self.place = [distinct.index(p) for p in self.place]
        self.filters = range(len(distinct))
        kept = tuple(factors[i] for i in distinct)
        self.rows = _axis(self.h, kept, x.dtype, x.device)
        self.cols = _axis(self.w, kept, x.dtype, x.device)
        self.row_bytes = self.w * self.c * x.element_size()
        # tiles are for a CPU's cache: on a GPU each of them is a dozen launches
        self.tile_bytes = _TILE_BYTES if x.device.type in ('cpu', 'meta') else sys.maxsize
        sides = [side * side2 for (_, side), (_, side2) in zip(self.rows.one_sided, self.cols.one_sided)]
        self.opposites = [_opposites(side, x.dtype, x.device) if side else None for side in sides]
        # where each filter's columns lie, side by side
        widths = [s.shape[1] for s in self.cols.synthesis]
        self.columns = [slice(sum(widths[:i]), sum(widths[:i + 1])) for i in self.filters]

    def samples(self) -> Iterator[slice]:
        step = max(1, self.tile_bytes // (self.h * self.row_bytes))
        return (slice(i, min(i + step, self.b)) for i in range(0, self.b, step))

    def blocks(self) -> Iterator[slice]:
        """Rows of a tile: all of them, except if a sample is larger than a tile."""
        step = max(1, min(self.h, self.tile_bytes // self.row_bytes))
        return (slice(i, min(i + step, self.h)) for i in range(0, self.h, step))

    def analyse(self, x: Tensor) -> Tensor:
        """x (b, H, W, C) to coefficients (b, J, J', C)."""
        b, across, down = x.shape[0], self.cols.analysis, self.rows.analysis
        out = x.new_zeros((b, down.shape[0], across.shape[0] * self.c))
        for rows in self.blocks():
            part = x[:, rows]
            n = part.shape[1]
            part = _product(across, part.reshape(b * n, self.w, self.c)).view(b, n, -1)
            out.baddbmm_(down[:, rows].expand(b, -1, -1), part)
        return out.view(b, down.shape[0], across.shape[0], self.c)

    def couple(self, coefficients: Tensor, i: int) -> Tensor:
        """The coefficients that filter i keeps, (b, J_i, J'_i, C). The adjoint is the same on these.

        Of a pair of one-sided frequencies only two of the four products of exponentials pass: cos cos and sin sin come
        together, and cos sin and sin cos, each with the sign of the sides.
        """
        n, m = self.rows.synthesis[i].shape[1], self.cols.synthesis[i].shape[1]
        kept = coefficients[:, :n, :m]
        (k, _), (k2, _), opposites = self.rows.one_sided[i], self.cols.one_sided[i], self.opposites[i]
        if opposites is None:
            return kept
        # of the pair, cosine before sine on either axis, each product takes up its opposite
        pair = slice(2 * k - 1, 2 * k + 1), slice(2 * k2 - 1, 2 * k2 + 1)
        kept = kept.clone()
        kept[:, pair[0], pair[1]].addcmul_(coefficients[:, pair[0], pair[1]].flip(1, 2), opposites)
        return kept

    def synthesise_columns(self, kept: List[Tensor], rows: slice) -> Tensor:
        """Coefficients of all filters to rows of the map, still in frequencies along these: (b*n, sum of J'_i, C)."""
        b = kept[0].shape[0]
        parts = [_product(s[rows], k.reshape(b, k.shape[1], -1)).view(-1, k.shape[2], self.c)
                 for s, k in zip(self.rows.synthesis, kept)]
        return torch.cat(parts, dim=1)

    def weighted_synthesis(self, steps: Tensor) -> Tensor:
        """Weights (b, n, W, 1 + M) on the synthesis along rows, all filters side by side: (b*n, W, sum of J'_i)."""
        out = steps.new_empty((*steps.shape[:3], self.columns[-1].stop if self.columns else 0))
        for i, synthesis in enumerate(self.cols.synthesis):
            of = [j + 1 for j, place in enumerate(self.place) if place == i]
            step = steps[..., of[0]:of[0] + 1] if len(of) == 1 else steps[..., of].sum(-1, keepdim=True)
            torch.mul(step, synthesis, out=out[..., self.columns[i]])
        return out.flatten(0, 1)


def multiply_adds(shape: Sequence[int], factors: List[int]) -> int:
    """Of the matrix products of :func:`mix_low_passes` on a map (B, C, H, W); its gradient takes twice as many."""
    plan = _Plan(torch.empty(tuple(shape), device='meta'), factors)
    pairs = [(s.shape[1], t.shape[1]) for s, t in zip(plan.rows.synthesis, plan.cols.synthesis)]
    down, across = len(plan.rows.analysis), len(plan.cols.analysis)
    analysis = plan.h * across * plan.w + down * plan.h * across
    synthesis = sum(plan.h * n * m + plan.h * plan.w * m for n, m in pairs)
    return plan.b * plan.c * (analysis + synthesis)


def _product(a: Tensor, x: Tensor) -> Tensor:
    """a (n, m) times each of x (b, m, C)."""
    return torch.bmm(a.expand(x.shape[0], -1, -1), x)


@torch.library.custom_op('fadc_timm::mix_low_passes', mutates_args=())
@exact_products
def mix_low_passes(x: Tensor, steps: Tensor, factors: List[int]) -> Tensor:
    """steps_0 * x + sum of steps_i * low_pass(x, factors_i).

    Args:
        x: Map (B, C, H, W), float32 or float64, best channels_last; another layout costs one copy.
        steps: (B, 1 + M, H, W) for M factors.
        factors: Filters at 1/f of Nyquist.

    Returns:
        (B, C, H, W), channels_last.
    """
    plan = _Plan(x, factors)
    result = empty_map(x)
    x, steps, out = nhwc(x), nhwc(steps), result.permute(0, 2, 3, 1)
    for samples in plan.samples() if x.numel() else ():
        coefficients = plan.analyse(x[samples])
        kept = [plan.couple(coefficients, i) for i in plan.filters]
        for rows in plan.blocks():
            part, step = out[samples, rows], steps[samples, rows]
            torch.mul(x[samples, rows], step[..., :1], out=part)
            part.flatten(0, 1).baddbmm_(plan.weighted_synthesis(step), plan.synthesise_columns(kept, rows))
    return result


@mix_low_passes.register_fake
def _(x, steps, factors):
    prepare(x, x.shape[2:], lambda: _Plan(x, factors))
    return empty_map(x)


@torch.library.custom_op('fadc_timm::mix_low_passes_backward', mutates_args=())
@exact_products
def mix_low_passes_backward(grad: Tensor, x: Tensor, steps: Tensor, factors: List[int]) -> Tuple[Tensor, Tensor]:
    """Gradients of :func:`mix_low_passes` for x and steps. The low-passes are self-adjoint."""
    plan = _Plan(x, factors)
    grad, x, steps = (nhwc(t) for t in (grad, x, steps))
    grad_x, grad_steps = torch.empty_like(x), torch.zeros_like(steps)
    for samples in plan.samples() if x.numel() else ():
        coefficients = plan.analyse(x[samples])
        kept = [plan.couple(coefficients, i) for i in plan.filters]
        grad_kept = [torch.zeros_like(k).flatten(2) for k in kept]
        for rows in plan.blocks():
            g = grad[samples, rows]
            grad_steps[samples, rows, :, 0] = torch.linalg.vecdot(g, x[samples, rows])
            products = torch.bmm(g.flatten(0, 1), plan.synthesise_columns(kept, rows).transpose(1, 2))
            products = products.view(*g.shape[:3], -1)
            weighted = plan.weighted_synthesis(steps[samples, rows])
            frequencies = torch.bmm(weighted.transpose(1, 2), g.flatten(0, 1)).view(*g.shape[:2], -1, plan.c)
            for j, i in enumerate(plan.place):
                grad_steps[samples, rows, :, j + 1] = (
                    products[..., plan.columns[i]] * plan.cols.synthesis[i]).sum(-1)
            for i, columns in enumerate(plan.columns):
                down = plan.rows.synthesis[i][rows].t()
                grad_kept[i].baddbmm_(down.expand(g.shape[0], -1, -1), frequencies[:, :, columns].flatten(2))
        total = torch.zeros_like(coefficients)
        for i, k in enumerate(kept):
            total[:, :k.shape[1], :k.shape[2]] += plan.couple(grad_kept[i].view(k.shape), i)
        for rows in plan.blocks():
            part = _product(plan.rows.analysis[:, rows].t(), total.flatten(2))
            part = part.reshape(-1, total.shape[2], plan.c)
            out = grad_x[samples, rows]
            torch.mul(grad[samples, rows], steps[samples, rows, :, :1], out=out)
            out.flatten(0, 1).baddbmm_(plan.cols.analysis.t().expand(len(part), -1, -1), part)
    return grad_x.permute(0, 3, 1, 2), grad_steps.permute(0, 3, 1, 2).contiguous()


@mix_low_passes_backward.register_fake
def _(grad, x, steps, factors):
    return torch.empty_like(x, memory_format=torch.channels_last), steps.new_empty(steps.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, steps, ctx.factors = inputs
    ctx.save_for_backward(x, steps)


def _formula(x: Tensor, steps: Tensor, factors: List[int]) -> Tensor:
    """:func:`mix_low_passes` in torch's own operators."""
    y = x * steps[:, :1]
    for i, low in enumerate(low_pass(x, factors)):
        y = y + low * steps[:, i + 1, None]
    return y


def _backward(ctx, grad: Tensor):
    if wants_formula(grad):
        return *formula_gradients(lambda x, steps: _formula(x, steps, ctx.factors), ctx.saved_tensors, grad), None
    return *mix_low_passes_backward(grad, *ctx.saved_tensors, ctx.factors), None


mix_low_passes.register_autograd(_backward, setup_context=_setup_context)


def forward(x: Tensor, steps: Tensor, factors: List[int]) -> Tensor:
    """:func:`mix_low_passes` for steps (B, 1 + M, S, H, W) of S groups of channels."""
    groups = steps.shape[2]
    y = mix_low_passes(fold_groups(x, groups), steps.transpose(1, 2).flatten(0, 1), factors)
    return unfold_groups(y, groups)
