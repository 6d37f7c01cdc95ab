"""The recording CUDA runtime, under FlashInfer's own launcher. `build.py` says what it needs."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from . import manifest
from .buffers import Buffers
from .launches import own_name

ROOT = Path(__file__).parents[2]


VERSIONS = [
    pytest.param(version, marks=pytest.mark.flashinfer) for version in ("0.6.13", "0.7.2.post1")
]


@pytest.fixture(scope="module", params=VERSIONS)
def cache(request):
    """Where FlashInfer's build is kept."""
    cache = manifest.default_cache(request.param)
    try:
        manifest.read_manifest(cache)
    except FileNotFoundError as absent:
        pytest.skip(str(absent))
    return cache


@pytest.fixture(scope="module")
def built(cache):
    return manifest.read_manifest(cache)


def run(cache, check, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tests.recording_cuda.checks", check],
        cwd=ROOT,
        env=os.environ | {manifest.CACHE_VARIABLE: str(cache)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "check",
    [
        "loaded",
        "packed",
        "from_logits",
        "shapes",
        "optional",
        "pdl",
        "workspace_limit",
        "miswired",
        "repeated",
        "missing_cubin",
        "corrupt_cubin",
        "refused",
        "tensor_maps",
        "threads",
        "spy",
        "capture",
    ],
)
def test_check(cache, check):
    done = run(cache, check)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize("cache", VERSIONS[1:], indirect=True)
def test_a_tile_without_kernels_here(cache):
    done = run(cache, "absent_tile")
    assert done.returncode == 0, done.stderr


def test_operands_cannot_be_touched(cache):
    assert run(cache, "untouchable").returncode == -signal.SIGSEGV


def test_capability_is_what_the_environment_says(cache):
    done = run(cache, "capability", RECORDING_CUDA_CAPABILITY="10.3")
    assert done.returncode == 0, done.stderr
    done = run(cache, "old_capability", RECORDING_CUDA_CAPABILITY="9.0")
    assert done.returncode == 0, done.stderr
    assert "Current device has SM 90" in done.stdout


def symbols(path, which):
    command = ["nm", "--dynamic", which, str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # "address type name@version"; weak ones (w, v) may stay undefined.
    return {line.split()[-1].split("@")[0] for line in lines if line.split()[-2] not in ("w", "v")}


def libraries_beside(path):
    """The C and C++ libraries that an object is linked with."""
    lines = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    names = r"(?:libc|libm|libstdc\+\+|libgcc_s|ld-linux-[\w-]+|libdl|libpthread)\.so"
    return re.findall(rf"(/\S*/{names}\S*)", lines)


def test_the_module_needs_nothing_that_is_not_there(built):
    needed = symbols(built.module, "--undefined-only")
    beside = libraries_beside(built.module)
    assert len(beside) >= 4, beside
    for path in (built.tvm_ffi, *beside):
        needed -= symbols(path, "--defined-only")
    # Without the stand-in CUDA is lacking, so the comparison can fail.
    assert {"cudaLaunchKernelExC", "cuLaunchKernelEx"} < needed
    assert needed - symbols(built.runtime, "--defined-only") == set()


def test_find_tells_the_innermost_buffer():
    with Buffers() as buffers:
        arena = buffers.reserve("arena", 1000)
        buffers.add("part", arena.address + 256, 64)
        buffers.add("empty", arena.address + 512, 0)
        found = {
            at: buffers.find(arena.address + at) for at in (0, 255, 256, 319, 320, 512, 513, 999)
        }
        assert {at: (b.label, d) for at, (b, d) in found.items()} == {
            0: ("arena", 0),
            255: ("arena", 255),
            256: ("part", 0),
            319: ("part", 63),
            320: ("arena", 320),
            512: ("empty", 0),
            513: ("arena", 513),
            999: ("arena", 999),
        }
        assert buffers.find(arena.address + 1000) is None
        assert buffers.find(arena.address - 1) is None
        assert buffers.find_all(np.array([0, 7], np.uint64)) == {}


def test_reserved_addresses_are_no_small_number_beside_half_a_pointer():
    with Buffers() as buffers:
        made = [buffers.reserve(str(size), size) for size in (0, 1, 5 << 30, 4096)]
        assert {buffer.address % 2**32 for buffer in made} == {2**31}
        for buffer in made:
            assert buffers.find((buffer.address >> 32 << 32) + 257) is None


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN3moe3dev7routing23routingInitExpertCountsINS1_13routingLlama412KernelParamsEEEvT_",
         "routingInitExpertCounts"),
        ("_Z14finalizeKerneli", "finalizeKernel"),
        ("bmm_E2m1_E2m1E2m1_Fp32", "bmm_E2m1_E2m1E2m1_Fp32"),
    ],
)  # fmt: skip
def test_own_name(mangled, name):
    assert own_name(mangled) == name


def test_an_absent_build_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m tests\.recording_cuda\.build"):
        manifest.read_manifest(tmp_path)


def test_a_changed_file_is_refused(cache, built, tmp_path):
    text = (cache / manifest.MANIFEST).read_text()
    other = tmp_path / "libtvm_ffi.so"
    other.write_bytes(b"another")
    text = text.replace(str(built.tvm_ffi), str(other))
    (tmp_path / manifest.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="libtvm_ffi"):
        manifest.read_manifest(tmp_path)
