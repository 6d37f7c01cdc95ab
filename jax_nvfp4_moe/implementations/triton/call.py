"""Computes a layer with two launches of the grouped GEMM; XLA computes the steps around them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.implementations.base import Problem
from jax_nvfp4_moe.implementations.common.contractions import Rows
from jax_nvfp4_moe.implementations.common.grouping import Tiles, group
from jax_nvfp4_moe.implementations.common.recipes import Recipe, combined
from jax_nvfp4_moe.implementations.common.sharded import local_ids, varying_zeros
from jax_nvfp4_moe.implementations.triton import epilogues
from jax_nvfp4_moe.implementations.triton.decode import as_words
from jax_nvfp4_moe.implementations.triton.kernels import (
    Weights,
    grouped_gemm,
    quantize_rows,
)
from jax_nvfp4_moe.implementations.triton.tilings import Tilings, tilings
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array
from jax_nvfp4_moe.relayout import row_orders

# Rows in quarters, and decode scales that they do not include: one for all [1], one each, or None.
_Operand = tuple[Float[Array, "R K"], Float32[Array, " R"] | None]


def run(
    problem: Problem,
    interpret: bool,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """Returns the layer's output, on a GPU or in JAX's interpreter."""
    call = problem.call
    recipe = Recipe(call, experts.activation_scheme, x.dtype)
    ids = local_ids(call, topk_ids, experts)
    tokens, top_k = ids.shape
    chosen = tilings(tokens, top_k, experts.num_experts, problem.device_kind)
    # Inside shard_map a result varies over every mesh axis that an operand varies over.
    sources = x, ids, topk_weights, experts
    like = jax.typeof(varying_zeros((), jnp.dtype(recipe.row_dtype), *sources))
    layer = _GroupedGemms(recipe, experts, chosen, like.manual_axis_type, interpret)

    values = recipe.input_values(x, topk_weights) if call.router_weight_on_input else x
    rows = layer.rows(values, ids).reshape(tokens, top_k, experts.hidden_size)
    # Rows of ids out of range are in no tile: nothing was written there.
    valid = (ids >= 0) & (ids < experts.num_experts)
    rows = jnp.where(valid[..., None], rows, jnp.zeros_like(rows))
    return combined(recipe, rows, topk_weights)


@dataclasses.dataclass(frozen=True)
class _GroupedGemms:
    """The steps of a layer.

    Attributes:
        recipe: defines where values are rounded.
        experts: this device's experts.
        tilings: the tile sizes of the GEMMs.
        varying: the mesh axes over which results vary.
        interpret: whether JAX's interpreter runs the kernels.
    """

    recipe: Recipe
    experts: ExpertWeights
    tilings: Tilings
    varying: Any
    interpret: bool

    def rows(self, x: Float[Array, "T H"], ids: Int32[Array, "T K"]) -> Float[Array, "P H"]:
        """Returns every pair's row; rows of ids out of range are not written."""
        experts, scheme = self.experts, self.experts.activation_scheme
        order13, order2 = row_orders(experts)
        with jax.named_scope("group"):
            tiles, pair = self._tiles(ids)
        launch = functools.partial(
            grouped_gemm,
            tiles=tiles,
            pair=pair,
            swizzled=experts.layout != "linear",
            tokens=self.tilings.tokens,
            interpret=self.interpret,
        )
        with jax.named_scope("gemm1"):
            hidden = launch(
                *self._input(x),
                _weights(experts.w13, order13, experts.w13_bias, 2 if experts.gated else 1),
                top_k=ids.shape[1],
                scale=self.recipe.w2_input_scale(experts),
                epilogue=functools.partial(
                    epilogues.gemm1,
                    activation=self.recipe.call.activation,
                    native=not self.interpret,
                ),
                result=self._result(ids.size, experts.intermediate_size),
                # "per_token" quantises whole rows in a separate pass, which needs plain order.
                in_quarters=scheme != "per_token",
                tiling=self.tilings.gemm1,
                name="nvfp4_moe_gemm1",
            )
        with jax.named_scope("gemm2"):
            return launch(
                *self._hidden(hidden),
                _weights(experts.w2, order2, experts.w2_bias, 1),
                top_k=None,
                scale=None,
                epilogue=epilogues.gemm2,
                result=self._result(ids.size, experts.hidden_size),
                in_quarters=False,
                tiling=self.tilings.gemm2,
                name="nvfp4_moe_gemm2",
            )

    def _tiles(self, ids: Int32[Array, "T K"]) -> tuple[Tiles, Int32[Array, " P"] | None]:
        """Returns the tiles, and the pair at each place; None if place i holds pair i."""
        if self.tilings.by_pair:
            return Tiles(ids.reshape(-1), None, None), None
        grouping = group(ids, self.experts.num_experts, self.tilings.tokens)
        return grouping.tiles(self.tilings.tokens), grouping.order

    def _input(self, x: Float[Array, "T H"]) -> _Operand:
        """Returns GEMM1's operand."""
        with jax.named_scope("input"):
            scale = self.recipe.w13_input_scale(self.experts)
            if scale is not None:
                rows = quantize_rows(x, scale, self._result(*x.shape), interpret=self.interpret)
                return rows, scale.reshape(1)
            return self._in_quarters(self.recipe.input_rows(x.astype(jnp.float32), self.experts))

    def _hidden(self, hidden: Float[Array, "P I"]) -> _Operand:
        """Returns GEMM2's operand, from the result of GEMM1's epilogue."""
        if self.experts.activation_scheme == "none":
            return hidden, None
        scale = self.recipe.w2_input_scale(self.experts)
        if scale is not None:
            return hidden, scale.reshape(1)
        with jax.named_scope("hidden"):
            return self._in_quarters(self.recipe.requantized(hidden.astype(jnp.float32), None))

    def _in_quarters(self, rows: Rows) -> _Operand:
        # Even columns make up the quarters 0 and 2, odd columns the quarters 1 and 3.
        halves = (jnp.swapaxes(half.reshape(len(half), -1, 2), 1, 2) for half in rows.values())
        quarters = jnp.stack(tuple(halves), axis=2).reshape(len(rows.low), -1)
        scale = rows.global_scale
        return quarters.astype(self.recipe.row_dtype), None if scale is None else scale[:, 0]

    def _result(self, rows: int, columns: int) -> jax.ShapeDtypeStruct:
        dtype = jnp.dtype(self.recipe.row_dtype)
        return jax.ShapeDtypeStruct((rows, columns), dtype, manual_axis_type=self.varying)


def _weights(
    array: Nvfp4Array, order: np.ndarray | None, bias: Float32[Array, "E N"] | None, groups: int
) -> Weights:
    num_experts = len(array.data)
    return Weights(
        words=as_words(array.data),
        scale=lax.bitcast_convert_type(array.scale, jnp.uint8).reshape(num_experts, -1),
        order=None if order is None else jnp.asarray(order, jnp.int32),
        groups=groups,
        global_scale=array.global_scale.reshape(num_experts, -1),
        bias=bias,
    )
