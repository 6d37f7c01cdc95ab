"""FlashInfer's launcher, called by the package's own bridge from inside `jax.jit`.

`python -m tests.recording_cuda.from_jit NAME` runs one check; test_from_jit.py runs them all. In a
process of its own, and the stand-in runtime is loaded before JAX, which may load a real one.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial

from . import xla_flags  # noqa: F401
from .buffers import Buffers
from .launches import Recording, load
from .manifest import read_manifest

manifest = read_manifest()
runtime, module = load(manifest)

import jax  # noqa: E402

from jax_nvfp4_moe.bridge import library  # noqa: E402
from jax_nvfp4_moe.implementations.trtllm import call as _trtllm_call  # noqa: E402
from jax_nvfp4_moe.implementations.trtllm.call import Function, run_routed  # noqa: E402
from tests.support import host  # noqa: E402
from tests.support.host import CUDA, present_host_as  # noqa: E402

from .cases import Case, forms, models, sizes  # noqa: E402
from .fp4_moe import RELEASES, Shape, family, miswired  # noqa: E402

STREAM = 0x51EA0000
MODULE = "recorded"
FUNCTION_OF_MODULE = Function(MODULE, manifest.flashinfer)
RELEASE = RELEASES[manifest.flashinfer]


class Host:
    """Presents XLA's buffers as a GPU's: untouchable pages, labelled with the arguments' names."""

    def __init__(self, buffers: Buffers) -> None:
        self.sizes: dict[str, int] = {}
        self.device: Callable[[], int] | None = None  # whose number labels are to have, "output@3"
        self._buffers = buffers
        present_host_as(CUDA, STREAM, self._present)

    def _present(self, name: bytes, data: int, size: int) -> int:
        label = name.decode()
        self.sizes[label] = size
        if self.device is not None:
            label = f"{label}@{self.device()}"
        return self._buffers.reserve(label, size).address

    def label_workspace(self, case: Case, shape: Shape | None = None) -> None:
        """Labels what the closed form says is allocated in every workspace."""
        per_token = case.scheme == "per_token"
        for arena in [b for b in self._buffers if b.label.startswith("workspace")]:
            used, end = 0, arena.label.removeprefix("workspace")
            for label, size in RELEASE.workspace(shape or case.shape, per_token).items():
                start = -(-used // 256) * 256
                used = start + size
                if size:
                    self._buffers.add(label + end, arena.address + start, size)
            assert used == arena.size, (case, used, arena.size)


def recorded(case: Case, buffers: Buffers) -> tuple[Recording, Host]:
    """What one call from inside jit launches."""
    host = Host(buffers)
    program = jax.jit(partial(run_routed, FUNCTION_OF_MODULE, case.call()))
    arguments = case.arguments()
    runtime.clear()
    y = jax.block_until_ready(program(*arguments))
    assert y.shape == (case.tokens, case.hidden)
    host.label_workspace(case)
    return runtime.recording(buffers), host


def check(case: Case) -> None:
    """One call loads its kernels, on a stream that is thrown away, and launches them once."""
    with Buffers() as buffers:
        recording, host = recorded(case, buffers)
        loading = tuple(x for x in recording.launches if x.captured)
        launches = tuple(x for x in recording.launches if not x.captured)
        steps = ["routing", "gemm", "gemm", "finalize"]
        if case.scheme == "per_token":
            steps.insert(2, "quantize")
        for each in (loading, launches):
            found = [family(x) for x in each]
            # More tokens need more launches to be routed.
            routing = found.count("routing")
            assert found == ["routing"] * (routing - 1) + steps, (case, found)
            assert miswired(each, optional=case.optional) == [], (
                case,
                miswired(each, optional=case.optional),
            )
            assert {x.status for x in each} == {0}, case
        assert {x.stream for x in launches} == {STREAM}, case
        assert STREAM not in {x.stream for x in loading}, case
        assert recording.refused == recording.unknown == (), (case, recording.refused)
        # Written as wide as H, not as its padding.
        assert host.sizes["output"] == 2 * case.tokens * case.hidden, case


def check_all(cases: Iterable[Case]) -> None:
    checked = [case for case in cases if RELEASE.has_kernels(case.shape)]
    for case in checked:
        check(case)
    print(len(checked), "cases")


def check_models() -> None:
    check_all(models())


def check_sizes() -> None:
    check_all(sizes())


def check_forms() -> None:
    check_all(forms())


def check_a_byte_less() -> None:
    """The workspace is exactly enough."""
    enough = _trtllm_call.workspace_bytes
    for case in (Case(16, 8, 128, 2048, 768), Case(16, 4, 32, 512, 256, scheme="per_token")):
        _trtllm_call.workspace_bytes = lambda *args: enough(*args) - 1
        with Buffers() as buffers:
            host = Host(buffers)
            runtime.clear()
            program = jax.jit(partial(run_routed, FUNCTION_OF_MODULE, case.call()))
            try:
                jax.block_until_ready(program(*case.arguments()))
            except jax.errors.JaxRuntimeError as error:
                needed = host.sizes["workspace"] + 1
                assert "RESOURCE_EXHAUSTED" in str(error), error
                assert f"has {needed - 1} bytes, and at least {needed} are needed" in str(error)
            else:
                raise AssertionError("a byte less was enough")
            steps = [family(x) for x in runtime.recording(buffers).launches]
            assert "gemm" not in steps, steps
            assert "finalize" not in steps, steps
        _trtllm_call.workspace_bytes = enough


def main() -> None:
    host.register()
    library.register_module(
        MODULE, manifest.module, tvm_ffi=manifest.tvm_ffi, cubins=manifest.cubin_directory
    )
    globals()[f"check_{sys.argv[1]}"]()
    assert "torch" not in sys.modules
    assert "flashinfer" not in sys.modules
    print("done")


if __name__ == "__main__":
    main()
