"""Quantising the routed experts of a checkpoint, one matrix at a time."""

import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from jax_nvfp4_moe.checkpoint.calibration import (
    Pair,
    Samples,
    activation_scales,
    checked_samples,
    unquantized_matrix,
)
from jax_nvfp4_moe.checkpoint.conversion import in_format
from jax_nvfp4_moe.checkpoint.errors import UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.names import BlockNames
from jax_nvfp4_moe.checkpoint.saving import narrow_bias
from jax_nvfp4_moe.checkpoint.scheme import MODELOPT, PARTS, Format
from jax_nvfp4_moe.checkpoint.source import LayerTensors, Source
from jax_nvfp4_moe.checkpoint.values import read_biases
from jax_nvfp4_moe.checkpoint.writing import (
    SHARD_BYTES,
    check_output_options,
    quantization_files,
    write_checkpoint,
)
from jax_nvfp4_moe.format import quantize

_quantize = jax.jit(quantize)


def quantize_checkpoint(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    calibration: Mapping[int, Samples] | None = None,
    format: Format = "modelopt",
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> None:
    """Quantises the routed experts of a bfloat16, float16 or float32 checkpoint to NVFP4.

    Every matrix gets its own global scale, amax / 2688; all other tensors are copied. With
    `calibration` the result is W4A4. Each expert's activation scales are then amax / 2688 of the
    samples routed to it, before GEMM1 and before GEMM2; the latter are computed with the
    unquantised weights in float32. An expert without samples gets the layer's largest scale.

    Args:
        path: a directory in Hugging Face's layout, of a model family in `checkpoint.families`.
        output: a directory that does not exist yet, or is empty.
        calibration: for every layer that has experts, the tokens [T, H] that enter its block; for
            Gemma 4, a pair of these and the router's input. A few thousand tokens of typical text
            are enough. None leaves activations unquantised (W4A16), and
            `load_checkpoint(activation_scheme="per_token")` still quantises them.
        format: "modelopt" or "compressed-tensors".
        shard_bytes: as in `save_checkpoint`.
        progress: as in `save_checkpoint`.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`; or the experts are already
            quantised, or a weight is not finite.
        FileExistsError: `output` exists and is not an empty directory.
        TypeError, ValueError: an argument has the wrong type or value.
    """
    check_output_options(format, shard_bytes)
    source = Source(path)
    layers = [source.layer(number) for number in source.layers]
    for layer in layers:
        if source.scheme is not None or layer.experts.quantized:
            raise UnsupportedCheckpointError(
                f"layer {layer.number} of {source.files.directory} is already quantised"
            )
        layer.experts.check_unquantized()
    samples = {} if calibration is None else checked_samples(calibration, source)
    describe = quantization_files(
        source.config, format, "none" if calibration is None else "static", None
    )
    taken = {name for layer in layers for name in layer.experts.same_prefix()}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for layer in layers:
            yield from _quantized(source, layer, samples.get(layer.number))
        for name in source.files:
            if name not in taken:
                yield name, source.files.view(name)

    nbytes = sum(info.nbytes for name, info in source.files.items() if name not in taken)
    nbytes += sum(source.files[name].nbytes for name in taken) * 9 // 32  # of 16 bits, 4.5 remain
    write_checkpoint(
        output,
        in_format(tensors(), MODELOPT, PARTS[format]),
        describe,
        copy_from=source.files.directory,
        nbytes=nbytes,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _quantized(
    source: Source, layer: LayerTensors, samples: Pair | None
) -> Iterator[tuple[str, np.ndarray]]:
    """A layer's experts in ModelOpt's format, with tensors for each expert."""
    experts = layer.experts
    names = BlockNames(layer.names.block, source.family.split_names)
    scales = {}
    if samples is not None:
        scales = activation_scales(source, layer, samples)
    biases = {role: read_biases(experts, (role,)) for role in experts.roles}
    for expert in range(experts.num_experts):
        for role in experts.roles:
            q = _quantize(unquantized_matrix(experts, role, expert))
            parts = {
                MODELOPT.data: q.data,
                MODELOPT.scale: q.scale,
                MODELOPT.global_scale: q.global_scale,
            }
            if scales:
                parts[MODELOPT.input_scale] = scales[role][expert]
            if (bias := biases[role]) is not None:
                parts["bias"] = narrow_bias(bias[expert])
            for part, array in parts.items():
                yield names.tensor(role, part, expert), np.asarray(array)
