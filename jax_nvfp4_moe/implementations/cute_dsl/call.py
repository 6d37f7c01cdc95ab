"""Calls FlashInfer's two CuTe-DSL kernels: a gather GEMM with the activation, and a GEMM.

This module quantises and sorts tokens. The first kernel gathers them, multiplies, applies the
activation and quantises the result. The second multiplies, scales each row by its token's weight,
and adds it to the token's output. (flashinfer-python 0.6.13: fused_moe/cute_dsl/fused_moe.py, lines
192-307; 0.7.2: lines 360-890.) There are three exceptions:

* "per_token": the first kernel writes bfloat16, which this module quantises.
* Deterministic: the second kernel writes its rows, which this module accumulates in slot order.
* W4A16 (0.7.2: fused_moe/cute_dsl/blackwell/moe_w4a16.py): both kernels read and write sorted
  bfloat16 rows, which this module gathers and accumulates.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.bridge import cute_dsl
from jax_nvfp4_moe.bridge.call import Argument, InOut, Output
from jax_nvfp4_moe.bridge.call import call as bridge_call
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.format import BLOCK_SIZE, quantize
from jax_nvfp4_moe.implementations.base import Call
from jax_nvfp4_moe.implementations.common.native import run_kernels
from jax_nvfp4_moe.implementations.common.recipes import Recipe
from jax_nvfp4_moe.implementations.cute_dsl.sort import (
    Permutation,
    moe_sort,
    rows_of_pairs,
)
from jax_nvfp4_moe.layouts import swizzle_scales
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array
from jax_nvfp4_moe.relayout import to_layout
from jax_nvfp4_moe.rounding import reciprocal


@dataclasses.dataclass(frozen=True)
class Functions:
    """The pair of compiled functions that a plan calls.

    Attributes:
        module: the name under which their module is registered with the bridge.
        arch: the architecture that they are compiled for, such as "10.0a".
        variant: the arithmetic that they compute, matching the call and the experts.
        tactic: their tile sizes, which divide the experts' padded sizes.
    """

    module: str
    arch: str
    variant: cute_dsl.Variant
    tactic: cute_dsl.Tactic

    @property
    def names(self) -> tuple[str, str]:
        """The names of the two functions."""
        key = self.variant, self.tactic, self.arch
        return cute_dsl.gemm1(*key), cute_dsl.gemm2(*key)

    def gemm1(self, **values: Argument) -> tuple[Array, ...]:
        """Calls the first GEMM, and returns its outputs."""
        arguments = cute_dsl.ordered(cute_dsl.gemm1_parameters(self.variant), values)
        return bridge_call(self.module, self.names[0], arguments, workspace=0)

    def gemm2(self, **values: Argument) -> tuple[Array, ...]:
        """Calls the second GEMM, and returns its outputs."""
        arguments = cute_dsl.ordered(cute_dsl.gemm2_parameters(self.variant), values)
        return bridge_call(self.module, self.names[1], arguments, workspace=0)


def run_routed(
    functions: Functions,
    call: Call,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """Returns the layer's output.

    Args:
        functions: the compiled functions to call.
        call: the static arguments.
        x: tokens.
        topk_ids: each token's experts, among all experts of the layer.
        topk_weights: their weights.
        experts: this device's experts, which are rearranged unless their layout is "cute_dsl".
    """
    kernels = _Kernels(functions, call, to_layout(experts, "cute_dsl"))
    return run_kernels(kernels.run, call, x, topk_ids, topk_weights, experts)


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The two launches of a call.

    Attributes:
        functions: the compiled functions to call.
        call: the static arguments.
        experts: in the layout "cute_dsl".
    """

    functions: Functions
    call: Call
    experts: ExpertWeights

    @property
    def own_scales(self) -> bool:
        """Whether each row has its own activation scale, instead of one for the whole layer."""
        return self.experts.activation_scheme == "per_token"

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.call, self.experts.activation_scheme, jnp.dtype(jnp.bfloat16))

    def run(
        self,
        values: Float32[Array, "T H"],
        ids: Int32[Array, "T K"],
        weights: Float32[Array, "T K"],
    ) -> Float[Array, "T H"]:
        """Returns the experts' output for tokens; ids count this device's experts."""
        if ids.size == 0:  # both kernels divide by the number of tiles
            return jnp.zeros_like(values)
        experts = self.experts
        padding = experts.w2.shape[-2] - experts.hidden_size
        values = jnp.pad(values, ((0, 0), (0, padding)))
        permutation = moe_sort(ids, experts.num_experts, self.functions.tactic.tile)
        if self.functions.variant.scheme == "none":
            y = self._unquantized(values, permutation, weights)
        else:
            hidden = self._first(values, permutation, ids.shape[1])
            y = self._second(hidden, permutation, weights)
        if not self.functions.variant.finalize:
            # Rows of other devices' experts were not written.
            here = (ids >= 0) & (ids < experts.num_experts)
            rows = jnp.where(here[..., None], y, 0)
            y = self.recipe.combine(rows.astype(jnp.float32), weights)
        return y[:, : experts.hidden_size]

    def _unquantized(
        self,
        values: Float32[Array, "T H"],
        permutation: Permutation,
        weights: Float32[Array, "T K"],
    ) -> Float[Array, "T K H"]:
        """Returns W4A16's rows; the values for slots without a row are unspecified."""
        experts = self.experts
        rows = permutation.permuted_idx_to_expanded_idx.size
        hidden_size, columns = experts.w2.shape[-2:]
        (hidden,) = self.functions.gemm1(
            hidden_states=values.astype(jnp.bfloat16)[permutation.token_ids(weights.shape[1])],
            w1=experts.w13.data,
            w1_scale=experts.w13.scale,
            alpha=experts.w13.global_scale[:, 0],
            out=Output((rows, columns), jnp.bfloat16),
            **_tiles(permutation),
        )
        (y,) = self.functions.gemm2(
            a=hidden,
            w2=experts.w2.data,
            w2_scale=experts.w2.scale,
            alpha=experts.w2.global_scale,
            output=Output((rows, hidden_size), jnp.bfloat16),
            **_tiles(permutation),
        )
        own = rows_of_pairs(permutation, weights.size).reshape(weights.shape)
        return y[jnp.maximum(own, 0)]

    def _first(
        self, values: Float32[Array, "T H"], permutation: Permutation, top_k: int
    ) -> Nvfp4Array:
        """Returns the second GEMM's operand, with swizzled scales."""
        experts = self.experts
        rows = permutation.permuted_idx_to_expanded_idx.size
        columns = experts.w2.shape[-1]
        w13_input_scale, w2_input_scale = self._static_scales()
        x = quantize(values, per="row") if self.own_scales else quantize(values, w13_input_scale)
        common: dict[str, Argument] = {
            "hidden_states": x.data,
            "hidden_states_scale": x.scale,
            "w1": experts.w13.data,
            "w1_scale": experts.w13.scale,
            "alpha": experts.w13.global_scale[:, 0] * w13_input_scale,
            "token_ids": permutation.token_ids(top_k),
            **_tiles(permutation),
        }
        if self.own_scales:
            out = Output((rows, columns), jnp.bfloat16)
            (written,) = self.functions.gemm1(**common, per_token_scales=x.global_scale, out=out)
            hidden = quantize(written, per="row")
            return dataclasses.replace(hidden, scale=swizzle_scales(hidden.scale))
        data, block_scale = self.functions.gemm1(
            **common,
            fc2_input_scale=reciprocal(w2_input_scale).reshape(1),
            out=Output((rows, columns // 2), jnp.uint8),
            # Swizzled, in tiles of 128 rows and 4 columns.
            out_scale=Output((rows, columns // BLOCK_SIZE), jnp.float8_e4m3fn),
        )
        return Nvfp4Array(data, block_scale, w2_input_scale)

    def _second(
        self, hidden: Nvfp4Array, permutation: Permutation, weights: Float32[Array, "T K"]
    ) -> Array:
        """Returns the output [T, H], or rows [T, K, H] if the kernel does not accumulate them."""
        experts = self.experts
        columns = experts.w2.shape[-2]
        _, w2_input_scale = self._static_scales()
        own: dict[str, Argument] = {}
        if self.own_scales:
            own = {"per_row_scales": hidden.global_scale}
        (y,) = self.functions.gemm2(
            a=hidden.data,
            a_scale=hidden.scale,
            w2=experts.w2.data,
            w2_scale=experts.w2.scale,
            alpha=experts.w2.global_scale * w2_input_scale,
            permuted_idx_to_expanded_idx=permutation.permuted_idx_to_expanded_idx,
            token_final_scales=weights,
            output=(
                # The kernel adds to the buffer's contents.
                InOut(jnp.zeros((len(weights), columns), jnp.bfloat16))
                if self.functions.variant.finalize
                else Output((*weights.shape, columns), jnp.bfloat16)
            ),
            **_tiles(permutation),
            **own,
        )
        return y

    def _static_scales(self) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
        """Returns the decode scales of both GEMMs' activations; 1 if rows have their own."""
        if self.own_scales:
            return jnp.float32(1), jnp.float32(1)
        w13_input_scale = self.recipe.w13_input_scale(self.experts)
        w2_input_scale = self.recipe.w2_input_scale(self.experts)
        assert w13_input_scale is not None and w2_input_scale is not None  # check_experts
        return w13_input_scale, w2_input_scale


def _tiles(permutation: Permutation) -> dict[str, Argument]:
    return {
        "tile_idx_to_expert_idx": permutation.tile_idx_to_expert_idx,
        "tile_idx_to_mn_limit": permutation.tile_idx_to_mn_limit,
        "num_non_exiting_tiles": permutation.num_non_exiting_tiles,
    }
