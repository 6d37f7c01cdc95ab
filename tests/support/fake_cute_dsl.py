"""An environment with stand-ins for CuTe-DSL and for FlashInfer's kernel classes, to build in.

They have the names that the real ones have (nvidia-cutlass-dsl 4.8.1, flashinfer-python 0.6.13 and
0.7.2.post1), as far as they are used, and compile a line of C++ for each kernel.
"""

from tests.support import fake_flashinfer
from tests.support.fake_flashinfer import link, write

# Before each class: what the later version's module imports; in it: options that one version has.
CLASSES = """{imports}
class BlockScaledContiguousGatherGroupedGemmKernel:
    def __init__(self, sf_vec_size, mma_tiler_mn, cluster_shape_mn, vectorized_f32, topk,
                 raster_along_m, enable_pdl, {first}):
        self.options = {{key: value for key, value in locals().items() if key != "self"}}

class Sm100BlockScaledContiguousGroupedGemmFinalizeFusionKernel:
    def __init__(self, sf_vec_size, mma_tiler_mn, cluster_shape_mn, raster_along_m, enable_pdl,
                 {second}):
        self.options = {{key: value for key, value in locals().items() if key != "self"}}
"""
VERSIONS = {
    "0.6.13": CLASSES.format(imports="", first="", second="use_blkred"),
    "0.7.2.post1": CLASSES.format(
        imports=(
            "from flashinfer.tllm_enums import ActivationType\n"
            "from flashinfer.quantization.quantization_cute_dsl_utils import fast\n"
            "from ..moe_utils import normalize\n"
        ),
        first=(
            "activation_type=3, swiglu_alpha=1.0, swiglu_beta=0.0, swiglu_limit=3e38, gated=True, "
            "use_a_per_token_scale=False"
        ),
        second="use_a_per_token_scale=False, use_fused_finalize=True",
    ),
}
# Of the later version, beside the others: its package does not have it.
W4A16 = """
from flashinfer.tllm_enums import DEFAULT_SWIGLU_ALPHA, DEFAULT_SWIGLU_BETA, DEFAULT_SWIGLU_LIMIT

class Sm100W4A16GroupedGemmKernel:
    def __init__(self, acc_dtype, use_2cta_instrs, mma_tiler_mnk, cluster_shape_mn, group_count,
                 activation_type, swiglu_alpha, swiglu_beta, swiglu_limit, situ_beta,
                 situ_linear_beta, use_fused_finalize, enable_pdl, use_clc_scheduler,
                 raster_along_m, transform_fragment_size, m_cluster_aligned):
        self.options = {key: value for key, value in locals().items() if key != "self"}
"""
# What they import, and packages that must not be run.
AROUND = {
    "tllm_enums": (
        "ActivationType = None\n"
        "DEFAULT_SWIGLU_ALPHA, DEFAULT_SWIGLU_BETA, DEFAULT_SWIGLU_LIMIT = 1.0, 0.0, 3e38"
    ),
    "quantization/quantization_cute_dsl_utils": "from ..cute_dsl.fp4_common import fast",
    "cute_dsl/fp4_common": "fast = None",
    "fused_moe/cute_dsl/moe_utils": "from ...jit.moe_utils import normalize",
    "jit/moe_utils": "normalize = None",
    **{
        f"{package}__init__": "raise ImportError('imported')"
        for package in (
            *("", "fused_moe/", "fused_moe/cute_dsl/"),
            *("cute_dsl/", "jit/", "quantization/"),
        )
    },
}
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
    def __init__(self, function, kernel, arguments, options):
        self.line = {
            "parameters": list(inspect.signature(function).parameters),
            "arguments": arguments,
            "options": options,
            **kernel.options,
        }

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
    launch = inspect.getclosurevars(function).nonlocals["launch"]
    kernel = inspect.getclosurevars(launch).nonlocals["kernel"]
    return Compiled(function, kernel, arguments, options)
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
            **{f"flashinfer/{name}": text for name, text in AROUND.items()},
            "flashinfer/fused_moe/cute_dsl/blackwell/__init__": "from .kernels import *",
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
        self.install_flashinfer("0.6.13")

    def install_flashinfer(self, version):
        """One of `VERSIONS`."""
        self.install("flashinfer-python", version)
        folder = self.package / "fused_moe" / "cute_dsl" / "blackwell"
        write(folder / "kernels.py", VERSIONS[version])
        if version != "0.6.13":
            write(folder / "moe_w4a16_kernel.py", W4A16)
