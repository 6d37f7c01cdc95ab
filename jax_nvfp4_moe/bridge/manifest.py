"""Which modules were built on this machine: written by `build`, read at run time."""

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
# What the manifest has for each module, by the names of the class's fields.
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
# What it may have: a manifest of an earlier version has not.
_OPTIONAL: dict[str, type] = {"needs": list, "functions": list}


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled module.

    Attributes:
        kind: what is in it: "trtllm" or "cute_dsl".
        version: of the package that it comes from, in full.
        archs: what it was compiled for, as in ("10.0a", "10.3a").
        path: the shared library.
        sha256: of that file, in hexadecimal.
        tvm_ffi: libtvm_ffi.so, which it calls.
        cubins: the directory of the images that it asks for, or None if it has all in itself.
        versions: of the packages and tools that it was built with, by their names.
        needs: other libraries that it opens by these paths.
        functions: what it exports; () where that is one function, which the kind implies.
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
        """What calls refer to it by.

        Without what it was compiled for: a program that is exported here contains the name, and may
        run where the same version was compiled for another GPU.
        """
        return f"{self.kind}-{self.version}"

    def register(self) -> None:
        """Makes it known to the bridge; again does nothing.

        Raises:
            OSError: one of its files, or the bridge's library, is not there.
            ValueError: the file is not the one that was built, or another module has its name.
        """
        again = f"run {_COMMAND.format(self.kind)} again"
        _check_sha256(self.path, self.sha256, again)
        for each in (self.tvm_ffi, *self.needs):
            if not each.is_file():
                raise FileNotFoundError(f"{each}, which {self.name} calls, is gone: {again}")
        if self.cubins is not None and not self.cubins.is_dir():
            raise FileNotFoundError(f"{self.cubins}, {self.name}'s images, is gone: {again}")
        library.register_module(self.name, self.path, tvm_ffi=self.tvm_ffi, cubins=self.cubins)


@functools.cache  # Once for each file in a process: modules have tens of megabytes.
def _check_sha256(path: Path, expected: str, again: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}, which the manifest names, is gone: {again}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path} has the SHA-256 {found}, expected {expected}: {again}")


def default_cache() -> Path:
    """Where modules and their manifest are: $JAX_NVFP4_MOE_CACHE, or below the home directory."""
    given = os.environ.get(CACHE_VARIABLE)
    path = Path(given).expanduser() if given else Path.home() / ".cache" / "jax_nvfp4_moe"
    return path.absolute()


def read(cache: Path | None = None) -> tuple[Module, ...]:
    """All modules that were built; none if nothing was.

    Args:
        cache: where they are, `default_cache()` if not given.

    Raises:
        OSError: the manifest cannot be read.
        ValueError: it is malformed.
    """
    again = f"{_COMMAND.format('trtllm')} or {_COMMAND.format('cute_dsl')}"
    return read_entries((cache or default_cache()) / _FILE, "modules", "manifest", _decode, again)


def read_entries(
    file: Path, key: str, what: str, decode: Callable[[dict[str, Any]], T], again: str
) -> tuple[T, ...]:
    """The entries of a JSON file that has one list; none if there is no file.

    Args:
        file: which.
        key: by which it has the list.
        what: what it is, in words for the user.
        decode: makes an entry; a KeyError, TypeError or ValueError of it means that the file is
            malformed.
        again: the command that makes the file.

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
    """Writes such a file, of dataclasses, whole; the caller holds its cache (`locked`)."""
    content = {key: [dataclasses.asdict(each) for each in entries]}
    new = file.with_name(f"{file.name}.new")  # Nobody else's, under the lock.
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
    """Writes a module down, in the place of the one that had its name.

    Readers see the manifest as it was before or as it is after, and of several processes that add
    modules at the same time none loses another's.

    Args:
        module: with absolute paths.
        cache: where the manifest is, `default_cache()` if not given.

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
    """Holds what is kept in a cache for this process, while it is changed."""
    import fcntl  # noqa: PLC0415  Windows has none: there nothing is built, but `read` must work.

    # A file of its own: the manifest itself is another file after each change.
    with (cache / f"{_FILE}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def register_all() -> tuple[Module, ...]:
    """Registers every module that was built, and the bridge's target for CUDA.

    For programs that were exported elsewhere: what is traced here registers what it calls.

    Returns:
        The modules.

    Raises:
        OSError, ValueError: as `read` and `Module.register`.
    """
    modules = read()
    for module in modules:
        module.register()
    library.register_targets("cuda")
    return modules
