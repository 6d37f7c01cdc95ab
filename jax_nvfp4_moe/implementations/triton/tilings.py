"""How the Triton kernels cut a layer, by how many tokens an expert has: data, and its choice.

None of it was measured on a GPU. What was looked at is what the compilers make of it for SM80, 90,
100 and 120 (tests/aot/test_triton.py): instructions a weight, registers, no spills.
"""

import dataclasses
import math

from jax_nvfp4_moe import devices
from jax_nvfp4_moe.implementations.common.grouping import expected_hits


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one GEMM is cut; all are powers of two.

    Attributes:
        weight_rows: rows of weights of a program, for each of gate and up.
        words: 16-bit words of packed columns, four each, that a step of its loop takes.
        num_warps, num_stages: Triton's.
    """

    weight_rows: int
    words: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Tilings:
    """How a layer is cut.

    Attributes:
        tokens: rows of a tile.
        by_pair: whether each (token, slot) pair is a tile of its own, without being sorted. Experts
            that several pairs hit are then read several times, from the second time on most likely
            out of the L2 cache.
        gemm1, gemm2: the two GEMMs.
    """

    tokens: int
    by_pair: bool
    gemm1: Tiling
    gemm2: Tiling

    def describe(self) -> str:
        """In words."""
        return "a tile for each pair" if self.by_pair else f"tiles of {self.tokens} rows"


# By the most rows that an expert has on average. The least that a tensor core multiplies by is 16.
_FEW = Tilings(16, False, Tiling(64, 64, 4, 4), Tiling(64, 64, 4, 4))
_SOME = Tilings(32, False, Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 3))
_MANY = Tilings(64, False, Tiling(64, 32, 4, 3), Tiling(128, 32, 4, 3))
_TILINGS = ((16, _FEW), (48, _SOME), (math.inf, _MANY))
# Hopper's matrix unit takes larger tiles of tokens from shared memory, for which half as many
# weights are decoded. On others they do not fit into registers, or into SM100's tensor memory.
_HOPPER = (
    *_TILINGS[:2],
    (96, _MANY),
    (math.inf, Tilings(128, False, Tiling(64, 32, 4, 3), Tiling(128, 32, 4, 3))),
)
# While experts are hit so often on average, sorting pairs costs more than reading them again.
_BY_PAIR_MAX_REUSE = 2.0


def tilings(tokens: int, top_k: int, num_experts: int, device_kind: str) -> Tilings:
    """How a layer of these sizes is cut, if routing is uniform."""
    average = tokens * top_k / max(1.0, expected_hits(tokens, top_k, num_experts))
    if average <= _BY_PAIR_MAX_REUSE:
        return dataclasses.replace(_FEW, by_pair=True)
    table = _HOPPER if devices.is_hopper(device_kind) else _TILINGS
    return next(found for most, found in table if average <= most)
