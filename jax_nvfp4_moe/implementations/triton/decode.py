"""Decodes packed NVFP4 weights into operands of a tensor core, in registers.

Four codes form a little-endian 16-bit word; word q of a row holds its elements 4q to 4q + 3.
Element j of all words forms a matrix, the quarter j. The columns of the activations are split in
the same way, and a contraction is the sum of the contractions of its four quarters. So decoded
values never have to move.

An operand is ``e2m1 * scale * 2**-8``, exact in bfloat16 and in float16.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16, Float32, Int16, UInt8

from jax_nvfp4_moe.format import doubled_codes

QUARTERS = 4
# The factor that operands lack; it multiplies the sum after the contraction.
OPERAND_SCALE = 2.0**8

# The bits of an E2M1 code, placed as a bfloat16's sign, two lowest exponent bits and highest
# fraction bit, are 2**-126 times the code's value. This holds for 0.5 too, a subnormal of both
# types. The product with a block scale that carries a factor of 2**118 is exact, and one
# instruction computes two products.
_SCALE_EXPONENT = 118
# PTX that moves the codes at bits 0, 4, 8 and 12 of each half of $1 to these bits: 15, 8 and 7, 6.
# An integer product moves a code's sign and magnitude at once. The multiplication is an fma with
# -0, the only packed bfloat16 multiplication that SM80 has.
_SPREAD = {
    0: "and.b32 t, $1, 0x000F000F; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;",
    1: "and.b32 t, $1, 0x00F000F0; mul.lo.u32 t, t, 0x0104; and.b32 t, t, 0x81C081C0;",
    2: "shr.u32 t, $1, 8; and.b32 t, t, 0x000F000F; mul.lo.u32 t, t, 0x1040; "
    "and.b32 t, t, 0x81C081C0;",
    3: "shr.u32 t, $1, 6; and.b32 t, t, 0x01C001C0; and.b32 u, $1, 0x80008000; or.b32 t, t, u;",
}


def asm(quarter: int) -> str:
    """Returns the PTX that decodes one quarter of two words, $1, with two bfloat16 scales, $2."""
    product = "mov.b32 u, 0x80008000; fma.rn.bf16x2 $0, t, $2, u;"
    return f"{{ .reg .b32 t, u; {_SPREAD[quarter]} {product} }}"


def scale_values(scale: UInt8[Array, "N B"]) -> Float32[Array, "N B"]:
    """Returns the values of E4M3 bytes times 2**118, in float32; NaN stays NaN.

    Computed in integers, because GPUs older than SM89 have no conversion, and because some machines
    flush subnormal floats when they interpret this kernel.
    """
    bits = scale.astype(jnp.int32)
    magnitude = bits & 0x7F
    exponent = 127 - 7 + _SCALE_EXPONENT
    value = lax.bitcast_convert_type((magnitude << 20) + (exponent << 23), jnp.float32)
    # Subnormals: exponent 0 means the same power of two as exponent 1, without the leading 1.
    value = jnp.where(magnitude < 8, 2 * value - 2.0 ** (_SCALE_EXPONENT - 6), value)
    value = jnp.where(magnitude == 0x7F, jnp.nan, value)
    return jnp.where(bits > 0x7F, -value, value)


def operand(
    words: Int16[Array, "N Q"], scale: BFloat16[Array, "N Q"], quarter: int, *, native: bool
) -> BFloat16[Array, "N Q"]:
    """Returns one quarter of a tile of weights, ``e2m1 * scale * 2**-8``.

    Args:
        words: four codes each.
        scale: from `scale_values`, repeated over its block's four words.
        quarter: which element of a word, 0 to 3.
        native: whether to decode in PTX, for a GPU, or in jax.numpy, for the interpreter.
    """
    if native:
        (values,) = plgpu.elementwise_inline_asm(
            asm(quarter),
            args=[words, scale],
            constraints="=r,r,r",
            pack=2,
            result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
        )
        return values
    codes = ((words.astype(jnp.int32) >> (4 * quarter)) & 0xF).astype(jnp.uint8)
    small = doubled_codes(codes).astype(jnp.float32) * (0.5 / OPERAND_SCALE)
    return (small * (scale.astype(jnp.float32) * 2.0**-_SCALE_EXPONENT)).astype(jnp.bfloat16)


def as_words(data: UInt8[Array, "*rows K/2"]) -> Int16[Array, "*rows K/4"]:
    """Returns packed codes as 16-bit words of four codes each; a view."""
    pairs = data.reshape(*data.shape[:-1], data.shape[-1] // 2, 2)
    return lax.bitcast_convert_type(pairs, jnp.int16)
