"""The shared library: where it is, what it offers, and why it may not be there."""

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any, Literal

import jax

# Another meaning of the attributes needs another name: exports outlive the version that wrote them.
TARGET = "jax_nvfp4_moe_call_v1"
CPU_LAYER = "jax_nvfp4_moe_layer_on_cpu_v1"
CPU_COMBINE = "jax_nvfp4_moe_combine_on_cpu_v1"

_LIBRARY = Path(__file__).with_name("libjax_nvfp4_moe.so")
_CALL_SITE = "jax_nvfp4_moe_call_site_v1"
# As XLA spells them; under "cuda" a handler would be kept and never found.
_PLATFORMS = {"cuda": "CUDA", "cpu": "cpu"}
# Of the functions that the library has for each.
_SUFFIXES = {"cuda": "", "cpu": "_on_host"}
_lock = threading.Lock()
_registered: set[str] = set()


def unavailable() -> str | None:
    """Why the library cannot be used here, or None if it can."""
    try:
        _open()
    except OSError as error:
        return str(error)
    return None


@functools.cache
def _open() -> ctypes.CDLL:
    if not _LIBRARY.exists():
        raise OSError(
            f"{_LIBRARY.name} was not built: install jax_nvfp4_moe where there is a C++ compiler"
        )
    library = ctypes.CDLL(str(_LIBRARY))
    library.jax_nvfp4_moe_register_module.argtypes = [ctypes.c_char_p] * 4
    library.jax_nvfp4_moe_register_module.restype = ctypes.c_char_p
    library.jax_nvfp4_moe_cpu_level.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_bool)]
    library.jax_nvfp4_moe_cpu_level.restype = ctypes.c_char_p
    for suffix in _SUFFIXES.values():
        for name in ("call_site_id", "call_site_info"):
            getattr(library, f"jax_nvfp4_moe_{name}{suffix}").restype = ctypes.c_void_p
    return library


def register_module(name: str, path: Path, *, tvm_ffi: Path, cubins: Path | None = None) -> None:
    """Makes a module known, under a name that calls refer to; it is opened by the first of them.

    Args:
        name: with the module's version in it, as exports contain it.
        path: the module, a shared library that exports TVM-FFI functions.
        tvm_ffi: libtvm_ffi.so, of the `apache-tvm-ffi` package.
        cubins: the directory of the images that the module asks for.

    Raises:
        OSError: the library is not there.
        ValueError: the name is taken by another module.
    """
    strings = [name, str(path), str(tvm_ffi), "" if cubins is None else str(cubins)]
    refusal = _open().jax_nvfp4_moe_register_module(*(text.encode() for text in strings))
    if refusal is not None:
        raise ValueError(refusal.decode())


def register_targets(platform: Literal["cuda", "cpu"]) -> None:
    """Makes the library's target known to XLA; again does nothing.

    Args:
        platform: "cuda"; or "cpu", for functions that take tensors of the host, as tests have.

    Raises:
        OSError: the library is not there.
    """
    library = _open()

    def exported(name: str) -> Any:
        return getattr(library, f"jax_nvfp4_moe_{name}{_SUFFIXES[platform]}")

    with _lock:
        if platform in _registered:
            return
        if platform == "cpu":
            # A type that is registered before this backend is there breaks it; one for CUDA waits.
            jax.devices("cpu")
        jax.ffi.register_ffi_type(
            _CALL_SITE,
            {
                "type_id": _capsule(exported("call_site_id")()),
                "type_info": _capsule(exported("call_site_info")()),
            },
            platform=_PLATFORMS[platform],
        )
        # The CPU backend has no stage in which to initialize.
        stages = ["instantiate", *(["initialize"] if platform == "cuda" else []), "execute"]
        handlers = {stage: jax.ffi.pycapsule(exported(stage)) for stage in stages}
        jax.ffi.register_ffi_target(TARGET, handlers, platform=_PLATFORMS[platform])
        _registered.add(platform)


def register_cpu_targets() -> None:
    """Makes the layer's own kernels for CPUs known to XLA; again does nothing.

    Raises:
        OSError: the library is not there.
    """
    library = _open()
    handlers = {
        CPU_LAYER: library.jax_nvfp4_moe_layer_on_cpu,
        CPU_COMBINE: library.jax_nvfp4_moe_combine_on_cpu,
    }
    with _lock:
        for target, handler in handlers.items():
            if target not in _registered:
                capsule = jax.ffi.pycapsule(handler)
                jax.ffi.register_ffi_target(target, capsule, platform=_PLATFORMS["cpu"])
                _registered.add(target)


@functools.cache
def cpu_levels() -> dict[str, bool]:
    """The instruction sets that the CPU kernels are compiled for, the best first.

    Returns:
        Whether this machine has each.

    Raises:
        OSError: the library is not there.
    """
    levels: dict[str, bool] = {}
    supported = ctypes.c_bool()
    while name := _open().jax_nvfp4_moe_cpu_level(len(levels), ctypes.byref(supported)):
        levels[name.decode()] = supported.value
    return levels


def _capsule(address: int) -> object:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(address, None, None)
