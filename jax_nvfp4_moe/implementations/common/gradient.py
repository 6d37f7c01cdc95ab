"""The backward pass of every implementation: straight through the quantisers.

Each quantiser's derivative is taken as 1. The result is the gradient of the layer with dequantised
weights, evaluated at the quantised activations. Experts are frozen: their gradient is zero.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.activations import activate
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.global_scale import expand_global_scale
from jax_nvfp4_moe.implementations.base import Call, Numerics
from jax_nvfp4_moe.implementations.common.contractions import Rows, WeightValues, dot
from jax_nvfp4_moe.implementations.common.grouping import group, tile_rows
from jax_nvfp4_moe.implementations.common.recipes import Recipe
from jax_nvfp4_moe.implementations.common.sharded import local_ids, varying_zeros
from jax_nvfp4_moe.relayout import take_experts
from jax_nvfp4_moe.rounding import round_to


def backward(
    call: Call,
    numerics: Numerics,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
    cotangent: Float[Array, "T H"],
) -> tuple[Float[Array, "T H"], Float32[Array, "T K"]]:
    """Returns the cotangents of `x` and `topk_weights`.

    Experts are decoded one at a time, and each tile recomputes its part of the forward pass.

    Args:
        call: the static arguments of the forward call.
        numerics: the preset of the forward call, for its quantised activations.
        x: tokens.
        topk_ids: each token's experts, among all experts of the layer.
        topk_weights: their weights.
        experts: this device's experts.
        cotangent: the cotangent of the layer's output.

    Returns:
        Arrays of the shapes and dtypes of `x` and `topk_weights`.
    """
    tokens, top_k = topk_ids.shape
    if tokens == 0:
        return jnp.zeros_like(x), jnp.zeros_like(topk_weights)
    recipe = Recipe(call, experts.activation_scheme, x.dtype, numerics)
    values, g = x.astype(jnp.float32), cotangent.astype(jnp.float32)
    on_input = call.router_weight_on_input
    # Rounded as in the forward pass, to get the same quantised activations.
    factor = round_to(topk_weights, x.dtype)
    scaled = round_to(values * factor, x.dtype) if on_input else values
    ids = local_ids(call, topk_ids, experts)
    rows_in = recipe.input_rows(scaled, experts)
    w2_input_scale = recipe.w2_input_scale(experts)
    pairs, rows_per_tile = tokens * top_k, tile_rows(tokens, top_k, experts.num_experts)
    weights = jnp.ones(pairs, jnp.float32) if on_input else topk_weights.reshape(-1)
    grouping = group(ids, experts.num_experts, rows_per_tile)

    def body(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, dw = carry
        tile = grouping.tile(index, rows_per_tile)
        token = tile.pair // top_k
        own = take_experts(experts, tile.expert)
        w13 = _values(recipe, own, "w13")
        w2 = _values(recipe, own, "w2")

        c1 = _product(jax.tree.map(lambda a: a[token], rows_in), w13) + _bias(own.w13_bias)
        hidden, activation_vjp = jax.vjp(lambda c: activate(c, call.activation), c1)
        rows = _product(recipe.requantized(hidden, w2_input_scale), w2) + _bias(own.w2_bias)

        dy = g[token]
        dw_tile = jnp.sum(dy * rows, axis=-1)
        (dc1,) = activation_vjp(_interleaved_product(dy * weights[tile.pair][:, None], w2))
        dx_tile = _interleaved_product(dc1, w13)
        # Rows that are not live get indices out of range, which "drop" discards.
        dx = dx.at[jnp.where(tile.live, token, tokens)].add(dx_tile, mode="drop")
        dw = dw.at[jnp.where(tile.live, tile.pair, pairs)].set(dw_tile, mode="drop")
        return dx, dw

    sources = (rows_in, ids, experts, g)
    dx, dw = lax.fori_loop(
        jnp.int32(0),
        grouping.num_tiles,
        body,
        (
            varying_zeros(x.shape, jnp.dtype(jnp.float32), *sources),
            varying_zeros((pairs,), jnp.dtype(jnp.float32), *sources),
        ),
    )
    dw = dw.reshape(topk_weights.shape)
    if call.axis_name is not None:
        dx, dw = lax.psum((dx, dw), call.axis_name)
    if on_input:
        dx, dw = dx * factor, jnp.sum(dx * values, axis=-1, keepdims=True)
    return dx.astype(x.dtype), dw


def _values(recipe: Recipe, own: ExpertWeights, field: str) -> tuple[Array, Array]:
    """Returns even and odd columns of one matrix of one expert, global scale applied."""
    weights = getattr(own, field)
    low, high = WeightValues(recipe.row_dtype, folded=False)(weights)
    scale = expand_global_scale(weights.global_scale, weights.data.shape[:-1])[..., None]
    scale = scale.reshape(-1, 1)
    return low * scale, high * scale


def _product(rows: Rows, weights: tuple[Array, Array]) -> Array:
    low, high = rows.values()
    total = _dot(low, weights[0]) + _dot(high, weights[1])
    return total if rows.global_scale is None else total * rows.global_scale


def _interleaved_product(g: Array, weights: tuple[Array, Array]) -> Array:
    """Returns the product `g @ weights`, its even and odd columns interleaved."""
    low, high = (_dot(g, w.T) for w in weights)
    return jnp.stack([low, high], axis=-1).reshape(g.shape[0], -1)


def _dot(a: Array, b: Array) -> Array:
    return dot(a, b, jnp.float32)


def _bias(bias: Array | None) -> Array | float:
    return 0.0 if bias is None else bias[None]
