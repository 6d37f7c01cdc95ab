"""The bridge's calls on the host, from a library that only the tests build.

The package registers its call target for CUDA alone. `register` registers it for the CPU too, with
handlers built from `host_call.cc` and the sources in `ffi/`. JAX programs on the CPU can then call
modules that need no GPU.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

from jax_nvfp4_moe.bridge import library

CPU, CUDA = 1, 2  # DLPack's kDLCPU and kDLCUDA
# More options of the compiler, such as "-fsanitize=address,undefined".
FLAGS_VARIABLE = "JAX_NVFP4_MOE_TEST_CXXFLAGS"

_FFI = Path(__file__).parents[2] / "ffi"
_SOURCES = (*sorted(_FFI.glob("*.cc")), Path(__file__).with_name("host_call.cc"))
# (argument's name, address, bytes) -> the address to present.
_ADDRESS = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
_kept = []  # what the library holds the address of


def missing():
    """Why the library cannot be built here, or None if it can."""
    if (reason := library.unavailable()) is not None:
        return f"needs the shared library: {reason}"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "needs the extra `test`: apache-tvm-ffi is not installed"
    return None if shutil.which("g++") else "needs a C++ compiler, g++"


def _include(package):
    return Path(importlib.util.find_spec(package).origin).parent / "include"


def _build():
    """The library's path: compiled as one file, once for all processes that have these sources."""
    sources = [path for path in _SOURCES if path.name != "call.cc"]  # the package's own handlers
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", f"-I{_FFI}"]
    flags += shlex.split(os.environ.get(FLAGS_VARIABLE, ""))
    for package in ("jaxlib", "tvm_ffi"):
        flags += ["-isystem", str(_include(package))]
    read = [*_FFI.glob("*.h"), *sources, Path(jax.__file__).with_name("version.py")]
    parts = [" ".join(flags).encode(), *(path.read_bytes() for path in sorted(read))]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"jax_nvfp4_moe-{os.getuid()}-{digest}" / "libhost_call.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            text = "".join(f'#include "{source}"\n' for source in sources)
            command = ["g++", *flags, "-x", "c++", "-", "-o", str(built), "-ldl"]
            subprocess.run(command, input=text, text=True, check=True)
            built.replace(path)
    return path


@functools.cache
def _open():
    opened = ctypes.CDLL(str(_build()))
    opened.host_register_module.argtypes = [ctypes.c_char_p] * 4
    opened.host_register_module.restype = ctypes.c_char_p
    opened.host_present_as.argtypes = [ctypes.c_int, ctypes.c_void_p, _ADDRESS]
    for name in ("host_call_site_id", "host_call_site_info"):
        getattr(opened, name).restype = ctypes.c_void_p
    return opened


@functools.cache
def register():
    """Registers the call target on the CPU, and from now on each module for it too; once."""
    opened = _open()
    # JAX's CPU backend breaks if a type is registered before the backend is made.
    jax.devices("cpu")
    handlers = {stage: getattr(opened, f"host_{stage}") for stage in ("instantiate", "execute")}
    ids = opened.host_call_site_id(), opened.host_call_site_info()
    library._register_call(handlers, *ids, platform="cpu")
    register_module = library.register_module

    @functools.wraps(register_module)
    def register_in_both(name, path, *, tvm_ffi, cubins=None):
        register_module(name, path, tvm_ffi=tvm_ffi, cubins=cubins)
        encoded = library._encoded(name, path, tvm_ffi, cubins)
        assert opened.host_register_module(*encoded) is None

    library.register_module = register_in_both


def present_host_as(device_type, stream=0, address=None):
    """Says where buffers are, on which stream, and what other addresses they have."""
    callback = _ADDRESS() if address is None else _ADDRESS(address)
    _open().host_present_as(device_type, stream, callback)
    _kept[:] = [callback]
