"""Neighbourhood attention by dense products of tiles, in torch's own operators.

A tile of queries is multiplied with the block of keys that its windows make up (`tiles.py`). The table that holds the
relative position bias, and minus infinity outside of a query's window, makes one softmax of that. Many tiles that look
alike are one batched product; together their scores take at most a workspace of memory. The backward pass computes the
weights again, so nothing but q, k and v is kept between the passes.
"""
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..derivatives import formula_gradients, wants_formula
from ..kept_tables import KeptTables, prepare
from ..runtime import accumulation_dtype, exact_products, is_plain_eager, is_transformed, without_autocast
from . import written_out
from .arguments import AttentionArgs
from .tiles import Segment, segments, tile_sides

__all__ = ['forward', 'multiply_adds', 'neighborhood_windows', 'neighborhood_windows_backward', 'why_not']

# Bytes of the scores of the tiles that are worked on together. On a CPU they stay in its cache; on a GPU each of them
# is a dozen launches.
_CPU_BYTES = 2 * 2 ** 20
_GPU_BYTES = 256 * 2 ** 20


def why_not(args: AttentionArgs) -> Optional[str]:
    if args.dropout_p:
        return 'it has no dropout: written_out has'
    if is_transformed():
        return "it has no forward-mode derivatives and no rules for the transforms of torch.func; 'written_out' has"
    return None


class _Tables(NamedTuple):
    """Tables of a segment.

    places: (queries, keys), as :class:`Segment` has them.
    selection: (2k - 1, queries * keys): one where query and key have that place in the table of the bias, else zero.
    """
    places: Tensor
    selection: Tensor


def _make_tables(
        queries: int, keys: int, ahead: int, kernel_size: int, dtype: torch.dtype, device: torch.device) -> _Tables:
    """Tables of a segment whose first query lies so many points ahead of its first key; the selection in a dtype."""
    query = torch.arange(ahead, ahead + queries, device=device)[:, None]
    key = torch.arange(keys, device=device)
    start = (query - kernel_size // 2).clamp(0, keys - kernel_size)
    outside = (key < start) | (key >= start + kernel_size)
    places = (key - query + (kernel_size - 1)).masked_fill(outside, -1)
    places_of_bias = torch.arange(2 * kernel_size - 1, device=device)
    return _Tables(places, (places_of_bias[:, None] == places.flatten()).to(dtype))


_tables_of = KeptTables(_make_tables)


class _Pair:
    """Segments of rows and columns: tiles (b, Rr, Nr, Rc, Nc, heads, queries or keys, c) as views of maps.

    Rr and Rc are residues, Nr and Nc tiles on a residue.
    """

    def __init__(self, plan: '_Plan', rows: Segment, cols: Segment) -> None:
        self.plan, self.segments = plan, (rows, cols)
        self.queries = rows.queries, cols.queries
        self.keys = rows.keys, cols.keys
        self.outer = plan.b, rows.residues, rows.tiles, cols.residues, cols.tiles
        whole = all(min(map(min, s.places)) >= 0 for s in self.segments)
        self.has_mask = not whole

    def _view(self, x: Tensor, firsts: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Blocks of x (B, heads, H, W, c), (B, Rr, Nr, Rc, Nc, heads, *lengths, c), that may overlap."""
        of_batch, of_head, *of_axes, of_channel = x.stride()
        sizes, strides, offset = [x.shape[0]], [of_batch], x.storage_offset()
        for segment, first, dilation, stride in zip(self.segments, firsts, self.plan.dilation, of_axes, strict=True):
            sizes += [segment.residues, segment.tiles]
            strides += [stride, segment.queries * dilation * stride]
            offset += (segment.first_residue + first * dilation) * stride
        sizes += [x.shape[1], *lengths, x.shape[4]]
        strides += [of_head, *(d * s for d, s in zip(self.plan.dilation, of_axes, strict=True)), of_channel]
        return x.as_strided(sizes, strides, offset)

    def of_queries(self, x: Tensor) -> Tensor:
        return self._view(x, [s.first_query for s in self.segments], self.queries)

    def of_keys(self, x: Tensor) -> Tensor:
        return self._view(x, [s.first_key for s in self.segments], self.keys)

    def tables(self) -> List[_Tables]:
        """Those of both segments."""
        return [_tables_of(s.queries, s.keys, s.first_query - s.first_key, n, self.plan.exact, self.plan.device)
                for s, n in zip(self.segments, self.plan.kernel_size, strict=True)]

    def has_table(self, bias: Optional[Tensor]) -> bool:
        """Whether something is added to the scores."""
        return bias is not None or self.has_mask

    def table(self, bias: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
        """What is added to the scores, (heads or 1, queries, keys), or None."""
        if not self.has_table(bias):
            return None
        device = self.plan.device
        rows, cols = (tables.places for tables in self.tables())
        rows, cols = rows[:, None, :, None], cols[:, None]
        if bias is None:
            table = torch.zeros((1, *self.queries, *self.keys), dtype=dtype, device=device)
        else:
            table = bias.to(dtype)[:, rows.clamp(min=0), cols.clamp(min=0)]
        if self.has_mask:
            table = table.masked_fill((rows < 0) | (cols < 0), -torch.inf)
        return table.flatten(1, 2).flatten(2, 3)

    def bias_gradient(self, grad_table: Tensor) -> Tensor:
        """The gradient of the bias from that of the table (heads, queries, keys)."""
        heads = len(grad_table)
        grad_table = grad_table.view(heads, *self.queries, *self.keys).transpose(2, 3)
        grad_table = grad_table.reshape(heads, self.queries[0] * self.keys[0], -1)
        down, across = (tables.selection for tables in self.tables())
        return down @ grad_table @ across.t()

    def chunks(self) -> Iterator[Tuple[slice, ...]]:
        """Parts of the outer dimensions whose scores fit into the workspace."""
        queries, keys = self.queries[0] * self.queries[1], self.keys[0] * self.keys[1]
        return _blocks(self.outer, max(1, self.plan.workspace // (self.plan.heads * queries * keys)))


def _blocks(sizes: Sequence[int], limit: int) -> Iterator[Tuple[slice, ...]]:
    """Cut dimensions, the first ones first, into parts of at most `limit` elements."""
    if not sizes:
        yield ()
        return
    rest = 1
    for n in sizes[1:]:
        rest *= n
    step = max(1, limit // max(rest, 1))
    for i in range(0, sizes[0], step):
        for others in _blocks(sizes[1:], limit):
            yield (slice(i, min(i + step, sizes[0])), *others)


class _Plan:
    """What both passes share: the pairs of segments of a call, the dtype to compute in, and the workspace."""

    def __init__(self, q: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> None:
        self.b, self.heads, h, w, self.c = q.shape
        self.kernel_size = kernel_size[0], kernel_size[1]
        self.dilation = dilation[0], dilation[1]
        self.device = q.device
        # tensor cores take half precisions; a CPU converts them while it copies
        self.exact = accumulation_dtype(q.dtype)  # of sums
        self.dtype = q.dtype if q.device.type == 'cuda' else self.exact
        self.scale = self.c ** -0.5
        self.workspace = (_GPU_BYTES if q.device.type == 'cuda' else _CPU_BYTES) // self.dtype.itemsize
        sides = tile_sides((h, w), self.kernel_size, self.dilation, self.b * self.heads)
        rows, cols = (segments(n, k, d, side) for n, k, d, side in zip(
            (h, w), self.kernel_size, self.dilation, sides, strict=True))
        self.pairs = [_Pair(self, r, c) for r in rows for c in cols]

    def copy(self, tiles: Tensor) -> Tensor:
        """Tiles (b, Rr, Nr, Rc, Nc, heads, rows, columns, c) as matrices (n * heads, rows * columns, c)."""
        out = torch.empty(tiles.shape, dtype=self.dtype, device=self.device).copy_(tiles)
        return out.view(-1, tiles.shape[6] * tiles.shape[7], self.c)

    def weights(self, q: Tensor, k: Tensor, table: Optional[Tensor]) -> Tensor:
        """Attention weights (n * heads, queries, keys) of tiles of queries and keys (n * heads, queries or keys, c)."""
        scores = q.new_empty((len(q), q.shape[1], k.shape[1]))
        if table is not None:
            scores.view(-1, self.heads, *scores.shape[1:]).copy_(table)
        scores.baddbmm_(q, k.transpose(1, 2), beta=0 if table is None else 1, alpha=self.scale)
        return scores.softmax(-1)


def _empty(like: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """A tensor (B, heads, H, W, c) that is a map (B, H, W, heads, c) in memory, as layers have it."""
    b, heads, h, w, c = like.shape
    return torch.empty((b, h, w, heads, c), dtype=dtype or like.dtype, device=like.device).permute(0, 3, 1, 2, 4)


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], kernel_size: List[int],
             dilation: List[int]) -> Tensor:
    """See :func:`neighborhood_attention2d`: q, k and v (B, heads, H, W, c) to the same shape.

    H and W are at least kernel size times dilation.
    """
    plan, out = _Plan(q, kernel_size, dilation), _empty(q)
    for pair in plan.pairs if q.numel() else ():
        table = pair.table(bias, plan.dtype)
        of_q, of_k, of_v, of_out = pair.of_queries(q), pair.of_keys(k), pair.of_keys(v), pair.of_queries(out)
        for part in pair.chunks():
            weights = plan.weights(plan.copy(of_q[part]), plan.copy(of_k[part]), table)
            target = of_out[part]
            target.copy_(torch.bmm(weights, plan.copy(of_v[part])).view(target.shape))
            del weights  # so that the next tiles find its memory, still in cache
    return out


def _add_blocks(target: Tensor, blocks: Tensor, pair: _Pair) -> None:
    """Add blocks (n * heads, keys, c) to a view of them (b, Rr, Nr, Rc, Nc, heads, *keys, c), where they overlap.

    Blocks are as far apart as a tile has queries, so as many of their rows and columns at a time do not overlap.
    """
    blocks = blocks.view(target.shape)
    (rows, cols), (down, across) = pair.keys, pair.queries
    down, across = down if target.shape[2] > 1 else rows, across if target.shape[4] > 1 else cols
    for i in range(0, rows, down):
        for j in range(0, cols, across):
            part = (..., slice(i, i + down), slice(j, j + across), slice(None))
            target[part].add_(blocks[part])


def _gradient(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], kernel_size: List[int],
              dilation: List[int]) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`neighborhood_windows` for q, k, v and bias; empty for a bias that is None."""
    plan = _Plan(q, kernel_size, dilation)
    exact = plan.exact
    grad_q, grad_k, grad_v = _empty(q), _empty(q, exact).zero_(), _empty(q, exact).zero_()
    grad_bias = q.new_zeros((0,)) if bias is None else torch.zeros_like(bias, dtype=exact)
    for pair in plan.pairs if q.numel() else ():
        table = pair.table(bias, plan.dtype)
        of_q, of_k, of_v, of_grad = pair.of_queries(q), pair.of_keys(k), pair.of_keys(v), pair.of_queries(grad)
        into_q, into_k, into_v = pair.of_queries(grad_q), pair.of_keys(grad_k), pair.of_keys(grad_v)
        grad_table: Optional[Tensor] = None
        for part in pair.chunks():
            queries, keys, g = plan.copy(of_q[part]), plan.copy(of_k[part]), plan.copy(of_grad[part])
            weights = plan.weights(queries, keys, table)
            _add_blocks(into_v[part], torch.bmm(weights.transpose(1, 2), g), pair)
            of_weights = torch.bmm(g, plan.copy(of_v[part]).transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            del weights, of_weights, g
            if bias is not None:
                total = of_scores.view(-1, plan.heads, *of_scores.shape[1:]).sum(0, dtype=exact)
                grad_table = total if grad_table is None else grad_table.add_(total)
            queries *= plan.scale
            _add_blocks(into_k[part], torch.bmm(of_scores.transpose(1, 2), queries), pair)
            target = into_q[part]
            torch.mul(torch.bmm(of_scores, keys).view(target.shape), plan.scale, out=target)
            del of_scores, queries, keys
        if grad_table is not None:
            grad_bias += pair.bias_gradient(grad_table)
    return (grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype),
            grad_bias if bias is None else grad_bias.to(bias.dtype))


neighborhood_windows = torch.library.custom_op(
    'fadc_timm::neighborhood_windows', exact_products(_forward), mutates_args=())


def _prepare_tables(q: Tensor, bias: Optional[Tensor], kernel_size: List[int], dilation: List[int]) -> None:
    """Make the tables for a map while torch makes a graph of a call, if it knows all sizes of q."""
    def make() -> None:
        for pair in _Plan(q, kernel_size, dilation).pairs:
            if pair.has_table(bias):
                pair.tables()

    prepare(q, (*q.shape, *kernel_size, *dilation), make)


@neighborhood_windows.register_fake
def _(q, k, v, bias, kernel_size, dilation):
    _prepare_tables(q, bias, kernel_size, dilation)
    return _empty(q)


neighborhood_windows_backward = torch.library.custom_op(
    'fadc_timm::neighborhood_windows_backward', exact_products(_gradient), mutates_args=())


@neighborhood_windows_backward.register_fake
def _(grad, q, k, v, bias, kernel_size, dilation):
    return _empty(q), _empty(q), _empty(q), q.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.kernel_size, ctx.dilation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_with(gradient, ctx, grad: Optional[Tensor]):
    if grad is None:
        return (None,) * 6
    if wants_formula(grad):
        found = formula_gradients(
            lambda q, k, v, bias: written_out.attention(q, k, v, ctx.kernel_size, ctx.dilation, bias),
            ctx.saved_tensors, grad)
    else:
        found = gradient(grad, *ctx.saved_tensors, ctx.kernel_size, ctx.dilation)
    return *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad)), None, None


def _backward(ctx, grad: Optional[Tensor]):
    return _backward_with(neighborhood_windows_backward, ctx, grad)


neighborhood_windows.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator for eager calls: autograd alone sees it, which is faster than a registered operator."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad: Optional[Tensor]):
        if grad is None:
            return (None,) * 6
        with without_autocast(grad):
            return _backward_with(_gradient, ctx, grad)


def forward(args: AttentionArgs) -> Tensor:
    tensors, options = (args.q, args.k, args.v, args.bias), (list(args.kernel_size), list(args.dilation))
    if not is_plain_eager(*tensors):
        return neighborhood_windows(*tensors, *options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Eager.apply(*tensors, *options)
    return _forward(*tensors, *options)


def multiply_adds(shape: Sequence[int], kernel_size: Sequence[int]) -> int:
    """Of the scores and of the weighted sums of q (B, heads, H, W, c); its gradient takes twice as many."""
    b, heads, h, w, c = shape
    return 2 * b * heads * h * w * c * kernel_size[0] * kernel_size[1]
