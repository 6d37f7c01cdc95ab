"""The bridge and the TRTLLM-Gen implementation, on FlashInfer's own launcher, inside `jax.jit`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_nvfp4_moe.bridge import library

from . import manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ready():
    if (reason := library.unavailable()) is not None:
        pytest.skip(f"needs the shared library: {reason}")
    try:
        manifest.read_manifest()
    except FileNotFoundError as absent:
        pytest.skip(str(absent))


@pytest.mark.parametrize("check", ["models", "sizes", "forms", "contents", "a_byte_less"])
def test_check(ready, check):
    done = subprocess.run(
        [sys.executable, "-m", "tests.recording_cuda.from_jit", check],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
