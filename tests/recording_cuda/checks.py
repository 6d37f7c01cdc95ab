"""What test_runtime.py runs, one check to a process: `python -m tests.recording_cuda.checks NAME`.

A process of its own, because a real CUDA runtime that is loaded already would win, because
FlashInfer keeps what it learnt of the device in statics, and because one check has to crash.
"""

import ctypes
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from .buffers import Buffers
from .calls import Spy
from .fp4_moe import (
    DEEPSEEK_V3,
    FROM_LOGITS,
    GEGLU,
    PACKED,
    RELEASES,
    RELU2,
    SWIGLU,
    SYMBOL,
    Shape,
    arguments,
    family,
    miswired,
    operands,
)
from .launches import Recording, load, mapped
from .manifest import read_manifest
from .tvm_ffi import CalleeError, Caller, Tensor

QWEN3_30B = Shape(tokens=16, top_k=8, experts=128, hidden=2048, intermediate=768)
STREAM = 0x5EA70000
NOT_SUPPORTED = 801  # driver_types.h cudaErrorNotSupported


class Session:
    """The module, loaded, and a way to call it."""

    def __init__(self, cubins: Path | None = None) -> None:
        self.manifest = read_manifest()
        self.release = RELEASES[self.manifest.flashinfer]
        self.runtime, self.module = load(self.manifest)
        self.runtime.use_cubins(self.module, cubins or self.manifest.cubin_directory)

    def workspace(self, shape: Shape, per_token: bool = False) -> dict[str, int]:
        """The bytes of each buffer that a call should allocate, in order."""
        return self.release.workspace(shape, per_token)

    def arguments(self, shape: Shape, tensors: dict[str, Tensor], **options: Any) -> list[object]:
        return arguments(shape, tensors, version=self.manifest.flashinfer, **options)

    def caller(self, buffers: Buffers, stream: int = STREAM, **options: Any) -> Caller:
        options = {"names": tuple(self.workspace(QWEN3_30B))} | options
        return Caller(self.manifest.tvm_ffi, buffers, stream, **options)

    def call(
        self,
        shape: Shape,
        buffers: Buffers,
        mode: int = PACKED,
        limit: int | None = None,
        device: int = 0,
        optional: tuple[str, ...] = (),
        **options: Any,
    ) -> tuple[Recording, dict[str, int]]:
        """One call: what was recorded, and the bytes of each allocation."""
        self.runtime.clear()
        names = tuple(self.workspace(shape, "per_token_scales" in optional))
        caller = self.caller(buffers, limit=limit, device=device, names=names)
        tensors = operands(shape, buffers, optional)
        packed = self.arguments(shape, tensors, mode=mode, **options)
        caller.call(getattr(self.module, SYMBOL), *packed)
        return self.runtime.recording(buffers), {a.label: a.bytes for a in caller.allocations}


def check_loaded() -> None:
    session = Session()
    assert mapped("libcudart.so") == {str(session.manifest.runtime.resolve())}
    assert not mapped("libcuda.so")
    # What the module does not have itself is found through the spy.
    spy = ctypes.CDLL(str(session.manifest.spy))
    for name in ("FlashInferSetCubinCallback", "FlashInferSetCurrentCubin"):
        addresses = [
            ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            for library in (spy, session.module)
        ]
        assert addresses[0] == addresses[1], name
    assert spy.cudaGetDevice
    assert "torch" not in sys.modules
    assert "flashinfer" not in sys.modules


def check_packed() -> None:
    session = Session()
    with Buffers() as buffers:
        recording, allocations = session.call(QWEN3_30B, buffers)
        launches = recording.launches
        assert [family(x) for x in launches] == ["routing", "gemm", "gemm", "finalize"], launches
        assert miswired(launches) == []
        assert {x.stream for x in launches} == {STREAM}
        assert {x.status for x in launches} == {0}
        assert all(x.pdl for x in launches)
        assert "swiGlu" in launches[1].kernel
        assert "sm100f" in launches[1].kernel
        assert len(recording.module_loads) == 2
        assert allocations == session.workspace(QWEN3_30B)
        assert recording.refused == ()
        assert recording.unknown == ()


def check_from_logits() -> None:
    session = Session()
    many = 3 if session.manifest.flashinfer == "0.6.13" else 2
    for tokens, routers in ((4, 1), (64, 1), (1024, many)):
        shape = Shape(tokens, top_k=8, experts=128, hidden=2048, intermediate=768)
        with Buffers() as buffers:
            recording, allocations = session.call(shape, buffers, FROM_LOGITS)
            steps = [family(x) for x in recording.launches]
            assert steps == ["routing"] * routers + ["gemm", "gemm", "finalize"], (tokens, steps)
            assert miswired(recording.launches, FROM_LOGITS) == []
            assert allocations == session.workspace(shape)
            assert recording.refused == ()
        cooperative = [x.cooperative for x in recording.launches]
        assert any(cooperative) == (tokens == 1024), (tokens, cooperative)


def check_shapes() -> None:
    """Other models' sizes, subsets of the experts, activations: each wired, each of its size."""
    session = Session()
    models = (  # top_k, experts, hidden, intermediate
        (8, 256, 7168, 2048),  # DeepSeek-V3
        (8, 384, 7168, 2048),  # Kimi-K2
        (10, 512, 2048, 512),  # Qwen3-Next
        (1, 16, 5120, 8192),  # Llama-4 Scout
        (2, 8, 4096, 14336),  # Mixtral
    )
    for model in models:
        for tokens in (1, 7, 300, 4096):
            for share in (1, 8):
                shape = Shape(tokens, *model, local_experts=model[1] // share)
                for activation, gated in ((SWIGLU, True), (GEGLU, True), (RELU2, False)):
                    shape = replace(shape, gated=gated)
                    if not session.release.has_kernels(shape):
                        continue
                    with Buffers() as buffers:
                        recording, sizes = session.call(shape, buffers, activation=activation)
                        said = (shape, activation)
                        assert miswired(recording.launches) == [], said
                        assert {x.status for x in recording.launches} == {0}, said
                        assert sizes == session.workspace(shape), said
                        assert recording.refused == recording.unknown == (), said


def check_optional() -> None:
    """Per-token scales, biases, activation parameters and a routing bias reach their places."""
    session = Session()
    parameters = ("gemm1_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm2_bias")
    cases = (
        (parameters, PACKED, {}),
        (("per_token_scales",), PACKED, {}),
        (("per_token_scales", *parameters), FROM_LOGITS, {}),
        (
            ("routing_bias",),
            FROM_LOGITS,
            {"routing_method_type": DEEPSEEK_V3, "n_group": 8, "topk_group": 4},
        ),
    )
    for tokens in (1, 16, 200, 1024):
        shape = Shape(tokens, top_k=8, experts=128, hidden=2048, intermediate=768)
        for optional, mode, others in cases:
            with Buffers() as buffers:
                recording, sizes = session.call(shape, buffers, mode, optional=optional, **others)
                said = (tokens, optional, mode, miswired(recording.launches, mode, optional))
                assert miswired(recording.launches, mode, optional) == [], said
                assert sizes == session.workspace(shape, "per_token_scales" in optional), said
                assert recording.refused == recording.unknown == (), said
                # What the call did not have is missed, and what it had is surplus otherwise.
                other = tuple({"gemm2_bias"} ^ set(optional))
                assert miswired(recording.launches, mode, other) != [], said


def check_absent_tile() -> None:
    """Of a tile that no kernel here has: what is allocated before the launcher looks for one."""
    session, shape = Session(), replace(QWEN3_30B, tokens=4096)
    assert session.release.default_tile(shape) == 192
    with Buffers() as buffers:
        caller = session.caller(buffers)
        try:
            caller.call(
                getattr(session.module, SYMBOL),
                *session.arguments(shape, operands(shape, buffers)),
            )
        except CalleeError as error:
            assert "mTileSize: 192" in str(error), error
        else:
            raise AssertionError("there is a kernel")
        steps = {family(x) for x in session.runtime.recording(buffers).launches}
        assert steps == {"routing"}, steps
    wanted = list(session.workspace(shape).items())
    wanted = wanted[: 1 + [name for name, _ in wanted].index("num_non_exiting_ctas")]
    assert [(a.label, a.bytes) for a in caller.allocations] == wanted


def check_pdl() -> None:
    """`enable_pdl` governs the GEMMs alone; of 0.7.2, all."""
    session = Session()
    with Buffers() as buffers:
        recording, _ = session.call(QWEN3_30B, buffers, enable_pdl=False)
    others = session.manifest.flashinfer == "0.6.13"
    assert [x.pdl for x in recording.launches] == [others, False, False, others]


def check_workspace_limit() -> None:
    """The workspace is what the closed form says, not a byte less."""
    session = Session()
    total = sum(session.workspace(QWEN3_30B).values())
    with Buffers() as buffers:
        recording, _ = session.call(QWEN3_30B, buffers, limit=total)
        assert len(recording.launches) == 4
    with Buffers() as buffers:
        try:
            session.call(QWEN3_30B, buffers, limit=total - 1)
        except CalleeError as error:
            assert error.kind == "MemoryError", error
            assert f"{total} bytes wanted, {total - 1} given" in str(error)
        else:
            raise AssertionError("a byte less was enough")
        steps = [family(x) for x in session.runtime.recording(buffers).launches]
        assert "gemm" not in steps
        assert "finalize" not in steps


def check_miswired() -> None:
    """Exchanged operands of the same shape and type are seen, and where."""
    session = Session()
    square = Shape(tokens=16, top_k=8, experts=128, hidden=512, intermediate=512, gated=False)
    for one, other, field in (
        ("gemm1_weights", "gemm2_weights", "gemm1: ptrA is gemm2_weights"),
        ("gemm1_weights_scale", "gemm2_weights_scale", "gemm1: ptrSfA is gemm2_weights_scale"),
        ("output1_scales_scalar", "output2_scales_scalar", "gemm2: ptrScaleC is output1_"),
        ("output1_scales_gate_scalar", "output1_scales_scalar", "gemm1: ptrScaleC is output1_"),
    ):
        with Buffers() as buffers:
            tensors = operands(square, buffers)
            tensors[one], tensors[other] = tensors[other], tensors[one]
            caller = session.caller(buffers)
            session.runtime.clear()
            packed = session.arguments(square, tensors, activation=RELU2)
            caller.call(getattr(session.module, SYMBOL), *packed)
            wrong = miswired(session.runtime.recording(buffers).launches)
            assert any(field in text for text in wrong), (one, other, wrong)


def check_repeated() -> None:
    """Nothing of one call is seen in the next, though the stack still holds it."""
    session, old = Session(), Buffers()  # Not closed: its addresses must not come back.
    session.call(QWEN3_30B, old)
    with Buffers() as buffers:
        session.call(QWEN3_30B, buffers)
        launches = session.runtime.recording(old).launches
        assert len(launches) == 4
        assert [x.labels for x in launches] == [frozenset()] * 4


def check_missing_cubin() -> None:
    with tempfile.TemporaryDirectory() as empty, Buffers() as buffers:
        session = Session(Path(empty))
        try:
            session.call(QWEN3_30B, buffers)
        except CalleeError as error:
            assert f"no cubin {empty}" in str(error), error
        else:
            raise AssertionError("no error for a missing cubin")
        steps = [family(x) for x in session.runtime.recording(buffers).launches]
        assert "gemm" not in steps, steps


def check_corrupt_cubin() -> None:
    """One bit of a prebuilt kernel differs: no GEMM is launched, and the error says which file."""
    session = Session()
    with Buffers() as buffers:
        recording, _ = session.call(QWEN3_30B, buffers)
    paths = [entry["path"] for entry in recording.entries if entry["call"] == "cubin"]
    assert len(paths) == 2, paths
    with tempfile.TemporaryDirectory() as directory, Buffers() as buffers:
        for path in paths:
            binary = bytearray((session.manifest.cubin_directory / path).read_bytes())
            binary[len(binary) // 2] ^= 1
            copy = Path(directory) / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(binary)
        session.runtime.use_cubins(session.module, Path(directory))
        # Kernels are loaded once for each CUDA context, so for the next device again.
        session.runtime.library.cudaSetDevice(1)
        try:
            session.call(QWEN3_30B, buffers, device=1)
        except CalleeError as error:
            assert paths[0] in str(error), error
            assert "has sha256" in str(error), error
        else:
            raise AssertionError("no error for a corrupt cubin")
        steps = [family(x) for x in session.runtime.recording(buffers).launches]
        assert "gemm" not in steps, steps


def check_refused() -> None:
    """What no path may call is refused and seen, so that `refused == ()` means something."""
    session = Session()
    library, pointer = session.runtime.library, ctypes.c_void_p()
    session.runtime.clear()
    calls = {
        "cudaMalloc": (ctypes.byref(pointer), ctypes.c_size_t(64)),
        "cudaMallocHost": (ctypes.byref(pointer), ctypes.c_size_t(64)),
        "cudaFree": (ctypes.c_void_p(64),),
        "cudaMemcpy": (None, None, ctypes.c_size_t(64), 1),
        "cudaMemcpyAsync": (None, None, ctypes.c_size_t(64), 1, ctypes.c_void_p(STREAM)),
        "cudaMemset": (None, 0, ctypes.c_size_t(64)),
        "cudaMemsetAsync": (None, 0, ctypes.c_size_t(64), ctypes.c_void_p(STREAM)),
        "cudaDeviceSynchronize": (),
        "cudaStreamSynchronize": (ctypes.c_void_p(STREAM),),
    }
    for name, args in calls.items():
        assert getattr(library, name)(*args) == NOT_SUPPORTED, name
    with Buffers() as buffers:
        refused = session.runtime.recording(buffers).refused
    assert [x.api for x in refused] == list(calls)
    assert {x.stream for x in refused} == {0, STREAM}


def check_untouchable() -> None:
    """Ends by a segmentation fault, as a launcher that read an operand would."""
    with Buffers() as buffers:
        ctypes.string_at(buffers.reserve("operand", 64).address, 1)


def check_tensor_maps() -> None:
    """A map that a driver would refuse is refused."""
    library = Session().runtime.library
    room = ctypes.create_string_buffer(256)
    target = -(-ctypes.addressof(room) // 64) * 64

    def encode(address: int, stride: int = 1024, box: int = 64) -> int:
        dims, strides = (ctypes.c_uint64 * 2)(1024, 8), (ctypes.c_uint64 * 1)(stride)
        boxes, steps = (ctypes.c_uint32 * 2)(box, 8), (ctypes.c_uint32 * 2)(1, 1)
        return library.cuTensorMapEncodeTiled(
            ctypes.c_void_p(target), 0, 2, ctypes.c_void_p(address), dims, strides, boxes, steps,
            0, 0, 0, 0,
        )  # fmt: skip

    assert encode(1 << 20) == 0
    assert encode((1 << 20) + 8) == 1
    assert encode(1 << 20, stride=1000) == 1
    assert encode(1 << 20, box=257) == 1


def check_threads() -> None:
    """Eight threads launch at once: nothing is lost, and each has its own stream and maps."""
    session, calls = Session(), 25
    with Buffers() as first:
        session.call(QWEN3_30B, first)  # Loads the kernels, which FlashInfer does unguarded.
    session.runtime.clear()
    failures: list[BaseException] = []
    with Buffers() as buffers:
        tensors = operands(QWEN3_30B, buffers)

        def work(stream: int) -> None:
            try:
                with Buffers() as own:
                    caller = session.caller(own, stream)
                    packed = session.arguments(QWEN3_30B, tensors)
                    for _ in range(calls):
                        caller.call(getattr(session.module, SYMBOL), *packed)
            except BaseException as failure:
                failures.append(failure)

        streams = [STREAM + i for i in range(8)]
        threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        launches = session.runtime.recording(buffers).launches
    assert len(launches) == len(streams) * calls * 4
    for stream in streams:
        own = [family(x) for x in launches if x.stream == stream]
        assert own == ["routing", "gemm", "gemm", "finalize"] * calls, stream
    assert all("gemm1_weights" in x.labels or "gemm2_weights" in x.labels
               for x in launches if family(x) == "gemm")  # fmt: skip


def check_spy() -> None:
    """A call through the spy is seen whole, and wired as without it."""
    session, spy = Session(), Spy(read_manifest())
    function = getattr(spy.library, SYMBOL)
    sizes = session.workspace(QWEN3_30B)
    total = sum(sizes.values())
    with Buffers() as buffers:
        tensors = operands(QWEN3_30B, buffers)
        spy.clear()
        packed = session.arguments(QWEN3_30B, tensors)
        session.caller(buffers, device=3).call(function, *packed)
        try:
            short = session.caller(buffers, limit=total - 1)
            short.call(function, *packed)
        except CalleeError as error:
            assert error.kind == "MemoryError", error
        else:
            raise AssertionError("a byte less was enough")
        good, bad = spy.calls(session.release.arguments, tuple(sizes))
    assert (good.function, good.status) == (SYMBOL, 0)
    assert (good.stream, good.device) == (STREAM, 3)
    assert {x.stream for x in good.launches} == {STREAM}
    assert miswired(good.launches) == []
    assert {name: x.bytes for name, x in good.allocations.items()} == sizes
    assert good.refused_allocation is None
    assert good.operands.keys() | good.values.keys() == set(session.release.arguments)
    for name, operand in good.operands.items():
        given = tensors[name]
        assert operand.caller_address == given.buffer.address, name
        assert operand.address != given.buffer.address, name
        assert (operand.shape, operand.dtype) == (given.shape, given.dtype), name
        assert (operand.device_type, operand.device) == (2, 3), name
    assert good.values["top_k"] == QWEN3_30B.top_k
    assert good.values["config_index"] == [-1, -1]
    assert good.values["gemm1_bias"] is None
    assert bad.status != 0
    assert bad.refused_allocation.bytes == sizes["gemm2_output"]
    assert "gemm" not in [family(x) for x in bad.launches]


def check_capture() -> None:
    """Captured launches say so, and prebuilt kernels can be loaded in a relaxed capture alone."""
    session = Session()
    library, graph = session.runtime.library, ctypes.c_void_p()

    def capture(mode: int, device: int = 0) -> Recording:
        assert library.cudaStreamBeginCapture(ctypes.c_void_p(STREAM), mode) == 0
        try:
            with Buffers() as buffers:
                return session.call(QWEN3_30B, buffers, device=device)[0]
        finally:
            end = library.cudaStreamEndCapture
            assert end(ctypes.c_void_p(STREAM), ctypes.byref(graph)) == 0
            assert library.cudaGraphDestroy(graph) == 0

    relaxed, all_threads = 2, 0  # driver_types.h cudaStreamCaptureMode
    recording = capture(relaxed)
    assert [x.captured for x in recording.launches] == [True] * 4
    assert len(recording.module_loads) == 2
    assert [e["launches"] for e in session.runtime.entries() if e["call"] == "capture_end"] == [4]
    # Loaded by now.
    assert capture(all_threads).module_loads == ()
    with Buffers() as buffers:
        assert not any(x.captured for x in session.call(QWEN3_30B, buffers)[0].launches)
    # A device of its own has nothing loaded.
    library.cudaSetDevice(1)
    try:
        capture(all_threads, device=1)
    except CalleeError as error:
        print(error)
    with Buffers() as buffers:
        loads = session.runtime.recording(buffers).module_loads
    assert {x.status for x in loads} == {900}, loads  # cudaErrorStreamCaptureUnsupported


def check_capability() -> None:
    """Run with RECORDING_CUDA_CAPABILITY=10.3: all is as on 10.0."""
    with Buffers() as buffers:
        recording, _ = Session().call(QWEN3_30B, buffers)
        assert miswired(recording.launches) == []


def check_old_capability() -> None:
    """Run with RECORDING_CUDA_CAPABILITY=9.0: the launcher asks, believes it and refuses."""
    session = Session()
    with Buffers() as buffers:
        try:
            session.call(QWEN3_30B, buffers)
        except CalleeError as error:
            print(error)
        else:
            raise AssertionError("the launcher runs on 9.0")
        assert session.runtime.recording(buffers).launches == ()


if __name__ == "__main__":
    globals()[f"check_{sys.argv[1]}"]()
    print("done")
