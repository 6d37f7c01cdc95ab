"""What the recording CUDA runtime wrote down, as Python objects with labelled pointers.

    runtime, module = load(read_manifest())
    runtime.clear()
    ...                                   # Whatever calls the module.
    recording = runtime.recording(buffers)
    assert [launch.kernel for launch in recording.launches] == [...]

The real libcudart.so.13 would win if it were loaded first, so `load` refuses to go on then: call it
before JAX, which loads the real one wherever its CUDA plugin is, on JAX_PLATFORMS=cpu too. In that
order both are mapped, and the module is bound to the stand-in.
"""

import ctypes
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import gemm_parameters
from .buffers import Buffers
from .manifest import Manifest

# driver_types.h cudaLaunchAttributeID, and cuda.h CUlaunchAttributeID: the same numbers.
_COOPERATIVE, _CLUSTER, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 4, 6
_ATTRIBUTE_BYTES = 64

# EncodedMap of runtime.cpp.
_MAP = struct.Struct("<Q8sQ8B5Q4Q5I")
_MAGIC = b"RECTMAP\0"


@dataclass(frozen=True)
class Pointer:
    """A value among a kernel's parameters that lies in a labelled buffer.

    Attributes:
        offset: where in the parameters, in bytes.
        label: the buffer's.
        distance: how far into the buffer, in bytes.
        field: for TRTLLM-Gen's GEMMs what the field is called, "ptrSfA"; "" for other kernels.
        in_tensor_map: whether it is the address of a tensor map.
    """

    offset: int
    label: str
    distance: int
    field: str
    in_tensor_map: bool


@dataclass(frozen=True)
class TensorMap:
    """A tensor map (cuTensorMapEncodeTiled) among a kernel's parameters.

    Attributes:
        offset: where in the parameters, in bytes.
        address: of the tensor.
        label: of the buffer that holds the address, or None.
        distance: how far into that buffer, in bytes.
        data_type: CUtensorMapDataType of cuda.h.
        dims: extents, the fastest first.
        strides: in bytes, of all dimensions but the first.
        box: extents of what one copy moves.
        swizzle: CUtensorMapSwizzle of cuda.h.
    """

    offset: int
    address: int
    label: str | None
    distance: int
    data_type: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        api: the function that launched it.
        name: the kernel's, mangled.
        status: what the launch returned; 0 is success.
        device: the current device's ordinal.
        stream: its handle.
        captured: whether the stream was being captured into a graph.
        grid: blocks.
        block: threads.
        cluster: blocks of a cluster; ones if none was asked for.
        shared_bytes: dynamic shared memory.
        pdl: whether programmatic dependent launch was allowed.
        cooperative: whether it was a cooperative launch.
        attributes: each launch attribute's number and value.
        parameters: the bytes of the parameters, or None if the kernel's image does not tell how
            large they are.
        pointers: the pointers into labelled buffers, including the addresses of tensor maps.
        tensor_maps: the tensor maps among the parameters.
    """

    api: str
    name: str
    status: int
    device: int
    stream: int
    captured: bool
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    pdl: bool
    cooperative: bool
    attributes: tuple[tuple[int, bytes], ...]
    parameters: bytes | None
    pointers: tuple[Pointer, ...]
    tensor_maps: tuple[TensorMap, ...]

    @property
    def kernel(self) -> str:
        """The kernel's own name, without namespaces and template arguments."""
        return own_name(self.name)

    @property
    def labels(self) -> frozenset[str]:
        """Which buffers it gets."""
        return frozenset(pointer.label for pointer in self.pointers)


@dataclass(frozen=True)
class Refusal:
    """A call that would have allocated, copied, set or waited."""

    api: str
    bytes: int
    stream: int


@dataclass(frozen=True)
class ModuleLoad:
    """A prebuilt kernel's image handed to the driver."""

    status: int
    device: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Recording:
    """Everything since the last `clear`.

    Attributes:
        launches: in order.
        refused: calls that a path which is safe in a CUDA graph never makes.
        module_loads: prebuilt kernels loaded.
        unknown: what the stand-in was asked for and does not have.
        entries: all, as written.
    """

    launches: tuple[Launch, ...]
    refused: tuple[Refusal, ...]
    module_loads: tuple[ModuleLoad, ...]
    unknown: tuple[str, ...]
    entries: tuple[dict, ...]


def own_name(mangled: str) -> str:
    """The last name in the Itanium mangling of a function; an unmangled name as it is."""
    if not mangled.startswith("_Z"):
        return mangled
    at = 3 if mangled.startswith("_ZN") else 2
    name = mangled
    while number := re.match(r"\d+", mangled[at:]):
        begin = at + number.end()
        at = begin + int(number[0])
        name = mangled[begin:at]
    return name


class Runtime:
    """The stand-in, loaded into this process."""

    def __init__(self, path: Path) -> None:
        others = {name for name in mapped("libcudart.so") if name != os.path.realpath(path)}
        if others:
            names = ", ".join(sorted(others))
            raise RuntimeError(f"another CUDA runtime is loaded, too early: {names}")
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.library.rec_count.restype = ctypes.c_uint64
        self.library.rec_fetch.restype = ctypes.c_int64
        self.library.rec_fetch.argtypes = [ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint64]
        self.library.rec_use_cubins.argtypes = [ctypes.c_char_p, ctypes.c_void_p]

    def use_cubins(self, module: ctypes.CDLL, directory: Path) -> None:
        """Lets a FlashInfer module take its prebuilt kernels from a directory.

        Only for callers that set no cubin callback of their own.
        """
        set_current = ctypes.cast(module.FlashInferSetCurrentCubin, ctypes.c_void_p)
        self.library.rec_use_cubins(os.fsencode(directory), set_current)
        callback = ctypes.cast(self.library.rec_cubin_callback, ctypes.c_void_p)
        module.FlashInferSetCubinCallback(callback)

    def clear(self) -> None:
        self.library.rec_clear()

    def entries(self) -> list[dict]:
        """What was written down since the last `clear`, oldest first."""
        entries = []
        for index in range(self.library.rec_count()):
            size = self.library.rec_fetch(index, None, 0)
            if size < 0:  # Cleared meanwhile.
                break
            line = ctypes.create_string_buffer(size)
            self.library.rec_fetch(index, line, size)
            entries.append(json.loads(line.raw))
        return entries

    def recording(self, buffers: Buffers) -> Recording:
        """The same, as objects; the pointers are told by `buffers`."""
        entries = self.entries()
        by_call: dict[str, list[dict]] = {}
        for entry in entries:
            by_call.setdefault(entry["call"], []).append(entry)
        unknown = [
            f"device attribute {e['attribute']}" for e in by_call.get("unknown_attribute", ())
        ]
        unknown += [f"symbol {e['symbol']}" for e in by_call.get("unknown_symbol", ())]
        return Recording(
            launches=tuple(launch_of(e, buffers) for e in by_call.get("launch", ())),
            refused=tuple(
                Refusal(e["api"], e["bytes"], e["stream"]) for e in by_call.get("refused", ())
            ),
            module_loads=tuple(
                ModuleLoad(e["status"], e["device"], e.get("bytes", 0), e.get("sha256", ""))
                for e in by_call.get("module_load", ())
            ),
            unknown=tuple(unknown),
            entries=tuple(entries),
        )


def load(manifest: Manifest) -> tuple[Runtime, ctypes.CDLL]:
    """Loads libtvm_ffi, the stand-in and FlashInfer's module, in the order they need."""
    # FlashInfer's modules do not name libtvm_ffi as a dependency.
    ctypes.CDLL(str(manifest.tvm_ffi), mode=ctypes.RTLD_GLOBAL)
    runtime = Runtime(manifest.runtime)
    return runtime, ctypes.CDLL(str(manifest.module))


def load_cute_dsl(manifest: Manifest) -> Runtime:
    """Loads libtvm_ffi, the stand-in and CuTe-DSL's runtime on it, before the module that has
    CuTe-DSL's kernels: it finds them by their names."""
    assert manifest.cute_dsl is not None
    ctypes.CDLL(str(manifest.tvm_ffi), mode=ctypes.RTLD_GLOBAL)
    runtime = Runtime(manifest.runtime)
    ctypes.CDLL(str(manifest.cute_dsl.runtime), mode=ctypes.RTLD_GLOBAL)
    return runtime


def mapped(name: str) -> set[str]:
    """The files with this in their name that are mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return {path for path in paths if name in Path(path).name}


def launch_of(entry: dict, buffers: Buffers) -> Launch:
    """A launch as it was written down."""
    values = bytes.fromhex(entry["attribute_values"])
    attributes = tuple(
        (number, values[i * _ATTRIBUTE_BYTES : (i + 1) * _ATTRIBUTE_BYTES])
        for i, number in enumerate(entry["attribute_ids"])
    )
    by_number = dict(attributes)

    def integer(number: int) -> int:
        return int.from_bytes(by_number.get(number, b"")[:4], "little")

    cluster = struct.unpack("<3I", by_number[_CLUSTER][:12]) if _CLUSTER in by_number else (1, 1, 1)
    text = entry["parameter_bytes"]
    parameters = None if text is None else bytes.fromhex(text)
    maps = _tensor_maps(parameters or b"", set(entry["fresh_maps"]), buffers)
    return Launch(
        api=entry["api"],
        name=entry["name"],
        status=entry["status"],
        device=entry["device"],
        stream=entry["stream"],
        captured=bool(entry["captured"]),
        grid=tuple(entry["grid"]),
        block=tuple(entry["block"]),
        cluster=cluster,
        shared_bytes=entry["shared_bytes"],
        pdl=bool(integer(_PROGRAMMATIC_STREAM_SERIALIZATION)),
        cooperative=bool(integer(_COOPERATIVE)),
        attributes=attributes,
        parameters=parameters,
        pointers=_pointers(entry["name"], parameters or b"", {m.offset for m in maps}, buffers),
        tensor_maps=maps,
    )


def _pointers(
    name: str, parameters: bytes, maps: set[int], buffers: Buffers
) -> tuple[Pointer, ...]:
    words = np.frombuffer(parameters, np.uint64, len(parameters) // 8)
    found = buffers.find_all(words)
    is_gemm = gemm_parameters.describes(name, len(parameters))
    pointers = []
    for index, (buffer, distance) in found.items():
        offset = 8 * index
        field = gemm_parameters.field_at(offset) if is_gemm else ""
        if field is None or (field.startswith("tma") and offset not in maps):
            continue  # What the stack held before.
        if not is_gemm and distance % 4:
            continue  # The same, with flags over its first bytes: nothing is read from there.
        pointers.append(Pointer(offset, buffer.label, distance, field, offset in maps))
    return tuple(pointers)


def _tensor_maps(parameters: bytes, fresh: set[int], buffers: Buffers) -> tuple[TensorMap, ...]:
    maps = []
    for found in re.finditer(re.escape(_MAGIC), parameters):
        offset = found.start() - 8  # The address comes first.
        if offset < 0 or offset + _MAP.size > len(parameters):
            continue
        address, _, serial, data_type, rank, _, swizzle, *rest = _MAP.unpack_from(
            parameters, offset
        )
        if serial not in fresh:
            continue  # Of an earlier call, left over on the stack.
        dims, strides, box = rest[4:9], rest[9:13], rest[13:18]
        owner = buffers.find(address)
        maps.append(
            TensorMap(
                offset=offset,
                address=address,
                label=owner[0].label if owner else None,
                distance=owner[1] if owner else 0,
                data_type=data_type,
                dims=tuple(dims[:rank]),
                strides=tuple(strides[: rank - 1]),
                box=tuple(box[:rank]),
                swizzle=swizzle,
            )
        )
    return tuple(maps)
