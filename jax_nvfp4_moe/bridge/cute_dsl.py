"""The functions of the CuTe-DSL module: their names, and their parameters in order.

Each function is one of FlashInfer's kernel classes, compiled for one tiling and one GPU. Versions
of FlashInfer differ in what the kernels can compute.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jax_nvfp4_moe.bridge.call import Argument

ARCHS = ("10.0a", "10.3a")


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the two grouped GEMMs compute, beside products.

    Attributes:
        activation: the activation after the first GEMM, the name of an `Activation`.
        scheme: the activation scheme of both GEMMs' rows. "none" is W4A16: other kernels, for which
            the caller gathers rows before the first GEMM and adds them after the second.
        finalize: the second GEMM applies the routing weights and adds rows to their tokens, in an
            undefined order. If False it writes one row for each slot (for "none", in sorted order).
    """

    activation: str = "silu"
    scheme: Literal["static", "per_token", "none"] = "static"
    finalize: bool = True


# The activations that the kernels of 0.7.2 compute.
ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai", "relu2")
# The variants of each version of flashinfer-python, the newest version last.
VERSIONS: dict[str, tuple[Variant, ...]] = {
    "0.6.13": (Variant(),),
    "0.7.2.post1": tuple(
        Variant(activation, scheme, finalize)
        for activation in ACTIVATIONS
        for scheme in ("static", "per_token", "none")
        for finalize in (True, False)
        # W4A16's finalizing kernels are compiled for one top_k.
        if not (scheme == "none" and finalize)
    ),
}
# The most experts that W4A16's kernels are compiled for (`build/cute_dsl_w4a16.EXPERTS`).
W4A16_EXPERTS = 4096


@dataclasses.dataclass(frozen=True)
class Tactic:
    """How the two grouped GEMMs divide their work.

    Attributes:
        tile: rows of a tile in both GEMMs, all of one expert: 128 or 256.
        gemm1_n: columns of a tile in the first GEMM: 128 or 256.
        gemm2_n: columns of a tile in the second GEMM: 128 or 256.
        gemm2_cluster_n: neighbouring tiles of the second GEMM in a cluster: 1 or 2.
    """

    tile: int = 128
    gemm1_n: int = 128
    gemm2_n: int = 128
    gemm2_cluster_n: int = 1

    def fits(self, hidden_size: int, intermediate_size: int, *, gated: bool) -> bool:
        """Returns whether padded sizes are whole tiles.

        The GEMMs of 0.6.13 write whole tiles (flashinfer#3957), and so does the first of 0.7.2.
        """
        columns = self.gemm2_n * self.gemm2_cluster_n
        rows = (2 if gated else 1) * intermediate_size
        return rows % self.gemm1_n == 0 and hidden_size % columns == 0


_SIZES = (128, 256)
# By the name that `build` takes. The first tactic is FlashInfer's own default
# (flashinfer-python@0.6.13:fused_moe/cute_dsl/tuner.py:199-206).
TACTICS = {
    "default": (Tactic(),),
    "all": tuple(
        Tactic(tile, gemm1_n, gemm2_n, cluster_n)
        for tile in _SIZES
        for gemm1_n in _SIZES
        for gemm2_n in _SIZES
        for cluster_n in (1, 2)
    ),
}


def tactics_of(variant: Variant, which: str) -> tuple[Tactic, ...]:
    """Returns the tactics that a variant's functions are compiled for.

    W4A16 has one, FlashInfer's own default: tiles of 128 rows and 256 columns
    (flashinfer-python@0.7.2.post1:fused_moe/cute_dsl/blackwell/moe_w4a16.py:41-46). It is returned
    as `Tactic()`, which has the same tile.

    Args:
        variant: one of its version's in `VERSIONS`.
        which: a key of `TACTICS`.
    """
    return TACTICS["default" if variant.scheme == "none" else which]


def gemm1(variant: Variant, tactic: Tactic, arch: str) -> str:
    """Returns the first GEMM's name, as in "gemm1_silu_static_t128_n128_sm100a".

    Args:
        variant: one of its version's in `VERSIONS`.
        tactic: one of the variant's `tactics_of`.
        arch: one of `ARCHS`.
    """
    columns = "" if variant.scheme == "none" else f"_n{tactic.gemm1_n}"
    tiling = f"t{tactic.tile}{columns}"
    return f"gemm1_{variant.activation}_{variant.scheme}_{tiling}_{_gpu(arch)}"


def gemm2(variant: Variant, tactic: Tactic, arch: str) -> str:
    """Returns the second GEMM's name, as in "gemm2_finalize_static_t128_n128_c1_sm100a".

    Args:
        variant: one of its version's in `VERSIONS`.
        tactic: one of the variant's `tactics_of`.
        arch: one of `ARCHS`.
    """
    what = "finalize" if variant.finalize else "rows"
    own = f"_n{tactic.gemm2_n}_c{tactic.gemm2_cluster_n}"
    tiling = f"t{tactic.tile}{'' if variant.scheme == 'none' else own}"
    return f"gemm2_{what}_{variant.scheme}_{tiling}_{_gpu(arch)}"


def _gpu(arch: str) -> str:
    return f"sm{arch.replace('.', '')}"


def functions(version: str, tactics: str, archs: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of all functions that a version's variants need.

    Args:
        version: a key of `VERSIONS`.
        tactics: a key of `TACTICS`.
        archs: some of `ARCHS`.
    """
    names = [
        gemm(variant, tactic, arch)
        for arch in archs
        for gemm in (gemm1, gemm2)
        for variant in VERSIONS[version]
        for tactic in tactics_of(variant, tactics)
    ]
    return tuple(dict.fromkeys(names))


_W4A16 = ("alpha", "tile_idx_to_expert_idx", "tile_idx_to_mn_limit", "num_non_exiting_tiles")


def gemm1_parameters(variant: Variant) -> tuple[str, ...]:
    """Returns the first GEMM's parameters, in order."""
    if variant.scheme == "none":
        return ("hidden_states", "w1", "w1_scale", *_W4A16, "out")
    own = ("fc2_input_scale", "out", "out_scale")
    if variant.scheme == "per_token":
        own = ("per_token_scales", "out")
    return (
        "hidden_states", "w1", "hidden_states_scale", "w1_scale", "alpha", "tile_idx_to_expert_idx",
        "tile_idx_to_mn_limit", "token_ids", "num_non_exiting_tiles", *own,
    )  # fmt: skip


def gemm2_parameters(variant: Variant) -> tuple[str, ...]:
    """Returns the second GEMM's parameters, in order."""
    if variant.scheme == "none":
        return ("a", "w2", "w2_scale", *_W4A16, "output")
    own = ("per_row_scales",) if variant.scheme == "per_token" else ()
    return (
        "a", "w2", "a_scale", "w2_scale", "alpha", "tile_idx_to_expert_idx",
        "tile_idx_to_mn_limit", "permuted_idx_to_expanded_idx", "num_non_exiting_tiles",
        "token_final_scales", *own, "output",
    )  # fmt: skip


def ordered(parameters: tuple[str, ...], values: Mapping[str, Argument]) -> dict[str, Argument]:
    """Returns arguments in the order of a function's parameters.

    Raises:
        TypeError: an argument is missing, or is no parameter.
    """
    if set(values) != set(parameters):
        wrong = ", ".join(sorted(set(values) ^ set(parameters)))
        raise TypeError(f"{wrong}: expected {', '.join(parameters)}")
    return {name: values[name] for name in parameters}
