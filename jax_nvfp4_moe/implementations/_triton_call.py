"""A layer as two launches of the grouped GEMM, and what XLA does around them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.arrangement import row_orders
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.format import Nvfp4Array, expand_global_scale, reciprocal, round_to
from jax_nvfp4_moe.implementations import _triton_epilogues as epilogues
from jax_nvfp4_moe.implementations import emulation
from jax_nvfp4_moe.implementations._contractions import Rows
from jax_nvfp4_moe.implementations._grouping import Tiles, group
from jax_nvfp4_moe.implementations._recipes import Recipe
from jax_nvfp4_moe.implementations._triton_decode import as_words
from jax_nvfp4_moe.implementations._triton_kernels import Weights, grouped_gemm
from jax_nvfp4_moe.implementations._triton_tilings import Tilings, tilings
from jax_nvfp4_moe.implementations.base import Call


class _Plan(NamedTuple):
    """Pairs in the order of their experts, and the tiles they make.

    Attributes:
        tiles: which pairs meet which expert.
        token: of each pair.
        pair: which one each is; None if they are in their own order.
    """

    tiles: Tiles
    token: Int32[Array, " P"]
    pair: Int32[Array, " P"] | None


def run(
    call: Call,
    interpret: bool,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """The layer's output, on a GPU or in JAX's interpreter."""
    recipe = Recipe(call, experts.activation_scheme, x.dtype)
    ids = emulation.local_ids(call, topk_ids, experts)
    with jax.named_scope("group"):
        tokens, top_k = ids.shape
        chosen = tilings(tokens, top_k, experts.num_experts)
        plan = _plan(ids, experts.num_experts, chosen)
    rows = recipe.input_rows(recipe.input_values(x, topk_weights), experts)
    rows = _rows(recipe, chosen, plan, rows, experts, interpret)
    rows = rows.reshape(*ids.shape, experts.hidden_size)
    # Rows of ids out of range are in no tile: nothing was written there.
    valid = (ids >= 0) & (ids < experts.num_experts)
    rows = jnp.where(valid[..., None], rows, jnp.zeros_like(rows))
    if call.axis_name is not None:
        # Each row is zero on all devices but one, so this sum is exact and keeps the slot order.
        rows = lax.psum(rows, call.axis_name)
    with jax.named_scope("combine"):
        total = recipe.combine(rows.astype(jnp.float32), topk_weights)
        return round_to(total, call.output_dtype).astype(call.output_dtype)


def _plan(ids: Int32[Array, "T K"], num_experts: int, chosen: Tilings) -> _Plan:
    pairs = jnp.arange(ids.size, dtype=jnp.int32)
    if chosen.by_pair:
        expert = ids.reshape(-1)
        live = ((expert >= 0) & (expert < num_experts)).astype(jnp.int32)
        return _Plan(Tiles(expert, pairs, live), pairs // ids.shape[1], None)
    grouping = group(ids, num_experts, chosen.tokens)
    return _Plan(grouping.tiles(chosen.tokens), grouping.order // ids.shape[1], grouping.order)


def _rows(
    recipe: Recipe,
    chosen: Tilings,
    plan: _Plan,
    rows: Rows,
    experts: ExpertWeights,
    interpret: bool,
) -> Float[Array, "P H"]:
    """Every pair's row, in the order of the pairs."""
    scheme, dtype = recipe.scheme, jnp.dtype(recipe.row_dtype)
    pairs, inter, hidden = len(plan.token), experts.intermediate_size, experts.hidden_size
    order13, order2 = row_orders(experts)
    # Inside shard_map a result varies over every mesh axis that an operand varies over.
    like = jax.typeof(emulation.varying_zeros((), dtype, rows, plan, experts))

    def result(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=like.manual_axis_type)

    launch = functools.partial(
        grouped_gemm,
        tiles=plan.tiles,
        swizzled=experts.layout != "linear",
        tokens=chosen.tokens,
        interpret=interpret,
    )
    with jax.named_scope("gemm1"):
        hidden_scale = recipe.hidden_scale(experts)
        between = launch(
            _operand(rows, dtype),
            _row_scale(recipe, recipe.input_scale(experts), rows),
            _weights(experts.w13, order13, experts.w13_bias, 2 if experts.gated else 1),
            source=plan.token,
            target=None,
            encode_scale=None if hidden_scale is None else reciprocal(hidden_scale),
            epilogue=functools.partial(
                epilogues.gemm1, activation=recipe.call.activation, native=not interpret
            ),
            result=result(pairs, inter),
            # Quantised row by row, hidden values take another pass, which wants them in order.
            in_quarters=scheme != "per_token",
            tiling=chosen.gemm1,
            name="nvfp4_moe_gemm1",
        )
    hidden_rows = None
    if scheme == "per_token":
        with jax.named_scope("hidden"):
            hidden_rows = recipe.requantized(between.astype(jnp.float32), None)
            between = _operand(hidden_rows, dtype)
    with jax.named_scope("gemm2"):
        return launch(
            between,
            _row_scale(recipe, hidden_scale, hidden_rows),
            _weights(experts.w2, order2, experts.w2_bias, 1),
            source=None,
            target=plan.pair,
            encode_scale=None,
            epilogue=epilogues.gemm2,
            result=result(pairs, hidden),
            in_quarters=False,
            tiling=chosen.gemm2,
            name="nvfp4_moe_gemm2",
        )


def _operand(rows: Rows, dtype: Any) -> Float[Array, "R K"]:
    """Rows with their columns in the order of the quarters, exact in `dtype`."""
    low, high = rows.values()
    quarters = low[:, 0::2], high[:, 0::2], low[:, 1::2], high[:, 1::2]
    return jnp.concatenate(quarters, axis=1).astype(dtype)


def _row_scale(
    recipe: Recipe, static: Float32[Array, ""] | None, rows: Rows | None
) -> Float32[Array, " R"] | None:
    """What a GEMM's rows are still to be multiplied by: one number [1], or one for each row."""
    if recipe.scheme == "static":
        assert static is not None  # check_experts
        return static.reshape(1)
    if rows is None or rows.global_scale is None:
        return None
    return rows.global_scale[:, 0]


def _weights(
    array: Nvfp4Array, order: np.ndarray | None, bias: Float32[Array, "E N"] | None, groups: int
) -> Weights:
    num_experts = len(array.data)
    scale = lax.bitcast_convert_type(array.scale, jnp.uint8).reshape(num_experts, -1)
    return Weights(
        words=as_words(array.data),
        scale=scale,
        order=None if order is None else jnp.asarray(order, jnp.int32),
        global_scale=jnp.broadcast_to(
            expand_global_scale(array.global_scale, (num_experts, groups)), (num_experts, groups)
        ),
        bias=bias,
    )
