"""Measures candidates on this machine's device, with random weights and tokens."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights
from jax_nvfp4_moe.layouts import Layout
from jax_nvfp4_moe.quantization import quantize_experts
from jax_nvfp4_moe.relayout import to_layout

_BATCHES, _CALLS = 7, 20


def seconds_of(function: Callable[..., Array], *arguments: Any) -> float:
    """Returns the seconds that a call takes: the median over several batches of calls."""
    jax.block_until_ready(function(*arguments))  # compiles, and loads kernels
    taken = []
    for _ in range(_BATCHES):
        begun = time.perf_counter()
        results = [function(*arguments) for _ in range(_CALLS)]
        jax.block_until_ready(results)
        taken.append((time.perf_counter() - begun) / _CALLS)
    return statistics.median(taken)


def random_tokens(
    tokens: int, num_experts: int, top_k: int, hidden_size: int
) -> tuple[Float[Array, "T H"], Int32[Array, "T K"], Float32[Array, "T K"]]:
    """Returns random bfloat16 tokens, each routed to uniformly random experts of equal weight."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, hidden_size), np.float32)
    ids = rng.random((tokens, num_experts), np.float32).argpartition(top_k - 1)[:, :top_k]
    weights = jnp.full((tokens, top_k), 1 / top_k, jnp.float32)
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(ids, jnp.int32), weights


def random_experts(
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    *,
    gated: bool,
    activation_scheme: ActivationScheme,
    layout: Layout,
) -> ExpertWeights:
    """Returns experts of random codes and equal scales; no unpacked weights are ever made."""
    up = jax.ShapeDtypeStruct((num_experts, intermediate_size, hidden_size), jnp.bfloat16)
    down = jax.ShapeDtypeStruct((num_experts, hidden_size, intermediate_size), jnp.bfloat16)
    scales = (jnp.float32(1e-3), jnp.float32(1e-3)) if activation_scheme == "static" else ()

    def make(gate: Any, up: Any, down: Any) -> ExpertWeights:
        made = quantize_experts(gate, up, down, *scales, activation_scheme=activation_scheme)
        return to_layout(made, layout)

    def fill(leaf: Any) -> Array:
        if leaf.dtype == jnp.uint8:
            return jax.random.bits(jax.random.key(0), leaf.shape, jnp.uint8)
        value = 1e-3 if leaf.dtype == jnp.float32 else 1
        return jnp.full(leaf.shape, value, leaf.dtype)

    return jax.tree.map(fill, jax.eval_shape(make, up if gated else None, up, down))
