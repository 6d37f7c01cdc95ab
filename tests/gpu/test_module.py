"""The tests' own module, as far as that can be seen without a GPU."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import HERE, PTX

KERNELS = {"axpb", "reverse", "silu_and_mul", "idle"}


def ptxas():
    """NVIDIA's assembler, of the package nvidia-cuda-nvcc or the machine's own."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for path in sorted(Path(folder).glob("*/bin/ptxas")):
            return path
    return shutil.which("ptxas")


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_103"])
def test_the_kernels_assemble(arch, tmp_path):
    if (program := ptxas()) is None:
        pytest.skip("needs ptxas: pip install nvidia-cuda-nvcc")
    out = tmp_path / "kernels.cubin"
    subprocess.run([program, f"-arch={arch}", "-o", out, PTX], check=True)
    assert out.stat().st_size > 0


def test_the_driver_can_be_old():
    text = PTX.read_text()
    assert re.findall(r"^\.version (.*)", text, re.M) == ["6.0"]
    assert re.findall(r"^\.target (.*)", text, re.M) == ["sm_60"]


def test_kernels_are_those_of_their_source():
    """By name and number of parameters; host_cuda.cc runs the source, so the numbers are tested."""
    source = re.findall(r"__global__ void (\w+)\(([^)]*)\)", (HERE / "kernels.cu").read_text())
    entries = re.findall(r"\.entry (\w+)\(([^)]*)\)", PTX.read_text())
    assert {name for name, _ in entries} == KERNELS
    assert {(name, body.count(".param")) for name, body in entries} == {
        (name, body.count(",") + 1) for name, body in source
    }


# Loads a library globally that exports the driver's names, then calls the module.
INTERPOSED = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import jax.numpy as jnp
from pathlib import Path
from jax_nvfp4_moe.bridge import library
from tests.gpu import harness
from tests.support import host

host.register()
library.register_module(harness.MODULE, Path(sys.argv[2]), tvm_ffi=Path(sys.argv[3]))
host.present_host_as(host.CUDA, 1)
print(harness.axpb(jnp.arange(3.0), factor=2.0))
assert ctypes.CDLL(None).cuModuleLoadData() == 303
"""


@pytest.mark.parametrize("built", ["host"], indirect=True)
def test_global_symbols_do_not_replace_the_stand_in(built, tvm_ffi, tmp_path):
    names = re.findall(r"^EXPORTED int (cu\w+)", (HERE / "host_cuda.cc").read_text(), re.M)
    assert "cuModuleLoadData" in names
    other = tmp_path / "libother.so"
    source = "".join(f"int {name}() {{ return 303; }}\n" for name in names)
    command = [shutil.which("gcc"), "-shared", "-fPIC", "-x", "c", "-", "-o", other]
    subprocess.run(command, input=source.encode(), check=True)
    arguments = map(str, (other, built.path, tvm_ffi / "lib" / "libtvm_ffi.so"))
    done = subprocess.run(
        [sys.executable, "-c", INTERPOSED, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0. 2. 4.]\n"
