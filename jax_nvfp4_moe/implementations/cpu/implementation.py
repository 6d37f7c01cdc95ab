"""Native kernels for CPUs: the "kernel" preset's arithmetic on packed weights, near memory speed.

The C++ is in `ffi/cpu`. Weights are read as they are, in any layout, once for each call.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe._messages import check_name
from jax_nvfp4_moe.bridge import library
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.global_scale import expand_global_scale
from jax_nvfp4_moe.implementations.base import Call, Problem
from jax_nvfp4_moe.implementations.common.recipes import Recipe
from jax_nvfp4_moe.implementations.emulation import implementation as emulation
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array
from jax_nvfp4_moe.relayout import row_orders
from jax_nvfp4_moe.rounding import round_to
from jax_nvfp4_moe.routing import Routing, route

LEVELS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable")


@dataclasses.dataclass(frozen=True)
class Cpu:
    """The implementation "cpu" with options: `implementation` takes one instead of the name.

    Attributes:
        level: the instructions to use, one of "amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2"
            and "portable". None, as users want it, means the best that the machine has, found where
            the call runs. Each gives the same result however many threads there are; two levels
            add in another order.

    Raises:
        TypeError, ValueError: not the name of a level.
    """

    level: str | None = None

    def __post_init__(self) -> None:
        if self.level is not None:
            check_name("level", self.level, LEVELS, "None or ")

    @property
    def name(self) -> str:
        """What `implementation` calls it."""
        return "cpu"

    def unsupported(self, problem: Problem) -> str | None:
        """Why the kernels cannot serve the problem, or None if they can."""
        if problem.call.numerics != "kernel":
            return f"numerics={problem.call.numerics!r}: it has those of 'kernel' only"
        if (reason := library.unavailable()) is not None:
            return reason
        levels = library.cpu_levels()
        if self.level is not None and not levels.get(self.level, False):
            state = "this machine lacks it" if self.level in levels else "not compiled in"
            has = ", ".join(name for name, there in levels.items() if there)
            return f"level {self.level!r}: {state}; there are {has}"
        return None

    def describe(self, problem: Problem) -> str:
        """The instructions it would use, and the packed bytes it reads."""
        levels = library.cpu_levels()
        level = self.level or next(name for name, there in levels.items() if there)
        return f"{level}; {emulation.packed_reads(problem)}"

    def run(
        self,
        call: Call,
        x: Float[Array, "T H"],
        topk_ids: Int32[Array, "T K"],
        topk_weights: Float32[Array, "T K"],
        experts: ExpertWeights,
    ) -> Float[Array, "T H"]:
        """The layer's output. A program that is lowered for another platform too emulates there."""
        if x.shape[0] == 0:
            return jnp.zeros(x.shape, call.output_dtype)
        return lax.platform_dependent(
            x,
            topk_ids,
            topk_weights,
            experts,
            cpu=functools.partial(self._run, call),
            default=functools.partial(emulation.run, call),
        )

    def _run(
        self, call: Call, x: Array, topk_ids: Array, topk_weights: Array, experts: ExpertWeights
    ) -> Array:
        recipe = Recipe(call, experts.activation_scheme, x.dtype)
        ids = emulation.local_ids(call, topk_ids, experts)
        # The kernels read and write bfloat16 too. Other types they see as float32.
        plain = x.dtype == jnp.bfloat16 and not call.router_weight_on_input
        values = x if plain else recipe.input_values(x, topk_weights)
        result = self._layer(recipe, values, ids, topk_weights, experts)
        if call.axis_name is not None:
            # Each row is zero on all devices but one, so this sum is exact, and the kernel adds the
            # slots as it does where it has all experts.
            result = self._combine(recipe, lax.psum(result, call.axis_name), topk_weights)
        if result.dtype != call.output_dtype:
            result = round_to(result, call.output_dtype).astype(call.output_dtype)
        return result

    def run_from_logits(
        self,
        call: Call,
        routing: Routing,
        x: Float[Array, "T H"],
        logits: Float[Array, "T E"],
        bias: Float[Array, " E"] | None,
        experts: ExpertWeights,
    ) -> Float[Array, "T H"]:
        """The layer's output; there is no faster way to route than `route`."""
        return self.run(call, x, *route(logits, routing, bias=bias), experts)

    def _layer(
        self,
        recipe: Recipe,
        values: Float[Array, "T H"],
        ids: Int32[Array, "T K"],
        weights: Float32[Array, "T K"],
        experts: ExpertWeights,
    ) -> Float[Array, "..."]:
        """The weighted sum [T, H]; with experts on several devices, all rows [T, K, H], float32."""
        # Inside shard_map the result varies over every mesh axis that an operand varies over.
        sources = values, ids, weights, experts
        if recipe.call.axis_name is None:
            shape, dtype = values.shape, _sum_dtype(recipe.call)
        else:
            shape, dtype = (*ids.shape, values.shape[-1]), jnp.dtype(jnp.float32)
        return self._call(
            library.CPU_LAYER,
            jax.typeof(emulation.varying_zeros((), dtype, *sources)).update(shape=shape),
            operands(recipe, *sources),
            attributes(recipe, experts),
        )

    def _combine(
        self, recipe: Recipe, rows: Float32[Array, "T K H"], weights: Float32[Array, "T K"]
    ) -> Float[Array, "T H"]:
        varying = jax.typeof(emulation.varying_zeros((), _sum_dtype(recipe.call), rows, weights))
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
        return jax.ffi.ffi_call(target, result)(*arrays, level=self.level or "", **options)


def _sum_dtype(call: Call) -> Any:
    """What the kernels write sums in."""
    return jnp.dtype(jnp.bfloat16 if call.output_dtype == jnp.bfloat16 else jnp.float32)


def operands(
    recipe: Recipe,
    values: Float[Array, "T H"],
    ids: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> tuple[Array, ...]:
    """What the kernel is given, in the order of `ffi/cpu/handler.cc`."""
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
        _array_or(recipe.input_scale(experts), 1.0),
        _array_or(recipe.hidden_scale(experts), 1.0),
    )


def attributes(recipe: Recipe, experts: ExpertWeights) -> dict[str, Any]:
    """What the kernel is told, but for its level."""
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
