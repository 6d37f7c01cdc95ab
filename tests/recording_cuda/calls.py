"""Calls of FlashInfer's MoE function that somebody else made, seen by the spy (spy.cpp).

    spy = Spy(read_manifest())            # Before the caller opens the module.
    ...                                   # The caller opens `manifest.spy` as its module.
    spy.clear()
    jax.jit(layer)(x).block_until_ready()
    (call,) = spy.calls(ARGUMENTS, WORKSPACE)
    assert call.operands["gemm1_weights"].shape == (128, 1536, 1024)
    assert miswired(call.launches) == []

Every tensor that the module got lay on reserved pages, not in the caller's memory. Labels are those
of the arguments and of the workspace, given as names in order.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from .buffers import Buffers
from .launches import Launch, Runtime, launch_of
from .manifest import Manifest
from .tvm_ffi import dtype_name


@dataclass(frozen=True)
class Operand:
    """A tensor that the function got or asked for.

    Attributes:
        caller_address: where the caller had it.
        address: the reserved pages that the function got instead; 0 for a refused allocation.
        bytes: its size.
        shape: its shape.
        strides: in elements, or None, which means contiguous.
        dtype: its type's name, "uint8".
        device_type: DLDeviceType; 2 is CUDA.
        device: its device's ordinal.
        byte_offset: where in the buffer it begins.
    """

    caller_address: int
    address: int
    bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    device_type: int
    device: int
    byte_offset: int


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        function: its symbol.
        thread: that called.
        status: what it returned; 0 is success.
        stream: TVM-FFI's stream at the time of the call.
        device: of its tensors.
        operands: the arguments that are tensors, by name.
        values: all others, None among them.
        allocations: the workspace that it got, by name, in order.
        refused_allocation: the request that the caller's allocator refused, if one.
        launches: what it launched.
    """

    function: str
    thread: str
    status: int
    stream: int
    device: int
    operands: dict[str, Operand]
    values: dict[str, object]
    allocations: dict[str, Operand]
    refused_allocation: Operand | None
    launches: tuple[Launch, ...]


class Spy:
    """The stand-in runtime and the spy, loaded into this process."""

    def __init__(self, manifest: Manifest) -> None:
        ctypes.CDLL(str(manifest.tvm_ffi), mode=ctypes.RTLD_GLOBAL)
        self.runtime = Runtime(manifest.runtime)
        self.library = ctypes.CDLL(str(manifest.spy))

    def clear(self) -> None:
        """Forgets everything so far. No call may be under way."""
        self.runtime.clear()
        self.library.rec_spy_release()

    def calls(self, arguments: Sequence[str], workspace: Sequence[str] = ()) -> list[Call]:
        """The calls that have returned, in the order in which they did.

        Args:
            arguments: what to call the arguments, in order; "argument 36" and on after those.
            workspace: what to call the allocations; "workspace 13" and on after those.
        """
        under_way: dict[str, list[dict]] = {}
        calls = []
        for entry in self.runtime.entries():
            thread = entry["thread"]
            if entry["call"] == "call_begin":
                under_way[thread] = []
            if thread in under_way:
                under_way[thread].append(entry)
            if entry["call"] == "call_end":
                calls.append(_call(under_way.pop(thread), arguments, workspace))
        return calls


def _call(entries: list[dict], arguments: Sequence[str], workspace: Sequence[str]) -> Call:
    begin, *between, end = entries
    operands: dict[str, Operand] = {}
    values: dict[str, object] = {}
    allocations: dict[str, Operand] = {}
    refused = None
    for entry in between:
        if entry["call"] == "argument":
            name = _name(arguments, entry["index"], "argument")
            if "address" in entry:
                operands[name] = _operand(entry)
            else:
                values[name] = entry["value"]
        elif entry["call"] == "allocation" and entry["status"] == 0:
            allocations[_name(workspace, len(allocations), "workspace")] = _operand(entry)
        elif entry["call"] == "allocation":
            refused = _operand(entry)
    with Buffers() as buffers:
        for label, operand in (operands | allocations).items():
            buffers.add(label, operand.address + operand.byte_offset, operand.bytes)
        launches = tuple(launch_of(e, buffers) for e in between if e["call"] == "launch")
    return Call(
        function=begin["function"],
        thread=begin["thread"],
        status=end["status"],
        stream=begin["stream"],
        device=begin["device"],
        operands=operands,
        values=values,
        allocations=allocations,
        refused_allocation=refused,
        launches=launches,
    )


def _name(names: Sequence[str], index: int, otherwise: str) -> str:
    return names[index] if index < len(names) else f"{otherwise} {index}"


def _operand(entry: dict) -> Operand:
    return Operand(
        caller_address=entry["caller_address"],
        address=entry["address"],
        bytes=entry["bytes"],
        shape=tuple(entry["shape"]),
        strides=None if entry["strides"] is None else tuple(entry["strides"]),
        dtype=dtype_name(entry["code"], entry["bits"], entry["lanes"]),
        device_type=entry["device_type"],
        device=entry["device"],
        byte_offset=entry["byte_offset"],
    )
