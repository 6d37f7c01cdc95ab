"""Weight and scale layouts as pure index maps, each with its exact inverse.

Glossary: E experts, H hidden size, I intermediate size, G = 2 gated or 1 not gated, K contraction
size (H for w13, I for w2). Weights are packed bytes `[E, rows, K/2]`, scales one byte per 16
elements, `[E, rows, K/16]`; w13 has G*I rows, w2 has H.

* **linear**: as in checkpoints. w13 is `[gate ; up]`, scales are row-major.
* **trtllm**: FlashInfer's TRTLLM-Gen kernels. Up and gate rows alternate, each block of 32 rows is
  shuffled (8x4 rows read as 4x8), scales are swizzled in 128x4 tiles.
* **cute_dsl**: FlashInfer's CuTe-DSL kernels. Groups of 64 up rows and 64 gate rows alternate,
  nothing is shuffled, scales are swizzled in 128x4 tiles.

Four steps lead from linear to a kernel's layout: `padded_sizes`; `pad_w13` or `pad_w2`; a gather of
rows by `w13_row_order` or `w2_row_order` (`w[..., order, :]`, for bytes and scales); and
`swizzle_scales`, for scales only. The way back is `unswizzle_scales`, a gather by
`inverse_order(order)`, and `trim_w13` or `trim_w2`.

Every map moves elements and never computes with them, so it preserves the bits of any dtype. A
numpy array gives a numpy array (possibly a view), and a JAX array, which may be traced, gives a JAX
array. Sizes and order vectors are always host values, hence constants under `jax.jit`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar, get_args

import jax
import numpy as np
from jaxtyping import Int32, Shaped

from jax_nvfp4_moe.format import BLOCK_SIZE

ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)
Layout = Literal["linear", "trtllm", "cute_dsl"]

SCALE_ROWS, SCALE_COLS = 128, 4  # one tile of swizzled scales
SHUFFLE_ROWS = 32  # rows that TRTLLM-Gen shuffles together, for its epilogue tiles of 128 rows


def round_up(n: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def padded_sizes(
    layout: Layout,
    hidden_size: int,
    intermediate_size: int,
    *,
    gated: bool,
    per_token: bool = False,
) -> tuple[int, int]:
    """Returns the sizes (H', I') to which a layout zero-pads weights.

    The rule is vllm@0.33.0's. It meets TRTLLM-Gen's multiples of rows, K and scale tiles
    (flashinfer-cubin@0.6.13: BatchedGemmOptions.h:447-451,579-592). It also gives CuTe-DSL's
    default tactic whole tiles, 2I % 128 == 0 and H % 128 == 0. flashinfer-python@0.6.13 does not
    check these: with other sizes it writes out of bounds (flashinfer#3957).

    Args:
        layout: "linear" pads nothing; "trtllm" and "cute_dsl" share one rule.
        hidden_size: H, a positive multiple of 16.
        intermediate_size: I, a positive multiple of 16.
        gated: whether w13 holds a gate half and an up half.
        per_token: whether each token has its own activation scale.

    Returns:
        H rounded up to a multiple of 256 (512 if per token and not gated), and I rounded up to a
        multiple of 64 (128 if not gated).

    Raises:
        ValueError: the layout is unknown, or a size is not a multiple of 16.
    """
    _check(layout, "hidden_size", hidden_size, BLOCK_SIZE)
    _check(layout, "intermediate_size", intermediate_size, BLOCK_SIZE)
    if layout == "linear":
        return hidden_size, intermediate_size
    hidden_multiple = 512 if per_token and not gated else 256
    return round_up(hidden_size, hidden_multiple), round_up(intermediate_size, 64 if gated else 128)


def pad_w13(
    w: Shaped[ArrayT, "... GI C"], *, gated: bool, rows: int, cols: int
) -> Shaped[ArrayT, "... Gr c"]:
    """Zero-pads w13 or its scales from `[..., G*I, C]` to `[..., G*rows, cols]`, any dtype.

    Gate and up are padded separately. Raises ValueError if a gated w13 has an odd number of rows,
    or if a target size is smaller than the array.
    """
    return _per_half(w, gated, partial(pad_w2, rows=rows, cols=cols))


def trim_w13(
    w: Shaped[ArrayT, "... GI C"], *, gated: bool, rows: int, cols: int
) -> Shaped[ArrayT, "... Gr c"]:
    """Inverts `pad_w13`: trims `[..., G*I', C']` to `[..., G*rows, cols]`.

    Raises ValueError if a gated w13 has an odd number of rows, or if a target size is larger than
    the array.
    """
    return _per_half(w, gated, partial(trim_w2, rows=rows, cols=cols))


def pad_w2(w: Shaped[ArrayT, "... H C"], *, rows: int, cols: int) -> Shaped[ArrayT, "... r c"]:
    """Zero-pads w2 or its scales from `[..., H, C]` to `[..., rows, cols]`.

    Raises ValueError if a target size is smaller than the array.
    """
    lead, r, c = _shape("w", w)
    if rows < r or cols < c:
        raise ValueError(f"cannot pad {w.shape} to {rows=}, {cols=}: need at least {r}, {c}")
    if (rows, cols) == (r, c):
        return w  # numpy's pad would copy gigabytes
    widths = [(0, 0)] * len(lead) + [(0, rows - r), (0, cols - c)]
    return w.__array_namespace__().pad(w, widths)


def trim_w2(w: Shaped[ArrayT, "... H C"], *, rows: int, cols: int) -> Shaped[ArrayT, "... r c"]:
    """Inverts `pad_w2`: trims `[..., H', C']` to `[..., rows, cols]`.

    Raises ValueError if a target size is larger than the array.
    """
    _, r, c = _shape("w", w)
    if not (0 < rows <= r and 0 < cols <= c):
        raise ValueError(f"cannot trim {w.shape} to {rows=}, {cols=}: need at most {r}, {c}")
    return w[..., :rows, :cols]


def w13_row_order(
    layout: Layout, intermediate_size: int, *, gated: bool, interleave: int = 64
) -> Int32[np.ndarray, "GI"]:
    """Returns, for each stored row of w13, its row in the linear layout (gate then up).

    The kernels expect up before gate (flashinfer-python@0.6.13: trace/templates/moe.py:1169-1172);
    this map includes that swap. TRTLLM-Gen alternates rows and then shuffles them (fused_moe/
    core.py:195, utils.py:832). CuTe-DSL alternates groups: fused_moe/cute_dsl/blackwell/
    blockscaled_contiguous_gather_grouped_gemm_swiglu_fusion.py:64. Biases have the same order.

    Args:
        layout: "linear" (the identity), "trtllm" or "cute_dsl".
        intermediate_size: I, after padding.
        gated: whether w13 holds a gate half and an up half.
        interleave: rows in one of CuTe-DSL's groups, 64 in flashinfer-python 0.6.13. Only gated
            weights in the "cute_dsl" layout use it.

    Returns:
        int32 `[G*I]`, a permutation.

    Raises:
        ValueError: the layout is unknown, or its tiles do not divide a size.
    """
    _check(layout, "interleave", interleave, 1)
    parts = 2 if gated else 1
    width = interleave if gated and layout == "cute_dsl" else 1
    multiple = 1 if layout == "linear" else math.lcm(SCALE_ROWS // parts, width)
    _check(layout, "intermediate_size", intermediate_size, multiple)

    source = np.arange(parts * intermediate_size, dtype=np.int32)
    if layout == "trtllm":
        source = _shuffled(source)
    if layout == "linear" or not gated:
        return source
    # Groups of up and gate rows alternate, up first; TRTLLM-Gen's hold a single row.
    group, row = np.divmod(source, width)
    pair, is_gate = np.divmod(group, 2)
    return pair * width + row + (1 - is_gate) * intermediate_size


def w2_row_order(layout: Layout, hidden_size: int) -> Int32[np.ndarray, "H"]:
    """Returns, for each stored row of w2, its row in the linear layout: int32 `[H]`, padded H.

    TRTLLM-Gen shuffles rows (flashinfer-python@0.6.13: utils.py:832); the other layouts keep their
    order. Raises ValueError if the layout is unknown, or its tiles do not divide H.
    """
    _check(layout, "hidden_size", hidden_size, 1 if layout == "linear" else SCALE_ROWS)
    source = np.arange(hidden_size, dtype=np.int32)
    return _shuffled(source) if layout == "trtllm" else source


def inverse_order(order: Int32[np.ndarray, "N"]) -> Int32[np.ndarray, "N"]:
    """Returns the inverse permutation of `order`; ValueError if `order` is not a permutation."""
    inverse = np.argsort(order).astype(np.int32)
    if not np.array_equal(order[inverse], np.arange(len(order))):
        raise ValueError(f"order must hold each of 0..{len(order) - 1} exactly once, got {order}")
    return inverse


def swizzle_scales(scales: Shaped[ArrayT, "... R C"]) -> Shaped[ArrayT, "... R128 C4"]:
    """Reorders row-major scales into 128x4 tiles, zero-padded to whole tiles.

    With R and C rounded up, scale (i, j) of one matrix moves to flat byte
    `swz(i, j) = ((i//128)*(C//4) + j//4)*512 + (i%32)*16 + ((i%128)//32)*4 + j%4`
    (flashinfer-python@0.6.13: cute_dsl/utils.py:339). CuTe-DSL's six-dimensional operand is a view
    of these same bytes.

    Args:
        scales: any one-byte dtype, `[..., R, C]`, C = K/16.

    Returns:
        The same dtype, `[..., round_up(R, 128), round_up(C, 4)]`, bytes in swizzled order.

    Raises:
        ValueError: `scales` has fewer than two dimensions, or its elements are larger than a byte.
    """
    lead, rows, cols = _shape("scales", scales)
    if scales.dtype.itemsize != 1:
        raise ValueError(f"scales must be one byte each (float8_e4m3fn, uint8), got {scales.dtype}")
    rows, cols = round_up(rows, SCALE_ROWS), round_up(cols, SCALE_COLS)
    tiles = (*lead, rows // SCALE_ROWS, 4, 32, cols // SCALE_COLS, SCALE_COLS)
    padded = pad_w2(scales, rows=rows, cols=cols)
    # The swap makes rows i, i+32, i+64 and i+96 of a tile adjacent: 16 bytes, read together.
    return padded.reshape(tiles).swapaxes(-4, -2).reshape(*lead, rows, cols)


def unswizzle_scales(
    swizzled: Shaped[ArrayT, "... R128 C4"], *, rows: int, cols: int
) -> Shaped[ArrayT, "... rows cols"]:
    """Inverts `swizzle_scales`: returns row-major scales `[..., rows, cols]` without padding.

    Raises ValueError unless `swizzled` is `[..., round_up(rows, 128), round_up(cols, 4)]`.
    """
    lead, *found = _shape("swizzled", swizzled)
    tall, wide = padded = [round_up(rows, SCALE_ROWS), round_up(cols, SCALE_COLS)]
    if found != padded:
        raise ValueError(f"swizzled must end in {padded} for {rows=}, {cols=}: {swizzled.shape}")
    tiles = (*lead, tall // SCALE_ROWS, wide // SCALE_COLS, 32, 4, SCALE_COLS)
    linear = swizzled.reshape(tiles).swapaxes(-4, -2).reshape(*lead, tall, wide)
    return trim_w2(linear, rows=rows, cols=cols)


def _shuffled(rows: np.ndarray) -> np.ndarray:
    """Returns TRTLLM-Gen's source of each row: blocks of 8x4 rows, read as 4x8."""
    within = rows % SHUFFLE_ROWS
    return rows - within + within % 8 * 4 + within // 8


def _per_half(w: ArrayT, gated: bool, resize: Callable[[ArrayT], ArrayT]) -> ArrayT:
    lead, rows, cols = _shape("w", w)
    parts = 2 if gated else 1
    if rows % parts:
        raise ValueError(f"w must have an even number of rows when gated, got shape {w.shape}")
    halves = resize(w.reshape(*lead, parts, rows // parts, cols))
    return halves.reshape(*lead, parts * halves.shape[-2], halves.shape[-1])


def _shape(name: str, array: np.ndarray | jax.Array) -> tuple[tuple[int, ...], int, int]:
    if array.ndim < 2:
        raise ValueError(f"{name} must have at least two dimensions, got shape {array.shape}")
    return array.shape[:-2], array.shape[-2], array.shape[-1]


def _check(layout: str, name: str, value: int, multiple: int) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    if value <= 0 or value % multiple:
        fits = max(multiple, round_up(value, multiple))
        need = f"a positive multiple of {multiple}; nearest above: {fits}"
        raise ValueError(f"{name}={value}: the {layout} layout needs {need}")
