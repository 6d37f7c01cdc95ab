"""Bits: numpy's view of NVFP4 and of roundings, and arrays that show a wrong bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
MAX, TINY = np.finfo(F32).max, np.finfo(F32).tiny

# What the sixteen codes mean, written out once more.
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
E2M1_TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], F32)

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


def finite_values(dtype):
    """All non-negative finite values of a narrow type, ascending."""
    bits = np.arange(2 ** (8 * dtype.itemsize - 1)).astype(f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        values = bits.view(dtype).astype(np.float64)
    return values[np.isfinite(values)]


def random_normal_floats(rng, size):
    """Every bit pattern of a finite, not subnormal float32 is as likely as every other."""
    bits = rng.integers(1 << 23, 255 << 23, size).astype(np.uint32)
    return (bits | (rng.integers(0, 2, size).astype(np.uint32) << 31)).view(F32)


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
