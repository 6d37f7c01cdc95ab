"""The package's public calls on FlashInfer's launcher, from inside `jax.jit`: as `nvfp4_moe` and
`nvfp4_moe_routed` choose it for a B200, from ids and from logits, on one device and on several.

`python -m tests.recording_cuda.from_calls NAME` runs one check; test_from_jit.py runs them all.
"""

import ctypes  # noqa: I001  from_jit is before JAX
import dataclasses
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from .from_jit import RELEASE, STREAM, Host, manifest, runtime

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import computing, devices
from jax_nvfp4_moe.bridge import library
from jax_nvfp4_moe.bridge import manifest as built
from jax_nvfp4_moe.implementations.trtllm import call as _trtllm_call
from jax_nvfp4_moe.implementations.trtllm import implementation as trtllm
from jax_nvfp4_moe.implementations.trtllm import routing as _trtllm_routing
from tests.support import host

from .buffers import Buffers
from .cases import Case, Routed, routers
from .fp4_moe import FROM_LOGITS, PACKED, family, miswired
from .launches import Launch
from .xla_flags import DEVICES

IN_KERNEL = nvm.Trtllm(route_in_kernel=True)


def b200() -> use_abstract_mesh:
    device = AbstractDevice(device_kind="NVIDIA B200", num_cores=None, platform="cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def launched(what: object, buffers: Buffers, optional: tuple[str, ...], mode: int) -> list:
    """What was launched on XLA's stream of a device, which is as it has to be."""
    recording = runtime.recording(buffers)
    assert recording.refused == recording.unknown == (), recording.refused
    launches = [x for x in recording.launches if not x.captured]
    assert {x.stream for x in launches} <= {STREAM}
    assert {x.status for x in launches} <= {0}
    wrong = miswired(launches, mode, optional)
    assert wrong == [], (wrong, what)
    return launches


def check_routers() -> None:
    """The kernel's own router, whatever the method, and its operands."""
    count = 0
    for one in routers():
        case = one.case
        shape = dataclasses.replace(case.shape, experts=one.experts)
        if not RELEASE.has_kernels(shape):
            continue
        x, _, _, experts = case.arguments()
        logits = jnp.zeros((one.tokens, one.experts))
        bias = jnp.zeros(one.experts) if one.bias else None
        with Buffers() as buffers, b200():
            host = Host(buffers)
            runtime.clear()

            def run(x, logits, bias, experts, one=one):
                return nvm.nvfp4_moe(
                    x,
                    logits,
                    experts,
                    one.routing,
                    selection_bias=bias,
                    activation=one.activation,
                    implementation=IN_KERNEL,
                )

            y = jax.block_until_ready(jax.jit(run)(x, logits, bias, experts))
            assert y.shape == x.shape
            host.label_workspace(case, shape)
            launches = launched(one, buffers, one.optional, FROM_LOGITS)
            # The first kernel reads the scores.
            assert "routing_logits" in launches[0].labels, (one, launches[0].kernel)
            assert host.sizes["topk_ids"] == 4 * one.tokens * one.routing.top_k
            count += 1
    print(count, "calls")


def check_a_router_that_is_not_there() -> None:
    """The control: without our refusal 0.6.13 launches no router, and then the GEMMs."""
    one = Routed(nvm.Routing("topk", 8), 16, 260)
    x, _, _, experts = one.case.arguments()
    logits = jnp.zeros((one.tokens, one.experts))

    def run(x, logits, experts):
        return nvm.nvfp4_moe(x, logits, experts, one.routing, implementation=IN_KERNEL)

    with Buffers() as buffers, b200():
        Host(buffers)
        runtime.clear()
        try:
            jax.jit(run)(x, logits, experts)
        except NotImplementedError as refused:
            assert "its router for 'topk' is compiled for up to 256 experts" in str(refused)
        else:
            raise AssertionError("it was not refused")
        assert runtime.recording(buffers).launches == ()
        for module in (trtllm, _trtllm_routing):
            module.no_router = lambda routing, num_experts: None
        try:
            jax.block_until_ready(jax.jit(run)(x, logits, experts))
        except jax.errors.JaxRuntimeError as error:
            assert manifest.flashinfer != "0.6.13"
            assert "no compiled tier covers" in str(error)
            return
        launches = [x for x in runtime.recording(buffers).launches if not x.captured]
        scoring = [x for x in launches if "routing_logits" in x.labels]
        assert scoring == [], [x.kernel for x in scoring]
        assert [family(x) for x in launches].count("gemm") == 2


def check_shares() -> None:
    """Experts that are split over devices: each launches with what is its own."""
    case = Case(16, 8, 4 * DEVICES, 512, 256)
    x, ids, weights, experts = case.arguments()
    mesh = jax.make_mesh((DEVICES,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.tree.map(lambda leaf: PartitionSpec(*["expert"][: leaf.ndim]), experts)
    whole = PartitionSpec()

    def share(x, ids, weights, experts):
        return nvm.nvfp4_moe_routed(x, ids, weights, experts, axis_name="expert")

    function = jax.shard_map(share, mesh=mesh, in_specs=(whole,) * 3 + (split,), out_specs=whole)
    devices.current_kind = lambda: "NVIDIA B200"  # not this mesh's
    with Buffers() as buffers:
        host = Host(buffers)
        host.device = current_device
        runtime.clear()
        y = jax.block_until_ready(jax.jit(function)(x, ids, weights, experts))
        assert y.shape == x.shape
        host.label_workspace(dataclasses.replace(case, experts=4))
        found = runtime.recording(buffers)
        for device in range(DEVICES):
            launches = [
                own(launch, device)
                for launch in found.launches
                if launch.device == device and not launch.captured
            ]
            assert miswired(launches, PACKED) == [], (device, miswired(launches, PACKED))
            assert [family(x) for x in launches].count("routing") == 1


def current_device() -> int:
    ordinal = ctypes.c_int()
    assert runtime.library.cudaGetDevice(ctypes.byref(ordinal)) == 0
    return ordinal.value


def own(launch: Launch, device: int) -> Launch:
    """A launch whose pointers into its own device's buffers have lost the device's number."""
    end = f"@{device}"
    pointers = tuple(
        dataclasses.replace(pointer, label=pointer.label.removesuffix(end))
        for pointer in launch.pointers
    )
    return dataclasses.replace(launch, pointers=pointers)


def check_parts() -> None:
    """More tokens than a call takes are several calls, each of which is as it has to be."""
    _trtllm_call.max_tokens = lambda top_k, num_experts: 16
    case = Case(40, 8, 16, 512, 256)
    x, ids, weights, experts = case.arguments()
    ids = jnp.arange(40 * 8).reshape(40, 8) % 16  # or the parts are one call, as they are the same
    with Buffers() as buffers, b200():
        host = Host(buffers)
        runtime.clear()
        run = jax.jit(nvm.nvfp4_moe_routed)
        assert jax.block_until_ready(run(x, ids, weights, experts)).shape == x.shape
        launches = [x for x in runtime.recording(buffers).launches if not x.captured]
        assert [family(x) for x in launches].count("finalize") == 3
        assert host.sizes["output"] in (2 * 16 * 512, 2 * 8 * 512)


def check_no_tokens() -> None:
    """The launcher would divide by their number."""
    x, ids, weights, experts = Case(1, 8, 16, 512, 256).arguments()
    with Buffers() as buffers, b200():
        Host(buffers)
        runtime.clear()
        y = jax.jit(nvm.nvfp4_moe_routed)(x[:0], ids[:0], weights[:0], experts)
        assert jax.block_until_ready(y).shape == (0, 512)
        assert runtime.recording(buffers).launches == ()


def check_images(spoil: bool) -> None:
    """Without its images, or with others, a call fails before it launches on XLA's stream."""
    with tempfile.TemporaryDirectory() as folder, Buffers() as buffers:
        if spoil:
            for file in manifest.cubin_directory.rglob("*Bmm_E2m1_E2m1E2m1*.cubin"):
                copy = Path(folder) / file.relative_to(manifest.cubin_directory)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(b"no image")
        library.register_module(
            "spoilt", manifest.module, tvm_ffi=manifest.tvm_ffi, cubins=Path(folder)
        )
        case = Case(16, 8, 16, 512, 256)
        Host(buffers)
        runtime.clear()
        function = _trtllm_call.Function("spoilt", manifest.flashinfer)
        run = jax.jit(partial(_trtllm_call.run_routed, function, case.call()))
        try:
            jax.block_until_ready(run(*case.arguments()))
        except jax.errors.JaxRuntimeError as error:
            expected = "has the SHA-256" if spoil else "cannot read the image"
            assert expected in str(error), error
        else:
            raise AssertionError("it was not refused")
        assert [x for x in runtime.recording(buffers).launches if x.stream == STREAM] == []


def check_missing_images() -> None:
    check_images(spoil=False)


def check_other_images() -> None:
    check_images(spoil=True)


def main() -> None:
    # The branch for CUDA, on this platform.
    computing.lax = SimpleNamespace(
        platform_dependent=lambda *arguments, cuda, default: cuda(*arguments)
    )
    folder = tempfile.mkdtemp()
    os.environ[built.CACHE_VARIABLE] = folder
    try:
        built.add(
            built.Module(
                kind="trtllm",
                version=manifest.flashinfer,
                archs=(manifest.arch,),
                path=manifest.module,
                sha256=built.hashlib.sha256(manifest.module.read_bytes()).hexdigest(),
                tvm_ffi=manifest.tvm_ffi,
                cubins=manifest.cubin_directory,
            )
        )
        host.register()
        globals()[f"check_{sys.argv[1]}"]()
    finally:
        shutil.rmtree(folder)
    assert "torch" not in sys.modules
    assert "flashinfer" not in sys.modules
    print("done")


if __name__ == "__main__":
    main()
