"""The list of modules built on this machine: `build` writes it, calls read it."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from jax_nvfp4_moe.bridge import library

T = TypeVar("T")

CACHE_VARIABLE = "JAX_NVFP4_MOE_CACHE"

_FILE = "modules.json"
_COMMAND = "`python -m jax_nvfp4_moe build {}`"
# The manifest's keys for each module, which are the names of the class's fields.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "version": str,
    "archs": list,
    "path": str,
    "sha256": str,
    "tvm_ffi": str,
    "cubins": (str, NoneType),
    "versions": dict,
}
# Optional keys: manifests of earlier versions lack them.
_OPTIONAL: dict[str, type] = {"needs": list, "functions": list}


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled module.

    Attributes:
        kind: the implementation that calls it: "trtllm" or "cute_dsl".
        version: the full version of flashinfer-python that it was built from.
        archs: the GPU architectures that it was compiled for, as in ("10.0a", "10.3a").
        path: the shared library.
        sha256: the SHA-256 of that file, in hexadecimal.
        tvm_ffi: libtvm_ffi.so, which the module calls.
        cubins: the directory of its kernel images, or None if the library contains them.
        versions: the versions of the packages and tools that built it, by name.
        needs: other libraries that it opens by these paths.
        functions: the names of its functions, or () for the one function that the kind implies.
    """

    kind: str
    version: str
    archs: tuple[str, ...]
    path: Path
    sha256: str
    tvm_ffi: Path
    cubins: Path | None
    versions: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    needs: tuple[Path, ...] = ()
    functions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name that calls use.

        It leaves out the architectures: exported programs contain the name, and may run where the
        same version was compiled for another GPU.
        """
        return f"{self.kind}-{self.version}"

    def register(self) -> None:
        """Registers the module with the bridge. Further calls do nothing.

        Raises:
            OSError: one of the module's files, or the bridge's library, is missing.
            ValueError: the file changed since it was built, or another module has the same name.
        """
        again = f"run {_COMMAND.format(self.kind)} again"
        _check_sha256(self.path, self.sha256, again)
        for each in (self.tvm_ffi, *self.needs):
            if not each.is_file():
                raise FileNotFoundError(f"{each}, which {self.name} calls, is gone: {again}")
        if self.cubins is not None and not self.cubins.is_dir():
            raise FileNotFoundError(f"{self.cubins}, {self.name}'s images, is gone: {again}")
        library.register_module(self.name, self.path, tvm_ffi=self.tvm_ffi, cubins=self.cubins)


@functools.cache  # Once for each file in a process: a module has tens of megabytes.
def _check_sha256(path: Path, expected: str, again: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}, which the manifest names, is gone: {again}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path} has the SHA-256 {found}, expected {expected}: {again}")


def default_cache() -> Path:
    """Returns the directory of modules: $JAX_NVFP4_MOE_CACHE, or ~/.cache/jax_nvfp4_moe."""
    given = os.environ.get(CACHE_VARIABLE)
    path = Path(given).expanduser() if given else Path.home() / ".cache" / "jax_nvfp4_moe"
    return path.absolute()


def read(cache: Path | None = None) -> tuple[Module, ...]:
    """Returns all modules that were built.

    Args:
        cache: the directory of the manifest, `default_cache()` by default.

    Raises:
        OSError: the manifest cannot be read.
        ValueError: it is malformed.
    """
    again = f"{_COMMAND.format('trtllm')} or {_COMMAND.format('cute_dsl')}"
    return read_entries((cache or default_cache()) / _FILE, "modules", "manifest", _decode, again)


def read_entries(
    file: Path, key: str, what: str, decode: Callable[[dict[str, Any]], T], again: str
) -> tuple[T, ...]:
    """Returns the entries of a JSON file that contains one list, or () if there is no file.

    Args:
        file: the file.
        key: the list's key.
        what: what the file is, in words for the user.
        decode: makes an entry from its JSON object. It raises KeyError, TypeError or ValueError if
            the object is malformed.
        again: the command that writes the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is malformed.
    """
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return ()
    try:
        return tuple(decode(entry) for entry in json.loads(text)[key])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is no {what} of {key} ({error!r}): delete it, then run {again} again"
        ) from None


def write_entries(file: Path, key: str, entries: Iterable[Any]) -> None:
    """Writes a file that `read_entries` reads, from dataclasses. The caller has `locked` it."""
    content = {key: [dataclasses.asdict(each) for each in entries]}
    new = file.with_name(f"{file.name}.new")  # The lock keeps others from it.
    new.write_text(json.dumps(content, indent=2, default=str) + "\n", "utf-8")
    new.replace(file)


def _decode(entry: dict[str, Any]) -> Module:
    for key, expected in _TYPES.items():
        if not isinstance(entry[key], expected):
            raise TypeError(f"{key} is {entry[key]!r}")
    for key, expected in _OPTIONAL.items():
        if not isinstance(entry.get(key, expected()), expected):
            raise TypeError(f"{key} is {entry[key]!r}")
    cubins = entry["cubins"]
    return Module(
        kind=entry["kind"],
        version=entry["version"],
        archs=tuple(entry["archs"]),
        path=Path(entry["path"]),
        sha256=entry["sha256"],
        tvm_ffi=Path(entry["tvm_ffi"]),
        cubins=None if cubins is None else Path(cubins),
        versions=entry["versions"],
        needs=tuple(map(Path, entry.get("needs", ()))),
        functions=tuple(entry.get("functions", ())),
    )


def add(module: Module, cache: Path | None = None) -> None:
    """Adds a module to the manifest, or replaces the one of the same name.

    Readers see the whole manifest, old or new. Several processes may add modules at the same time.

    Args:
        module: the module, with absolute paths.
        cache: the directory of the manifest, `default_cache()` by default.

    Raises:
        OSError: the manifest cannot be read or written.
        ValueError: it is malformed.
    """
    cache = cache or default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache):
        kept = [each for each in read(cache) if each.name != module.name]
        write_entries(cache / _FILE, "modules", (*kept, module))


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Keeps other processes from changing a cache within the `with` block."""
    import fcntl  # noqa: PLC0415  Windows has none: there nothing is built, but `read` must work.

    # A separate file, because each change replaces the manifest itself.
    with (cache / f"{_FILE}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def register_all() -> tuple[Module, ...]:
    """Registers every module that was built, and the call target for CUDA.

    Call it before running a program that was exported by another process. Tracing a call registers
    what that call needs.

    Returns:
        The modules.

    Raises:
        OSError, ValueError: see `read` and `Module.register`.
    """
    modules = read()
    for module in modules:
        module.register()
    library.register_targets("cuda")
    return modules
