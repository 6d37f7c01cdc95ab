"""The products of NVFP4 weights with activations, never interleaving a decoded byte.

A packed byte holds an even and an odd element. Activations are split into even and odd columns
once, and the two halves of a contraction are added at the end. Both forms here read packed bytes:

* `multiply_reduce` for a few tokens, a set of weights for each row. XLA fuses the gather of the
  hit experts' bytes, the decoding and the sum into one loop on CPU and GPU. Where both operands are
  NVFP4 it works in integers: codes doubled are integers, so a block's sum is exact in 16 bits, and
  an exactly rounded product of the two block scales follows.
* `decode_and_dot` for many tokens of one expert: the expert's weights are decoded into a temporary,
  exact in bfloat16, and multiplied on the matrix unit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

from jax_nvfp4_moe.format import (
    BLOCK_SIZE,
    Nvfp4Array,
    doubled_nibbles,
    expand_global_scale,
    round_to,
)


class Rows(NamedTuple):
    """Activation rows, even and odd columns apart.

    Attributes:
        low: even columns [..., K/2]: float32 values, or int8 doubled E2M1 codes with `scale`.
        high: odd columns.
        scale: float32 block scales [..., K/16] of the codes; None where low and high are values.
        global_scale: float32 decode scale still to be multiplied, [] or [..., 1]; None for none.
    """

    low: Float32[Array, "*rows K/2"] | Int8[Array, "*rows K/2"]
    high: Float32[Array, "*rows K/2"] | Int8[Array, "*rows K/2"]
    scale: Float32[Array, "*rows K/16"] | None
    global_scale: Float32[Array, "..."] | None

    def map(self, f: Callable[[Array], Array]) -> "Rows":
        """Applies f to whatever has the rows' leading axes."""
        scale, gain = self.scale, self.global_scale
        return Rows(
            f(self.low),
            f(self.high),
            None if scale is None else f(scale),
            gain if gain is None or gain.ndim == 0 else f(gain),
        )

    def values(self) -> tuple[Array, Array]:
        """Even and odd columns as float32 values without the global scale; exact."""
        if self.scale is None:
            return self.low, self.high
        half = _by_block(0.5 * self.scale, self.low.shape)
        return self.low.astype(jnp.float32) * half, self.high.astype(jnp.float32) * half


@dataclasses.dataclass(frozen=True)
class WeightValues:
    """How weights become operands.

    Attributes:
        dtype: the type in which every operand value is exact; GPUs and TPUs multiply in it.
        folded: whether the global scale is folded in and the product rounded to `dtype`, as the
            "vllm" preset has it; else operands are code * scale, exact.
    """

    dtype: Any
    folded: bool

    def __call__(self, weights: Nvfp4Array) -> tuple[Array, Array]:
        """Even and odd columns of the weights, float32 [..., N, K/2]."""
        scale = weights.scale.astype(jnp.float32)
        if self.folded:
            rows = weights.data.shape[:-1]
            scale = scale * expand_global_scale(weights.global_scale, rows)[..., None]
        half = _by_block(0.5 * scale, weights.data.shape)
        low, high = (n.astype(jnp.float32) * half for n in doubled_nibbles(weights.data))
        if self.folded:
            low, high = round_to(low, self.dtype), round_to(high, self.dtype)
        return low, high


def _by_block(scale: Array, shape: tuple[int, ...]) -> Array:
    """Repeats block scales over the eight bytes of a block."""
    repeated = jnp.broadcast_to(scale[..., None], (*scale.shape, BLOCK_SIZE // 2))
    return repeated.reshape(shape)


def multiply_reduce(
    rows: Rows, weights: Nvfp4Array, as_values: WeightValues
) -> Float32[Array, "*rows N"]:
    """Each row with its own weights: ``sum_k rows[..., k] * weights[..., n, k]``.

    Args:
        rows: [..., K], axes of length 1 are repeated.
        weights: [..., N, K].
        as_values: how weights become operands.

    Returns:
        float32 sums, without global scales unless `as_values` folds them.
    """
    if rows.scale is None or as_values.folded:
        (x_low, x_high), (w_low, w_high) = rows.values(), as_values(weights)
        return jnp.sum(x_low[..., None, :] * w_low + x_high[..., None, :] * w_high, axis=-1)
    # 16 products of at most 12 * 12 stay below 2**15, and every step is exact.
    x_low, x_high = (n.astype(jnp.int16)[..., None, :] for n in (rows.low, rows.high))
    w_low, w_high = (n.astype(jnp.int16) for n in doubled_nibbles(weights.data))
    products = x_low * w_low + x_high * w_high
    blocks = products.reshape(*products.shape[:-1], -1, BLOCK_SIZE // 2)
    sums = jnp.sum(blocks, axis=-1, dtype=jnp.int16).astype(jnp.float32)
    scale = (0.25 * rows.scale)[..., None, :] * weights.scale.astype(jnp.float32)
    return jnp.sum(sums * scale, axis=-1)


def decode_and_dot(
    rows: Rows, weights: Nvfp4Array, as_values: WeightValues
) -> Float32[Array, "M N"]:
    """All rows with the same weights: ``rows @ weights.T``.

    Args:
        rows: [M, K].
        weights: [N, K].
        as_values: how weights become operands.

    Returns:
        float32 sums, without global scales unless `as_values` folds them.
    """
    (x_low, x_high), (w_low, w_high) = rows.values(), as_values(weights)
    return dot(x_low, w_low, as_values.dtype) + dot(x_high, w_high, as_values.dtype)


def dot(x: Float32[Array, "M K"], w: Float32[Array, "N K"], dtype: Any) -> Float32[Array, "M N"]:
    """``x @ w.T`` accumulated in float32, of values that are exact in `dtype`.

    CPUs multiply in float32; elsewhere the matrix unit takes the operands in `dtype`.
    """

    def contract(a: Array, b: Array, precision: lax.Precision) -> Array:
        last = (((a.ndim - 1,), (b.ndim - 1,)), ((), ()))
        return lax.dot_general(a, b, last, precision, preferred_element_type=jnp.float32)

    def narrow(a: Array, b: Array) -> Array:
        # HIGHEST matters for float32 alone: it keeps TF32 and bfloat16 passes off.
        return contract(a.astype(dtype), b.astype(dtype), lax.Precision.HIGHEST)

    def wide(a: Array, b: Array) -> Array:
        return contract(a, b, lax.Precision.HIGHEST)

    return lax.platform_dependent(x, w, cpu=wide, default=narrow)
