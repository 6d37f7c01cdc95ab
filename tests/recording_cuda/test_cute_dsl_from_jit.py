"""The bridge and the CuTe-DSL implementation, on FlashInfer's own kernels, inside `jax.jit`."""

import pytest

from jax_nvfp4_moe.bridge import cute_dsl, library

from . import manifest, processes

pytestmark = pytest.mark.flashinfer


@pytest.fixture(scope="module")
def built():
    if (reason := library.unavailable()) is not None:
        pytest.skip(f"needs the shared library: {reason}")
    try:
        built = manifest.read_manifest()
    except FileNotFoundError as absent:
        pytest.skip(str(absent))
    if built.cute_dsl is None:
        pytest.skip(f"no CuTe-DSL kernels were built: run `{manifest.BUILD}` again")
    return built


CHECKS = [
    *(f"cute_dsl_from_jit {name}" for name in ("models", "sizes", "tactics", "shares", "miswired")),
    *(f"cute_dsl_refused {name}" for name in ("arguments", "driver")),
]


@pytest.mark.parametrize("check", CHECKS)
def test_check(built, check):
    processes.check(check, manifest.default_cache())


def test_everything_was_built(built):
    expected = cute_dsl.functions(built.flashinfer, "all", (built.arch,))
    assert built.cute_dsl.functions == expected
