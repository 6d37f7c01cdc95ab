"""How a checkpoint directory is written, whatever its tensors come from."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np

from jax_nvfp4_moe._messages import check_name, described
from jax_nvfp4_moe.checkpoint import compressed_tensors, modelopt
from jax_nvfp4_moe.checkpoint._progress import progress_bar
from jax_nvfp4_moe.checkpoint.files import INDEX, new_directory, write_json, write_tensors
from jax_nvfp4_moe.checkpoint.scheme import Format
from jax_nvfp4_moe.experts import ActivationScheme

Named = Iterable[tuple[str, np.ndarray]]
# From the modules that are not in NVFP4 to JSON files by name.
Describe = Callable[[list[str]], Mapping[str, Any]]

SHARD_BYTES = 4 << 30
# What is not copied from one directory to the other: it is written anew, or it is weights.
_WRITTEN = {INDEX, "config.json", "hf_quant_config.json"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_FLOATS = (ml_dtypes.bfloat16, np.float16, np.float32)


def check_arguments(format: str, shard_bytes: int) -> None:
    """Checks what all functions that write take.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    check_name("format", format, get_args(Format))
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, (int, np.integer)):
        raise TypeError(f"shard_bytes is {described(shard_bytes)}, expected an int")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}, expected 1 or more")


def write_checkpoint(
    path: str | os.PathLike[str],
    tensors: Named,
    describe: Describe,
    *,
    beside: Path,
    nbytes: int,
    shard_bytes: int,
    progress: bool | None,
) -> None:
    """Writes tensors as they come, then the JSON files, then all that stands beside the original.

    Args:
        path: where; it appears when everything is written, and stays away if anything fails.
        tensors: in the format that `describe` describes.
        describe: what to write besides.
        beside: a directory whose other files, as a tokenizer's, are copied.
        nbytes: about how much there is to write.
        shard_bytes: see `save_checkpoint`.
        progress: see `save_checkpoint`.

    Raises:
        FileExistsError: there is something at `path`.
    """
    unquantized = []

    def watched() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in tensors:
            if array.dtype in _FLOATS and array.ndim > 1:
                unquantized.append(name.removesuffix(".weight"))
            yield name, array
            advance(array.nbytes)

    with new_directory(path) as new, progress_bar("Writing", progress, nbytes) as advance:
        write_tensors(new, watched(), shard_bytes)
        for file, value in describe(sorted(unquantized)).items():
            write_json(new / file, value)
        if not beside.is_dir():
            return
        for file in sorted(beside.iterdir()):
            written = file.name in _WRITTEN or file.suffix in _WEIGHTS
            if file.is_file() and not written and not file.name.startswith("."):
                shutil.copyfile(file, new / file.name)


def as_it_was(files: Mapping[str, Any]) -> Describe:
    """JSON files that hold whatever is not in NVFP4."""
    return lambda modules: files


def described_by(
    config: Mapping[str, Any],
    format: Format,
    activation_scheme: ActivationScheme,
    kv_cache: str | None,
) -> Describe:
    """The JSON files of a checkpoint in one of the formats.

    Args:
        config: the model's config.json; what it says of quantisation is replaced.
        format: which.
        activation_scheme: of all its NVFP4 matrices.
        kv_cache: None or "FP8".

    Raises:
        ConfigError: the format cannot say it.
    """
    producer = {"name": "jax_nvfp4_moe"}
    if format == "compressed-tensors":
        return lambda modules: {
            "config.json": _with(
                config, compressed_tensors.settings(activation_scheme, modules, kv_cache)
            )
        }
    modelopt.settings(activation_scheme, [], kv_cache)  # raises early

    def describe(modules: list[str]) -> Mapping[str, Any]:
        settings = modelopt.settings(activation_scheme, modules, kv_cache)
        return {
            "config.json": _with(config, {**modelopt.config_json(settings), "producer": producer}),
            "hf_quant_config.json": {"producer": producer, "quantization": settings},
        }

    return describe


def _with(config: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name != "quantization_config"}
    for name, value in kept.items():
        if isinstance(value, dict) and "quantization_config" in value:
            kept[name] = {k: v for k, v in value.items() if k != "quantization_config"}
    return {**kept, "quantization_config": settings}
