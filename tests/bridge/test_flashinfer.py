"""FlashInfer's argument lists: their lengths, places that are known, and what is refused."""

import re

import pytest

from jax_nvfp4_moe.bridge.flashinfer import PARAMETERS, arguments

FUNCTION = "trtllm_fp4_block_scale_moe"
OLD, NEW = (PARAMETERS[FUNCTION][version] for version in ("0.6.13", "0.7.2.post1"))

# Counted from 1 in the sources: flashinfer-python 0.6.13 and 0.7.2.post1,
# data/csrc/trtllm_fused_moe_kernel_launcher.cu, lines 2384-2398 and 6001-6018.
PLACES = {
    "routing_input_mode": (1, 1), "routing_logits": (2, 2), "topk_ids": (3, 3),
    "topk_weights": (4, 4), "routing_bias": (5, 5), "hidden_states": (6, 6),
    "hidden_states_scale": (7, 7), "gemm1_weights": (8, 8), "gemm1_weights_scale": (9, 9),
    "gemm1_bias": (10, 10), "gemm1_lora_delta": (None, 11), "gemm1_alpha": (11, 12),
    "gemm1_beta": (12, 13), "gemm1_clamp_limit": (13, 14), "gemm2_weights": (14, 15),
    "gemm2_weights_scale": (15, 16), "gemm2_bias": (16, 17), "output1_scales_scalar": (17, 18),
    "output1_scales_gate_scalar": (18, 19), "output2_scales_scalar": (19, 20),
    "per_token_scales": (20, 21), "num_experts": (21, 22), "top_k": (22, 23),
    "num_fused_shared_experts": (None, 24), "n_group": (23, 25), "topk_group": (24, 26),
    "intermediate_size": (25, 27), "local_expert_offset": (26, 28), "local_num_experts": (27, 29),
    "routed_scaling_factor": (28, 30), "routing_method_type": (29, 31), "do_finalize": (30, 32),
    "enable_pdl": (31, 33), "act_type": (32, 34), "output": (33, 35), "config_index": (34, 36),
    "norm_topk_prob": (35, 37), "routing_replay_out": (36, 38), "da_routing_metadata": (None, 39),
    "da_body_workspace": (None, 40), "is_da_body_preparation": (None, 41),
    "valid_hidden_size": (None, 42), "valid_intermediate_size": (None, 43),
}  # fmt: skip


def test_places():
    for which, names in enumerate((OLD, NEW)):
        found = {name: names.index(name) + 1 if name in names else None for name in PLACES}
        assert found == {name: places[which] for name, places in PLACES.items()}
        assert set(names) <= set(PLACES)
        assert len(set(names)) == len(names)
    assert (len(OLD), len(NEW)) == (36, 43)


def test_what_a_version_adds_is_plain():
    values = {name: number for number, name in enumerate(OLD)}
    assert arguments(FUNCTION, "0.6.13", values) == values
    found = arguments(FUNCTION, "0.7.2.post1", values)
    assert tuple(found) == NEW
    added = {name: value for name, value in found.items() if name not in values}
    assert added == {
        "gemm1_lora_delta": None, "num_fused_shared_experts": None, "da_routing_metadata": (),
        "da_body_workspace": (), "is_da_body_preparation": False, "valid_hidden_size": None,
        "valid_intermediate_size": None,
    }  # fmt: skip
    given = arguments(FUNCTION, "0.7.2.post1", values | {"valid_hidden_size": 2880})
    assert given["valid_hidden_size"] == 2880


def test_what_is_refused():
    values = dict.fromkeys(OLD)
    message = "version is '0.7.3', expected one of 0.6.13, 0.7.2.post1: the arguments of trtllm"
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments(FUNCTION, "0.7.3", values)
    with pytest.raises(TypeError, match=r"of FlashInfer 0\.6\.13 has no valid_hidden_size"):
        arguments(FUNCTION, "0.6.13", values | {"valid_hidden_size": 1})
    with pytest.raises(TypeError, match="was given no top_k, output"):
        few = {name: 1 for name in OLD if name not in ("top_k", "output")}
        arguments(FUNCTION, "0.6.13", few)
