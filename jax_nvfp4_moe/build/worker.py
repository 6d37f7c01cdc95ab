"""The protocol of the scripts that `build` runs.

A script runs by its path, in a separate process and perhaps in another environment, without JAX. It
writes JSON objects to stdout, one a line: {"stage": text}, {"done": n, "of": m}, and at the end
{"result": ...} or {"error": text, "hint": "install", "log" or null}. Everything else goes to
stderr, compilers' output included. When its stdin closes, it ends, with all processes that it
started.
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
    """The reason why a build failed, for the user; the hint says what else to show."""

    def __init__(self, text: str, hint: str | None = None) -> None:
        super().__init__(text)
        self.hint = hint


def run(make: Callable[[Tell], dict[str, Any]]) -> None:
    """Runs `make`, and writes its events and its result or error to stdout."""
    # The modules of the script's directory must not hide packages of the same name.
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
    """Ends this process and the processes that it started when stdin closes."""
    while os.read(0, 1 << 16):
        pass
    if os.getpgrp() == os.getpid():
        for _ in range(20):  # Until the signal ends this process too.
            os.killpg(0, signal.SIGTERM)
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)


def versions(names: Iterable[str], required: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the distributions that are installed.

    Raises:
        Failure: a required one is missing.
    """
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if lack := [name for name in required if name not in found]:
        raise Failure(f"{sys.executable} has no {', '.join(lack)}", "install")
    return found


def package(name: str) -> Path:
    """Returns the directory of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise Failure(f"{sys.executable} has no package {name}", "install")
    return Path(next(iter(spec.submodule_search_locations)))
