"""The "vllm" preset against outputs of vLLM's own reference (tests/goldens/README.md)."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import format as nvfp4
from jax_nvfp4_moe import layouts
from jax_nvfp4_moe.implementations.base import Call
from jax_nvfp4_moe.implementations.common import contractions as _contractions
from jax_nvfp4_moe.implementations.common import recipes as _recipes
from jax_nvfp4_moe.relayout import take_experts
from tests.support import oracle

VLLM = nvm.Emulation(numerics="vllm")
LAYERS = ("moe0_silu_rw0", "moe1_silu_rw0", "moe2_silu_rw0", "moe3_silu_rw0", "moe3_silu_rw1")


def bf16(bits):
    return bits.view(ml_dtypes.bfloat16)


# ------------------------------------------------------------------------------------- format


def quantise_dequantise(x, encode_scale):
    """QDQ at an encode scale, as the "vllm" preset has it."""
    call = Call(nvm.Activation("silu"), jnp.dtype(jnp.bfloat16), None, False)
    recipe = _recipes.Recipe(call, "static", jnp.dtype(jnp.bfloat16), "vllm")
    rows = recipe.quantize_at(x.astype(jnp.float32), encode_scale)
    return jnp.stack([rows.low, rows.high], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("mode", ["eager", "jit", "jit, constant scale"])
@pytest.mark.parametrize("index", range(7))
def test_quantise_dequantise(index, mode, golden):
    data = golden("qdq")
    x, gain = jnp.asarray(bf16(data["x"])), jnp.float32(data[f"gs{index}"])
    if mode == "eager":
        with jax.disable_jit():
            got = quantise_dequantise(x, gain)
    elif mode == "jit":
        got = jax.jit(quantise_dequantise)(x, gain)
    else:
        got = jax.jit(lambda x: quantise_dequantise(x, gain))(x)
    want = bf16(data[f"qdq_triton_{index}"]).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(got), want)  # -0 == 0
    # The other form rounds 14 ties of one scale elsewhere: the definition can be told apart.
    other = bf16(data[f"qdq_torch_{index}"]).astype(np.float32)
    assert (np.asarray(got) != other).sum() == (14 if index == 4 else 0)


@pytest.mark.parametrize("index", range(7))
def test_block_scales(index, golden):
    data = golden("qdq")
    x, gain = jnp.asarray(bf16(data["x"])).astype(jnp.float32), jnp.float32(data[f"gs{index}"])
    _, scale = jax.jit(nvfp4.quantize_blocks)(x, gain)
    np.testing.assert_array_equal(np.asarray(scale), data[f"sf_{index}"])


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("jit", [True, False])
def test_dequantize(dtype, jit, golden):
    data = golden(f"dequant_{dtype}")
    q = nvm.Nvfp4Array(
        jnp.asarray(data["w"]),
        jnp.asarray(data["sf"].view(ml_dtypes.float8_e4m3fn)),
        jnp.asarray(data["scale_2"]),
    )
    want = bf16(data["out"]) if dtype == "bf16" else data["out"]
    with jax.disable_jit(not jit):
        got = nvm.dequantize(q, jnp.dtype(want.dtype))
        swapped = nvm.dequantize(
            dataclasses.replace(q, data=(q.data >> 4) | (q.data << 4)), jnp.dtype(want.dtype)
        )
    np.testing.assert_array_equal(np.asarray(got), want)
    assert (np.asarray(swapped) != want).mean() > 0.5


# ------------------------------------------------------------------------------------- layers


def layer(data):
    """A golden layer's tokens, routing and experts."""

    def weights(name, gates):
        scale = jnp.asarray(data[f"{name}_sf"].view(ml_dtypes.float8_e4m3fn))
        gain = jnp.asarray(data[f"{name}_scale_2"])
        gain = jnp.tile(gain[:, None], (1, gates)) if gates else gain
        return nvm.Nvfp4Array(jnp.asarray(data[name]), scale, gain)

    experts = nvm.ExpertWeights(
        w13=weights("w13", 2),
        w2=weights("w2", 0),
        w13_input_scale=jnp.asarray(data["a13_scale"]),
        w2_input_scale=jnp.asarray(data["a2_scale"]),
        w13_bias=None,
        w2_bias=None,
        hidden_size=2 * data["w13"].shape[2],
        intermediate_size=2 * data["w2"].shape[2],
        activation_scheme="static",
        layout="linear",
    )
    x = jnp.asarray(bf16(data["x"]))
    ids = jnp.asarray(data["topk_ids"].astype(np.int32))
    return x, ids, jnp.asarray(data["topk_weights"]), experts


def passes(got, want):
    """The gate for a whole layer: README of the goldens, "What must match"."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    cosine = (got * want).sum() / np.sqrt((got**2).sum() * (want**2).sum())
    differing = (got != want).mean()
    return oracle.relative_l2(got, want) <= 1e-3 and cosine >= 0.9999 and differing <= 0.01


@pytest.mark.parametrize(
    ("name", "jit"),
    [*((name, True) for name in LAYERS), pytest.param(LAYERS[0], False, marks=pytest.mark.slow)],
    ids=lambda value: {True: "jit", False: "eager"}.get(value, value),
)
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_layer(name, jit, form, golden):
    data = golden(f"{name}_{form}")
    arguments = layer(data)
    with jax.disable_jit(not jit):
        got = nvm.nvfp4_moe_routed(
            *arguments,
            implementation=VLLM,
            router_weight_on_input=name.endswith("rw1"),
        )
    assert got.dtype == jnp.bfloat16
    assert passes(got, bf16(data["out"]))


@pytest.mark.parametrize("target", ["trtllm", "cute_dsl"])
def test_layer_in_other_layouts(target, golden):
    data = golden(f"{LAYERS[0]}_triton")
    *tokens, experts = layer(data)
    want = nvm.nvfp4_moe_routed(*tokens, experts, implementation=VLLM)
    got = nvm.nvfp4_moe_routed(*tokens, nvm.prepare(experts, target), implementation=VLLM)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("name", [*LAYERS[:2], pytest.param(LAYERS[2], marks=pytest.mark.slow)])
def test_every_step(name, golden):
    """Each step, fed the golden of the step before."""
    data = golden(f"{name}_triton")
    x, ids, topk_weights, experts = layer(data)
    call = Call(nvm.Activation("silu"), x.dtype, None, False)
    recipe = _recipes.Recipe(call, "static", x.dtype, "vllm")
    as_values = recipe.weight_values

    @jax.jit
    def steps():
        rows = recipe.input_rows(x.astype(jnp.float32), experts)
        w2_input_scale = recipe.w2_input_scale(experts)
        c1_golden = jnp.asarray(bf16(data["part_c1"])).astype(jnp.float32)
        c2 = _recipes.activate(c1_golden, call.activation, round_to=recipe.rounding)
        c2_golden = jnp.asarray(bf16(data["part_c2"])).astype(jnp.float32)
        c2q = recipe.requantized(c2_golden, w2_input_scale)
        own = take_experts(experts, ids)
        c1 = recipe.rounding(
            _contractions.multiply_reduce(
                jax.tree.map(lambda a: a[:, None], rows), own.w13, as_values
            )
        )
        by_slot = jax.tree.map(lambda a: a.reshape(*ids.shape, -1), c2q)
        c3 = _contractions.multiply_reduce(by_slot, own.w2, as_values)
        c3 = recipe.rounding(c3 * topk_weights[..., None])
        return rows, c1, c2, c2q, c3

    rows, c1, c2, c2q, c3 = steps()

    def interleaved(rows):
        return np.stack([rows.low, rows.high], -1).reshape(len(rows.low), -1)

    def share_differing(got, key):
        want = bf16(data[key]).astype(np.float32)
        return (np.asarray(got).reshape(want.shape) != want).mean()

    assert share_differing(interleaved(rows), "part_xq") == 0
    assert share_differing(c2, "part_c2") <= 1e-3  # exp differs by an ulp between libraries
    assert share_differing(interleaved(c2q), "part_c2q") == 0
    for got, key in ((c1, "part_c1"), (c3, "part_c3")):  # accumulation order
        want = bf16(data[key]).astype(np.float32)
        assert share_differing(got, key) <= 1e-3
        assert (np.abs(np.asarray(got).reshape(want.shape) - want) <= 2**-7 * np.abs(want)).all()


MISTAKES = {
    "gate and up swapped": lambda e: dataclasses.replace(
        e, w13=jax.tree.map(lambda a: jnp.roll(a, a.shape[1] // 2, axis=1), e.w13)
    ),
    "nibbles swapped": lambda e: dataclasses.replace(
        e, w13=dataclasses.replace(e.w13, data=(e.w13.data >> 4) | (e.w13.data << 4))
    ),
    "weights' global scale ignored": lambda e: dataclasses.replace(
        e, w2=dataclasses.replace(e.w2, global_scale=jnp.ones_like(e.w2.global_scale))
    ),
    "input scale ignored": lambda e: dataclasses.replace(e, w13_input_scale=jnp.float32(1)),
    "input scale of some experts": lambda e: dataclasses.replace(
        e, w13_input_scale=e.w13_input_scale.min()
    ),
    "hidden scale of some experts": lambda e: dataclasses.replace(
        e, w2_input_scale=jnp.sort(e.w2_input_scale)[-2]
    ),
    "encode instead of decode scale": lambda e: dataclasses.replace(
        e, w2_input_scale=1 / e.w2_input_scale
    ),
    "scales read as swizzled": lambda e: dataclasses.replace(
        e,
        w13=dataclasses.replace(
            e.w13,
            scale=layouts.unswizzle_scales(
                e.w13.scale, rows=e.w13.scale.shape[-2], cols=e.w13.scale.shape[-1]
            ),
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_fail(mistake, golden):
    data = golden("moe0_silu_rw0_triton")
    *tokens, experts = layer(data)
    got = nvm.nvfp4_moe_routed(*tokens, MISTAKES[mistake](experts), implementation=VLLM)
    assert not passes(got, bf16(data["out"]))


def test_weight_applied_twice_or_late_fails(golden):
    data = golden("moe0_silu_rw0_triton")
    x, ids, weights, experts = layer(data)
    want = bf16(data["out"])
    twice = nvm.nvfp4_moe_routed(x, ids, weights**2, experts, implementation=VLLM)
    assert not passes(twice, want)
    # After the rounding to bfloat16 instead of before it: only a gate on bits can see this.
    rows = [
        nvm.nvfp4_moe_routed(
            x,
            ids[:, slot, None],
            jnp.ones_like(weights[:, :1]),
            experts,
            implementation=VLLM,
        ).astype(jnp.float32)
        for slot in range(ids.shape[1])
    ]
    late = sum(
        (row * weights[:, slot, None]).astype(jnp.bfloat16).astype(jnp.float32)
        for slot, row in enumerate(rows)
    ).astype(jnp.bfloat16)
    assert (np.asarray(late) != want).mean() > 0.01


def test_kernel_preset_is_another_arithmetic(golden):
    data = golden("moe2_silu_rw0_triton")
    got = nvm.nvfp4_moe_routed(*layer(data), implementation="emulation")
    error = oracle.relative_l2(got, bf16(data["out"]))
    assert 1e-3 < error < 5e-2
