"""The shared library: whether it is there, its XLA targets, and the modules that they call."""

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any, Literal

import jax

# Exports outlive the version that wrote them, so a new meaning of the attributes needs a new name.
TARGET = "jax_nvfp4_moe_call_v1"
CPU_LAYER = "jax_nvfp4_moe_layer_on_cpu_v1"
CPU_COMBINE = "jax_nvfp4_moe_combine_on_cpu_v1"

_LIBRARY = Path(__file__).with_name("libjax_nvfp4_moe.so")
_CALL_SITE = "jax_nvfp4_moe_call_site_v1"
_lock = threading.Lock()
_registered: set[str] = set()


def unavailable() -> str | None:
    """Returns why the library cannot be used here, or None if it can."""
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
    library.jax_nvfp4_moe_call_site_id.restype = ctypes.c_void_p
    library.jax_nvfp4_moe_call_site_info.restype = ctypes.c_void_p
    return library


def register_module(name: str, path: Path, *, tvm_ffi: Path, cubins: Path | None = None) -> None:
    """Registers a module under the name that calls use. The first call opens it.

    Args:
        name: the module's name; exports contain it, so it should include the module's version.
        path: the module, a shared library that exports TVM-FFI functions.
        tvm_ffi: libtvm_ffi.so, of the `apache-tvm-ffi` package.
        cubins: the directory of the module's kernel images.

    Raises:
        OSError: the library was not built.
        ValueError: the name is registered already with other paths.
    """
    refusal = _open().jax_nvfp4_moe_register_module(*_encoded(name, path, tvm_ffi, cubins))
    if refusal is not None:
        raise ValueError(refusal.decode())


def _encoded(name: str, path: Path, tvm_ffi: Path, cubins: Path | None) -> list[bytes]:
    return [str(text or "").encode() for text in (name, path, tvm_ffi, cubins)]


def register_targets(platform: Literal["cuda"]) -> None:
    """Registers the target of calls with XLA. Further calls do nothing.

    Args:
        platform: "cuda", the one platform whose programs call modules.

    Raises:
        OSError: the library was not built.
        ValueError: another platform.
    """
    if platform != "cuda":
        raise ValueError(f"platform is {platform!r}; expected 'cuda'")
    library = _open()
    with _lock:
        if TARGET in _registered:
            return
        handlers = {
            "instantiate": library.jax_nvfp4_moe_instantiate,
            "initialize": library.jax_nvfp4_moe_initialize,
            "execute": library.jax_nvfp4_moe_execute,
        }
        ids = library.jax_nvfp4_moe_call_site_id(), library.jax_nvfp4_moe_call_site_info()
        _register_call(handlers, *ids, platform="CUDA")  # XLA's spelling; "cuda" is never found
        _registered.add(TARGET)


def _register_call(
    handlers: dict[str, Any], type_id: int, type_info: int, *, platform: str
) -> None:
    """Registers handlers of TARGET for a platform, and the type of their state."""
    state: Any = {"type_id": _capsule(type_id), "type_info": _capsule(type_info)}
    jax.ffi.register_ffi_type(_CALL_SITE, state, platform=platform)
    capsules = {stage: jax.ffi.pycapsule(handler) for stage, handler in handlers.items()}
    jax.ffi.register_ffi_target(TARGET, capsules, platform=platform)


def register_cpu_targets() -> None:
    """Registers the targets of the CPU implementation with XLA. Further calls do nothing.

    Raises:
        OSError: the library was not built.
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
                jax.ffi.register_ffi_target(target, capsule, platform="cpu")
                _registered.add(target)


@functools.cache
def cpu_levels() -> dict[str, bool]:
    """Returns the instruction sets that the CPU kernels are compiled for, the best first.

    Returns:
        For each name, whether this machine has the instructions.

    Raises:
        OSError: the library was not built.
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
