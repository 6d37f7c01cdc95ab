"""The tests' module, compiled for a GPU if this process's JAX has one, else for the host."""

import shutil

import jax
import pytest

from jax_nvfp4_moe.bridge import library
from tests.support import host
from tests.support.fake_module import tvm_ffi  # noqa: F401  a fixture
from tests.support.host import CPU, CUDA, present_host_as

from .harness import MODULE, build, no_gpu

HOST_STREAM = 0x51EA


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (reason := no_gpu()):
        pytest.skip(reason)


@pytest.fixture(scope="session", params=[pytest.param("cuda", marks=pytest.mark.gpu), "host"])
def built(request, tvm_ffi, tmp_path_factory):  # noqa: F811
    if request.param == "host" and jax.default_backend() != "cpu":
        pytest.skip("runs on the host only where JAX does")
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler, g++")
    module = build(request.param, tmp_path_factory.mktemp("gpu_tests"), tvm_ffi)
    if request.param == "host":
        host.register()
    else:
        library.register_targets("cuda")
    library.register_module(MODULE, module.path, tvm_ffi=tvm_ffi / "lib" / "libtvm_ffi.so")
    return module


@pytest.fixture
def module(built):
    """The module; on the host its tensors are presented as a GPU's."""
    if built.place == "host":
        present_host_as(CUDA, HOST_STREAM)
    yield built
    if built.place == "host":
        present_host_as(CPU)
