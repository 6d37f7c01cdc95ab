"""FlashInfer's CuTe-DSL grouped GEMMs as functions of tensors: for a Python that has CuTe-DSL.

`_cute_dsl_build` imports it, with the package of FlashInfer's kernel classes; nothing else does.
FlashInfer's own entry points take raw pointers and sizes, of which nothing can be checked. What is
compiled here takes DLPack tensors, and CuTe-DSL generates checks of their number, types, devices,
contiguity, alignments and shapes: sizes that have one name below must be equal, and divisible by
what is written beside them.
"""

from typing import Any

import cuda.bindings.driver as cuda  # pyright: ignore[reportMissingImports]
import cutlass  # pyright: ignore[reportMissingImports]
from cutlass import cute  # pyright: ignore[reportMissingImports]
from cutlass.cute.runtime import (  # pyright: ignore[reportMissingImports]
    make_fake_compact_tensor,
)
from cutlass.runtime import make_fake_stream  # pyright: ignore[reportMissingImports]

# Of one B200. It bounds a persistent grid and nothing else: on GPUs with fewer some blocks wait.
PROCESSORS = 148
BLOCK = 16
# What FlashInfer promises of its pointers (flashinfer-python@0.6.13:fused_moe/cute_dsl/
# blockscaled_contiguous_*.py); XLA's arrays are aligned to 256 bytes.
DATA_ALIGNMENT, SCALE_ALIGNMENT = 32, 16

BF16, E2M1, E4M3 = cutlass.BFloat16, cutlass.Float4E2M1FN, cutlass.Float8E4M3FN
F32, I32, U8 = cutlass.Float32, cutlass.Int32, cutlass.Uint8


def size(name: str, divisor: int = 1) -> Any:
    """A size that each call gives."""
    return cute.sym_int64(divisibility=divisor, symbol=name)


def tensor(dtype: Any, *shape: Any, alignment: int | None = None) -> Any:
    """A row-major tensor that each call gives."""
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=alignment)


def data(*shape: Any) -> Any:
    """Bytes of two codes each."""
    return tensor(U8, *shape, alignment=DATA_ALIGNMENT)


def scales(*shape: Any) -> Any:
    """Block scales, or rows of them."""
    return tensor(E4M3, *shape, alignment=SCALE_ALIGNMENT)


def codes(tensor: Any) -> Any:
    """The pointer to a tensor of bytes, as one to codes."""
    return cute.recast_ptr(tensor.iterator, dtype=E2M1)


def compiled(function: Any, arguments: list[Any], options: str) -> Any:
    """A function for XLA's stream, which the bridge makes TVM-FFI's."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(function, *arguments, stream, options=f"--enable-tvm-ffi {options}")


def gemm1(classes: Any, tile: int, n: int, options: str) -> Any:
    """Gathers rows, multiplies by w1, applies SwiGLU and quantises again.

    Args:
        classes: FlashInfer's package of kernels.
        tile: rows of a tile, all of one expert's.
        n: columns of a tile.
        options: CuTe-DSL's.

    Returns:
        The compiled function.
    """
    cluster = (tile // 128, 1)
    active = PROCESSORS // cluster[0]
    # The class uses top_k for one thing, to divide a row's slot by it: the slot's token
    # (blockscaled_contiguous_gather_grouped_gemm_swiglu_fusion.py:1694,1707). With top_k 1 the
    # caller gives tokens in the place of slots, and one binary serves every top_k.
    kernel = classes.BlockScaledContiguousGatherGroupedGemmKernel(
        sf_vec_size=BLOCK,
        mma_tiler_mn=(tile, n),
        cluster_shape_mn=cluster,
        vectorized_f32=True,
        topk=1,
        raster_along_m=False,
        enable_pdl=False,
    )

    @cute.jit
    def gemm1(
        hidden_states: cute.Tensor,
        w1: cute.Tensor,
        hidden_states_scale: cute.Tensor,
        w1_scale: cute.Tensor,
        alpha: cute.Tensor,
        tile_idx_to_expert_idx: cute.Tensor,
        tile_idx_to_mn_limit: cute.Tensor,
        token_ids: cute.Tensor,
        num_non_exiting_tiles: cute.Tensor,
        fc2_input_scale: cute.Tensor,
        out: cute.Tensor,
        out_scale: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        kernel.wrapper(
            codes(hidden_states),
            codes(w1),
            hidden_states_scale.iterator,
            w1_scale.iterator,
            codes(out),
            out_scale.iterator,
            alpha.iterator,
            tile_idx_to_expert_idx.iterator,
            tile_idx_to_mn_limit.iterator,
            token_ids.iterator,
            num_non_exiting_tiles.iterator,
            fc2_input_scale.iterator,
            cutlass.Int64(hidden_states.shape[0]),
            cutlass.Int64(token_ids.shape[0]),
            cutlass.Int64(w1.shape[1]),
            cutlass.Int64(hidden_states.shape[1]) * 2,
            cutlass.Int64(w1.shape[0]),
            tile,
            BLOCK,
            active,
            stream,
        )

    # 0.6.13 writes whole tiles of columns (flashinfer#3957); of rows it gathers 256 columns at a
    # time, past a row's end if that is none of them (the class's file, :1755-1826); and scales of
    # what it writes are laid out by fours.
    tokens, experts, columns = size("T"), size("E"), size("2I", n)
    rows, tiles = size("M", tile), size("tiles")
    half_hidden, hidden_blocks = size("H/2", 128), size("H/16", 16)
    half_inner, inner_blocks = size("I/2", 32), size("I/16", 4)
    arguments = [
        data(tokens, half_hidden),
        data(experts, columns, half_hidden),
        scales(tokens, hidden_blocks),
        scales(experts, columns, hidden_blocks),
        tensor(F32, experts),
        tensor(I32, tiles),
        tensor(I32, tiles),
        tensor(I32, rows),
        tensor(I32, 1),
        tensor(F32, 1),
        data(rows, half_inner),
        scales(rows, inner_blocks),
    ]
    return compiled(gemm1, arguments, options)


def gemm2(classes: Any, tile: int, n: int, cluster_n: int, options: str) -> Any:
    """Multiplies by w2 and adds each row, weighted, to its token's.

    Args:
        classes: FlashInfer's package of kernels.
        tile: rows of a tile, all of one expert's.
        n: columns of a tile.
        cluster_n: neighbouring tiles of columns that share what they read.
        options: CuTe-DSL's.

    Returns:
        The compiled function.
    """
    cluster = (tile // 128, cluster_n)
    active = PROCESSORS // (cluster[0] * cluster[1])
    kernel = classes.Sm100BlockScaledContiguousGroupedGemmFinalizeFusionKernel(
        sf_vec_size=BLOCK,
        mma_tiler_mn=(tile, n),
        cluster_shape_mn=cluster,
        use_blkred=True,
        raster_along_m=False,
        enable_pdl=False,
    )

    @cute.jit
    def gemm2(
        a: cute.Tensor,
        w2: cute.Tensor,
        a_scale: cute.Tensor,
        w2_scale: cute.Tensor,
        alpha: cute.Tensor,
        tile_idx_to_expert_idx: cute.Tensor,
        tile_idx_to_mn_limit: cute.Tensor,
        permuted_idx_to_expanded_idx: cute.Tensor,
        num_non_exiting_tiles: cute.Tensor,
        token_final_scales: cute.Tensor,
        output: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        kernel.wrapper(
            codes(a),
            codes(w2),
            a_scale.iterator,
            w2_scale.iterator,
            output.iterator,
            alpha.iterator,
            tile_idx_to_expert_idx.iterator,
            tile_idx_to_mn_limit.iterator,
            permuted_idx_to_expanded_idx.iterator,
            num_non_exiting_tiles.iterator,
            token_final_scales.iterator,
            cutlass.Int64(permuted_idx_to_expanded_idx.shape[0]),
            cutlass.Int64(w2.shape[1]),
            cutlass.Int64(a.shape[1]) * 2,
            cutlass.Int64(w2.shape[0]),
            cutlass.Int64(token_final_scales.shape[0]),
            cutlass.Int64(token_final_scales.shape[1]),
            tile,
            BLOCK,
            active,
            stream,
        )

    # Whole clusters of columns, as 0.6.13 adds whole tiles (flashinfer#3957).
    tokens, experts, columns = size("T"), size("E"), size("H", n * cluster_n)
    rows, tiles = size("M", tile), size("tiles")
    half_inner, inner_blocks = size("I/2", 32), size("I/16", 4)
    arguments = [
        data(rows, half_inner),
        data(experts, columns, half_inner),
        scales(rows, inner_blocks),
        scales(experts, columns, inner_blocks),
        tensor(F32, experts),
        tensor(I32, tiles),
        tensor(I32, tiles),
        tensor(I32, rows),
        tensor(I32, 1),
        tensor(F32, tokens, size("K"), alignment=SCALE_ALIGNMENT),
        tensor(BF16, tokens, columns, alignment=DATA_ALIGNMENT),
    ]
    return compiled(gemm2, arguments, options)
