"""The Triton implementation, run by JAX's interpreter: its kernels but for their few PTX lines.

Those are run here too, by a reader of PTX. What compilers make of the kernels is in
tests/aot/test_triton.py.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import devices, layouts
from jax_nvfp4_moe.implementations.triton import decode, epilogues, tilings
from jax_nvfp4_moe.implementations.triton import implementation as triton
from jax_nvfp4_moe.rounding import round_to
from tests.support import conformance, oracle
from tests.support.conformance import CASES, LAYOUT_CASES, SLOW_CASES, Case, case, make_layer, run

INTERPRETED = nvm.Triton(interpret=True)


# ------------------------------------------------------------------------------------- conformance


# How tokens were routed is nothing to the kernels, and interpreted they are slow.
FAST_CASES = [
    case for case in CASES if case.method in ("renormalize", "llama4") and case.hidden_size <= 256
]
MORE_CASES = [case for case in (*CASES, *SLOW_CASES) if case not in FAST_CASES]


@pytest.mark.parametrize(
    "case",
    [*FAST_CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)],
    ids=str,
)
def test_matches_float64(case, rng, record_property):
    layer = make_layer(case, rng)
    got, want = run(layer, INTERPRETED), conformance.reference(layer)
    record_property("relative_l2", float(oracle.relative_l2(got, want.out)))
    record_property("ties", conformance.check(got, want))


@pytest.mark.parametrize(
    "case", [case(400, 2, 1, 128, 80), case(200, 3, 1, 64, 48, scheme="none", dtype="float32")]
)
def test_tilings_of_hopper(case, rng, monkeypatch):
    monkeypatch.setattr(devices, "current_kind", lambda: "NVIDIA H200")
    chosen = tilings.tilings(case.tokens, case.top_k, case.num_experts, "NVIDIA H200")
    assert chosen.tokens == (128 if case.tokens == 400 else 64)
    jax.clear_caches()
    layer = make_layer(case, rng)
    conformance.check(run(layer, INTERPRETED), conformance.reference(layer))
    jax.clear_caches()


@pytest.mark.parametrize("target", ["trtllm", "cute_dsl"])
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_every_layout_gives_the_same_bits(case, target, rng):
    layer = make_layer(case, rng)
    prepared = nvm.prepare(layer.experts, target)
    np.testing.assert_array_equal(
        run(layer, INTERPRETED, experts=prepared), run(layer, INTERPRETED)
    )


@pytest.mark.parametrize("tokens", [2, 40])
def test_mistakes_fail(tokens, rng):
    layer = make_layer(Case(tokens=tokens), rng)
    got, experts = run(layer, INTERPRETED), layer.experts
    for mistake in ({"swap_gate_up": True}, {"nibbles": "high even"}, {"global_scales": False}):
        wrong = conformance.reference(layer, **mistake)
        assert oracle.relative_l2(got, wrong.out) > 100 * conformance.GATE
        with pytest.raises(pytest.fail.Exception):
            conformance.check(got, wrong)
    swizzled = dataclasses.replace(
        experts.w13, scale=layouts.swizzle_scales(experts.w13.scale)[:, : experts.w13.shape[-2]]
    )
    for wrong in (
        dataclasses.replace(experts, w13_input_scale=experts.w13_input_scale.min()),
        dataclasses.replace(experts, w2_input_scale=jnp.float32(1)),
        dataclasses.replace(experts, w13=swizzled),
    ):
        with pytest.raises(pytest.fail.Exception):
            conformance.check(run(layer, INTERPRETED, experts=wrong), conformance.reference(layer))


@pytest.mark.parametrize("tokens", [2, 40])
def test_ids_out_of_range_contribute_nothing(tokens, rng):
    layer = make_layer(Case(tokens=tokens), rng)
    ids = layer.ids.copy()
    ids[::2, 0], ids[1::2, 1] = -1, 1000
    ids[0] = -5
    layer = dataclasses.replace(layer, ids=ids)
    got = run(layer, INTERPRETED)
    conformance.check(got, conformance.reference(layer))
    np.testing.assert_array_equal(got[0], 0)


@pytest.mark.parametrize(("scheme", "tokens"), [("static", 3), ("per_token", 40), ("none", 3)])
def test_nan_and_infinity_as_in_emulation(scheme, tokens, rng):
    layer = make_layer(Case(tokens=tokens, scheme=scheme), rng)
    x = layer.x.copy()
    x[0, 3], x[1, 5] = np.nan, np.inf
    layer = dataclasses.replace(layer, x=x)
    got, want = run(layer, INTERPRETED), run(layer, "emulation")
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.isnan(got[0]).all() and np.isfinite(got[2:]).all()


# ------------------------------------------------------------------------------------- transforms


def test_transforms(rng):
    layer = make_layer(Case(tokens=4, num_experts=4), rng)
    x, ids, weights = (jnp.asarray(a) for a in (layer.x, layer.ids, layer.weights))

    def call(x, ids, weights, implementation=INTERPRETED):
        return nvm.nvfp4_moe_routed(
            x.astype(jnp.float32), ids, weights, layer.experts, implementation=implementation
        )

    want = call(x, ids, weights, "emulation")
    np.testing.assert_allclose(jax.jit(call)(x, ids, weights), want, atol=1e-2)
    folded = jax.vmap(call)(*(a.reshape(2, 2, *a.shape[1:]) for a in (x, ids, weights)))
    np.testing.assert_array_equal(folded.reshape(want.shape), call(x, ids, weights))

    def step(x, _):
        y = call(x, ids, weights)
        return y, y

    _, steps = jax.lax.scan(step, x.astype(jnp.float32), None, length=2)
    np.testing.assert_array_equal(steps[0], call(x, ids, weights))


def split_over_four(experts, implementation, **options):
    """A call whose experts are split over four devices."""

    def call(*args):
        return nvm.nvfp4_moe_routed(*args, implementation=implementation, axis_name="expert")

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("expert",))
    split = jax.tree.map(lambda array: P("expert") if array.ndim else P(), experts)
    specs = (P(), P(), P(), split)
    return jax.jit(jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P(), **options))


def test_experts_split_over_devices_give_the_same_bits(rng):
    layer = make_layer(Case(tokens=6, num_experts=8, scheme="none"), rng)
    x, ids, weights = (jnp.asarray(a) for a in (layer.x, layer.ids, layer.weights))
    # JAX's interpreter of kernels does not track over which axes values vary.
    got = split_over_four(layer.experts, INTERPRETED, check_vma=False)(
        x, ids, weights, layer.experts
    )
    whole = nvm.nvfp4_moe_routed(x, ids, weights, layer.experts, implementation=INTERPRETED)
    np.testing.assert_array_equal(got, whole)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("scheme", conformance.SCHEMES)
def test_compiled_kernels_say_what_they_vary_over(scheme, tokens, rng, monkeypatch):
    monkeypatch.setattr(devices, "current_kind", lambda: "NVIDIA H200")
    layer = make_layer(Case(tokens=tokens, num_experts=8, scheme=scheme), rng)
    args = layer.x, layer.ids, layer.weights, layer.experts
    assert jax.eval_shape(split_over_four(layer.experts, "triton"), *args).shape == layer.x.shape


# ------------------------------------------------------------------------------------- PTX


def run_ptx(text, words, scales):
    """Runs the integer and packed bfloat16 instructions that `decode.asm` is made of."""
    registers = {"$1": words, "$2": scales}

    def value(name):
        return registers[name] if name in registers else np.full_like(words, int(name, 0))

    def halves(x):
        pair = np.stack([x & 0xFFFF, x >> 16]).astype(np.uint16)
        return pair.view(ml_dtypes.bfloat16).astype(np.float64)

    def packed(low, high):
        bits = [v.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for v in (low, high)]
        return bits[0] | bits[1] << np.uint32(16)

    operations = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "shr.u32": lambda a, b: a >> b,
        "mul.lo.u32": lambda a, b: (a.astype(np.uint64) * b & 0xFFFFFFFF).astype(np.uint32),
        "fma.rn.bf16x2": lambda a, b, c: packed(*(halves(a) * halves(b) + halves(c))),
    }
    for statement in re.findall(r"[^{};]+", text):
        name, *arguments = statement.replace(",", " ").split() or [".reg"]
        if name != ".reg":
            registers[arguments[0]] = operations[name](*map(value, arguments[1:]))
    return registers["$0"]


@pytest.mark.parametrize("quarter", range(4))
def test_every_word_is_decoded(quarter):
    """All 65,536 words in either half of a register, with every scale byte somewhere."""
    words = np.arange(65536, dtype=np.uint16)
    bytes_ = (words * 31 + 7 >> 3).astype(np.uint8)
    with jax.numpy_dtype_promotion("standard"):
        scales = np.asarray(decode.scale_values(jnp.asarray(bytes_[None])))[0]
    as_float = bytes_.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(scales * 2.0**-118, as_float)
    assert len(np.unique(bytes_)) == 256
    bits = scales.astype(ml_dtypes.bfloat16).view(np.uint16)
    other = words[::-1]

    def pair(low, high):
        return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)

    made = run_ptx(decode.asm(quarter), pair(words, other), pair(bits, bits[::-1]))
    codes = (words >> np.uint16(4 * quarter) & 15).astype(np.uint8)
    want = E2M1[codes] * as_float / 256
    low, high = ((made >> np.uint32(s) & 0xFFFF).astype(np.uint16) for s in (0, 16))
    np.testing.assert_array_equal(low.view(ml_dtypes.bfloat16).astype(float), want)
    np.testing.assert_array_equal(high.view(ml_dtypes.bfloat16).astype(float), want[::-1])
    interpreted = decode.operand(
        jnp.asarray(words.view(np.int16)[None]),
        jnp.asarray(scales.astype(ml_dtypes.bfloat16)[None]),
        quarter,
        native=False,
    )
    np.testing.assert_array_equal(np.asarray(interpreted)[0].astype(float), want)
    wrong = run_ptx(decode.asm((quarter + 1) % 4), pair(words, other), pair(bits, bits))
    assert (wrong != made).mean() > 0.5


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


# ------------------------------------------------------------------------------------- roundings


def test_block_scales_are_rounded_as_elsewhere():
    ties = np.arange(0, 512, 2.0**-4, dtype=np.float32) * 2.0 ** np.arange(-10, 1)[:, None]
    values = np.concatenate([ties.ravel(), np.nextafter(ties.ravel(), np.float32(np.inf))])
    values = np.append(values, [np.inf, 3e38, 1e-40, 0]).astype(np.float32)
    got = epilogues._round_e4m3(jnp.asarray(values))
    np.testing.assert_array_equal(got, round_to(jnp.asarray(values), jnp.float8_e4m3fn))
    assert np.isnan(epilogues._round_e4m3(jnp.float32(np.nan)))


def test_error_function():
    x = np.linspace(-6, 6, 10001, dtype=np.float32)
    want = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(epilogues._erf(jnp.asarray(x)), want, atol=6e-7)


# ------------------------------------------------------------------------------------- choice


def explained(kind, tokens=4, **options):
    def build():
        gate, up = jnp.zeros((2, 8, 32, 64))
        return nvm.quantize_experts(gate, up, jnp.zeros((8, 64, 32)), 1.0, 1.0)

    routing = nvm.Routing("renormalize", top_k=2)
    report = nvm.explain(jax.eval_shape(build), routing, tokens=tokens, device_kind=kind, **options)
    return report.used, {choice.name: choice.reason for choice in report.choices}["triton"]


@pytest.mark.parametrize(
    "kind",
    [
        "NVIDIA H200",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA L40S",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA GeForce RTX 5090",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "NVIDIA GB10",
    ],
)
def test_chosen_on(kind):
    used, how = explained(kind)
    assert used == "triton"
    assert how.startswith("a tile for each pair; reads about 0.0 MB of packed weights for")
    assert explained(kind, tokens=40)[1].startswith("tiles of 16 rows; ")


@pytest.mark.parametrize("kind", ["Tesla V100-SXM2-16GB", "Tesla T4", "NVIDIA GeForce RTX 2080 Ti"])
def test_not_chosen_on(kind):
    used, why = explained(kind)
    assert used == "emulation"
    assert why == f"it needs compute capability 8.0 or later, and this is {kind}"


def test_other_refusals(monkeypatch):
    monkeypatch.setattr(triton, "_has_pallas_triton", lambda: False)
    used, why = explained("NVIDIA H200")
    assert (used, why) == ("emulation", f"JAX {jax.__version__} has no Triton backend for Pallas")
    with pytest.raises(TypeError, match=r"^interpret is 1, expected a bool$"):
        nvm.Triton(interpret=1)


def test_named_but_not_interpreted_is_refused_on_a_cpu(rng):
    layer = make_layer(Case(tokens=2), rng)
    with pytest.raises(NotImplementedError, match="it needs an NVIDIA GPU, and this is cpu"):
        run(layer, "triton")
