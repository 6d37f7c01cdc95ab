"""One grouped GEMM on packed weights, as a Pallas kernel for Triton.

A tile is some rows of one expert's tokens, a program multiplies them by some rows of its weights:
weights from the left, tokens from the right, so that few tokens waste little of a matrix unit, and
weights are decoded into the registers from which it reads its left operand. What follows the
products, while they are in registers, is an `Epilogue`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int16, Int32, UInt8

from jax_nvfp4_moe.format import BLOCK_SIZE
from jax_nvfp4_moe.implementations._grouping import Tiles
from jax_nvfp4_moe.implementations._triton_decode import (
    OPERAND_SCALE,
    QUARTERS,
    operand,
    scale_values,
)
from jax_nvfp4_moe.implementations._triton_tilings import Tiling

_WORDS = BLOCK_SIZE // QUARTERS  # of a block


class Weights(NamedTuple):
    """One matrix of all experts, in any layout.

    Attributes:
        words: the packed codes, [E, N', K'/4].
        scale: the block scales' bytes, [E, N' * K'/16].
        order: where each of the N logical rows is stored; None where that is its own place.
        global_scale: decode scales, one for each of the G groups of N / G rows.
        bias: [E, N], or None.
    """

    words: Int16[Array, "E N' K'/4"]
    scale: UInt8[Array, "E N'*K'/16"]
    order: Int32[Array, " N"] | None
    global_scale: Float32[Array, "E G"]
    bias: Float32[Array, "E N"] | None


# From the products of each group [N/G, M], finished, and the encode scale, if one is given, to what
# is stored [M, N/G].
Epilogue = Callable[[tuple[Array, ...], Array | None], Array]


def grouped_gemm(
    rows: Float[Array, "R K"],
    row_scale: Float32[Array, " R"] | Float32[Array, "1"] | None,
    weights: Weights,
    tiles: Tiles,
    source: Int32[Array, " P"] | None,
    target: Int32[Array, " P"] | None,
    encode_scale: Float32[Array, ""] | None,
    epilogue: Epilogue,
    result: jax.ShapeDtypeStruct,
    *,
    in_quarters: bool,
    swizzled: bool,
    tokens: int,
    tiling: Tiling,
    interpret: bool,
    name: str,
) -> Array:
    """Every tile's rows times its expert's weights.

    Args:
        rows: the right operand, columns in the order of the quarters.
        row_scale: decode scales still to be multiplied, one for each row or for all; or None.
        weights: of all experts.
        tiles: which rows meet which expert.
        source: which of `rows` each place is; None means its own.
        target: which row of the result each place is; None means its own.
        encode_scale: for the epilogue, or None.
        epilogue: from the products to what is stored.
        result: [P, N / G]; rows that are in no tile are not written.
        in_quarters: whether the result's columns are stored in the order of the quarters.
        swizzled: whether the block scales are in 128 x 4 tiles (`layouts.swizzle_scales`).
        tokens: rows of a tile.
        tiling: how weights are cut.
        interpret: run by JAX's interpreter, on any device.
        name: of the kernel.
    """
    optional = {
        "row_scale": row_scale,
        "order": weights.order,
        "bias": weights.bias,
        "source": source,
        "target": target,
        "encode_scale": None if encode_scale is None else encode_scale.reshape(1),
    }
    given = {key: value for key, value in optional.items() if value is not None}
    fixed = {
        "expert": tiles.expert,
        "first": tiles.first,
        "live": tiles.live,
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
            in_quarters=in_quarters,
            swizzled=swizzled,
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
    in_quarters: bool,
    swizzled: bool,
    tokens: int,
    tiling: Tiling,
    native: bool,
) -> None:
    tile, part = pl.program_id(0), pl.program_id(1)  # the interpreter has neither under a condition
    live = refs["live"][tile]

    @pl.when(live > 0)
    def _() -> None:
        expert = refs["expert"][tile]
        lane = jnp.arange(tokens, dtype=jnp.int32)
        is_live = lane < live
        place = refs["first"][tile] + jnp.where(is_live, lane, 0)
        source = refs["source"][place] if "source" in refs else place
        target = refs["target"][place] if "target" in refs else place

        size = out.shape[1]
        row = jnp.arange(tiling.weight_rows, dtype=jnp.int32)
        column = part * tiling.weight_rows + row
        inside = column < size
        column = jnp.where(inside, column, 0)
        groups = refs["global_scale"].shape[1]
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
            factor = refs["global_scale"][expert, group]
            if "row_scale" in refs:
                shared = refs["row_scale"].shape == (1,)
                row_scale = refs["row_scale"][0 if shared else source]
                factor = factor * (row_scale if shared else row_scale[None, :])
            value = (total * OPERAND_SCALE) * factor
            if "bias" in refs:
                value = value + refs["bias"][expert, n][:, None]
            finished.append(value)

        encode = refs["encode_scale"][0] if "encode_scale" in refs else None
        values = epilogue(tuple(finished), encode).astype(out.dtype)
        if in_quarters:
            column = column % QUARTERS * (size // QUARTERS) + column // QUARTERS
        # The interpreter writes under a mask what was there before, so no two may share a place.
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
    """The sums over all columns, for each of the groups of weights, but for `OPERAND_SCALE`."""
    rows, words, scales = refs["rows"], refs["words"], refs["scale"]
    words_a_row, blocks_a_row = rows.shape[1] // QUARTERS, words.shape[2] // _WORDS
    ragged = words_a_row % tiling.words != 0

    def body(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        word = step * tiling.words + jnp.arange(tiling.words, dtype=jnp.int32)
        block = step * (tiling.words // _WORDS)
        block = block + jnp.arange(tiling.words // _WORDS, dtype=jnp.int32)

        def load(ref: Any, index: tuple[Array, ...], within: Array, live: Array | None) -> Array:
            """Zeros beyond the last column and in rows that are not live."""
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
                left = operand(codes, scale, quarter, native=native).astype(x.dtype)
                total += _dot(left, x, native)
            return total

        return tuple(map(added, sums, stored))

    start = tuple(jnp.zeros((len(n), len(source)), jnp.float32) for n in stored)
    return lax.fori_loop(0, pl.cdiv(words_a_row, tiling.words), body, start)


def _dot(left: Float[Array, "N K"], right: Float[Array, "K M"], native: bool) -> Array:
    if not native:  # the interpreter's machine may have no product of narrow types
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    # HIGHEST matters for float32 alone: it keeps TF32 off.
    return lax.dot(left, right, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _scale_index(row: Array, block: Array, blocks_a_row: int, swizzled: bool) -> Array:
    """Where a block's scale is among those of its expert."""
    if not swizzled:
        return row * blocks_a_row + block
    # 128 rows by 4 blocks lie together, in 32 times 4 rows (`layouts.swizzle_scales`).
    tile = (row // 128) * (blocks_a_row // 4) + block // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4
