"""What scripts that `build` runs have in common: how they tell of themselves, and how they end.

Each runs by its path, in a process of its own and maybe in another environment, without JAX. On
stdout it writes JSON objects, one a line: {"stage": text}, {"done": n, "of": m}, and at the end
{"result": ...} or {"error": text, "hint": "install", "log" or null}. All else goes to stderr, what
compilers say included. It ends when its stdin does, and all that it started with it.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Tell = Callable[..., None]


class Failure(Exception):
    """What ends the build, in words for the user; the hint says what to show with it."""

    def __init__(self, text: str, hint: str | None = None) -> None:
        super().__init__(text)
        self.hint = hint


def run(make: Callable[[Tell], dict[str, Any]]) -> None:
    """Tells of what `make` does, and of what it returns or raises."""
    # The script's directory has a flashinfer.py.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]

    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def tell(**event: Any) -> None:
        events.write(json.dumps(event, default=str) + "\n")

    threading.Thread(target=end_with_stdin, daemon=True).start()
    try:
        tell(result=make(tell))
    except Failure as failure:
        tell(error=str(failure), hint=failure.hint)
    except Exception as error:
        traceback.print_exc()
        tell(error=f"{type(error).__name__}: {error}", hint="log")


def end_with_stdin() -> None:
    """Ends this process and those that it started when whoever started it is gone or says so."""
    while os.read(0, 1 << 16):
        pass
    if os.getpgrp() == os.getpid():
        for _ in range(20):  # Until none is left to be told, this one included.
            os.killpg(0, signal.SIGTERM)
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)


def versions(names: Iterable[str], required: Iterable[str]) -> dict[str, str]:
    """The versions of distributions, of those that are there.

    Raises:
        Failure: one that is required is not.
    """
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if lack := [name for name in required if name not in found]:
        raise Failure(f"{sys.executable} has no {', '.join(lack)}", "install")
    return found


def package(name: str) -> Path:
    """The directory of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise Failure(f"{sys.executable} has no package {name}", "install")
    return Path(next(iter(spec.submodule_search_locations)))
