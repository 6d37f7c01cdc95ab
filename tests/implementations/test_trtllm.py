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

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.implementations.trtllm import call as _trtllm_call
from jax_nvfp4_moe.implementations.trtllm.call import (
    Function,
    run_routed,
    run_unrouted,
)
from jax_nvfp4_moe.implementations.trtllm.routing import (
    from_logits,
    no_router,
    packed_ids,
)
from jax_nvfp4_moe.implementations.trtllm.sizes import (
    Sizes,
    max_tokens,
    workspace_bytes,
)
from tests.recording_cuda.cases import (
    Case,
    error_of,
    expected_of,
    layer_of,
    random_arguments,
    small,
    typed,
)
from tests.support.host import CPU, present_host_as

FAKE = Function("fake", "0.6.13")


def called(fake):
    """The functions that were called; other lines are about devices, which other tests change."""
    return [line for line in fake.journal() if not line.startswith("cuda")]


@pytest.fixture
def given(fake):
    """A function from a case and its arguments to what the function would be given."""

    def given_of(case, arguments, run=run_routed, **changes):
        found = {}

        def copy(name, data, size):
            found[name.decode()] = np.frombuffer(ctypes.string_at(data, size), np.uint8)
            return data

        present_host_as(CPU, 0, copy)
        call = dataclasses.replace(case.call(), **changes)
        program = jax.jit(partial(run, FAKE, call))
        jax.block_until_ready(program(*arguments))
        return typed(found)

    return given_of


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
    words = np.asarray(packed_ids(ids, weights, 8))
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
        whole = Sizes(tokens, top_k, num_experts, num_experts, hidden, intermediate, False)
        found = workspace_bytes("0.6.13", whole)
        assert found / 1e6 == pytest.approx(expected, rel=0.02)  # of which 1 % is alignment
        assert found < workspace_bytes("0.7.2.post1", whole) < 1.5 * found


def test_no_tokens(given, fake):
    """The function divides by their number: it is not called."""
    case = Case(0, 3, 5, 272, 80)
    x, ids, weights, experts = Case(1, 3, 5, 272, 80).arguments()
    run = partial(run_routed, FAKE, case.call())
    y = jax.jit(run)(x[:0], ids[:0], weights[:0], experts)
    assert y.shape == (0, 272)
    assert called(fake) == []


def test_the_version_decides(fake):
    case = Case(9, 3, 5, 272, 80)
    with pytest.raises(ValueError, match=r"version is '0\.6\.14', expected one of 0\.6\.13, "):
        jax.eval_shape(
            partial(run_routed, Function("fake", "0.6.14"), case.call()), *case.arguments()
        )
    for version, count in (("0.6.13", 36), ("0.7.2.post1", 43)):
        run = jax.jit(partial(run_routed, Function("fake", version), case.call()))
        jax.block_until_ready(run(*case.arguments()))
        assert called(fake) == [f"trtllm_fp4_block_scale_moe of {count}"]


# ---------------------------------------------------------------------------- routed by the kernel

# Methods, their RoutingMethodType, and what else a call of theirs says.
ROUTERS = (
    (nvm.Routing("default", 3), 0, {}),
    (nvm.Routing("renormalize", 3), 1, {}),
    (nvm.Routing("renormalize_naive", 3), 4, {}),
    (nvm.Routing("deepseek_v3", 3, scaling_factor=2.5), 2, {"routed_scaling_factor": 2.5}),
    (
        nvm.Routing("deepseek_v3", 3, n_group=4, topk_group=2, scaling_factor=2.5),
        2,
        {"routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2},
    ),
    (nvm.Routing("llama4", 1), 3, {}),
    (nvm.Routing("topk", 3), 5, {}),
    (nvm.Routing("sigmoid", 3), 8, {}),
    (nvm.Routing("sigmoid_renorm", 3), 6, {"norm_topk_prob": True}),
    (nvm.Routing("minimax2", 3, scaling_factor=2.0), 7, {"routed_scaling_factor": 2.0}),
)


@pytest.mark.parametrize(("routing", "method", "more"), ROUTERS, ids=lambda v: str(v)[:60])
def test_what_the_router_is_told(routing, method, more):
    corrected = routing.method in ("deepseek_v3", "minimax2")
    logits = jnp.ones((9, 16), jnp.bfloat16)
    bias = jnp.ones(16, jnp.float16) if corrected else None
    found = from_logits(logits, routing, bias)
    expected = {
        "routing_input_mode": 0,
        "num_experts": 16,
        "top_k": routing.top_k,
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": None,
        "routing_method_type": method,
        "norm_topk_prob": False,
    } | more
    assert {name: found[name] for name in expected} == expected
    assert found["routing_logits"].dtype == jnp.float32
    # The kernel writes these, so they must be memory of their own.
    for name, dtype in (("topk_ids", jnp.int32), ("topk_weights", jnp.bfloat16)):
        assert (found[name].shape, found[name].dtype) == ((9, routing.top_k), dtype)
    if corrected:
        np.testing.assert_array_equal(found["routing_bias"], np.ones(16, np.float32))
        # Where there are no groups the kernel reads one that is missing.
        np.testing.assert_array_equal(from_logits(logits, routing, None)["routing_bias"], 0)
    else:
        assert found["routing_bias"] is None


@pytest.mark.parametrize(
    ("routing", "num_experts", "reason"),
    [
        (nvm.Routing("default", 8), 256, None),
        (
            nvm.Routing("default", 9),
            256,
            "up to 256 experts, top_k 8, not for 256 experts, top_k 9",
        ),
        (nvm.Routing("topk", 8), 260, "up to 256 experts, top_k 8, not for 260 experts"),
        (nvm.Routing("sigmoid", 9), 64, "up to 256 experts, top_k 8"),
        (nvm.Routing("sigmoid_renorm", 8), 512, "up to 256 experts, top_k 8"),
        (nvm.Routing("renormalize", 32), 2048, None),
        (nvm.Routing("renormalize_naive", 33), 64, "top_k 33"),
        (nvm.Routing("minimax2", 32), 1024, None),
        (nvm.Routing("minimax2", 8), 1028, "up to 1024 experts"),
        (nvm.Routing("deepseek_v3", 8), 2048, "up to 1024 experts"),
        (nvm.Routing("deepseek_v3", 8, n_group=8, topk_group=4), 256, None),
        (nvm.Routing("deepseek_v3", 8, n_group=8, topk_group=5), 256, "5 of 8 groups"),
        (nvm.Routing("deepseek_v3", 8, n_group=16, topk_group=4), 256, "4 of 16 groups"),
        (nvm.Routing("deepseek_v3", 8, n_group=4, topk_group=4), 256, "64 experts a group"),
        (nvm.Routing("deepseek_v3", 23, n_group=4, topk_group=4), 128, "not top_k 23"),
        (nvm.Routing("llama4", 1), 128, None),
        (nvm.Routing("llama4", 1), 132, "up to 128 experts"),
        (nvm.Routing("renormalize", 2), 10, "a multiple of 4 experts, not over 10"),
    ],
    ids=str,
)
def test_which_routers_there_are(routing, num_experts, reason):
    """For others FlashInfer launches none, and lets the GEMMs read what is in memory."""
    found = no_router(routing, num_experts)
    assert found is None if reason is None else reason in found
    if reason is not None:
        with pytest.raises(ValueError, match="the kernel cannot route"):
            from_logits(jnp.ones((2, num_experts)), routing, None)


@pytest.mark.parametrize("routing", [ROUTERS[0][0], ROUTERS[4][0]], ids=["default", "deepseek_v3"])
def test_logits_and_bias_arrive(routing, given):
    """Routed with what the function is given of it, the rest gives the emulation's result."""
    case = Case(9, 3, 16, 272, 80)
    x, _, _, experts = random_arguments(case)
    logits = 2 * jax.random.normal(jax.random.key(5), (9, 16))
    bias = jax.random.normal(jax.random.key(6), (16,)) if "deep" in routing.method else None

    def run(function, call, x, logits, bias, experts):
        return run_unrouted(function, call, routing, x, logits, bias, experts)

    buffers = given(case, (x, logits, bias, experts), run=run)
    seen = jnp.asarray(buffers["routing_logits"].reshape(9, 16))
    seen_bias = None if bias is None else jnp.asarray(buffers["routing_bias"])
    ids, weights = nvm.route(seen, routing, selection_bias=seen_bias)
    buffers["topk_ids"] = np.asarray(packed_ids(ids, weights, 16))
    expected = expected_of(case, (x, *nvm.route(logits, routing, selection_bias=bias), experts))
    assert error_of(layer_of(case, buffers), expected) <= 1e-3
    buffers["topk_ids"] = np.asarray(packed_ids(ids[::-1], weights, 16))
    assert error_of(layer_of(case, buffers), expected) > 1e-2


# ------------------------------------------------------------------------------------ many tokens


def test_the_limit_of_tokens():
    """As vLLM has it: no grid beyond 65535, whatever the routing."""
    assert max_tokens(8, 128) == 300_000
    tokens = max_tokens(32, 2048)
    assert tokens == 254_015
    # Each expert's last tile with one token, the others full.
    assert 2048 + (32 * tokens - 2048) // 128 == 65535
    assert 2048 + (32 * (tokens + 1) - 2048) // 128 == 65536


def test_more_tokens_than_a_call_takes(fake, monkeypatch):
    """Several calls, of the tokens in order, the last one with the rest."""
    monkeypatch.setattr(_trtllm_call, "max_tokens", lambda top_k, num_experts: 4)
    seen = []

    def copy(name, data, size):
        if name == b"topk_ids":
            seen.append(np.frombuffer(ctypes.string_at(data, size), np.int32))
        return data

    case = Case(9, 3, 5, 272, 80)
    x, ids, weights, experts = random_arguments(case)
    present_host_as(CPU, 0, copy)
    y = jax.jit(partial(run_routed, FAKE, case.call()))(x, ids, weights, experts)
    assert jax.block_until_ready(y).shape == (9, 272)
    assert called(fake) == ["trtllm_fp4_block_scale_moe of 36"] * 3
    # Independent of each other, in any order.
    expected = np.asarray(packed_ids(ids, weights, 5))
    assert sorted(len(words) for words in seen) == [3, 12, 12]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.sort(expected.reshape(-1)))


# -------------------------------------------------------------------- what FlashInfer lets through

WRONG = {
    "gemm1_weights": lambda a: a[:, 1:],
    "gemm1_weights_scale": lambda a: a[..., 1:],
    "gemm2_weights": lambda a: a.astype(jnp.int8),
    "gemm2_weights_scale": lambda a: a.astype(jnp.bfloat16),
    "hidden_states_scale": lambda a: a.reshape(-1),  # as swizzled ones are
    "topk_ids": lambda a: a.astype(jnp.int16),
    "topk_weights": lambda a: dataclasses.replace(a, dtype=jnp.float32),
    "output1_scales_scalar": lambda a: a[0],
    "output1_scales_gate_scalar": lambda a: None,
    "output2_scales_scalar": lambda a: a.astype(jnp.bfloat16),
    "gemm1_bias": lambda a: jnp.ones((5, 7), jnp.float32),
    "gemm1_clamp_limit": lambda a: jnp.ones(7, jnp.float32),
    "output": lambda a: dataclasses.replace(a, shape=(9, 1024)),
    "hidden_states": lambda a: a[:0],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name, fake, monkeypatch):
    """Each is named, with what it is and what was expected; nothing is called."""
    case = Case(9, 3, 5, 272, 80)
    checked = _trtllm_call.check_arguments

    def spoil(arguments):
        return checked({**arguments, name: WRONG[name](arguments[name])})

    monkeypatch.setattr(_trtllm_call, "check_arguments", spoil)
    with pytest.raises(ValueError, match=rf"^{name} (is|has) .*expected"):
        jax.block_until_ready(jax.jit(partial(run_routed, FAKE, case.call()))(*case.arguments()))
    assert called(fake) == []
