"""What the TRTLLM-Gen kernel is told about routing: ids and weights, or how to find them.

Sources, of flashinfer-python 0.6.13 in data/: include/flashinfer/trtllm/fused_moe/runner.h for the
numbers, RoutingKernel.h (lines 32-36) and RoutingCustomPolicy.cuh (681-742) beside it,
csrc/fused_moe/trtllm_backend/trtllm_fused_moe_routing_{deepseek,llama4}.cu.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.bridge.call import Argument, Output
from jax_nvfp4_moe.routing import Routing

MAX_TOP_K = 32
MAX_EXPERTS = 2048

# routing_input_mode.
_FROM_LOGITS, _PACKED = 0, 1
# Each method's RoutingMethodType, and the E and K up to which it has a router. For larger ones the
# launcher writes a warning, launches none, and lets the GEMMs read uninitialised memory.
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
# Those of deepseek_v3 with groups: K, groups, groups that a token may use, experts of a group.
_MAX_GROUPED = (22, 8, 4, 32)


def no_router(routing: Routing, num_experts: int) -> str | None:
    """Why the kernel cannot route by itself, or None if it can.

    Args:
        routing: how.
        num_experts: E.
    """
    if routing.method not in _ROUTERS:
        return f"it has no router for {routing.method!r}, only for {', '.join(_ROUTERS)}"
    if num_experts % 4:
        # Checked by the launchers of other formats (lines 1183-1184), whose routers are the same.
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
    """The arguments for tokens already routed.

    Args:
        topk_ids: among the experts held here; others contribute nothing.
        topk_weights: their weights.
        num_experts: how many are held here.
    """
    return {
        "routing_input_mode": _PACKED,
        "routing_logits": None,
        "topk_ids": packed_ids(topk_ids, topk_weights, num_experts),
        "topk_weights": Output(topk_ids.shape, jnp.bfloat16),  # written, and of no use
        "routing_bias": None,
        "num_experts": padded_experts(num_experts),
        "top_k": topk_ids.shape[1],
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": None,
        # One that leaves packed ids as they are.
        "routing_method_type": _ROUTERS["renormalize"][0],
        "norm_topk_prob": True,
    }


def from_logits(
    logits: Float[Array, "T E"], routing: Routing, selection_bias: Float[Array, " E"] | None
) -> dict[str, Argument]:
    """The arguments for tokens that the kernel is to route.

    Args:
        logits: the router's output, over experts that are all held here.
        routing: how.
        selection_bias: [E], or None.

    Raises:
        ValueError: there is no such router.
    """
    tokens, num_experts = logits.shape
    if (reason := no_router(routing, num_experts)) is not None:
        raise ValueError(f"the kernel cannot route: {reason}")
    corrected, grouped = routing.method in ("deepseek_v3", "minimax2"), routing.n_group > 1
    bias = selection_bias
    if corrected and bias is None:
        # Without groups the kernel reads a bias in any case.
        bias = jnp.zeros(num_experts)
    return {
        "routing_input_mode": _FROM_LOGITS,
        "routing_logits": logits.astype(jnp.float32),
        # Both are written, and of no use.
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
    """How many experts the kernel is told there are, of which it holds `num_experts`.

    At least one more, for ids that are no expert's; a multiple of 4, see `no_router`.
    """
    return 4 * (num_experts // 4 + 1)


def packed_ids(
    topk_ids: Int32[Array, "T K"], topk_weights: Float32[Array, "T K"], num_experts: int
) -> Int32[Array, "T K"]:
    """Ids and weights in one word: the id above, the weight's bfloat16 below.

    Args:
        topk_ids: among the experts held here. Others become the first that is not: the kernel
            leaves it out.
        topk_weights: rounded to bfloat16, in which the kernel keeps them.
        num_experts: how many are held here.
    """
    outside = (topk_ids < 0) | (topk_ids >= num_experts)
    ids = jnp.where(outside, num_experts, topk_ids)
    # As bits, so that a weight's sign does not reach the id.
    bits = lax.bitcast_convert_type(topk_weights.astype(jnp.bfloat16), jnp.uint16)
    return lax.shift_left(ids, jnp.int32(16)) | bits.astype(jnp.int32)
