"""From an unquantised checkpoint to an NVFP4 one: its routed experts, one matrix at a time."""

import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from jax_nvfp4_moe.checkpoint import calibration as calibrating
from jax_nvfp4_moe.checkpoint.calibration import Pair, Samples, weights
from jax_nvfp4_moe.checkpoint.conversion import renamed
from jax_nvfp4_moe.checkpoint.errors import UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.matrices import ExpertTensors
from jax_nvfp4_moe.checkpoint.saving import narrowed
from jax_nvfp4_moe.checkpoint.scheme import MODELOPT, PARTS, Format
from jax_nvfp4_moe.checkpoint.source import Source
from jax_nvfp4_moe.checkpoint.writing import (
    SHARD_BYTES,
    check_arguments,
    described_by,
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

    Every matrix has its own global scale, amax / 2688; everything else is copied. With
    `calibration` activations are quantised too, W4A4: each expert's activation scales are the
    largest magnitudes / 2688 that the samples routed to it have before GEMM1, and, computed with
    the unquantised weights in float32, before GEMM2. An expert that no sample reaches has the
    layer's largest.

    Args:
        path: a directory in Hugging Face's layout, of a family of `checkpoint.families`.
        output: a directory that does not exist yet, or is empty.
        calibration: for every layer that has experts, the tokens [T, H] that enter its block; as a
            pair with what the router sees, where that is something else (Gemma 4). Some thousand
            tokens of the text that the model is for will do. None: activations are not quantised
            (W4A16); `load_checkpoint(activation_scheme="per_token")` still can.
        format: "modelopt" or "compressed-tensors".
        shard_bytes: as in `save_checkpoint`.
        progress: as in `save_checkpoint`.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`; or the experts are quantised
            already, or a weight is not finite.
        FileExistsError: there is something at `output`.
        TypeError, ValueError: an argument does not fit.
    """
    check_arguments(format, shard_bytes)
    source = Source(path)
    layers = {layer: source.experts(layer) for layer in source.layers}
    for layer, experts in layers.items():
        if source.scheme is not None or experts.quantized:
            raise UnsupportedCheckpointError(
                f"layer {layer} of {source.files.directory} is quantised already"
            )
        experts.check_unquantized()
    samples = {} if calibration is None else calibrating.checked(calibration, source)
    describe = described_by(
        source.config, format, "none" if calibration is None else "static", None
    )
    taken = {name for experts in layers.values() for name in experts.beside()}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for layer, experts in layers.items():
            yield from _quantized(source, layer, experts, samples.get(layer))
        for name in source.files:
            if name not in taken:
                yield name, source.files.view(name)

    nbytes = sum(info.nbytes for name, info in source.files.items() if name not in taken)
    nbytes += sum(source.files[name].nbytes for name in taken) * 9 // 32  # of 16 bits, 4.5 remain
    write_checkpoint(
        output,
        renamed(tensors(), MODELOPT, PARTS[format]),
        describe,
        beside=source.files.directory,
        nbytes=nbytes,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _quantized(
    source: Source, layer: int, experts: ExpertTensors, samples: Pair | None
) -> Iterator[tuple[str, np.ndarray]]:
    """A layer's experts in ModelOpt's format, each with tensors of its own."""
    names = source.family.split_names
    scales = {}
    if samples is not None:
        scales = calibrating.scales(source, layer, experts, samples)
    biases = {role: experts.biases((role,)) for role in experts.roles}
    for expert in range(experts.num_experts):
        for role in experts.roles:
            q = _quantize(weights(experts, role, expert))
            parts = {
                MODELOPT.data: q.data,
                MODELOPT.scale: q.scale,
                MODELOPT.global_scale: q.global_scale,
            }
            if scales:
                parts[MODELOPT.input_scale] = scales[role][expert]
            if (bias := biases[role]) is not None:
                parts["bias"] = narrowed(bias[expert])
            for part, array in parts.items():
                name = names.tensor(getattr(names, role), part, expert)
                yield f"{experts.block}.{name}", np.asarray(array)
