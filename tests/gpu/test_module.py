"""The tests' own module, as far as that can be seen without a GPU; and what XLA makes of calls."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jax_nvfp4_moe.bridge import library
from tests.aot import harness as aot

from .harness import HERE, PTX, reverse

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


@pytest.mark.aot
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("calls", "recorded"), [(8, True), (1, False)])
def test_xla_records_a_chain_of_calls(target, calls, recorded, tmp_path):
    """As compiled for a GPU that is not there: in a command buffer, with one workspace for all."""
    if (reason := aot.missing() or library.unavailable()) is not None:
        pytest.skip(reason)
    library.register_targets("cpu")  # beside which the other has to be sound
    library.register_targets("cuda")

    def chain(x):
        for _ in range(calls):
            x = reverse(x, workspace=1 << 20)
        return x

    sharding = jax.sharding.SingleDeviceSharding(aot._device(target))
    x = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=sharding)
    lowered = jax.jit(chain).trace(x).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    # One workspace, and the arrays between two calls.
    assert compiled.memory_analysis().temp_size_in_bytes < (1 << 20) + 4 * 4096
    thunks = "".join(path.read_text() for path in tmp_path.glob("*.thunk_sequence*.txt"))
    assert thunks.count("kCustomCall") >= calls
    assert ("kCommandBuffer" in thunks) == recorded
