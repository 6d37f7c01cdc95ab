"""How tests have the bridge present XLA's buffers of the host."""

import ctypes

from jax_nvfp4_moe.bridge import library

CPU, CUDA = 1, 2  # DLPack's kDLCPU and kDLCUDA

# (argument's name, address, bytes) -> the address to present.
_ADDRESS = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
_kept = []  # what the library holds the address of


def present_host_as(device_type, stream=0, address=None):
    """Says where buffers are, on which stream, and what other addresses they have."""
    function = library._open().jax_nvfp4_moe_present_host_as
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, _ADDRESS]
    callback = _ADDRESS() if address is None else _ADDRESS(address)
    function(device_type, stream, callback)
    _kept[:] = [callback]
