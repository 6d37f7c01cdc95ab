"""The TRTLLM-Gen function's arguments for the experts: weights, and scales combined into three.

The formulas follow batched_gemm's BatchedGemmInterface.h, lines 351-397, in flashinfer-cubin
0.6.13.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32

from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.bridge.call import Argument
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.layouts import w2_row_order, w13_row_order
from jax_nvfp4_moe.rounding import reciprocal

# ActivationType, in include/flashinfer/trtllm/fused_moe/runner.h of flashinfer-python 0.6.13.
ACT_TYPES = {"silu": 3, "gelu": 4, "swiglu_oai": 3, "relu2": 6}


class OutputScales(NamedTuple):
    """The factors by which the kernel multiplies its sums, float32 [E] each.

    Attributes:
        up: output1_scales_scalar, for the up half, divided by the scale of GEMM2's activations. If
            not gated, only that division.
        gate: output1_scales_gate_scalar, for the gate half, before the activation. If not gated,
            for GEMM1's whole output.
        down: output2_scales_scalar, for GEMM2's output.
    """

    up: Float32[Array, " E"]
    gate: Float32[Array, " E"]
    down: Float32[Array, " E"]


def weight_arguments(
    activation: Activation,
    experts: ExpertWeights,
    w13_input_scale: Float32[Array, ""],
    w2_input_scale: Float32[Array, ""],
) -> dict[str, Argument]:
    """Returns the arguments that are the same for all tokens.

    Args:
        activation: the activation between the two GEMMs.
        experts: in the layout "trtllm".
        w13_input_scale: decode scale of GEMM1's activations, or 1 if each token has its own.
        w2_input_scale: decode scale of GEMM2's activations, or 1 likewise.
    """
    sums = experts.w13.global_scale * w13_input_scale
    scales = output_scales(experts, sums, w2_input_scale)
    return {
        "gemm1_weights": experts.w13.data,
        "gemm1_weights_scale": experts.w13.scale,
        "gemm2_weights": experts.w2.data,
        "gemm2_weights_scale": experts.w2.scale,
        "output1_scales_scalar": scales.up,
        "output1_scales_gate_scalar": scales.gate,
        "output2_scales_scalar": scales.down,
        **_epilogue(activation, experts, sums, scales.down),
        "intermediate_size": experts.w2.shape[-1],
        "local_expert_offset": 0,
        "local_num_experts": experts.num_experts,
        "do_finalize": True,
        "enable_pdl": True,
        "act_type": ACT_TYPES[activation.name],
        "config_index": (-1, -1),
        "routing_replay_out": None,
    }


def finite_limit(activation: Activation) -> float | None:
    """Returns the limit that clamps gate and up, or None if they are not clamped."""
    return None if activation.limit == math.inf else activation.limit


def output_scales(
    experts: ExpertWeights, sums: Float32[Array, "E S"], w2_input_scale: Float32[Array, ""]
) -> OutputScales:
    """Returns the scales that the kernel's epilogues apply.

    The kernel stores the activation's output divided by `w2_input_scale`. The output is linear in
    the up half, so that half's scale includes the division. Without gates, the division is a
    separate scale.

    Args:
        experts: the experts; their w2's global scales are part of `down`.
        sums: decode scales of GEMM1's sums: S = 1, or S = 2 if gate and up have separate ones.
        w2_input_scale: decode scale of GEMM2's activations.
    """
    encode = reciprocal(w2_input_scale)
    down = experts.w2.global_scale * w2_input_scale
    up = sums[:, -1] * encode if experts.gated else jnp.broadcast_to(encode, down.shape)
    return OutputScales(up, sums[:, 0], down)


def _epilogue(
    activation: Activation,
    experts: ExpertWeights,
    sums: Float32[Array, "E S"],
    down: Float32[Array, " E"],
) -> dict[str, Array | None]:
    """Returns biases and the activation's parameters.

    All except alpha apply to sums that are not scaled yet, so they are divided by the scales.
    """
    hidden_size, intermediate_size = experts.w2.shape[-2], experts.w2.shape[-1]
    bias1 = bias2 = None
    if experts.w13_bias is not None:
        extra = intermediate_size - experts.intermediate_size
        groups = 2 if experts.gated else 1
        bias = experts.w13_bias.reshape(len(sums), groups, experts.intermediate_size)
        bias = jnp.pad(bias / sums[..., None], ((0, 0), (0, 0), (0, extra)))
        order = w13_row_order("trtllm", intermediate_size, gated=experts.gated)
        bias1 = bias.reshape(len(bias), -1)[:, order]
    if experts.w2_bias is not None:
        extra = hidden_size - experts.hidden_size
        bias = jnp.pad(experts.w2_bias / down[:, None], ((0, 0), (0, extra)))
        bias2 = bias[:, w2_row_order("trtllm", hidden_size)]
    alpha, beta, limit = activation.alpha, activation.beta, finite_limit(activation)
    return {
        "gemm1_bias": bias1,
        "gemm1_alpha": None if alpha is None else jnp.full(down.shape, alpha, jnp.float32),
        "gemm1_beta": None if beta is None else beta / sums[:, -1],
        "gemm1_clamp_limit": None if limit is None else limit / sums[:, 0],
        "gemm2_bias": bias2,
    }
