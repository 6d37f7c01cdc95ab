"""FlashInfer's TRTLLM-Gen kernel, `trtllm_fp4_block_scale_moe`, on SM100 and SM103.

Tokens are routed and quantised here; the kernel is given packed ids, quantised activations and, in
three numbers for each expert, every scale that is left. What it takes is in
data/csrc/trtllm_fused_moe_kernel_launcher.cu of flashinfer-python 0.6.13. It checks little of that:
what would read or write out of bounds is refused, or made right, before the call.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.arrangement import prepare
from jax_nvfp4_moe.bridge import flashinfer
from jax_nvfp4_moe.bridge.call import Output
from jax_nvfp4_moe.bridge.call import call as bridge_call
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.format import quantize, reciprocal, scale_for
from jax_nvfp4_moe.implementations._recipes import Recipe
from jax_nvfp4_moe.implementations.base import Call
from jax_nvfp4_moe.implementations.emulation import local_ids
from jax_nvfp4_moe.layouts import w2_row_order, w13_row_order

name = "trtllm"
FUNCTION = "trtllm_fp4_block_scale_moe"

# include/flashinfer/trtllm/fused_moe/runner.h: routing_input_mode, RoutingMethodType (any that does
# nothing more to packed ids), ActivationType.
_PACKED, _RENORMALIZE = 1, 1
_ACT_TYPES = {"silu": 3, "gelu": 4, "swiglu_oai": 3, "relu2": 6}

# Each tensor of the workspace begins at a multiple of this, in the bridge.
_ALIGNMENT = 256


class OutputScales(NamedTuple):
    """What the kernel multiplies its sums with, float32 [E] each.

    Attributes:
        up: output1_scales_scalar: the up half, divided by what GEMM2's activations are scaled by.
        gate: output1_scales_gate_scalar: the gate half, before the activation; of experts without
            gates, all of it.
        down: output2_scales_scalar.
    """

    up: Float32[Array, " E"]
    gate: Float32[Array, " E"]
    down: Float32[Array, " E"]


def run_on(
    module: str,
    version: str,
    call: Call,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """The layer's output.

    Args:
        module: the name under which the bridge knows FlashInfer's module.
        version: of the flashinfer-python it comes from.
        call: what is computed.
        x: tokens.
        topk_ids: of all experts.
        topk_weights: their weights.
        experts: those of this device; in another layout than "trtllm" they are rearranged here.
    """
    tokens, top_k = topk_ids.shape
    if tokens == 0:  # the function divides by it
        return jnp.zeros(x.shape, call.output_dtype)
    experts = prepare(experts, name)
    hidden_size, intermediate_size = experts.w2.shape[-2], experts.w2.shape[-1]
    local_experts = experts.num_experts
    # More than there are, for ids that are no local expert's. The function wants a multiple of 4.
    num_experts = 4 * (local_experts // 4 + 1)
    recipe = Recipe(call, experts.activation_scheme, x.dtype)
    values = recipe.input_values(x, topk_weights)
    if call.router_weight_on_input:
        topk_weights = jnp.ones_like(topk_weights)
    values = jnp.pad(values, ((0, 0), (0, hidden_size - x.shape[1])))
    input_scale, hidden_scale = recipe.input_scale(experts), recipe.hidden_scale(experts)
    per_token = None
    if input_scale is None or hidden_scale is None:
        # Each token's own, beside which the scales of all are 1; GEMM2's are the kernel's business.
        per_token = scale_for(jnp.max(jnp.abs(values), axis=-1))
        input_scale = hidden_scale = jnp.float32(1)
    rows = quantize(values, input_scale if per_token is None else per_token)
    sums = _sum_scales(call.activation, experts, input_scale)
    scales = output_scales(experts, sums, hidden_scale)
    arguments = {
        "routing_input_mode": _PACKED,
        "routing_logits": None,
        "topk_ids": packed_ids(local_ids(call, topk_ids, experts), topk_weights, local_experts),
        "topk_weights": Output((tokens, top_k), jnp.bfloat16),  # written, and of no use
        "routing_bias": None,
        "hidden_states": rows.data,
        "hidden_states_scale": rows.scale,
        "gemm1_weights": experts.w13.data,
        "gemm1_weights_scale": experts.w13.scale,
        "gemm2_weights": experts.w2.data,
        "gemm2_weights_scale": experts.w2.scale,
        "output1_scales_scalar": scales.up,
        "output1_scales_gate_scalar": scales.gate,
        "output2_scales_scalar": scales.down,
        "per_token_scales": per_token,
        **_epilogue(call.activation, experts, sums, scales.down),
        "num_experts": num_experts,
        "top_k": top_k,
        "n_group": None,
        "topk_group": None,
        "intermediate_size": intermediate_size,
        "local_expert_offset": 0,
        "local_num_experts": local_experts,
        "routed_scaling_factor": None,
        "routing_method_type": _RENORMALIZE,
        "do_finalize": True,
        "enable_pdl": True,
        "act_type": _ACT_TYPES[call.activation.name],
        # Narrower than the padded rows: what was padded is not written.
        "output": Output((tokens, experts.hidden_size), jnp.bfloat16),
        "config_index": (-1, -1),
        "norm_topk_prob": True,
        "routing_replay_out": None,
    }
    _, y = bridge_call(
        module,
        FUNCTION,
        flashinfer.arguments(FUNCTION, version, arguments),
        workspace=workspace_bytes(
            tokens,
            top_k,
            num_experts,
            local_experts,
            hidden_size,
            intermediate_size,
            per_token=per_token is not None,
        ),
    )
    if call.axis_name is not None:
        y = lax.psum(y.astype(jnp.float32), call.axis_name)
    return y.astype(call.output_dtype)


def _sum_scales(
    activation: Activation, experts: ExpertWeights, input_scale: Float32[Array, ""]
) -> Float32[Array, "E G"]:
    """What GEMM1's sums are in units of, gate's and up's."""
    sums = experts.w13.global_scale * input_scale
    if activation.limit is None or math.isinf(activation.limit) or not experts.gated:
        return sums
    # One limit clamps both halves' sums, so that they must be in the same unit. Inside jit nobody
    # can be told: a result of NaN is seen, one of wrong numbers is not.
    return jnp.where(sums[:, :1] == sums[:, 1:], sums, jnp.nan)


def output_scales(
    experts: ExpertWeights, sums: Float32[Array, "E G"], hidden_scale: Float32[Array, ""]
) -> OutputScales:
    """The scales that the kernel's epilogues apply.

    The activation's output is stored divided by `hidden_scale`. It is linear in the up half, whose
    scale takes the division along; without gates the division stands alone (BatchedGemmInterface.h
    of flashinfer-cubin 0.6.13, lines 351-397).

    Args:
        experts: of whose w2 the global scales are folded in.
        sums: decode scales of GEMM1's sums: of gate and up, or of up alone.
        hidden_scale: decode scale of GEMM2's activations.
    """
    encode = reciprocal(hidden_scale)
    down = experts.w2.global_scale * hidden_scale
    up = sums[:, 1] * encode if experts.gated else jnp.broadcast_to(encode, down.shape)
    return OutputScales(up, sums[:, 0], down)


def _epilogue(
    activation: Activation,
    experts: ExpertWeights,
    sums: Float32[Array, "E G"],
    down: Float32[Array, " E"],
) -> dict[str, Array | None]:
    """Biases and the activation's parameters, which but for alpha act on sums without scales."""
    hidden_size, intermediate_size = experts.w2.shape[-2], experts.w2.shape[-1]
    bias1 = bias2 = None
    if experts.w13_bias is not None:
        extra = intermediate_size - experts.intermediate_size
        bias = experts.w13_bias.reshape(*sums.shape, experts.intermediate_size)
        bias = jnp.pad(bias / sums[..., None], ((0, 0), (0, 0), (0, extra)))
        order = w13_row_order("trtllm", intermediate_size, gated=experts.gated)
        bias1 = bias.reshape(len(bias), -1)[:, order]
    if experts.w2_bias is not None:
        extra = hidden_size - experts.hidden_size
        bias = jnp.pad(experts.w2_bias / down[:, None], ((0, 0), (0, extra)))
        bias2 = bias[:, w2_row_order("trtllm", hidden_size)]
    alpha, beta, limit = activation.alpha, activation.beta, activation.limit
    return {
        "gemm1_bias": bias1,
        "gemm1_alpha": None if alpha is None else jnp.full(down.shape, alpha, jnp.float32),
        "gemm1_beta": None if beta is None else beta / sums[:, -1],
        "gemm1_clamp_limit": None if limit is None or math.isinf(limit) else limit / sums[:, 0],
        "gemm2_bias": bias2,
    }


def packed_ids(
    topk_ids: Int32[Array, "T K"], topk_weights: Float32[Array, "T K"], num_experts: int
) -> Int32[Array, "T K"]:
    """Ids and weights in one word: the id above, the weight's bfloat16 below.

    (flashinfer-python 0.6.13: include/flashinfer/trtllm/fused_moe/RoutingKernel.h, lines 32-36.)

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


def workspace_bytes(
    tokens: int,
    top_k: int,
    num_experts: int,
    local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    *,
    per_token: bool,
) -> int:
    """What the function allocates in one call with the tactic that it chooses by itself.

    (Launcher of flashinfer-python 0.6.13, lines 120-202 and 1763-1934.)

    Args:
        tokens: T, 1 or more.
        top_k: K.
        num_experts: of all devices.
        local_experts: of this one.
        hidden_size: H, padded.
        intermediate_size: I, padded.
        per_token: whether each token has a scale of its own.
    """
    average = math.ceil(tokens * top_k / local_experts)
    tile = max(8, min(256, 1 << (average - 1).bit_length()) // 2)
    pairs = tokens * top_k
    hit = min(num_experts, pairs)
    ctas = hit + (pairs - hit) // tile
    rows = ctas * tile
    # At least as many as some kernels fill with one copy.
    rows1 = max(rows, math.ceil(2**20 / (4 * intermediate_size)))
    rows2 = max(rows, math.ceil(2**20 / (16 * hidden_size)))
    routing = (
        4 * num_experts,
        4,
        4 * pairs,
        4 * rows,
        4 * max(2 * num_experts, 512),
        4 * ctas,
        4 * ctas,
        4,
    )
    quantized = rows1 * intermediate_size // 2
    # In bfloat16 first, then quantised with each row's scale.
    hidden = (4 * quantized, quantized, 4 * rows1) if per_token else (quantized,)
    scales = 128 * math.ceil(rows1 / 128) * 4 * math.ceil(intermediate_size / 64)
    used = 0
    for size in (*routing, scales, *hidden, 2 * rows2 * hidden_size):
        used = _ALIGNMENT * math.ceil(used / _ALIGNMENT) + size
    return used
