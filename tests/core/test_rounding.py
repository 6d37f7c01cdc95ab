"""Roundings and divisions against ml_dtypes and numpy, to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_nvfp4_moe import rounding
from tests.support.bits import (
    BF16,
    E2M1,
    E2M1_TIES,
    E2M1_VALUES,
    E4M3,
    F16,
    F32,
    MAX,
    TINY,
    around,
    assert_same_bits,
    finite_values,
    in_each_mode,
    nearest_codes,
    random_normal_floats,
    run,
)

FEW = settings(max_examples=40)

# ------------------------------------------------------------------------------------- rounding


def cast(x, dtype):
    """Rounded by ml_dtypes or numpy; beyond 448, where a cast gives NaN, E4M3 saturates."""
    x = np.clip(x, -448, 448) if dtype == E4M3 else x
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype).astype(F32)


@in_each_mode
@pytest.mark.parametrize(
    ("dtype", "boundaries"), [(BF16, 32639), (F16, 31743), (E4M3, 126)], ids=str
)
def test_rounds_at_every_boundary(dtype, boundaries, mode, rng):
    values = finite_values(dtype)
    middles = ((values[1:] + values[:-1]) / 2).astype(F32)
    assert len(middles) == boundaries
    np.testing.assert_array_equal(middles, (values[1:] + values[:-1]) / 2)  # none was rounded
    if mode == "jit, constant":
        middles = middles[:: max(1, boundaries // 2000)]  # XLA folds constants slowly
    top = F32.type(values[-1])
    over = [top * F32.type(r) for r in (1.001, 1.03, 1.04, 1.3)] if dtype != BF16 else []
    rest = [*over, top, MAX, np.inf, 0.0, TINY, 1e-30]
    random = rng.normal(size=2000) * 2.0 ** rng.integers(-30, 30, 2000)
    x = np.concatenate([around(middles), around(np.array(rest, F32)), random.astype(F32)])
    x = np.append(x, F32.type(np.nan))
    want = cast(x, dtype)
    got = run(mode, functools.partial(rounding.round_to, dtype=dtype), x)
    assert_same_bits(got, want)
    assert np.isnan(got).sum() == np.isnan(x).sum() == 1 + 2 * np.isnan(x[:-1]).sum()
    if dtype == E4M3:
        assert np.nanmax(got) == 448
    elif dtype == F16:
        assert np.isinf(got).any()


def test_ties_are_what_the_boundaries_test():
    # Half to even, and not half up or truncated: those differ at half or more of the middles.
    values = finite_values(E4M3)
    middles = ((values[1:] + values[:-1]) / 2).astype(F32)
    got = np.asarray(rounding.round_to(jnp.asarray(middles), E4M3))
    assert (got == values[1:]).sum() == (got == values[:-1]).sum() == 63


def test_float32_is_left_alone(rng):
    x = jnp.asarray(rng.normal(size=8).astype(F32))
    assert rounding.round_to(x, jnp.float32) is x


@in_each_mode
def test_codes_at_every_boundary(mode, rng):
    rest = np.array([0, 1e-30, 6, 6.5, 7, 8, 100, MAX, np.inf], F32)
    random = rng.normal(size=4000).astype(F32) * 3
    x = np.concatenate([around(E2M1_TIES), around(rest), around(E2M1_VALUES[:8]), random])
    x = x[~np.isnan(x)]
    want = x.astype(E2M1).view(np.uint8)
    got = run(mode, rounding.e2m1_codes, x)
    assert_same_bits(got, want)
    # And by the definition, where rounding is to be seen: the nearest, of two the even code.
    np.testing.assert_array_equal(got, nearest_codes(x))


def test_every_bfloat16_has_the_code_of_its_cast():
    x = np.arange(2**16).astype(np.uint16).view(BF16).astype(F32)
    x = x[~np.isnan(x)]
    got = np.asarray(jax.jit(rounding.e2m1_codes)(x))
    assert_same_bits(got, x.astype(E2M1).view(np.uint8))
    assert_same_bits(got, np.asarray(jnp.asarray(x).astype(jnp.float4_e2m1fn)).view(np.uint8))


def test_codes_of_zeros_infinities_and_nan():
    x = jnp.array([0.0, -0.0, 1e-30, -1e-30, jnp.inf, -jnp.inf, jnp.nan, -jnp.nan])
    codes = np.asarray(rounding.e2m1_codes(x))
    assert codes[:6].tolist() == [0, 8, 0, 8, 7, 15]
    assert (codes[6:] & 7 == 0).all()


# ------------------------------------------------------------------------------------- division


def assert_divides(got, a, b):
    """`got` is numpy's float32 quotient; where that is subnormal, it may be zero instead."""
    with np.errstate(all="ignore"):
        want = a / b
    small = (np.abs(want) <= TINY) & (want != 0)
    assert_same_bits(np.where(small & (got == 0), want, got), want)
    np.testing.assert_array_equal(np.signbit(got[small]), np.signbit(want[small]))


# What a CPU runs, and what the others do, which is plain integer arithmetic that runs here too.
divisions = pytest.mark.parametrize("divide", [rounding.exact_divide, rounding._long_divide])


@divisions
@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_division_is_correctly_rounded(mode, divide, rng):
    a, b = random_normal_floats(rng, 2**18), random_normal_floats(rng, 2**18)
    # Half of the pairs near each other, so that quotients are mostly in range.
    near = a.view(np.uint32) & 0xFF800000 | rng.integers(0, 1 << 23, a.shape).astype(np.uint32)
    b[::2] = near.view(F32)[::2]
    assert_divides(run(mode, divide, a, b), a, b)
    # What the compilers make of it elsewhere, a product with the reciprocal, is told apart.
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        assert_divides(a * (np.float32(1) / b), a, b)


@divisions
def test_division_by_every_block_scale(divide, rng):
    scales = finite_values(E4M3)[1:].astype(F32)
    gains = np.abs(random_normal_floats(rng, 2048))
    a, b = (np.ascontiguousarray(v) for v in np.broadcast_arrays(gains[:, None], scales))
    assert_divides(run("jit", divide, a, b), a, b)
    assert_divides(run("jit", divide, -b, a), -b, a)


@divisions
@pytest.mark.parametrize("constant", [2688, 3, 0.0013377, 7e9])
def test_division_by_a_constant(constant, divide, rng):
    """Compilers make a product of it."""
    a, b = random_normal_floats(rng, 4096), np.full(4096, constant, F32)
    assert_divides(run("jit", lambda a: divide(a, jnp.full_like(a, b[0])), a), a, b)
    assert_divides(run("jit", lambda a: divide(jnp.full_like(a, b[0]), a), a), b, a)
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        assert_divides(a * (np.float32(1) / b), a, b)


@divisions
@pytest.mark.parametrize("mode", ["jit", "jit, constant"])
def test_division_at_the_edges(mode, divide):
    numbers = [TINY, np.nextafter(TINY, F32.type(1)), 1, 2688, np.nextafter(F32.type(2), 0), MAX]
    numbers = np.array([0, np.inf, np.nan, *numbers], F32)
    numbers = np.concatenate([numbers, -numbers])
    a, b = (v.ravel() for v in np.meshgrid(numbers, numbers))
    assert_divides(run(mode, divide, a, b), a, b)


def test_subnormal_operands_take_the_ordinary_division():
    numbers = np.array([1e-45, 1e-40, -1e-39, np.nextafter(TINY, F32.type(0)), 1, -3, MAX], F32)
    a, b = (v.ravel() for v in np.meshgrid(numbers, numbers))
    subnormal = (np.abs(a) < TINY) | (np.abs(b) < TINY)
    a, b = jnp.asarray(a[subnormal]), jnp.asarray(b[subnormal])
    got, ordinary = jax.jit(lambda a, b: (rounding._long_divide(a, b), a / b))(a, b)
    assert_same_bits(np.asarray(got), np.asarray(ordinary))


_divide, _long_divide = jax.jit(rounding.exact_divide), jax.jit(rounding._long_divide)
_normal_floats = hnp.arrays(F32, 8, elements=st.floats(width=32, allow_subnormal=False))


@FEW
@given(_normal_floats, _normal_floats)
def test_any_division(a, b):
    assert_divides(np.asarray(_divide(a, b)), a, b)
    assert_divides(np.asarray(_long_divide(a, b)), a, b)


def test_reciprocal_is_a_division(rng):
    x = np.exp2(rng.uniform(-100, 100, 4096)).astype(F32)
    assert_same_bits(np.asarray(rounding.reciprocal(jnp.asarray(x))), np.float32(1) / x)
