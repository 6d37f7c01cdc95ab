"""Between ModelOpt's format and compressed-tensors', tensor by tensor."""

import os
from collections.abc import Iterator

import numpy as np

from jax_nvfp4_moe.checkpoint import modelopt
from jax_nvfp4_moe.checkpoint.errors import ScaleError, UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.matrices import ExpertTensors
from jax_nvfp4_moe.checkpoint.scheme import PARTS, Format, Parts, Scheme
from jax_nvfp4_moe.checkpoint.source import Source
from jax_nvfp4_moe.checkpoint.writing import (
    SHARD_BYTES,
    Named,
    check_arguments,
    described_by,
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
    """Writes an NVFP4 checkpoint again in the other format, or in its own.

    Packed codes and block scales are the same in both, bit for bit. Global scales are stored as
    their float32 reciprocals, so that there and back may differ by one unit in the last place. All
    NVFP4 matrices are converted, not the experts' alone, one tensor at a time.

    Args:
        path: a checkpoint that `load_checkpoint` can load.
        output: a directory that does not exist yet, or is empty.
        format: "modelopt" or "compressed-tensors". Tensors that hold all experts, as ModelOpt
            writes for Llama 4 and gpt-oss, are split for compressed-tensors, which has no such.
        shard_bytes: as in `save_checkpoint`.
        progress: as in `save_checkpoint`.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`; or the format cannot say what the
            checkpoint says.
        FileExistsError: there is something at `output`.
        TypeError, ValueError: an argument does not fit.
    """
    check_arguments(format, shard_bytes)
    source = Source(path)
    if source.scheme is None:
        raise UnsupportedCheckpointError(
            f"{source.files.directory} is not quantised: `python -m jax_nvfp4_moe quantize` "
            "quantises its experts"
        )
    kv_cache = modelopt.kv_cache(source.scheme.settings)
    if kv_cache not in (None, "FP8"):
        raise UnsupportedCheckpointError(f"the KV cache is quantised in {kv_cache}, expected FP8")
    describe = described_by(source.config, format, _activation_scheme(source.scheme), kv_cache)
    write_checkpoint(
        output,
        renamed(_tensors(source, format), source.scheme.parts, PARTS[format]),
        describe,
        beside=source.files.directory,
        nbytes=sum(info.nbytes for info in source.files.values()),
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _activation_scheme(scheme: Scheme) -> ActivationScheme:
    """That of all quantised modules."""
    found: set[ActivationScheme] = set()
    found.update(rule.activation_scheme for rule in scheme.rules if rule.activation_scheme)
    others = {rule.algorithm for rule in scheme.rules if rule.activation_scheme is None} - {None}
    if len(found) > 1 or others:
        several = ", ".join(sorted(map(str, found | others)))
        raise UnsupportedCheckpointError(
            f"{scheme.source} has several quantisations, {several}: expected one"
        )
    return found.pop()


def _tensors(source: Source, format: Format) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors; experts that are stacked are split where the format needs it."""
    stacked = [source.experts(layer) for layer in source.layers]
    stacked = [experts for experts in stacked if experts.names.stacked and experts.quantized]
    if format == "modelopt":
        stacked = []
    taken: set[str] = set()
    for experts in stacked:
        experts.check_quantized()
        taken |= set(experts.beside())
        yield from split(experts, source)
    for name in source.files:
        if name not in taken:
            yield name, source.files.view(name)


def split(experts: ExpertTensors, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Stacked experts as tensors of their own."""
    names, parts = source.family.split_names, experts.parts
    kinds = [parts.global_scale, parts.input_scale]
    kinds = [part for part in kinds if not experts.absent(part)]
    scalars = {
        (role, part): experts.scalars((role,), part) for role in experts.roles for part in kinds
    }
    biases = {role: experts.biases((role,)) for role in experts.roles}
    for expert in range(experts.num_experts):
        for role in experts.roles:
            module = f"{experts.block}.{getattr(names, role).format(expert=expert)}"
            for part in (parts.data, parts.scale):
                yield f"{module}.{part}", np.ascontiguousarray(experts.matrix(role, part, expert))
            for part in kinds:
                yield f"{module}.{part}", np.asarray(scalars[role, part][expert, 0])
            if (bias := biases[role]) is not None:
                yield f"{module}.bias", bias[expert]


def renamed(tensors: Named, old: Parts, new: Parts) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of one format in the other's names and conventions.

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
                raise ScaleError(f"{name} is {array}, which has no finite positive reciprocal")
            # Shapes as each format's tools write them: [1] and [].
            yield f"{module}.{scalars[part]}", inverse if new.encode else inverse.reshape(())
        else:
            yield name, array
