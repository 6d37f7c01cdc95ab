"""What FlashInfer's CuTe-DSL kernels would be given: by functions of their names that do nothing.

Their documented arithmetic in numpy (flashinfer-python 0.6.13: fused_moe/cute_dsl/blackwell/
blockscaled_contiguous_gather_grouped_gemm_swiglu_fusion.py, lines 2595-2791, and
blockscaled_contiguous_grouped_gemm_finalize_fusion.py, lines 1906-2066), on the very buffers, gives
what the emulation does.
"""

import ctypes
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nvfp4_moe.implementations._cute_dsl_call import Tactic, run_on
from tests.bridge.host import CPU, present_host_as
from tests.recording_cuda import kernel_model
from tests.recording_cuda.cases import Case, error_of, expected_of, random_arguments

CASES = [
    Case(9, 3, 5, 272, 80, layout="cute_dsl"),
    Case(140, 1, 1, 256, 64, layout="cute_dsl"),  # more than one tile an expert
    Case(9, 3, 5, 272, 80, layout="linear"),
    Case(9, 3, 5, 272, 80, layout="trtllm"),
]
DTYPES = {
    "hidden_states_scale": jnp.float8_e4m3fn,
    "gemm1_weights_scale": jnp.float8_e4m3fn,
    "gemm2_weights_scale": jnp.float8_e4m3fn,
    "output": jnp.bfloat16,
    **dict.fromkeys(("gemm1_alpha", "gemm2_alpha", "norm_const", "token_final_scales"), np.float32),
    **dict.fromkeys(
        (
            "tile_idx_to_expert_idx",
            "tile_idx_to_mn_limit",
            "num_non_exiting_tiles",
            "token_ids",
            "permuted_idx_to_expanded_idx",
        ),
        np.int32,
    ),
}


@pytest.fixture
def given(fake):
    """A function from a case and its arguments to what the functions would be given."""

    def given_of(case, arguments, **changes):
        found = {}

        def copy(name, data, size):
            found[name.decode()] = np.frombuffer(ctypes.string_at(data, size), np.uint8)
            return data

        present_host_as(CPU, 0, copy)
        call = dataclasses.replace(case.call(), **changes)
        program = jax.jit(partial(run_on, "fake", Tactic(), call))
        jax.block_until_ready(program(*arguments))
        return {name: raw.view(DTYPES.get(name, np.uint8)) for name, raw in found.items()}

    return given_of


def layer_of(case, buffers):
    """The output [T, H], from the contents of the functions' arguments, by their names."""
    tokens, experts, tile = case.tokens, case.experts, 128
    hidden, inter = 256 * -(-case.hidden // 256), 64 * -(-case.intermediate // 64)
    x = kernel_model.values(
        buffers["hidden_states"].reshape(tokens, hidden // 2),
        buffers["hidden_states_scale"].reshape(tokens, hidden // 16),
    )
    w1 = kernel_model.stored_weights(buffers, "gemm1", experts, 2 * inter, hidden)
    w2 = kernel_model.stored_weights(buffers, "gemm2", experts, hidden, inter)
    is_up = np.arange(2 * inter) // 64 % 2 == 0
    # Added to what is there.
    y = buffers["output"].astype(np.float64).reshape(tokens, hidden)
    weights = buffers["token_final_scales"].astype(np.float64)
    for index in range(buffers["num_non_exiting_tiles"][0]):
        expert = buffers["tile_idx_to_expert_idx"][index]
        for row in range(index * tile, buffers["tile_idx_to_mn_limit"][index]):
            sums = w1[expert] @ x[buffers["token_ids"][row]] * buffers["gemm1_alpha"][expert]
            gate = sums[~is_up]
            between = sums[is_up] * gate / (1 + np.exp(-gate)) * buffers["norm_const"][0]
            pair = buffers["permuted_idx_to_expanded_idx"][row]
            result = w2[expert] @ kernel_model.requantised(between, False)
            # The emulation's rounding, before the weight; the kernel's is after it.
            result = (result * buffers["gemm2_alpha"][expert]).astype(jnp.bfloat16)
            y[pair // case.top_k] += weights[pair] * result.astype(np.float64)
    return y[:, : case.hidden]


def arguments_of(case):
    """Gate and up in one unit, as the kernel has it."""
    x, ids, weights, experts = random_arguments(case)
    scale = experts.w13.global_scale
    scale = jnp.broadcast_to(scale[:, :1], scale.shape)
    w13 = dataclasses.replace(experts.w13, global_scale=scale)
    return (
        x,
        ids,
        weights.astype(jnp.bfloat16).astype(jnp.float32),
        dataclasses.replace(experts, w13=w13),
    )


def exchanged(case, data):
    """Groups of 64 rows, each two in the other order."""
    rows = 2 * 64 * -(-case.intermediate // 64)
    groups = data.reshape(case.experts, rows // 128, 2, -1)
    return groups[:, :, ::-1].reshape(-1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_documented_arithmetic_gives_the_emulations_result(case, given, record_property):
    """On these very buffers; and not on others (the controls)."""
    arguments = arguments_of(case)
    buffers, expected = given(case, arguments), expected_of(case, arguments)
    error = error_of(layer_of(case, buffers), expected)
    record_property("rel_l2", error)
    assert error <= 1e-3
    data = buffers["gemm1_weights"]
    scales = buffers["gemm2_weights_scale"].reshape(-1, 4, 128)
    controls = {
        "nibbles": {"gemm1_weights": data << 4 | data >> 4},
        "linear scales": {"gemm2_weights_scale": scales.swapaxes(1, 2).copy()},
        "a wrong scale": {"gemm2_alpha": buffers["gemm2_alpha"] * np.float32(1.1)},
        "no norm": {"norm_const": buffers["norm_const"] * np.float32(1.1)},
        "gate and up exchanged": {"gemm1_weights": exchanged(case, data)},
        "not zeroed": {"output": np.ones_like(buffers["output"])},
    }
    for name, wrong in controls.items():
        assert error_of(layer_of(case, buffers | wrong), expected) > 1e-2, name


def test_both_are_called_in_order(fake):
    case = CASES[0]
    jax.block_until_ready(
        jax.jit(partial(run_on, "fake", Tactic(), case.call()))(*arguments_of(case))
    )
    lines = [line for line in fake.journal() if not line.startswith("cuda")]
    assert lines == ["gemm1_t128_n128 of 12", "gemm2_t128_n128_c1 of 11"]


def test_gate_and_up_in_two_units(given):
    """The kernel has one scale for both: the result is NaN rather than wrong."""
    case = CASES[0]
    x, ids, weights, experts = arguments_of(case)
    scale = experts.w13.global_scale.at[2, 1].mul(2)
    experts = dataclasses.replace(experts, w13=dataclasses.replace(experts.w13, global_scale=scale))
    alpha = given(case, (x, ids, weights, experts))["gemm1_alpha"]
    assert np.isnan(alpha).tolist() == [False, False, True, False, False]


def test_which_tactics_fit():
    assert Tactic().fits(256, 64)
    assert not Tactic(gemm1_columns=256).fits(256, 64)
    assert Tactic(gemm1_columns=256).fits(256, 128)
    assert not Tactic(gemm2_columns=256, gemm2_cluster=2).fits(256, 64)
    assert Tactic(256, 256, 256, 2).gemm2 == "gemm2_t256_n256_c2"
