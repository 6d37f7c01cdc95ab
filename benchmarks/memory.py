"""The memory of this process, as Linux counts it."""

import contextlib
import ctypes
import os
from pathlib import Path

STATUS = Path("/proc/self/status")


def status(name):
    """Returns a line of /proc/self/status, in bytes."""
    return int(STATUS.read_text().split(f"{name}:")[1].split()[0]) * 1024


def peak_of(function):
    """Returns by how many bytes a function raises the resident size at its peak."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's
        libc.malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    function()
    return max(0, status("VmHWM") - before)


@contextlib.contextmanager
def returned_at_once():
    """Makes processes started in this context return freed memory at once, if they use glibc.

    Otherwise a call finds what an earlier one left, and seems to need none. It is slower: such
    processes are not timed.
    """
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(128 << 10)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
