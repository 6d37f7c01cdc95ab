"""Safetensors directories: what is in them, lazily, and how they are written.

Headers are parsed and checked by the safetensors library. Tensors are NumPy views of the mapped
file, mapped on request and for as long as the view lives, so that a process's memory holds what it
is copying and not the files it has read.
"""

import collections
import contextlib
import dataclasses
import importlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_nvfp4_moe.checkpoint.errors import ConfigError, ShardError, TensorError

INDEX = "model.safetensors.index.json"
_LARGEST_JSON = 1 << 28  # bytes: far above any real index or config
_ALIGNMENT = 64  # bytes: JAX uses an aligned array on the CPU as it is

# The dtypes of safetensors that NumPy and ml_dtypes have.
DTYPES = {
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, from its file's header.

    Attributes:
        dtype: as safetensors spells it.
        shape: its shape.
        file: the file.
        offset: of its first byte in the file.
        nbytes: of the whole tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of views."""
        return DTYPES[self.dtype]


class TensorFiles(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint directory by name; reads headers when made, and no tensor."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the index, if there is one, and every file's header.

        Args:
            path: a directory with ``model.safetensors.index.json`` or ``*.safetensors``, or one
                ``.safetensors`` file.

        Raises:
            FileNotFoundError: there is no such path.
            ShardError: a file is missing, truncated or malformed, or the index names one outside.
            ConfigError: the index is malformed.
            TensorError: the index places a tensor where it is not.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"path is {str(path)!r}: no such file or directory")
        self._tensors: dict[str, TensorInfo] = {}
        if path.is_file():
            self.directory, files, places = path.parent, [path], None
        else:
            self.directory = path
            files, places = _listed(path)
        for file in files:
            for name, info in _header(file).items():
                if places is not None and places.get(name) != file.name:
                    continue  # the index decides; some exporters leave strays in their shards
                if name in self._tensors:
                    raise ShardError(f"{name} is both in {self._tensors[name].file} and in {file}")
                self._tensors[name] = info
        if places is not None and (absent := sorted(set(places) - set(self._tensors))):
            raise TensorError(
                f"{path / INDEX} places {len(absent)} tensors in files that do not have them, the "
                f"first is {absent[0]} in {places[absent[0]]}"
            )

    def __getitem__(self, name: str) -> TensorInfo:
        """Where the tensor lies."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._tensors)

    def view(self, name: str, *leading: int) -> np.ndarray:
        """A read-only view of a tensor, or of the part of it at some leading indices.

        Raises:
            TensorError: the tensor has a dtype or a shape that NumPy lacks.
        """
        info = self[name]
        if info.dtype not in DTYPES:
            raise TensorError(f"{name} has dtype {info.dtype}, which NumPy cannot hold")
        shape = info.shape[len(leading) :]
        items = 0
        for index, length in zip(leading, info.shape, strict=False):
            items = items * length + index
        offset = info.offset + items * math.prod(shape) * info.numpy_dtype.itemsize
        # As bytes: np.memmap wants the offset of a typed map to be what it is not always, aligned.
        size = math.prod(shape) * info.numpy_dtype.itemsize
        raw = np.empty(0, np.uint8)  # which cannot be mapped
        if size:
            raw = np.memmap(info.file, np.uint8, mode="r", offset=offset, shape=(size,))
        try:
            return np.asarray(raw).view(info.numpy_dtype).reshape(shape)
        except ValueError as error:  # too many axes, or, beside one of length 0, too long ones
            raise TensorError(
                f"{name} has shape {info.shape}, which NumPy cannot hold: {error}"
            ) from None

    def array(self, name: str) -> np.ndarray:
        """A whole tensor, read into memory."""
        view = self.view(name)
        out = aligned(view.shape, view.dtype)
        out[...] = view
        return out


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that JAX need not copy on the CPU."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _listed(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold tensors and, from an index, which file holds which tensor."""
    index = directory / INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ShardError(f"{directory} has neither {INDEX} nor a .safetensors file")
        return files, None
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise ConfigError(f"{index}: weight_map is not an object of file names, one per tensor")
    names = sorted(set(places.values()))
    for name in names:
        # Names only: symbolic links, with which Hugging Face's cache is built, may lead anywhere.
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ShardError(
                f"{index} names the file {name!r}, expected a plain .safetensors file name: a "
                "checkpoint may not point outside its directory"
            )
    return [directory / name for name in names], places


def _header(file: Path) -> dict[str, TensorInfo]:
    try:
        there = file.is_file()
    except OSError:  # a name too long for the system
        there = False
    if not there:
        raise ShardError(f"{file} is missing, or is not a file")
    safetensors = require("safetensors")
    try:
        # Checks lengths, offsets and dtypes; what follows may rely on them.
        with safetensors.safe_open(file, "numpy"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(length), object_pairs_hook=_once)
        entries.pop("__metadata__", None)
        return {name: _info(file, 8 + length, entry) for name, entry in entries.items()}
    except Exception as error:
        raise ShardError(
            f"{file} ({file.stat().st_size} bytes) is truncated or malformed: {error}"
        ) from error


def _info(file: Path, start: int, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict):  # which the library lets pass, with fields by position
        raise ValueError(f"a tensor is described by {entry!r:.80}, expected an object")
    begin, end = entry["data_offsets"]
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), file, start + begin, end - begin)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name comes twice: readers differ on which one holds."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{twice!r:.80} is there twice")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        ConfigError: the file is missing, too large, not JSON, or not an object.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is missing")
    if file.stat().st_size > _LARGEST_JSON:
        raise ConfigError(f"{file} has {file.stat().st_size} bytes, too many for what it is")
    try:
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a JSON {type(found).__name__}, expected an object")
    return found


def require(module: str, *, extra: str = "checkpoint") -> Any:
    """A module of one of the package's extras, imported only when it is needed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"{module} is not installed: pip install 'jax_nvfp4_moe[{extra}]'"
        ) from None


# ------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory to write into, which becomes `path` when the block ends without an error.

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
    """Writes tensors as they come, into files of about `shard_bytes`, with an index if several."""
    require("safetensors")
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
    """Writes JSON as Hugging Face's tools do: indented by two, one newline at the end."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
