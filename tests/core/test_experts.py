"""Experts: building them, every layout and back bit for bit, gathering some, and the checks."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.experts import check_experts
from jax_nvfp4_moe.relayout import take_experts, to_layout

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
F32 = np.dtype(np.float32)
LAYOUTS = ("linear", "trtllm", "cute_dsl")
KERNELS = {"trtllm": "trt", "cute_dsl": "cute"}  # and their prefix in the goldens
IMPLEMENTATION = {"linear": "emulation", "trtllm": "trtllm", "cute_dsl": "cute_dsl"}

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_kernel = pytest.mark.parametrize("layout", KERNELS)


def same(a, b):
    """The same tree, metadata included, with the same bits."""
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(
            lambda x, y: (x.dtype, x.shape) == (y.dtype, y.shape) and x.tobytes() == y.tobytes(),
            jax.tree.map(np.asarray, a),
            jax.tree.map(np.asarray, b),
        )
    )


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def matrices(rng, num_experts=3, hidden=64, intermediate=32, *, gated=True):
    """(gate, up, down): float32 of a different magnitude for each matrix and each expert."""

    def normal(*shape):
        scale = np.exp2(rng.integers(-6, 7, (num_experts, 1, 1)))
        return (rng.normal(size=(num_experts, *shape)) * scale).astype(F32)

    gate = normal(intermediate, hidden) if gated else None
    return gate, normal(intermediate, hidden), normal(hidden, intermediate)


def random_experts(
    rng, num_experts=3, hidden=64, intermediate=32, *, gated=True, scheme="static", biases=True
):
    """Random bytes, so that no two rows or columns are alike; quick to make."""

    def weights(rows, cols, groups):
        scale = rng.integers(1, 0x7F, (num_experts, rows, cols // 16)).astype(np.uint8)
        return nvm.Nvfp4Array(
            jnp.asarray(rng.integers(0, 256, (num_experts, rows, cols // 2)).astype(np.uint8)),
            jnp.asarray(scale.view(E4M3)),
            jnp.asarray(rng.uniform(0.5, 1, groups).astype(F32)),
        )

    def random(*shape):
        return jnp.asarray(rng.uniform(0.5, 1, shape).astype(F32))

    gates = 2 if gated else 1
    static = scheme == "static"
    return nvm.ExpertWeights(
        w13=weights(gates * intermediate, hidden, (num_experts, gates)),
        w2=weights(hidden, intermediate, (num_experts,)),
        w13_input_scale=random(num_experts, gates) if static else None,
        w2_input_scale=random(num_experts) if static else None,
        w13_bias=random(num_experts, gates * intermediate) if biases else None,
        w2_bias=random(num_experts, hidden) if biases else None,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation_scheme=scheme,
        layout="linear",
    )


# ------------------------------------------------------------------------------------- build


def assert_holds(experts, gate, up, down):
    """Each of the experts' matrices is that matrix of that expert, quantised by itself."""
    inter = up.shape[1]
    rows = {0: gate, 1: up} if gate is not None else {0: up}
    w13, w2 = experts.w13, experts.w2
    for e in range(len(up)):
        for half, matrix in rows.items():
            own = np.s_[e, half * inter : (half + 1) * inter]
            got = nvm.Nvfp4Array(w13.data[own], w13.scale[own], w13.global_scale[e, half])
            assert same(got, nvm.quantize(jnp.asarray(matrix[e])))
        assert same(jax.tree.map(lambda leaf, e=e: leaf[e], w2), nvm.quantize(jnp.asarray(down[e])))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_each_matrix_is_quantised_by_itself(gated, rng):
    gate, up, down = matrices(rng, gated=gated)
    experts = nvm.quantize_experts(gate, up, down, separate_scales=True)
    assert_holds(experts, gate, up, down)
    assert experts.gated is gated
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (3, 64, 32)
    assert experts.layout == "linear"
    assert experts.activation_scheme == "per_token"
    assert experts.w13.shape == (3, 64 if gated else 32, 64)
    assert experts.w2.shape == (3, 64, 32)
    assert experts.w13.global_scale.shape == (3, 2 if gated else 1)
    assert experts.w2.global_scale.shape == (3,)
    assert (experts.w13_bias, experts.w2_bias) == (None, None)
    elements = up.size + down.size + (gate.size if gated else 0)
    assert experts.nbytes == elements // 2 + elements // 16 + 4 * (3 * (2 if gated else 1) + 3)
    nvm.validate(experts)


def test_gate_and_up_with_one_scale(rng):
    gate, up, down = matrices(rng)
    experts = nvm.quantize_experts(3 * gate, up, down)
    for index in range(3):
        both = nvm.quantize(jnp.concatenate([3 * gate[index], up[index]]))
        np.testing.assert_array_equal(experts.w13.data[index], both.data)
        np.testing.assert_array_equal(experts.w13.scale[index], both.scale)
    scale = np.asarray(experts.w13.global_scale)
    assert scale.shape == (3, 1)
    assert not experts.separate_scales
    separate = nvm.quantize_experts(3 * gate, up, down, separate_scales=True)
    assert separate.separate_scales
    own = np.asarray(separate.w13.global_scale)
    np.testing.assert_array_equal(scale[:, 0], own.max(axis=1))
    assert (own[:, 0] != own[:, 1]).all()
    bare = [nvm.quantize_experts(None, up, down, separate_scales=each) for each in (False, True)]
    np.testing.assert_array_equal(bare[0].w13.global_scale, bare[1].w13.global_scale)


@pytest.mark.parametrize("layout", ["linear", "trtllm", "cute_dsl"])
def test_share_scales(layout, rng):
    """Values move by what rounding block scales to E4M3 moves them, and by as much as is said."""
    gate, up, down = matrices(rng)
    experts = nvm.quantize_experts(3 * gate, up, down, separate_scales=True)
    shared, error = nvm.share_scales(to_layout(experts, layout))
    assert shared.layout == layout
    assert shared.w13.global_scale.shape == (3, 1)
    nvm.validate(shared)
    linear = to_layout(shared, "linear")
    np.testing.assert_array_equal(linear.w13.data, experts.w13.data)
    assert same(linear.w2, experts.w2)
    before, after = (np.asarray(nvm.dequantize(e.w13, jnp.float32)) for e in (experts, linear))
    moved = np.linalg.norm(after - before, axis=(1, 2)) / np.linalg.norm(before, axis=(1, 2))
    np.testing.assert_allclose(error, moved, rtol=1e-4)
    assert ((error > 0) & (error < 2**-4)).all()
    # Already shared: nothing moves. A quotient of 2: nothing is lost.
    assert nvm.share_scales(shared).experts is shared
    assert not np.any(nvm.share_scales(shared).relative_l2)
    doubled = nvm.quantize_experts(2 * up, up, down, separate_scales=True)
    exact, error = nvm.share_scales(doubled)
    np.testing.assert_array_equal(error, 0)
    np.testing.assert_array_equal(
        nvm.dequantize(exact.w13, jnp.float32), nvm.dequantize(doubled.w13, jnp.float32)
    )


def test_experts_from_two_arrays(rng):
    made = nvm.quantize_experts(*matrices(rng))
    experts = nvm.ExpertWeights(w13=made.w13, w2=made.w2)
    assert jax.tree.structure(experts) == jax.tree.structure(made)
    scaled = nvm.ExpertWeights(made.w13, made.w2, jnp.float32(1), jnp.float32(1))
    assert (scaled.activation_scheme, scaled.layout) == ("static", "linear")
    nvm.validate(scaled)
    with pytest.raises(ValueError, match="hidden_size is None with layout 'trtllm', whose arrays"):
        nvm.ExpertWeights(w13=made.w13, w2=made.w2, layout="trtllm")
    with pytest.raises(TypeError, match="w13 is 3, expected Nvfp4Array"):
        nvm.ExpertWeights(w13=3, w2=made.w2)
    # JAX builds experts around leaves of any kind.
    assert jax.tree.map(lambda leaf: leaf.ndim, experts).w13.data == 3


def test_rows_are_gate_then_up(rng):
    gate, up, down = matrices(rng)
    experts = nvm.quantize_experts(gate, up, down, separate_scales=True)
    values = np.asarray(nvm.dequantize(experts.w13, jnp.float32))
    for half, matrix in ((values[:, :32], gate), (values[:, 32:], up)):
        error = np.linalg.norm(half - matrix, axis=(1, 2)) / np.linalg.norm(matrix, axis=(1, 2))
        assert (error < 0.15).all()
    with pytest.raises(AssertionError):
        assert_holds(nvm.quantize_experts(up, gate, down, separate_scales=True), gate, up, down)


def test_gate_and_up_keep_their_own_global_scales(rng):
    gate, up, down = matrices(rng)
    gate = up * F32.type(2.0**-10)
    experts = nvm.quantize_experts(gate, up, down, separate_scales=True)
    scales = np.asarray(experts.w13.global_scale)
    np.testing.assert_array_equal(scales[:, 0], scales[:, 1] * 2.0**-10)
    amax = np.abs(np.stack([gate, up], axis=1)).max((2, 3))
    np.testing.assert_array_equal(scales, amax / F32.type(2688))
    np.testing.assert_array_equal(experts.w13.data[:, :32], experts.w13.data[:, 32:])
    np.testing.assert_array_equal(
        experts.w2.global_scale, np.abs(down).max((1, 2)) / F32.type(2688)
    )


def test_all_input_dtypes(rng):
    # Values that each dtype holds give the same experts, from numpy and from JAX.
    exact = [(rng.integers(-99, 100, m.shape) / 8).astype(F32) for m in matrices(rng)]
    want = nvm.quantize_experts(*exact)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        given = [m.astype(dtype) for m in exact]
        assert all((g.astype(F32) == m).all() for g, m in zip(given, exact, strict=True))
        assert same(nvm.quantize_experts(*given), want)
        assert same(nvm.quantize_experts(*map(jnp.asarray, given)), want)


def test_biases(rng):
    gate, up, down = matrices(rng)
    biases = {
        "gate_bias": rng.normal(size=(3, 32)).astype(F32),
        "up_bias": rng.normal(size=(3, 32)).astype(ml_dtypes.bfloat16),
        "down_bias": jnp.asarray(rng.normal(size=(3, 64)).astype(np.float16)),
    }
    experts = nvm.quantize_experts(gate, up, down, **biases)
    assert experts.w13_bias.dtype == experts.w2_bias.dtype == jnp.float32
    np.testing.assert_array_equal(experts.w13_bias[:, :32], biases["gate_bias"])
    np.testing.assert_array_equal(experts.w13_bias[:, 32:], biases["up_bias"].astype(F32))
    np.testing.assert_array_equal(experts.w2_bias, np.asarray(biases["down_bias"]).astype(F32))
    plain = nvm.quantize_experts(None, up, down, up_bias=biases["up_bias"])
    np.testing.assert_array_equal(plain.w13_bias, biases["up_bias"].astype(F32))
    assert plain.w2_bias is None


def test_activation_schemes_and_scales(rng):
    given = matrices(rng)
    build = functools.partial(nvm.quantize_experts, *given)
    assert build().activation_scheme == "per_token"
    assert build(activation_scheme="none").activation_scheme == "none"
    assert build(0.5, 0.25).activation_scheme == "static"
    assert build(0.5, 0.25, activation_scheme="static").activation_scheme == "static"
    scalars = build(np.float32(0.5), 0.25)
    assert (scalars.w13_input_scale, scalars.w2_input_scale) == (0.5, 0.25)
    assert scalars.w13_input_scale.shape == scalars.w2_input_scale.shape == ()
    assert scalars.w13_input_scale.dtype == scalars.w2_input_scale.dtype == jnp.float32
    per_expert = build(np.full((3, 2), 0.5), jnp.full((3,), 0.25))
    assert (per_expert.w13_input_scale.shape, per_expert.w2_input_scale.shape) == ((3, 2), (3,))
    assert per_expert.w13_input_scale.dtype == jnp.float32
    plain = nvm.quantize_experts(None, *given[1:], np.full((3, 1), 0.5), 1.0)
    assert plain.w13_input_scale.shape == (3, 1)
    for experts in (scalars, per_expert, plain):
        nvm.validate(experts)


def test_builds_while_tracing(rng):
    given = matrices(rng)
    want = nvm.quantize_experts(*given, 0.5, 0.25)
    assert same(jax.jit(nvm.quantize_experts)(*given, 0.5, 0.25), want)
    shapes = jax.eval_shape(nvm.quantize_experts, *given, 0.5, 0.25)
    assert jax.tree.structure(shapes) == jax.tree.structure(want)
    assert shapes.nbytes == want.nbytes


GATE, UP, DOWN = np.ones((2, 16, 32), F32), np.ones((2, 16, 32), F32), np.ones((2, 32, 16), F32)


def with_value(matrix, value, *where):
    matrix = matrix.copy()
    for index in where:
        matrix[index] = value
    return matrix


NOT_BUILT = {
    "two axes": (lambda: nvm.quantize_experts(None, UP[0], DOWN), r"up has shape \(16, 32\)"),
    "I of 24": (
        lambda: nvm.quantize_experts(None, np.ones((2, 24, 32), F32), DOWN),
        r"up has shape \(2, 24, 32\) with I = 24, expected a positive multiple of 16: pad it to 32",
    ),
    "H of 40": (
        lambda: nvm.quantize_experts(None, np.ones((2, 16, 40), F32), DOWN),
        "with H = 40, expected a positive multiple of 16: pad it to 48",
    ),
    "I of 0": (
        lambda: nvm.quantize_experts(None, np.ones((2, 0, 32), F32), DOWN),
        "with I = 0, expected a positive multiple of 16: pad it to 16",
    ),
    "transposed down": (
        lambda: nvm.quantize_experts(GATE, UP, UP),
        r"down has shape \(2, 16, 32\), .*rows are outputs, pass jnp.swapaxes\(down, 1, 2\)",
    ),
    "down of other sizes": (
        lambda: nvm.quantize_experts(GATE, UP, np.ones((2, 32, 48), F32)),
        r"down has shape \(2, 32, 48\), expected .*\(2, 32, 16\)",
    ),
    "transposed gate": (
        lambda: nvm.quantize_experts(DOWN, UP, DOWN),
        r"gate has shape \(2, 32, 16\), expected .*\(2, 16, 32\).*(swapaxes|transposed)",
    ),
    "gate of one expert": (
        lambda: nvm.quantize_experts(GATE[:1], UP, DOWN),
        r"gate has shape \(1, 16, 32\), expected",
    ),
    "NaN": (
        lambda: nvm.quantize_experts(GATE, with_value(UP, np.nan, (0, 3, 2), (1, 4, 5)), DOWN),
        "up.* 2 .*NaN or infinite",
    ),
    "infinity in gate": (
        lambda: nvm.quantize_experts(with_value(GATE, np.inf, (0, 3, 2)), UP, DOWN),
        "gate.* 1 .*NaN or infinite",
    ),
    "negative infinity in down": (
        lambda: nvm.quantize_experts(GATE, UP, with_value(DOWN, -np.inf, (1, 3, 2))),
        "down.* 1 .*NaN or infinite",
    ),
    "gate_bias alone": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, gate_bias=GATE[:, :, 0]),
        "up_bias is None, expected gate_bias and up_bias together or neither",
    ),
    "up_bias alone": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, up_bias=UP[:, :, 0]),
        "gate_bias is None, expected gate_bias and up_bias together or neither",
    ),
    "gate_bias without gate": (
        lambda: nvm.quantize_experts(None, UP, DOWN, gate_bias=GATE[:, :, 0]),
        "gate_bias was given, but gate is None",
    ),
    "bias of H": (
        lambda: nvm.quantize_experts(None, UP, DOWN, up_bias=DOWN[:, :, 0]),
        r"bias has shape \(2, 32\), expected \(2, 16\)",
    ),
    "down_bias of I": (
        lambda: nvm.quantize_experts(None, UP, DOWN, down_bias=UP[:, :, 0]),
        r"bias has shape \(2, 16\), expected \(2, 32\)",
    ),
    "w13_input_scale alone": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, 0.5),
        "experts.w2_input_scale is None, expected a float32 scale with activation_scheme='static'",
    ),
    "static without scales": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, activation_scheme="static"),
        "experts.w13_input_scale is None.*without calibration use 'per_token'",
    ),
    "a scale for each token": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, 0.5, 0.5, activation_scheme="per_token"),
        "experts.w13_input_scale is given, but activation_scheme is 'per_token'",
    ),
    "a scale for W4A16": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, w2_input_scale=0.5, activation_scheme="none"),
        "experts.w2_input_scale is given, but activation_scheme is 'none'",
    ),
    "a scale each, but not gate and up": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, np.ones(2), 0.5),
        r"experts.w13_input_scale has shape \(2,\), expected \(\) or \(2, 1\) or \(2, 2\)",
    ),
    "hidden scales of gate and up": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, 0.5, np.ones((2, 2))),
        r"experts.w2_input_scale has shape \(2, 2\), expected \(\) or \(2,\)",
    ),
    "an unknown scheme": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, activation_scheme="dynamic"),
        "activation_scheme is 'dynamic', expected one of .*'static', 'per_token', 'none'",
    ),
    "w13_input_scale of zero": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, 0.0, 0.5),
        "w13_input_scale: 1 of 1 values not finite and positive",
    ),
    "w2_input_scale of NaN": (
        lambda: nvm.quantize_experts(GATE, UP, DOWN, 0.5, with_value(np.ones(2), np.nan, 1)),
        r"w2_input_scale: 1 of 2 values not finite and positive.*w2_input_scale\[1\]",
    ),
}


@pytest.mark.parametrize("case", NOT_BUILT)
def test_does_not_build(case):
    call, message = NOT_BUILT[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["gate", "up", "down"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, E4M3], ids=str)
def test_does_not_build_from(dtype, name):
    given = {"gate": GATE, "up": UP, "down": DOWN}
    given[name] = given[name].astype(dtype)
    message = f"{name} has dtype {np.dtype(dtype)}, expected bfloat16, float16 or float32"
    with pytest.raises(TypeError, match=message):
        nvm.quantize_experts(**given)


# ------------------------------------------------------------------------------------- layouts

SIZES = {
    # name: (hidden, intermediate, gated, scheme), padded (H, I)
    "whole tiles": ((256, 64, True, "static"), (256, 64)),
    "padded": ((192, 48, True, "static"), (256, 64)),
    "padded plain": ((192, 48, False, "none"), (256, 128)),
    "plain per token": ((192, 48, False, "per_token"), (512, 128)),
    "gated per token": ((16, 80, True, "per_token"), (256, 128)),
}


def sized(rng, size):
    (hidden, intermediate, gated, scheme), _ = SIZES[size]
    return random_experts(rng, 2, hidden, intermediate, gated=gated, scheme=scheme)


@pytest.mark.parametrize("size", SIZES)
def test_every_layout_and_back(size, rng):
    linear = sized(rng, size)
    _, (hidden, intermediate) = SIZES[size]
    gates = 2 if linear.gated else 1
    prepared = {layout: nvm.prepare(linear, layout) for layout in KERNELS}
    for layout, experts in prepared.items():
        assert experts.layout == layout
        assert experts.w13.shape == (2, gates * intermediate, hidden)
        assert experts.w2.shape == (2, hidden, intermediate)
        assert experts.gated == linear.gated
        check_experts(experts)
        nvm.validate(experts)
        # What is not codes or block scales is untouched.
        for name in ("w13_input_scale", "w2_input_scale", "w13_bias", "w2_bias"):
            assert same(getattr(experts, name), getattr(linear, name))
        assert (experts.hidden_size, experts.intermediate_size) == SIZES[size][0][:2]
        # Padding is zero and nothing is lost: the same bytes, and zeros.
        for name in ("w13", "w2"):
            for field in ("data", "scale"):
                had, has = (
                    np.asarray(getattr(getattr(x, name), field)).view(np.uint8)
                    for x in (linear, experts)
                )
                counts = np.bincount(had.ravel(), minlength=256)
                counts[0] += has.size - had.size
                np.testing.assert_array_equal(np.bincount(has.ravel(), minlength=256), counts)
        for back in ("emulation", "cpu", "triton"):
            assert same(nvm.prepare(experts, back), linear)
    assert not same(prepared["trtllm"].w13, prepared["cute_dsl"].w13)
    assert same(nvm.prepare(prepared["trtllm"], "cute_dsl"), prepared["cute_dsl"])
    assert same(nvm.prepare(prepared["cute_dsl"], "trtllm"), prepared["trtllm"])


@each_layout
def test_prepared_experts_are_returned_as_they_are(layout, rng):
    experts = nvm.prepare(sized(rng, "padded"), IMPLEMENTATION[layout])
    names = [IMPLEMENTATION[layout], *(["cpu", "triton"] if layout == "linear" else [])]
    for name in names:
        assert nvm.prepare(experts, name) is experts


def golden_experts(data):
    gated = "reord_w13" in data

    def weights(name, groups):
        scale = data[name.replace("w", "s")].view(E4M3)
        return nvm.Nvfp4Array(
            jnp.asarray(data[name]), jnp.asarray(scale), jnp.ones(groups, jnp.float32)
        )

    gates = 2 if gated else 1
    return nvm.ExpertWeights(
        w13=weights("w13", (3, gates)),
        w2=weights("w2", (3,)),
        w13_input_scale=jnp.asarray(data["asc"][:, :gates]),
        w2_input_scale=jnp.asarray(data["a2"]),
        w13_bias=None,
        w2_bias=None,
        hidden_size=192,
        intermediate_size=48,
        activation_scheme="static",
        layout="linear",
    )


@each_kernel
@pytest.mark.parametrize("name", ["prep_gated", "prep_relu2"])
def test_prepared_equals_goldens(name, layout, golden):
    data = golden(name)
    linear = golden_experts(data)
    experts = nvm.prepare(linear, layout)
    assert (experts.w2.shape[1], experts.w2.shape[2]) == tuple(data["padded"])
    prefix = KERNELS[layout]

    def matches(experts):
        arrays = {
            "w13": experts.w13.data,
            "s13": experts.w13.scale,
            "w2": experts.w2.data,
            "s2": experts.w2.scale,
        }
        return [
            np.asarray(array).tobytes() == data[f"{prefix}_{key}"].tobytes()
            for key, array in arrays.items()
        ]

    assert all(matches(experts))
    assert same(nvm.prepare(experts, "emulation"), linear)
    if linear.gated:  # up before gate would be seen
        swapped = jax.tree.map(lambda a: jnp.roll(a, a.shape[1] // 2, axis=1), linear.w13)
        other = nvm.prepare(dataclasses.replace(linear, w13=swapped), layout)
        assert matches(other) == [False, False, True, True]


@each_kernel
def test_prepares_while_tracing(layout, rng):
    linear = sized(rng, "padded")
    want = nvm.prepare(linear, layout)
    assert same(jax.jit(nvm.prepare, static_argnums=1)(linear, layout), want)
    back = jax.jit(functools.partial(nvm.prepare, implementation="cpu"))
    assert same(back(want), linear)
    shapes = jax.eval_shape(functools.partial(nvm.prepare, implementation=layout), linear)
    assert jax.tree.structure(shapes) == jax.tree.structure(want)
    assert shapes.nbytes == want.nbytes


@each_kernel
def test_prepares_a_stack_of_layers(layout, rng):
    layers = [sized(rng, "padded") for _ in range(2)]
    want = [nvm.prepare(layer, layout) for layer in layers]

    @jax.jit
    def scanned(stack):
        return jax.lax.scan(lambda _, layer: (None, nvm.prepare(layer, layout)), None, stack)[1]

    assert same(scanned(stacked(layers)), stacked(want))
    assert same(jax.vmap(lambda layer: nvm.prepare(layer, layout))(stacked(layers)), stacked(want))
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked(layers))
        assert same(nvm.prepare(one, layout), want[i])
    with pytest.raises(ValueError, match=r"expected 3 axes, experts first.*lax.scan or vmap"):
        nvm.prepare(stacked(layers), layout)


def test_refuses_to_prepare(rng):
    experts = random_experts(rng)
    with pytest.raises(ValueError, match="implementation is 'trt', expected one of"):
        nvm.prepare(experts, "trt")
    with pytest.raises(TypeError, match=r"experts is a.*expected ExpertWeights"):
        nvm.prepare(experts.w13, "trtllm")


# ------------------------------------------------------------------------------------- take_experts


@each_layout
@pytest.mark.parametrize(
    ("shape", "size"),
    [((), "padded"), ((5,), "padded"), ((2, 3), "padded"), ((2, 3), "plain per token")],
    ids=str,
)
def test_select(size, shape, layout, rng):
    linear = sized(rng, size)
    experts = nvm.prepare(linear, IMPLEMENTATION[layout])
    ids = rng.integers(0, 2, shape).astype(np.int32)
    got = take_experts(experts, jnp.asarray(ids))
    want = dataclasses.replace(
        jax.tree.map(lambda leaf: np.asarray(leaf)[ids], linear),
        w13_input_scale=linear.w13_input_scale,  # the layer's
        w2_input_scale=linear.w2_input_scale,
    )
    assert same(got, want)
    assert got.layout == "linear"
    assert same(jax.jit(take_experts)(experts, jnp.asarray(ids)), want)
    assert not same(take_experts(experts, 1 - jnp.asarray(ids)), want)
    shapes = jax.eval_shape(take_experts, experts, jnp.asarray(ids))
    assert shapes.w13.shape == (*shape, *linear.w13.shape[1:])


def test_select_keeps_scalar_scales(rng):
    experts = dataclasses.replace(
        random_experts(rng, biases=False),
        w13_input_scale=jnp.float32(2),
        w2_input_scale=jnp.float32(3),
    )
    got = take_experts(experts, jnp.array([2, 0]))
    assert (got.w13_input_scale, got.w2_input_scale, got.w13_bias) == (2, 3, None)
    assert same(got.w2.global_scale, experts.w2.global_scale[np.array([2, 0])])


# ------------------------------------------------------------------------------------- checks


def changed(experts, path, change):
    """`experts` with change(value) at a dotted path."""
    name, _, rest = path.partition(".")
    value = getattr(experts, name)
    return dataclasses.replace(
        experts, **{name: changed(value, rest, change) if rest else change(value)}
    )


def to(dtype):
    return lambda array: array.astype(dtype)


def constantly(value):
    return lambda _: value


# path, change, error, message
UNFIT = [
    ("w13.data", to(jnp.int8), TypeError, "experts.w13.data has dtype int8, expected uint8"),
    ("w2.data", to(jnp.int32), TypeError, "experts.w2.data has dtype int32, expected uint8"),
    (
        "w13.scale",
        lambda a: jax.lax.bitcast_convert_type(a, jnp.uint8),
        TypeError,
        "experts.w13.scale has dtype uint8, expected float8_e4m3fn",
    ),
    ("w2.scale", to(jnp.float32), TypeError, "experts.w2.scale has dtype float32, expected float8"),
    (
        "w2.global_scale",
        to(jnp.bfloat16),
        TypeError,
        "experts.w2.global_scale has dtype bfloat16, expected float32",
    ),
    (
        "w13.data",
        lambda a: a[..., :-8],
        ValueError,
        r"experts.w13.data has shape \(3, 64, 24\), expected \(3, 64, 32\)",
    ),
    ("w13.data", lambda a: a[0], ValueError, "expected 3 axes, experts first"),
    (
        "w13.scale",
        lambda a: a[:, :32],
        ValueError,
        r"experts.w13.scale has shape \(3, 32, 4\), expected \(3, 64, 4\)",
    ),
    (
        "w2.scale",
        lambda a: a[:2],
        ValueError,
        r"experts.w2.scale has shape \(2, 64, 2\), expected \(3, 64, 2\)",
    ),
    ("w2", lambda w: jax.tree.map(lambda a: a[:2], w), ValueError, "experts.w2.data has shape"),
    (
        "w13.global_scale",
        lambda a: a[:, 0],
        ValueError,
        r"experts.w13.global_scale has shape \(3,\), expected \(3, 1\) or \(3, 2\)",
    ),
    (
        "w2.global_scale",
        lambda a: a[:, None],
        ValueError,
        r"experts.w2.global_scale has shape \(3, 1\), expected \(3,\)",
    ),
    (
        "w13_input_scale",
        constantly(None),
        ValueError,
        "experts.w13_input_scale is None, expected a float32 scale with activation_scheme='static'",
    ),
    ("w2_input_scale", constantly(None), ValueError, "experts.w2_input_scale is None, expected"),
    (
        "activation_scheme",
        constantly("per_token"),
        ValueError,
        "experts.w13_input_scale is given, but activation_scheme is 'per_token', which does not",
    ),
    ("activation_scheme", constantly("dynamic"), ValueError, "activation_scheme is 'dynamic'"),
    ("layout", constantly("row-major"), ValueError, "experts.layout is 'row-major', expected one"),
    ("layout", constantly("trtllm"), ValueError, r"experts.w2.data .* expected \(3, 256, 32\)"),
    (
        "w13_input_scale",
        lambda a: a[:, 0],
        ValueError,
        r"experts.w13_input_scale has shape \(3,\), expected \(\) or \(3, 1\) or \(3, 2\)",
    ),
    ("w2_input_scale", lambda a: a[:2], ValueError, r"experts.w2_input_scale has shape \(2,\)"),
    (
        "w13_bias",
        lambda a: a[:, :32],
        ValueError,
        r"experts.w13_bias has shape \(3, 32\), expected \(3, 64\)",
    ),
    ("w2_bias", lambda a: a[0], ValueError, r"experts.w2_bias has shape \(64,\), expected \(3, 64"),
    ("hidden_size", constantly(128), ValueError, r"experts.w2.data has shape \(3, 64, 16\), exp"),
    ("hidden_size", constantly(72), ValueError, "hidden_size=72"),
    ("intermediate_size", constantly(48), ValueError, "experts.w2.data has shape"),
]


@pytest.mark.parametrize(
    ("path", "change", "error", "message"), UNFIT, ids=lambda v: v if isinstance(v, str) else ""
)
def test_does_not_fit(path, change, error, message, rng):
    experts = random_experts(rng)
    check_experts(experts)
    broken = changed(experts, path, change)
    for check in (
        check_experts,
        nvm.validate,
        functools.partial(nvm.prepare, implementation="cpu"),
    ):
        with pytest.raises(error, match=message):
            check(broken)
    # Known while tracing: from shapes alone.
    with pytest.raises(error, match=message):
        jax.eval_shape(check_experts, broken)


def at(index, value):
    def change(array):
        copy = np.array(array)
        if copy.dtype == E4M3:
            copy.view(np.uint8)[index] = value
        else:
            copy[index] = value
        return copy

    return change


# path, change, what `validate` says of it
INVALID = [
    *(
        ("w13.global_scale", at((1, 1), value), "w13.global_scale: 1 of 6 values not finite and")
        for value in (0, -1, np.nan, np.inf, 1e-40)
    ),
    ("w13.global_scale", at((1, 0), 0), r"the first at w13.global_scale\[1\]\[0\]"),
    ("w2.global_scale", at(slice(1, 3), 0), "w2.global_scale: 2 of 3 values not finite and pos"),
    ("w2.global_scale", at(slice(1, 3), 0), r"the first at w2.global_scale\[1\]"),
    *(
        (f"{name}.scale", at((1, 2, 1), code), rf"{name}.scale: 1 of \d+ values {what}, the first")
        for name in ("w13", "w2")
        for code, what in ((0x7F, "NaN"), (0xFF, "NaN"), (0x81, "negative"), (0xFE, "negative"))
    ),
    ("w13.scale", at((1, 2, 3), 0x7F), r"first at w13.scale\[1\]\[2\]\[3\]"),
    *(
        (name, at(-1, value), rf"{name}: \d of \d values not finite and positive \(>= 1.18e-38\)")
        for name in ("w13_input_scale", "w2_input_scale")
        for value in (0, -0.5, np.nan, np.inf)
    ),
    *(
        (name, at((2, 5), value), rf"{name}: 1 of 192 values NaN or infinite.*{name}\[2\]\[5\]")
        for name in ("w13_bias", "w2_bias")
        for value in (np.nan, np.inf, -np.inf)
    ),
]


@pytest.mark.parametrize(("path", "change", "message"), INVALID)
def test_is_not_valid(path, change, message, rng):
    experts = random_experts(rng)
    nvm.validate(experts)
    broken = changed(experts, path, change)
    check_experts(broken)  # values are not its business
    with pytest.raises(ValueError, match=r"experts are not valid: .*" + message):
        nvm.validate(broken)


def test_all_problems_are_listed_at_once(rng):
    experts = random_experts(rng)
    experts = changed(experts, "w13.scale", at((0, 1, 2), 0x7F))
    experts = changed(experts, "w13.scale", at((2, 0, 0), 0x90))
    experts = changed(experts, "w2.global_scale", at(slice(1, 3), -1))
    experts = changed(experts, "w2_input_scale", constantly(jnp.float32(np.inf)))
    experts = changed(experts, "w2_bias", at((1, slice(3, 6)), np.nan))
    with pytest.raises(ValueError, match="experts are not valid") as caught:
        nvm.validate(experts)
    problems = str(caught.value).removeprefix("experts are not valid: ").split("; ")
    wanted = [
        r"w13.scale: 1 of 768 values NaN, the first at w13.scale\[0\]\[1\]\[2\]",
        r"w13.scale: 1 of 768 values negative, the first at w13.scale\[2\]\[0\]\[0\]",
        r"w2.global_scale: 2 of 3 values not finite.*, the first at w2.global_scale\[1\]",
        r"w2_input_scale: 1 of 1 values not finite.*, the first at w2_input_scale",
        r"w2_bias: 3 of 192 values NaN or infinite, the first at w2_bias\[1\]\[3\]",
    ]
    assert len(problems) == len(wanted)
    for problem, pattern in zip(problems, wanted, strict=True):
        assert re.match(pattern, problem)


def test_zero_and_negative_zero_block_scales_are_valid(rng):
    experts = random_experts(rng)
    nvm.validate(changed(experts, "w13.scale", at((0, 0, slice(None)), 0x80)))
    nvm.validate(changed(experts, "w2.scale", at(1, 0)))


@each_kernel
def test_prepared_experts_are_validated_too(layout, rng):
    experts = nvm.prepare(sized(rng, "padded"), layout)
    nvm.validate(experts)
    with pytest.raises(ValueError, match=r"w2.scale: 1 of .* NaN"):
        nvm.validate(changed(experts, "w2.scale", at((0, 3, 1), 0xFF)))


def test_validates_outside_jit_only(rng):
    with pytest.raises(TypeError, match=r"experts is being traced.*validate outside jit"):
        jax.jit(nvm.validate)(random_experts(rng))
    with pytest.raises(TypeError, match=r"experts is .*expected ExpertWeights: build it with"):
        nvm.validate({"w13": 0})


# ------------------------------------------------------------------------------------- pytree


def test_experts_are_a_pytree(rng):
    experts = random_experts(rng)
    leaves, treedef = jax.tree.flatten(experts)
    assert len(leaves) == 10
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert same(jax.tree.unflatten(treedef, leaves), experts)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(experts)]
    assert names[:3] == [".w13.data", ".w13.scale", ".w13.global_scale"]
    copy = jax.tree.map(jnp.copy, experts)
    assert isinstance(copy, nvm.ExpertWeights)
    assert same(copy, experts)
    without = random_experts(rng, scheme="none", biases=False)
    assert len(jax.tree.leaves(without)) == 6


def test_metadata_is_static_and_hashable(rng):
    experts = random_experts(rng)
    traces = []

    @jax.jit
    def layout_of(experts):
        traces.append((experts.layout, experts.hidden_size, experts.activation_scheme))
        return experts.w2.global_scale

    layout_of(experts)
    layout_of(jax.tree.map(jnp.copy, experts))
    assert traces == [("linear", 64, "static")]
    layout_of(nvm.prepare(experts, "cute_dsl"))
    assert traces[1:] == [("cute_dsl", 64, "static")]
    structure = jax.tree.structure(experts)
    assert hash(structure) == hash(jax.tree.structure(jax.tree.map(jnp.copy, experts)))
    assert structure != jax.tree.structure(dataclasses.replace(experts, layout="trtllm"))


@each_layout
def test_experts_move_between_devices(layout, rng):
    experts = nvm.prepare(random_experts(rng, num_experts=4), IMPLEMENTATION[layout])
    device = jax.devices()[1]
    moved = jax.device_put(experts, device)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(moved))
    assert same(moved, experts)
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(experts, jax.NamedSharding(mesh, jax.P("expert")))
    assert all(leaf.addressable_shards[0].data.shape[0] == 1 for leaf in jax.tree.leaves(split))
    assert same(split, experts)
    nvm.validate(split)
    assert same(nvm.prepare(split, "cpu"), nvm.prepare(experts, "cpu"))
