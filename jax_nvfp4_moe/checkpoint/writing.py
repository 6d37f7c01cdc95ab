"""Writing a checkpoint directory."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np

from jax_nvfp4_moe._messages import check_name, described
from jax_nvfp4_moe.checkpoint import compressed_tensors, modelopt
from jax_nvfp4_moe.checkpoint._progress import progress_bar
from jax_nvfp4_moe.checkpoint.files import INDEX, import_extra
from jax_nvfp4_moe.checkpoint.scheme import Format
from jax_nvfp4_moe.experts import ActivationScheme

NamedTensors = Iterable[tuple[str, np.ndarray]]
# Returns the JSON files, by name, of a checkpoint in which these modules are not in NVFP4.
Describe = Callable[[list[str]], Mapping[str, Any]]

SHARD_BYTES = 4 << 30
# Files that are not copied: files that are written anew, and weights.
_WRITTEN = {INDEX, "config.json", "hf_quant_config.json"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_FLOATS = (ml_dtypes.bfloat16, np.float16, np.float32)


def check_output_options(format: str, shard_bytes: int) -> None:
    """Checks the arguments that all writing functions share.

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
    tensors: NamedTensors,
    describe: Describe,
    *,
    copy_from: Path,
    nbytes: int,
    shard_bytes: int,
    progress: bool | None,
) -> None:
    """Writes tensors one by one, then JSON files, then copies of the original's other files.

    Args:
        path: the directory, which appears only when everything is written.
        tensors: names and arrays, in the format that `describe` states.
        describe: returns the JSON files.
        copy_from: a directory whose other files, such as a tokenizer's, are copied.
        nbytes: about how many bytes there are to write.
        shard_bytes: as in `save_checkpoint`.
        progress: as in `save_checkpoint`.

    Raises:
        FileExistsError: `path` exists and is not an empty directory.
    """
    unquantized = []

    def counted() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in tensors:
            if array.dtype in _FLOATS and array.ndim > 1:
                unquantized.append(name.removesuffix(".weight"))
            yield name, array
            advance(array.nbytes)

    with new_directory(path) as new, progress_bar("Writing", progress, nbytes) as advance:
        write_tensors(new, counted(), shard_bytes)
        for file, value in describe(sorted(unquantized)).items():
            write_json(new / file, value)
        if not copy_from.is_dir():
            return
        for file in sorted(copy_from.iterdir()):
            written = file.name in _WRITTEN or file.suffix in _WEIGHTS
            if file.is_file() and not written and not file.name.startswith("."):
                shutil.copyfile(file, new / file.name)


def unchanged_files(files: Mapping[str, Any]) -> Describe:
    """Describes a checkpoint by JSON files that exist already."""
    return lambda modules: files


def quantization_files(
    config: Mapping[str, Any],
    format: Format,
    activation_scheme: ActivationScheme,
    kv_cache: str | None,
) -> Describe:
    """Describes a checkpoint by JSON files in one of the formats.

    Args:
        config: the model's config.json, whose quantisation is replaced.
        format: the format.
        activation_scheme: of all its NVFP4 matrices.
        kv_cache: None or "FP8".

    Raises:
        ConfigError: the format cannot express the scheme.
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


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a directory to write into, and renames it to `path` if the block raises nothing.

    Raises:
        FileExistsError: `path` exists and is not an empty directory.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory: nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """Writes tensors one by one into files of about `shard_bytes`, with an index for several."""
    import_extra("safetensors")
    from safetensors.numpy import save_file  # noqa: PLC0415

    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        shards.append(list(held))
        save_file(held, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        held.clear()

    for name, array in tensors:
        if held and sum(a.nbytes for a in held.values()) + array.nbytes > shard_bytes:
            flush()
        held[name] = np.ascontiguousarray(array).reshape(array.shape)
        total += array.nbytes
    if held or not shards:
        flush()
    if len(shards) == 1:
        (directory / "1.safetensors").rename(directory / "model.safetensors")
        return
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.safetensors").rename(directory / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(directory / INDEX, index)


def write_json(file: Path, value: Any) -> None:
    """Writes JSON as Hugging Face's tools do, indented by two spaces."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
