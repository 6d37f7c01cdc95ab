"""The largest number of tokens in one call of the TRTLLM-Gen function, and its workspace size.

Source: data/csrc/trtllm_fused_moe_kernel_launcher.cu of flashinfer-python, lines 120-202 and
1763-1934 of 0.6.13, 1050-1125, 1431-1474, 1589-1593 and 5192-5237 of 0.7.2.post1.
"""

import dataclasses
import math

# The bridge aligns each tensor of the workspace to this many bytes.
_ALIGNMENT = 256

# The largest height of a grid, and the widest tile, in tokens, that is not chosen by hand.
_MAX_CTAS, _TILE = 65535, 128
_MAX_TOKENS = 300_000


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one call.

    Attributes:
        tokens: T, 1 or more.
        top_k: K.
        num_experts: the experts of all devices, as passed to the function.
        local_experts: this device's experts.
        hidden_size: H, padded.
        intermediate_size: I, padded.
        per_token: whether each token has its own scale.
    """

    tokens: int
    top_k: int
    num_experts: int
    local_experts: int
    hidden_size: int
    intermediate_size: int
    per_token: bool


def max_tokens(top_k: int, num_experts: int) -> int:
    """Returns the largest number of tokens that one call can process.

    In the worst case every expert's last tile holds a single token (vLLM 0.33.0,
    fused_moe/experts/trtllm_nvfp4_moe.py, lines 259-279).

    Args:
        top_k: K.
        num_experts: the experts of all devices.
    """
    pairs = num_experts + (_MAX_CTAS - num_experts + 1) * _TILE - 1
    return min(_MAX_TOKENS, pairs // top_k)


@dataclasses.dataclass(frozen=True)
class _Release:
    """The properties of the workspace that differ between versions.

    Attributes:
        tiles: the tile sizes, in tokens, among which the function chooses by default.
        extra_row: whether the map of padded rows has one more entry.
        has_ids: whether the workspace has a buffer for ids, in addition to the caller's.
    """

    tiles: tuple[int, ...]
    extra_row: bool
    has_ids: bool


_RELEASES = {
    "0.6.13": _Release((8, 16, 32, 64, 128), extra_row=False, has_ids=False),
    "0.7.2.post1": _Release((8, 16, 32, 64, 128, 192), extra_row=True, has_ids=True),
}


def workspace_bytes(version: str, sizes: Sizes) -> int:
    """Returns the bytes that the function allocates in one call with its default tactic.

    Args:
        version: the version of flashinfer-python.
        sizes: the call's sizes.
    """
    release = _RELEASES[version]
    pairs = sizes.tokens * sizes.top_k
    # The largest tile below an expert's average number of pairs.
    smaller = [tile for tile in release.tiles if tile * sizes.local_experts < pairs]
    tile = max(smaller, default=release.tiles[0])
    hit = min(sizes.num_experts, pairs)
    ctas = hit + (pairs - hit) // tile
    rows = ctas * tile
    # Some kernels write whole copies, so the buffers have at least the rows that one copy fills.
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
    # Per token: the values in bfloat16, then their codes, then each row's scale.
    hidden = (4 * quantized, quantized, 4 * rows1) if sizes.per_token else (quantized,)
    scales = 128 * math.ceil(rows1 / 128) * 4 * math.ceil(sizes.intermediate_size / 64)
    used = 0
    for size in (*routing, scales, *hidden, 2 * rows2 * sizes.hidden_size):
        used = _ALIGNMENT * math.ceil(used / _ALIGNMENT) + size
    return used
