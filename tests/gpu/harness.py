"""A module of functions that launch CUDA kernels, built here; and calls of them.

On a GPU the module is linked to the runtime and the driver that JAX uses. Elsewhere it contains
`host_cuda.cc`, which runs the same kernels on the host: that tries the tests and the bridge, not
the GPU.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_nvfp4_moe.bridge.call import Output, call

HERE = Path(__file__).parent
MODULE = "gpu_tests"
PTX = HERE / "kernels.ptx"
ALIGNMENT = 256  # of tensors in the workspace


class Counts(NamedTuple):
    """What the module did so far.

    Attributes:
        calls: of its functions, for XLA or to load kernels.
        captured: those of them on a stream that was being recorded.
        launches: of kernels, recorded or not.
        loads: of the image of its kernels.
    """

    calls: int
    captured: int
    launches: int
    loads: int

    def __sub__(self, earlier):
        return Counts(*(a - b for a, b in zip(self, earlier, strict=True)))


class Module:
    """The module, and where its kernels run: "cuda" or "host"."""

    def __init__(self, path, place):
        self.path, self.place = path, place
        self._library = ctypes.CDLL(str(path))

    def counts(self):
        counts = (ctypes.c_int64 * len(Counts._fields))()
        self._library.take_counts(counts)
        return Counts(*counts)


def no_gpu():
    """Why nothing can run on a GPU here, or None if it can."""
    device = jax.devices()[0]
    if device.platform == "gpu" and "cuda" in device.client.platform_version.lower():
        return None
    return f"needs a CUDA GPU and JAX_PLATFORMS=cuda; JAX runs on {device.device_kind} here"


def mapped(name):
    """The files with this in their name that are mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line}
    return sorted(path for path in paths if name in path.name)


def cuda_libraries():
    """The CUDA runtime and the driver that JAX loaded."""
    jax.devices()
    found = [mapped(name) for name in ("libcudart.so", "libcuda.so")]
    if not all(found):
        raise RuntimeError(f"JAX loaded no CUDA runtime or no driver: {found}")
    return [paths[-1] for paths in found]  # the latest, where there are several


def build(place, folder, tvm_ffi):
    """Builds the module in a folder; `tvm_ffi` is that package's folder."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    includes = [f"-Wa,-I,{HERE}", "-isystem", tvm_ffi / "include"]
    if place == "cuda":
        libraries = cuda_libraries()
        cuda = [*libraries, *(f"-Wl,-rpath,{library.parent}" for library in libraries)]
    else:
        # Bound at link time, since a global symbol takes precedence over a module's own: to compile
        # a Mosaic GPU kernel, JAX's CUDA plugin loads libmosaic_gpu_runtime.so globally, which
        # exports the driver's names (jax-cuda13-plugin@0.10.2).
        cuda = [HERE / "host_cuda.cc", "-Wl,-Bsymbolic"]
    path = folder / "libgpu_tests.so"
    command = [shutil.which("g++"), *flags, *includes, HERE / "functions.cc", *cuda, "-ldl"]
    subprocess.run([*command, "-o", path], check=True)
    return Module(path, place)


# ---------------------------------------------------------------- functions, and what they compute


def axpb(x, *, bias=None, negate=False, factor=1.0, steps=0, offsets=()):
    arguments = {
        "x": x,
        "bias": bias,
        "negate": negate,
        "factor": factor,
        "steps": steps,
        "offsets": offsets,
        "y": Output(x.shape, jnp.float32),
    }
    (y,) = call(MODULE, "axpb", arguments, workspace=0)
    return y


def axpb_in_numpy(x, *, bias=None, negate=False, factor=1.0, steps=0, offsets=()):
    factor = np.float32(-factor if negate else factor)
    return factor * x + np.float32(steps + sum(offsets)) + np.float32(0 if bias is None else bias)


def silu_and_mul(x):
    y = Output((x.shape[0], x.shape[1] // 2), jnp.float32)
    (y,) = call(MODULE, "silu_and_mul", {"x": x, "y": y}, workspace=0)
    return y


def silu_and_mul_in_numpy(x):
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def reverse(x, *, cycles=0, workspace=None):
    """x + 1 backwards; the workspace holds the temporary exactly, if no other size is given."""
    arguments = {"x": x, "cycles": cycles, "y": Output(x.shape, jnp.float32)}
    workspace = 4 * x.size if workspace is None else workspace
    (y,) = call(MODULE, "reverse", arguments, workspace=workspace)
    return y


def reverse_in_numpy(x):
    return (x + np.float32(1)).reshape(-1)[::-1].reshape(x.shape)
