"""Reading a directory of safetensors and JSON files.

The safetensors library parses and checks headers. Tensors are NumPy views of mapped files. A file
is mapped on request and as long as the view lives, so that a process's memory holds the tensor it
copies and not the files it has read.
"""

import collections
import dataclasses
import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_nvfp4_moe.checkpoint.errors import ConfigError, ShardError, TensorError

INDEX = "model.safetensors.index.json"
_LARGEST_JSON = 1 << 28  # bytes: far above any real index or config
_ALIGNMENT = 64  # bytes: JAX on the CPU does not copy an aligned array

# The dtypes of safetensors that NumPy or ml_dtypes has.
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
    """A tensor's entry in its file's header.

    Attributes:
        dtype: in safetensors' spelling.
        shape: the shape.
        file: the file that holds the tensor.
        offset: the offset of its first byte in the file.
        nbytes: its size in bytes.
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
    """The tensors of a checkpoint directory by name. Construction reads headers alone."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the index, if it exists, and every file's header.

        Args:
            path: a directory with ``model.safetensors.index.json`` or ``*.safetensors``, or one
                ``.safetensors`` file.

        Raises:
            FileNotFoundError: there is no such path.
            ShardError: a file is missing, truncated, malformed, or outside the directory.
            ConfigError: the index is malformed.
            TensorError: the index names a file for a tensor that is not in it.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"path is {str(path)!r}: no such file or directory")
        self._tensors: dict[str, TensorInfo] = {}
        if path.is_file():
            self.directory, files, places = path.parent, [path], None
        else:
            self.directory = path
            files, places = _indexed(path)
        for file in files:
            for name, info in _header(file).items():
                if places is not None and places.get(name) != file.name:
                    continue  # the index decides: some exporters leave stray tensors
                if name in self._tensors:
                    raise ShardError(f"{name} is in both {self._tensors[name].file} and {file}")
                self._tensors[name] = info
        if places is not None and (absent := sorted(set(places) - set(self._tensors))):
            raise TensorError(
                f"{path / INDEX} places {len(absent)} tensors in files that lack them, the first "
                f"is {absent[0]} in {places[absent[0]]}"
            )

    def __getitem__(self, name: str) -> TensorInfo:
        """The tensor's entry."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._tensors)

    def view(self, name: str, *leading: int) -> np.ndarray:
        """A read-only view of a tensor, or of its part at some leading indices.

        Raises:
            TensorError: NumPy cannot hold the tensor's dtype or shape.
        """
        info = self[name]
        if info.dtype not in DTYPES:
            raise TensorError(f"{name} has dtype {info.dtype}, which NumPy cannot hold")
        shape = info.shape[len(leading) :]
        items = 0
        for index, length in zip(leading, info.shape, strict=False):
            items = items * length + index
        offset = info.offset + items * math.prod(shape) * info.numpy_dtype.itemsize
        # As bytes: np.memmap wants the offset of a typed map aligned, which it need not be.
        size = math.prod(shape) * info.numpy_dtype.itemsize
        raw = np.empty(0, np.uint8)  # an empty map is not allowed
        if size:
            raw = np.memmap(info.file, np.uint8, mode="r", offset=offset, shape=(size,))
        try:
            return np.asarray(raw).view(info.numpy_dtype).reshape(shape)
        except ValueError as error:  # too many axes, or huge axes in an empty shape
            raise TensorError(
                f"{name} has shape {info.shape}, which NumPy cannot hold: {error}"
            ) from None

    def array(self, name: str) -> np.ndarray:
        """A whole tensor, read into memory."""
        view = self.view(name)
        out = empty_aligned(view.shape, view.dtype)
        out[...] = view
        return out


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array that JAX on the CPU need not copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _indexed(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold tensors, and the index's map from tensors to files, if it exists."""
    index = directory / INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ShardError(f"{directory} has neither {INDEX} nor a .safetensors file")
        return files, None
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise ConfigError(f"{index}: weight_map is malformed, expected a file name for each tensor")
    names = sorted(set(places.values()))
    for name in names:
        # Names alone are checked: the symbolic links of Hugging Face's cache may lead anywhere.
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ShardError(
                f"{index} names the file {name!r}, expected a plain .safetensors file name: a "
                "checkpoint may not point outside its directory"
            )
    return [directory / name for name in names], places


def _header(file: Path) -> dict[str, TensorInfo]:
    try:
        exists = file.is_file()
    except OSError:  # a name too long for the system
        exists = False
    if not exists:
        raise ShardError(f"{file} is missing, or is not a file")
    safetensors = import_extra("safetensors")
    try:
        # This checks lengths, offsets and dtypes, which the code below relies on.
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
    if not isinstance(entry, dict):  # the library accepts a list of the fields
        raise ValueError(f"a tensor's entry is {entry!r:.80}, expected an object")
    begin, end = entry["data_offsets"]
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), file, start + begin, end - begin)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated name is an error, since readers differ on which one holds."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the name {twice!r:.80} is repeated")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ConfigError: the file is missing, too large, not JSON, or not an object.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is missing")
    if file.stat().st_size > _LARGEST_JSON:
        raise ConfigError(
            f"{file} has {file.stat().st_size} bytes, expected at most {_LARGEST_JSON}"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a JSON {type(found).__name__}, expected an object")
    return found


def import_extra(module: str, *, extra: str = "checkpoint") -> Any:
    """Imports and returns a module that one of the package's extras installs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"{module} is not installed: pip install 'jax_nvfp4_moe[{extra}]'"
        ) from None
