"""ggml's NVFP4 blocks: 64 elements in 36 bytes, made of codes and scales packed as ours are.

A block is four scales, then four groups of eight bytes: byte j of a group has element j in its low
bits and element j + 8 in its high ones, where ours has elements 2j and 2j + 1. To ggml a scale is
half its value and a code twice its own, so both stay as they are; only 0x7F, NaN, is 0 there.
"""

import numpy as np

ELEMENTS, BYTES = 64, 36


def blocks(codes, scale):
    """[rows, K / 2] and [rows, K / 16], bytes both, to [rows, K / 64, 36]; K a multiple of 64."""
    rows = len(codes)
    elements = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, -1, 4, 2, 8)
    packed = elements[:, :, :, 0] | elements[:, :, :, 1] << 4
    return np.concatenate([scale.reshape(rows, -1, 4), packed.reshape(rows, -1, 32)], axis=-1)
