"""How many tokens the TRTLLM-Gen function takes at once, and how much memory it allocates.

Source: data/csrc/trtllm_fused_moe_kernel_launcher.cu of flashinfer-python, lines 120-202 and
1763-1934 of 0.6.13, 1050-1125, 1431-1474, 1589-1593 and 5192-5237 of 0.7.2.post1.
"""

import dataclasses
import math

# Each tensor of the workspace begins at a multiple of this, in the bridge.
_ALIGNMENT = 256

# No grid is higher than this; no tile is wider than 128 tokens unless it is chosen by hand.
_MAX_CTAS, _TILE = 65535, 128
_MAX_TOKENS = 300_000


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one call.

    Attributes:
        tokens: T, 1 or more.
        top_k: K.
        num_experts: of all devices, as the function is told.
        local_experts: of this one.
        hidden_size: H, padded.
        intermediate_size: I, padded.
        per_token: whether each token has a scale of its own.
    """

    tokens: int
    top_k: int
    num_experts: int
    local_experts: int
    hidden_size: int
    intermediate_size: int
    per_token: bool


def max_tokens(top_k: int, num_experts: int) -> int:
    """How many tokens one call takes.

    (vLLM 0.33.0, fused_moe/experts/trtllm_nvfp4_moe.py, lines 259-279: every expert's last tile may
    be filled with a single token.)

    Args:
        top_k: K.
        num_experts: of all devices.
    """
    pairs = num_experts + (_MAX_CTAS - num_experts + 1) * _TILE - 1
    return min(_MAX_TOKENS, pairs // top_k)


@dataclasses.dataclass(frozen=True)
class _Release:
    """What of the workspace differs between versions.

    Attributes:
        tiles: of tokens, from which the function chooses by itself.
        extra_row: whether the map of padded rows has one entry more.
        has_ids: whether there is a buffer for ids, though the caller brings one.
    """

    tiles: tuple[int, ...]
    extra_row: bool
    has_ids: bool


_RELEASES = {
    "0.6.13": _Release((8, 16, 32, 64, 128), extra_row=False, has_ids=False),
    "0.7.2.post1": _Release((8, 16, 32, 64, 128, 192), extra_row=True, has_ids=True),
}


def workspace_bytes(version: str, sizes: Sizes) -> int:
    """What the function allocates in one call with the tactic that it chooses by itself.

    Args:
        version: flashinfer-python's.
        sizes: the call's.
    """
    release = _RELEASES[version]
    pairs = sizes.tokens * sizes.top_k
    # The largest below an expert's share of the tokens.
    smaller = [tile for tile in release.tiles if tile * sizes.local_experts < pairs]
    tile = max(smaller, default=release.tiles[0])
    hit = min(sizes.num_experts, pairs)
    ctas = hit + (pairs - hit) // tile
    rows = ctas * tile
    # At least as many as some kernels fill with one copy.
    rows1 = max(rows, math.ceil(2**20 / (4 * sizes.intermediate_size)))
    rows2 = max(rows, math.ceil(2**20 / (16 * sizes.hidden_size)))
    routing = (
        4 * sizes.num_experts,
        4,
        4 * pairs,
        4 * (rows + release.extra_row),
        *([4 * pairs] if release.has_ids else []),
        4 * max(2 * sizes.num_experts, 512),
        4 * ctas,
        4 * ctas,
        4,
    )
    quantized = rows1 * sizes.intermediate_size // 2
    # In bfloat16 first, then quantised with each row's scale.
    hidden = (4 * quantized, quantized, 4 * rows1) if sizes.per_token else (quantized,)
    scales = 128 * math.ceil(rows1 / 128) * 4 * math.ceil(sizes.intermediate_size / 64)
    used = 0
    for size in (*routing, scales, *hidden, 2 * rows2 * sizes.hidden_size):
        used = _ALIGNMENT * math.ceil(used / _ALIGNMENT) + size
    return used
