"""NVFP4: the format, its quantiser, and the one place in the package that rounds.

A value is ``e2m1 * scale * global_scale``: a 4-bit code, an E4M3 scale for each block of 16
consecutive elements along the last axis, and a float32 *decode* scale (amax / 2688) for the tensor,
for each expert or for each row. Two codes share a byte, the even element in the low nibble.

Every rounding goes through `round_to` or `e2m1_codes`. XLA:GPU deletes ``x.astype(narrow)``
followed by ``.astype(wide)``, and its float32 division is not IEEE; XLA:CPU does neither, so a test
on a CPU sees nothing wrong. What is written here survives both compilers and gives the same bits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int8, UInt8

from jax_nvfp4_moe._messages import INPUT_DTYPES, as_array, check_dtype, check_name, described

BLOCK_SIZE = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
# The largest magnitude that a block at full scale reaches, before the global scale.
RANGE_MAX = E2M1_MAX * E4M3_MAX

Per = Literal["tensor", "expert", "row"]

_FLOAT32_TINY = float(jnp.finfo(jnp.float32).tiny)
_FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)
# Multiplied, not divided by: x / 6 and x * float32(1/6) differ (vllm@0.33.0:vllm/
# model_executor/layers/quantization/utils/nvfp4_emulation_utils.py uses the product).
_ONE_SIXTH = 1.0 / 6.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scale", "global_scale"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Nvfp4Array:
    """A tensor in NVFP4; a pytree of three arrays.

    Attributes:
        data: uint8 [..., K/2], two E2M1 codes a byte, the even element in the low nibble.
        scale: float8_e4m3fn [..., K/16], one for each block of 16 elements.
        global_scale: float32 decode scale. Its axes are the tensor's leading axes; each length
            divides the tensor's, and the tensor's rows fall into that many equal groups. So ``[]``
            is per tensor, ``[E]`` per expert, ``[E, 2]`` on ``[E, 2*I, H]`` one for each expert's
            gate and up halves, and the full leading shape per row.
    """

    data: UInt8[Array, "*rows K/2"]
    scale: Float[Array, "*rows K/16"]
    global_scale: Float32[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, [..., K]."""
        return (*self.data.shape[:-1], 2 * self.data.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all three arrays: 0.5625 an element, and the global scales."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


# ------------------------------------------------------------------------------------- rounding


def round_to(x: Float32[Array, "*shape"], dtype: Any) -> Float32[Array, "*shape"]:
    """Rounds float32 values to those of a narrower type and keeps them in float32.

    Nearest, ties to even, subnormals included. Beyond the range, bfloat16 and float16 become inf as
    IEEE has it, and float8_e4m3fn saturates at 448 (a plain cast would give NaN). NaN stays NaN.

    Args:
        x: float32 values.
        dtype: bfloat16, float16, float8_e4m3fn or float32 (which changes nothing).

    Returns:
        The rounded values, float32.
    """
    info = jnp.finfo(dtype)
    if info.dtype == jnp.float32:
        return x
    # The scope names the rounding in XLA's metadata, where tests/aot finds it again.
    with jax.named_scope(f"round_{info.dtype.name}"):
        saturates = info.dtype == jnp.float8_e4m3fn
        x = clamp(x, -E4M3_MAX, E4M3_MAX) if saturates else x
        # An E4M3 value has no infinities, so its top exponent is in use: keep float32's eight bits,
        # the clip above has bounded the range.
        rounded = lax.reduce_precision(x, 8 if saturates else info.nexp, info.nmant)
        if info.nexp == 8:
            return rounded
        # reduce_precision flushes the narrow type's subnormals: round those on their fixed grid.
        grid = float(info.smallest_subnormal)
        return jnp.where(jnp.abs(x) < float(info.tiny), jnp.round(x * (1 / grid)) * grid, rounded)


def clamp(x: Float32[Array, "*shape"], low: float, high: float) -> Float32[Array, "*shape"]:
    """Bounds values; NaN stays NaN, which XLA:CPU's vectors of minima and maxima lose."""
    return jnp.where(x < low, jnp.float32(low), jnp.where(x > high, jnp.float32(high), x))


def largest_magnitude(
    x: Float32[Array, "..."], axis: int | tuple[int, ...] | None = -1, *, keepdims: bool = False
) -> Float32[Array, "..."]:
    """The largest |x| along an axis or several, None meaning all; NaN if there is one.

    As integers: the bits of a NaN are above those of every other magnitude. XLA:CPU's maximum of
    floats along an axis drops NaNs in some shapes (jaxlib 0.10.2).
    """
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    most = jnp.max(bits, axis=axis, initial=0, keepdims=keepdims)
    return lax.bitcast_convert_type(most, jnp.float32)


def e2m1_codes(x: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Rounds to E2M1: nearest, ties to the even code, saturating at 6, the sign of zero kept.

    The same rule as the PTX instruction ``cvt.rn.satfinite.e2m1x2`` and as JAX's cast of finite
    values to float4_e2m1fn. NaN gives a zero; the quantiser marks its block's scale instead.

    Args:
        x: float32 values.

    Returns:
        uint8 codes 0..15; bit 3 is the sign.
    """
    with jax.named_scope("round_float4_e2m1fn"):
        a = jnp.abs(x)
        # The boundaries between the eight magnitudes; a tie belongs to the even one of its two.
        steps = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)
        magnitude = sum((s.astype(jnp.uint8) for s in steps), jnp.zeros(x.shape, jnp.uint8))
        return magnitude | (jnp.signbit(x).astype(jnp.uint8) << 3)


def exact_divide(
    a: Float32[Array, "*shape"], b: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """float32 a / b, correctly rounded on every device.

    A subnormal quotient may be flushed to zero.
    """
    a, b = jnp.broadcast_arrays(a, b)
    return lax.platform_dependent(a, b, cpu=_ieee_divide, default=_long_divide)


def _ieee_divide(a: Array, b: Array) -> Array:
    # XLA:CPU's division is IEEE, but of a constant divisor it would take the reciprocal.
    a, b = lax.optimization_barrier((a, b))
    return a / b


def _long_divide(a: Array, b: Array) -> Array:
    """Long division of the significands in integers.

    XLA:GPU's own division is up to 2 ulp off, enough to move a value across a rounding boundary.
    Here the last bit of an integer quotient says whether anything was left over, and one
    integer-to-float conversion rounds. Zero, subnormal, infinite and NaN operands take the ordinary
    division.
    """
    bits_a, bits_b = (lax.bitcast_convert_type(v, jnp.int32) for v in (a, b))
    exponent_a, exponent_b = ((v >> 23) & 0xFF for v in (bits_a, bits_b))
    remainder, divisor = ((v & 0x7FFFFF) | 0x800000 for v in (bits_a, bits_b))
    quotient = lax.div(remainder, divisor)
    for _ in range(4):  # 28 more bits: 24 for the result, one as the ratio may be below 1, to spare
        remainder = lax.rem(remainder, divisor) << 7
        quotient = (quotient << 7) | lax.div(remainder, divisor)
    inexact = lax.rem(remainder, divisor) != 0
    quotient = quotient | inexact.astype(jnp.int32)

    # In two factors, as 2**exponent alone may be out of range; below -252 all results are zero.
    exponent = jnp.maximum(exponent_a - exponent_b - 28, -252)
    half = exponent >> 1
    rounded = quotient.astype(jnp.float32) * _power_of_two(half) * _power_of_two(exponent - half)
    rounded = lax.select((bits_a ^ bits_b) < 0, -rounded, rounded)
    ordinary = (exponent_a > 0) & (exponent_a < 255) & (exponent_b > 0) & (exponent_b < 255)
    return lax.select(ordinary, rounded, a / b)


def _power_of_two(exponent: Array) -> Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


# ------------------------------------------------------------------------------------- codes


def doubled_nibbles(
    data: UInt8[Array, "*rows K/2"],
) -> tuple[Int8[Array, "*rows K/2"], Int8[Array, "*rows K/2"]]:
    """Twice the E2M1 values of the even and of the odd elements of packed codes.

    Args:
        data: packed codes.

    Returns:
        ``(low, high)``: int8 in -12..12, of elements 0, 2, 4, ... and 1, 3, 5, ...
    """
    return doubled_codes(data & 0xF), doubled_codes(data >> 4)


def doubled_codes(codes: UInt8[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """Twice the E2M1 values of codes 0..15, as integers.

    Doubled, the magnitudes are 0 1 2 3 4 6 8 12, and come from the code by integer arithmetic:
    bit tricks that pass through float subnormals give zero where a CPU flushes them.
    """
    signed = codes.astype(jnp.int8)
    m = signed & 7
    magnitude = m + jnp.maximum(m - 4, 0) + 2 * jnp.maximum(m - 6, 0)
    return jnp.where(signed > 7, -magnitude, magnitude)


def pack_codes(codes: UInt8[Array, "*rows K"]) -> UInt8[Array, "*rows K/2"]:
    """Packs codes 0..15 two to a byte, the even element in the low nibble."""
    # A reduction, as XLA:CPU would compute what two strided slices share once for each.
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    nibbles = pairs << jnp.array([0, 4], jnp.uint8).reshape((1,) * (pairs.ndim - 1) + (2,))
    return lax.reduce(nibbles, jnp.uint8(0), lax.bitwise_or, (pairs.ndim - 1,))


def pack(values: Float[Array, "*rows K"]) -> UInt8[Array, "*rows K/2"]:
    """Packs a float4_e2m1fn array into bytes; inside jit a view, not a computation.

    Args:
        values: float4_e2m1fn [..., K], K even.

    Returns:
        uint8 [..., K/2], the even element in the low nibble.

    Raises:
        TypeError: not float4_e2m1fn.
        ValueError: K is odd.
    """
    if getattr(values, "dtype", None) != jnp.float4_e2m1fn:
        raise TypeError(
            f"values is {described(values)}, expected float4_e2m1fn; quantize() takes wider types"
        )
    if values.ndim == 0 or values.shape[-1] % 2:
        raise ValueError(f"values has shape {values.shape}, expected an even last axis")
    pairs = values.reshape(*values.shape[:-1], values.shape[-1] // 2, 2)
    return lax.bitcast_convert_type(pairs, jnp.uint8)


def unpack(data: UInt8[Array, "*rows K/2"]) -> Float[Array, "*rows K"]:
    """Views packed bytes as float4_e2m1fn; inside jit a view, not a computation.

    Args:
        data: uint8 [..., K/2].

    Returns:
        float4_e2m1fn [..., K].

    Raises:
        TypeError: not uint8.
        ValueError: a scalar.
    """
    if getattr(data, "dtype", None) != jnp.uint8:
        raise TypeError(f"data is {described(data)}, expected uint8: two E2M1 codes a byte")
    if data.ndim == 0:
        raise ValueError("data is a scalar, expected [..., K/2]")
    # Without the barrier, jaxlib 0.10.2 folds constants into wrong values (openxla/xla#38964).
    pairs = lax.bitcast_convert_type(lax.optimization_barrier(data), jnp.float4_e2m1fn)
    return pairs.reshape(*data.shape[:-1], 2 * data.shape[-1])


# ------------------------------------------------------------------------------------- quantise


def quantize_blocks(
    x: Float32[Array, "*rows K"],
    encode_scale: Float32[Array, "*#rows"],
    *,
    round_scale: Callable[[Array, Any], Array] = round_to,
    divide: Callable[[Array, Array], Array] = exact_divide,
) -> tuple[UInt8[Array, "*rows K"], Float32[Array, "*rows K/16"]]:
    """Quantises float32 rows at given encode scales: E2M1 codes and E4M3 block scales.

    For each block of 16, with g the encode scale and m its largest magnitude::

        scale = e4m3(g * (m * (1/6)))        code = e2m1(x * (g / scale))

    (the Triton form of vllm@0.33.0:.../nvfp4_emulation_utils.py:380-432). A block whose scale is
    zero, because it is all zero or underflows, has codes of zero. A block that holds a NaN has a
    NaN scale, so that the error stays visible; infinities saturate.

    Args:
        x: values.
        encode_scale: 1 / global_scale, broadcast against x's leading axes.
        round_scale: `round_to`, or what computes the same bits in a kernel whose language lacks
            what that is made of.
        divide: `exact_divide`, or likewise.

    Returns:
        uint8 codes 0..15, not packed, and the block scales as float32.
    """
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    # The sixth of the maximum, as the maximum of sixths: the same bits, and XLA cannot multiply the
    # constant into a scalar gain first, which moves ties (jaxlib 0.10.2 does).
    amax_sixth = largest_magnitude(blocks * jnp.float32(_ONE_SIXTH))
    gain = jnp.broadcast_to(encode_scale, x.shape[:-1])[..., None]
    scale = round_scale(gain * amax_sixth, jnp.float8_e4m3fn)
    # Where the scale is zero any divisor serves: what is too small for a scale is too for a code.
    step = jnp.where(scale == 0, 1.0, scale)
    inverse = clamp(divide(jnp.broadcast_to(gain, step.shape), step), 0.0, _FLOAT32_MAX)
    return e2m1_codes(blocks * inverse[..., None]).reshape(x.shape), scale


def scale_for(amax: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The decode scale amax / 2688 that puts `amax` at the top of the range; 1 where it is zero."""
    scale = exact_divide(amax, jnp.full_like(amax, RANGE_MAX))
    return jnp.where(amax == 0, 1.0, clamp(scale, _FLOAT32_TINY, jnp.inf))


def reciprocal(scale: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Turns decode scales into encode scales and back: 1 / scale, correctly rounded."""
    return exact_divide(jnp.ones_like(scale), scale)


def expand_global_scale(
    global_scale: Float32[Array, "..."], rows: tuple[int, ...]
) -> Float32[Array, "..."]:
    """Repeats global scales over their groups of rows until they broadcast against `rows`.

    Args:
        global_scale: as in `Nvfp4Array`.
        rows: the tensor's shape without its last axis.

    Returns:
        An array of as many axes as `rows`; those without a scale of their own have length 1.
    """
    for axis, groups in enumerate(global_scale.shape):
        global_scale = jnp.repeat(global_scale, rows[axis] // groups, axis=axis)
    missing = len(rows) - global_scale.ndim
    return global_scale.reshape(*global_scale.shape, *(1,) * missing)


def quantize(
    x: Float[Array, "*rows K"],
    global_scale: Float32[Array, "..."] | float | None = None,
    *,
    per: Per = "tensor",
) -> Nvfp4Array:
    """Quantises to NVFP4, in blocks of 16 along the last axis.

    Args:
        x: bfloat16, float16 or float32 [..., K], K a multiple of 16.
        global_scale: float32 decode scale(s), axes as in `Nvfp4Array`. None takes amax / 2688.
        per: what shares one computed scale: the whole "tensor", each slice of the first axis
            ("expert"), or each "row". Only for ``global_scale=None``.

    Returns:
        The quantised array. All-zero groups get a global scale of 1. With a given `global_scale`
        a NaN spreads to its block and infinities saturate; a computed one they spoil.

    Raises:
        TypeError: `x` is not one of the three dtypes.
        ValueError: the shape of `x` or `global_scale`, or `per`, is not as described.
    """
    x = as_array("x", x)
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"x has dtype {x.dtype}, expected bfloat16, float16 or float32; "
            "pass x.astype(jnp.float32)"
        )
    if x.ndim == 0 or x.shape[-1] % BLOCK_SIZE:
        near = math.ceil(x.shape[-1] / BLOCK_SIZE) * BLOCK_SIZE if x.ndim else 0
        pad = f": pad the last axis to {near} with zeros" if x.ndim else ""
        raise ValueError(
            f"x has shape {x.shape}, expected [..., K] with K a multiple of {BLOCK_SIZE}{pad}"
        )
    check_name("per", per, get_args(Per))
    leading = {"tensor": 0, "expert": 1, "row": x.ndim - 1}
    if leading[per] > x.ndim - 1:
        raise ValueError(
            f"per is {per!r}, but x has shape {x.shape} with no leading axis: expected 'tensor'"
        )
    if global_scale is not None:
        if per != "tensor":
            raise ValueError(
                f"per is {per!r}, but global_scale was given: leave one of them out, its shape "
                "says what shares a scale"
            )
        global_scale = as_array("global_scale", global_scale, jnp.float32)
        check_global_scale("global_scale", global_scale, x.shape)
        # On numpy: under jit even a comparison of constants is traced.
        known = None if isinstance(global_scale, Tracer) else np.asarray(global_scale)
        if known is not None and not ((known >= _FLOAT32_TINY) & (known <= _FLOAT32_MAX)).all():
            raise ValueError(
                "global_scale holds values that are not finite and positive, expected decode "
                "scales: the largest magnitude / 2688, or None to have it computed"
            )
    return _quantize(x, global_scale, leading[per])


def check_global_scale(name: str, global_scale: Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the axes of `global_scale` group the rows of a tensor of `shape`."""
    rows = shape[:-1]
    fits = global_scale.ndim <= len(rows) and all(
        groups > 0 and size % groups == 0
        for size, groups in zip(rows, global_scale.shape, strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {global_scale.shape}, which does not group the rows of {shape}: "
            f"expected [] or leading axes whose lengths divide {rows}"
        )


@functools.partial(jax.jit, static_argnums=2)
def _quantize(x: Array, global_scale: Array | None, leading: int) -> Nvfp4Array:
    x = x.astype(jnp.float32)
    if global_scale is None:
        axes = tuple(range(leading, x.ndim))
        global_scale = scale_for(largest_magnitude(x, axes))
    gain = reciprocal(expand_global_scale(global_scale, x.shape[:-1]))
    codes, scale = quantize_blocks(x, gain)
    return Nvfp4Array(pack_codes(codes), scale.astype(jnp.float8_e4m3fn), global_scale)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(q: Nvfp4Array, dtype: Any = jnp.bfloat16) -> Float[Array, "*rows K"]:
    """The values of an NVFP4 array: ``e2m1 * (scale * global_scale)``, rounded once to `dtype`.

    The scales are multiplied first, in float32, as in vllm@0.33.0:.../nvfp4_emulation_utils.py
    lines 576-630.

    Args:
        q: the array, [..., K].
        dtype: bfloat16, float16 or float32.

    Returns:
        [..., K] of `dtype`.

    Raises:
        TypeError: `q` is no Nvfp4Array, or `dtype` not one of these.
    """
    if not isinstance(q, Nvfp4Array):
        raise TypeError(f"q is {described(q)}, expected Nvfp4Array, as from quantize()")
    dtype = check_dtype("dtype", dtype)
    rows = q.data.shape[:-1]
    scale = q.scale.astype(jnp.float32) * expand_global_scale(q.global_scale, rows)[..., None]
    low, high = doubled_nibbles(q.data)
    doubled = jnp.stack([low, high], axis=-1).reshape(*q.scale.shape, BLOCK_SIZE)
    values = doubled.astype(jnp.float32) * 0.5 * scale[..., None]
    return round_to(values.reshape(q.shape), dtype).astype(dtype)
