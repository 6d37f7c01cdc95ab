"""Calls TVM-FFI functions with labelled buffers, through the C ABI, without torch or tvm_ffi.

The structures are those of apache-tvm-ffi 0.1.15: tvm/ffi/c_api.h and dlpack/dlpack.h (1.x).
"""

import contextlib
import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

from .buffers import Buffer, Buffers

_CUDA = 2  # kDLCUDA
_NONE, _INT, _BOOL, _FLOAT, _TENSOR, _FIRST_OBJECT = 0, 1, 2, 3, 7, 64  # TVMFFITypeIndex

# DLDataTypeCode and bits.
DTYPES = {
    "int8": (0, 8),
    "int16": (0, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "float32": (2, 32),
    "bfloat16": (4, 16),
    "float8_e4m3fn": (10, 8),
}
_NAMES = {value: name for name, value in DTYPES.items()}


def dtype_name(code: int, bits: int, lanes: int = 1) -> str:
    """What numpy or ml_dtypes calls a DLDataType; its numbers if it has no name here."""
    if lanes == 1 and (code, bits) in _NAMES:
        return _NAMES[code, bits]
    return f"code {code}, {bits} bits, {lanes} lanes"


class DLDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


class Any(ctypes.Structure):
    """TVMFFIAny."""

    _fields_ = (("type", ctypes.c_int32), ("zero", ctypes.c_uint32), ("value", ctypes.c_uint64))


class ByteArray(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Error(ctypes.Structure):
    """TVMFFIObject, and the begin of the TVMFFIErrorCell after it."""

    _fields_ = (("header", ctypes.c_char * 24), ("kind", ByteArray), ("message", ByteArray))


_SetError = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
_Allocator = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(DLTensor),
    ctypes.POINTER(ctypes.POINTER(DLManagedTensorVersioned)),
    ctypes.c_void_p,
    _SetError,
)


@dataclass(frozen=True)
class Tensor:
    """An operand: a buffer seen as a contiguous array on a CUDA device."""

    buffer: Buffer
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def reserve(cls, buffers: Buffers, label: str, shape: tuple[int, ...], dtype: str) -> "Tensor":
        size = math.prod(shape) * DTYPES[dtype][1] // 8
        return cls(buffers.reserve(label, size), shape, dtype)


@dataclass(frozen=True)
class Allocation:
    """One request of the callee's for workspace."""

    label: str
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    device: int


class CalleeError(Exception):
    """What a TVM-FFI function raised.

    Attributes:
        kind: its class, "RuntimeError".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Caller:
    """Calls functions on one device and stream.

    Workspace that they ask for comes from `buffers`, labelled with `names` in order, and with
    "workspace 13" and on after those.

    Attributes:
        allocations: the requests of the last call, in order.
        limit: how many bytes a call may ask for in all.
    """

    def __init__(
        self,
        libtvm_ffi: Path,
        buffers: Buffers,
        stream: int,
        device: int = 0,
        names: tuple[str, ...] = (),
        limit: int | None = None,
    ) -> None:
        self.library = ctypes.CDLL(str(libtvm_ffi), mode=ctypes.RTLD_GLOBAL)
        self.buffers, self.stream, self.device = buffers, stream, device
        self.names, self.limit = names, limit
        self.allocations: list[Allocation] = []
        self._allocator = _Allocator(self._allocate)
        # What the callee may still hold: it frees through a null deleter, which does nothing.
        self._kept: list[object] = []

    def call(self, function: "ctypes._FuncPointer", *args: object) -> None:
        """Calls a `__tvm_ffi_` symbol and drops its result.

        Args:
            function: the symbol, of a ctypes library.
            args: None, bool, int, float, Tensor, or a list of int.

        Raises:
            CalleeError: the function failed.
        """
        self.allocations.clear()
        self._kept.clear()
        packed = (Any * len(args))(*[self._pack(arg) for arg in args])
        result = Any()
        with self._environment():
            status = function(None, packed, len(args), ctypes.byref(result))
        try:
            self._check(status)
        finally:
            for value in [*packed, result]:
                self._release(value)

    @contextlib.contextmanager
    def _environment(self):
        """Sets stream and allocator, both per thread, and puts back what was there."""
        stream, allocator = ctypes.c_void_p(), ctypes.c_void_p()
        set_stream = self.library.TVMFFIEnvSetStream
        set_allocator = self.library.TVMFFIEnvSetDLPackManagedTensorAllocator
        set_stream(_CUDA, self.device, ctypes.c_void_p(self.stream), ctypes.byref(stream))
        set_allocator(self._allocator, 0, ctypes.byref(allocator))
        try:
            yield
        finally:
            set_allocator(allocator, 0, None)
            set_stream(_CUDA, self.device, stream, None)

    def _pack(self, arg: object) -> Any:
        match arg:
            case None:
                return Any(_NONE)
            case bool():
                return Any(_BOOL, 0, int(arg))
            case int():
                return Any(_INT, 0, arg & (1 << 64) - 1)
            case float():
                return Any(_FLOAT, 0, ctypes.c_uint64.from_buffer(ctypes.c_double(arg)).value)
            case Tensor():
                return Any(_TENSOR, 0, ctypes.addressof(self._dl_tensor(arg)))
            case list():
                return self._array(arg)
        raise TypeError(f"no TVM-FFI value for {arg!r}")

    def _dl_tensor(self, tensor: Tensor) -> DLTensor:
        code, bits = DTYPES[tensor.dtype]
        shape = (ctypes.c_int64 * len(tensor.shape))(*tensor.shape)
        made = DLTensor(
            data=tensor.buffer.address,
            device=DLDevice(_CUDA, self.device),
            ndim=len(tensor.shape),
            dtype=DLDataType(code, bits, 1),
            shape=shape,
        )
        self._kept += [shape, made]
        return made

    def _array(self, values: list[int]) -> Any:
        """An Array object, made by TVM-FFI's own function for it."""
        name = b"ffi.Array"
        function = ctypes.c_void_p()
        text = ByteArray(ctypes.cast(name, ctypes.c_void_p), len(name))
        self._check(
            self.library.TVMFFIFunctionGetGlobal(ctypes.byref(text), ctypes.byref(function))
        )
        packed = (Any * len(values))(*[self._pack(value) for value in values])
        result = Any()
        status = self.library.TVMFFIFunctionCall(
            function, packed, len(values), ctypes.byref(result)
        )
        self.library.TVMFFIObjectDecRef(function)
        self._check(status)
        return result

    def _release(self, value: Any) -> None:
        if value.type >= _FIRST_OBJECT:
            self.library.TVMFFIObjectDecRef(ctypes.c_void_p(value.value))

    def _check(self, status: int) -> None:
        if status == 0:
            return
        handle = ctypes.c_void_p()
        self.library.TVMFFIErrorMoveFromRaised(ctypes.byref(handle))
        error = Error.from_address(handle.value)
        kind, message = (
            ctypes.string_at(text.data, text.size).decode() for text in (error.kind, error.message)
        )
        self.library.TVMFFIObjectDecRef(handle)
        raise CalleeError(kind, message)

    def _allocate(self, prototype, out, context, set_error) -> int:
        wanted = prototype.contents
        shape = tuple(wanted.shape[: wanted.ndim])
        size = math.prod(shape) * wanted.dtype.bits * wanted.dtype.lanes // 8
        asked = size + sum(allocation.bytes for allocation in self.allocations)
        if self.limit is not None and asked > self.limit:
            message = f"workspace: {asked} bytes wanted, {self.limit} given"
            set_error(context, b"MemoryError", message.encode())
            return -1
        count = len(self.allocations)
        label = self.names[count] if count < len(self.names) else f"workspace {count}"
        name = dtype_name(wanted.dtype.code, wanted.dtype.bits, wanted.dtype.lanes)
        self.allocations.append(Allocation(label, size, shape, name, wanted.device.id))
        kept = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        made = DLManagedTensorVersioned(
            major=1,
            tensor=DLTensor(
                data=self.buffers.reserve(label, size).address,
                device=wanted.device,
                ndim=wanted.ndim,
                dtype=wanted.dtype,
                shape=kept,
            ),
        )
        self._kept += [kept, made]
        out[0] = ctypes.pointer(made)
        return 0
