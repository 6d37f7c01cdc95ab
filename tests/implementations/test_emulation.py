"""The emulation's parts: its products agree, its tiles hold every pair, its memory is bounded."""

import dataclasses
import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.implementations.base import Call
from jax_nvfp4_moe.implementations.common import contractions as _contractions
from jax_nvfp4_moe.implementations.common import grouping as _grouping
from jax_nvfp4_moe.implementations.common.recipes import Recipe
from jax_nvfp4_moe.implementations.emulation import implementation as emulation
from tests.support import oracle
from tests.support.conformance import DTYPES, Case, check, make_layer, reference, run

# ------------------------------------------------------------------------------------- forms

FORMS = {
    "multiply_reduce": functools.partial(
        emulation.gather_rows, contract=_contractions.multiply_reduce
    ),
    "integer": functools.partial(
        emulation.gather_rows, contract=_contractions.integer_multiply_reduce
    ),
}


def rows_of(layer, form, numerics="kernel", ids=None):
    """[T, K, H]: every pair's row, from one of the forms."""
    dtype = jnp.dtype(layer.x.dtype)
    call = Call(layer.activation, dtype, None, layer.case.on_input)
    recipe = Recipe(call, layer.experts.activation_scheme, dtype, numerics)
    compute = emulation._grouped if form == "grouped" else FORMS[form]

    @jax.jit
    def rows(x, ids, weights, experts):
        operand = recipe.input_rows(x.astype(jnp.float32), experts)
        keywords = {"x": operand, "ids": ids, "topk_weights": weights, "experts": experts}
        return compute(recipe, **keywords).astype(jnp.float32)

    ids = layer.ids if ids is None else ids
    arguments = (jnp.asarray(a) for a in (layer.x, ids, layer.weights))
    return np.asarray(rows(*arguments, layer.experts))


def agree(got, want, *, rounded):
    """Within float32's summation error; rows that were rounded after it are mostly the same bits.

    An error of 1e-6 carries one value in some thousands across a boundary of the rounding, one ulp,
    or, worse but rarer, moves a code of a hidden row.
    """
    assert np.isfinite(want).all()
    assert np.any(want)
    if rounded:
        assert (got == want).mean() >= 0.99
    assert oracle.relative_l2(got, want) <= (1e-4 if rounded else 1e-6)


@pytest.mark.parametrize(
    ("changes", "numerics"),
    [
        ({}, "kernel"),
        ({"dtype": "float32", "biases": True, "activation": "swiglu_oai"}, "kernel"),
        ({"scheme": "per_token", "biases": True, "activation": "relu2"}, "kernel"),
        ({"scheme": "none", "dtype": DTYPES[0]}, "kernel"),
        *(
            pytest.param({"scheme": "none", "dtype": dtype}, "kernel", marks=pytest.mark.slow)
            for dtype in DTYPES[1:]
        ),
        ({}, "vllm"),
    ],
    ids=str,
)
def test_the_forms_give_the_same_rows(changes, numerics, rng):
    layer = make_layer(Case(6, 4, 2, 128, 64, **changes), rng)
    ids = layer.ids.copy()
    ids[0, 0], ids[1] = -1, 4
    w4a4 = layer.case.scheme != "none"
    forms = ["multiply_reduce", "grouped"]
    forms += ["integer"] if w4a4 and numerics == "kernel" else []
    rows = {form: rows_of(layer, form, numerics, ids) for form in forms}
    want = rows.pop("multiply_reduce")
    assert not np.any(want[(ids < 0) | (ids > 3)])
    assert np.all(np.any(want[(ids >= 0) & (ids <= 3)], axis=-1))
    for form, got in rows.items():
        assert not np.any(got[(ids < 0) | (ids > 3)]), form
        agree(got, want, rounded=layer.case.scheme != "none" or layer.case.dtype != "float32")
        for wrong in (got[::-1], got[:, ::-1], got * np.float32(1.001)):
            with pytest.raises(AssertionError):
                agree(wrong, want, rounded=True)


@pytest.mark.parametrize("scheme", ["static", "per_token"])
def test_sums_of_codes_are_the_products_of_values(scheme, rng):
    """The contractions alone, before any rounding: equal within float32's summation error."""
    layer = make_layer(Case(5, 3, 1, 256, 64, scheme=scheme), rng)
    call = Call(layer.activation, jnp.dtype(jnp.float32), None, False)
    recipe = Recipe(call, scheme, jnp.dtype(jnp.bfloat16))
    values = recipe.weight_values

    @jax.jit
    def multiplied(x, experts):
        rows = recipe.input_rows(x.astype(jnp.float32), experts)
        weights = jax.tree.map(lambda a: a[1], experts.w13)
        each = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (5, *a.shape)), weights)
        products = {
            "dot": _contractions.decode_and_dot(rows, weights, values),
            "reduce": _contractions.multiply_reduce(rows, each, values),
            "integer": _contractions.integer_multiply_reduce(rows, each, values),
        }
        return products, jnp.stack(rows.values(), axis=-1).reshape(5, -1)

    products, operand = multiplied(jnp.asarray(layer.x), layer.experts)
    weights = jax.tree.map(lambda a: np.asarray(a[1]), layer.experts.w13)
    decoded = dataclasses.replace(weights, global_scale=np.float32(1))
    want = np.asarray(operand).astype(np.float64) @ oracle.decode(decoded, ()).T
    for got in products.values():
        assert oracle.relative_l2(got, want) < 5e-7


# ------------------------------------------------------------------------------------- grouping


@functools.partial(jax.jit, static_argnums=(1, 2))
def grouped(ids, num_experts, rows):
    """A grouping, all the tiles it can have, and the pairs' numbers brought back in order."""
    grouping = _grouping.group(ids, num_experts, rows)
    most = num_experts + ids.size // rows
    tiles = jax.lax.map(lambda index: grouping.tile(index, rows), jnp.arange(most, dtype=jnp.int32))
    padded = jnp.concatenate([grouping.order, jnp.full(rows, -1, jnp.int32)])
    return grouping.num_tiles, tiles, grouping.unsort(padded[:, None])


@st.composite
def routings(draw):
    tokens, top_k, num_experts, rows = draw(
        st.sampled_from([(1, 1, 1, 1), (5, 2, 3, 2), (7, 3, 6, 4), (16, 2, 4, 8), (4, 4, 2, 32)])
    )
    some = st.integers(-2, num_experts + 1) | st.sampled_from([-(2**31), 2**31 - 1])
    choice = draw(st.sampled_from([some, st.integers(0, num_experts - 1), st.just(0)]))
    size = tokens * top_k
    ids = draw(st.lists(choice, min_size=size, max_size=size))
    return np.array(ids, np.int32).reshape(tokens, top_k), num_experts, rows


@hypothesis.settings(max_examples=100)
@hypothesis.given(routings())
def test_tiles_hold_every_pair_once(routing):
    ids, num_experts, rows = routing
    num_tiles, tiles, order = grouped(jnp.asarray(ids), num_experts, rows)
    wanted = []  # (expert, where it begins, its pairs)
    first = 0
    for expert in range(num_experts):
        pairs = np.flatnonzero(ids.reshape(-1) == expert)
        for start in range(0, len(pairs), rows):
            wanted.append((expert, first + start, pairs[start : start + rows].tolist()))
        first += len(pairs)
    assert num_tiles == len(wanted)
    for index, (expert, start, pairs) in enumerate(wanted):
        tile = jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), tiles)
        assert (tile.expert, tile.first) == (expert, start)
        assert tile.pair[tile.live].tolist() == pairs
        assert not np.any(tile.live[len(pairs) :])  # live rows come first
        assert np.all((tile.pair >= 0) & (tile.pair < ids.size))
    np.testing.assert_array_equal(np.asarray(order)[:, 0], np.arange(ids.size))


@hypothesis.given(st.integers(0, 3000), st.integers(1, 64), st.integers(1, 512))
def test_tile_rows(tokens, top_k, num_experts):
    top_k = min(top_k, num_experts)
    rows = _grouping.tile_rows(tokens, top_k, num_experts)
    assert 1 <= rows <= 256
    assert rows & (rows - 1) == 0
    assert rows < 2 * max(1, tokens)  # no more than a token's power of two
    average = tokens * top_k / max(1.0, _grouping.expected_hits(tokens, top_k, num_experts))
    assert rows >= min(average, 256) * (1 - 1e-9)  # averages are not exact
    assert rows <= max(1.0, 2.5 * average)


def test_expected_hits(rng):
    assert _grouping.expected_hits(0, 2, 8) == 0
    assert _grouping.expected_hits(1, 2, 8) == pytest.approx(2)
    assert _grouping.expected_hits(3, 8, 8) == 8
    assert _grouping.expected_hits(1, 9, 8) == 8
    tokens, top_k, num_experts = 6, 3, 16
    drawn = [
        len({e for _ in range(tokens) for e in rng.choice(num_experts, top_k, replace=False)})
        for _ in range(2000)
    ]
    expected = _grouping.expected_hits(tokens, top_k, num_experts)
    assert np.mean(drawn) == pytest.approx(expected, abs=5 * np.std(drawn) / math.sqrt(2000))


# ------------------------------------------------------------------------------------- skew


@pytest.mark.parametrize("scheme", ["static", "none"])
def test_uneven_routing(scheme, rng):
    """The same program with every token at one expert, at two, or at none."""
    layer = make_layer(Case(40, 8, 2, 128, 64, scheme=scheme), rng)
    spread = np.stack([np.full(40, 7), np.arange(40) % 2], axis=1).astype(np.int32)
    for ids in (np.full((40, 2), 3, np.int32), spread, np.full((40, 2), -1, np.int32)):
        skewed = dataclasses.replace(layer, ids=ids)
        check(run(skewed, "emulation"), reference(skewed))


# ------------------------------------------------------------------------------------- memory

HIDDEN, INTERMEDIATE = 256, 256


def compiled(tokens, num_experts, scheme, gradient):
    scales = {}
    if scheme == "static":
        scales = {"w13_input_scale": jnp.float32(1e-3), "w2_input_scale": jnp.float32(1e-3)}

    def build():
        gate, up = jnp.zeros((2, num_experts, INTERMEDIATE, HIDDEN))
        down = jnp.zeros((num_experts, HIDDEN, INTERMEDIATE))
        return nvm.quantize_experts(gate, up, down, activation_scheme=scheme, **scales)

    def call(x, ids, weights, experts):
        y = nvm.nvfp4_moe_routed(x, ids, weights, experts, implementation="emulation")
        return jnp.sum(y.astype(jnp.float32)) if gradient else y

    arguments = (
        jax.ShapeDtypeStruct((tokens, HIDDEN), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, 2), jnp.int32),
        jax.ShapeDtypeStruct((tokens, 2), jnp.float32),
        jax.eval_shape(build),
    )
    return jax.jit(jax.grad(call) if gradient else call).lower(*arguments).compile()


@pytest.mark.parametrize(("tokens", "gradient"), [(4, False), (512, False), (512, True)])
@pytest.mark.parametrize("scheme", ["static", "none"])
def test_never_all_experts_at_once(tokens, scheme, gradient):
    one_expert = 3 * HIDDEN * INTERMEDIATE  # values

    def temporary(num_experts):
        return compiled(tokens, num_experts, scheme, gradient).memory_analysis().temp_size_in_bytes

    few, many = temporary(16), temporary(64)
    # Less than even the bytes of all experts' codes, not to speak of decoded weights.
    assert many < 64 * one_expert // 4
    # Only indices grow with the experts. (With more of them, tiles have fewer rows.)
    assert many - few < 16 * 1024


def test_all_experts_at_once_would_be_noticed():
    def decoded(experts):
        return jnp.sum(jnp.sort(nvm.dequantize(experts.w13, jnp.bfloat16), axis=-1))

    leaves = compiled(4, 64, "none", False).in_avals[0][3]
    memory = jax.jit(decoded).lower(leaves).compile().memory_analysis()
    assert memory.temp_size_in_bytes > 64 * HIDDEN * INTERMEDIATE
