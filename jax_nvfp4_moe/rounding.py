"""Roundings and divisions that give the same bits on every device: the only ones in the package.

XLA:GPU deletes ``x.astype(narrow)`` followed by ``.astype(wide)``, and its float32 division is not
IEEE. XLA:CPU does neither, so a test on a CPU cannot see the difference. The functions here survive
both compilers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt8

E4M3_MAX = 448.0


def round_to(x: Float32[Array, "*shape"], dtype: Any) -> Float32[Array, "*shape"]:
    """Rounds float32 values to a narrower type and returns them as float32.

    Rounds to nearest, ties to even, subnormals included. Values beyond the range become inf in
    bfloat16 and float16, as in IEEE 754, and 448 in float8_e4m3fn, where a plain cast gives NaN.
    NaN stays NaN.

    Args:
        x: float32 values.
        dtype: bfloat16, float16, float8_e4m3fn or float32; float32 changes nothing.

    Returns:
        The rounded values, float32.
    """
    info = jnp.finfo(dtype)
    if info.dtype == jnp.float32:
        return x
    # XLA's metadata keeps the scope's name, by which tests/aot finds the rounding.
    with jax.named_scope(f"round_{info.dtype.name}"):
        saturates = info.dtype == jnp.float8_e4m3fn
        x = clamp(x, -E4M3_MAX, E4M3_MAX) if saturates else x
        # E4M3 has no infinities and uses its top exponent for values. So reduce_precision keeps
        # float32's eight exponent bits; the clamp has bounded the range already.
        rounded = lax.reduce_precision(x, 8 if saturates else info.nexp, info.nmant)
        if info.nexp == 8:
            return rounded
        # reduce_precision flushes the narrow type's subnormals; they are multiples of `grid`.
        grid = float(info.smallest_subnormal)
        return jnp.where(jnp.abs(x) < float(info.tiny), jnp.round(x * (1 / grid)) * grid, rounded)


def clamp(x: Float32[Array, "*shape"], low: float, high: float) -> Float32[Array, "*shape"]:
    """Bounds values and keeps NaN, which XLA:CPU's vectorised minimum and maximum lose."""
    return jnp.where(x < low, jnp.float32(low), jnp.where(x > high, jnp.float32(high), x))


def largest_magnitude(
    x: Float32[Array, "..."], axis: int | tuple[int, ...] | None = -1, *, keepdims: bool = False
) -> Float32[Array, "..."]:
    """Returns the largest |x| along one or more axes (None: all); NaN if `x` holds one.

    Compares the values as integers, because the bits of a NaN exceed those of every magnitude.
    XLA:CPU's maximum of floats along an axis drops NaNs in some shapes (jaxlib 0.10.2).
    """
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    most = jnp.max(bits, axis=axis, initial=0, keepdims=keepdims)
    return lax.bitcast_convert_type(most, jnp.float32)


def e2m1_codes(x: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Rounds to E2M1: to nearest, ties to the even code, saturating at 6, keeping the sign of zero.

    The PTX instruction ``cvt.rn.satfinite.e2m1x2`` and JAX's cast of finite values to
    float4_e2m1fn follow the same rule. NaN gives a zero; the quantiser marks its block's scale.

    Args:
        x: float32 values.

    Returns:
        uint8 codes 0..15; bit 3 is the sign.
    """
    with jax.named_scope("round_float4_e2m1fn"):
        a = jnp.abs(x)
        # The boundaries between the eight magnitudes. A tie goes to the even code of the two.
        steps = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)
        magnitude = sum((s.astype(jnp.uint8) for s in steps), jnp.zeros(x.shape, jnp.uint8))
        return magnitude | (jnp.signbit(x).astype(jnp.uint8) << 3)


def reciprocal(scale: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns 1 / scale, correctly rounded: decode scales become encode scales and back."""
    return exact_divide(jnp.ones_like(scale), scale)


def exact_divide(
    a: Float32[Array, "*shape"], b: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """Returns float32 a / b, correctly rounded on every device.

    A subnormal quotient may be flushed to zero.
    """
    a, b = jnp.broadcast_arrays(a, b)
    return lax.platform_dependent(a, b, cpu=_ieee_divide, default=_long_divide)


def _ieee_divide(a: Array, b: Array) -> Array:
    # XLA:CPU's division is IEEE, but it multiplies by the reciprocal of a constant divisor. The
    # barrier hides the constant.
    a, b = lax.optimization_barrier((a, b))
    return a / b


def _long_divide(a: Array, b: Array) -> Array:
    """Divides the significands in integers, by long division.

    XLA:GPU's own division is up to 2 ulp off, enough to move a value across a rounding boundary.
    Here the last bit of an integer quotient records whether the remainder is zero, and a single
    integer-to-float conversion rounds. Zero, subnormal, infinite and NaN operands are divided in
    the ordinary way.
    """
    bits_a, bits_b = (lax.bitcast_convert_type(v, jnp.int32) for v in (a, b))
    exponent_a, exponent_b = ((v >> 23) & 0xFF for v in (bits_a, bits_b))
    remainder, divisor = ((v & 0x7FFFFF) | 0x800000 for v in (bits_a, bits_b))
    quotient = lax.div(remainder, divisor)
    # 28 more bits: 24 for the result, one because the ratio may be below 1, and three to spare.
    for _ in range(4):
        remainder = lax.rem(remainder, divisor) << 7
        quotient = (quotient << 7) | lax.div(remainder, divisor)
    inexact = lax.rem(remainder, divisor) != 0
    quotient = quotient | inexact.astype(jnp.int32)

    # Two factors, because 2**exponent alone may be out of range. Below -252 every result is zero.
    exponent = jnp.maximum(exponent_a - exponent_b - 28, -252)
    half = exponent >> 1
    rounded = quotient.astype(jnp.float32) * _power_of_two(half) * _power_of_two(exponent - half)
    rounded = lax.select((bits_a ^ bits_b) < 0, -rounded, rounded)
    ordinary = (exponent_a > 0) & (exponent_a < 255) & (exponent_b > 0) & (exponent_b < 255)
    return lax.select(ordinary, rounded, a / b)


def _power_of_two(exponent: Array) -> Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
