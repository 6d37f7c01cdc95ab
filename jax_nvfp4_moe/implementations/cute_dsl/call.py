"""What FlashInfer's two CuTe-DSL kernels are given: a gather GEMM with its activation, a GEMM.

Tokens are quantised and sorted here. The first kernel gathers them, multiplies, activates and
quantises again; the second multiplies, scales each row by its token's weight, and adds it to the
token's output. (flashinfer-python 0.6.13: fused_moe/cute_dsl/fused_moe.py, lines 192-307; 0.7.2:
lines 360-890.) Where each row has a scale of its own the first writes bfloat16, which is quantised
here; where the order of the sum is to be certain the second writes its rows, which are added here.
W4A16's two (0.7.2: fused_moe/cute_dsl/blackwell/moe_w4a16.py) take and write bfloat16 rows as they
are sorted: they are gathered and added here.
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
from jax_nvfp4_moe.relayout import prepare
from jax_nvfp4_moe.rounding import reciprocal


@dataclasses.dataclass(frozen=True)
class Callee:
    """Whose functions are called.

    Attributes:
        module: the name under which the bridge knows the module that has them.
        arch: which of its functions: those compiled for this, as in "10.0a".
        variant: likewise, those that compute this; it fits the call and the experts.
        tactic: likewise; its tiles fit the experts' padded sizes.
    """

    module: str
    arch: str
    variant: cute_dsl.Variant
    tactic: cute_dsl.Tactic

    @property
    def functions(self) -> tuple[str, str]:
        """The names of both."""
        key = self.variant, self.tactic, self.arch
        return cute_dsl.gemm1(*key), cute_dsl.gemm2(*key)

    def gemm1(self, **values: Argument) -> tuple[Array, ...]:
        """What the first GEMM writes, of its arguments."""
        arguments = cute_dsl.ordered(cute_dsl.gemm1_parameters(self.variant), values)
        return bridge_call(self.module, self.functions[0], arguments, workspace=0)

    def gemm2(self, **values: Argument) -> tuple[Array, ...]:
        """What the second writes."""
        arguments = cute_dsl.ordered(cute_dsl.gemm2_parameters(self.variant), values)
        return bridge_call(self.module, self.functions[1], arguments, workspace=0)


def run_on(
    callee: Callee,
    call: Call,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """The layer's output.

    Args:
        callee: whose functions are called.
        call: what is computed.
        x: tokens.
        topk_ids: of all experts.
        topk_weights: their weights.
        experts: those of this device; in another layout than "cute_dsl" they are rearranged here.
    """
    layer = _Layer(callee, call, prepare(experts, "cute_dsl"))
    return run_kernels(layer.run, call, x, topk_ids, topk_weights, experts)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A call's parts.

    Attributes:
        callee: whose functions are called.
        call: what is computed.
        experts: in the layout "cute_dsl".
    """

    callee: Callee
    call: Call
    experts: ExpertWeights

    @property
    def own_scales(self) -> bool:
        """Whether each row has its own, beside which that of all is 1."""
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
        """The experts' output for tokens; ids are this device's."""
        if ids.size == 0:  # no tile, which both kernels divide by
            return jnp.zeros_like(values)
        experts = self.experts
        padding = experts.w2.shape[-2] - experts.hidden_size
        values = jnp.pad(values, ((0, 0), (0, padding)))
        permutation = moe_sort(ids, experts.num_experts, self.callee.tactic.tile)
        if self.callee.variant.scheme == "none":
            y = self._unquantized(values, permutation, weights)
        else:
            hidden = self._first(values, permutation, ids.shape[1])
            y = self._second(hidden, permutation, weights)
        if not self.callee.variant.finalize:
            # Rows of others' experts were not written.
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
        """W4A16's rows; of slots without one, anything."""
        experts = self.experts
        rows = permutation.permuted_idx_to_expanded_idx.size
        hidden_size, columns = experts.w2.shape[-2:]
        (hidden,) = self.callee.gemm1(
            hidden_states=values.astype(jnp.bfloat16)[permutation.token_ids(weights.shape[1])],
            w1=experts.w13.data,
            w1_scale=experts.w13.scale,
            alpha=_gate_and_up(experts),
            out=Output((rows, columns), jnp.bfloat16),
            **_tiles(permutation),
        )
        (y,) = self.callee.gemm2(
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
        """The second GEMM's operand, its scales swizzled."""
        experts = self.experts
        rows = permutation.permuted_idx_to_expanded_idx.size
        columns = experts.w2.shape[-1]
        input_scale, hidden_scale = self._static_scales()
        x = quantize(values, per="row") if self.own_scales else quantize(values, input_scale)
        common: dict[str, Argument] = {
            "hidden_states": x.data,
            "hidden_states_scale": x.scale,
            "w1": experts.w13.data,
            "w1_scale": experts.w13.scale,
            "alpha": _gate_and_up(experts) * input_scale,
            "token_ids": permutation.token_ids(top_k),
            **_tiles(permutation),
        }
        if self.own_scales:
            out = Output((rows, columns), jnp.bfloat16)
            (written,) = self.callee.gemm1(**common, per_token_scales=x.global_scale, out=out)
            hidden = quantize(written, per="row")
            return dataclasses.replace(hidden, scale=swizzle_scales(hidden.scale))
        data, block_scale = self.callee.gemm1(
            **common,
            fc2_input_scale=reciprocal(hidden_scale).reshape(1),
            out=Output((rows, columns // 2), jnp.uint8),
            # In tiles of 128 rows and 4 columns.
            out_scale=Output((rows, columns // BLOCK_SIZE), jnp.float8_e4m3fn),
        )
        return Nvfp4Array(data, block_scale, hidden_scale)

    def _second(
        self, hidden: Nvfp4Array, permutation: Permutation, weights: Float32[Array, "T K"]
    ) -> Array:
        """The output [T, H], or rows [T, K, H]."""
        experts = self.experts
        columns = experts.w2.shape[-2]
        _, hidden_scale = self._static_scales()
        own: dict[str, Argument] = {}
        if self.own_scales:
            own = {"per_row_scales": hidden.global_scale}
        (y,) = self.callee.gemm2(
            a=hidden.data,
            a_scale=hidden.scale,
            w2=experts.w2.data,
            w2_scale=experts.w2.scale,
            alpha=experts.w2.global_scale * hidden_scale,
            permuted_idx_to_expanded_idx=permutation.permuted_idx_to_expanded_idx,
            token_final_scales=weights,
            output=(
                # The kernel adds to what is there.
                InOut(jnp.zeros((len(weights), columns), jnp.bfloat16))
                if self.callee.variant.finalize
                else Output((*weights.shape, columns), jnp.bfloat16)
            ),
            **_tiles(permutation),
            **own,
        )
        return y

    def _static_scales(self) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
        """Of the input and of what lies between: 1 beside those that rows have of their own."""
        if self.own_scales:
            return jnp.float32(1), jnp.float32(1)
        input_scale = self.recipe.input_scale(self.experts)
        hidden_scale = self.recipe.hidden_scale(self.experts)
        assert input_scale is not None and hidden_scale is not None  # check_experts
        return input_scale, hidden_scale


def _tiles(permutation: Permutation) -> dict[str, Argument]:
    return {
        "tile_idx_to_expert_idx": permutation.tile_idx_to_expert_idx,
        "tile_idx_to_mn_limit": permutation.tile_idx_to_mn_limit,
        "num_non_exiting_tiles": permutation.num_non_exiting_tiles,
    }


def _gate_and_up(experts: ExpertWeights) -> Float32[Array, " E"]:
    """The global scale of w13, of which the kernel takes one for gate and up."""
    scale = experts.w13.global_scale
    # Inside jit nobody can be told: a result of NaN is seen, one of wrong numbers is not.
    return jnp.where(scale[:, 0] == scale[:, -1], scale[:, 0], jnp.nan)
