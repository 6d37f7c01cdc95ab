"""Helpers for calls inside `jax.shard_map`, where each device holds a part of the experts."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.implementations.base import Call


def local_ids(
    call: Call, topk_ids: Int32[Array, "T K"], experts: ExpertWeights
) -> Int32[Array, "T K"]:
    """Returns ids among this device's experts; ids of other devices' experts are out of range."""
    if call.axis_name is None:
        return topk_ids
    return topk_ids - lax.axis_index(call.axis_name) * experts.num_experts


def varying_zeros(shape: tuple[int, ...], dtype: jnp.dtype, *sources: object) -> Array:
    """Returns zeros, a loop's initial carry, that vary over the same mesh axes as `sources`.

    Inside shard_map the type of a loop's carry must not change. The cast to such a type has
    different names in JAX 0.10 and 0.12, so an operation on every source gives the type instead.
    """
    never = jnp.zeros((), jnp.bool_)
    for leaf in jax.tree.leaves(sources):
        if leaf.dtype != jnp.float8_e4m3fn:
            never = never | ((leaf.reshape(-1)[0] != 0) & False)
    return jnp.broadcast_to(never, shape).astype(dtype)
