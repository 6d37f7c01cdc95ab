"""Checks of a call's arguments while it is traced, one function for each group of arguments."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jax_nvfp4_moe._messages import INPUT_DTYPES, check_dtype, described
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.routing import Routing


def axis_size(axis_name: str | None) -> int:
    """Returns the number of devices that share the experts; ValueError if the axis is not bound."""
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


def check_float(name: str, array: Array) -> None:
    """Checks that an array is bfloat16, float16 or float32."""
    if array.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"{name} has dtype {array.dtype}, expected bfloat16, float16 or float32; "
            f"pass {name}.astype(jnp.float32)"
        )


def check_static_tokens(name: str, x: Array) -> None:
    """Refuses a symbolic number of tokens, as `jax.export` can have."""
    if not all(isinstance(size, int) for size in x.shape[:-1]):
        raise ValueError(
            f"{name} has shape {x.shape}, expected a T that is known while tracing, as it decides "
            "how to compute: jax.export the call for each T, or for a few and pad to those"
        )


def check_tokens(x: Array, experts: ExpertWeights) -> None:
    """Checks that x is [T, H]."""
    check_float("x", x)
    hidden = experts.hidden_size
    if x.ndim != 2:
        hint = ""
        if x.ndim > 2:
            hint = f": fold batch and sequence into T, x.reshape(-1, {x.shape[-1]}), or use vmap"
        elif x.shape == (hidden,):
            hint = ": for one token pass x[None]"
        raise ValueError(f"x has shape {x.shape}, expected [T, {hidden}]{hint}")
    check_static_tokens("x", x)
    if x.shape[1] != hidden:
        hint = ""
        if x.shape[1] == experts.intermediate_size:
            hint = f" and intermediate_size {x.shape[1]}; were the weights transposed?"
        raise ValueError(
            f"x has shape {x.shape}, expected [T, {hidden}]: the experts have hidden_size "
            f"{hidden}{hint}"
        )


def check_logits(x: Array, logits: Array, experts: ExpertWeights, axis_name: str | None) -> None:
    """Checks that x is [T, H] and logits are [T, E]."""
    num_experts = experts.num_experts * axis_size(axis_name)
    swapped = (num_experts,), (experts.hidden_size,)
    if swapped[0] != swapped[1] and (x.shape[1:], logits.shape[1:]) == swapped:
        raise ValueError(
            f"x has shape {x.shape} and logits has shape {logits.shape}, expected "
            f"[T, {experts.hidden_size}] and [T, {num_experts}]: are they swapped?"
        )
    check_tokens(x, experts)
    if logits.shape != (x.shape[0], num_experts):
        hint = ""
        if logits.ndim > 2:
            hint = f": fold batch and sequence into T, logits.reshape(-1, {logits.shape[-1]})"
        raise ValueError(
            f"logits has shape {logits.shape}, expected [T, E] = {(x.shape[0], num_experts)}, as "
            f"x has {x.shape[0]} tokens and there are {num_experts} experts{hint}"
        )


def check_routed(
    x: Array, topk_ids: Array, topk_weights: Array, experts: ExpertWeights, axis_name: str | None
) -> None:
    """Checks that ids and weights are [T, K]."""
    if not jnp.issubdtype(topk_ids.dtype, jnp.integer):
        hint = "pass topk_ids.astype(jnp.int32)"
        if jnp.issubdtype(topk_weights.dtype, jnp.integer):
            hint = f"topk_weights has dtype {topk_weights.dtype}, are the two swapped?"
        raise TypeError(
            f"topk_ids has dtype {topk_ids.dtype}, expected integers, as from route(); {hint}"
        )
    check_float("topk_weights", topk_weights)
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
    num_experts = experts.num_experts * axis_size(axis_name)
    if not 1 <= topk_ids.shape[1] <= num_experts:
        raise ValueError(
            f"topk_ids has shape {topk_ids.shape} with K = {topk_ids.shape[1]}, expected 1 to "
            f"{num_experts} experts a token"
        )


def check_routing(routing: Any) -> None:
    """Checks that `routing` is a `Routing`."""
    if not isinstance(routing, Routing):
        raise TypeError(
            f"routing is {described(routing)}, expected Routing, as in "
            "Routing('renormalize', top_k=8)"
        )


def check_activation(activation: Activation, experts: ExpertWeights) -> None:
    """Checks that activation and experts are both gated, or both not."""
    if activation.gated != experts.gated:
        have = "gate and up rows" if experts.gated else "up rows alone"
        suggestion = "'silu'" if experts.gated else "'relu2'"
        raise ValueError(
            f"activation {activation.name!r} is {'' if activation.gated else 'not '}gated, but "
            f"the experts have {have}: use for example {suggestion}"
        )


def check_weight_on_input(router_weight_on_input: Any, top_k: int) -> None:
    """Checks that `router_weight_on_input` is set only where each token has one weight."""
    check_flag("router_weight_on_input", router_weight_on_input)
    if router_weight_on_input and top_k != 1:
        raise ValueError(
            f"router_weight_on_input is True with K = {top_k}, expected K = 1: with several "
            "experts a token has no single weight to be scaled by"
        )


def check_flag(name: str, value: Any) -> None:
    """Checks that a flag is True or False, not a tracer."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {described(value)}, expected True or False, static under jit")


def check_output_dtype(x: Array, output_dtype: Any) -> np.dtype:
    """Returns the dtype of the result."""
    if output_dtype is None:
        return x.dtype
    return check_dtype("output_dtype", output_dtype, ", or None for x's")
