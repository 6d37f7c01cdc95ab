"""What the CuTe-DSL kernels' functions refuse from inside `jax.jit`, and what the stand-in does.

`python -m tests.recording_cuda.cute_dsl_refused NAME` runs one check; test_cute_dsl_from_jit.py
runs them all.
"""

import ctypes  # noqa: I001  cute_dsl_from_jit is before JAX
import struct
from functools import partial
from typing import Any

from .cute_dsl_from_jit import MODULE, STREAM, functions, main, manifest, run, runtime

import jax
import jax.numpy as jnp

from jax_nvfp4_moe.bridge.call import Output
from jax_nvfp4_moe.bridge.call import call as bridge_call
from jax_nvfp4_moe.bridge.cute_dsl import Tactic
from jax_nvfp4_moe.implementations.cute_dsl.call import run_routed
from tests.support.host import CPU, CUDA, present_host_as

from .cases import Case


def second(**changes: Any) -> dict[str, Any]:
    """Arguments of the default tactic's second GEMM, of 8 tokens, 2 of 4 experts each."""
    tokens, top_k, experts, hidden, intermediate, tiles = 8, 2, 4, 512, 256, 4
    rows = 128 * tiles
    shapes = {
        "a": ((rows, intermediate // 2), jnp.uint8),
        "w2": ((experts, hidden, intermediate // 2), jnp.uint8),
        "a_scale": ((rows, intermediate // 16), jnp.float8_e4m3fn),
        "w2_scale": ((experts, hidden, intermediate // 16), jnp.float8_e4m3fn),
        "alpha": ((experts,), jnp.float32),
        "tile_idx_to_expert_idx": ((tiles,), jnp.int32),
        "tile_idx_to_mn_limit": ((tiles,), jnp.int32),
        "permuted_idx_to_expanded_idx": ((rows,), jnp.int32),
        "num_non_exiting_tiles": ((1,), jnp.int32),
        "token_final_scales": ((tokens, top_k), jnp.float32),
    }
    values = {name: jnp.zeros(*spec) for name, spec in (shapes | changes).items()}
    return values | {"output": Output((tokens, hidden), jnp.bfloat16)}


def check_arguments() -> None:
    """What does not fit is refused before anything is launched."""
    function = functions(Tactic()).names[1]
    f32, i32, f8 = jnp.float32, jnp.int32, jnp.float8_e4m3fn
    present_host_as(CUDA, STREAM)

    def called(function: str, arguments: dict[str, Any]) -> str:
        runtime.clear()
        try:
            jax.block_until_ready(
                jax.jit(lambda: bridge_call(MODULE, function, arguments, workspace=0))()
            )
        except jax.errors.JaxRuntimeError as error:
            assert not [e for e in runtime.entries() if e["call"] == "launch"], error
            return str(error)
        return ""

    lacks = dict(second())
    del lacks["alpha"]
    for arguments, words in (
        (second(alpha=((4,), i32)), ("Mismatched Tensor on argument #4", "expected dtype=float32")),
        (second(alpha=((5,), f32)), ("Mismatched alpha.shape[0]",)),
        (second(w2=((4, 512, 64), jnp.uint8)), ("Mismatched w2.shape[2]",)),
        (second(a_scale=((512, 8), f8)), ("Mismatched w2_scale.shape[2]",)),
        (second(num_non_exiting_tiles=((2,), i32)), ("Mismatched num_non_exiting_tiles.shape[0]",)),
        (second(token_final_scales=((8, 2, 1), f32)), ("argument #9", "expected ndim=2")),
        (second(token_final_scales=((9, 2), f32)), ("shape[0]",)),
        (lacks, ("TypeError: Expects 11 parameters",)),
    ):
        said = called(function, arguments)
        assert said.startswith(f"INVALID_ARGUMENT: {function}: "), said
        assert all(each in said for each in words), (words, said)
    absent = function.replace("t128", "t64")
    said = called(absent, second())
    assert said == f"FAILED_PRECONDITION: {absent}: module {MODULE} has no {absent}", said
    present_host_as(CPU)
    said = called(function, second())
    assert "dev" in said, said
    present_host_as(CUDA, STREAM, lambda name, data, size: (1 << 40) + (16 if name == b"a" else 0))
    said = called(function, second())
    assert "align" in said, said
    present_host_as(CUDA, STREAM)
    assert called(function, second()) == ""
    assert [e["call"] for e in runtime.entries()].count("launch") == 2


def check_driver() -> None:
    """The stand-in refuses what a driver would: so that what it lets pass means something."""
    program = partial(run_routed, functions(Tactic()), Case(4, 2, 4, 256, 64).call())
    arguments = Case(4, 2, 4, 256, 64, layout="cute_dsl").arguments()
    name = run(jax.jit(program), arguments).recording.launches[0].name.encode()
    contents = manifest.cute_dsl.module.read_bytes()
    image = contents[contents.index(b"\x50\xed\x55\xba") :]  # the first function's fat binary
    cuda, library_, kernel = runtime.library, ctypes.c_void_p(), ctypes.c_void_p()
    none = (None, None, 0)

    def load() -> int:
        return cuda.cudaLibraryLoadData(ctypes.byref(library_), image, *none, *none)

    for mode, status in ((0, 900), (1, 900), (2, 0)):  # global, thread-local, relaxed
        stream, graph = ctypes.c_void_p(STREAM), ctypes.c_void_p()
        assert cuda.cudaStreamBeginCapture(stream, mode) == 0
        assert load() == status, mode
        assert cuda.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert cuda.cudaLibraryGetKernel(ctypes.byref(kernel), library_, b"no such kernel") == 500
    assert cuda.cudaLibraryGetKernel(ctypes.byref(kernel), library_, name) == 0

    def launch(shared: int, cluster: int) -> int:
        attribute = struct.pack("<i4x3I52x", 4, cluster, 1, 1)
        kept = ctypes.create_string_buffer(attribute, len(attribute))
        config = struct.pack("<6IQQQI4x", 3, 1, 1, 384, 1, 1, shared, 0, ctypes.addressof(kept), 1)
        anything = ctypes.create_string_buffer(4096)
        parameters = (ctypes.c_void_p * 64)(*[ctypes.addressof(anything)] * 64)
        return cuda.cudaLaunchKernelExC(config, kernel, parameters)

    set_for = cuda.cudaKernelSetAttributeForDevice
    assert [launch(48 << 10, 1), launch((48 << 10) + 1, 1)] == [0, 1]
    assert [set_for(kernel, 8, 232449, 0), set_for(kernel, 8, 232448, 0)] == [1, 0]
    assert [launch(232448, 1), launch(232448, 3), launch(232448, 2)] == [0, 0, 912]
    assert cuda.cudaSetDevice(1) == 0
    assert launch(232448, 1) == 1
    assert cuda.cudaSetDevice(0) == 0
    assert cuda.cudaLibraryUnload(library_) == 0
    assert launch(0, 1) == 98


if __name__ == "__main__":
    main(globals())
