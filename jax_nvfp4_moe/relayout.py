"""Moves experts between layouts, and reads single experts out of any layout."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jax_nvfp4_moe import layouts
from jax_nvfp4_moe.experts import ExpertWeights, padded_sizes
from jax_nvfp4_moe.format import BLOCK_SIZE
from jax_nvfp4_moe.layouts import Layout
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array


def to_layout(experts: ExpertWeights, layout: Layout) -> ExpertWeights:
    """Returns the same experts in another layout; an exact bijection.

    Args:
        experts: in any layout, checked.
        layout: "linear", "trtllm" or "cute_dsl".

    Returns:
        The experts in `layout`; `experts` itself if it has that layout already.
    """
    if layout == experts.layout:
        return experts
    return _from_linear(_to_linear(experts), layout)


def row_orders(experts: ExpertWeights) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns where each logical row of w13 and of w2 is stored; None for each in linear layout."""
    if experts.layout == "linear":
        return None, None
    hidden, intermediate = padded_sizes(experts, experts.layout)
    stored = layouts.w13_row_order(experts.layout, intermediate, gated=experts.gated)
    groups = layouts.inverse_order(stored).reshape(-1, intermediate)
    w2 = layouts.inverse_order(layouts.w2_row_order(experts.layout, hidden))
    return groups[:, : experts.intermediate_size].reshape(-1), w2[: experts.hidden_size]


@functools.partial(jax.jit, static_argnames="layout")
def _from_linear(experts: ExpertWeights, layout: Layout) -> ExpertWeights:
    if layout == "linear":
        return experts
    gated = experts.gated
    hidden, intermediate = padded_sizes(experts, layout)
    order13 = layouts.w13_row_order(layout, intermediate, gated=gated)
    order2 = layouts.w2_row_order(layout, hidden)

    def w13(array: Array, per_column: int) -> Array:
        padded = layouts.pad_w13(array, gated=gated, rows=intermediate, cols=hidden // per_column)
        return padded[..., order13, :]

    def w2(array: Array, per_column: int) -> Array:
        padded = layouts.pad_w2(array, rows=hidden, cols=intermediate // per_column)
        return padded[..., order2, :]

    return dataclasses.replace(
        experts,
        w13=_arranged(experts.w13, w13, after=layouts.swizzle_scales),
        w2=_arranged(experts.w2, w2, after=layouts.swizzle_scales),
        layout=layout,
    )


@jax.jit
def _to_linear(experts: ExpertWeights) -> ExpertWeights:
    if experts.layout == "linear":
        return experts
    gated, layout = experts.gated, experts.layout
    hidden, intermediate = experts.w2.shape[-2], experts.w2.shape[-1]
    back13 = layouts.inverse_order(layouts.w13_row_order(layout, intermediate, gated=gated))
    back2 = layouts.inverse_order(layouts.w2_row_order(layout, hidden))

    def w13(array: Array, per_column: int) -> Array:
        cols = experts.hidden_size // per_column
        rows = experts.intermediate_size
        return layouts.trim_w13(array[..., back13, :], gated=gated, rows=rows, cols=cols)

    def w2(array: Array, per_column: int) -> Array:
        cols = experts.intermediate_size // per_column
        return layouts.trim_w2(array[..., back2, :], rows=experts.hidden_size, cols=cols)

    def unswizzle(scale: Array) -> Array:
        return layouts.unswizzle_scales(scale, rows=scale.shape[-2], cols=scale.shape[-1])

    # The swizzle is undone first: the row order refers to row-major scales.
    return dataclasses.replace(
        experts,
        w13=_arranged(experts.w13, w13, before=unswizzle),
        w2=_arranged(experts.w2, w2, before=unswizzle),
        layout="linear",
    )


def _same(array: Array) -> Array:
    return array


def _arranged(
    weights: Nvfp4Array,
    arrange: Callable[[Array, int], Array],
    *,
    before: Callable[[Array], Array] = _same,
    after: Callable[[Array], Array] = _same,
) -> Nvfp4Array:
    """Applies one rearrangement to codes (2 in each byte) and scales (one for 16 elements).

    `before` and `after` apply to the scales only. Scales are moved as bytes, because XLA:CPU would
    widen float8.
    """
    scale = before(lax.bitcast_convert_type(weights.scale, jnp.uint8))
    scale = after(arrange(scale, BLOCK_SIZE))
    return dataclasses.replace(
        weights,
        data=arrange(weights.data, 2),
        scale=lax.bitcast_convert_type(scale, jnp.float8_e4m3fn),
    )


def take_experts(experts: ExpertWeights, ids: Int[Array, "*ids"]) -> ExpertWeights:
    """Returns the experts at `ids` in the linear layout, from experts in any layout.

    Args:
        experts: in any layout, [E, ...].
        ids: each in 0..E-1 (not checked).

    Returns:
        Experts whose arrays have the axes of `ids` in place of E. Activation scales are unchanged:
        they belong to the layer.
    """

    def take(array: Array) -> Array:
        if array.dtype == jnp.float8_e4m3fn:
            # Taken as bytes: XLA:CPU widens the float8 operand of a slice, here all experts. The
            # barrier keeps it from converting all experts to bytes before a loop.
            array, _ = lax.optimization_barrier((array, ids))
            taken = take(lax.bitcast_convert_type(array, jnp.uint8))
            return lax.bitcast_convert_type(taken, jnp.float8_e4m3fn)
        return array.at[ids].get(mode="promise_in_bounds")

    return _to_linear(
        dataclasses.replace(
            experts,
            w13=jax.tree.map(take, experts.w13),
            w2=jax.tree.map(take, experts.w2),
            w13_bias=jax.tree.map(take, experts.w13_bias),
            w2_bias=jax.tree.map(take, experts.w2_bias),
        )
    )
