"""The epilogues of the two GEMMs: the "kernel" preset's steps on sums that are still in registers.

Triton has neither reduce_precision nor an error function, and its division is approximate. This
module implements all three: rounding and division with the same bits as the emulation, the error
function within 5e-7.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float32

from jax_nvfp4_moe.activations import Activation, activate_parts
from jax_nvfp4_moe.format import BLOCK_SIZE, doubled_codes, quantize_blocks
from jax_nvfp4_moe.rounding import E4M3_MAX, clamp


def gemm1(
    parts: tuple[Float32[Array, "N M"], ...],
    scale: Float32[Array, ""] | None,
    *,
    activation: Activation,
    native: bool,
) -> Float32[Array, "M N"]:
    """Applies the activation and, if there is a scale, quantises the result.

    Args:
        parts: gate and up, or up alone.
        scale: the decode scale of GEMM2's activations; None means that they are not quantised here.
        activation: the layer's activation.
        native: whether Triton compiles the kernel, rather than JAX's interpreter running it.
    """
    hidden = activate_parts(parts, activation, erf=_erf).T
    return hidden if scale is None else quantized(hidden, scale, native=native)


def gemm2(parts: tuple[Float32[Array, "N M"], ...], _: Array | None) -> Float32[Array, "M N"]:
    """Returns GEMM2's sums unchanged; storing them rounds them."""
    return parts[0].T


def quantized(
    x: Float32[Array, "M K"], scale: Float32[Array, ""], *, native: bool
) -> Float32[Array, "M K"]:
    """Quantises values at a decode scale.

    Returns:
        ``e2m1 * scale`` without the decode scale, exact in bfloat16.
    """
    divide = _exact_divide if native else jnp.divide
    encode = divide(jnp.ones(len(x), jnp.float32), jnp.broadcast_to(scale, len(x)))
    codes, block_scale = quantize_blocks(x, encode, round_scale=_round_e4m3, divide=divide)
    values = doubled_codes(codes).astype(jnp.float32).reshape(*block_scale.shape, BLOCK_SIZE)
    return (values * (0.5 * block_scale)[..., None]).reshape(x.shape)


def _round_e4m3(x: Float32[Array, "*shape"], _: Any = None) -> Float32[Array, "*shape"]:
    """Returns values rounded to float8_e4m3fn, as `rounding.round_to` does; not for negative x."""
    x = clamp(x, 0.0, E4M3_MAX)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    # Subnormals are multiples of 2**-9.
    steps = x * 2.0**9
    whole = jnp.where(x < 2.0**-6, steps, 0.0).astype(jnp.int32)
    rest = steps - whole.astype(jnp.float32)
    whole = whole + ((rest > 0.5) | ((rest == 0.5) & (whole & 1 == 1))).astype(jnp.int32)
    small = whole.astype(jnp.float32) * 2.0**-9
    rounded = lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isnan(x), x, jnp.where(x < 2.0**-6, small, rounded))


def _erf(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns the error function, within 5e-7: a ratio of polynomials, as in `ffi/cpu/floats.h`."""
    x = clamp(x, -3.92, 3.92)
    t = x * x
    above = _polynomial(
        t, 2.0257592e-06, 0.000284715, 0.0038092206, 0.052878678, 0.19157454, 1.1283791
    )
    below = _polynomial(t, 3.78317e-05, 0.00117099, 0.015057188, 0.11456967, 0.5031112, 1.0)
    return clamp(x * above / below, -1.0, 1.0)


def _polynomial(t: Array, *coefficients: float) -> Array:
    total = jnp.full_like(t, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * t + coefficient
    return total


def _exact_divide(a: Array, b: Array) -> Array:
    (quotient,) = plgpu.elementwise_inline_asm(
        "div.rn.f32 $0, $1, $2;",
        args=[a, b],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.float32)],
    )
    return quotient
