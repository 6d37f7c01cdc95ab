"""Runs a check in a process of its own, with the stand-in that it loads before JAX."""

import os
import subprocess
import sys
from pathlib import Path

from . import manifest

ROOT = Path(__file__).parents[2]


def check(name: str, cache: Path) -> None:
    """Fails if the check does.

    Args:
        name: of a module of this package, and of a check in it.
        cache: where the build is kept.
    """
    module, argument = name.split()
    done = subprocess.run(
        [sys.executable, "-m", f"tests.recording_cuda.{module}", argument],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", manifest.CACHE_VARIABLE: str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
