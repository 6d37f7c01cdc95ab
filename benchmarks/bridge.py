"""Times a call through the bridge on the host, beside a custom call that does nothing.

    python -m benchmarks bridge --output benchmarks/results/bridge.jsonl

It runs two chains of calls on the CPU, with as many arguments as FlashInfer's function has: of a
handler that does nothing, and through the bridge of a function that does nothing. Each chain is
one jitted `lax.scan`, in which a call's result is the next one's operand. The chains take turns. A
figure is a chain's time divided by its calls: the median, the smallest and the largest of the
turns. It needs g++ and the extra `test`.
"""

import argparse
import ctypes
import importlib.util
import json
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, results
from jax_nvfp4_moe.bridge import library
from jax_nvfp4_moe.bridge.call import Output, call

ROOT = Path(__file__).parent.parent
OPERANDS, PLAIN = 16, 20  # tensors, and numbers or None, of 36 arguments
CALLS, TURNS = 2000, 25


def build(folder):
    """The bare handler, and the module and the host's calls of the bridge's tests."""
    from tests.support import host

    tvm_ffi = Path(importlib.util.find_spec("tvm_ffi").origin).parent
    flags = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", f"-I{folder}"]
    (folder / "gemms.inc").touch()  # names of functions that the fake module has for its tests
    headers = Path(importlib.util.find_spec("jaxlib").origin).parent / "include"
    bare, fake = folder / "libbare.so", folder / "libfake.so"
    for output, source, include in (
        (bare, ROOT / "benchmarks/bare_call.cc", headers),
        (fake, ROOT / "tests/support/fake_module.cc", tvm_ffi / "include"),
    ):
        command = [*flags, "-isystem", str(include), "-o", str(output), str(source), "-ldl"]
        subprocess.run(command, check=True)
    host.register()
    library.register_module("fake", fake, tvm_ffi=tvm_ffi / "lib/libtvm_ffi.so")
    handler = jax.ffi.pycapsule(ctypes.CDLL(str(bare)).bare_call)
    jax.ffi.register_ffi_target("bare_call", handler, platform="cpu")


def bare_call(x):
    result = jax.ShapeDtypeStruct((8,), jnp.float32)
    workspace = jax.ShapeDtypeStruct((1024,), jnp.uint8)
    return jax.ffi.ffi_call("bare_call", (result, workspace))(*[x] * OPERANDS)[0]


def bridge(x):
    arguments = {f"operand_{i}": x for i in range(OPERANDS)}
    arguments |= {f"plain_{i}": None if i % 2 else i for i in range(PLAIN - 1)}
    arguments |= {"config": (-1, -1), "output": Output((8,), jnp.float32)}
    return call("fake", "nothing", arguments, workspace=1024)[0]


def chain(function):
    # Were its operand the same each time, XLA would make the call once.
    return jax.jit(lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, None, CALLS)[0])


def main(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks bridge", description=__doc__.split("\n")[0]
    )
    results.add_output(parser)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        programs = {each.__name__: chain(each) for each in (bare_call, bridge)}
        x = jnp.zeros(8)
        times = {name: [] for name in programs}
        for turn in range(TURNS + 1):
            for name, program in programs.items():
                begin = time.perf_counter()
                jax.block_until_ready(program(x))
                if turn:  # the first one compiles
                    times[name].append(1e6 * (time.perf_counter() - begin) / CALLS)
    lines = [{"command": results.command_line("bridge", arguments), **machine.describe()}]
    for name, each in times.items():
        low, middle, high = (round(float(f(each)), 3) for f in (np.min, np.median, np.max))
        sizes = {"operands": OPERANDS, "calls": CALLS, "turns": TURNS}
        line = {"call": name, **sizes, "median_us": middle, "min_us": low, "max_us": high}
        lines.append(line)
    print("\n".join(map(json.dumps, lines)))
    if args.output:
        results.write(args.output, lines)
