"""The fake module, built by the compiler that is there."""

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from jax_nvfp4_moe.bridge import cute_dsl, library, manifest
from tests.support import host
from tests.support.host import CPU, present_host_as

HERE = Path(__file__).parent


def tvm_ffi_folder():
    spec = importlib.util.find_spec("tvm_ffi")  # which does not import it
    return None if spec is None else Path(spec.origin).parent


class FakeModule:
    """The module's journal and switches."""

    def __init__(self, path):
        self._module = ctypes.CDLL(str(path))

    def journal(self):
        """The lines written since it was last asked for."""
        buffer = ctypes.create_string_buffer(1 << 20)
        size = self._module.take_journal(buffer, ctypes.c_int64(len(buffer)))
        assert size < len(buffer)
        return buffer.value.decode().splitlines()

    def discard_journal(self):
        """Drops what other tests wrote, however much it is."""
        self._module.take_journal(None, ctypes.c_int64(0))

    def calls(self):
        """How often `busy` was called."""
        self._module.busy_calls.restype = ctypes.c_int64
        return self._module.busy_calls()

    def release(self):
        self._module.release()

    def set_capture_fails(self, fails):
        self._module.set_capture_fails(int(fails))


@pytest.fixture(scope="session")
def tvm_ffi():
    """The folder of the tvm_ffi package."""
    folder = tvm_ffi_folder()
    if (reason := host.missing()) is not None:
        pytest.skip(reason)
    return folder


def gemms(version):
    """The names of all functions of CuTe-DSL's module for SM100."""
    return cute_dsl.functions(version, "all", ("10.0a",))


@pytest.fixture(scope="session")
def built(tvm_ffi, tmp_path_factory):
    """The module's path; images stand beside it."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("needs a C++ compiler, g++")
    folder = tmp_path_factory.mktemp("fake_module")
    path = folder / "libfake.so"
    names = [each for version in cute_dsl.VERSIONS for each in gemms(version)]
    (folder / "gemms.inc").write_text("".join(f"GEMM({name})\n" for name in dict.fromkeys(names)))
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", f"-I{folder}"]
    subprocess.run(
        [compiler, *flags, "-isystem", str(tvm_ffi / "include"), "-o", str(path),
         str(HERE / "fake_module.cc"), "-ldl"],
        check=True,
    )  # fmt: skip
    (folder / "cubins").mkdir()
    (folder / "cubins" / "good.cubin").write_text("image")
    (folder / "cubins" / "bad.cubin").write_text("imagf")
    (folder / "good.cubin").write_text("image")
    host.register()
    library.register_module(
        "fake", path, tvm_ffi=tvm_ffi / "lib" / "libtvm_ffi.so", cubins=folder / "cubins"
    )
    return path


@pytest.fixture
def fake(built):
    """The module, with an empty journal and buffers of the host."""
    jax.devices()
    module = FakeModule(built)
    module.discard_journal()
    yield module
    present_host_as(CPU)
    module.set_capture_fails(False)


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """A cache with no modules in it."""
    monkeypatch.setenv(manifest.CACHE_VARIABLE, str(tmp_path))


@pytest.fixture
def add_module(nothing_built, built, tvm_ffi):
    """Writes the fake module into the manifest, as another's."""

    def add(kind, version, archs, functions=()):
        manifest.add(
            manifest.Module(
                kind=kind,
                version=version,
                archs=archs,
                path=built,
                sha256=hashlib.sha256(built.read_bytes()).hexdigest(),
                tvm_ffi=tvm_ffi / "lib" / "libtvm_ffi.so",
                cubins=None,
                functions=functions,
            )
        )

    return add
