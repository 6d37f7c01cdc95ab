"""The functions of the CuTe-DSL module: their names, and their parameters in order.

FlashInfer's kernel classes, behind `_cute_dsl_kernels`, compiled for one tiling and one GPU each.
Their signatures differ between versions of FlashInfer.
"""

import dataclasses

VERSIONS = ("0.6.13",)
ARCHS = ("10.0a", "10.3a")

GEMM1 = (
    "hidden_states", "w1", "hidden_states_scale", "w1_scale", "alpha", "tile_idx_to_expert_idx",
    "tile_idx_to_mn_limit", "token_ids", "num_non_exiting_tiles", "fc2_input_scale", "out",
    "out_scale",
)  # fmt: skip
GEMM2 = (
    "a", "w2", "a_scale", "w2_scale", "alpha", "tile_idx_to_expert_idx", "tile_idx_to_mn_limit",
    "permuted_idx_to_expanded_idx", "num_non_exiting_tiles", "token_final_scales", "output",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tactic:
    """How one of the two grouped GEMMs is tiled, as FlashInfer's tuner has it.

    Attributes:
        gemm: 1 or 2.
        tile: rows of a tile, all of one expert's: 128 or 256, the same in both GEMMs.
        n: columns of a tile: 128 or 256.
        cluster_n: neighbouring tiles of columns that share what they read: 1 or, in GEMM2, 2.
    """

    gemm: int
    tile: int = 128
    n: int = 128
    cluster_n: int = 1

    def function(self, arch: str) -> str:
        """The name that the module exports it by, as in "gemm1_t128_n128_sm100a".

        Args:
            arch: of `ARCHS`.
        """
        cluster = f"_c{self.cluster_n}" if self.gemm == 2 else ""
        return f"gemm{self.gemm}_t{self.tile}_n{self.n}{cluster}_sm{arch.replace('.', '')}"


_SIZES = (128, 256)
# By what `build` calls them. The first are FlashInfer's own where nothing was tuned
# (flashinfer-python@0.6.13:fused_moe/cute_dsl/tuner.py:199-206).
TACTICS = {
    "default": (Tactic(1), Tactic(2)),
    "all": (
        *(Tactic(1, tile, n) for tile in _SIZES for n in _SIZES),
        *(Tactic(2, tile, n, c) for tile in _SIZES for n in _SIZES for c in (1, 2)),
    ),
}
