"""Sorts pairs for CuTe-DSL's grouped GEMMs: FlashInfer's `moe_sort`, in JAX.

The buffers have the sizes and contents of data/csrc/moe_utils_binding.cu (lines 326-390) and
fused_moe/cute_dsl/moe_utils.py in flashinfer-python 0.6.13. One sort and several gathers compute
them. Sizes are static, so that one program serves all routings.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from jax_nvfp4_moe.implementations.common.grouping import group


class Permutation(NamedTuple):
    """The rows of the GEMMs: pairs sorted by expert, each expert padded to whole tiles.

    Attributes:
        tile_idx_to_expert_idx: the local expert of each tile [N].
        tile_idx_to_mn_limit: the row at which each tile's pairs end [N].
        permuted_idx_to_expanded_idx: each row's pair ``token * K + slot`` [N * tile], or -1.
        num_non_exiting_tiles: the number of tiles in use [1]; entries of later tiles are unused.
    """

    tile_idx_to_expert_idx: Int32[Array, " N"]
    tile_idx_to_mn_limit: Int32[Array, " N"]
    permuted_idx_to_expanded_idx: Int32[Array, " M"]
    num_non_exiting_tiles: Int32[Array, " 1"]

    def token_ids(self, top_k: int) -> Int32[Array, " M"]:
        """Returns each row's token; 0 for rows without a pair, whose results are discarded."""
        return jnp.maximum(self.permuted_idx_to_expanded_idx, 0) // top_k


def max_tiles(pairs: int, num_experts: int, tile: int) -> int:
    """Returns the largest number of tiles that any routing can need.

    If there are more pairs than experts, this is the case in which all experts but one have a
    single pair (moe_utils.py, lines 39-79).

    Args:
        pairs: T * K.
        num_experts: the number of this device's experts.
        tile: the number of rows of a tile.
    """
    if pairs <= num_experts:
        return pairs
    return (pairs + (tile - 1) * num_experts) // tile


def rows_of_pairs(permutation: Permutation, pairs: int) -> Int32[Array, " P"]:
    """Returns each pair's row, or -1 if it has none: FlashInfer's expanded_idx_to_permuted_idx.

    Args:
        permutation: from `moe_sort`.
        pairs: T * K.
    """
    pair = permutation.permuted_idx_to_expanded_idx
    rows = jnp.full(pairs, -1, jnp.int32)
    # Rows without a pair get places beyond the end, which "drop" discards.
    place = jnp.where(pair < 0, pairs + jnp.arange(pair.size, dtype=jnp.int32), pair)
    numbers = jnp.arange(pair.size, dtype=jnp.int32)
    return rows.at[place].set(numbers, mode="drop", unique_indices=True)


def moe_sort(topk_ids: Int32[Array, "T K"], num_experts: int, tile: int) -> Permutation:
    """Sorts pairs by expert, stably; each expert begins with a new tile.

    Args:
        topk_ids: each token's experts, 0..num_experts-1 among this device's experts; pairs with
            other ids get no row.
        num_experts: the number of this device's experts.
        tile: the number of rows of a tile.
    """
    grouping = group(topk_ids, num_experts, tile)
    most = max_tiles(topk_ids.size, num_experts, tile)
    tiles = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.searchsorted(grouping.last_tile, tiles, side="right").astype(jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)
    # An expert's first tile follows all tiles of the experts before it.
    first_tile = grouping.last_tile - (grouping.pairs + (tile - 1)) // tile
    first_row = first_tile[expert] * tile
    limit = jnp.minimum((tiles + 1) * tile, first_row + grouping.pairs[expert])
    rows = jnp.arange(most * tile, dtype=jnp.int32).reshape(most, tile)
    place = grouping.first_pair[expert][:, None] + rows - first_row[:, None]
    pair = grouping.order[jnp.clip(place, 0, max(topk_ids.size - 1, 0))]
    pair = jnp.where(rows < limit[:, None], pair, -1)
    return Permutation(expert, limit, pair.reshape(-1), grouping.last_tile[-1:])
