"""The implementation "cpu": the "kernel" preset's arithmetic on packed weights, in C++.

The C++ is in `ffi/cpu`. It reads packed weights in any layout, once in each call.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe._messages import check_name
from jax_nvfp4_moe.bridge import library
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.global_scale import expand_global_scale
from jax_nvfp4_moe.implementations.base import Call, Implementation, Plan, Problem, Routed
from jax_nvfp4_moe.implementations.common.recipes import Recipe
from jax_nvfp4_moe.implementations.common.reports import packed_reads
from jax_nvfp4_moe.implementations.common.sharded import local_ids, varying_zeros
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array
from jax_nvfp4_moe.relayout import row_orders
from jax_nvfp4_moe.rounding import round_to

# The activations that ffi/cpu/handler.cc parses.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai", "relu2")
LEVELS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable")


@dataclasses.dataclass(frozen=True)
class Cpu(Implementation):
    """The implementation "cpu": C++ kernels for x86-64 and aarch64.

    Attributes:
        level: the instruction set to use: "amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2" or
            "portable". None, the default, means the best level of the machine that runs the call.
            A level gives the same bits with any number of threads; two levels accumulate in
            different orders.

    Raises:
        TypeError, ValueError: `level` is not the name of a level.
    """

    level: str | None = None

    name: ClassVar[str] = "cpu"
    needs: ClassVar[str] = "a CPU"
    device_words: ClassVar[tuple[str, ...]] = ("cpu",)

    def __post_init__(self) -> None:
        if self.level is not None:
            check_name("level", self.level, LEVELS, "None or ")

    def _plan(self, problem: Problem) -> "CpuPlan":
        if (reason := library.unavailable()) is not None:
            raise NotImplementedError(reason)
        levels = library.cpu_levels()
        if self.level is not None and not levels.get(self.level, False):
            state = "this machine lacks it" if self.level in levels else "not compiled in"
            has = ", ".join(name for name, there in levels.items() if there)
            raise NotImplementedError(f"level {self.level!r}: {state}; there are {has}")
        if (activation := problem.call.activation.name) not in ACTIVATIONS:
            raise NotImplementedError(f"activation {activation!r}: it has {', '.join(ACTIVATIONS)}")
        return CpuPlan(self, problem)


@dataclasses.dataclass(frozen=True)
class CpuPlan(Plan):
    """Computes the layer in one custom call of the library."""

    implementation: Cpu

    @property
    def platform(self) -> str:
        """The platform of the custom call."""
        return "cpu"

    def describe(self) -> str:
        """Returns the level that a call uses, and how many packed bytes it reads."""
        best = next(name for name, there in library.cpu_levels().items() if there)
        return f"{self.implementation.level or best}; {packed_reads(self.problem)}"

    def run(
        self, x: Float[Array, "T H"], routed: Routed, experts: ExpertWeights
    ) -> Float[Array, "T H"]:
        """Returns the layer's output."""
        call, (topk_ids, topk_weights) = self.problem.call, routed
        recipe = Recipe(call, experts.activation_scheme, x.dtype)
        ids = local_ids(call, topk_ids, experts)
        # The kernels read and write bfloat16 and float32; other types are converted to float32.
        plain = x.dtype == jnp.bfloat16 and not call.router_weight_on_input
        values = x if plain else recipe.input_values(x, topk_weights)
        result = self._layer(recipe, values, ids, topk_weights, experts)
        if call.axis_name is not None:
            # Each row is zero on all devices but one, so this sum is exact. The kernel then
            # accumulates the slots in the same order as on one device.
            result = self._combine(recipe, lax.psum(result, call.axis_name), topk_weights)
        if result.dtype != call.output_dtype:
            result = round_to(result, call.output_dtype).astype(call.output_dtype)
        return result

    def _layer(
        self,
        recipe: Recipe,
        values: Float[Array, "T H"],
        ids: Int32[Array, "T K"],
        weights: Float32[Array, "T K"],
        experts: ExpertWeights,
    ) -> Float[Array, "..."]:
        """Returns the weighted sum [T, H], or all rows [T, K, H] if experts are split."""
        # Inside shard_map the result varies over every mesh axis that an operand varies over.
        sources = values, ids, weights, experts
        if recipe.call.axis_name is None:
            shape, dtype = values.shape, _sum_dtype(recipe.call)
        else:
            shape, dtype = (*ids.shape, values.shape[-1]), jnp.dtype(jnp.float32)
        return self._call(
            library.CPU_LAYER,
            jax.typeof(varying_zeros((), dtype, *sources)).update(shape=shape),
            operands(recipe, *sources),
            attributes(recipe, experts),
        )

    def _combine(
        self, recipe: Recipe, rows: Float32[Array, "T K H"], weights: Float32[Array, "T K"]
    ) -> Float[Array, "T H"]:
        varying = jax.typeof(varying_zeros((), _sum_dtype(recipe.call), rows, weights))
        return self._call(
            library.CPU_COMBINE,
            varying.update(shape=(rows.shape[0], rows.shape[2])),
            (rows, weights),
            {"weighted": not recipe.call.router_weight_on_input},
        )

    def _call(
        self, target: str, result: Any, arrays: tuple[Array, ...], options: dict[str, Any]
    ) -> Array:
        library.register_cpu_targets()
        return jax.ffi.ffi_call(target, result)(
            *arrays, level=self.implementation.level or "", **options
        )


def _sum_dtype(call: Call) -> Any:
    """Returns the dtype in which the kernels write sums."""
    return jnp.dtype(jnp.bfloat16 if call.output_dtype == jnp.bfloat16 else jnp.float32)


def operands(
    recipe: Recipe,
    values: Float[Array, "T H"],
    ids: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> tuple[Array, ...]:
    """Returns the kernel's operands, in the order of `ffi/cpu/handler.cc`."""
    order13, order2 = (
        np.zeros(0, np.int32) if order is None else order for order in row_orders(experts)
    )
    return (
        values,
        ids,
        weights,
        *_matrix(experts.w13, order13, (experts.num_experts, 2 if experts.gated else 1)),
        _array_or(experts.w13_bias, np.zeros(0)),
        *_matrix(experts.w2, order2, (experts.num_experts,)),
        _array_or(experts.w2_bias, np.zeros(0)),
        _array_or(recipe.w13_input_scale(experts), 1.0),
        _array_or(recipe.w2_input_scale(experts), 1.0),
    )


def attributes(recipe: Recipe, experts: ExpertWeights) -> dict[str, Any]:
    """Returns the kernel's attributes, except the level."""
    activation = recipe.call.activation
    parameters = {name: getattr(activation, name) for name in ("alpha", "beta", "limit")}
    return {
        "scheme": experts.activation_scheme,
        "activation": activation.name,
        **{name: np.float32(value or 0.0) for name, value in parameters.items()},
        "rounding": jnp.dtype(recipe.row_dtype).name,
        "weighted": not recipe.call.router_weight_on_input,
        "intermediate_size": experts.intermediate_size,
        "swizzled": experts.layout != "linear",
    }


def _matrix(weights: Nvfp4Array, order: np.ndarray, groups: tuple[int, ...]) -> tuple[Array, ...]:
    scale = expand_global_scale(weights.global_scale, groups)
    return weights.data, weights.scale, jnp.asarray(order), jnp.broadcast_to(scale, groups)


def _array_or(array: Array | None, otherwise: object) -> Float32[Array, "..."]:
    return jnp.asarray(otherwise if array is None else array, jnp.float32)
