"""Multiplies NVFP4 weights with activations, without interleaving decoded elements.

A packed byte holds an even and an odd element. Activations are split into even and odd columns
once; the contraction of each half is computed separately, and the two are added at the end. Three
functions compute the same sum:

* `multiply_reduce`: each row has its own weights. XLA:GPU fuses the gather of the hit experts'
  bytes, the decoding and the sum into one kernel that writes only the result.
* `integer_multiply_reduce`: the same for CPUs, whose vector units process more integers than floats
  at once. Doubled codes are integers, so the sum over a block is exact in 16 bits. It is then
  multiplied by the product of the two block scales, which is exact too.
* `decode_and_dot`: many rows share one expert's weights, which are decoded into a temporary, exact
  in bfloat16, and multiplied on the matrix unit.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int8

from jax_nvfp4_moe.format import BLOCK_SIZE, doubled_nibbles
from jax_nvfp4_moe.global_scale import expand_global_scale
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array
from jax_nvfp4_moe.rounding import round_to


class Rows(NamedTuple):
    """Activation rows, with even and odd columns in separate arrays.

    Attributes:
        low: even columns [..., K/2]: float32 values, or int8 doubled E2M1 codes with `scale`.
        high: odd columns, likewise.
        scale: float32 block scales [..., K/16] of the codes; None if low and high are values.
        global_scale: float32 decode scale [..., 1], not yet applied; None if there is none.
    """

    low: Float32[Array, "*rows K/2"] | Int8[Array, "*rows K/2"]
    high: Float32[Array, "*rows K/2"] | Int8[Array, "*rows K/2"]
    scale: Float32[Array, "*rows K/16"] | None
    global_scale: Float32[Array, "*rows 1"] | None

    def values(self) -> tuple[Array, Array]:
        """Returns even and odd columns as float32 values without the global scale; exact."""
        if self.scale is None:
            return self.low, self.high
        half = _by_block(0.5 * self.scale, self.low.shape)
        return self.low.astype(jnp.float32) * half, self.high.astype(jnp.float32) * half


@dataclasses.dataclass(frozen=True)
class WeightValues:
    """Decodes weights into operands.

    Attributes:
        dtype: the type in which every operand is exact; GPUs and TPUs multiply in it.
        folded: whether operands include the global scale, rounded to `dtype` afterwards, as in the
            "vllm" preset. If not, operands are code * scale, exact.
    """

    dtype: Any
    folded: bool

    def __call__(self, weights: Nvfp4Array) -> tuple[Array, Array]:
        """Returns even and odd columns of the weights, float32 [..., N, K/2]."""
        # Scales are repeated over a block's bytes before any arithmetic on them: otherwise XLA for
        # a B200 writes the computed scales of all hit experts to memory.
        scale = _by_block(weights.scale.astype(jnp.float32), weights.data.shape)
        if self.folded:
            scale = scale * expand_global_scale(weights.global_scale, scale.shape[:-1])[..., None]
        low, high = (_e2m1(n) * scale for n in (weights.data & 0xF, weights.data >> 4))
        if self.folded:
            low, high = round_to(low, self.dtype), round_to(high, self.dtype)
        return low, high


def _e2m1(codes: Array) -> Array:
    """Returns the values of codes 0..15, computed in float32, which XLA:GPU keeps in registers.

    If they were decoded as int8, as by `format.doubled_codes`, XLA would write them to memory,
    according to its cost model of a B200.
    """
    m = (codes & 7).astype(jnp.float32) * 0.5
    magnitude = m + jnp.maximum(m - 2, 0) + 2 * jnp.maximum(m - 3, 0)
    return jnp.where(codes > 7, -magnitude, magnitude)


def _by_block(scale: Array, shape: tuple[int, ...]) -> Array:
    """Returns block scales, repeated over the eight bytes of each block."""
    repeated = jnp.broadcast_to(scale[..., None], (*scale.shape, BLOCK_SIZE // 2))
    return repeated.reshape(shape)


def multiply_reduce(
    rows: Rows, weights: Nvfp4Array, as_values: WeightValues
) -> Float32[Array, "*rows N"]:
    """Multiplies each row by its own weights: ``sum_k rows[..., k] * weights[..., n, k]``.

    Args:
        rows: [..., K]; axes of length 1 are broadcast.
        weights: [..., N, K].
        as_values: decodes weights into operands.

    Returns:
        float32 sums, without global scales unless `as_values` folds them.
    """
    (x_low, x_high), (w_low, w_high) = rows.values(), as_values(weights)
    return jnp.sum(x_low[..., None, :] * w_low + x_high[..., None, :] * w_high, axis=-1)


def integer_multiply_reduce(
    rows: Rows, weights: Nvfp4Array, as_values: WeightValues
) -> Float32[Array, "*rows N"]:
    """Returns the result of `multiply_reduce`, for rows that are codes and unfolded weights."""
    assert rows.scale is not None and not as_values.folded
    # 16 products of at most 12 * 12 stay below 2**15.
    x_low, x_high = (n.astype(jnp.int16)[..., None, :] for n in (rows.low, rows.high))
    w_low, w_high = (n.astype(jnp.int16) for n in doubled_nibbles(weights.data))
    products = x_low * w_low + x_high * w_high
    blocks = products.reshape(*products.shape[:-1], -1, BLOCK_SIZE // 2)
    sums = jnp.sum(blocks, axis=-1, dtype=jnp.int16).astype(jnp.float32)
    scaled = sums * weights.scale.astype(jnp.float32)
    # A dot, because XLA:CPU sums along rows several times faster that way.
    batch = tuple(range(scaled.ndim - 2))
    scale = jnp.broadcast_to(0.25 * rows.scale, (*scaled.shape[:-2], scaled.shape[-1]))
    contract = (((scaled.ndim - 1,), (scale.ndim - 1,)), (batch, batch))
    return lax.dot_general(scaled, scale, contract, lax.Precision.HIGHEST)


def decode_and_dot(
    rows: Rows, weights: Nvfp4Array, as_values: WeightValues
) -> Float32[Array, "M N"]:
    """Multiplies all rows by the same weights: ``rows @ weights.T``.

    Args:
        rows: [M, K].
        weights: [N, K].
        as_values: decodes weights into operands.

    Returns:
        float32 sums, without global scales unless `as_values` folds them.
    """
    (x_low, x_high), (w_low, w_high) = rows.values(), as_values(weights)
    return dot(x_low, w_low, as_values.dtype) + dot(x_high, w_high, as_values.dtype)


def dot(x: Float32[Array, "M K"], w: Float32[Array, "N K"], dtype: Any) -> Float32[Array, "M N"]:
    """Returns ``x @ w.T``, accumulated in float32, for values that are exact in `dtype`.

    CPUs multiply in float32; on other devices the matrix unit multiplies in `dtype`.
    """
    last = (((1,), (1,)), ((), ()))
    # HIGHEST affects float32 only: it rules out TF32 and bfloat16 passes.
    multiply = functools.partial(
        lax.dot_general,
        dimension_numbers=last,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )

    def narrow(x: Array, w: Array) -> Array:
        return multiply(x.astype(dtype), w.astype(dtype))

    def wide(x: Array, w: Array) -> Array:
        return multiply(w, x).T  # with few rows in x, faster than x times w

    return lax.platform_dependent(x, w, cpu=wide, default=narrow)
