"""What FlashInfer's two CuTe-DSL kernels are given: a gather GEMM with SwiGLU, a GEMM that adds up.

Tokens are quantised and sorted here. The first kernel gathers them, multiplies, activates and
quantises again; the second multiplies, scales each row by its token's weight, and adds it to the
token's output. (flashinfer-python 0.6.13: fused_moe/cute_dsl/fused_moe.py, lines 192-307.)
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.arrangement import prepare
from jax_nvfp4_moe.bridge.call import Argument, InOut, Output
from jax_nvfp4_moe.bridge.call import call as bridge_call
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.format import BLOCK_SIZE, quantize, reciprocal
from jax_nvfp4_moe.implementations._cute_dsl_sort import Permutation, moe_sort
from jax_nvfp4_moe.implementations._recipes import Recipe
from jax_nvfp4_moe.implementations.base import Call
from jax_nvfp4_moe.implementations.emulation import local_ids


@dataclasses.dataclass(frozen=True)
class Tactic:
    """How both kernels divide their work, which they have to agree on.

    Attributes:
        tile: rows of a tile, 128 or 256.
        gemm1_columns: of a tile of the first kernel, 128 or 256.
        gemm2_columns: of the second.
        gemm2_cluster: how many of the second's tiles beside each other work together, 1 or 2.
    """

    tile: int = 128
    gemm1_columns: int = 128
    gemm2_columns: int = 128
    gemm2_cluster: int = 1

    @property
    def gemm1(self) -> str:
        """The first kernel's name."""
        return f"gemm1_t{self.tile}_n{self.gemm1_columns}"

    @property
    def gemm2(self) -> str:
        """The second kernel's name."""
        return f"gemm2_t{self.tile}_n{self.gemm2_columns}_c{self.gemm2_cluster}"

    def fits(self, hidden_size: int, intermediate_size: int) -> bool:
        """Whether padded sizes are whole tiles: the kernels write whole ones (flashinfer#3957)."""
        columns = self.gemm2_columns * self.gemm2_cluster
        return 2 * intermediate_size % self.gemm1_columns == 0 and hidden_size % columns == 0


def run_on(
    module: str,
    tactic: Tactic,
    call: Call,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """The layer's output.

    Args:
        module: the name under which the bridge knows the kernels' module.
        tactic: one that fits the experts' padded sizes.
        call: what is computed.
        x: tokens.
        topk_ids: of all experts.
        topk_weights: their weights.
        experts: those of this device; in another layout than "cute_dsl" they are rearranged here.
    """
    if len(x) == 0:
        return jnp.zeros(x.shape, call.output_dtype)
    experts = prepare(experts, "cute_dsl")
    recipe = Recipe(call, experts.activation_scheme, x.dtype)
    values = recipe.input_values(x, topk_weights)
    if call.router_weight_on_input:
        topk_weights = jnp.ones_like(topk_weights)
    values = jnp.pad(values, ((0, 0), (0, experts.w2.shape[-2] - x.shape[1])))
    input_scale, hidden_scale = recipe.input_scale(experts), recipe.hidden_scale(experts)
    assert input_scale is not None and hidden_scale is not None  # unsupported
    rows = quantize(values, input_scale)
    ids = local_ids(call, topk_ids, experts)
    permutation = moe_sort(ids, experts.num_experts, tactic.tile)
    top_k = topk_ids.shape[1]
    hidden, hidden_block_scale = bridge_call(
        module,
        tactic.gemm1,
        {
            "hidden_states": rows.data,
            "gemm1_weights": experts.w13.data,
            "hidden_states_scale": rows.scale,
            "gemm1_weights_scale": experts.w13.scale,
            "gemm1_alpha": _gate_and_up(experts) * input_scale,
            **_tiles(permutation),
            # Of rows without a pair the kernel reads a token too, and throws the row away.
            "token_ids": jnp.maximum(permutation.permuted_idx_to_expanded_idx, 0) // top_k,
            "norm_const": reciprocal(hidden_scale).reshape(1),
            **_hidden(permutation, experts.w2.shape[-1]),
        },
        workspace=0,
    )
    (y,) = bridge_call(
        module,
        tactic.gemm2,
        {
            "hidden": hidden,
            "gemm2_weights": experts.w2.data,
            "hidden_scale": hidden_block_scale,
            "gemm2_weights_scale": experts.w2.scale,
            "gemm2_alpha": experts.w2.global_scale * hidden_scale,
            **_tiles(permutation),
            "permuted_idx_to_expanded_idx": permutation.permuted_idx_to_expanded_idx,
            "token_final_scales": topk_weights,
            "output": InOut(jnp.zeros(values.shape, jnp.bfloat16)),
        },
        workspace=0,
    )
    y = y[:, : x.shape[1]]
    if call.axis_name is not None:
        y = lax.psum(y.astype(jnp.float32), call.axis_name)
    return y.astype(call.output_dtype)


def _gate_and_up(experts: ExpertWeights) -> Float32[Array, " E"]:
    """The global scale of w13, of which the kernel takes one for gate and up."""
    scale = experts.w13.global_scale
    # Inside jit nobody can be told: a result of NaN is seen, one of wrong numbers is not.
    return jnp.where(scale[:, 0] == scale[:, -1], scale[:, 0], jnp.nan)


def _tiles(permutation: Permutation) -> dict[str, Argument]:
    return {
        "tile_idx_to_expert_idx": permutation.tile_idx_to_expert_idx,
        "tile_idx_to_mn_limit": permutation.tile_idx_to_mn_limit,
        "num_non_exiting_tiles": permutation.num_non_exiting_tiles,
    }


def _hidden(permutation: Permutation, intermediate_size: int) -> dict[str, Argument]:
    """GEMM2's operand: codes, and scales in tiles of 128 rows and 4 columns."""
    rows = permutation.permuted_idx_to_expanded_idx.size
    columns = intermediate_size // BLOCK_SIZE
    return {
        "hidden": Output((rows, intermediate_size // 2), jnp.uint8),
        "hidden_scale": Output((rows, columns), jnp.float8_e4m3fn),
    }
