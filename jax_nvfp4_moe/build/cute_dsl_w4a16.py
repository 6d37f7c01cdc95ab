"""Compiles FlashInfer's CuTe-DSL grouped GEMM of bfloat16 rows and NVFP4 weights.

The functions take tensors and check them, as in `cute_dsl_kernels`. The kernel computes weights
[rows, K] times tokens [K, columns], so that its M is the number of weight rows. It decodes weights
to bfloat16, which is exact, accumulates in float32, multiplies by alpha, and rounds once, after the
activation if there is one. Its rows are sorted, in and out: it neither gathers nor adds.
(flashinfer-python@0.7.2.post1:fused_moe/cute_dsl/blackwell/moe_w4a16_kernel.py; moe_w4a16.py calls
it.)
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

# Tile sizes of weight rows, sorted tokens and K, and the cluster of tiles that work together:
# FlashInfer's for layers that were not tuned (moe_w4a16.py:41-46).
TILES, CLUSTER = (256, 128, 256), (2, 1)
# The class takes the number of experts, and uses it as the extent of the weights and of alpha, and
# as the expert of tiles that do not exist (moe_w4a16_kernel.py:615,648,1328; a tile exists if its
# expert is less, nvidia-cutlass-dsl@4.8.1:cutlass/utils/mixed_input_helpers.py:933). It reads only
# experts that a tile names, so that one binary serves all numbers of experts up to this one.
EXPERTS = 4096


def launcher(file: Any, activation: dict[str, Any], **options: Any) -> Any:
    """Returns a function that launches a kernel, given tensors in the class's order and a stream.

    Args:
        file: FlashInfer's module that has the class.
        activation: the class's options for the activation; the others keep their defaults.
        **options: further options of the class.
    """
    constants = {
        "swiglu_alpha": file.DEFAULT_SWIGLU_ALPHA,
        "swiglu_beta": file.DEFAULT_SWIGLU_BETA,
        "swiglu_limit": file.DEFAULT_SWIGLU_LIMIT,
    }
    # FlashInfer uses the dynamic scheduler for many tiles (moe_w4a16.py:273-275). It visits the
    # same tiles in another order.
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
            *(None, None),  # slots and weights, for the addition only
            cutlass.Int64(weights.shape[1]),
            cutlass.Int64(rows.shape[0]),
            cutlass.Int64(rows.shape[1]),
            *(cutlass.Int64(0), 0),  # tokens and top_k, likewise
            PROCESSORS // CLUSTER[0],
            stream,
        )

    return launch


def operands(k: Any, half_k: Any, blocks: Any, columns: Any, written: Any) -> list[Any]:
    """Returns either GEMM's operands, given K, K/2, K/16, the weight rows and result columns."""
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
    """Compiles GEMM1: multiplies sorted rows by w1 and applies the activation.

    Args:
        file: FlashInfer's module that has the class.
        activation: a key of `ACTIVATIONS`.
        options: CuTe-DSL's compile options.

    Returns:
        The compiled function.
    """
    gated = activation != "relu2"
    constants = {key: value for key, value in ACTIVATIONS[activation].items() if key != "gated"}
    # FlashInfer decodes fragments of this size in the first GEMM (moe_w4a16.py:137-139). The
    # layout's rows of w1 may end within a cluster of tiles, so that the kernel compares rows with
    # their end (moe_w4a16_kernel.py:2337-2342). The rows of w2 are whole clusters.
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
    """Compiles GEMM2: multiplies sorted rows by w2.

    Args:
        file: FlashInfer's module that has the class.
        options: CuTe-DSL's compile options.

    Returns:
        The compiled function.
    """
    # FlashInfer uses fragments of 128 if I is 256, which changes no value.
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
