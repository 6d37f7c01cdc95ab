"""Conversion between ModelOpt's format and compressed-tensors', one tensor at a time."""

import os
from collections.abc import Iterator

import numpy as np

from jax_nvfp4_moe.checkpoint import modelopt
from jax_nvfp4_moe.checkpoint.errors import ScaleError, UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.family import Family
from jax_nvfp4_moe.checkpoint.matrices import ExpertTensors
from jax_nvfp4_moe.checkpoint.names import BlockNames
from jax_nvfp4_moe.checkpoint.scheme import PARTS, Format, Parts, Scheme
from jax_nvfp4_moe.checkpoint.source import Source
from jax_nvfp4_moe.checkpoint.values import read_biases, read_matrix, read_scalars
from jax_nvfp4_moe.checkpoint.writing import (
    SHARD_BYTES,
    NamedTensors,
    check_output_options,
    quantization_files,
    write_checkpoint,
)
from jax_nvfp4_moe.experts import ActivationScheme


def convert_checkpoint(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: Format,
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> None:
    """Writes an NVFP4 checkpoint in the other format, or in its own.

    Packed codes and block scales are the same bits in both formats. Global scales become their
    float32 reciprocals: a conversion there and back may change them by one unit in the last place.
    All NVFP4 matrices are converted, one tensor at a time, not the experts alone.

    Args:
        path: a checkpoint that `load_checkpoint` can load.
        output: a directory that does not exist yet, or is empty.
        format: "modelopt" or "compressed-tensors". ModelOpt writes one tensor for all
            experts of Llama 4 and gpt-oss; compressed-tensors gets one for each expert.
        shard_bytes: as in `save_checkpoint`.
        progress: as in `save_checkpoint`.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`; or the format cannot express
            the checkpoint's quantisation.
        FileExistsError: `output` exists and is not an empty directory.
        TypeError, ValueError: an argument has the wrong type or value.
    """
    check_output_options(format, shard_bytes)
    source = Source(path)
    if source.scheme is None:
        raise UnsupportedCheckpointError(
            f"{source.files.directory} is not quantised: `python -m jax_nvfp4_moe quantize` "
            "quantises its experts"
        )
    kv_cache = modelopt.kv_cache(source.scheme.settings)
    if kv_cache not in (None, "FP8"):
        raise UnsupportedCheckpointError(f"the KV cache is quantised in {kv_cache}, expected FP8")
    describe = quantization_files(
        source.config, format, _activation_scheme(source.scheme), kv_cache
    )
    write_checkpoint(
        output,
        in_format(_tensors(source, format), source.scheme.parts, PARTS[format]),
        describe,
        copy_from=source.files.directory,
        nbytes=sum(info.nbytes for info in source.files.values()),
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _activation_scheme(scheme: Scheme) -> ActivationScheme:
    """The activation scheme of all quantised modules."""
    found: set[ActivationScheme] = set()
    found.update(rule.activation_scheme for rule in scheme.rules if rule.activation_scheme)
    others = {rule.algorithm for rule in scheme.rules if rule.activation_scheme is None} - {None}
    if len(found) > 1 or others:
        several = ", ".join(sorted(map(str, found | others)))
        raise UnsupportedCheckpointError(
            f"{scheme.source} has several quantisations, {several}; expected one"
        )
    return found.pop()


def _tensors(source: Source, format: Format) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors; stacked experts are split where the format requires it."""
    stacked = [source.layer(number).experts for number in source.layers]
    stacked = [experts for experts in stacked if experts.stacked and experts.quantized]
    if format == "modelopt":
        stacked = []
    taken: set[str] = set()
    for experts in stacked:
        experts.check_quantized()
        taken |= set(experts.same_prefix())
        yield from split_experts(experts, source.family)
    for name in source.files:
        if name not in taken:
            yield name, source.files.view(name)


def split_experts(experts: ExpertTensors, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """Yields stacked experts as one tensor for each expert."""
    names, parts = BlockNames(experts.block, family.split_names), experts.parts
    kinds = [parts.global_scale, parts.input_scale]
    kinds = [part for part in kinds if not experts.absent(part)]
    scalars = {
        (role, part): read_scalars(experts, (role,), part)
        for role in experts.roles
        for part in kinds
    }
    biases = {role: read_biases(experts, (role,)) for role in experts.roles}
    for expert in range(experts.num_experts):
        for role in experts.roles:
            for part in (parts.data, parts.scale):
                yield (
                    names.tensor(role, part, expert),
                    np.ascontiguousarray(read_matrix(experts, role, part, expert)),
                )
            for part in kinds:
                yield names.tensor(role, part, expert), np.asarray(scalars[role, part][expert, 0])
            if (bias := biases[role]) is not None:
                yield names.tensor(role, "bias", expert), bias[expert]


def in_format(tensors: NamedTensors, old: Parts, new: Parts) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors of one format under the other's names and conventions.

    Raises:
        ScaleError: a scale has no finite reciprocal.
    """
    scalars = {old.global_scale: new.global_scale, old.input_scale: new.input_scale}
    for name, array in tensors:
        module, _, part = name.rpartition(".")
        if part == old.data and array.dtype == np.uint8:
            yield f"{module}.{new.data}", array
        elif part in scalars and old.encode != new.encode:
            with np.errstate(divide="ignore", over="ignore"):
                inverse = np.float32(1) / array.astype(np.float32).reshape(-1)
            if not (np.isfinite(inverse) & (inverse > 0)).all():
                raise ScaleError(
                    f"{name} is {array}, expected a scale with a finite reciprocal above 0"
                )
            # Shapes as each format's tools write them: [1] and [].
            yield f"{module}.{scalars[part]}", inverse if new.encode else inverse.reshape(())
        else:
            yield name, array
