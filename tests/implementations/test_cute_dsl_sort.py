"""The sort of CuTe-DSL's grouped GEMMs against loops, over many sizes and routings."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nvfp4_moe.implementations.cute_dsl.sort import (
    max_tiles,
    moe_sort,
    rows_of_pairs,
)

# T, K, E, the first expert held here, how many are, rows of a tile.
SIZES = [
    *itertools.product((1, 7, 33), (1, 4), (8,), (0,), (8,), (128, 256)),
    *itertools.product((5, 64), (8,), (128,), (0, 32, 96), (32,), (128,)),
    (1, 8, 128, 0, 128, 128),
    (16, 8, 128, 0, 128, 128),
    (127, 2, 4, 0, 4, 128),
    (128, 1, 1, 0, 1, 128),
    (129, 1, 2, 1, 1, 128),
    (300, 8, 128, 0, 128, 256),
    (1000, 22, 512, 0, 512, 128),
    (1024, 10, 512, 256, 256, 128),
    (2048, 6, 160, 0, 160, 128),
    (3000, 1, 16, 4, 4, 256),
    (5000, 8, 64, 0, 64, 128),
    (5000, 4, 512, 384, 128, 128),
]
DRAWS = 17


def reference(ids, first, held, tile):
    """Tiles' experts, tiles' limits and rows' pairs, one expert after the other."""
    experts, limits, pairs = [], [], []
    flat = ids.reshape(-1)
    for expert in range(held):
        own = np.flatnonzero(flat == first + expert).tolist()
        for start in range(0, len(own), tile):
            part = own[start : start + tile]
            experts.append(expert)
            limits.append(len(pairs) + len(part))
            pairs += part + [-1] * (tile - len(part))
    return experts, limits, pairs


def routings(rng, tokens, top_k, num_experts):
    """Random ones, of all shapes: even, skewed, all to the same experts, some of them no expert."""
    for draw in range(DRAWS):
        skew = rng.exponential(size=num_experts) ** (0, 1, 3, 8)[draw % 4]
        keys = rng.random((tokens, num_experts)) ** (1 / np.maximum(skew, 1e-12))
        ids = np.argsort(-keys, axis=1)[:, :top_k].astype(np.int32)
        if draw % 5 == 0:
            ids = np.where(rng.random(ids.shape) < 0.3, -1 - ids, ids)
        yield ids


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_loops(sizes, rng):
    """30 sizes, 17 routings of each."""
    tokens, top_k, num_experts, first, held, tile = sizes
    sort = jax.jit(functools.partial(moe_sort, num_experts=held, tile=tile))
    inverse = jax.jit(functools.partial(rows_of_pairs, pairs=tokens * top_k))
    most = max_tiles(tokens * top_k, held, tile)
    for ids in routings(rng, tokens, top_k, num_experts):
        found = jax.tree.map(np.asarray, sort(jnp.asarray(ids - first)))
        experts, limits, pairs = reference(ids, first, held, tile)
        (count,) = found.num_non_exiting_tiles
        assert count == len(experts) <= most
        assert found.tile_idx_to_expert_idx.shape == found.tile_idx_to_mn_limit.shape == (most,)
        assert found.tile_idx_to_expert_idx[:count].tolist() == experts
        assert found.tile_idx_to_mn_limit[:count].tolist() == limits
        assert found.permuted_idx_to_expanded_idx.shape == (most * tile,)
        assert found.permuted_idx_to_expanded_idx[: len(pairs)].tolist() == pairs
        assert (found.permuted_idx_to_expanded_idx[len(pairs) :] == -1).all()
        assert {array.dtype for array in found} == {np.dtype(np.int32)}
        rows = np.full(ids.size, -1)
        rows[[pair for pair in pairs if pair >= 0]] = np.flatnonzero(np.array(pairs) >= 0)
        assert inverse(found).tolist() == rows.tolist()


def test_there_are_enough_cases():
    assert len(SIZES) * DRAWS >= 500


def test_the_bound_is_reached():
    """By one pair for each expert but one, which has the rest."""
    for pairs, held, tile in ((1000, 7, 128), (129, 2, 128), (8, 8, 128), (513, 4, 256)):
        rest = pairs - (held - 1)
        ids = np.array([*range(held - 1), *[held - 1] * rest], np.int32).reshape(-1, 1)
        found = jax.jit(moe_sort, static_argnums=(1, 2))(jnp.asarray(ids), held, tile)
        assert found.num_non_exiting_tiles.tolist() == [max_tiles(pairs, held, tile)]


def test_no_pairs_on_this_device():
    """If all pairs belong to other devices, there is no tile and no row."""
    found = moe_sort(jnp.full((9, 2), 40, jnp.int32), 8, 128)
    assert found.num_non_exiting_tiles.tolist() == [0]
    assert (np.asarray(found.permuted_idx_to_expanded_idx) == -1).all()


@pytest.mark.flashinfer
def test_the_bounds_are_flashinfers():
    moe_utils = pytest.importorskip(
        "flashinfer.fused_moe.cute_dsl.moe_utils",
        reason="needs flashinfer-python==0.6.13 and torch",
        exc_type=ImportError,
    )
    for tokens, top_k, _, _, held, tile in SIZES:
        expected = moe_utils.get_max_num_tiles(tokens, top_k, held, tile)
        assert max_tiles(tokens * top_k, held, tile) == expected
