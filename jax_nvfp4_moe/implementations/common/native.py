"""The steps around a call of the Blackwell kernels, which all of them share."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.implementations.base import Call
from jax_nvfp4_moe.implementations.common.recipes import Recipe
from jax_nvfp4_moe.implementations.common.sharded import local_ids


def run_kernels(
    kernels: Callable[[Array, Array, Array], Array],
    call: Call,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """Returns the layer's output, computed by kernels that support no meshes or weighted inputs.

    Args:
        kernels: a function that computes the output from values float32 [T, H], ids int32 [T, K]
            among this device's experts (other ids contribute nothing), and weights float32 [T, K].
        call: the static arguments.
        x: tokens.
        topk_ids: each token's experts, among all experts of the layer.
        topk_weights: their weights.
        experts: this device's experts.
    """
    values = Recipe(call, experts.activation_scheme, x.dtype).input_values(x, topk_weights)
    if call.router_weight_on_input:
        topk_weights = jnp.ones_like(topk_weights)
    y = kernels(values, local_ids(call, topk_ids, experts), topk_weights)
    if call.axis_name is not None:
        y = lax.psum(y.astype(jnp.float32), call.axis_name)
    return y.astype(call.output_dtype)
