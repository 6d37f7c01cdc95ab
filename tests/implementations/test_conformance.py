"""Every implementation against the float64 oracle, over the whole matrix of cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import layouts
from tests.support import conformance, oracle
from tests.support.conformance import (
    CASES,
    IMPLEMENTATIONS,
    LAYOUT_CASES,
    SLOW_CASES,
    Case,
    check,
    layer_of,
    reference,
    run,
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=str,
)
def test_matches_float64(case, implementation, record_property):
    layer = layer_of(case)
    got, want = run(layer, implementation), reference(layer)
    record_property("relative_l2", float(oracle.relative_l2(got, want.out)))
    record_property("ties", check(got, want))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("target", ["trtllm", "cute_dsl"])
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_every_layout_gives_the_same_bits(case, target, implementation):
    layer = layer_of(case)
    prepared = nvm.prepare(layer.experts, target)
    assert prepared.layout == target
    np.testing.assert_array_equal(
        run(layer, implementation, experts=prepared), run(layer, implementation)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("tokens", "scheme"),
    [
        (2, "static"),
        pytest.param(12, "per_token", marks=pytest.mark.slow),
        pytest.param(12, "static", marks=pytest.mark.slow),
        pytest.param(2, "none", marks=pytest.mark.slow),
    ],
)
def test_eager_matches_float64(tokens, scheme, implementation):
    layer = layer_of(Case(tokens=tokens, num_experts=4, scheme=scheme))
    with jax.disable_jit():
        got = run(layer, implementation)
    check(got, reference(layer))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [2, 40])
def test_ids_out_of_range_contribute_nothing(tokens, implementation):
    layer = layer_of(Case(tokens=tokens))
    ids = layer.ids.copy()
    ids[::2, 0], ids[1::2, 1] = -1, 1000
    ids[0] = -5
    layer = dataclasses.replace(layer, ids=ids)
    got = run(layer, implementation)
    check(got, reference(layer))
    np.testing.assert_array_equal(got[0], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", conformance.DTYPES)
def test_no_tokens(dtype, implementation):
    layer = layer_of(Case(tokens=0, dtype=dtype))
    got = run(layer, implementation, output_dtype=None)
    assert got.shape == (0, 128)
    assert got.dtype == layer.x.dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("output", conformance.DTYPES)
def test_output_is_rounded_once(output, implementation):
    layer = layer_of(Case(dtype="float32"))
    exact = run(layer, implementation)
    got = run(layer, implementation, output_dtype=output)
    assert got.dtype == jnp.dtype(output)
    np.testing.assert_array_equal(got, exact.astype(jnp.dtype(output)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize(
    "mistake",
    [{"swap_gate_up": True}, {"nibbles": "high even"}, {"global_scales": False}],
    ids=lambda mistake: next(iter(mistake)),
)
def test_mistakes_fail(mistake, tokens, implementation):
    layer = layer_of(Case(tokens=tokens))
    wrong = reference(layer, **mistake)
    assert oracle.relative_l2(run(layer, implementation), wrong.out) > 100 * conformance.GATE
    with pytest.raises(pytest.fail.Exception):
        check(run(layer, implementation), wrong)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [2, 40])
def test_mistaken_scales_fail(tokens, implementation):
    layer = layer_of(Case(tokens=tokens))
    want, experts = reference(layer), layer.experts
    mistakes = {
        "input scale of one expert": dataclasses.replace(
            experts, w13_input_scale=experts.w13_input_scale.min()
        ),
        "no hidden scale": dataclasses.replace(experts, w2_input_scale=jnp.float32(1)),
        "gate's global scale for up": dataclasses.replace(
            experts,
            w13=dataclasses.replace(
                experts.w13, global_scale=experts.w13.global_scale[:, :1].repeat(2, axis=1)
            ),
        ),
        "swizzled scales read as linear": dataclasses.replace(
            experts,
            w13=dataclasses.replace(experts.w13, scale=layouts.swizzle_scales(experts.w13.scale)),
        ),
    }
    for name, wrong in mistakes.items():
        with pytest.raises(pytest.fail.Exception):
            check(run(layer, implementation, experts=wrong), want)
            print(f"not noticed: {name}")
    with pytest.raises(pytest.fail.Exception):
        check(run(layer, implementation) * 1.001, want)
