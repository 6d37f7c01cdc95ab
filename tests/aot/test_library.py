"""The library as XLA compiles it for an H200 and a B200: what it rounds, plans and calls."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import jax_nvfp4_moe as nvm

from .harness import TARGETS, compile_for, lost_conversions, lost_roundings

pytestmark = pytest.mark.aot

# One layer of Qwen3-30B-A3B.
NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768


def shape(*dims, dtype="float32"):
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def experts(scheme="static", num_experts=NUM_EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE):
    def build():
        weights = [
            jnp.zeros((num_experts, *dims), jnp.bfloat16)
            for dims in ((intermediate, hidden),) * 2 + ((hidden, intermediate),)
        ]
        scales = (1.0, 1.0) if scheme == "static" else ()
        return nvm.quantize_experts(*weights, *scales, activation_scheme=scheme)

    return jax.eval_shape(build)


@functools.cache
def compile_layer(target, tokens, scheme, numerics, dtype="bfloat16", **sizes):
    layer = experts(scheme, **sizes)
    return compile_for(
        target,
        lambda *args: nvm.nvfp4_moe_routed(*args, implementation=nvm.Emulation(numerics)),
        shape(tokens, layer.hidden_size, dtype=dtype),
        shape(tokens, TOP_K, dtype="int32"),
        shape(tokens, TOP_K),
        layer,
    )


PRESETS = [("static", "kernel"), ("per_token", "kernel"), ("none", "kernel"), ("static", "vllm")]
SMALL = {"num_experts": 16, "hidden": 256, "intermediate": 128}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_quantiser_keeps_its_roundings(target, dtype):
    compiled = compile_for(target, nvm.quantize, shape(64, 4096, dtype=dtype))
    assert lost_roundings(compiled) == []
    # The block scales: rounded twice over, by reduce_precision and, subnormals, on a fixed grid.
    assert "round_float8_e4m3fn" in compiled.hlo
    assert "exponent_bits=8, mantissa_bits=3" in compiled.hlo
    assert "round-nearest-even" in compiled.hlo
    # The codes: comparisons, which no pass takes for a conversion and back.
    assert compiled.hlo.count("round_float4_e2m1fn") >= 7


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dequantise_keeps_its_rounding(target, dtype):
    q = jax.eval_shape(nvm.quantize, shape(64, 4096))

    def round_trip(q):
        return nvm.dequantize(q, jnp.dtype(dtype)).astype(jnp.float32) * 3.0

    compiled = compile_for(target, round_trip, q)
    assert lost_roundings(compiled) == []
    assert f"round_{dtype}" in compiled.hlo


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("tokens", "scheme", "numerics", "dtype"),
    [(tokens, *preset, "bfloat16") for tokens in (1, 128) for preset in PRESETS]
    + [(1, "static", "kernel", "float32"), (128, "static", "kernel", "float32")]
    + [(128, "none", "kernel", "float16"), (128, "static", "vllm", "float16")],
)
def test_presets_keep_their_roundings(target, tokens, scheme, numerics, dtype):
    compiled = compile_layer(target, tokens, scheme, numerics, dtype, **SMALL)
    rounded = {name for r in compiled.roundings for name in re.findall(r"/round_(\w+)/", str(r))}
    expected = set() if scheme == "none" else {"float8_e4m3fn"}
    if numerics == "kernel" and scheme != "none":
        expected.add("bfloat16")  # rows
    if dtype != "float32":
        expected.add(dtype)  # the output, and what the preset keeps in x's type
    assert rounded == expected
    assert lost_roundings(compiled) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_cast_instead_would_be_lost(target):
    """The negative control: the spelling that the library avoids."""

    def careless(x):
        return x.astype(jnp.float8_e4m3fn).astype(jnp.float32) * 3.0

    assert lost_conversions(compile_for(target, careless, shape(64, 256))) != []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("scheme", "numerics"), PRESETS)
@pytest.mark.parametrize(("tokens", "megabytes"), [(1, 1), (16, 16)])
def test_few_tokens_need_little_memory(target, scheme, numerics, tokens, megabytes):
    compiled = compile_layer(target, tokens, scheme, numerics)
    assert compiled.temp_bytes < megabytes * 1e6
    assert "ragged" not in compiled.hlo


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("scheme", "numerics"), PRESETS[:1] + PRESETS[2:])
def test_many_tokens_never_dequantise_all_experts(target, scheme, numerics):
    compiled = compile_layer(target, 256, scheme, numerics)
    dequantised = 2 * NUM_EXPERTS * 3 * HIDDEN * INTERMEDIATE
    assert compiled.temp_bytes < dequantised / 20
    assert "ragged" not in compiled.hlo
    assert "ragged" not in compiled.lowered


@pytest.mark.parametrize("target", TARGETS)
def test_float4_views_are_free(target):
    compiled = compile_for(
        target, lambda data: nvm.pack(nvm.unpack(data)), shape(64, 64, dtype="uint8")
    )
    assert compiled.kernel_count <= 1  # at most the copy of an input to an output
