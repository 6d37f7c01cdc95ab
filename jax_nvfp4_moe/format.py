"""NVFP4: packs, quantises and dequantises.

A value is ``e2m1 * scale * global_scale``: a 4-bit code, an E4M3 scale for each block of 16
consecutive elements along the last axis, and a float32 *decode* scale (amax / 2688) for the tensor,
for each expert or for each row. Two codes share a byte, the even element in the low nibble.

`rounding` does every rounding and every division.
"""

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
from jax_nvfp4_moe.global_scale import check_global_scale, expand_global_scale
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array
from jax_nvfp4_moe.rounding import (
    E4M3_MAX,
    clamp,
    e2m1_codes,
    exact_divide,
    largest_magnitude,
    reciprocal,
    round_to,
)

BLOCK_SIZE = 16
E2M1_MAX = 6.0
# The largest magnitude of e2m1 * scale, without the global scale: 2688.
RANGE_MAX = E2M1_MAX * E4M3_MAX

Per = Literal["tensor", "expert", "row"]

_FLOAT32_TINY = float(jnp.finfo(jnp.float32).tiny)
_FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)
# x / 6 and x * float32(1/6) round differently. The definition is the product (vllm@0.33.0:vllm/
# model_executor/layers/quantization/utils/nvfp4_emulation_utils.py).
_ONE_SIXTH = 1.0 / 6.0


# ------------------------------------------------------------------------------------- codes


def doubled_nibbles(
    data: UInt8[Array, "*rows K/2"],
) -> tuple[Int8[Array, "*rows K/2"], Int8[Array, "*rows K/2"]]:
    """Unpacks codes and returns twice their E2M1 values, even and odd elements apart.

    Args:
        data: packed codes.

    Returns:
        ``(low, high)``: int8 in -12..12, for elements 0, 2, 4, ... and for 1, 3, 5, ...
    """
    return doubled_codes(data & 0xF), doubled_codes(data >> 4)


def doubled_codes(codes: UInt8[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """Returns twice the E2M1 values of codes 0..15, as integers.

    The doubled magnitudes are 0 1 2 3 4 6 8 12. Integer arithmetic computes them, because bit
    tricks on floats pass through subnormals, which a CPU may flush to zero.
    """
    signed = codes.astype(jnp.int8)
    m = signed & 7
    magnitude = m + jnp.maximum(m - 4, 0) + 2 * jnp.maximum(m - 6, 0)
    return jnp.where(signed > 7, -magnitude, magnitude)


def pack_codes(codes: UInt8[Array, "*rows K"]) -> UInt8[Array, "*rows K/2"]:
    """Packs codes 0..15 two to a byte, the even element in the low nibble."""
    # A reduction: with two strided slices XLA:CPU computes `codes` twice.
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    nibbles = pairs << jnp.array([0, 4], jnp.uint8).reshape((1,) * (pairs.ndim - 1) + (2,))
    return lax.reduce(nibbles, jnp.uint8(0), lax.bitwise_or, (pairs.ndim - 1,))


def pack(values: Float[Array, "*rows K"]) -> UInt8[Array, "*rows K/2"]:
    """Packs a float4_e2m1fn array into bytes. Inside jit this is a view and computes nothing.

    Args:
        values: float4_e2m1fn [..., K], K even.

    Returns:
        uint8 [..., K/2], the even element in the low nibble.

    Raises:
        TypeError: `values` is not float4_e2m1fn.
        ValueError: `values` is a scalar, or K is odd.
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
    """Views packed bytes as float4_e2m1fn. Inside jit this computes nothing.

    Args:
        data: uint8 [..., K/2].

    Returns:
        float4_e2m1fn [..., K].

    Raises:
        TypeError: `data` is not uint8.
        ValueError: `data` is a scalar.
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
    """Quantises float32 rows at given encode scales to E2M1 codes and E4M3 block scales.

    A block of 16 with largest magnitude m, at encode scale g, becomes::

        scale = e4m3(g * (m * (1/6)))        code = e2m1(x * (g / scale))

    (the Triton form of vllm@0.33.0:.../nvfp4_emulation_utils.py:380-432). A block of zeros has
    scale zero and codes zero, and so has a block whose scale underflows. A block with a NaN has a
    NaN scale, which keeps the error visible. Infinities saturate.

    Args:
        x: values.
        encode_scale: 1 / global_scale, broadcast against x's leading axes.
        round_scale: `round_to`, or a function with the same bits for a kernel language that lacks
            the operations of `round_to`.
        divide: `exact_divide`, or a function with the same bits.

    Returns:
        uint8 codes 0..15, unpacked, and the block scales as float32.
    """
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    # The maximum of the sixths equals the sixth of the maximum, bit for bit. Written this way, XLA
    # cannot multiply the constant into a scalar gain first, which moves ties (jaxlib 0.10.2 does).
    amax_sixth = largest_magnitude(blocks * jnp.float32(_ONE_SIXTH))
    gain = jnp.broadcast_to(encode_scale, x.shape[:-1])[..., None]
    scale = round_scale(gain * amax_sixth, jnp.float8_e4m3fn)
    # A block whose scale is zero is too small for any code but zero, so any divisor will do.
    step = jnp.where(scale == 0, 1.0, scale)
    inverse = clamp(divide(jnp.broadcast_to(gain, step.shape), step), 0.0, _FLOAT32_MAX)
    return e2m1_codes(blocks * inverse[..., None]).reshape(x.shape), scale


def scale_for(amax: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns the decode scale amax / 2688, which maps `amax` to the largest value; 1 for zero."""
    scale = exact_divide(amax, jnp.full_like(amax, RANGE_MAX))
    return jnp.where(amax == 0, 1.0, clamp(scale, _FLOAT32_TINY, jnp.inf))


def quantize(
    x: Float[Array, "*rows K"],
    global_scale: Float32[Array, "..."] | float | None = None,
    *,
    per: Per = "tensor",
) -> Nvfp4Array:
    """Quantises to NVFP4, in blocks of 16 along the last axis.

    Args:
        x: bfloat16, float16 or float32 [..., K], K a multiple of 16.
        global_scale: float32 decode scale(s), axes as in `Nvfp4Array`. None computes amax / 2688.
        per: how many scales to compute: one for the "tensor", one for each slice of the first axis
            ("expert"), or one for each "row". Only with ``global_scale=None``.

    Returns:
        The quantised array. Groups of zeros get a global scale of 1. With a given `global_scale`,
        a NaN makes its block NaN, and infinities saturate. With a computed one, a NaN or an
        infinity spoils its whole group.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: `x`, `global_scale` or `per` has a shape or value other than described.
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
                f"per is {per!r}, but global_scale was given: leave one of them out; the "
                "shape of global_scale says which rows share a scale"
            )
        global_scale = as_array("global_scale", global_scale, jnp.float32)
        check_global_scale("global_scale", global_scale, x.shape)
        # In numpy, because jit traces even a comparison of constants.
        known = None if isinstance(global_scale, Tracer) else np.asarray(global_scale)
        if known is not None and not ((known >= _FLOAT32_TINY) & (known <= _FLOAT32_MAX)).all():
            raise ValueError(
                "global_scale holds values that are not finite and positive, expected decode "
                "scales: the largest magnitude / 2688, or None to have it computed"
            )
    return _quantize(x, global_scale, leading[per])


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
    """Returns the values ``e2m1 * (scale * global_scale)``, rounded once to `dtype`.

    The two scales are multiplied first, in float32, as in
    vllm@0.33.0:.../nvfp4_emulation_utils.py:576-630.

    Args:
        q: the array, [..., K].
        dtype: bfloat16, float16 or float32.

    Returns:
        [..., K] of `dtype`.

    Raises:
        TypeError: `q` is not an Nvfp4Array, or `dtype` is another dtype.
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
