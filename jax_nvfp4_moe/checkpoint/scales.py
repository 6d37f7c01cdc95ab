"""Which values scales may have."""

from collections.abc import Callable

import numpy as np

from jax_nvfp4_moe.checkpoint.scheme import Parts
from jax_nvfp4_moe.format import BLOCK_SIZE

_FLOAT32_TINY = np.finfo(np.float32).tiny


def decoded_scalars(stored: np.ndarray, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """Returns decode scales of stored float32 scales, and where they cannot be scales.

    A scale and its reciprocal are finite, normal and above 0.
    """
    with np.errstate(divide="ignore", over="ignore"):
        decoded = parts.decode_scale(stored)
    bad = ~(np.isfinite(stored) & np.isfinite(decoded))
    bad |= (stored < _FLOAT32_TINY) | (decoded < _FLOAT32_TINY)
    return decoded, bad


def bad_block_scales(
    scales: np.ndarray, codes: Callable[[], np.ndarray]
) -> tuple[str, np.ndarray] | None:
    """Returns what is wrong with block scales and where, or None.

    Args:
        scales: float8_e4m3fn [rows, columns / 16].
        codes: returns the packed codes, uint8 [rows, columns / 2]. Called only where a scale is 0,
            which a block of zeros may have and no other.
    """
    bits = scales.view(np.uint8)
    nan, negative = (bits & 0x7F) == 0x7F, bits > 0x80
    if nan.any():
        return "NaN", nan
    if negative.any():
        return "negative", negative
    zero = (bits & 0x7F) == 0
    if not zero.any():
        return None
    rows, blocks = np.nonzero(zero)
    columns = blocks[:, None] * (BLOCK_SIZE // 2) + np.arange(BLOCK_SIZE // 2)
    lost = ((codes()[rows[:, None], columns] & 0x77) != 0).any(axis=1)
    if not lost.any():
        return None
    bad = np.zeros_like(zero)
    bad[rows[lost], blocks[lost]] = True
    return "zero for a nonzero block", bad
