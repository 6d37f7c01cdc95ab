"""An environment with a stand-in for FlashInfer, to build in.

It is a virtual environment, so that it lacks what a test does not put there; its FlashInfer has the
names that the real one has (0.6.13, and of 0.7.2.post1 what is new) and compiles a few lines.
"""

import hashlib
import json
import shutil
import subprocess
import textwrap
import venv

NAME = "fused_moe_trtllm_sm100"

# What FlashInfer's own modules of these names have, as far as it is used. The switch FAKE says what
# compiling is to do; the file `journal` tells what was asked of it.
ENV = """
import os
from pathlib import Path
FLASHINFER_BASE_DIR = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", Path.home()))
_archs = os.environ["FLASHINFER_CUDA_ARCH_LIST"].replace(".", "").replace(" ", "_")
FLASHINFER_WORKSPACE_DIR = FLASHINFER_BASE_DIR / ".cache/flashinfer/1" / _archs
FLASHINFER_JIT_DIR = FLASHINFER_WORKSPACE_DIR / "cached_ops"
FLASHINFER_AOT_DIR = Path(__file__).parents[1] / "data/aot"
try:
    import flashinfer_cubin
    FLASHINFER_CUBIN_DIR = Path(flashinfer_cubin.__file__).parent / "cubins"
except ImportError:
    FLASHINFER_CUBIN_DIR = Path(os.environ["FLASHINFER_CUBIN_DIR"])
"""
FUSED_MOE = """
import json, os, signal, subprocess, sys
from pathlib import Path
from . import env

class Spec:
    name = "fused_moe_trtllm_sm100"
    jit_library_path = env.FLASHINFER_JIT_DIR / name / f"{name}.so"
    aot_path = env.FLASHINFER_AOT_DIR / name / f"{name}.so"
    is_aot = aot_path.exists()

    def build(self, verbose, need_lock):
        assert verbose and need_lock
        with Path(os.environ["FAKE_JOURNAL"]).open("a") as journal:
            names = ("FLASHINFER_CUDA_ARCH_LIST", "CUDA_HOME", "MAX_JOBS", "PATH")
            print(json.dumps({name: os.environ[name] for name in names}), file=journal)
        self.jit_library_path.parent.mkdir(parents=True, exist_ok=True)
        if os.environ.get("FAKE") == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        command = [sys.executable, Path(__file__).with_name("ninja.py"), self.jit_library_path]
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise RuntimeError("Ninja build failed.")

def gen_trtllm_gen_fused_moe_sm100_module():
    return Spec()
"""
# Like ninja in what it prints, and in what it does when it is told to end.
NINJA = """
import os, shlex, signal, subprocess, sys, time
from pathlib import Path

SOURCE = b'''
extern "C" {
int cudaGetDevice();
int __tvm_ffi_trtllm_fp4_block_scale_moe() { return cudaGetDevice(); }
int FlashInferSetCubinCallback() { return 0; }
int FlashInferSetCurrentCubin() { return 0; }
}
'''
library, fake = Path(sys.argv[1]), os.environ.get("FAKE")
if library.exists():
    sys.exit(print("ninja: no work to do."))
print(f"[1/2] c++ -c {'x' * 1000} source.cpp", flush=True)
if fake == "fail":
    print("FAILED: source.o", flush=True)
    print("source.cpp:1:1: error: no such thing", flush=True)
    sys.exit("ninja: build stopped: subcommand failed.")
if fake == "hang":
    library.write_bytes(b"half")
    compiler = subprocess.Popen(["sleep", "1000"], process_group=0)
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    new = library.with_name("new")
    new.write_text(f"{os.getppid()} {os.getpid()} {compiler.pid}")
    new.replace(library.with_name("pids"))
    while not told:
        time.sleep(0.1)
    compiler.kill()
    compiler.wait()
    time.sleep(1)  # which is waited for
    library.unlink()
    sys.exit(130)
flags = shlex.split(os.environ["FLASHINFER_EXTRA_LDFLAGS"])
command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-lcudart", "-lcuda", *flags]
subprocess.run([*command, "-o", str(library)], input=SOURCE, check=True)
print("[2/2] link", flush=True)
"""
LOADER = """
import hashlib, os
from .env import FLASHINFER_CUBIN_DIR

def get_artifact(name, sha256):
    file = FLASHINFER_CUBIN_DIR / name
    if not file.exists():
        if os.environ.get("FLASHINFER_NO_DOWNLOAD"):
            raise RuntimeError(f"Artifact not found locally: {name}")
        if os.environ.get("FAKE") == "offline":
            return b""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"image" if name.endswith(".cubin") else CHECKSUMS)
    data = file.read_bytes()
    return data if hashlib.sha256(data).hexdigest() == sha256 else b""
"""
IMAGES = [f"kernel{i}.cubin" for i in range(3)]
CHECKSUMS = "".join(f"{hashlib.sha256(b'image').hexdigest()}  {name}\n" for name in IMAGES)
ARTIFACTS = f"""
class ArtifactPath:
    TRTLLM_GEN_BMM = "abc/bmm"
class CheckSumHash:
    TRTLLM_GEN_BMM = "{hashlib.sha256(CHECKSUMS.encode()).hexdigest()}"
"""


def write(path, text, mode=0o644):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    path.chmod(mode)


class Environment:
    """An environment to build in, and what is asked of it."""

    def __init__(self, root):
        self.root = root
        venv.create(root / "venv")
        self.python = root / "venv" / "bin" / "python"
        (self.site,) = (root / "venv" / "lib").glob("python*/site-packages")
        self.journal = root / "journal"
        self.cache = root / "cache"
        self.home = root / "home"
        self.toolkit = root / "cuda"
        self.cubins = self.site / "flashinfer_cubin" / "cubins" / "abc" / "bmm"
        for name in ("torch", "apache-tvm-ffi"):
            self.install(name, "0.1.9" if name == "apache-tvm-ffi" else "2.13.0")
        self.install("flashinfer-python", "0.6.13")
        package = self.site / "flashinfer"
        for name, text in {
            "__init__": "",
            "artifacts": ARTIFACTS,
            "jit/__init__": "",
            "jit/env": ENV,
            "jit/fused_moe": FUSED_MOE,
            "jit/ninja": NINJA,
            "jit/cubin_loader": LOADER + f"CHECKSUMS = {CHECKSUMS.encode()!r}",
        }.items():
            write(package / f"{name}.py", text)
        write(self.site / "tvm_ffi" / "__init__.py", "raise ImportError('imported')")
        write(self.site / "tvm_ffi" / "lib" / "libtvm_ffi.so", "")
        self.install_cubins("0.6.13")
        self.make_toolkit()

    def install(self, name, version):
        for old in self.site.glob(f"{name.replace('-', '_')}-*.dist-info"):
            shutil.rmtree(old)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        write(self.site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA", text)

    def install_cubins(self, version):
        self.install("flashinfer-cubin", version)
        write(self.site / "flashinfer_cubin" / "__init__.py", "")
        write(self.cubins / "checksums.txt", CHECKSUMS)
        for name in IMAGES:
            write(self.cubins / name, "image")

    def remove(self, name, package):
        for each in (*self.site.glob(f"{name.replace('-', '_')}-*"), self.site / package):
            shutil.rmtree(each, ignore_errors=True)

    def make_toolkit(self):
        """As PyPI's wheels make one: the runtime in lib, under its full name alone."""
        nvcc = "#!/bin/sh\necho Cuda compilation tools, release 13.4, V13.4.92\n"
        write(self.toolkit / "bin" / "nvcc", nvcc, 0o755)
        for name in ("cuda_runtime", "nvrtc", "cublas_v2", "curand"):
            write(self.toolkit / "include" / f"{name}.h", "")
        (self.toolkit / "lib").mkdir()
        runtime = self.toolkit / "lib" / "libcudart.so.13"
        source = 'extern "C" int cudaGetDevice() { return 0; }'
        link(runtime, "-Wl,-soname,libcudart.so.13", source=source)

    def asked(self):
        """What compiling was started with, once for each time."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else ()
        return [json.loads(line) for line in lines]


def link(path, *flags, source=""):
    """Links a library of a few lines of C++."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-x", "none", *flags, "-o", str(path)]
    subprocess.run(command, input=source.encode(), check=True)


def compile_ahead(path, *, without=None):
    """A module as FlashInfer would have compiled it, at `path`."""
    names = ["__tvm_ffi_trtllm_fp4_block_scale_moe"]
    names += ["FlashInferSetCubinCallback", "FlashInferSetCurrentCubin"]
    source = "".join(f'extern "C" int {name}() {{ return 1; }}' for name in names)
    driver = path.with_name("libcuda.so")
    link(driver, "-Wl,-soname,libcuda.so.1")
    flags = () if without == "libcuda.so.1" else ("-Wl,--no-as-needed", str(driver))
    link(path, *flags, source=source.replace(str(without), "other"))
    driver.unlink()
