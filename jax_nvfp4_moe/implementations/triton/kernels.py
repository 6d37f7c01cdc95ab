"""A grouped GEMM on packed weights, as a Pallas kernel for Triton.

A tile is a group of one expert's tokens; a program multiplies it by some rows of the expert's
weights. Weights are the left operand and tokens the right one: a matrix unit then wastes little on
few tokens, and weights are decoded into the registers from which it reads its left operand. An
`Epilogue` processes the products while they are in registers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int16, Int32, UInt8

from jax_nvfp4_moe.format import BLOCK_SIZE
from jax_nvfp4_moe.implementations.common.grouping import Tiles
from jax_nvfp4_moe.implementations.triton.decode import (
    OPERAND_SCALE,
    QUARTERS,
    operand,
    scale_values,
)
from jax_nvfp4_moe.implementations.triton.epilogues import quantized
from jax_nvfp4_moe.implementations.triton.tilings import Tiling

_WORDS = BLOCK_SIZE // QUARTERS  # words in a block
_QUANTIZE_COLUMNS = 512  # columns that one program of `quantize_rows` processes


class Weights(NamedTuple):
    """One matrix of all experts, in any layout.

    Attributes:
        words: the packed codes, [E, N', K'/4].
        scale: the block scales' bytes, [E, N' * K'/16].
        order: where each of the N logical rows is stored; None if row n is stored at n.
        groups: G, the number of groups of N / G rows: 2 for gate and up, else 1.
        global_scale: decode scales, one for each group [E, G] or one for all of them [E, 1].
        bias: [E, N], or None.
    """

    words: Int16[Array, "E N' K'/4"]
    scale: UInt8[Array, "E N'*K'/16"]
    order: Int32[Array, " N"] | None
    groups: int
    global_scale: Float32[Array, "E #G"]
    bias: Float32[Array, "E N"] | None


# A function of the finished products of each group [N/G, M], and of a scale or None, that returns
# the values to store [M, N/G].
Epilogue = Callable[[tuple[Array, ...], Array | None], Array]


def quantize_rows(
    x: Float[Array, "R K"],
    scale: Float32[Array, ""],
    result: jax.ShapeDtypeStruct,
    *,
    interpret: bool,
) -> BFloat16[Array, "R K"]:
    """Returns rows quantised at a decode scale, as operands of `grouped_gemm`.

    Args:
        x: bfloat16, float16 or float32.
        scale: the decode scale; the result does not include it.
        result: the result's shape and dtype, [R, K]; its columns are in the order of the quarters.
        interpret: whether JAX's interpreter runs the kernel, on any device.
    """
    size = x.shape[1]

    def nvfp4_moe_quantize(x: Any, scale: Any, out: Any) -> None:
        row, part = pl.program_id(0), pl.program_id(1)
        column = part * _QUANTIZE_COLUMNS + jnp.arange(_QUANTIZE_COLUMNS, dtype=jnp.int32)
        index, mask = (row[None], column), column < size
        values = plgpu.load(x.at[index], mask=mask, other=0).astype(jnp.float32)
        values = quantized(values[None], scale[0], native=not interpret)[0].astype(out.dtype)
        # Masked lanes get places beyond the last column: under a mask the interpreter writes the
        # old values back.
        column = jnp.where(mask, _in_quarters(column, size), column)
        plgpu.store(out.at[row[None], column], values, mask=mask)

    return pl.pallas_call(
        nvfp4_moe_quantize,
        out_shape=result,
        grid=(len(x), pl.cdiv(size, _QUANTIZE_COLUMNS)),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="nvfp4_moe_quantize",
    )(x, scale.reshape(1))


def grouped_gemm(
    rows: Float[Array, "R K"],
    row_scale: Float32[Array, " R"] | Float32[Array, "1"] | None,
    weights: Weights,
    tiles: Tiles,
    pair: Int32[Array, " P"] | None,
    scale: Float32[Array, ""] | None,
    epilogue: Epilogue,
    result: jax.ShapeDtypeStruct,
    *,
    in_quarters: bool,
    swizzled: bool,
    top_k: int | None,
    tokens: int,
    tiling: Tiling,
    interpret: bool,
    name: str,
) -> Array:
    """Multiplies every tile's rows by its expert's weights.

    A place is an index into the pairs sorted by expert.

    Args:
        rows: the right operand; its columns are in the order of the quarters.
        row_scale: decode scales, not yet applied, one for each row or one for all; or None.
        weights: the weights of all experts.
        tiles: each tile's expert and rows.
        pair: the (token, slot) pair at each place; None if place i holds pair i.
        scale: the epilogue's scale, or None.
        epilogue: computes the values to store from the products.
        result: the result's shape and dtype, [P, N / G]; rows that are in no tile are not written.
        in_quarters: whether the result's columns are stored in the order of the quarters.
        top_k: for GEMM1, K: `rows` has a row for each token, the result one for each place. None,
            for GEMM2: `rows` has a row for each place, the result one for each pair.
        swizzled: whether the block scales are in 128 x 4 tiles (`layouts.swizzle_scales`).
        tokens: the number of rows of a tile.
        tiling: the tile sizes of the weights.
        interpret: whether JAX's interpreter runs the kernel, on any device.
        name: the kernel's name.
    """
    optional = {
        "row_scale": row_scale,
        "order": weights.order,
        "bias": weights.bias,
        "first": tiles.first,
        "live": tiles.live,
        "pair": pair,
        "epilogue_scale": None if scale is None else scale.reshape(1),
    }
    given = {key: value for key, value in optional.items() if value is not None}
    fixed = {
        "expert": tiles.expert,
        "rows": rows,
        "words": weights.words,
        "scale": weights.scale,
        "global_scale": weights.global_scale,
    }
    names = (*fixed, *given)

    def kernel(*refs: Any) -> None:
        *inputs, out = refs
        _program(
            dict(zip(names, inputs, strict=True)),
            out,
            epilogue,
            groups=weights.groups,
            in_quarters=in_quarters,
            swizzled=swizzled,
            top_k=top_k,
            tokens=tokens,
            tiling=tiling,
            native=not interpret,
        )

    kernel.__name__ = name
    return pl.pallas_call(
        kernel,
        out_shape=result,
        grid=(len(tiles.expert), pl.cdiv(result.shape[1], tiling.weight_rows)),
        compiler_params=plgpu.CompilerParams(
            num_warps=tiling.num_warps, num_stages=tiling.num_stages
        ),
        interpret=interpret,
        name=name,
    )(*fixed.values(), *given.values())


def _program(
    refs: dict[str, Any],
    out: Any,
    epilogue: Epilogue,
    *,
    groups: int,
    in_quarters: bool,
    swizzled: bool,
    top_k: int | None,
    tokens: int,
    tiling: Tiling,
    native: bool,
) -> None:
    # Read here, because the interpreter does not support program_id inside pl.when.
    tile, part = pl.program_id(0), pl.program_id(1)
    expert = refs["expert"][tile]
    live = refs["live"][tile] if "live" in refs else 1

    @pl.when((live > 0) & (expert >= 0) & (expert < refs["words"].shape[0]))
    def _() -> None:
        lane = jnp.arange(tokens, dtype=jnp.int32)
        is_live = lane < live
        place = (refs["first"][tile] if "first" in refs else tile) + jnp.where(is_live, lane, 0)
        pair = refs["pair"][place] if "pair" in refs else place
        source, target = (place, pair) if top_k is None else (pair // top_k, place)

        size = out.shape[1]
        row = jnp.arange(tiling.weight_rows, dtype=jnp.int32)
        column = part * tiling.weight_rows + row
        inside = column < size
        column = jnp.where(inside, column, 0)
        logical = [column + group * size for group in range(groups)]
        stored = [refs["order"][n] if "order" in refs else n for n in logical]
        sums = _contract(
            refs,
            expert,
            source,
            is_live,
            stored,
            swizzled=swizzled,
            tiling=tiling,
            native=native,
        )

        finished = []
        for group, (total, n) in enumerate(zip(sums, logical, strict=True)):
            separate = refs["global_scale"].shape[1] > 1
            factor = refs["global_scale"][expert, group if separate else 0]
            if "row_scale" in refs:
                shared = refs["row_scale"].shape == (1,)
                row_scale = refs["row_scale"][0 if shared else source]
                factor = factor * (row_scale if shared else row_scale[None, :])
            value = (total * OPERAND_SCALE) * factor
            if "bias" in refs:
                value = value + refs["bias"][expert, n][:, None]
            finished.append(value)

        scale = refs["epilogue_scale"][0] if "epilogue_scale" in refs else None
        values = epilogue(tuple(finished), scale).astype(out.dtype)
        if in_quarters:
            column = _in_quarters(column, size)
        # Under a mask the interpreter writes old values back, so every lane needs its own place.
        target = jnp.where(is_live, target, out.shape[0] + lane)
        column = jnp.where(inside, column, size + row)
        mask = is_live[:, None] & inside[None, :]
        plgpu.store(out.at[target[:, None], column[None, :]], values, mask=mask)


def _contract(
    refs: dict[str, Any],
    expert: Array,
    source: Int32[Array, " M"],
    is_live: Bool[Array, " M"],
    stored: list[Int32[Array, " N"]],
    *,
    swizzled: bool,
    tiling: Tiling,
    native: bool,
) -> tuple[Float32[Array, "N M"], ...]:
    """Returns each weight group's sums over all columns, without the factor `OPERAND_SCALE`."""
    rows, words, scales = refs["rows"], refs["words"], refs["scale"]
    words_a_row, blocks_a_row = rows.shape[1] // QUARTERS, words.shape[2] // _WORDS
    ragged = words_a_row % tiling.words != 0

    def body(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        word = step * tiling.words + jnp.arange(tiling.words, dtype=jnp.int32)
        block = step * (tiling.words // _WORDS)
        block = block + jnp.arange(tiling.words // _WORDS, dtype=jnp.int32)

        def load(ref: Any, index: tuple[Array, ...], within: Array, live: Array | None) -> Array:
            """Returns values, with zeros beyond the last column and in rows that are not live."""
            masks = ([] if live is None else [live]) + ([within] if ragged else [])
            if not masks:
                return plgpu.load(ref.at[index])
            shape = jnp.broadcast_shapes(*(array.shape for array in index))
            mask = functools.reduce(jnp.logical_and, (jnp.broadcast_to(m, shape) for m in masks))
            return plgpu.load(ref.at[index], mask=mask, other=0)

        within, live = (word < words_a_row)[:, None], is_live[None, :]
        xs = [
            load(rows, (source[None, :], quarter * words_a_row + word[:, None]), within, live)
            for quarter in range(QUARTERS)
        ]

        def added(total: Array, n: Array) -> Array:
            at = jnp.broadcast_to(expert, (1, 1)), n[:, None], word[None, :]
            codes = load(words, at, (word < words_a_row)[None, :], None)
            at = at[0], _scale_index(n[:, None], block[None, :], blocks_a_row, swizzled)
            scale = load(scales, at, (block < words_a_row // _WORDS)[None, :], None)
            scale = scale_values(scale).astype(jnp.bfloat16)[:, :, None]
            scale = jnp.broadcast_to(scale, (*scale.shape[:2], _WORDS)).reshape(codes.shape)
            for quarter, x in enumerate(xs):
                left = operand(codes, scale, quarter, native=native)
                for part in _parts(x):
                    total += _dot(left.astype(part.dtype), part, native)
            return total

        return tuple(map(added, sums, stored))

    start = tuple(jnp.zeros((len(n), len(source)), jnp.float32) for n in stored)
    return lax.fori_loop(0, pl.cdiv(words_a_row, tiling.words), body, start)


def _parts(x: Float[Array, "K M"]) -> list[Array]:
    """Returns operands that add up to x exactly: three bfloat16 arrays if x is float32, else x."""
    if x.dtype != jnp.float32:
        return [x]
    parts = []
    for _ in range(3):
        # The upper half is a bfloat16; truncating instead of rounding makes no value larger.
        bits = lax.bitcast_convert_type(x, jnp.int32) & -0x10000
        part = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = jnp.where(jnp.isfinite(part), x - part, 0.0)
    return parts


def _dot(left: Float[Array, "N K"], right: Float[Array, "K M"], native: bool) -> Array:
    if not native:  # the interpreter's device may not multiply narrow types
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return lax.dot(left, right, preferred_element_type=jnp.float32)


def _in_quarters(column: Array, size: int) -> Array:
    """Returns a column's place in the order of the quarters."""
    return column % QUARTERS * (size // QUARTERS) + column // QUARTERS


def _scale_index(row: Array, block: Array, blocks_a_row: int, swizzled: bool) -> Array:
    """Returns the index of a block's scale among its expert's scales."""
    if not swizzled:
        return row * blocks_a_row + block
    # The scales of 128 rows by 4 blocks form a tile of 512 bytes (`layouts.swizzle_scales`).
    tile = (row // 128) * (blocks_a_row // 4) + block // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4
