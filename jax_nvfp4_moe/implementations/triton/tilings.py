"""The tile sizes of the Triton kernels, chosen by the average number of tokens of an expert.

They were not measured on a GPU. They were chosen by inspecting the compilers' output for SM80, 90,
100 and 120 (tests/aot/test_triton.py): instructions for each weight, registers, and no spills.
"""

import dataclasses
import math

from jax_nvfp4_moe import devices
from jax_nvfp4_moe.implementations.common.grouping import expected_hits


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The tile sizes of one GEMM.

    Attributes:
        weight_rows: weight rows that a program multiplies, of gate and up each; a power of two.
        words: 16-bit words, of four columns each, in a step of its loop; a power of two.
        num_warps, num_stages: Triton's compiler parameters.
    """

    weight_rows: int
    words: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Tilings:
    """The tile sizes of a layer.

    Attributes:
        tokens: the number of rows of a tile; a power of two.
        by_pair: whether each (token, slot) pair is its own tile, without sorting. Experts that
            several pairs hit are then read several times; repeated reads most likely come from the
            L2 cache.
        gemm1, gemm2: the tile sizes of each GEMM.
    """

    tokens: int
    by_pair: bool
    gemm1: Tiling
    gemm2: Tiling

    def describe(self) -> str:
        """Returns a short description."""
        return "a tile for each pair" if self.by_pair else f"tiles of {self.tokens} rows"


# Each entry applies up to a number of rows that an expert has on average. Tiles have at least 16
# rows, the fewest that a tensor core multiplies.
_FEW = Tilings(16, False, Tiling(64, 64, 4, 4), Tiling(64, 64, 4, 4))
_SOME = Tilings(32, False, Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 3))
_MANY = Tilings(64, False, Tiling(64, 32, 4, 3), Tiling(128, 32, 4, 3))
_TILINGS = ((16, _FEW), (48, _SOME), (math.inf, _MANY))
# Hopper's matrix unit reads larger tiles of tokens from shared memory, which halves how often
# weights are decoded. On other GPUs such tiles do not fit into registers, or into SM100's tensor
# memory.
_HOPPER = (
    *_TILINGS[:2],
    (96, _MANY),
    (math.inf, Tilings(128, False, Tiling(64, 32, 4, 3), Tiling(128, 32, 4, 3))),
)
# If experts are hit at most this often on average, sorting pairs costs more than reading experts
# again.
_BY_PAIR_MAX_REUSE = 2.0


def tilings(tokens: int, top_k: int, num_experts: int, device_kind: str) -> Tilings:
    """Returns the tile sizes for a layer, assuming uniform routing."""
    average = tokens * top_k / max(1.0, expected_hits(tokens, top_k, num_experts))
    if average <= _BY_PAIR_MAX_REUSE:
        return dataclasses.replace(_FEW, by_pair=True)
    table = _HOPPER if devices.is_hopper(device_kind) else _TILINGS
    return next(found for most, found in table if average <= most)
