"""Calls of a module's function with tensors that say they are a GPU's, where there is none.

They point into the host's memory: for functions that check tensors before they launch anything.
"""

import ctypes

from tests.support.host import CUDA

# DLPack's type codes, and widths.
TYPES = {
    "uint8": (1, 8),
    "int32": (0, 32),
    "float32": (2, 32),
    "bfloat16": (4, 16),
    "e4m3": (10, 8),
}
DL_TENSOR_POINTER = 7  # kTVMFFIDLTensorPtr


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Value(ctypes.Structure):
    """TVMFFIAny."""

    _fields_ = (("type", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_void_p))


class Error(ctypes.Structure):
    """TVMFFIObject, and of TVMFFIErrorCell what is read."""

    _fields_ = (
        ("header", ctypes.c_byte * 24),
        ("kind", ctypes.c_char_p),
        ("kind_size", ctypes.c_size_t),
        ("message", ctypes.c_void_p),
        ("message_size", ctypes.c_size_t),
    )


def _strides(shape):
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return strides


def call_on_no_device(module, name, tensors, offset=0):
    """What a call raises: the error's kind and text.

    Args:
        module: as in the manifest.
        name: the function.
        tensors: of each the type and the shape.
        offset: bytes that the first is off an address that is divisible by 256.
    """
    tvm_ffi = ctypes.CDLL(str(module.tvm_ffi))
    function = getattr(ctypes.CDLL(str(module.path)), f"__tvm_ffi_{name}")
    memory = ctypes.create_string_buffer(1 << 20)
    start = -(-ctypes.addressof(memory) // 256) * 256
    kept, values = [], (Value * len(tensors))()
    for index, (dtype, *shape) in enumerate(tensors):
        integers = ctypes.c_int64 * len(shape)
        tensor = DLTensor(
            start + (offset if index == 0 else 0),
            (ctypes.c_int32 * 2)(CUDA, 0),
            len(shape),
            *TYPES[dtype],
            1,
            integers(*shape),
            integers(*_strides(shape)),
            0,
        )
        kept.append(tensor)
        values[index] = Value(DL_TENSOR_POINTER, 0, ctypes.addressof(tensor))
    returned = Value()
    status = function(None, values, len(tensors), ctypes.byref(returned))
    assert status != 0, f"{name} ran where there is no device"
    raised = ctypes.c_void_p()
    tvm_ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(raised))
    error = Error.from_address(raised.value)
    return error.kind.decode(), ctypes.string_at(error.message, error.message_size).decode()
