"""Describes the machine, and measures its peak read bandwidth and multiplication rate."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np

from benchmarks import measuring

PACKAGES = ("jax", "jaxlib", "numpy", "torch", "llama_cpp_python")
SIZES = (2048, 4096)  # of the matrices whose product is timed


def describe():
    """Returns the processor, and the versions of all packages involved."""
    import jax_nvfp4_moe

    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "cache_mb": cache_bytes() >> 20,
        "memory_gb": round(meminfo("MemTotal") / 1e9, 1),
        "python": platform.python_version(),
        "jax_nvfp4_moe": jax_nvfp4_moe.__version__,
        **_commit(),
        **{name: version for name in PACKAGES if (version := _version(name))},
    }


def cores():
    """Returns the number of cores that this process may use, which `taskset` limits."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_bytes():
    """The last level's; 32 MB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [int(text[:-1]) * units[text[-1]] for text in (p.read_text().strip() for p in sizes)]
    return max(found, default=32 << 20)


def meminfo(name):
    """A line of /proc/meminfo, in bytes."""
    return int(Path("/proc/meminfo").read_text().split(f"{name}:")[1].split()[0]) * 1024


class Neighbours:
    """How much of these cores others have used since it was made, as a share of them all.

    Threads that wait for each other by spinning, as ggml's, are slowed down tens of times when one
    of them has to share its core: times are worth nothing then, and unequally so.
    """

    def __init__(self, processes):
        self._ours = [os.getpid(), *processes]
        self._begin = self._now()

    def share(self):
        seconds, busy, ours = np.subtract(self._now(), self._begin)
        return float(max(0, busy - ours) / (seconds * cores()))

    def _now(self):
        """Seconds: of the clock, all cores' busy ones, and those of them that are ours."""
        of_core = {}
        for line in Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name.startswith("cpu") and name != "cpu":
                user, nice, system, _, _, *interrupts = map(int, fields[:8])
                of_core[int(name[3:])] = user + nice + system + sum(interrupts)
        busy = sum(of_core[core] for core in os.sched_getaffinity(0))
        ours = 0
        for process in self._ours:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            ours += int(fields[11]) + int(fields[12])  # user and system
        ticks = os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy / ticks, ours / ticks


def _cpu_model():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": done.stdout.strip()}


# ------------------------------------------------------------------------------------- limits


def limits():
    """The best of several: GB/s of a sum over 512 MB, GFLOP/s of matrix products of two types.

    The products are torch's, or where there is none, XLA's.
    """
    found = {"read_gb_s": round(read_bandwidth(), 1)}
    for dtype in ("float32", "bfloat16"):
        found[f"{dtype}_gflop_s"] = round(_matmul_rate(dtype), 1)
    return found


class MatrixProduct:
    """A product of bfloat16 matrices that takes turns with what is measured.

    A limit is the best that was ever seen. Where neighbours come and go, what the machine does in
    those turns is what a median is to be held against.
    """

    def __init__(self):
        self.size = max(SIZES)
        self.multiply = _product("bfloat16", self.size)
        self.multiply()  # compiles, where it is XLA's

    def traits(self):
        return {"flops": 2 * self.size**3}

    def burst(self, seconds):
        return measuring.burst(self._call, seconds)

    def _call(self):
        begin = time.perf_counter()
        self.multiply()
        return time.perf_counter() - begin


def read_bandwidth():
    import jax
    import jax.numpy as jnp

    array = jnp.ones((1 << 27,), jnp.float32)
    total = jax.jit(jnp.sum)
    return array.nbytes / best(lambda: total(array).block_until_ready(), 9) / 1e9


def _product(dtype, size):
    """A function that multiplies two matrices."""
    make = torch_product if importlib.util.find_spec("torch") else jax_product
    return make(dtype, size)


def torch_product(dtype, size):
    import torch

    torch.set_num_threads(cores())
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    return lambda: a @ b.T


def jax_product(dtype, size):
    import jax
    import jax.numpy as jnp

    a, b = jnp.asarray(np.random.default_rng(0).normal(size=(2, size, size)), dtype)
    multiply = jax.jit(lambda a, b: a @ b.T)
    return lambda: multiply(a, b).block_until_ready()


def _matmul_rate(dtype, seconds=3):
    """GFLOP/s at the best size, larger ones being left out where they would take longer."""
    rate = 0.0
    for size in SIZES:
        if rate and 4 * 2e-9 * size**3 / rate > seconds:
            break
        rate = max(rate, 2e-9 * size**3 / best(_product(dtype, size), 3))
    return rate


def best(function, calls):
    """The shortest of some calls, in seconds, after one that is not counted."""
    times = []
    for _ in range(calls + 1):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
