"""Parameters of FlashInfer's functions, which differ between its versions.

Sources: data/csrc/trtllm_fused_moe_kernel_launcher.cu of flashinfer-python 0.6.13, lines 2384-2398,
and of 0.7.2.post1, lines 6001-6018. All arguments are positional.
"""

from collections.abc import Mapping

from jax_nvfp4_moe.bridge.call import Argument

# Defaults of the parameters that only some versions have.
_PLAIN: dict[str, Argument] = {
    "gemm1_lora_delta": None,
    "num_fused_shared_experts": None,
    "da_routing_metadata": (),
    "da_body_workspace": (),
    "is_da_body_preparation": False,
    "valid_hidden_size": None,
    "valid_intermediate_size": None,
}
_TRTLLM_FP4_MOE_0_6_13 = (
    "routing_input_mode", "routing_logits", "topk_ids", "topk_weights", "routing_bias",
    "hidden_states", "hidden_states_scale", "gemm1_weights", "gemm1_weights_scale", "gemm1_bias",
    "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm2_weights", "gemm2_weights_scale",
    "gemm2_bias", "output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar",
    "per_token_scales", "num_experts", "top_k", "n_group", "topk_group", "intermediate_size",
    "local_expert_offset", "local_num_experts", "routed_scaling_factor", "routing_method_type",
    "do_finalize", "enable_pdl", "act_type", "output", "config_index", "norm_topk_prob",
    "routing_replay_out",
)  # fmt: skip
_TRTLLM_FP4_MOE_0_7_2 = (
    *_TRTLLM_FP4_MOE_0_6_13[:10], "gemm1_lora_delta", *_TRTLLM_FP4_MOE_0_6_13[10:22],
    "num_fused_shared_experts", *_TRTLLM_FP4_MOE_0_6_13[22:], "da_routing_metadata",
    "da_body_workspace", "is_da_body_preparation", "valid_hidden_size", "valid_intermediate_size",
)  # fmt: skip

# By function and version.
PARAMETERS: dict[str, dict[str, tuple[str, ...]]] = {
    "trtllm_fp4_block_scale_moe": {
        "0.6.13": _TRTLLM_FP4_MOE_0_6_13,
        "0.7.2.post1": _TRTLLM_FP4_MOE_0_7_2,
    },
}


def arguments(function: str, version: str, values: Mapping[str, Argument]) -> dict[str, Argument]:
    """Returns the arguments of a function in the order of a version's parameters.

    Args:
        function: a key of `PARAMETERS`.
        version: the full version of flashinfer-python. Arguments of a similar version would corrupt
            memory.
        values: a value for each parameter. Parameters that only some versions have are optional.

    Returns:
        The arguments by parameter name, in order.

    Raises:
        ValueError: the version is unknown.
        TypeError: a value is missing, or the version has no such parameter.
    """
    known = PARAMETERS[function]
    if version not in known:
        raise ValueError(
            f"version is {version!r}, expected one of {', '.join(known)}: the arguments of "
            f"{function} differ between versions of FlashInfer"
        )
    names = known[version]
    if surplus := sorted(set(values) - set(names)):
        raise TypeError(f"{function} of FlashInfer {version} has no {', '.join(surplus)}")
    given = {**_PLAIN, **values}
    if absent := [name for name in names if name not in given]:
        raise TypeError(f"{function} was given no {', '.join(absent)}")
    return {name: given[name] for name in names}
