"""The layer: NVFP4 mixture-of-experts as one pure function.

`nvfp4_moe` routes tokens and computes their experts, `nvfp4_moe_routed` takes routed tokens. Both
check their arguments once, while tracing, and call `computing.compute`, which chooses an
implementation and checks nothing.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from jax_nvfp4_moe import selection
from jax_nvfp4_moe._call_checks import (
    check_activation,
    check_logits,
    check_output_dtype,
    check_routed,
    check_routing,
    check_tokens,
    check_weight_on_input,
)
from jax_nvfp4_moe._messages import as_array
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.computing import compute
from jax_nvfp4_moe.experts import ExpertWeights, check_experts
from jax_nvfp4_moe.implementations.base import Call, Implementation, Routed, Unrouted
from jax_nvfp4_moe.routing import Routing, check_routable, select_experts


def nvfp4_moe(
    x: Float[Array, "T H"],
    logits: Float[Array, "T E"],
    experts: ExpertWeights,
    routing: Routing,
    *,
    selection_bias: Float[Array, " E"] | None = None,
    activation: str | Activation = "silu",
    implementation: str | Implementation | None = None,
    output_dtype: Any = None,
    axis_name: str | None = None,
    router_weight_on_input: bool = False,
) -> Float[Array, "T H"]:
    """Returns the output of a mixture-of-experts layer with NVFP4 experts, routing included.

    Equivalent to `route` followed by `nvfp4_moe_routed`; see the latter for transformations and
    gradients. `Trtllm(route_in_kernel=True)` routes inside the kernel, with one launch less.

    Args:
        x: tokens [T, H]: bfloat16, float16 or float32. T may be 0.
        logits: the router's output [T, E], over all experts of the layer; the same dtypes.
        experts: the layer's experts, in any layout.
        routing: the routing method and its parameters.
        selection_bias: [E], added to the scores of "deepseek_v3" and "minimax2" for the selection
            only, or None.
        activation: as in `nvfp4_moe_routed`, as are all arguments below.
        implementation: None, a name, or an `Implementation` with options.
        output_dtype: the dtype of the result.
        axis_name: the mesh axis over which the experts are split.
        router_weight_on_input: whether to scale tokens instead of the experts' outputs.

    Returns:
        [T, H] of `output_dtype`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape or a value does not fit.
        NotImplementedError: the implementation that was named cannot serve the call.
    """
    x, logits = as_array("x", x), as_array("logits", logits)
    check_routing(routing)
    check_experts(experts)
    check_logits(x, logits, experts, axis_name)
    check_routable(logits, routing, selection_bias)
    call = _call(
        x, experts, routing.top_k, activation, output_dtype, axis_name, router_weight_on_input
    )
    chosen = selection.resolve(implementation)
    if chosen is None or not chosen.routes:
        routed = Routed(*select_experts(logits, routing, selection_bias))
        return compute(x, routed, experts, call, implementation)
    if selection_bias is not None:
        selection_bias = jnp.asarray(selection_bias, jnp.float32)
    unrouted = Unrouted(logits, selection_bias)
    return compute(x, unrouted, experts, call, implementation, routing=routing)


def nvfp4_moe_routed(
    x: Float[Array, "T H"],
    topk_ids: Int[Array, "T K"],
    topk_weights: Float[Array, "T K"],
    experts: ExpertWeights,
    *,
    activation: str | Activation = "silu",
    implementation: str | Implementation | None = None,
    output_dtype: Any = None,
    axis_name: str | None = None,
    router_weight_on_input: bool = False,
) -> Float[Array, "T H"]:
    """Returns the output of a layer's NVFP4 experts, for tokens that are already routed.

    The function is pure: use it under `jax.jit`, `jax.vmap` (which folds its axis into T),
    `jax.lax.scan` over layers, and `jax.export`. `jax.grad` gives straight-through gradients with
    respect to `x` and `topk_weights`; the experts are frozen, and their gradients are zero.

    Args:
        x: tokens [T, H]: bfloat16, float16 or float32. T may be 0.
        topk_ids: each token's experts [T, K], integers, all different ("trtllm" loses one of two
            slots with the same expert). Ids outside 0..E-1 contribute nothing.
        topk_weights: their weights [T, K]; bfloat16, float16 or float32, converted to float32.
        experts: the layer's experts, in any layout.
        activation: "silu", "gelu", "gelu_tanh" or "swiglu_oai" for gated experts, "relu2" for
            others; or an `Activation` with parameters.
        implementation: None means the first one that can serve the call. A name ("trtllm",
            "cute_dsl", "triton", "cpu", "emulation") or an `Implementation` with options, such as
            `Cpu(level="avx2")`, means that one, or an error.
        output_dtype: bfloat16, float16 or float32; None means the dtype of x.
        axis_name: the mesh axis over which the experts are split, inside `jax.shard_map`. Device i
            holds experts ``i*E/n .. (i+1)*E/n - 1``, but ids remain those of the whole layer. Every
            device passes the same tokens and gets the whole result, which does not depend on n.
        router_weight_on_input: whether to scale each token by its weight before the experts,
            instead of their output afterwards (Llama 4); K must be 1.

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
    top_k = topk_ids.shape[1]
    call = _call(x, experts, top_k, activation, output_dtype, axis_name, router_weight_on_input)
    routed = Routed(_as_int32(topk_ids), topk_weights.astype(jnp.float32))
    return compute(x, routed, experts, call, implementation)


def _call(
    x: Array,
    experts: ExpertWeights,
    top_k: int,
    activation: str | Activation,
    output_dtype: Any,
    axis_name: str | None,
    router_weight_on_input: bool,
) -> Call:
    """Checks the static arguments, and returns them as a `Call`."""
    activation = Activation.of(activation)
    check_activation(activation, experts)
    check_weight_on_input(router_weight_on_input, top_k)
    dtype = check_output_dtype(x, output_dtype)
    return Call(activation, dtype, axis_name, bool(router_weight_on_input))


def _as_int32(topk_ids: Int[Array, "T K"]) -> Int32[Array, "T K"]:
    limits = jnp.iinfo(jnp.int32)
    if jnp.iinfo(topk_ids.dtype).max > limits.max:
        # Without the clip, an id out of range could wrap around into the valid range.
        topk_ids = jnp.clip(topk_ids, max(limits.min, jnp.iinfo(topk_ids.dtype).min), limits.max)
    return topk_ids.astype(jnp.int32)
