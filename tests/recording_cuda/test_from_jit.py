"""The bridge and the TRTLLM-Gen implementation, on FlashInfer's own launcher, inside `jax.jit`."""

import pytest

from jax_nvfp4_moe.bridge import library

from . import manifest, processes

VERSIONS = [
    pytest.param(version, marks=pytest.mark.flashinfer) for version in ("0.6.13", "0.7.2.post1")
]


@pytest.fixture(scope="module", params=VERSIONS)
def cache(request):
    """Where FlashInfer's build is kept."""
    if (reason := library.unavailable()) is not None:
        pytest.skip(f"needs the shared library: {reason}")
    cache = manifest.default_cache(request.param)
    try:
        manifest.read_manifest(cache)
    except FileNotFoundError as absent:
        pytest.skip(str(absent))
    return cache


CHECKS = [
    *(f"from_jit {name}" for name in ("models", "sizes", "forms", "a_byte_less")),
    *(
        f"from_calls {name}"
        for name in (
            "routers",
            "a_router_that_is_not_there",
            "shares",
            "parts",
            "no_tokens",
            "missing_images",
            "other_images",
        )
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_check(cache, check):
    processes.check(check, cache)
