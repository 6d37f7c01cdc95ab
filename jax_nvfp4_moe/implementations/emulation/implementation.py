"""NVFP4 experts in jax.numpy: any device, any layout, and the reference for the others.

Never more than one expert's weights are dequantised at a time. Two formulations of the same
arithmetic, chosen by shape while tracing:

* **gather**, for few tokens: every (token, slot) pair multiplies its own expert's packed bytes,
  which are gathered, decoded and summed in one fused loop. Nothing is sorted, no weight is written.
* **grouped**, for many: pairs are sorted by expert, and a loop over tiles decodes one expert at a
  time and multiplies all its tokens on the matrix unit.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.implementations.base import Call, Problem
from jax_nvfp4_moe.implementations.common.contractions import (
    Rows,
    decode_and_dot,
    integer_multiply_reduce,
    multiply_reduce,
)
from jax_nvfp4_moe.implementations.common.grouping import Tile, expected_hits, group, tile_rows
from jax_nvfp4_moe.implementations.common.recipes import Contract, Recipe
from jax_nvfp4_moe.relayout import select
from jax_nvfp4_moe.rounding import round_to
from jax_nvfp4_moe.routing import Routing, route

name = "emulation"

# Beyond this many reads of the same expert, decoding it once for all its tokens is faster.
_GATHER_MAX_REUSE = 2.0


def unsupported(problem: Problem) -> str | None:
    """Why the emulation cannot serve the problem; only the "vllm" preset has limits."""
    experts = problem.experts
    if problem.call.numerics != "vllm":
        return None
    if experts.activation_scheme != "static":
        return (
            f"numerics='vllm' with activation_scheme={experts.activation_scheme!r}: vLLM's "
            "emulation knows static activation scales only; use numerics='kernel'"
        )
    if experts.w13_bias is not None or experts.w2_bias is not None:
        return "numerics='vllm' with biases: vLLM's emulation rejects them; use numerics='kernel'"
    return None


def describe(problem: Problem) -> str:
    """The formulation it would use, and the packed bytes it reads."""
    tokens, top_k, experts = problem.tokens, problem.top_k, problem.experts
    sizes = tokens, top_k, experts.num_experts
    in_floats = problem.call.numerics == "vllm" or experts.activation_scheme == "none"
    on_cpu = "cpu" in problem.device_kind.lower()
    gathers = _gathers(*sizes) and not (in_floats and on_cpu)
    hits = expected_hits(*sizes)
    reads = tokens * top_k if gathers else hits
    how = "gather" if gathers else f"grouped, tiles of {tile_rows(*sizes)} rows"
    return f"{how}; {packed_reads(problem, reads)}"


def packed_reads(problem: Problem, reads: float | None = None) -> str:
    """What a call reads of the weights: so many experts, by default each one that is hit, once."""
    experts = problem.experts
    hits = expected_hits(problem.tokens, problem.top_k, experts.num_experts)
    megabytes = (hits if reads is None else reads) * experts.nbytes / experts.num_experts / 1e6
    return f"reads about {megabytes:.1f} MB of packed weights for {hits:.0f} experts"


def run(
    call: Call,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """The layer's output."""
    if x.shape[0] == 0:
        return jnp.zeros(x.shape, call.output_dtype)
    recipe = Recipe(call, experts.activation_scheme, x.dtype)
    ids = local_ids(call, topk_ids, experts)
    values = recipe.input_values(x, topk_weights)
    tokens, top_k = topk_ids.shape
    form = _gather if _gathers(tokens, top_k, experts.num_experts) else _grouped
    rows = form(recipe, recipe.input_rows(values, experts), ids, topk_weights, experts)
    return combined(recipe, rows, topk_weights)


def combined(
    recipe: Recipe, rows: Float[Array, "T K H"], topk_weights: Float32[Array, "T K"]
) -> Float[Array, "T H"]:
    """The layer's output, from every pair's row; rows of experts on other devices are zero here."""
    call = recipe.call
    if call.axis_name is not None:
        # Each row is zero on all devices but one, so this sum is exact and keeps the slot order.
        rows = lax.psum(rows, call.axis_name)
    with jax.named_scope("combine"):
        total = recipe.combine(rows.astype(jnp.float32), topk_weights)
        return round_to(total, call.output_dtype).astype(call.output_dtype)


def run_from_logits(
    call: Call,
    routing: Routing,
    x: Float[Array, "T H"],
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"] | None,
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """The layer's output; there is no faster way to route than `route`."""
    return run(call, x, *route(logits, routing, bias=bias), experts)


def local_ids(
    call: Call, topk_ids: Int32[Array, "T K"], experts: ExpertWeights
) -> Int32[Array, "T K"]:
    """Ids among the experts held here; others are out of range."""
    if call.axis_name is None:
        return topk_ids
    return topk_ids - lax.axis_index(call.axis_name) * experts.num_experts


def _gathers(tokens: int, top_k: int, num_experts: int) -> bool:
    hits = expected_hits(tokens, top_k, num_experts)
    return tokens * top_k <= _GATHER_MAX_REUSE * max(1.0, hits)


def _gather(
    recipe: Recipe,
    x: Rows,
    ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T K H"]:
    # A CPU has no use for float products in one fused sum: where activations are not quantised it
    # is faster with one decoded expert at a time.
    on_cpu = _gather_on_cpu if x.scale is not None else _grouped
    return lax.platform_dependent(
        x,
        ids,
        topk_weights,
        experts,
        cpu=functools.partial(on_cpu, recipe),
        default=functools.partial(gather_rows, recipe, multiply_reduce),
    )


def _gather_on_cpu(
    recipe: Recipe, x: Rows, ids: Array, topk_weights: Array, experts: ExpertWeights
) -> Array:
    # Token by token: the sums of all blocks, written between the integers and the scales, then
    # stay in the cache.
    def one(token: tuple[Rows, Array, Array]) -> Array:
        x, ids, weights = jax.tree.map(lambda array: array[None], token)
        return gather_rows(recipe, integer_multiply_reduce, x, ids, weights, experts)[0]

    return lax.map(one, (x, ids, topk_weights))


def gather_rows(
    recipe: Recipe,
    contract: Contract,
    x: Rows,
    ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T K H"]:
    """Every pair with its own expert's weights; rows of ids out of range are zero."""
    valid = (ids >= 0) & (ids < experts.num_experts)
    own = select(experts, jnp.where(valid, ids, 0))
    repeated = jax.tree.map(lambda array: array[:, None], x)
    rows = recipe.expert_rows(repeated, own, recipe.hidden_scale(experts), topk_weights, contract)
    return jnp.where(valid[..., None], rows, 0.0).astype(recipe.row_dtype)


def _grouped(
    recipe: Recipe,
    x: Rows,
    ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T K H"]:
    tokens, top_k = ids.shape
    pairs = tokens * top_k
    hidden_scale = recipe.hidden_scale(experts)
    weights = topk_weights.reshape(-1)

    def tile_output(tile: Tile) -> Array:
        own = select(experts, tile.expert)
        mine = jax.tree.map(lambda array: array[tile.pair // top_k], x)
        return recipe.expert_rows(mine, own, hidden_scale, weights[tile.pair], decode_and_dot)

    rows_per_tile = tile_rows(tokens, top_k, experts.num_experts)
    grouping = group(ids, experts.num_experts, rows_per_tile)

    def body(index: Array, rows: Array) -> Array:
        tile = grouping.tile(index, rows_per_tile)
        # Rows that are not live are overwritten by the next tile, or lie beyond the last pair.
        output = tile_output(tile).astype(rows.dtype)
        return lax.dynamic_update_slice(rows, output, (tile.first, jnp.int32(0)))

    shape = (pairs + rows_per_tile, experts.hidden_size)
    start = varying_zeros(shape, recipe.row_dtype, x, ids, experts)
    rows = lax.fori_loop(jnp.int32(0), grouping.num_tiles, body, start)
    valid = (ids >= 0) & (ids < experts.num_experts)
    rows = grouping.unsort(rows).reshape(tokens, top_k, experts.hidden_size)
    return jnp.where(valid[..., None], rows, jnp.zeros_like(rows))


def varying_zeros(shape: tuple[int, ...], dtype: jnp.dtype, *sources: object) -> Array:
    """Zeros to start a loop from, which vary over the mesh axes that `sources` vary over.

    Inside shard_map the type of a loop's carry must not change; JAX 0.10 and 0.12 spell the cast
    differently, so the type is taken from an operation that involves every source.
    """
    never = jnp.zeros((), jnp.bool_)
    for leaf in jax.tree.leaves(sources):
        if leaf.dtype != jnp.float8_e4m3fn:
            never = never | ((leaf.reshape(-1)[0] != 0) & False)
    return jnp.broadcast_to(never, shape).astype(dtype)
