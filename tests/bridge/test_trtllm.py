"""What FlashInfer's TRTLLM-Gen function would be given: by a function of the same name that does
nothing, so that it needs no FlashInfer. tests/recording_cuda has the real one.
"""

import ctypes
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nvfp4_moe.implementations import trtllm
from tests.bridge.host import CPU, present_host_as
from tests.recording_cuda.cases import (
    Case,
    error_of,
    expected_of,
    layer_of,
    random_arguments,
    small,
    typed,
)


@pytest.fixture
def given(fake):
    """A function from a case and its arguments to what the function would be given."""

    def run(case, arguments, **changes):
        found = {}

        def copy(name, data, size):
            found[name.decode()] = np.frombuffer(ctypes.string_at(data, size), np.uint8)
            return data

        present_host_as(CPU, 0, copy)
        call = dataclasses.replace(case.call(), **changes)
        program = jax.jit(partial(trtllm.run_on, "fake", "0.6.13", call))
        jax.block_until_ready(program(*arguments))
        return typed(found)

    return run


@pytest.mark.parametrize("case", list(small()), ids=str)
def test_the_documented_arithmetic_gives_the_emulations_result(case, given, record_property):
    """On these very buffers; and not on others (the controls)."""
    arguments = random_arguments(case)
    buffers, expected = given(case, arguments), expected_of(case, arguments)
    error = error_of(layer_of(case, buffers), expected)
    record_property("rel_l2", error)
    assert error <= 1e-3
    for one, other in (
        ("output1_scales_scalar", "output1_scales_gate_scalar"),
        ("output1_scales_gate_scalar", "output2_scales_scalar"),
    ):
        if np.array_equal(buffers[one], buffers[other]):
            continue  # gate's and up's, if they have one scale and each token its own
        exchanged = buffers | {one: buffers[other], other: buffers[one]}
        assert error_of(layer_of(case, exchanged), expected) > 1e-2
    weights = buffers["gemm1_weights"]
    nibbles = buffers | {"gemm1_weights": weights << 4 | weights >> 4}
    assert error_of(layer_of(case, nibbles), expected) > 1e-2
    scales = buffers["gemm2_weights_scale"].reshape(-1, 4, 128)
    linear = buffers | {"gemm2_weights_scale": scales.swapaxes(1, 2).copy()}
    assert error_of(layer_of(case, linear), expected) > 1e-2


def test_a_weight_on_the_input(given):
    """The token is scaled, and the kernel's weight is 1."""
    case = Case(9, 1, 5, 272, 80)
    x, ids, weights, experts = random_arguments(case)
    buffers = given(case, (x, ids, weights, experts), router_weight_on_input=True)
    scaled = x * weights.astype(jnp.bfloat16)
    expected = expected_of(case, (scaled, ids, jnp.ones_like(weights), experts))
    assert error_of(layer_of(case, buffers), expected) <= 1e-3


def test_words():
    """The id above, the weight's bfloat16 below; a negative weight leaves the id alone."""
    ids = jnp.array([[0, 3, 7, 8, -1, 2**31 - 1]], jnp.int32)
    weights = jnp.array([[1.0, -1.0, 0.5, 2.0, -0.0, float("inf")]], jnp.float32)
    words = np.asarray(trtllm.packed_ids(ids, weights, 8))
    assert (words >> 16).tolist() == [[0, 3, 7, 8, 8, 8]]  # the first that is not there
    bits = (words & 0xFFFF).astype(np.uint16).view(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(bits, np.asarray(weights))
    assert (words >= 0).all()


# Totals of the launcher's own allocations, in MB, for 1, 1024 and 8192 tokens, as recorded.
TOTALS = {(128, 8, 2048, 768): (0.41, 55, 371), (256, 8, 7168, 2048): (1.07, 186, 1520)}


@pytest.mark.parametrize("sizes", TOTALS, ids=["Qwen3-30B-A3B", "DeepSeek-V3"])
def test_workspace(sizes):
    num_experts, top_k, hidden, intermediate = sizes
    for tokens, expected in zip((1, 1024, 8192), TOTALS[sizes], strict=True):
        found = trtllm.workspace_bytes(
            tokens, top_k, num_experts, num_experts, hidden, intermediate, per_token=False
        )
        assert found / 1e6 == pytest.approx(expected, rel=0.02)  # of which 1 % is alignment


def test_no_tokens(given, fake):
    """The function divides by their number: it is not called."""
    case = Case(0, 3, 5, 272, 80)
    x, ids, weights, experts = Case(1, 3, 5, 272, 80).arguments()
    run = partial(trtllm.run_on, "fake", "0.6.13", case.call())
    y = jax.jit(run)(x[:0], ids[:0], weights[:0], experts)
    assert y.shape == (0, 272)
    assert fake.journal() == []


def test_one_limit_for_two_units(given):
    """It cannot clamp sums whose scales differ: the scales are NaN, and so is the result."""
    case = Case(9, 3, 5, 272, 80, "swiglu_oai")
    x, ids, weights, experts = random_arguments(case)
    scale = experts.w13.global_scale.at[2, 1].mul(2)
    experts = dataclasses.replace(experts, w13=dataclasses.replace(experts.w13, global_scale=scale))
    buffers = given(case, (x, ids, weights, experts))
    wrong = np.isnan(buffers["output1_scales_gate_scalar"])
    assert wrong.tolist() == [False, False, True, False, False]


def test_the_version_decides(fake):
    case = Case(9, 3, 5, 272, 80)
    with pytest.raises(ValueError, match=r"version is '0\.6\.14', expected one of 0\.6\.13, "):
        jax.eval_shape(partial(trtllm.run_on, "fake", "0.6.14", case.call()), *case.arguments())
    for version, count in (("0.6.13", 36), ("0.7.2.post1", 43)):
        run = jax.jit(partial(trtllm.run_on, "fake", version, case.call()))
        jax.block_until_ready(run(*case.arguments()))
        assert fake.journal() == [f"trtllm_fp4_block_scale_moe of {count}"]
