"""Calls from inside jit: what a function is called with, in whose memory, and how it fails."""

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_nvfp4_moe.bridge import library
from jax_nvfp4_moe.bridge.call import Output, call
from jax_nvfp4_moe.bridge.program import Operand, Result, encode
from tests.support.host import CUDA, present_host_as

ONE = Output((1,), jnp.int32)


def run(function, arguments, workspace=0, module="fake"):
    return now(jax.jit(lambda: call(module, function, arguments, workspace=workspace)))


def now(program, *arguments):
    """Calls it and waits: JAX may return before it has run, on the CPU too."""
    return jax.block_until_ready(program(*arguments))


def scaled(x, scale):
    (y,) = call(
        "fake", "scale", {"x": x, "scale": scale, "y": Output(x.shape, x.dtype)}, workspace=0
    )
    return y


# ------------------------------------------------------------------------------------- arguments


def test_all_kinds_of_arguments(fake):
    @jax.jit
    def program(x, scales):
        arguments = {
            "mode": 1,
            "nothing": None,
            "x": x,
            "scales": scales,
            "flag": True,
            "factor": 2.5,
            "config": (-1, -1),
            "empty": (),
            "y": Output((3,), jnp.bfloat16),
            "large": 2**40,
            "negative": -7,
            "off": False,
        }
        return call("fake", "show", arguments, workspace=16)

    (y,) = now(program, jnp.zeros((2, 5), jnp.uint8), jnp.zeros((4,), jnp.float8_e4m3fn))
    assert y.shape == (3,)
    assert y.dtype == jnp.bfloat16
    assert fake.journal() == [
        "int 1",
        "None",
        "tensor 1/8/1 [2 5 ] strides [5 1 ] device 1:0",
        "tensor 10/8/1 [4 ] strides [1 ] device 1:0",
        "bool true",
        "float 2.5",
        "list (int -1) (int -1)",
        "list",
        "tensor 4/16/1 [3 ] strides [1 ] device 1:0",
        "int 1099511627776",
        "int -7",
        "bool false",
    ]


DTYPES = {
    "bool": "6/8/1", "int8": "0/8/1", "int16": "0/16/1", "int32": "0/32/1", "uint8": "1/8/1",
    "uint16": "1/16/1", "uint32": "1/32/1", "float16": "2/16/1", "float32": "2/32/1",
    "bfloat16": "4/16/1", "float8_e4m3fn": "10/8/1", "float8_e5m2": "12/8/1",
    "float8_e8m0fnu": "14/8/1", "float4_e2m1fn": "17/4/1",
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(fake, dtype):
    x = jnp.zeros((2, 4), dtype)
    run("show", {"x": x, "y": ONE})
    assert fake.journal()[0] == f"tensor {DTYPES[dtype]} [2 4 ] strides [4 1 ] device 1:0"


def test_a_dtype_that_dlpack_lacks(fake):
    x = jnp.zeros((2, 4), jnp.float8_e4m3b11fnuz)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: show: x has XLA's data type"
    ):
        run("show", {"x": x, "y": ONE})


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 2, 3, 4, 5, 6, 7)])
def test_shapes(fake, shape):
    run("show", {"x": jnp.zeros(shape), "y": ONE})
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    shown = [" ".join([*map(str, row), ""]) for row in (shape, strides)]
    assert fake.journal()[0] == f"tensor 2/32/1 [{shown[0]}] strides [{shown[1]}] device 1:0"


def test_the_numbers_themselves(fake, rng):
    x = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
    np.testing.assert_array_equal(jax.jit(scaled, static_argnums=1)(x, 2.0), 2 * np.asarray(x))
    np.testing.assert_array_equal(scaled(x, 0.5), np.asarray(x) / 2)  # without jit


@pytest.mark.parametrize("value", [0.1, -0.0, 1e300, 5e-324, float("inf")])
def test_floats_are_kept_to_the_bit(fake, value):
    run("show", {"value": value, "y": ONE})
    assert fake.journal()[0] == f"float {value:.17g}"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("text", TypeError, "config is a str, which a program cannot hold"),
        (np.int64(3), TypeError, "config is a int64, which a program cannot hold"),
        ([1, 2], TypeError, "config is a list, which a program cannot hold"),
    ],
)
def test_what_a_program_cannot_hold(value, error, message):
    with pytest.raises(error, match=message):
        encode({"config": value})


@pytest.mark.parametrize("name", ["", "a,b"])
def test_what_a_name_cannot_be(name):
    with pytest.raises(ValueError, match="is no parameter's name"):
        encode({name: 1})


# ------------------------------------------------------------------- programs that are not right


def attributes(**changes):
    values = {"x": Operand(0), "y": Result(0)}
    return {"module": "fake", "function": "show", **encode(values), **changes}


def made(attributes):
    types = [jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((16,), jnp.uint8)]
    return jax.jit(lambda x: jax.ffi.ffi_call(library.TARGET, types)(x, **attributes))


def words(*numbers):
    return np.array(numbers, np.int64)


def test_control_a_program_that_is_right(fake):
    now(made(attributes()), jnp.zeros(3))
    assert len(fake.journal()) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"program": words(1, 0)}, "program: there is nothing for argument y"),
        ({"program": words(1, 0, 2, 0, 0)}, "program: there is more than its 2 names account for"),
        ({"program": words(1, 0, 2)}, "program: it ends within an argument"),
        ({"program": words(1, -1, 2, 0)}, "program: -1 is no index or length"),
        ({"program": words(1, 0, 6, 3, 1, 2)}, "program: it ends within an argument"),
        ({"program": words(1, 0, 99, 0)}, "argument y has the opcode 99, which this version"),
        ({"program": np.array([1, 0], np.int32)}, "show: attribute program: .*expected S64"),
        ({"surplus": 1}, "the call has 5 attributes; this version of libjax_nvfp4_moe knows 4"),
    ],
)
def test_attributes_that_do_not_compile(fake, changes, message):
    lowered = made(attributes(**changes)).lower(jnp.zeros(3))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT: .*{message}"):
        lowered.compile()
    assert fake.journal() == []


def test_an_attribute_is_missing(fake):
    less = attributes()
    del less["function"]
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT: .*attribute function"):
        made(less).lower(jnp.zeros(3)).compile()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (words(1, 1, 2, 0), "x is operand 1 of the call, which has 1"),
        (words(1, 0, 2, 1), "y is result 1 of the call, which has 1 beside the workspace"),
    ],
)
def test_indices_that_are_not_there(fake, program, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT: show: {message}"):
        now(made(attributes(program=program)), jnp.zeros(3))
    assert fake.journal() == []


def test_a_call_without_results(fake):
    target = jax.ffi.ffi_call(library.TARGET, (), has_side_effect=True)
    program = encode({"x": Operand(0)})
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="has no results; the last one has to be the workspace"
    ):
        now(jax.jit(lambda x: target(x, module="fake", function="show", **program)), jnp.zeros(3))


def test_modules_and_functions_that_are_not_there(fake, built, tvm_ffi):
    failed = "FAILED_PRECONDITION: "
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{failed}show: module no is not reg"):
        run("show", {"y": ONE}, module="no")
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{failed}no: module fake has no no"):
        run("no", {"y": ONE})
    runtime = tvm_ffi / "lib" / "libtvm_ffi.so"
    library.register_module("gone", built.with_name("gone.so"), tvm_ffi=runtime)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"{failed}show: module gone: .*gone\.so"):
        run("show", {"y": ONE}, module="gone")
    library.register_module("other", built, tvm_ffi=built)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"libtvm_ffi is open from .* already"):
        run("show", {"y": ONE}, module="other")
    with pytest.raises(ValueError, match="module fake is registered already, with"):
        library.register_module("fake", built, tvm_ffi=runtime)


# ------------------------------------------------------------------------------------- workspace


def allocated(sizes, workspace, *, returned=False, kept=False):
    arguments = {
        "sizes": sizes,
        "y": Output((len(sizes),), "int64"),
        "returned": returned,
        "kept": kept,
    }
    with jax.enable_x64(True):
        (y,) = run("allocate", arguments, workspace)
    return y.tolist()


def test_tensors_lie_one_after_the_other(fake):
    assert allocated((5, 300, 256, 0, 1), 1025) == [0, 256, 768, 1024, 1024]
    assert fake.journal()[1] == "tensor 1/8/1 [300 ] strides [1 ] device 1:0"


@pytest.mark.parametrize(("sizes", "needed"), [((256, 1), 257), ((1,), 1), ((100, 200, 300), 812)])
def test_the_workspace_is_exactly_enough(fake, sizes, needed):
    allocated(sizes, needed)
    message = (
        "RESOURCE_EXHAUSTED: allocate: MemoryError: .*"
        f"the workspace has {needed - 1} bytes, and at least {needed} are needed"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        allocated(sizes, needed - 1)
    allocated(sizes, needed)  # and nothing is left of the failure


def allocated_one(shape, bits, workspace):
    run("allocate_one", {"shape": shape, "bits": bits, "y": ONE}, workspace)


def test_control_a_tensor_that_fills_the_workspace(fake):
    allocated_one((2**3, 2**6), 64, 4096)
    assert fake.journal() == ["tensor 1/64/1 [8 64 ] strides [64 1 ] device 1:0"]


@pytest.mark.parametrize(
    ("shape", "bits", "message"),
    [
        # 2**61 elements of 64 bits are 2**67 bits, which are 0 modulo 2**64.
        ((2**61,), 64, r"ValueError: .*a size overflows 64 bits: 2305843009213693952 \* 64"),
        ((2**61,), 8, r"ValueError: .*a size overflows 64 bits: 2305843009213693952 \* 8"),
        ((2**32, 2**32), 8, r"ValueError: .*a size overflows 64 bits: 4294967296 \* 4294967296"),
        ((0, 2**40, 2**40), 8, r"ValueError: .*a size overflows 64 bits"),  # its strides do
        ((2**59,), 8, "RESOURCE_EXHAUSTED: .*4096 bytes, and at least 576460752303423488 are"),
        ((-1,), 8, r"ValueError: .*a tensor of shape \[-1\] .* negative dimension"),
        ((-(2**61), 8), 64, r"ValueError: .*shape \[-2305843009213693952, 8\] .* negative"),
    ],
)
def test_sizes_that_no_workspace_has(fake, shape, bits, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        allocated_one(shape, bits, 4096)
    assert fake.journal() == []
    allocated_one((4096,), 8, 4096)  # and nothing is left of the failure


def test_the_workspace_is_used_again(fake):
    """Each call begins at its own workspace's start, in a chain too."""
    for _ in range(3):
        assert allocated((256, 256), 512) == [0, 256]


def test_a_tensor_may_be_returned(fake):
    assert allocated((256, 8), 512, returned=True) == [0, 256]


def test_a_tensor_may_not_be_kept(fake):
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="INTERNAL: allocate: it kept 1 tensors of the workspace"
    ):
        allocated((256, 8), 512, kept=True)
    fake.release()  # late, and harmless
    assert allocated((256,), 512) == [0]


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (0, "INVALID_ARGUMENT: fail: ValueError: as it was told"),
        (1, "INVALID_ARGUMENT: fail: TypeError: as it was told"),
        (2, "INVALID_ARGUMENT: fail: IndexError: as it was told"),
        (3, "UNIMPLEMENTED: fail: NotImplementedError: as it was told"),
        (4, "RESOURCE_EXHAUSTED: fail: MemoryError: as it was told"),
        (5, "INTERNAL: fail: RuntimeError: as it was told"),
        (6, "INTERNAL: fail: failed and did not say why"),
    ],
)
def test_errors_by_kind(fake, which, expected):
    with pytest.raises(jax.errors.JaxRuntimeError, match=expected):
        run("fail", {"which": which, "y": ONE})


# ------------------------------------------------------------------------------ images of kernels


def test_images_are_checked(fake):
    run("image", {"which": 0, "y": ONE})
    assert fake.journal() == ["image image"]
    for which, message in [
        (1, r"bad\.cubin has the SHA-256 [0-9a-f]{64}, expected 6105d6cc"),
        (2, r"cannot read the image .*none\.cubin"),
        (3, r"outside of its directory: .*\.\./good\.cubin"),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"INTERNAL: image: .*{message}"):
            run("image", {"which": which, "y": ONE})
        assert fake.journal() == []


# ---------------------------------------------------------------------- devices, streams, threads


def test_a_gpu_that_is_not_there(fake):
    """Buffers are presented as a GPU's, on a stream: it reaches the callee, and is gone after."""
    present_host_as(CUDA, 0x51EA)
    run("show", {"x": jnp.zeros(3), "y": ONE})
    warm_up = [
        "cudaStreamCreateWithFlags 1",
        "cudaStreamBeginCapture 2",
        "tensor 2/32/1 [3 ] strides [1 ] device 2:0",
        "tensor 0/32/1 [1 ] strides [1 ] device 2:0",
        "stream 0xcafe0",
        "cudaStreamEndCapture",
        "cudaGraphDestroy",
        "cudaStreamDestroy",
    ]
    assert fake.journal() == [*warm_up, *warm_up[2:4], "stream 0x51ea"]


def test_kernels_are_loaded_once_for_each_call_site_and_device(fake):
    present_host_as(CUDA, 0x51EA)
    program = jax.jit(lambda x: call("fake", "show", {"x": x, "y": ONE}, workspace=0))
    devices = jax.devices()[:2]
    for device in (devices[0], devices[0], devices[1], devices[1]):
        now(program, jax.device_put(jnp.zeros(3), device))
    captures = [line for line in fake.journal() if "BeginCapture" in line]
    assert len(captures) == len(devices)


def test_a_capture_that_fails(fake):
    present_host_as(CUDA, 0x51EA)
    fake.set_capture_fails(True)
    program = jax.jit(lambda x: call("fake", "show", {"x": x, "y": ONE}, workspace=0))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="show: cudaStreamBeginCapture: an error of the fake"
    ):
        now(program, jnp.zeros(3))
    assert fake.journal()[-1] == "cudaStreamDestroy"
    fake.set_capture_fails(False)
    now(program, jnp.zeros(3))  # the next call tries again
    assert fake.journal()[-1] == "stream 0x51ea"


def test_the_current_device_is_the_buffers(fake):
    """And what it was afterwards."""
    present_host_as(CUDA, 0x51EA)
    x = jax.device_put(jnp.zeros(3), jax.devices()[2])
    now(jax.jit(lambda x: call("fake", "show", {"x": x, "y": ONE}, workspace=0)), x)
    journal = fake.journal()
    assert journal[0] == "cudaSetDevice 2"
    assert journal.count("cudaSetDevice 2") == journal.count("cudaSetDevice 0") == 1
    assert journal[-1] == "cudaSetDevice 0"
    assert "tensor 2/32/1 [3 ] strides [1 ] device 2:2" in journal


def test_other_addresses_for_buffers(fake):
    seen = []

    def address(name, data, size):
        seen.append((name.decode(), size))
        return data

    present_host_as(CUDA, 0, address)
    run("show", {"x": jnp.zeros((3, 4)), "n": 1, "y": ONE}, workspace=32)
    assert seen == [("x", 48), ("y", 4), ("workspace", 32)] * 2  # loading, then the call


def test_scan_and_shard_map(fake, rng):
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    _, y = jax.jit(lambda x: jax.lax.scan(lambda c, row: (c, scaled(row, 3.0)), 0, x))(x)
    np.testing.assert_array_equal(y, 3 * np.asarray(x))
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda x: scaled(x, 3.0), mesh=mesh, in_specs=P("rows"), out_specs=P("rows")
    )
    np.testing.assert_array_equal(jax.jit(mapped)(x), 3 * np.asarray(x))


def test_export(fake, rng):
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    check = jax.export.DisabledSafetyCheck.custom_call(library.TARGET)
    exported = jax.export.export(
        jax.jit(lambda x: scaled(x, 3.0)), platforms=["cpu", "cuda"], disabled_checks=[check]
    )(x)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x), 3 * np.asarray(x))


def test_many_threads(fake, rng):
    """Streams, workspaces and modules are each thread's own; results are as without the others."""
    x = jnp.asarray(rng.normal(size=(64,)), jnp.float32)
    programs = [(s, jax.jit(lambda x, s=s: scaled(x, float(s)))) for s in range(8)]
    wrong = []

    def work(scale, program):
        for _ in range(200):
            if not np.array_equal(program(x), np.float32(scale) * np.asarray(x)):
                wrong.append(scale)

    threads = [threading.Thread(target=work, args=each) for each in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_does_not_grow(fake):
    """100,000 calls of the kind that FlashInfer's function is."""

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @functools.partial(jax.jit, static_argnums=1)
    def chain(x, length):
        def one(carry, _):
            arguments = {f"operand_{i}": carry for i in range(16)}
            arguments |= {f"nothing_{i}": None for i in range(12)} | {"config": (-1, -1)}
            arguments |= {"sizes": (100, 200), "y": Output((8,), jnp.float32)}
            (y,) = call("fake", "busy", arguments, workspace=1024)
            return y, None  # the next one's operand: the same operand would make one call of all

        return jax.lax.scan(one, x, None, length=length)

    jax.block_until_ready(chain(jnp.zeros(8), 20_000))
    program = chain.lower(jnp.zeros(8), 100_000).compile()
    before = resident()
    jax.block_until_ready(program(jnp.zeros(8)))
    assert resident() - before < 4 << 20  # a leak of 42 bytes a call would show
    assert fake.calls() >= 120_000


def test_the_library_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "libjax_nvfp4_moe.so")
    library._open.cache_clear()
    reason = (
        "libjax_nvfp4_moe.so was not built: install jax_nvfp4_moe where there is a C++ compiler"
    )
    assert library.unavailable() == reason
    monkeypatch.undo()
    library._open.cache_clear()


def test_no_python_package_of_tvm_ffi_is_imported(built):
    code = (
        "import sys, jax_nvfp4_moe.bridge.call, jax_nvfp4_moe.bridge.library as library\n"
        "library.register_targets('cuda')\n"
        "print(sorted({'torch', 'tvm_ffi', 'flashinfer'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
