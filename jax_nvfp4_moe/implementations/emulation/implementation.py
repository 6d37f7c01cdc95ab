"""NVFP4 experts in jax.numpy: on any device, in any layout; the reference for the others.

At most one expert's weights are dequantised at a time. Two formulations compute the same
arithmetic; the shapes decide between them while tracing:

* **gather**, for few tokens: every (token, slot) pair multiplies its own expert's packed bytes.
  One fused loop gathers, decodes and sums them; it sorts nothing and writes no weights.
* **grouped**, for many tokens: pairs are sorted by expert. A loop over tiles decodes one expert at
  a time and multiplies all its tokens on the matrix unit.
"""

import dataclasses
import functools
from typing import ClassVar, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe._messages import check_name
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.implementations.base import (
    Implementation,
    Numerics,
    Plan,
    Problem,
    Routed,
    first_reason,
)
from jax_nvfp4_moe.implementations.common.contractions import (
    Rows,
    decode_and_dot,
    integer_multiply_reduce,
    multiply_reduce,
)
from jax_nvfp4_moe.implementations.common.grouping import Tile, expected_hits, group, tile_rows
from jax_nvfp4_moe.implementations.common.recipes import Contract, Recipe, combined
from jax_nvfp4_moe.implementations.common.reports import packed_reads
from jax_nvfp4_moe.implementations.common.sharded import local_ids, varying_zeros
from jax_nvfp4_moe.relayout import take_experts

# If experts are hit more often than this on average, decoding each one once is faster.
_GATHER_MAX_REUSE = 2.0


@dataclasses.dataclass(frozen=True)
class Emulation(Implementation):
    """The implementation "emulation": `jax.numpy`, on any device.

    Attributes:
        numerics: "kernel" rounds where the Blackwell kernels do, "vllm" where vLLM's emulation does
            (`Nvfp4QuantizationEmulationTritonExperts` of vllm@0.33.0).

    Raises:
        ValueError: `numerics` is neither of the two.
    """

    numerics: Numerics = "kernel"

    name: ClassVar[str] = "emulation"
    needs: ClassVar[str] = "any device"
    device_words: ClassVar[tuple[str, ...]] = ("",)

    def __post_init__(self) -> None:
        check_name("numerics", self.numerics, get_args(Numerics))

    def _plan(self, problem: Problem) -> "EmulationPlan":
        experts, vllm = problem.experts, self.numerics == "vllm"
        first_reason(
            (
                vllm and experts.activation_scheme != "static",
                f"numerics='vllm' with activation_scheme={experts.activation_scheme!r}: vLLM's "
                "emulation knows static activation scales only; use numerics='kernel'",
            ),
            (
                vllm and (experts.w13_bias is not None or experts.w2_bias is not None),
                "numerics='vllm' with biases: vLLM's emulation rejects them; use numerics='kernel'",
            ),
        )
        return EmulationPlan(self, problem)


@dataclasses.dataclass(frozen=True)
class EmulationPlan(Plan):
    """Computes the layer in `jax.numpy`."""

    implementation: Emulation

    @property
    def numerics(self) -> Numerics:
        """The preset whose roundings the result has."""
        return self.implementation.numerics

    def describe(self) -> str:
        """Returns the formulation that a call uses, and how many packed bytes it reads."""
        problem, experts = self.problem, self.problem.experts
        sizes = problem.tokens, problem.top_k, experts.num_experts
        in_floats = self.numerics == "vllm" or experts.activation_scheme == "none"
        on_cpu = "cpu" in problem.device_kind.lower()
        gathers = _gathers(*sizes) and not (in_floats and on_cpu)
        reads = problem.tokens * problem.top_k if gathers else expected_hits(*sizes)
        how = "gather" if gathers else f"grouped, tiles of {tile_rows(*sizes)} rows"
        return f"{how}; {packed_reads(problem, reads)}"

    def run(
        self, x: Float[Array, "T H"], routed: Routed, experts: ExpertWeights
    ) -> Float[Array, "T H"]:
        """Returns the layer's output."""
        call, (topk_ids, topk_weights) = self.problem.call, routed
        recipe = Recipe(call, experts.activation_scheme, x.dtype, self.numerics)
        ids = local_ids(call, topk_ids, experts)
        values = recipe.input_values(x, topk_weights)
        tokens, top_k = topk_ids.shape
        form = _gather if _gathers(tokens, top_k, experts.num_experts) else _grouped
        rows = form(recipe, recipe.input_rows(values, experts), ids, topk_weights, experts)
        return combined(recipe, rows, topk_weights)


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
    # If activations are not quantised, a CPU is faster with one decoded expert at a time than with
    # float products in one fused sum.
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
    # Token by token, so that the integer sums of all blocks stay in the cache until they are
    # multiplied by the scales.
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
    """Returns every pair's output, each with its own expert's weights; zero for invalid ids."""
    valid = (ids >= 0) & (ids < experts.num_experts)
    own = take_experts(experts, jnp.where(valid, ids, 0))
    repeated = jax.tree.map(lambda array: array[:, None], x)
    rows = recipe.expert_rows(repeated, own, recipe.w2_input_scale(experts), topk_weights, contract)
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
    w2_input_scale = recipe.w2_input_scale(experts)
    weights = topk_weights.reshape(-1)

    def tile_output(tile: Tile) -> Array:
        own = take_experts(experts, tile.expert)
        mine = jax.tree.map(lambda array: array[tile.pair // top_k], x)
        return recipe.expert_rows(mine, own, w2_input_scale, weights[tile.pair], decode_and_dot)

    rows_per_tile = tile_rows(tokens, top_k, experts.num_experts)
    grouping = group(ids, experts.num_experts, rows_per_tile)

    def body(index: Array, rows: Array) -> Array:
        tile = grouping.tile(index, rows_per_tile)
        # The next tile overwrites rows that are not live, unless they lie beyond the last pair.
        output = tile_output(tile).astype(rows.dtype)
        return lax.dynamic_update_slice(rows, output, (tile.first, jnp.int32(0)))

    shape = (pairs + rows_per_tile, experts.hidden_size)
    start = varying_zeros(shape, recipe.row_dtype, x, ids, experts)
    rows = lax.fori_loop(jnp.int32(0), grouping.num_tiles, body, start)
    valid = (ids >= 0) & (ids < experts.num_experts)
    rows = grouping.unsort(rows).reshape(tokens, top_k, experts.hidden_size)
    return jnp.where(valid[..., None], rows, jnp.zeros_like(rows))
