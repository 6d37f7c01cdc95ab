"""The quantiser, dequantising, codes and packing, against plain numpy."""

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
from jax_nvfp4_moe import rounding
from tests.support.bits import (
    BF16,
    E2M1,
    E2M1_VALUES,
    E4M3,
    F16,
    F32,
    MAX,
    TINY,
    around,
    assert_same_bits,
    each_dtype,
    finite_values,
    in_each_mode,
    mixed_rows,
    nearest_codes,
    random_normal_floats,
    reference_dequantise,
    row_scales,
    run,
    same_arrays,
    scales,
)

FEW = settings(max_examples=40)

# ------------------------------------------------------------------------------------- quantise


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
        rounded = [rounding.round_to(a, dtype) for dtype in (BF16, F16, E4M3)]
        return [
            *rounded,
            rounding.e2m1_codes(a),
            rounding.exact_divide(a, b),
            rounding._long_divide(a, b),
        ]

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
