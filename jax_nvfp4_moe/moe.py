"""The layer: NVFP4 mixture-of-experts as one pure function.

`nvfp4_moe` routes and computes, `nvfp4_moe_routed` computes what was routed. Both check their
arguments while tracing, choose an implementation, and hand it the call; jit, vmap and grad are
settled here, once for all implementations.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int, Int32

from jax_nvfp4_moe import devices, selection
from jax_nvfp4_moe._call_checks import (
    check_flag,
    check_logits,
    check_options,
    check_output_dtype,
    check_routed,
    check_tokens,
)
from jax_nvfp4_moe._messages import as_array, described
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ExpertWeights, check_experts
from jax_nvfp4_moe.implementations.base import Call, Implementation, Numerics, Problem
from jax_nvfp4_moe.implementations.common import gradient as _gradient
from jax_nvfp4_moe.implementations.cpu.implementation import Cpu
from jax_nvfp4_moe.implementations.cute_dsl.implementation import CuteDsl
from jax_nvfp4_moe.implementations.triton.implementation import Triton
from jax_nvfp4_moe.routing import Routing, check_routable, route


def nvfp4_moe(
    x: Float[Array, "T H"],
    logits: Float[Array, "T E"],
    experts: ExpertWeights,
    routing: Routing,
    *,
    bias: Float[Array, " E"] | None = None,
    activation: str | Activation = "silu",
    implementation: str | Cpu | CuteDsl | Triton | None = None,
    output_dtype: Any = None,
    axis_name: str | None = None,
    numerics: Numerics = "kernel",
    router_weight_on_input: bool = False,
    route_in_kernel: bool = False,
) -> Float[Array, "T H"]:
    """A mixture-of-experts layer with NVFP4 experts: router and experts.

    The same as `route` followed by `nvfp4_moe_routed`, whose arguments, errors and differentiation
    apply; with `route_in_kernel`, in one launch less.

    Args:
        x: tokens [T, H]: bfloat16, float16 or float32.
        logits: the router's output [T, E], over all experts of the layer; likewise.
        experts: the layer's experts, in any layout.
        routing: how to route.
        bias: the selection bias [E] of "deepseek_v3" and "minimax2", or None.
        activation: as in `nvfp4_moe_routed`.
        implementation: as in `nvfp4_moe_routed`.
        output_dtype: as in `nvfp4_moe_routed`.
        axis_name: as in `nvfp4_moe_routed`.
        numerics: as in `nvfp4_moe_routed`.
        router_weight_on_input: as in `nvfp4_moe_routed`.
        route_in_kernel: leave the routing to the implementation. The kernels of "trtllm" rank and
            weigh as `route` does, in float32 and by their own sigmoid and softmax, so that scores
            which are all but equal may be ranked otherwise. It has them for some methods and sizes.

    Returns:
        [T, H] of `output_dtype`.

    Raises:
        NotImplementedError: as `nvfp4_moe_routed`; or with `route_in_kernel` the implementation has
            no router for this method and these sizes.
    """
    x, logits = as_array("x", x), as_array("logits", logits)
    if not isinstance(routing, Routing):
        raise TypeError(
            f"routing is {described(routing)}, expected Routing, as in "
            "Routing('renormalize', top_k=8)"
        )
    check_experts(experts)
    check_logits(x, logits, experts, axis_name)
    check_flag("route_in_kernel", route_in_kernel)
    if not route_in_kernel:
        return nvfp4_moe_routed(
            x,
            *route(logits, routing, bias=bias),
            experts,
            activation=activation,
            implementation=implementation,
            output_dtype=output_dtype,
            axis_name=axis_name,
            numerics=numerics,
            router_weight_on_input=router_weight_on_input,
        )
    check_routable(logits, routing, bias)
    call = _checked_call(
        x,
        experts,
        routing.top_k,
        activation,
        output_dtype,
        axis_name,
        numerics,
        router_weight_on_input,
    )
    problem = Problem(call, experts, len(x), routing.top_k, devices.current_kind(), routing=routing)
    chosen = selection.select(implementation, problem)
    bias = None if bias is None else as_array("bias", bias).astype(jnp.float32)
    return _moe_from_logits(call, chosen, routing, x, logits, bias, experts)


def nvfp4_moe_routed(
    x: Float[Array, "T H"],
    topk_ids: Int[Array, "T K"],
    topk_weights: Float[Array, "T K"],
    experts: ExpertWeights,
    *,
    activation: str | Activation = "silu",
    implementation: str | Cpu | CuteDsl | Triton | None = None,
    output_dtype: Any = None,
    axis_name: str | None = None,
    numerics: Numerics = "kernel",
    router_weight_on_input: bool = False,
) -> Float[Array, "T H"]:
    """The experts of a mixture-of-experts layer, for tokens already routed.

    Pure: use it under `jax.jit`, `jax.vmap` (which folds into tokens), `jax.lax.scan` over layers,
    `jax.export`. `jax.grad` gives straight-through gradients with respect to `x` and
    `topk_weights`; the experts are frozen and get zeros.

    Args:
        x: tokens [T, H]: bfloat16, float16 or float32. T may be 0.
        topk_ids: each token's experts [T, K], integers, all different ("trtllm" loses one of two
            slots that name the same). Ids outside 0..E-1 contribute nothing.
        topk_weights: their weights [T, K]; bfloat16, float16 or float32, float32 inside.
        experts: the layer's experts, in any layout.
        activation: "silu", "gelu", "gelu_tanh" or "swiglu_oai" for gated experts, "relu2" for
            others; or an `Activation` with parameters.
        implementation: None chooses; a name ("trtllm", "cute_dsl", "triton", "cpu", "emulation")
            insists, as does a `CuteDsl`, `Cpu` or `Triton` with options.
        output_dtype: bfloat16, float16 or float32; None means x's.
        axis_name: the mesh axis over which the experts are split, inside `jax.shard_map`: device i
            holds experts ``i*E/n .. (i+1)*E/n - 1``, ids remain those of the whole layer, and every
            device passes the same tokens and gets the whole result. It does not depend on n.
        numerics: "kernel" rounds where the Blackwell kernels do; "vllm" where vLLM's emulation
            does (emulation only).
        router_weight_on_input: scale the token by its weight before the experts instead of their
            output after (Llama 4); K must be 1.

    Returns:
        [T, H] of `output_dtype`: the weighted sum over each token's experts.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape or a value does not fit.
        NotImplementedError: the implementation that was named cannot serve the call.
    """
    x, topk_ids = as_array("x", x), as_array("topk_ids", topk_ids)
    topk_weights = as_array("topk_weights", topk_weights)
    check_experts(experts)
    check_tokens(x, experts)
    check_routed(x, topk_ids, topk_weights, experts, axis_name)
    tokens, top_k = topk_ids.shape
    call = _checked_call(
        x, experts, top_k, activation, output_dtype, axis_name, numerics, router_weight_on_input
    )
    problem = Problem(call, experts, tokens, top_k, devices.current_kind())
    chosen = selection.select(implementation, problem)
    return _moe(
        call,
        chosen,
        x,
        _as_int32(topk_ids),
        topk_weights.astype(jnp.float32),
        experts,
    )


def _checked_call(
    x: Array,
    experts: ExpertWeights,
    top_k: int,
    activation: str | Activation,
    output_dtype: Any,
    axis_name: str | None,
    numerics: Numerics,
    router_weight_on_input: bool,
) -> Call:
    activation = Activation.of(activation)
    check_options(activation, experts, numerics, router_weight_on_input, top_k)
    return Call(
        activation=activation,
        numerics=numerics,
        output_dtype=check_output_dtype(x, output_dtype),
        axis_name=axis_name,
        router_weight_on_input=bool(router_weight_on_input),
    )


def _as_int32(topk_ids: Int[Array, "T K"]) -> Int32[Array, "T K"]:
    limits = jnp.iinfo(jnp.int32)
    if jnp.iinfo(topk_ids.dtype).max > limits.max:
        # Wrapped around, an id out of range could come to lie in it.
        topk_ids = jnp.clip(topk_ids, max(limits.min, jnp.iinfo(topk_ids.dtype).min), limits.max)
    return topk_ids.astype(jnp.int32)


# ------------------------------------------------------------------------------------- transforms


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moe(
    call: Call,
    implementation: Implementation,
    x: Array,
    topk_ids: Array,
    topk_weights: Array,
    experts: ExpertWeights,
) -> Array:
    return _straight_through(call, implementation, x, topk_ids, topk_weights, experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _straight_through(
    call: Call,
    implementation: Implementation,
    x: Array,
    topk_ids: Array,
    topk_weights: Array,
    experts: ExpertWeights,
) -> Array:
    forward = _folding_vmap(functools.partial(implementation.run, call))
    return forward((x, topk_ids, topk_weights), experts)


def _forward(
    call: Call, implementation: Implementation, *arguments: Any
) -> tuple[Array, tuple[Any, ...]]:
    return _straight_through(call, implementation, *arguments), arguments


def _backward(
    call: Call, implementation: Implementation, residuals: tuple[Any, ...], cotangent: Array
) -> tuple[Any, ...]:
    x, topk_ids, topk_weights, experts = residuals

    def run(x: Array, ids: Array, weights: Array, g: Array, experts: ExpertWeights) -> Any:
        return _gradient.backward(call, x, ids, weights, experts, g)

    dx, dw = _folding_vmap(run)((x, topk_ids, topk_weights, cotangent), experts)
    return dx, _zero_cotangent(topk_ids), dw, jax.tree.map(_zero_cotangent, experts)


_straight_through.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moe_from_logits(
    call: Call,
    implementation: Implementation,
    routing: Routing,
    x: Array,
    logits: Array,
    bias: Array | None,
    experts: ExpertWeights,
) -> Array:
    return _straight_through_from_logits(call, implementation, routing, x, logits, bias, experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _straight_through_from_logits(
    call: Call,
    implementation: Implementation,
    routing: Routing,
    x: Array,
    logits: Array,
    bias: Array | None,
    experts: ExpertWeights,
) -> Array:
    def run(x: Array, logits: Array, layer: tuple[Array | None, ExpertWeights]) -> Array:
        return implementation.run_from_logits(call, routing, x, logits, *layer)

    return _folding_vmap(run)((x, logits), (bias, experts))


def _forward_from_logits(
    call: Call, implementation: Implementation, routing: Routing, *arguments: Any
) -> tuple[Array, tuple[Any, ...]]:
    output: Any = _straight_through_from_logits(call, implementation, routing, *arguments)
    return output, arguments


def _backward_from_logits(
    call: Call,
    implementation: Implementation,
    routing: Routing,
    residuals: tuple[Any, ...],
    cotangent: Array,
) -> tuple[Any, ...]:
    x, logits, bias, experts = residuals

    def weigh(logits: Array) -> tuple[Array, Array]:
        ids, weights = route(logits, routing, bias=bias)
        return weights, ids

    weights, pull, ids = jax.vjp(weigh, logits, has_aux=True)
    dx, _, dw, frozen = _backward(call, implementation, (x, ids, weights, experts), cotangent)
    return dx, *pull(dw), jax.tree.map(_zero_cotangent, bias), frozen


_straight_through_from_logits.defvjp(_forward_from_logits, _backward_from_logits)


def _zero_cotangent(array: Array) -> Any:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


def _folding_vmap(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(*tokens, experts)` that vmap turns into one call with more tokens.

    Every array of `tokens`, and every result, has the token axis first. Where the experts are
    batched too, the batch is computed one after another.
    """

    @custom_vmap
    def call(tokens: tuple[Array, ...], experts: ExpertWeights) -> Any:
        return run(*tokens, experts)

    @call.def_vmap
    def rule(
        axis_size: int, batched: Any, tokens: tuple[Array, ...], experts: ExpertWeights
    ) -> tuple[Any, Any]:
        tokens_batched, experts_batched = batched
        tokens = tuple(
            array if is_batched else jnp.broadcast_to(array[None], (axis_size, *array.shape))
            for array, is_batched in zip(tokens, tokens_batched, strict=True)
        )
        if any(jax.tree.leaves(experts_batched)):
            leaves, treedef = jax.tree.flatten(experts)
            flags = jax.tree.leaves(experts_batched)

            def one(index: Array) -> Any:
                own = [
                    leaf[index] if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)
                ]
                return call(tuple(a[index] for a in tokens), jax.tree.unflatten(treedef, own))

            results = lax.map(one, jnp.arange(axis_size, dtype=jnp.int32))
        else:
            folded = tuple(a.reshape(axis_size * a.shape[1], *a.shape[2:]) for a in tokens)
            num_tokens = tokens[0].shape[1]
            results = jax.tree.map(
                lambda a: a.reshape(axis_size, num_tokens, *a.shape[1:]), call(folded, experts)
            )
        return results, jax.tree.map(lambda _: True, results)

    return call
