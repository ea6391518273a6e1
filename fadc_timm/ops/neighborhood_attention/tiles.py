"""The tiles of a map: queries that lie together, and the block of keys that their windows make up.

A residue of an axis (see `neighbours.py`) is cut into tiles of t queries. The windows of t neighbouring queries lie in
a block of at most t + k - 1 keys, so a tile of queries times its block of keys is one matrix product, most of which is
wanted: what lies outside of a query's own window is masked. Away from the borders all tiles look alike, and at a border
the block is smaller. A segment is a row of tiles that look alike; segments are views of the map.
"""
from functools import lru_cache
from typing import List, NamedTuple, Tuple

__all__ = ['Segment', 'segments', 'tile_sides']


class Segment(NamedTuple):
    """Tiles of an axis that look alike.

    first_residue, residues: They are on this many residues from the first one on.
    tiles: Number of tiles on a residue, `queries` points apart.
    first_query, queries: The first tile has this many queries from this point of its residue on.
    first_key, keys: Its block of keys, likewise; of the other tiles as far from the queries.
    places: (queries, keys), what a key is to a query in the table of 2k - 1 relative positions, -1 outside of its
        window.
    """
    first_residue: int
    residues: int
    tiles: int
    first_query: int
    queries: int
    first_key: int
    keys: int
    places: Tuple[Tuple[int, ...], ...]


def _tiles(points: int, kernel_size: int, side: int) -> List[Tuple[int, int, int, Tuple[Tuple[int, ...], ...]]]:
    """The tiles of a residue: first query, first key, number of keys, places."""
    out = []
    for first in range(0, points, side):
        queries = range(first, min(first + side, points))
        starts = [min(max(j - kernel_size // 2, 0), points - kernel_size) for j in queries]
        keys = range(starts[0], starts[-1] + kernel_size)
        places = tuple(
            tuple(i - j + kernel_size - 1 if start <= i < start + kernel_size else -1 for i in keys)
            for j, start in zip(queries, starts, strict=True))
        out.append((first, keys[0], len(keys), places))
    return out


@lru_cache(maxsize=1024)
def segments(length: int, kernel_size: int, dilation: int, side: int) -> Tuple[Segment, ...]:
    """The segments of an axis of `length` positions, cut into tiles of at most `side` queries."""
    out = []
    longer = length % dilation  # the first residues have a point more than the others
    for first_residue, residues in ((0, longer), (longer, dilation - longer)):
        if not residues:
            continue
        row: List[Segment] = []
        for first, first_key, keys, places in _tiles(-(-(length - first_residue) // dilation), kernel_size, side):
            last = row[-1] if row else None
            if last is not None and last.places == places and first_key - first == last.first_key - last.first_query:
                row[-1] = last._replace(tiles=last.tiles + 1)
            else:
                row.append(Segment(first_residue, residues, 1, first, len(places), first_key, keys, places))
        out += row
    return tuple(out)


# What a tile of one head costs on a CPU, in multiples of one score: a query with a key, from its product to its part in
# the sum; a key that is copied; the tile itself. A pair of segments costs some calls of torch, whatever is in it.
_SCORE, _KEY, _TILE, _PAIR = 1., 4., 200., 25_000.

# Sides that are tried.
_SIDES = range(2, 17)


class _Counts(NamedTuple):
    """Sums over the tiles of an axis: of scores, of keys, of tiles, and the number of segments."""
    scores: int
    keys: int
    tiles: int
    segments: int


@lru_cache(maxsize=1024)
def _counts(length: int, kernel_size: int, dilation: int) -> Tuple[_Counts, ...]:
    """For each of the sides that are tried."""
    out = []
    for side in _SIDES:
        found = segments(length, kernel_size, dilation, side)
        tiles = [s.residues * s.tiles for s in found]
        out.append(_Counts(
            sum(n * s.queries * s.keys for n, s in zip(tiles, found)),
            sum(n * s.keys for n, s in zip(tiles, found)), sum(tiles), len(found)))
    return tuple(out)


@lru_cache(maxsize=1024)
def tile_sides(
        size: Tuple[int, int],
        kernel_size: Tuple[int, int],
        dilation: Tuple[int, int],
        heads: int,
) -> Tuple[int, int]:
    """Rows and columns of the tiles that cost the least, for maps of a size (H, W) and so many heads of all samples."""
    rows, cols = (_counts(n, k, d) for n, k, d in zip(size, kernel_size, dilation))

    def cost(sides: Tuple[int, int]) -> float:
        a, b = rows[sides[0] - _SIDES[0]], cols[sides[1] - _SIDES[0]]
        of_head = _SCORE * a.scores * b.scores + _KEY * a.keys * b.keys + _TILE * a.tiles * b.tiles
        return heads * of_head + _PAIR * a.segments * b.segments

    return min(((a, b) for a in _SIDES for b in _SIDES), key=cost)
