"""Calls FlashInfer's `trtllm_fp4_block_scale_moe`.

This module quantises tokens. The kernel takes quantised activations, packed ids or the router's
logits, and three numbers for each expert that combine all other scales. Its parameters are in
data/csrc/trtllm_fused_moe_kernel_launcher.cu of flashinfer-python 0.6.13. It checks few of them, so
this package refuses or corrects arguments with which it would read or write out of bounds.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.bridge import flashinfer
from jax_nvfp4_moe.bridge.call import Argument, Output
from jax_nvfp4_moe.bridge.call import call as bridge_call
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.format import quantize
from jax_nvfp4_moe.implementations.base import Call
from jax_nvfp4_moe.implementations.common.native import run_kernels
from jax_nvfp4_moe.implementations.common.recipes import Recipe
from jax_nvfp4_moe.implementations.trtllm.checks import check_arguments
from jax_nvfp4_moe.implementations.trtllm.routing import (
    from_logits,
    packed,
    padded_experts,
)
from jax_nvfp4_moe.implementations.trtllm.sizes import max_tokens, workspace_bytes
from jax_nvfp4_moe.implementations.trtllm.weights import weight_arguments
from jax_nvfp4_moe.relayout import to_layout
from jax_nvfp4_moe.routing import Routing

FUNCTION = "trtllm_fp4_block_scale_moe"


@dataclasses.dataclass(frozen=True)
class Function:
    """The compiled function that a plan calls.

    Attributes:
        module: the name under which FlashInfer's module is registered with the bridge.
        version: the version of flashinfer-python that it comes from.
    """

    module: str
    version: str


def run_routed(
    function: Function,
    call: Call,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """Returns the layer's output.

    Args:
        function: the function to call; its module is registered with the bridge.
        call: the static arguments.
        x: tokens.
        topk_ids: each token's experts, among all experts of the layer.
        topk_weights: their weights.
        experts: this device's experts, which are rearranged unless their layout is "trtllm".
    """
    limit = max_tokens(topk_ids.shape[1], padded_experts(experts.num_experts))
    launch = _launcher(function, call, experts)

    def routed(values: Array, ids: Array, weights: Array) -> Array:
        return launch(values, packed(ids, weights, experts.num_experts))

    kernels = partial(_in_parts, routed, limit)
    return run_kernels(kernels, call, x, topk_ids, topk_weights, experts)


def run_unrouted(
    function: Function,
    call: Call,
    routing: Routing,
    x: Float[Array, "T H"],
    logits: Float[Array, "T E"],
    selection_bias: Float[Array, " E"] | None,
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """Returns the layer's output, routed by the kernel.

    Args:
        function: the function to call; its module is registered with the bridge.
        call: the static arguments.
        routing: the routing method and its parameters.
        x: tokens.
        logits: the router's output.
        selection_bias: [E], or None.
        experts: all experts of the layer, which are rearranged unless their layout is "trtllm".

    Raises:
        ValueError: the kernel has no router for `routing`.
    """
    launch = _launcher(function, call, experts)
    y = _in_parts(
        lambda values, logits: launch(values, from_logits(logits, routing, selection_bias)),
        max_tokens(routing.top_k, experts.num_experts),
        x.astype(jnp.float32),
        logits,
    )
    return y.astype(call.output_dtype)


def _in_parts(launch: Callable[..., Array], limit: int, *tokens: Array) -> Array:
    """Returns the result of `launch(*tokens)`, launched for 1 to `limit` tokens at a time."""
    count = len(tokens[0])
    if count == 0:  # the function divides by the number of tokens
        return jnp.zeros_like(tokens[0])
    parts = [launch(*(a[at : at + limit] for a in tokens)) for at in range(0, count, limit)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _launcher(
    function: Function, call: Call, experts: ExpertWeights
) -> Callable[[Float32[Array, "T H"], Mapping[str, Argument]], Array]:
    """Returns a function that computes the output from tokens and their routing arguments.

    Everything that depends only on the experts is computed once, before the function is returned.
    """
    experts = to_layout(experts, "trtllm")
    own_scales = experts.activation_scheme == "per_token"
    if own_scales:
        # Each token has its own scale, so the layer's is 1; the kernel computes GEMM2's scales.
        w13_input_scale = w2_input_scale = jnp.float32(1)
    else:
        recipe = Recipe(call, experts.activation_scheme, jnp.float32)
        w13_input_scale, w2_input_scale = (
            recipe.w13_input_scale(experts),
            recipe.w2_input_scale(experts),
        )
        assert w13_input_scale is not None and w2_input_scale is not None  # check_experts
    weights = weight_arguments(call.activation, experts, w13_input_scale, w2_input_scale)
    padding = experts.w2.shape[-2] - experts.hidden_size

    def launch(values: Float32[Array, "T H"], routing: Mapping[str, Argument]) -> Array:
        values = jnp.pad(values, ((0, 0), (0, padding)))
        rows = quantize(values, per="row") if own_scales else quantize(values, w13_input_scale)
        arguments = {
            **weights,
            **routing,
            "hidden_states": rows.data,
            "hidden_states_scale": rows.scale,
            "per_token_scales": rows.global_scale if own_scales else None,
            # Narrower than the padded rows: the kernel does not write the padding.
            "output": Output((len(values), experts.hidden_size), jnp.bfloat16),
        }
        sizes = check_arguments(arguments)
        ordered = flashinfer.arguments(FUNCTION, function.version, arguments)
        workspace = workspace_bytes(function.version, sizes)
        *_, y = bridge_call(function.module, FUNCTION, ordered, workspace=workspace)
        return y

    return launch
