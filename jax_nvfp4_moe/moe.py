"""The layer: NVFP4 mixture-of-experts as one pure function.

`nvfp4_moe` routes and computes, `nvfp4_moe_routed` computes what was routed. Both check their
arguments while tracing, choose an implementation, and hand it the call; jit, vmap and grad are
settled here, once for all implementations.
"""

import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int, Int32

from jax_nvfp4_moe import selection
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ExpertWeights, check_experts
from jax_nvfp4_moe.format import (
    INPUT_DTYPES,
    as_array,
    check_dtype,
    check_name,
    described,
)
from jax_nvfp4_moe.implementations import _gradient
from jax_nvfp4_moe.implementations.base import Call, Implementation, Numerics, Problem
from jax_nvfp4_moe.routing import Routing, route


def nvfp4_moe(
    x: Float[Array, "T H"],
    logits: Float[Array, "T E"],
    experts: ExpertWeights,
    routing: Routing,
    *,
    bias: Float[Array, " E"] | None = None,
    activation: str | Activation = "silu",
    implementation: str | None = None,
    output_dtype: Any = None,
    axis_name: str | None = None,
    numerics: Numerics = "kernel",
    router_weight_on_input: bool = False,
) -> Float[Array, "T H"]:
    """A mixture-of-experts layer with NVFP4 experts: router and experts.

    The same as `route` followed by `nvfp4_moe_routed`, whose arguments, errors and differentiation
    apply.

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

    Returns:
        [T, H] of `output_dtype`.
    """
    x, logits = as_array("x", x), as_array("logits", logits)
    if not isinstance(routing, Routing):
        raise TypeError(
            f"routing is {described(routing)}, expected Routing, as in "
            "Routing('renormalize', top_k=8)"
        )
    check_experts(experts)
    _check_logits(x, logits, experts, axis_name)
    topk_ids, topk_weights = route(logits, routing, bias=bias)
    return nvfp4_moe_routed(
        x,
        topk_ids,
        topk_weights,
        experts,
        activation=activation,
        implementation=implementation,
        output_dtype=output_dtype,
        axis_name=axis_name,
        numerics=numerics,
        router_weight_on_input=router_weight_on_input,
    )


def nvfp4_moe_routed(
    x: Float[Array, "T H"],
    topk_ids: Int[Array, "T K"],
    topk_weights: Float[Array, "T K"],
    experts: ExpertWeights,
    *,
    activation: str | Activation = "silu",
    implementation: str | None = None,
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
        topk_ids: each token's experts [T, K], integers. Ids outside 0..E-1 contribute nothing.
        topk_weights: their weights [T, K]; bfloat16, float16 or float32, float32 inside.
        experts: the layer's experts, in any layout.
        activation: "silu", "gelu", "gelu_tanh" or "swiglu_oai" for gated experts, "relu2" for
            others; or an `Activation` with parameters.
        implementation: None chooses; a name ("trtllm", "cute_dsl", "triton", "cpu", "emulation")
            insists.
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
    activation = Activation.of(activation)
    _check_tokens(x, experts)
    _check_routed(x, topk_ids, topk_weights, experts, axis_name)
    _check_options(activation, experts, numerics, router_weight_on_input, topk_ids.shape[1])
    call = Call(
        activation=activation,
        numerics=numerics,
        output_dtype=_check_output_dtype(x, output_dtype),
        axis_name=axis_name,
        router_weight_on_input=bool(router_weight_on_input),
    )
    problem = Problem(call, experts, *topk_ids.shape, jax.devices()[0].device_kind)
    chosen = selection.select(implementation, problem)
    return _moe(
        call,
        chosen,
        x,
        _as_int32(topk_ids),
        topk_weights.astype(jnp.float32),
        experts,
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


# ------------------------------------------------------------------------------------- checks


def _axis_size(axis_name: str | None) -> int:
    if axis_name is None:
        return 1
    if not isinstance(axis_name, (str, tuple)):
        raise TypeError(f"axis_name is {described(axis_name)}, expected None or a mesh axis's name")
    try:
        return lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name is {axis_name!r}, but no mesh axis of that name is bound here: call inside "
            "jax.shard_map over it, or use jax_nvfp4_moe.parallel"
        ) from error


def _check_float(name: str, array: Array) -> None:
    if array.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"{name} has dtype {array.dtype}, expected bfloat16, float16 or float32; "
            f"pass {name}.astype(jnp.float32)"
        )


def _check_tokens(x: Array, experts: ExpertWeights) -> None:
    _check_float("x", x)
    hidden = experts.hidden_size
    if x.ndim != 2:
        hint = ""
        if x.ndim > 2:
            hint = f": fold batch and sequence into T, x.reshape(-1, {x.shape[-1]}), or use vmap"
        elif x.shape == (hidden,):
            hint = ": for one token pass x[None]"
        raise ValueError(f"x has shape {x.shape}, expected [T, {hidden}]{hint}")
    if not isinstance(x.shape[0], int):
        raise ValueError(
            f"x has shape {x.shape}, expected a T that is known while tracing, as it decides how "
            "to compute: jax.export the call for each T, or for a few and pad to those"
        )
    if x.shape[1] != hidden:
        hint = ""
        if x.shape[1] == experts.intermediate_size:
            hint = f" and intermediate_size {x.shape[1]}; were the weights transposed?"
        raise ValueError(
            f"x has shape {x.shape}, expected [T, {hidden}]: the experts have hidden_size "
            f"{hidden}{hint}"
        )


def _check_logits(x: Array, logits: Array, experts: ExpertWeights, axis_name: str | None) -> None:
    num_experts = experts.num_experts * _axis_size(axis_name)
    swapped = (num_experts,), (experts.hidden_size,)
    if swapped[0] != swapped[1] and (x.shape[1:], logits.shape[1:]) == swapped:
        raise ValueError(
            f"x has shape {x.shape} and logits has shape {logits.shape}, expected "
            f"[T, {experts.hidden_size}] and [T, {num_experts}]: are they swapped?"
        )
    _check_tokens(x, experts)
    if logits.shape != (x.shape[0], num_experts):
        hint = ""
        if logits.ndim > 2:
            hint = f": fold batch and sequence into T, logits.reshape(-1, {logits.shape[-1]})"
        raise ValueError(
            f"logits has shape {logits.shape}, expected [T, E] = {(x.shape[0], num_experts)}, as "
            f"x has {x.shape[0]} tokens and there are {num_experts} experts{hint}"
        )


def _check_routed(
    x: Array, topk_ids: Array, topk_weights: Array, experts: ExpertWeights, axis_name: str | None
) -> None:
    if not jnp.issubdtype(topk_ids.dtype, jnp.integer):
        hint = "pass topk_ids.astype(jnp.int32)"
        if jnp.issubdtype(topk_weights.dtype, jnp.integer):
            hint = f"topk_weights has dtype {topk_weights.dtype}, are the two swapped?"
        raise TypeError(
            f"topk_ids has dtype {topk_ids.dtype}, expected integers, as from route(); {hint}"
        )
    _check_float("topk_weights", topk_weights)
    if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0]:
        hint = ": for K = 1 pass topk_ids[:, None]" if topk_ids.shape == x.shape[:1] else ""
        raise ValueError(
            f"topk_ids has shape {topk_ids.shape}, expected [T, K] with T = {x.shape[0]}, as x "
            f"has{hint}"
        )
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights has shape {topk_weights.shape}, expected that of topk_ids, "
            f"{topk_ids.shape}"
        )
    num_experts = experts.num_experts * _axis_size(axis_name)
    if not 1 <= topk_ids.shape[1] <= num_experts:
        raise ValueError(
            f"topk_ids has shape {topk_ids.shape} with K = {topk_ids.shape[1]}, expected 1 to "
            f"{num_experts} experts a token"
        )


def _check_options(
    activation: Activation,
    experts: ExpertWeights,
    numerics: str,
    router_weight_on_input: bool,
    top_k: int,
) -> None:
    if activation.gated != experts.gated:
        have = "gate and up rows" if experts.gated else "up rows alone"
        suggestion = "'silu'" if experts.gated else "'relu2'"
        raise ValueError(
            f"activation {activation.name!r} is {'' if activation.gated else 'not '}gated, but "
            f"the experts have {have}: use for example {suggestion}"
        )
    check_name("numerics", numerics, get_args(Numerics))
    if not isinstance(router_weight_on_input, (bool, np.bool_)):
        raise TypeError(
            f"router_weight_on_input is {described(router_weight_on_input)}, expected True or "
            "False, static under jit"
        )
    if router_weight_on_input and top_k != 1:
        raise ValueError(
            f"router_weight_on_input is True with K = {top_k}, expected K = 1: with several "
            "experts a token has no single weight to be scaled by"
        )


def _check_output_dtype(x: Array, output_dtype: Any) -> np.dtype:
    if output_dtype is None:
        return x.dtype
    return check_dtype("output_dtype", output_dtype, ", or None for x's")
