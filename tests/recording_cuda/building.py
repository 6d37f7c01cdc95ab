"""What both builds share: `build` and `build_cute_dsl`."""

import contextlib
import fcntl
import hashlib
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


def digest(*parts: str | bytes) -> str:
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part.encode() if isinstance(part, str) else part)
        sha256.update(b"\0")
    return sha256.hexdigest()[:16]


def file_entry(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@contextlib.contextmanager
def locked(cache: Path):
    """Holds the cache for this process; a second build waits, and then finds everything built."""
    with (cache / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build in {cache}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str]) -> float:
    """Runs one compiler or linker; returns the seconds it took, or exits with what it said."""
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}\nfailed: {done.returncode}")
    return time.monotonic() - begun
