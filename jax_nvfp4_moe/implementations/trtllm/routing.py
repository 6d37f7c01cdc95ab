"""The TRTLLM-Gen kernel's routing arguments: ids and weights, or logits and a routing method.

Sources, in data/ of flashinfer-python 0.6.13: include/flashinfer/trtllm/fused_moe/runner.h for the
method numbers; RoutingKernel.h (lines 32-36) and RoutingCustomPolicy.cuh (681-742) in the same
folder; csrc/fused_moe/trtllm_backend/trtllm_fused_moe_routing_{deepseek,llama4}.cu.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.bridge.call import Argument, Output
from jax_nvfp4_moe.routing import Routing

MAX_TOP_K = 32
MAX_EXPERTS = 2048

# Values of routing_input_mode.
_FROM_LOGITS, _PACKED = 0, 1
# Each method's RoutingMethodType, and the largest E and K that its router supports. For larger
# sizes the launcher prints a warning, launches no router, and the GEMMs read uninitialised memory.
_ROUTERS = {
    "default": (0, 256, 8),
    "renormalize": (1, MAX_EXPERTS, MAX_TOP_K),
    "deepseek_v3": (2, 1024, MAX_TOP_K),
    "llama4": (3, 128, 1),
    "renormalize_naive": (4, MAX_EXPERTS, MAX_TOP_K),
    "topk": (5, 256, 8),
    "sigmoid_renorm": (6, 256, 8),
    "minimax2": (7, 1024, MAX_TOP_K),
    "sigmoid": (8, 256, 8),
}
# The limits of deepseek_v3 with groups: K, groups, groups that a token may use, experts in a group.
_MAX_GROUPED = (22, 8, 4, 32)


def no_router(routing: Routing, num_experts: int) -> str | None:
    """Returns the reason why the kernel cannot route, or None if it can.

    Args:
        routing: the routing method and its parameters.
        num_experts: E.
    """
    if routing.method not in _ROUTERS:
        return f"it has no router for {routing.method!r}, only for {', '.join(_ROUTERS)}"
    if num_experts % 4:
        # The launchers of other formats, which have the same routers, check this (lines 1183-1184).
        return f"it routes over a multiple of 4 experts, not over {num_experts}"
    if routing.n_group > 1:
        sizes = routing.top_k, routing.n_group, routing.topk_group, num_experts // routing.n_group
        if all(size <= most for size, most in zip(sizes, _MAX_GROUPED, strict=True)):
            return None
        top_k, groups, used, each = _MAX_GROUPED
        return (
            f"with groups its router takes up to top_k {top_k}, {used} of {groups} groups, {each} "
            f"experts a group, not top_k {routing.top_k}, {routing.topk_group} of "
            f"{routing.n_group} groups, {sizes[-1]} experts a group"
        )
    _, experts, top_k = _ROUTERS[routing.method]
    if num_experts <= experts and routing.top_k <= top_k:
        return None
    return (
        f"its router for {routing.method!r} is compiled for up to {experts} experts, top_k "
        f"{top_k}, not for {num_experts} experts, top_k {routing.top_k}"
    )


def packed(
    topk_ids: Int32[Array, "T K"], topk_weights: Float32[Array, "T K"], num_experts: int
) -> dict[str, Argument]:
    """Returns the arguments for tokens that are already routed.

    Args:
        topk_ids: each token's experts, among this device's experts; other ids contribute nothing.
        topk_weights: their weights.
        num_experts: the number of this device's experts.
    """
    return {
        "routing_input_mode": _PACKED,
        "routing_logits": None,
        "topk_ids": packed_ids(topk_ids, topk_weights, num_experts),
        "topk_weights": Output(topk_ids.shape, jnp.bfloat16),  # written, but not used
        "routing_bias": None,
        "num_experts": padded_experts(num_experts),
        "top_k": topk_ids.shape[1],
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": None,
        # A method that leaves packed ids unchanged.
        "routing_method_type": _ROUTERS["renormalize"][0],
        "norm_topk_prob": True,
    }


def from_logits(
    logits: Float[Array, "T E"], routing: Routing, selection_bias: Float[Array, " E"] | None
) -> dict[str, Argument]:
    """Returns the arguments for tokens that the kernel routes.

    Args:
        logits: the router's output, over all experts; this device holds all of them.
        routing: the routing method and its parameters.
        selection_bias: [E], or None.

    Raises:
        ValueError: the kernel has no router for `routing`.
    """
    tokens, num_experts = logits.shape
    if (reason := no_router(routing, num_experts)) is not None:
        raise ValueError(f"the kernel cannot route: {reason}")
    corrected, grouped = routing.method in ("deepseek_v3", "minimax2"), routing.n_group > 1
    bias = selection_bias
    if corrected and bias is None:
        # Without groups the kernel always reads a bias.
        bias = jnp.zeros(num_experts)
    return {
        "routing_input_mode": _FROM_LOGITS,
        "routing_logits": logits.astype(jnp.float32),
        # Both are written, but not used.
        "topk_ids": Output((tokens, routing.top_k), jnp.int32),
        "topk_weights": Output((tokens, routing.top_k), jnp.bfloat16),
        "routing_bias": None if bias is None else bias.astype(jnp.float32),
        "num_experts": num_experts,
        "top_k": routing.top_k,
        "n_group": routing.n_group if grouped else None,
        "topk_group": routing.topk_group if grouped else None,
        "routed_scaling_factor": routing.scaling_factor if corrected else None,
        "routing_method_type": _ROUTERS[routing.method][0],
        "norm_topk_prob": routing.method == "sigmoid_renorm",
    }


def padded_experts(num_experts: int) -> int:
    """Returns the total number of experts to pass to the kernel, if a device holds `num_experts`.

    At least one more than `num_experts`, for ids of other devices' experts, and a multiple of 4
    (see `no_router`).
    """
    return 4 * (num_experts // 4 + 1)


def packed_ids(
    topk_ids: Int32[Array, "T K"], topk_weights: Float32[Array, "T K"], num_experts: int
) -> Int32[Array, "T K"]:
    """Returns words whose upper half is the id, and whose lower half is the weight in bfloat16.

    Args:
        topk_ids: each token's experts, among this device's experts. Other ids become `num_experts`,
            the first expert that the device does not hold, which the kernel skips.
        topk_weights: their weights, rounded here to bfloat16, the kernel's own dtype for them.
        num_experts: the number of this device's experts.
    """
    outside = (topk_ids < 0) | (topk_ids >= num_experts)
    ids = jnp.where(outside, num_experts, topk_ids)
    # As unsigned bits, so that a weight's sign does not spread into the id.
    bits = lax.bitcast_convert_type(topk_weights.astype(jnp.bfloat16), jnp.uint16)
    return lax.shift_left(ids, jnp.int32(16)) | bits.astype(jnp.int32)
