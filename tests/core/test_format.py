"""The format: roundings, division, codes, packing, and the quantiser against plain numpy."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import format as nvfp4

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
MAX, TINY = np.finfo(F32).max, np.finfo(F32).tiny

# What the sixteen codes mean, written out once more.
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
E2M1_TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], F32)

FEW = settings(max_examples=40)
in_each_mode = pytest.mark.parametrize("mode", ["eager", "jit", "jit, constant"])
each_dtype = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)


def run(mode, f, *arrays):
    """f(*arrays) operation by operation, compiled, or compiled with the arrays as constants."""
    arrays = jax.tree.map(jnp.asarray, arrays)
    if mode == "eager":
        with jax.disable_jit():
            result = f(*arrays)
    elif mode == "jit":
        result = jax.jit(f)(*arrays)
    else:
        result = jax.jit(lambda: f(*arrays))()
    return jax.tree.map(np.asarray, result)


def assert_same_bits(got, want):
    """Equal dtype, shape and bits, the sign of zero included; any NaN equals any other."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(want[want == 0]))


def same_arrays(a, b):
    return jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), a, b)
    )


def around(points):
    """The points, and one ulp to each side, of both signs."""
    with np.errstate(over="ignore", under="ignore"):
        up, down = (np.nextafter(points, F32.type(to)) for to in (np.inf, -np.inf))
    return np.concatenate([points, up, down, -points, -up, -down]).astype(F32)


# ------------------------------------------------------------------------------------- rounding


def finite_values(dtype):
    """All non-negative finite values of a narrow type, ascending."""
    bits = np.arange(2 ** (8 * dtype.itemsize - 1)).astype(f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        values = bits.view(dtype).astype(np.float64)
    return values[np.isfinite(values)]


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
    got = run(mode, functools.partial(nvfp4.round_to, dtype=dtype), x)
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
    got = np.asarray(nvfp4.round_to(jnp.asarray(middles), E4M3))
    assert (got == values[1:]).sum() == (got == values[:-1]).sum() == 63


def test_float32_is_left_alone(rng):
    x = jnp.asarray(rng.normal(size=8).astype(F32))
    assert nvfp4.round_to(x, jnp.float32) is x


@in_each_mode
def test_codes_at_every_boundary(mode, rng):
    rest = np.array([0, 1e-30, 6, 6.5, 7, 8, 100, MAX, np.inf], F32)
    random = rng.normal(size=4000).astype(F32) * 3
    x = np.concatenate([around(E2M1_TIES), around(rest), around(E2M1_VALUES[:8]), random])
    x = x[~np.isnan(x)]
    want = x.astype(E2M1).view(np.uint8)
    got = run(mode, nvfp4.e2m1_codes, x)
    assert_same_bits(got, want)
    # And by the definition, where rounding is to be seen: the nearest, of two the even code.
    np.testing.assert_array_equal(got, nearest_codes(x))


def test_every_bfloat16_has_the_code_of_its_cast():
    x = np.arange(2**16).astype(np.uint16).view(BF16).astype(F32)
    x = x[~np.isnan(x)]
    got = np.asarray(jax.jit(nvfp4.e2m1_codes)(x))
    assert_same_bits(got, x.astype(E2M1).view(np.uint8))
    assert_same_bits(got, np.asarray(jnp.asarray(x).astype(jnp.float4_e2m1fn)).view(np.uint8))


def test_codes_of_zeros_infinities_and_nan():
    x = jnp.array([0.0, -0.0, 1e-30, -1e-30, jnp.inf, -jnp.inf, jnp.nan, -jnp.nan])
    codes = np.asarray(nvfp4.e2m1_codes(x))
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


def random_normal_floats(rng, size):
    """Every bit pattern of a finite, not subnormal float32 is as likely as every other."""
    bits = rng.integers(1 << 23, 255 << 23, size).astype(np.uint32)
    return (bits | (rng.integers(0, 2, size).astype(np.uint32) << 31)).view(F32)


# What a CPU runs, and what the others do, which is plain integer arithmetic that runs here too.
divisions = pytest.mark.parametrize("divide", [nvfp4.exact_divide, nvfp4._long_divide])


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
    got, ordinary = jax.jit(lambda a, b: (nvfp4._long_divide(a, b), a / b))(a, b)
    assert_same_bits(np.asarray(got), np.asarray(ordinary))


_divide, _long_divide = jax.jit(nvfp4.exact_divide), jax.jit(nvfp4._long_divide)
_normal_floats = hnp.arrays(F32, 8, elements=st.floats(width=32, allow_subnormal=False))


@FEW
@given(_normal_floats, _normal_floats)
def test_any_division(a, b):
    assert_divides(np.asarray(_divide(a, b)), a, b)
    assert_divides(np.asarray(_long_divide(a, b)), a, b)


def test_reciprocal_is_a_division(rng):
    x = np.exp2(rng.uniform(-100, 100, 4096)).astype(F32)
    assert_same_bits(np.asarray(nvfp4.reciprocal(jnp.asarray(x))), np.float32(1) / x)


# ------------------------------------------------------------------------------------- quantise


def nearest_codes(x):
    """E2M1 codes by measuring the distance to each magnitude; of two equally near, the even one."""
    even_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    magnitudes = E2M1_VALUES[even_first].astype(np.float64)
    a = np.minimum(np.abs(x.astype(np.float64)), 8)  # beyond 7, 6 is the nearest anyway
    nearest = even_first[np.argmin(np.abs(a[..., None] - magnitudes), axis=-1)]
    return (nearest + 8 * np.signbit(x)).astype(np.uint8)


def row_scales(global_scale, rows):
    """The global scale of each row, by index: axis i falls into as many groups as it has scales."""
    groups = [np.arange(n) * k // n for n, k in zip(rows, global_scale.shape, strict=False)]
    picked = global_scale[np.ix_(*groups)] if groups else global_scale
    return np.broadcast_to(np.expand_dims(picked, tuple(range(picked.ndim, len(rows)))), rows)


def reference_quantise(x, global_scale, sixth=lambda amax: amax * F32.type(1 / 6)):
    """Codes and block scales, all in float32 numpy: the formula of vLLM's Triton kernel."""
    x = x.astype(F32)
    gain = 1 / row_scales(np.asarray(global_scale, F32), x.shape[:-1])
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    wanted = gain[..., None] * sixth(np.abs(blocks).max(-1))
    scale = np.clip(wanted, 0, 448).astype(E4M3)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, F32.type(0), gain[..., None] / scale.astype(F32))
    codes = nearest_codes(blocks * inverse[..., None]).reshape(x.shape)
    return codes[..., 0::2] + 16 * codes[..., 1::2], scale


def reference_dequantise(data, scale, global_scale):
    """float32 values by looking codes up."""
    codes = np.stack([data % 16, data // 16], -1).reshape(*data.shape[:-1], -1)
    steps = scale.astype(F32) * row_scales(np.asarray(global_scale), data.shape[:-1])[..., None]
    return E2M1_VALUES[codes] * np.repeat(steps, 16, axis=-1)


def mixed_rows(rng, *shape):
    """Rows to quantise: ordinary, tiny, large, full of ties, with zeros of both signs."""
    x = rng.normal(size=shape).reshape(-1, shape[-1])
    for row in range(len(x)):
        x[row] *= (1, 1e-4, 300, 1, 1e-3)[row % 5]
        if row % 5 == 3:
            x[row] = rng.integers(-24, 25, shape[-1]) / 4
            x[row, ::16] = 6  # so that the block's scale is a power of two where the gain is
        if row % 5 == 4:
            x[row, :16] = np.where(rng.integers(0, 2, 16), 0.0, -0.0)
    return x.reshape(shape).astype(F32)


def scales(rng, *shape):
    return np.exp2(rng.uniform(-9, -5, shape)).astype(F32)


def assert_is_reference(q, x, global_scale):
    data, scale = reference_quantise(x, global_scale)
    assert (q.data.dtype, q.scale.dtype, q.global_scale.dtype) == (np.uint8, E4M3, F32)
    assert q.shape == x.shape
    assert_same_bits(np.asarray(q.global_scale), np.asarray(global_scale, F32))
    assert_same_bits(np.asarray(q.scale).view(np.uint8), scale.view(np.uint8))
    assert_same_bits(np.asarray(q.data), data)


@pytest.mark.parametrize(
    ("shape", "per", "dtype"),
    [
        ((48,), "tensor", F32),
        ((7, 16), "tensor", F32),
        ((2, 3, 64), "tensor", BF16),
        ((2, 3, 64), "expert", F32),
        ((2, 3, 64), "row", F16),
        ((2, 2, 3, 32), "row", F32),
        ((2, 2, 3, 32), "expert", BF16),
        ((48,), "row", BF16),
    ],
    ids=str,
)
def test_quantise_with_its_own_scale(shape, per, dtype, rng):
    x = mixed_rows(rng, *shape).astype(dtype)
    leading = {"tensor": 0, "expert": 1, "row": x.ndim - 1}[per]
    amax = np.abs(x.astype(F32)).max(axis=tuple(range(leading, x.ndim)))
    global_scale = np.where(amax == 0, F32.type(1), amax / F32.type(2688))
    assert_is_reference(nvm.quantize(jnp.asarray(x), per=per), x, global_scale)


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((48,), (), F32),
        ((4, 6, 32), (), BF16),
        ((4, 6, 32), (4,), F32),
        ((4, 6, 32), (4, 2), F32),  # gate and up
        ((4, 6, 32), (2, 3), F16),
        ((4, 6, 32), (4, 6), F32),
        ((2, 3, 4, 32), (2, 1, 2), BF16),
    ],
    ids=str,
)
def test_quantise_at_given_scales(shape, groups, dtype, rng):
    x = mixed_rows(rng, *shape).astype(dtype)
    global_scale = scales(rng, *groups)
    assert_is_reference(nvm.quantize(jnp.asarray(x), global_scale), x, global_scale)
    if global_scale.size > 1:  # the groups matter, and in this order
        backwards = nvm.quantize(jnp.asarray(x), np.ascontiguousarray(np.flip(global_scale)))
        assert (np.asarray(backwards.data) != reference_quantise(x, global_scale)[0]).any()


@in_each_mode
def test_quantise_in_every_mode(mode, rng):
    x = mixed_rows(rng, 40, 64)
    global_scale = np.float32([2**-8, 0.0031, 1 / 672, 0.07])
    q = run(mode, nvm.quantize, x, global_scale)
    assert_is_reference(q, x, global_scale)
    got = run(mode, functools.partial(nvm.dequantize, dtype=jnp.float32), q)
    np.testing.assert_array_equal(got, reference_dequantise(q.data, q.scale, global_scale))


@pytest.mark.parametrize("mode", ["jit", "jit, constant"])
def test_block_scales_at_their_ties(mode):
    # At this gain the order of the two products decides: XLA may not change it.
    gain = F32.type(672)
    values = finite_values(E4M3)[8:]
    ties = ((values[1:] + values[:-1]) / 2 * 6 / gain).astype(F32)
    x = np.zeros((6 * len(ties), 16), F32)
    x[:, 3] = around(ties)
    assert_is_reference(run(mode, nvm.quantize, x, 1 / gain), x, 1 / gain)
    _, scale = reference_quantise(x, 1 / gain)
    _, divided = reference_quantise(x, 1 / gain, lambda amax: amax / F32.type(6))
    folded = (np.abs(x).max(-1, keepdims=True) * (gain * F32.type(1 / 6))).astype(E4M3)
    assert (scale != divided).any()
    assert (scale != folded).any()


def test_quantise_takes_a_python_float_and_numpy():
    x = np.linspace(-5, 5, 32, dtype=F32)
    want = nvm.quantize(jnp.asarray(x), jnp.float32(0.01))
    for scale in (0.01, np.float32(0.01), np.float64(0.01)):
        assert same_arrays(nvm.quantize(x, scale), want)


def test_vmap_is_quantise_of_each(rng):
    x = jnp.asarray(mixed_rows(rng, 4, 5, 32))
    each = [nvm.quantize(row) for row in x]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    assert same_arrays(jax.vmap(nvm.quantize)(x), want)
    assert same_arrays(nvm.quantize(x, per="expert"), want)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (2, 0, 32)])
def test_nothing_to_quantise(shape):
    q = nvm.quantize(jnp.zeros(shape))
    assert q.shape == shape
    assert q.global_scale == 1
    assert nvm.dequantize(q).shape == shape


# What quantising loses.


def error_bound(x, global_scale):
    """The largest |x - dequantise(quantise(x))| of each block of 16, in float64.

    With g the global scale and t = amax / (6 g), the block's ideal scale: the stored scale s is
    within t/16 of t where s is normal, and within 2**-10 below, where it may be zero. A code is off
    by at most one step of s*g, which is half of the distance between 4 and 6; and an element that
    saturates by at most 6 (t - s) g.
    """
    t = np.abs(x.astype(np.float64).reshape(*x.shape[:-1], -1, 16)).max(-1) / 6 / global_scale
    bound = np.maximum(np.maximum(t * 17 / 16, t + 2**-10), 6 * 2**-10) * global_scale
    return bound * (1 + 2**-20)  # and float32


_quantise = jax.jit(nvm.quantize)
_dequantise = jax.jit(functools.partial(nvm.dequantize, dtype=jnp.float32))
_magnitudes = st.floats(2.0**-60, 2.0**60, width=32) | st.just(0.0)
_elements = st.builds(lambda a, negative: -a if negative else a, _magnitudes, st.booleans())
_blocks = hnp.arrays(F32, (2, 32), elements=_elements)


def errors(x, q):
    difference = np.abs(x.astype(np.float64) - np.asarray(_dequantise(q)).astype(np.float64))
    return difference.reshape(*x.shape[:-1], -1, 16).max(-1)


@FEW
@given(_blocks)
def test_error_is_bounded(x):
    q = _quantise(x)
    assert (errors(x, q) <= error_bound(x, np.float64(q.global_scale))).all()


def test_error_bound_is_sharp(rng):
    x = np.concatenate([mixed_rows(rng, 512, 64), rng.uniform(-1, 1, (512, 64)).astype(F32)])
    q = nvm.quantize(x, per="row")
    share = errors(x, q) / error_bound(x, np.float64(q.global_scale)[:, None])
    assert 0.9 < share.max() <= 1


@FEW
@given(_blocks)
def test_values_of_the_format_keep_their_codes(x):
    q = _quantise(x)
    again = jax.jit(nvm.quantize)(_dequantise(q), q.global_scale)
    # Below the scale's normal range the largest code need not be 6, and the next scale is smaller.
    settled = np.asarray(q.scale).astype(F32) >= 2**-6
    assert (np.asarray(again.scale) == np.asarray(q.scale))[settled].all()
    values, kept = (np.asarray(_dequantise(v)).reshape(2, 2, 16) for v in (q, again))
    np.testing.assert_array_equal(kept[settled], values[settled])
    # Bit for bit: dequantising has no negative zero.
    codes, kept = (np.asarray(v.data).reshape(2, 2, 8)[settled] for v in (q, again))
    for shift in (0, 4):
        code = codes >> shift & 15
        np.testing.assert_array_equal(kept >> shift & 15, np.where(code == 8, 0, code))


# Zeros, the ends of the range, and what is not finite.


def test_zeros():
    q = nvm.quantize(jnp.zeros((3, 32)))
    assert q.global_scale == 1
    assert not np.asarray(q.data).any()
    assert not np.asarray(q.scale).astype(F32).any()
    per_row = nvm.quantize(jnp.zeros((3, 32)).at[1].set(5376), per="row")
    np.testing.assert_array_equal(per_row.global_scale, np.float32([1, 2, 1]))
    assert not nvm.dequantize(per_row)[::2].any()


@pytest.mark.parametrize("small", [0.0, 1e-6, -1e-6], ids=["zero", "underflow", "negative"])
def test_a_block_without_a_scale_is_zero(small):
    x = np.full((1, 48), 6.0, F32)
    x[0, 16:32] = small  # 1e-6/6 is below half of the smallest block scale, 2**-10, at global 1
    q = nvm.quantize(x, np.float32(1))
    assert np.asarray(q.scale).astype(F32).tolist() == [[1, 0, 1]]
    codes = np.asarray(q.data)
    assert (codes[0, 8:16] == (0x88 if small < 0 else 0)).all()
    assert (np.delete(codes, np.s_[8:16]) == 0x77).all()
    np.testing.assert_array_equal(nvm.dequantize(q), np.where(x == 6, x, 0).astype(BF16))


def test_the_smallest_block_scale():
    # The middle between 0 and the smallest scale, 2**-9, is a tie and goes to 0; above it is kept.
    x = np.zeros((3, 16), F32)
    sixth = np.float32(1 / 6)
    x[:, 0] = np.float32(2.0**-10) / sixth
    x[1:, 0] = np.nextafter(x[0, 0], [0, 1], dtype=F32)
    kept = (x[:, 0] * sixth) > 2**-10
    assert 0 < kept.sum() < 3
    scale = np.asarray(nvm.quantize(x, np.float32(1)).scale).astype(F32)[:, 0]
    np.testing.assert_array_equal(scale, np.where(kept, 2**-9, 0))


def test_sign_of_zero_is_kept_in_the_codes():
    x = np.array([6, -0.0, 0.0, -1e-3, 1e-3, -6, *[0.0] * 10], F32)
    data = np.asarray(nvm.quantize(x, np.float32(1)).data)
    assert data.tolist() == [0x87, 0x80, 0xF0, 0, 0, 0, 0, 0]


@each_dtype
def test_largest_and_smallest_inputs(dtype):
    for largest in (ml_dtypes.finfo(dtype).max, -ml_dtypes.finfo(dtype).max):
        x = np.zeros((2, 16), dtype)
        x[0, 3], x[1, 4] = largest, ml_dtypes.finfo(dtype).tiny
        values = np.asarray(nvm.dequantize(nvm.quantize(x, per="row"), jnp.float32))
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values[0, 3], F32.type(largest), rtol=2**-22)
        assert np.count_nonzero(values[0]) == 1


def test_subnormal_inputs_are_finite_and_no_larger():
    x = np.array([1e-45, -1e-40, 1e-39, *[0] * 13], F32)
    q = nvm.quantize(x)
    assert np.isfinite(q.global_scale)
    assert q.global_scale >= TINY
    values = np.asarray(nvm.dequantize(q, jnp.float32))
    assert (np.abs(values) <= TINY).all()


def test_nan_marks_its_block(rng):
    x = mixed_rows(rng, 6, 64)
    x[2, 22] = 1  # in block 1
    want = jax.tree.map(np.asarray, nvm.quantize(x, 0.01))
    x[2, 22] = np.nan
    got = jax.tree.map(np.asarray, nvm.quantize(x, 0.01))
    marked = np.zeros((6, 4), bool)
    marked[2, 1] = True
    np.testing.assert_array_equal(np.isnan(got.scale.astype(F32)), marked)
    np.testing.assert_array_equal(got.scale[~marked], want.scale[~marked])
    blocks = np.repeat(marked, 8, axis=1)
    np.testing.assert_array_equal(got.data[~blocks], want.data[~blocks])
    values = np.asarray(nvm.dequantize(got, jnp.float32))
    np.testing.assert_array_equal(np.isnan(values), np.repeat(marked, 16, axis=1))


@pytest.mark.parametrize("shape", [(3, 32), (60, 128), (8, 64, 256)], ids=str)
def test_nan_spreads_to_the_scale_computed_from_it(shape, rng):
    # XLA:CPU's maximum of floats drops the NaN in the larger two.
    x = mixed_rows(rng, *shape)
    x[..., 1, 5].flat[-1] = np.nan
    marked = np.isnan(x).any(axis=-1)
    assert np.isnan(nvm.quantize(x).global_scale)
    q = nvm.quantize(x, per="row")
    np.testing.assert_array_equal(np.isnan(q.global_scale), marked)
    values = np.asarray(nvm.dequantize(q, jnp.float32))
    np.testing.assert_array_equal(np.isnan(values).all(axis=-1), marked)
    np.testing.assert_array_equal(np.isnan(values).any(axis=-1), marked)


def test_infinities_saturate_at_a_given_scale():
    x = np.ones((1, 32), F32)
    x[0, 3], x[0, 4], x[0, 5] = np.inf, -np.inf, MAX
    q = nvm.quantize(x, np.float32(0.5))
    assert np.asarray(q.scale).astype(F32).tolist() == [[448, np.float32(0.34375)]]
    values = np.asarray(nvm.dequantize(q, jnp.float32))[0]
    assert values[3:6].tolist() == [1344, -1344, 1344]
    assert not values[:3].any()  # 1 is far below the smallest code at this scale
    np.testing.assert_allclose(values[16:], 1, rtol=0.1)


# ------------------------------------------------------------------------------------- dequantise


@pytest.mark.parametrize(
    ("groups", "dtype", "mode"),
    [
        ((), F32, "eager"),
        ((), BF16, "jit"),
        ((4,), F16, "jit"),
        ((4, 2), BF16, "jit"),
        ((4, 64), F32, "jit"),
        ((), F32, "jit, constant"),
    ],
    ids=str,
)
def test_dequantise_looks_codes_up(groups, dtype, mode, rng):
    data = rng.integers(0, 256, (4, 64, 32)).astype(np.uint8)
    scale = np.arange(4 * 64 * 4).reshape(4, 64, 4).astype(np.uint8).view(E4M3)  # all, NaN too
    global_scale = np.exp2(rng.uniform(-12, 8, groups)).astype(F32)
    exact = reference_dequantise(data, scale, global_scale)
    with np.errstate(over="ignore", invalid="ignore"):
        want = exact.astype(dtype)
    q = nvm.Nvfp4Array(*map(jnp.asarray, (data, scale, global_scale)))
    got = run(mode, functools.partial(nvm.dequantize, dtype=dtype), q)
    assert got.dtype == dtype
    with np.errstate(invalid="ignore"):
        got, want = got.astype(F32), want.astype(F32)
    np.testing.assert_array_equal(got, want)  # -0 == 0
    assert np.isnan(want).sum() == 8 * 16


def test_dequantise_is_bfloat16_by_default():
    assert nvm.dequantize(nvm.quantize(jnp.ones(16))).dtype == jnp.bfloat16


def test_doubled_values_are_integers():
    codes = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(nvfp4.doubled_codes(codes), 2 * E2M1_VALUES)
    low, high = nvfp4.doubled_nibbles(jnp.arange(256).astype(jnp.uint8))
    assert low.dtype == high.dtype == jnp.int8
    np.testing.assert_array_equal(low, np.tile(2 * E2M1_VALUES, 16))
    np.testing.assert_array_equal(high, np.repeat(2 * E2M1_VALUES, 16))


# ------------------------------------------------------------------------------------- packing

EVERY_BYTE = np.arange(256, dtype=np.uint8)


@in_each_mode
@pytest.mark.parametrize("shape", [(256,), (2, 128), (4, 1, 64)])
def test_every_byte_unpacks_and_packs(shape, mode):
    data = EVERY_BYTE.reshape(shape)
    values = run(mode, nvm.unpack, data)
    assert values.dtype == E2M1
    assert values.shape == (*shape[:-1], 2 * shape[-1])
    pairs = np.stack([E2M1_VALUES[data % 16], E2M1_VALUES[data // 16]], axis=-1)
    assert_same_bits(values.astype(F32), pairs.reshape(values.shape))  # low nibble first, -0 kept
    with pytest.raises(AssertionError):
        assert_same_bits(values.astype(F32), pairs[..., ::-1].reshape(values.shape))
    assert_same_bits(run(mode, nvm.pack, values), data)


def test_pack_codes(rng):
    codes = rng.integers(0, 16, (3, 5, 32)).astype(np.uint8)
    got = np.asarray(nvfp4.pack_codes(jnp.asarray(codes)))
    assert_same_bits(got, codes[..., 0::2] + 16 * codes[..., 1::2])
    assert_same_bits(np.asarray(nvm.pack(jnp.asarray(codes.view(E2M1)))), got)
    swapped = codes.reshape(3, 5, 16, 2)[..., ::-1].reshape(codes.shape)
    assert (np.asarray(nvfp4.pack_codes(jnp.asarray(swapped))) != got).any()


def test_unpacked_values_are_those_of_dequantise(rng):
    q = nvm.quantize(mixed_rows(rng, 4, 64))
    steps = np.repeat(np.asarray(q.scale).astype(F32) * np.asarray(q.global_scale), 16, axis=-1)
    values = np.asarray(nvm.unpack(q.data)).astype(F32) * steps
    np.testing.assert_array_equal(values, nvm.dequantize(q, jnp.float32))


def opcodes(f, argument):
    text = jax.jit(f).lower(argument).compile().as_text()
    return set(re.findall(r"^\s*(?:ROOT )?%\S+ = \S+ ([\w-]+)\(", text, re.MULTILINE))


def test_packing_costs_nothing():
    free = {"parameter", "bitcast", "copy"}
    data = jax.ShapeDtypeStruct((8, 32), jnp.uint8)
    assert "parameter" in opcodes(lambda d: nvm.pack(nvm.unpack(d)), data)
    assert opcodes(lambda d: nvm.pack(nvm.unpack(d)), data) <= free
    # Arithmetic would be seen.
    assert not opcodes(lambda d: (d << 4) | (d >> 4), data) <= free


# ------------------------------------------------------------------------------------- errors

X = jnp.ones((6, 32))
REFUSED = {
    "integers": (
        lambda: nvm.quantize(jnp.ones((2, 16), jnp.int32)),
        TypeError,
        "x has dtype int32, expected bfloat16, float16 or float32",
    ),
    "float8": (
        lambda: nvm.quantize(jnp.ones(16, jnp.float8_e4m3fn)),
        TypeError,
        "x has dtype float8_e4m3fn",
    ),
    "24 columns": (
        lambda: nvm.quantize(jnp.ones((2, 24))),
        ValueError,
        r"x has shape \(2, 24\), expected \[..., K\] with K a multiple of 16: "
        "pad the last axis to 32 with zeros",
    ),
    "1 column": (lambda: nvm.quantize(jnp.ones(1)), ValueError, "pad the last axis to 16 with"),
    "a scalar": (lambda: nvm.quantize(jnp.float32(1)), ValueError, r"x has shape \(\)"),
    "per channel": (
        lambda: nvm.quantize(X, per="channel"),
        ValueError,
        "per is 'channel', expected .*'tensor', 'expert'",
    ),
    "a vector per expert": (
        lambda: nvm.quantize(jnp.ones(16), per="expert"),
        ValueError,
        r"per is 'expert', but x has shape \(16,\) with no leading axis",
    ),
    "both per and a scale": (
        lambda: nvm.quantize(X, 1.0, per="row"),
        ValueError,
        "per is 'row', but global_scale was given: leave one of them out",
    ),
    "4 groups of 6 rows": (
        lambda: nvm.quantize(X, jnp.ones(4)),
        ValueError,
        r"global_scale has shape \(4,\), which does not group the rows of \(6, 32\): "
        r"expected \[\] or leading axes whose lengths divide \(6,\)",
    ),
    "more groups than rows": (
        lambda: nvm.quantize(X, jnp.ones(12)),
        ValueError,
        r"global_scale has shape \(12,\)",
    ),
    "no groups": (lambda: nvm.quantize(X, jnp.ones(0)), ValueError, "does not group the rows"),
    "a scale with x's last axis": (
        lambda: nvm.quantize(X, jnp.ones((6, 2))),
        ValueError,
        r"global_scale has shape \(6, 2\)",
    ),
    "pack bfloat16": (
        lambda: nvm.pack(jnp.ones(16, jnp.bfloat16)),
        TypeError,
        "values .*bfloat16, expected float4_e2m1fn; quantize",
    ),
    "pack an odd axis": (
        lambda: nvm.pack(jnp.zeros((2, 3), jnp.float4_e2m1fn)),
        ValueError,
        r"values has shape \(2, 3\), expected an even last axis",
    ),
    "pack a scalar": (
        lambda: nvm.pack(jnp.zeros((), jnp.float4_e2m1fn)),
        ValueError,
        r"values has shape \(\)",
    ),
    "unpack int8": (
        lambda: nvm.unpack(jnp.zeros(4, jnp.int8)),
        TypeError,
        "data .*int8, expected uint8: two E2M1 codes a byte",
    ),
    "unpack a scalar": (
        lambda: nvm.unpack(jnp.uint8(0)),
        ValueError,
        r"data is a scalar, expected \[..., K/2\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
    with pytest.raises(error, match=message):  # while tracing, too
        jax.jit(call)()


# ------------------------------------------------------------------------------------- 64 bits


def test_same_bits_with_64_bit_types(rng):
    x = mixed_rows(rng, 6, 64)
    a, b = random_normal_floats(rng, 4096), random_normal_floats(rng, 4096)

    @jax.jit
    def roundings(a, b):
        rounded = [nvfp4.round_to(a, dtype) for dtype in (BF16, F16, E4M3)]
        return [*rounded, nvfp4.e2m1_codes(a), nvfp4.exact_divide(a, b), nvfp4._long_divide(a, b)]

    def everything():
        results = [nvm.quantize(x)]
        results += [nvm.dequantize(results[0], dtype) for dtype in (BF16, F32)]
        results += roundings(a, b)
        results += [nvm.pack(nvm.unpack(results[0].data))]
        return jax.tree.map(np.asarray, results)

    narrow = everything()
    with jax.enable_x64(True):
        assert jnp.zeros(1).dtype == jnp.float64
        wide = everything()
        with pytest.raises(TypeError, match="x has dtype float64"):
            nvm.quantize(x.astype(np.float64))
    assert same_arrays(wide, narrow)


# ------------------------------------------------------------------------------------- pytree


def random_array(rng, experts, rows, columns):
    scale = rng.integers(1, 0x7F, (experts, rows, columns // 16)).astype(np.uint8)
    return nvm.Nvfp4Array(
        jnp.asarray(rng.integers(0, 256, (experts, rows, columns // 2)).astype(np.uint8)),
        jnp.asarray(scale.view(E4M3)),
        jnp.asarray(scales(rng, experts)),
    )


def test_array_is_a_pytree(rng):
    q = random_array(rng, 4, 4, 32)
    leaves, treedef = jax.tree.flatten(q)
    assert [leaf.dtype for leaf in leaves] == [jnp.uint8, jnp.float8_e4m3fn, jnp.float32]
    assert same_arrays(jax.tree.unflatten(treedef, leaves), q)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(q)]
    assert names == [".data", ".scale", ".global_scale"]
    first = jax.tree.map(lambda leaf: leaf[0], q)
    assert isinstance(first, nvm.Nvfp4Array)
    assert first.shape == (4, 32)
    np.testing.assert_array_equal(nvm.dequantize(first), nvm.dequantize(q)[0])


def test_array_goes_through_jit_and_scan(rng):
    q = random_array(rng, 4, 4, 32)
    want = np.asarray(nvm.dequantize(q))
    np.testing.assert_array_equal(jax.jit(nvm.dequantize)(q), want)
    _, each = jax.lax.scan(lambda carry, one: (carry, nvm.dequantize(one)), None, q)
    np.testing.assert_array_equal(each, want)
    np.testing.assert_array_equal(jax.vmap(nvm.dequantize)(q), want)
    assert same_arrays(jax.jit(lambda q: q)(q), q)


def test_array_moves_between_devices(rng):
    q = random_array(rng, 4, 4, 32)
    moved = jax.device_put(q, jax.devices()[1])
    assert all(leaf.devices() == {jax.devices()[1]} for leaf in jax.tree.leaves(moved))
    assert same_arrays(moved, q)
    mesh = jax.make_mesh((4,), ("e",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(q, jax.NamedSharding(mesh, jax.P("e")))
    assert all(leaf.addressable_shards[0].data.shape[0] == 1 for leaf in jax.tree.leaves(split))
    assert same_arrays(split, q)
    np.testing.assert_array_equal(nvm.dequantize(split), nvm.dequantize(q))


def test_sizes(rng):
    q = random_array(rng, 3, 4, 64)
    assert q.shape == (3, 4, 64)
    assert q.nbytes == 3 * 4 * (32 + 4) + 3 * 4
    shapes = jax.eval_shape(functools.partial(nvm.quantize, per="row"), jnp.ones((5, 32)))
    assert shapes.shape == (5, 32)
    assert shapes.nbytes == 5 * (16 + 2 + 4)
