"""An environment with stand-ins for CuTe-DSL and for FlashInfer's kernel classes, to build in.

They have the names that the real ones have (nvidia-cutlass-dsl 4.8.1, flashinfer-python 0.6.13), as
far as they are used, and compile a line of C++ for each kernel.
"""

from tests.bridge import fake_flashinfer
from tests.bridge.fake_flashinfer import link, write

CLASSES = """
class Kernel:
    def __init__(self, **options):
        self.options = options

BlockScaledContiguousGatherGroupedGemmKernel = Kernel
Sm100BlockScaledContiguousGroupedGemmFinalizeFusionKernel = Kernel
"""
TYPES = """
BFloat16, Float4E2M1FN, Float8E4M3FN, Float32, Int32, Int64, Uint8 = (
    "bfloat16", "e2m1", "e4m3", "float32", "int32", "int64", "uint8"
)
"""
# The switch FAKE says what the second kernel's compilation is to do; the file `journal` tells what
# was compiled.
CUTE = """
import inspect, json, os, re, signal, subprocess, time
from pathlib import Path

class Tensor:
    pass

def jit(function):
    return function

def sym_int64(*, divisibility, symbol):
    return f"{symbol}/{divisibility}"

class Compiled:
    def __init__(self, kernel, arguments, options):
        self.line = {"options": options, "arguments": arguments, **kernel.options}

    def export_to_c(self, path, name):
        journal = Path(os.environ["FAKE_JOURNAL"])
        second = journal.exists() and len(journal.read_text().splitlines()) == 1
        fake = os.environ.get("FAKE") if second else None
        if fake == "fail":
            raise RuntimeError("no such arch")
        if fake == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fake == "hang":
            Path(path).write_bytes(b"half")
            journal.with_name("pid").write_text(str(os.getpid()))
            time.sleep(1000)
        with journal.open("a") as file:
            print(json.dumps({"name": name, **self.line}), file=file)
        folder = re.search(r"--dump-dir=(\\S+)", self.line["options"])[1]
        Path(folder, "kernel.ptx").write_text("tcgen05.mma")
        source = f'extern "C" int cute(); extern "C" int __tvm_ffi_{name}() {{ return cute(); }}'
        command = ["g++", "-c", "-fPIC", "-x", "c++", "-", "-o", path]
        subprocess.run(command, input=source.encode(), check=True)

def compile(function, *arguments, options):
    kernel = inspect.getclosurevars(function).nonlocals["kernel"]
    return Compiled(kernel, arguments, options)
"""
CUTE_RUNTIME = """
def make_fake_compact_tensor(dtype, shape, *, stride_order, assumed_align):
    assert stride_order == tuple(range(len(shape)))[::-1]
    return [dtype, shape, assumed_align]
"""
RUNTIME = """
from pathlib import Path

def make_fake_stream(*, use_tvm_ffi_env_stream):
    assert use_tvm_ffi_env_stream
    return "stream"

def find_runtime_libraries(*, enable_tvm_ffi):
    folder = Path(__file__).parents[1] / "nvidia_cutlass_dsl" / "cu13" / "lib"
    return [str(folder / "libcute_dsl_runtime.so")]
"""


class Environment(fake_flashinfer.Environment):
    """An environment to build in, and what was compiled in it."""

    def __init__(self, root):
        super().__init__(root)
        self.install("nvidia-cutlass-dsl", "4.8.1")
        self.package = self.site / "flashinfer"
        for name, text in {
            "flashinfer/__init__": "raise ImportError('imported')",
            "flashinfer/fused_moe/cute_dsl/blackwell/__init__": "from .kernels import *",
            "flashinfer/fused_moe/cute_dsl/blackwell/kernels": CLASSES,
            "cutlass/__init__": TYPES,
            "cutlass/runtime": RUNTIME,
            "cutlass/cute/__init__": CUTE,
            "cutlass/cute/runtime": CUTE_RUNTIME,
            "cuda/bindings/driver": "CUstream = object",
        }.items():
            write(self.site / f"{name}.py", text)
        self.runtime = self.site / "nvidia_cutlass_dsl" / "cu13" / "lib" / "libcute_dsl_runtime.so"
        for library in (self.runtime, self.site / "tvm_ffi" / "lib" / "libtvm_ffi.so"):
            source = 'extern "C" int cute() { return 5; }'
            link(library, f"-Wl,-soname,{library.name}", source=source)
