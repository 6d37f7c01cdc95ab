"""Labelled "device" memory: addresses that host code may pass on and must not touch."""

import ctypes
import errno
import itertools
import mmap
from dataclasses import dataclass

import numpy as np

_PROT_NONE = 0  # sys/mman.h; the mmap module has no name for it.
_MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x4000, 0x100000  # asm-generic/mman.h

# Where buffers are reserved: each begins 2 GiB past a multiple of 4 GiB, in a part of the address
# space that nothing else is mapped to. Kernels' parameters have words of which one half is a small
# number and the other padding, which holds whatever the stack held, half a pointer for example.
# Such a word lies less than 2 GiB past its 4 GiB, so it is not taken for an address of a buffer.
_SLOTS = range(0x1000, 0x3000)  # spy.cpp has those after.
_BEGIN = 1 << 31
_slots = itertools.cycle(_SLOTS)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True)
class Buffer:
    """A range of addresses with a name."""

    label: str
    address: int
    size: int


class Buffers:
    """A set of labelled ranges, to tell where an address points.

    Ranges may lie within each other; an address belongs to the smallest that holds it, and of equal
    ones to the last that was added.
    """

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self._mapped: list[tuple[int, int]] = []

    def reserve(self, label: str, size: int) -> Buffer:
        """Returns new pages that cannot be read or written: an access ends the process.

        They take no memory, regardless of their size. An unmapped page follows them, so that no
        other buffer begins where they end.
        """
        length = (-(-max(size, 1) // mmap.PAGESIZE) + 1) * mmap.PAGESIZE
        address = _map_somewhere(length)
        self._mapped.append((address, length))
        return self.add(label, address, size)

    def add(self, label: str, address: int, size: int) -> Buffer:
        """Labels memory of somebody else's, for example an array of XLA's."""
        buffer = Buffer(label, address, size)
        self._buffers.append(buffer)
        return buffer

    def find(self, address: int) -> tuple[Buffer, int] | None:
        """The buffer that an address lies in and how far, or None."""
        found = self.find_all(np.array([address], np.uint64))
        return next(iter(found.values()), None)

    def find_all(self, values: np.ndarray) -> dict[int, tuple[Buffer, int]]:
        """For each of `values`, uint64, that lies in a buffer: its index, the buffer, how far."""
        owners: dict[int, Buffer] = {}
        for buffer in self._buffers:
            # An empty buffer has an address nevertheless.
            end = buffer.address + max(buffer.size, 1)
            inside = (values >= np.uint64(buffer.address)) & (values < np.uint64(end))
            for index in np.flatnonzero(inside).tolist():
                if index not in owners or buffer.size <= owners[index].size:
                    owners[index] = buffer
        return {
            index: (owner, int(values[index]) - owner.address)
            for index, owner in sorted(owners.items())
        }

    def __iter__(self):
        return iter(self._buffers)

    def close(self) -> None:
        """Unmaps what was reserved, and forgets all."""
        for address, length in self._mapped:
            _libc.munmap(address, length)
        self._mapped.clear()
        self._buffers.clear()

    def __enter__(self) -> "Buffers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _map_somewhere(length: int) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED_NOREPLACE
    for slot in itertools.islice(_slots, len(_SLOTS)):
        wanted = (slot << 32) + _BEGIN
        address = _libc.mmap(wanted, length, _PROT_NONE, flags, -1, 0)
        if address == wanted:
            return address
        if ctypes.get_errno() != errno.EEXIST:
            raise OSError(ctypes.get_errno(), f"mmap of {length} bytes at {wanted:#x}")
    raise MemoryError(f"no room for a buffer of {length} bytes: were earlier ones closed?")
