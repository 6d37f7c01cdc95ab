"""FlashInfer's CuTe-DSL kernels, called by the package's own bridge from inside `jax.jit`.

`python -m tests.recording_cuda.cute_dsl_from_jit NAME` runs one check; test_cute_dsl_from_jit.py
runs them all. In a process of its own, and the stand-in runtimes are loaded before JAX, which may
load real ones.
"""

import ctypes
import dataclasses
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from .launches import Launch, Recording, load_cute_dsl, mapped
from .manifest import read_manifest
from .xla_flags import DEVICES

manifest = read_manifest()
runtime = load_cute_dsl(manifest)

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

from jax_nvfp4_moe import layouts  # noqa: E402
from jax_nvfp4_moe.bridge import cute_dsl, library  # noqa: E402
from jax_nvfp4_moe.bridge.cute_dsl import TACTICS, Tactic, Variant  # noqa: E402
from jax_nvfp4_moe.implementations.cute_dsl.call import Functions, run_routed  # noqa: E402
from tests.support import host  # noqa: E402
from tests.support.host import CUDA, present_host_as  # noqa: E402

from .buffers import Buffers  # noqa: E402
from .cases import MODELS, Case  # noqa: E402
from .cute_dsl_parameters import Sizes, gemm1, gemm2, misshapen, miswired  # noqa: E402

STREAM = 0x51EA0000
MODULE = "recorded"
ALL = TACTICS["all"]
# What each call of a function by a new program does besides loading: it launches on a stream that
# is recorded and thrown away, then on XLA's.
FIRST = ["stream_create", "capture_begin", "launch", "capture_end", "stream_destroy", "launch"]
loaded: set[str] = set()  # functions whose kernels have to be there


def functions(tactic: Tactic) -> Functions:
    return Functions(MODULE, manifest.arch, Variant(), tactic)


@dataclasses.dataclass(frozen=True)
class Argument:
    """A buffer of XLA's.

    Attributes:
        address: the address that is passed on: a page that cannot be accessed.
        data: the address of its data.
        size: in bytes.
    """

    address: int
    data: int
    size: int

    def is_zero(self) -> bool:
        contents = (ctypes.c_uint8 * self.size).from_address(self.data)
        return not np.frombuffer(contents, np.uint8).any()


class Host:
    """Presents XLA's buffers as a GPU's, and keeps the arguments of each call, by device."""

    def __init__(self, buffers: Buffers) -> None:
        self.calls: dict[int, list[dict[str, Argument]]] = defaultdict(list)
        self._buffers = buffers
        present_host_as(CUDA, STREAM, self._present)

    def _present(self, name: bytes, data: int, size: int) -> int:
        label = name.decode()
        ordinal = ctypes.c_int()
        assert runtime.library.cudaGetDevice(ctypes.byref(ordinal)) == 0
        calls = self.calls[ordinal.value]
        if not calls or "workspace" in calls[-1]:  # which is the last of each
            calls.append({})
        argument = Argument(self._buffers.reserve(label, size).address, data, size)
        if label == "output":
            assert argument.is_zero()  # the kernel adds to it
        calls[-1][label] = argument
        return argument.address


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run of a program did.

    Attributes:
        recording: what was recorded.
        calls: the arguments of every call, by device.
    """

    recording: Recording
    calls: dict[int, list[dict[str, Argument]]]

    @property
    def steps(self) -> list[str]:
        return [entry["call"] for entry in self.recording.entries]


def run(program: Callable[..., jax.Array], arguments: tuple) -> Run:
    with Buffers() as buffers:
        host = Host(buffers)
        runtime.clear()
        y = jax.block_until_ready(program(*arguments))
        assert y.shape == arguments[0].shape
        recording = runtime.recording(buffers)
    assert recording.refused == recording.unknown == (), (recording.refused, recording.unknown)
    return Run(recording, host.calls)


def sizes_of(case: Case, tactic: Tactic) -> Sizes:
    hidden, intermediate = layouts.padded_sizes(
        "cute_dsl", case.hidden, case.intermediate, gated=True
    )
    return Sizes(case.tokens, case.top_k, case.experts, hidden, intermediate, tactic)


def check_launches(
    launches: Iterable[Launch],
    calls: list[dict[str, Argument]],
    case: Case,
    tactics: Iterable[Tactic],
) -> None:
    """Both kernels of each tactic, one after the other, get what they are to get."""
    launches = tuple(launches)
    of = [(tactic, first) for tactic in tactics for first in (True, False)]
    assert len(launches) == len(calls) == len(of), (case, len(launches), len(calls))
    written: dict[str, Argument] = {}
    for launch, call, (tactic, first) in zip(launches, calls, of, strict=True):
        sizes = sizes_of(case, tactic)
        names = (cute_dsl.gemm1_parameters if first else cute_dsl.gemm2_parameters)(Variant())
        items = (gemm1 if first else gemm2)(sizes)
        assert {item.name for item in items} - {None} == set(names), names
        wrong = misshapen(launch, sizes, first=first)
        wrong += miswired(launch, items, {name: call[name].address for name in names})
        assert wrong == [], (case, tactic, wrong)
        assert call["workspace"].size == 0
        if first:
            written = call
        else:  # It reads what the other wrote.
            for a, out in {"a": "out", "a_scale": "out_scale"}.items():
                assert call[a].data == written[out].data, (case, tactic, a)
            for same in set(call) & set(written) - {"workspace", "alpha"}:
                assert call[same].data == written[same].data, (case, tactic, same)


def check(case: Case, tactics: tuple[Tactic, ...], arguments: tuple | None = None) -> None:
    """Layers of some tactics, run twice: kernels are loaded once, outside of XLA's own stream."""

    def layers(x: jax.Array, *others: Any) -> jax.Array:
        for tactic in tactics:
            x = run_routed(functions(tactic), case.call(), x, *others)
        return x

    program = jax.jit(layers)
    arguments = arguments or case.arguments()
    names = [name for tactic in tactics for name in functions(tactic).names]

    first = run(program, arguments)
    steps = first.steps
    loads = [index for index, step in enumerate(steps) if step == "module_load"]
    assert len(loads) == len(first.recording.module_loads) == len(set(names) - loaded), case
    loaded.update(names)
    assert all(steps[index - 1] == "capture_begin" for index in loads), steps
    assert {load.status for load in first.recording.module_loads} <= {0}, case
    assert [step for step in steps if step != "module_load"] == FIRST * len(names), steps
    modes = {e["mode"] for e in first.recording.entries if e["call"] == "capture_begin"}
    assert modes == {2}, modes  # cudaStreamCaptureModeRelaxed, in which kernels may be loaded
    launches, calls = first.recording.launches, first.calls[0]
    for captured, each in ((True, launches[::2]), (False, launches[1::2])):
        assert {launch.captured for launch in each} == {captured}
        check_launches(each, calls[not captured :: 2], case, tactics)
    assert STREAM not in {launch.stream for launch in launches[::2]}
    assert {launch.stream for launch in launches[1::2]} == {STREAM}

    again = run(program, arguments)
    assert again.steps == ["launch"] * len(names), again.steps
    assert {launch.stream for launch in again.recording.launches} == {STREAM}
    check_launches(again.recording.launches, again.calls[0], case, tactics)


def check_tactics() -> None:
    """A layer of each, one after the other; the function of each GEMM is loaded once."""
    check(Case(16, 8, 128, 2048, 768, layout="cute_dsl"), ALL)
    assert loaded == set(manifest.cute_dsl.functions), loaded


TACTIC = itertools.cycle(ALL)


def next_tactic(case: Case) -> Tactic:
    """Another one that a case's sizes allow."""
    sizes = sizes_of(case, ALL[0])
    return next(t for t in TACTIC if t.fits(sizes.hidden, sizes.intermediate, gated=True))


def check_models() -> None:
    for hidden, intermediate, experts, top_k in MODELS.values():
        case = Case(300, top_k, experts, hidden, intermediate, layout="cute_dsl")
        *inputs, weights = case.arguments()
        check(case, (next_tactic(case),), (*inputs, weights))
        case = dataclasses.replace(case, tokens=1)
        check(case, (next_tactic(case),), (*(each[:1] for each in inputs), weights))


def check_sizes() -> None:
    for case in sizes():
        check(case, (next_tactic(case),))


def sizes() -> Iterator[Case]:
    base = Case(16, 8, 64, 512, 256, layout="cute_dsl")
    for tokens in (1, 2, 5, 17, 64, 257, 1024, 4096, 8192):
        yield dataclasses.replace(base, tokens=tokens)
    for experts in (1, 3, 72, 160, 256):
        yield dataclasses.replace(base, experts=experts, top_k=min(4, experts))
    for hidden, intermediate in ((16, 16), (272, 176), (688, 80), (256, 64)):
        yield Case(7, 2, 8, hidden, intermediate, layout="cute_dsl")
    yield Case(1, 1, 1, 16, 16, layout="cute_dsl")  # fewer clusters than there is room for
    yield Case(3, 2, 4, 512, 128, layout="linear")  # prepared inside jit


def check_shares() -> None:
    """Experts that are split over devices: each launches with what is its own."""
    whole = Case(16, 8, 4 * DEVICES, 512, 256, layout="cute_dsl")
    own = dataclasses.replace(whole, experts=whole.experts // DEVICES)
    arguments = whole.arguments()
    mesh = jax.make_mesh((DEVICES,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.tree.map(lambda leaf: PartitionSpec(*["expert"][: leaf.ndim]), arguments[3])
    everywhere = PartitionSpec()
    call = dataclasses.replace(whole.call(), axis_name="expert")
    tactic = Tactic(256, 256, 256, 2)
    program = jax.jit(
        jax.shard_map(
            partial(run_routed, functions(tactic), call),
            mesh=mesh,
            in_specs=(everywhere,) * 3 + (split,),
            out_specs=everywhere,
        )
    )
    found = run(program, arguments)
    assert len(found.recording.module_loads) == 2  # for all devices at once
    for device in range(DEVICES):
        launches = [launch for launch in found.recording.launches if launch.device == device]
        for captured in (True, False):
            each = [launch for launch in launches if launch.captured == captured]
            check_launches(each, found.calls[device][not captured :: 2], own, (tactic,))


def check_miswired() -> None:
    """What is exchanged is seen: in what a kernel gets, in its form, in its sizes."""
    case, tactic = Case(16, 4, 8, 512, 256, layout="cute_dsl"), Tactic()
    parameters = cute_dsl.gemm1_parameters

    def failed() -> bool:
        try:
            check(case, (tactic,))
        except AssertionError as error:
            return "instead of" in str(error)
        return False

    def exchanged(variant: Variant, names: tuple[str, str]) -> tuple[str, ...]:
        other = dict(zip(names, reversed(names), strict=True))
        return tuple(other.get(name, name) for name in parameters(variant))

    for names in (("tile_idx_to_expert_idx", "tile_idx_to_mn_limit"), ("alpha", "fc2_input_scale")):
        # Of the second pair shapes differ, unless there is one expert.
        case = dataclasses.replace(case, experts=1 if "alpha" in names else 8, top_k=1)
        cute_dsl.gemm1_parameters = partial(exchanged, names=names)
        assert failed(), names
    cute_dsl.gemm1_parameters = parameters
    assert not failed()
    found = run(jax.jit(partial(run_routed, functions(tactic), case.call())), case.arguments())
    launch, call = found.recording.launches[1], found.calls[0][1]
    addresses = {name: argument.address for name, argument in call.items()}
    sizes = sizes_of(case, tactic)
    assert miswired(launch, gemm1(sizes), addresses) == []
    assert misshapen(launch, sizes, first=True) == []
    for change in ({"tokens": 17}, {"hidden": 768}, {"intermediate": 512}, {"experts": 2}):
        assert miswired(launch, gemm1(dataclasses.replace(sizes, **change)), addresses), change
    assert misshapen(launch, dataclasses.replace(sizes, tactic=Tactic(256)), first=True)
    assert misshapen(launch, sizes, first=False)


def main(checks: Mapping[str, Any]) -> None:
    host.register()
    library.register_module(MODULE, manifest.cute_dsl.module, tvm_ffi=manifest.tvm_ffi)
    checks[f"check_{sys.argv[1]}"]()
    # Nothing was compiled for a call, nor can anything be.
    assert not {"cutlass", "flashinfer", "torch", "tvm_ffi"} & set(sys.modules)
    (only,) = mapped("libcute_dsl_runtime.so")
    assert manifest.cute_dsl.runtime.samefile(only), only
    print("done")


if __name__ == "__main__":
    main(globals())
