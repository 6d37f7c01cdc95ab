"""Groups (token, slot) pairs by expert, into tiles of a fixed number of rows."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped


class Tile(NamedTuple):
    """Some of one expert's pairs; the index of a pair is ``token * K + slot``.

    Attributes:
        expert: the expert, [].
        first: where the tile begins among the pairs sorted by expert, [].
        pair: each row's pair, [M]; rows that are not live repeat some pair.
        live: whether each row holds one of the expert's pairs, [M]. The first rows do; the next
            tile begins after them.
    """

    expert: Int32[Array, ""]
    first: Int32[Array, ""]
    pair: Int32[Array, " M"]
    live: Bool[Array, " M"]


class Tiles(NamedTuple):
    """All tiles.

    Attributes:
        expert: each tile's expert; tiles whose expert is outside 0..E-1 are skipped.
        first: where each tile begins among the pairs sorted by expert; None means that tile i
            begins at pair i.
        live: how many rows of each tile, its first ones, hold pairs; 0 for a tile that is not
            needed. None means one row in each tile.
    """

    expert: Int32[Array, " tiles"]
    first: Int32[Array, " tiles"] | None
    live: Int32[Array, " tiles"] | None


class Grouping(NamedTuple):
    """Pairs sorted by expert, cut into tiles of one expert each.

    Attributes:
        order: pairs sorted by expert [P]; pairs without an expert come last.
        first_pair: where each expert's pairs begin in `order`, [E].
        pairs: the number of each expert's pairs, [E].
        last_tile: the number of tiles up to and including each expert's, [E].
    """

    order: Int32[Array, " P"]
    first_pair: Int32[Array, " E"]
    pairs: Int32[Array, " E"]
    last_tile: Int32[Array, " E"]

    @property
    def num_tiles(self) -> Int32[Array, ""]:
        """The number of tiles, known at run time."""
        return self.last_tile[-1]

    def tile(self, index: Int32[Array, ""], rows: int) -> Tile:
        """Returns tile number `index`, of `rows` rows."""
        expert = jnp.sum(self.last_tile <= index, dtype=jnp.int32)
        tiles_before = self.last_tile[expert] - _tiles(self.pairs[expert], rows)
        offset = (index - tiles_before) * rows
        place = offset + _iota(rows)
        live = place < self.pairs[expert]
        first = self.first_pair[expert]
        pair = self.order[jnp.minimum(first + place, self.order.size - 1)]
        return Tile(expert, first + offset, pair, live)

    def tiles(self, rows: int) -> "Tiles":
        """Returns all tiles of `rows` rows: as many as any routing can need."""
        pairs, num_experts = self.order.size, self.pairs.size
        index = _iota(min(pairs, num_experts) + pairs // rows)
        expert = jnp.sum(self.last_tile[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
        known = jnp.minimum(expert, num_experts - 1)
        tiles_before = self.last_tile[known] - _tiles(self.pairs[known], rows)
        offset = (index - tiles_before) * rows
        live = jnp.where(expert < num_experts, jnp.minimum(self.pairs[known] - offset, rows), 0)
        return Tiles(known, self.first_pair[known] + offset, live)

    def unsort(self, rows: Shaped[Array, "P+M H"]) -> Shaped[Array, "P H"]:
        """Returns rows, which are sorted by expert, in the order of the pairs."""
        place = jnp.zeros_like(self.order).at[self.order].set(_iota(self.order.size))
        return rows[place]


def group(ids: Int32[Array, "T K"], num_experts: int, rows: int) -> Grouping:
    """Groups pairs by expert.

    Args:
        ids: each pair's expert; pairs with ids outside 0..E-1 are in no tile.
        num_experts: E.
        rows: the number of rows of a tile.

    Returns:
        The grouping.
    """
    expert = ids.reshape(-1)
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    pairs = jnp.zeros(num_experts, jnp.int32).at[expert].add(1, mode="drop")
    last_pair = jnp.cumsum(pairs, dtype=jnp.int32)
    last_tile = jnp.cumsum(_tiles(pairs, rows), dtype=jnp.int32)
    return Grouping(order, last_pair - pairs, pairs, last_tile)


def _iota(size: int) -> Array:
    return jnp.arange(size, dtype=jnp.int32)


def _tiles(pairs: Array, rows: int) -> Array:
    return (pairs + (rows - 1)) // rows


def expected_hits(tokens: int, top_k: int, num_experts: int) -> float:
    """Returns how many distinct experts are hit on average, if routing is uniform."""
    return num_experts * (1 - (1 - min(1.0, top_k / num_experts)) ** tokens)


def tile_rows(tokens: int, top_k: int, num_experts: int) -> int:
    """Returns a tile's rows: the power of two that fits 1.25 times an average expert's pairs."""
    average = tokens * top_k / max(1.0, expected_hits(tokens, top_k, num_experts))
    fitting = 2 ** math.ceil(math.log2(max(1.0, 1.25 * average)))
    most = 2 ** math.ceil(math.log2(max(1, tokens)))  # a token hits an expert at most once
    return min(fitting, most, 256)
