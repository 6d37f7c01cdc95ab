"""Compiles FlashInfer's CuTe-DSL grouped GEMMs as functions of tensors; needs CuTe-DSL.

Only `cute_dsl_worker` imports this module, together with FlashInfer's kernel classes. FlashInfer's
own entry points take raw pointers and sizes, which cannot be checked. The functions compiled here
take DLPack tensors, and CuTe-DSL generates checks of their number, dtypes, devices, contiguity,
alignments and shapes: sizes of the same name below must be equal, and divisible by the number
beside them.
"""

from typing import Any

import cuda.bindings.driver as cuda  # pyright: ignore[reportMissingImports]
import cutlass  # pyright: ignore[reportMissingImports]
from cutlass import cute  # pyright: ignore[reportMissingImports]
from cutlass.cute.runtime import (  # pyright: ignore[reportMissingImports]
    make_fake_compact_tensor,
)
from cutlass.runtime import make_fake_stream  # pyright: ignore[reportMissingImports]

# A B200's multiprocessors. They only bound the persistent grid: with fewer, some blocks wait.
PROCESSORS = 148
BLOCK = 16
# The alignments that FlashInfer guarantees (flashinfer-python@0.6.13 and 0.7.2.post1:fused_moe/
# cute_dsl/blockscaled_contiguous_*.py); XLA's arrays are aligned to 256 bytes.
DATA_ALIGNMENT, SCALE_ALIGNMENT = 32, 16
# The version whose classes have no options for the activation and the scheme. Its second GEMM has
# an option for the reduction that later versions always use.
FIRST = "0.6.13"
# `ActivationType` and constants of an `Activation` (flashinfer-python@0.7.2.post1:tllm_enums.py:
# 63-82; no limit is float32's largest number, 106). One type is both SwiGLUs.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"activation_type": 3},
    "swiglu_oai": {
        "activation_type": 3,
        "swiglu_alpha": 1.702,
        "swiglu_beta": 1.0,
        "swiglu_limit": 7.0,
    },
    "gelu_tanh": {"activation_type": 8},
    "relu2": {"activation_type": 6, "gated": False},
}

BF16, E2M1, E4M3 = cutlass.BFloat16, cutlass.Float4E2M1FN, cutlass.Float8E4M3FN
F32, I32, U8 = cutlass.Float32, cutlass.Int32, cutlass.Uint8


def size(name: str, divisor: int = 1) -> Any:
    """Returns a size that is known only in a call."""
    return cute.sym_int64(divisibility=divisor, symbol=name)


def tensor(dtype: Any, *shape: Any, alignment: int | None = None) -> Any:
    """Returns the description of a row-major tensor argument."""
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=alignment)


def data(*shape: Any) -> Any:
    """Returns the description of packed codes, two in a byte."""
    return tensor(U8, *shape, alignment=DATA_ALIGNMENT)


def scales(*shape: Any) -> Any:
    """Returns the description of block scales."""
    return tensor(E4M3, *shape, alignment=SCALE_ALIGNMENT)


def pointer(tensor: Any) -> Any:
    """Returns the pointer to a tensor, with bytes as E2M1 codes; None for None."""
    if tensor is None:
        return None
    iterator = tensor.iterator
    return cute.recast_ptr(iterator, dtype=E2M1) if tensor.element_type is U8 else iterator


def compiled(function: Any, arguments: list[Any], options: str) -> Any:
    """Returns a compiled function that runs on TVM-FFI's stream, which the bridge sets to XLA's."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(function, *arguments, stream, options=f"--enable-tvm-ffi {options}")


def gemm1(
    classes: Any, version: str, activation: str, scheme: str, tile: int, n: int, options: str
) -> Any:
    """Compiles GEMM1: gathers rows, multiplies by w1, activates and, if "static", requantises.

    Args:
        classes: FlashInfer's package of kernel classes.
        version: the version of flashinfer-python.
        activation: a key of `ACTIVATIONS`.
        scheme: "static", or "per_token": each token has its own scale, and the output is bfloat16.
        tile: the rows of a tile, all of one expert.
        n: the columns of a tile.
        options: CuTe-DSL's compile options.

    Returns:
        The compiled function.
    """
    cluster = (tile // 128, 1)
    active = PROCESSORS // cluster[0]
    per_token, gated = scheme == "per_token", activation != "relu2"
    later = {"use_a_per_token_scale": per_token, **ACTIVATIONS[activation]}
    # The class uses top_k for one thing, to divide a row's slot by it: the slot's token, of whose
    # values and of whose scale it is the index (0.6.13: blockscaled_contiguous_gather_grouped_gemm_
    # swiglu_fusion.py:1694,1707; 0.7.2.post1: .._act_fusion.py:1810,1823,2674). With top_k 1 the
    # caller gives tokens in the place of slots, and one binary serves every top_k.
    kernel = classes.BlockScaledContiguousGatherGroupedGemmKernel(
        sf_vec_size=BLOCK,
        mma_tiler_mn=(tile, n),
        cluster_shape_mn=cluster,
        vectorized_f32=True,
        topk=1,
        raster_along_m=False,
        enable_pdl=False,
        **({} if version == FIRST else later),
    )

    def launch(operands: list[Any], own_scales: Any, stream: Any) -> None:
        x, w1, *_, token_ids, _, _ = operands
        kernel.wrapper(
            *map(pointer, operands),
            *([] if version == FIRST else [pointer(own_scales)]),
            cutlass.Int64(x.shape[0]),
            cutlass.Int64(token_ids.shape[0]),
            cutlass.Int64(w1.shape[1]),
            cutlass.Int64(x.shape[1]) * 2,
            cutlass.Int64(w1.shape[0]),
            tile,
            BLOCK,
            active,
            stream,
        )

    @cute.jit
    def gemm1_static(
        hidden_states: cute.Tensor, w1: cute.Tensor, hidden_states_scale: cute.Tensor,
        w1_scale: cute.Tensor, alpha: cute.Tensor, tile_idx_to_expert_idx: cute.Tensor,
        tile_idx_to_mn_limit: cute.Tensor, token_ids: cute.Tensor,
        num_non_exiting_tiles: cute.Tensor, fc2_input_scale: cute.Tensor, out: cute.Tensor,
        out_scale: cute.Tensor, stream: cuda.CUstream,
    ) -> None:  # fmt: skip
        operands = [
            *(hidden_states, w1, hidden_states_scale, w1_scale, out, out_scale, alpha),
            *(tile_idx_to_expert_idx, tile_idx_to_mn_limit, token_ids, num_non_exiting_tiles),
            fc2_input_scale,
        ]
        launch(operands, None, stream)

    @cute.jit
    def gemm1_per_token(
        hidden_states: cute.Tensor, w1: cute.Tensor, hidden_states_scale: cute.Tensor,
        w1_scale: cute.Tensor, alpha: cute.Tensor, tile_idx_to_expert_idx: cute.Tensor,
        tile_idx_to_mn_limit: cute.Tensor, token_ids: cute.Tensor,
        num_non_exiting_tiles: cute.Tensor, per_token_scales: cute.Tensor, out: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:  # fmt: skip
        operands = [
            *(hidden_states, w1, hidden_states_scale, w1_scale, out, None, alpha),
            *(tile_idx_to_expert_idx, tile_idx_to_mn_limit, token_ids, num_non_exiting_tiles),
            None,
        ]
        launch(operands, per_token_scales, stream)

    # Whole tiles of columns: the scales of what it writes are not held to the tensor's end
    # (flashinfer#3957; 0.7.2.post1 refuses others, .._act_fusion.py:3988-3997). 0.6.13 gathers 256
    # columns of rows at a time, past a row's end if that is none of them (the class's file,
    # :1755-1826); 0.7.2 does not (:1918-1961), but the layout has such rows anyway. Scales of what
    # is written are laid out by fours.
    tokens, experts, columns = size("T"), size("E"), size("2I" if gated else "I", n)
    rows, tiles = size("M", tile), size("tiles")
    half_hidden, hidden_blocks = size("H/2", 128), size("H/16", 16)
    half_inner, inner_blocks = size("I/2", 32), size("I/16", 4)
    common = [
        data(tokens, half_hidden),
        data(experts, columns, half_hidden),
        scales(tokens, hidden_blocks),
        scales(experts, columns, hidden_blocks),
        tensor(F32, experts),
        tensor(I32, tiles),
        tensor(I32, tiles),
        tensor(I32, rows),
        tensor(I32, 1),
    ]
    if per_token:
        inner = size("I", 64) if gated else columns
        own = [tensor(F32, tokens), tensor(BF16, rows, inner, alignment=DATA_ALIGNMENT)]
        return compiled(gemm1_per_token, [*common, *own], options)
    own = [tensor(F32, 1), data(rows, half_inner), scales(rows, inner_blocks)]
    return compiled(gemm1_static, [*common, *own], options)


def gemm2(
    classes: Any,
    version: str,
    what: str,
    scheme: str,
    tile: int,
    n: int,
    cluster_n: int,
    options: str,
) -> Any:
    """Compiles GEMM2: multiplies by w2.

    Args:
        classes: FlashInfer's package of kernel classes.
        version: the version of flashinfer-python.
        what: "finalize" adds each weighted row to its token's; "rows" writes a row for each slot.
        scheme: "static", or "per_token", where each row has its own scale.
        tile: the rows of a tile, all of one expert.
        n: the columns of a tile.
        cluster_n: the number of neighbouring tiles of columns that share what they read.
        options: CuTe-DSL's compile options.

    Returns:
        The compiled function.
    """
    cluster = (tile // 128, cluster_n)
    active = PROCESSORS // (cluster[0] * cluster[1])
    per_token, finalize = scheme == "per_token", what == "finalize"
    later = {"use_a_per_token_scale": per_token, "use_fused_finalize": finalize}
    kernel = classes.Sm100BlockScaledContiguousGroupedGemmFinalizeFusionKernel(
        sf_vec_size=BLOCK,
        mma_tiler_mn=(tile, n),
        cluster_shape_mn=cluster,
        raster_along_m=False,
        enable_pdl=False,
        **({"use_blkred": True} if version == FIRST else later),
    )

    def launch(operands: list[Any], own_scales: Any, stream: Any) -> None:
        a, w2, *_, slots, _, weights = operands
        kernel.wrapper(
            *map(pointer, operands),
            *([] if version == FIRST else [pointer(own_scales)]),
            cutlass.Int64(slots.shape[0]),
            cutlass.Int64(w2.shape[1]),
            cutlass.Int64(a.shape[1]) * 2,
            cutlass.Int64(w2.shape[0]),
            cutlass.Int64(weights.shape[0]),
            cutlass.Int64(weights.shape[1]),
            tile,
            BLOCK,
            active,
            stream,
        )

    @cute.jit
    def gemm2_static(
        a: cute.Tensor, w2: cute.Tensor, a_scale: cute.Tensor, w2_scale: cute.Tensor,
        alpha: cute.Tensor, tile_idx_to_expert_idx: cute.Tensor, tile_idx_to_mn_limit: cute.Tensor,
        permuted_idx_to_expanded_idx: cute.Tensor, num_non_exiting_tiles: cute.Tensor,
        token_final_scales: cute.Tensor, output: cute.Tensor, stream: cuda.CUstream,
    ) -> None:  # fmt: skip
        operands = [
            *(a, w2, a_scale, w2_scale, output, alpha, tile_idx_to_expert_idx),
            *(tile_idx_to_mn_limit, permuted_idx_to_expanded_idx, num_non_exiting_tiles),
            token_final_scales,
        ]
        launch(operands, None, stream)

    @cute.jit
    def gemm2_per_token(
        a: cute.Tensor, w2: cute.Tensor, a_scale: cute.Tensor, w2_scale: cute.Tensor,
        alpha: cute.Tensor, tile_idx_to_expert_idx: cute.Tensor, tile_idx_to_mn_limit: cute.Tensor,
        permuted_idx_to_expanded_idx: cute.Tensor, num_non_exiting_tiles: cute.Tensor,
        token_final_scales: cute.Tensor, per_row_scales: cute.Tensor, output: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:  # fmt: skip
        operands = [
            *(a, w2, a_scale, w2_scale, output, alpha, tile_idx_to_expert_idx),
            *(tile_idx_to_mn_limit, permuted_idx_to_expanded_idx, num_non_exiting_tiles),
            token_final_scales,
        ]
        launch(operands, per_row_scales, stream)

    # Whole clusters of columns, as 0.6.13 adds whole tiles (flashinfer#3957). 0.7.2 stops at a
    # row's end (blockscaled_contiguous_grouped_gemm_finalize_fusion.py:2198-2212), but the layout
    # has whole tiles anyway.
    tokens, experts, columns = size("T"), size("E"), size("H", n * cluster_n)
    rows, tiles, top_k = size("M", tile), size("tiles"), size("K")
    half_inner, inner_blocks = size("I/2", 32), size("I/16", 4)
    common = [
        data(rows, half_inner),
        data(experts, columns, half_inner),
        scales(rows, inner_blocks),
        scales(experts, columns, inner_blocks),
        tensor(F32, experts),
        tensor(I32, tiles),
        tensor(I32, tiles),
        tensor(I32, rows),
        tensor(I32, 1),
        tensor(F32, tokens, top_k, alignment=SCALE_ALIGNMENT),
    ]
    # Rows of slots, which the class has as [T * K, H]: in three dimensions, as a size that is a
    # product of two others is not checked.
    shape = (tokens, columns) if finalize else (tokens, top_k, columns)
    output = tensor(BF16, *shape, alignment=DATA_ALIGNMENT)
    if per_token:
        return compiled(gemm2_per_token, [*common, tensor(F32, rows), output], options)
    return compiled(gemm2_static, [*common, output], options)
