"""FlashInfer's CuTe-DSL grouped GEMM of bfloat16 rows and NVFP4 weights, as functions of tensors.

Beside `cute_dsl_kernels`, by the same rules, for a class that has another order of operands: it
computes rows of weights times columns of tokens, so that its M are the weights' rows. It decodes
weights to bfloat16, which is exact, sums in float32, multiplies by alpha, and rounds once: after
the activation, if there is one. Rows come sorted, and go so: nobody gathers or adds here.
(flashinfer-python@0.7.2.post1:fused_moe/cute_dsl/blackwell/moe_w4a16_kernel.py, and moe_w4a16.py
for how it is called.)
"""

from typing import Any

import cuda.bindings.driver as cuda  # pyright: ignore[reportMissingImports]
import cutlass  # pyright: ignore[reportMissingImports]
from cute_dsl_kernels import (  # pyright: ignore[reportMissingImports]
    ACTIVATIONS,
    BF16,
    DATA_ALIGNMENT,
    F32,
    I32,
    PROCESSORS,
    compiled,
    data,
    pointer,
    scales,
    size,
    tensor,
)
from cutlass import cute  # pyright: ignore[reportMissingImports]

# Of weights' rows, sorted tokens and K; and neighbours that work together. FlashInfer's own where
# nothing was tuned (moe_w4a16.py:41-46).
TILES, CLUSTER = (256, 128, 256), (2, 1)
# The class is told how many experts there are, and uses it as the extent of the weights and of
# alpha, and as what no tile's expert is (moe_w4a16_kernel.py:615,648,1328; a tile is one if its
# expert is less, nvidia-cutlass-dsl@4.8.1:cutlass/utils/mixed_input_helpers.py:933). Nothing is
# read of experts that no tile has, so that one binary serves all numbers up to this.
EXPERTS = 4096


def launcher(file: Any, activation: dict[str, Any], **options: Any) -> Any:
    """A function that launches a kernel, for tensors in the order of the class and a stream.

    Args:
        file: FlashInfer's module of the class.
        activation: the class's options for it; constants that are not among them are its defaults.
        **options: the class's.
    """
    constants = {
        "swiglu_alpha": file.DEFAULT_SWIGLU_ALPHA,
        "swiglu_beta": file.DEFAULT_SWIGLU_BETA,
        "swiglu_limit": file.DEFAULT_SWIGLU_LIMIT,
    }
    # The dynamic scheduler, which FlashInfer takes for many tiles (moe_w4a16.py:273-275), visits
    # the same tiles in another order.
    kernel = file.Sm100W4A16GroupedGemmKernel(
        acc_dtype=F32,
        use_2cta_instrs=True,
        mma_tiler_mnk=TILES,
        cluster_shape_mn=CLUSTER,
        group_count=EXPERTS,
        situ_beta=None,
        situ_linear_beta=None,
        use_fused_finalize=False,
        enable_pdl=False,
        use_clc_scheduler=False,
        raster_along_m=True,
        **constants | activation,
        **options,
    )

    def launch(operands: list[Any], stream: Any) -> None:
        weights, _, rows, *_ = operands
        kernel.wrapper(
            *map(pointer, operands),
            *(None, None),  # slots and weights, if it added
            cutlass.Int64(weights.shape[1]),
            cutlass.Int64(rows.shape[0]),
            cutlass.Int64(rows.shape[1]),
            *(cutlass.Int64(0), 0),  # likewise tokens and top_k
            PROCESSORS // CLUSTER[0],
            stream,
        )

    return launch


def operands(k: Any, half_k: Any, blocks: Any, columns: Any, written: Any) -> list[Any]:
    """What either is given, in order, of sizes: K, K/2, K/16, the weights' rows, the results'."""
    experts, rows, tiles = size("E"), size("M", TILES[1]), size("tiles")
    return [
        tensor(BF16, rows, k, alignment=DATA_ALIGNMENT),
        data(experts, columns, half_k),
        scales(experts, columns, blocks),
        tensor(F32, experts),
        tensor(I32, tiles),
        tensor(I32, tiles),
        tensor(I32, 1),
        tensor(BF16, rows, written, alignment=DATA_ALIGNMENT),
    ]


def gemm1(file: Any, activation: str, options: str) -> Any:
    """Multiplies sorted rows by w1 and applies the activation.

    Args:
        file: FlashInfer's module of the class.
        activation: of `ACTIVATIONS`.
        options: CuTe-DSL's.

    Returns:
        The compiled function.
    """
    gated = activation != "relu2"
    constants = {key: value for key, value in ACTIVATIONS[activation].items() if key != "gated"}
    # Decoded at a time: as FlashInfer has it for a first GEMM (moe_w4a16.py:137-139). The layout's
    # rows of w1 may end within a cluster of tiles, so that rows are compared with their end
    # (moe_w4a16_kernel.py:2337-2342); those of w2 are whole clusters.
    launch = launcher(file, constants, transform_fragment_size=128, m_cluster_aligned=False)

    @cute.jit
    def gemm1_none(
        hidden_states: cute.Tensor, w1: cute.Tensor, w1_scale: cute.Tensor, alpha: cute.Tensor,
        tile_idx_to_expert_idx: cute.Tensor, tile_idx_to_mn_limit: cute.Tensor,
        num_non_exiting_tiles: cute.Tensor, out: cute.Tensor, stream: cuda.CUstream,
    ) -> None:  # fmt: skip
        tiles = tile_idx_to_expert_idx, tile_idx_to_mn_limit, num_non_exiting_tiles
        launch([w1, w1_scale, hidden_states, *tiles, alpha, out], stream)

    columns = size("2I" if gated else "I", 128)
    inner = size("I", 64) if gated else columns
    arguments = operands(size("H", 256), size("H/2", 128), size("H/16", 16), columns, inner)
    return compiled(gemm1_none, arguments, options)


def gemm2(file: Any, options: str) -> Any:
    """Multiplies sorted rows by w2.

    Args:
        file: FlashInfer's module of the class.
        options: CuTe-DSL's.

    Returns:
        The compiled function.
    """
    # FlashInfer decodes 128 at a time if I is 256, which changes no value.
    no_activation = {"activation_type": None}
    launch = launcher(file, no_activation, transform_fragment_size=32, m_cluster_aligned=True)

    @cute.jit
    def gemm2_none(
        a: cute.Tensor, w2: cute.Tensor, w2_scale: cute.Tensor, alpha: cute.Tensor,
        tile_idx_to_expert_idx: cute.Tensor, tile_idx_to_mn_limit: cute.Tensor,
        num_non_exiting_tiles: cute.Tensor, output: cute.Tensor, stream: cuda.CUstream,
    ) -> None:  # fmt: skip
        tiles = tile_idx_to_expert_idx, tile_idx_to_mn_limit, num_non_exiting_tiles
        launch([w2, w2_scale, a, *tiles, alpha, output], stream)

    columns = size("H", TILES[0])
    arguments = operands(size("I", 64), size("I/2", 32), size("I/16", 4), columns, columns)
    return compiled(gemm2_none, arguments, options)
