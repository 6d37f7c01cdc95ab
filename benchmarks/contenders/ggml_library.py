"""ggml's libraries, which the package llama-cpp-python has, through ctypes."""

import ctypes
import functools
import importlib.util
from pathlib import Path

from benchmarks.contenders.base import Unavailable

F32, I32, NVFP4 = 0, 26, 40  # of its enumeration of types

Pointer, Size = ctypes.c_void_p, ctypes.c_size_t
Int, Int64, Text = ctypes.c_int, ctypes.c_int64, ctypes.c_char_p


class InitParameters(ctypes.Structure):
    _fields_ = (("size", Size), ("buffer", Pointer), ("no_alloc", ctypes.c_bool))


SIGNATURES = {  # result, then arguments
    "version": (Text,),
    "type_name": (Text, Int),
    "init": (Pointer, InitParameters),
    "free": (None, Pointer),
    "get_data": (Pointer, Pointer),
    "nbytes": (Size, Pointer),
    "set_input": (None, Pointer),
    "set_output": (None, Pointer),
    "new_tensor_2d": (Pointer, Pointer, Int, Int64, Int64),
    "new_tensor_3d": (Pointer, Pointer, Int, Int64, Int64, Int64),
    "reshape_1d": (Pointer, Pointer, Pointer, Int64),
    "reshape_3d": (Pointer, Pointer, Pointer, Int64, Int64, Int64),
    "view_2d": (Pointer, Pointer, Pointer, Int64, Int64, Size, Size),
    "mul_mat_id": (Pointer, Pointer, Pointer, Pointer, Pointer),
    "get_rows": (Pointer, Pointer, Pointer, Pointer),
    "swiglu": (Pointer, Pointer, Pointer),
    "mul": (Pointer, Pointer, Pointer, Pointer),
    "add": (Pointer, Pointer, Pointer, Pointer),
    "new_graph": (Pointer, Pointer),
    "build_forward_expand": (None, Pointer, Pointer),
    "gallocr_new": (Pointer, Pointer),
    "gallocr_alloc_graph": (ctypes.c_bool, Pointer, Pointer),
    "gallocr_free": (None, Pointer),
    "backend_alloc_ctx_tensors": (Pointer, Pointer, Pointer),
    "backend_cpu_buffer_type": (Pointer,),
    "backend_cpu_init": (Pointer,),
    "backend_cpu_set_n_threads": (None, Pointer, Int),
    "backend_graph_compute": (Int, Pointer, Pointer),
}
EXTENSIONS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("neon", "dotprod", "matmul_int8", "sve"),
)


class Library:
    """ggml's functions, without their prefix."""

    def __init__(self, base, cpu):
        for name, (result, *arguments) in SIGNATURES.items():
            home = base if hasattr(base, f"ggml_{name}") else cpu
            function = getattr(home, f"ggml_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        if self.type_name(NVFP4) != b"nvfp4":
            raise Unavailable(f"ggml {self.version().decode()} has no NVFP4")
        self.extensions = [e for e in EXTENSIONS if getattr(cpu, f"ggml_cpu_has_{e}")()]

    def context(self):
        """For tensors and graphs; their data is kept elsewhere."""
        return self.init(InitParameters(1 << 22, None, True))

    def bytes_of(self, tensor):
        """A tensor's data, to be read and written through numpy.frombuffer."""
        return (ctypes.c_uint8 * self.nbytes(tensor)).from_address(self.get_data(tensor))


@functools.cache
def library():
    """Raises Unavailable where there is none, or it is too old."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        raise Unavailable("llama-cpp-python, which has ggml, is not installed")
    folder = Path(found.submodule_search_locations[0]) / "lib"
    base, cpu = (_one_of(folder, f"*ggml-{part}.*") for part in ("base", "cpu"))
    loaded = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in (base, cpu)]
    try:
        return Library(*loaded)
    except AttributeError as error:
        raise Unavailable(f"this ggml is another than 0.25: {error}") from None


def _one_of(folder, pattern):
    found = [path for path in sorted(folder.glob(pattern)) if path.suffix in (".so", ".dylib")]
    if not found:
        raise Unavailable(f"{folder} has no {pattern}")
    return found[0]
