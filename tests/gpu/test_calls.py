"""Functions that launch CUDA kernels, called from inside `jax.jit`; on the host without a GPU."""

import ctypes
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_nvfp4_moe.bridge.call import Output, call

from .harness import (
    ALIGNMENT,
    MODULE,
    axpb,
    axpb_in_numpy,
    reverse,
    reverse_in_numpy,
    silu_and_mul,
    silu_and_mul_in_numpy,
)

SHAPES = [(1,), (127,), (128,), (129,), (3, 50, 7), (1 << 20,)]


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def now(program, *arguments):
    return np.asarray(jax.block_until_ready(program(*arguments)))


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers(module, shape, rng):
    x = normal(rng, *shape)
    got = now(jax.jit(functools.partial(axpb, factor=0.7, steps=3)), x)
    np.testing.assert_array_equal(got, axpb_in_numpy(x, factor=0.7, steps=3))


@pytest.mark.parametrize(
    "options",
    [
        {"negate": True, "factor": 1.25},
        {"factor": -0.0},
        {"steps": -7},
        {"steps": 2**24},
        {"offsets": (1, -20, 300)},
        {"negate": True, "factor": 0.3, "steps": 5, "offsets": (2, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True])
def test_all_kinds_of_arguments(module, options, biased, rng):
    x, bias = normal(rng, 300), normal(rng, 300) if biased else None
    program = jax.jit(lambda x, bias: axpb(x, bias=bias, **options))
    np.testing.assert_array_equal(now(program, x, bias), axpb_in_numpy(x, bias=bias, **options))


def test_without_jit(module, rng):
    x = normal(rng, 300)
    np.testing.assert_array_equal(now(axpb, jnp.asarray(x)), x)


@pytest.mark.parametrize("shape", [(1, 2), (5, 6), (33, 514), (2048, 1536)], ids=str)
def test_silu_and_mul(module, shape, rng):
    x = 4 * normal(rng, *shape)
    # exp in float32, to two units of its last place (CUDA's programming guide).
    np.testing.assert_allclose(
        now(jax.jit(silu_and_mul), x), silu_and_mul_in_numpy(x), rtol=2e-6, atol=1e-12
    )


# ---------------------------------------------------------------------------- memory: the workspace


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_temporary(module, shape, rng):
    x = normal(rng, *shape)
    np.testing.assert_array_equal(now(jax.jit(reverse), x), reverse_in_numpy(x))


def test_too_small_a_workspace(module, rng):
    x = normal(rng, 300)
    before = module.counts()
    program = jax.jit(functools.partial(reverse, workspace=1199))
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        now(program, x)
    assert "RESOURCE_EXHAUSTED" in str(raised.value)
    assert "has 1199 bytes, and at least 1200 are needed" in str(raised.value)
    assert (module.counts() - before).launches == 0
    np.testing.assert_array_equal(now(jax.jit(reverse), x), reverse_in_numpy(x))


def test_workspaces_of_a_chain(module, rng):
    """XLA may give all of them the same memory: each call's temporary lives as long as the call."""
    x = normal(rng, 5000)
    sizes = [20_000 + ALIGNMENT * i for i in range(12)]

    def chain(x):
        for size in sizes:
            x = axpb(reverse(x, workspace=size), factor=0.5)
        return x

    want = x
    for _ in sizes:
        want = axpb_in_numpy(reverse_in_numpy(want), factor=0.5)
    np.testing.assert_array_equal(now(jax.jit(chain), x), want)


# ------------------------------------------------------------------------- memory: what is written


def poisoned(function, x, shape):
    """The function's result, in memory that was full of NaN: that of a donated argument."""

    @functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
    def program(x, poison):
        return function(x)

    poison = jnp.full(shape, jnp.nan, jnp.float32)
    result = program(x, poison)
    assert poison.is_deleted()
    return now(lambda: result)


def leave(x):
    (y,) = call(MODULE, "leave", {"y": Output(x.shape, jnp.float32)}, workspace=0)
    return y


def test_control_poison_is_seen(module, rng):
    """A function that writes nothing leaves it; were it not so, the next test would say nothing."""
    x = normal(rng, 4097)
    assert np.isnan(poisoned(leave, x, x.shape)).all()


@pytest.mark.parametrize("size", [1, 127, 4097, 1 << 20])
@pytest.mark.parametrize(
    ("function", "in_numpy"), [(axpb, axpb_in_numpy), (reverse, reverse_in_numpy)]
)
def test_results_are_written_in_full(module, function, in_numpy, size, rng):
    x = normal(rng, size)
    np.testing.assert_array_equal(poisoned(function, x, x.shape), in_numpy(x))


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("which", "code", "kind"),
    [
        (0, "INVALID_ARGUMENT", "ValueError"),
        (1, "INVALID_ARGUMENT", "TypeError"),
        (2, "INVALID_ARGUMENT", "IndexError"),
        (3, "UNIMPLEMENTED", "NotImplementedError"),
        (4, "RESOURCE_EXHAUSTED", "MemoryError"),
        (5, "INTERNAL", "RuntimeError"),
    ],
)
def test_errors_by_kind(module, which, code, kind, rng):
    x = normal(rng, 300)

    def program(x):
        arguments = {"which": which, "y": Output(x.shape, jnp.float32)}
        (y,) = call(MODULE, "fail", arguments, workspace=0)
        return y

    before = module.counts()
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        now(jax.jit(program), x)
    assert code in str(raised.value)
    assert f"fail: {kind}: as it was told" in str(raised.value)
    assert (module.counts() - before).launches == 0
    np.testing.assert_array_equal(now(jax.jit(axpb), x), x)  # nothing is left of the failure


# ------------------------------------------------------------------------ streams, threads, devices

# More than the host needs to launch what comes next, at 1 to 2 GHz.
CYCLES = 300_000


def test_xlas_kernels_before_and_after(module, rng):
    """Each waits for the other: they are on one stream."""
    x = normal(rng, 1000)

    def program(x):
        for _ in range(6):
            x = reverse(jnp.abs(x) * 0.5, cycles=CYCLES)
        return jnp.abs(x)

    want = x
    for _ in range(6):
        want = reverse_in_numpy(np.abs(want) * np.float32(0.5))
    program = jax.jit(program)
    for _ in range(5):
        np.testing.assert_array_equal(now(program, x), np.abs(want))


@pytest.mark.parametrize("own_sizes", [False, True])
def test_many_threads(module, own_sizes, rng):
    """Each with inputs of its own, all at once: of one executable, or of one for each."""

    def chain(x):
        for step in range(4):
            x = axpb(reverse(x, cycles=1000), factor=0.5, steps=step)
        return x

    def chain_in_numpy(x):
        for step in range(4):
            x = axpb_in_numpy(reverse_in_numpy(x), factor=0.5, steps=step)
        return x

    program = jax.jit(chain)
    wrong = []

    def work(index, inputs):
        for x in inputs:
            if not np.array_equal(now(program, x), chain_in_numpy(x)):
                wrong.append(index)

    data = [[normal(rng, 500 + 100 * t * own_sizes) for _ in range(30)] for t in range(8)]
    threads = [threading.Thread(target=work, args=each) for each in enumerate(data)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_this_threads_stream_and_allocator_are_put_back(module, tvm_ffi, rng):
    """JAX runs a program on the thread that calls it or on one of its own; this sees the former."""
    runtime = ctypes.CDLL(str(tvm_ffi / "lib" / "libtvm_ffi.so"))
    for getter in (runtime.TVMFFIEnvGetStream, runtime.TVMFFIEnvGetDLPackManagedTensorAllocator):
        getter.restype = ctypes.c_void_p
    sentinel, before = 0x5E47, ctypes.c_void_p()

    def state():
        return (
            runtime.TVMFFIEnvGetStream(2, 0),
            runtime.TVMFFIEnvGetDLPackManagedTensorAllocator(),
        )

    def set_stream(stream, previous=None):
        assert runtime.TVMFFIEnvSetStream(2, 0, ctypes.c_void_p(stream), previous) == 0

    set_stream(sentinel, ctypes.byref(before))
    try:
        was = state()
        x = normal(rng, 300)
        now(jax.jit(reverse), x)
        assert state() == was
        with pytest.raises(jax.errors.JaxRuntimeError):
            now(jax.jit(functools.partial(reverse, workspace=0)), x)
        assert state() == was
        assert was[0] == sentinel
    finally:
        set_stream(before.value)


def test_each_device_its_own(module, rng):
    """Functions check that the tensors' device is the current one."""
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    program = jax.jit(lambda x: reverse(axpb(x, factor=0.5), cycles=1000))
    before = module.counts()
    for _ in range(3):
        inputs = [normal(rng, 700) for _ in devices]
        placed = [jax.device_put(x, device) for x, device in zip(inputs, devices, strict=True)]
        for x, device, y in zip(inputs, devices, [program(x) for x in placed], strict=True):
            assert y.devices() == {device}
            np.testing.assert_array_equal(
                np.asarray(y), reverse_in_numpy(axpb_in_numpy(x, factor=0.5))
            )
    assert (module.counts() - before).loads <= len(devices)


def test_shard_map(module, rng):
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    program = jax.jit(jax.shard_map(reverse, mesh=mesh, in_specs=P("rows"), out_specs=P("rows")))
    x = normal(rng, len(devices), 600)
    for _ in range(3):
        want = np.stack([reverse_in_numpy(row) for row in x])
        x = now(program, x)
        np.testing.assert_array_equal(x, want)
