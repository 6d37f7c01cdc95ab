"""The steps that `build.trtllm` and `build.cute_dsl` share: run a worker, keep its library."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jax_nvfp4_moe.bridge import manifest

_LOG_LINES, _LOG_WIDTH = 30, 200
_SECONDS_TO_END = 10

Event = dict[str, Any]


class BuildError(RuntimeError):
    """A module could not be built."""


@dataclasses.dataclass(frozen=True)
class Build:
    """The result of a build.

    Attributes:
        module: its entry in the manifest.
        found: the existing library that was copied, or None if the build compiled it.
        seconds: the time that the build took.
    """

    module: manifest.Module
    found: Path | None
    seconds: float

    def json(self) -> dict[str, Any]:
        """Returns the build as a JSON object."""
        entry = {"name": self.module.name, **dataclasses.asdict(self.module)}
        built = {"built": self.found is None, "found": self.found, "seconds": self.seconds}
        return json.loads(json.dumps({**entry, **built}, default=str))


def parse_archs(text: str, known: Collection[str]) -> tuple[str, ...]:
    """Returns the architectures in a list such as "10.0a,10.3a", also spelt "100a,103a".

    Args:
        text: the list, separated by commas.
        known: the architectures that may be in it.

    Raises:
        ValueError: the list has another entry.
    """
    short = {each.replace(".", ""): each for each in known}
    archs = tuple(sorted({short.get(each.strip(), each.strip()) for each in text.split(",")}))
    if not set(archs) <= set(known):
        raise ValueError(
            f"{text!r} is not a list of architectures, expected some of {', '.join(known)}, "
            "separated by commas, as in 10.0a,10.3a: the kernels are for SM100 and SM103"
        )
    return archs


def make(
    kind: str,
    worker: str,
    arguments: list[str],
    workspace: str,
    fields: Callable[[Event], dict[str, Any]],
    *,
    python: Path | None,
    cache: Path | None,
    progress: bool | None,
) -> Build:
    """Runs a worker, stores its library in the cache, and adds it to the manifest.

    Args:
        kind: the module's name on the command line and in the manifest.
        worker: the file name of the script, beside this module.
        arguments: the script's arguments.
        workspace: the directory in the cache for the script's files.
        fields: returns the fields of the manifest's entry that depend on the kind, from the
            worker's result.
        python: the interpreter that runs the worker; None means this one.
        cache: the directory for everything; None means `manifest.default_cache()`.
        progress: whether to show progress on stderr; None means if stderr is a terminal.

    Raises:
        BuildError: the worker failed; the message has its reason.
        OSError: a file cannot be read or written, or the interpreter cannot be run.
        ValueError: the manifest is malformed.
    """
    cache = (cache or manifest.default_cache()).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    manifest.read(cache)  # Fails now if it is malformed, not after half an hour.
    python = (python or Path(sys.executable)).absolute()
    script = Path(__file__).with_name(worker)
    command = [str(python), str(script), *arguments, "--workspace", str(cache / workspace)]
    with locked(cache), shown(progress) as show:
        result = run(command, cache / f"build-{kind}.log", show)
        library = Path(result["library"])
        version = result["versions"]["flashinfer-python"]
        path, sha256 = keep(library, cache, f"{kind}-{version}")
        module = manifest.Module(
            kind=kind,
            version=version,
            path=path,
            sha256=sha256,
            tvm_ffi=tvm_ffi() or Path(result["tvm_ffi"]),
            versions=result["versions"],
            **fields(result),
        )
        manifest.add(module, cache)
    return Build(module, None if result["built"] else library, round(result["seconds"], 1))


def run(command: list[str], log: Path, show: Callable[[Event], None]) -> Event:
    """Runs the worker, and returns its result."""
    with log.open("wb") as stderr:
        # In its own process group. The worker ends it, ninja included, when its stdin closes, which
        # happens even if this process is killed.
        worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    assert worker.stdin is not None
    assert worker.stdout is not None
    last: Event = {}
    try:
        for line in worker.stdout:
            last = json.loads(line)
            show(last)
    finally:
        worker.stdin.close()
        try:
            worker.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        worker.stdout.close()
    if "result" in last:
        return last["result"]
    if "error" not in last:
        last = {"error": f"{command[0]} ended with {worker.returncode}", "hint": "log"}
    text = last["error"]
    if last["hint"] == "install":
        text += f". Install: {_what_to_install()}"
    elif last["hint"] == "log":
        text += f"\n{_extract(log)}\nThe whole output is in {log}"
    raise BuildError(text)


def _what_to_install() -> str:
    """Returns the commands: torch first, since pip would choose its CUDA build for FlashInfer."""
    extra = re.compile(r"""extra\s*==\s*["']flashinfer["']""")
    required = importlib.metadata.requires("jax_nvfp4_moe") or []
    needed = [each.partition(";")[0].strip() for each in required if extra.search(each)]
    return (
        "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu, then "
        f"pip install {' '.join(needed)}"
    )


def _extract(log: Path) -> str:
    """Returns the part of a log that explains a failure: from the first one on, else the end."""
    lines = [line[:_LOG_WIDTH] for line in log.read_text(errors="replace").splitlines()]
    failed = [number for number, line in enumerate(lines) if line.startswith("FAILED: ")]
    start = failed[0] if failed else max(0, len(lines) - _LOG_LINES)
    return "\n".join(lines[start : start + _LOG_LINES])


def keep(library: Path, cache: Path, name: str) -> tuple[Path, str]:
    """Copies a library into the cache; returns its path there and its SHA-256."""
    image = library.read_bytes()
    sha256 = hashlib.sha256(image).hexdigest()
    # Named by its contents, so that no build replaces a file that a process has open.
    path = cache / f"{name}-{sha256[:16]}" / library.name
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".new")
    try:
        new.write_bytes(image)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return path, sha256


def tvm_ffi() -> Path | None:
    """Returns this environment's libtvm_ffi if it suits FlashInfer, so that a process has only one.

    FlashInfer requires at least 0.1.6 and less than 0.2 (flashinfer-python@0.6.13:METADATA).
    """
    spec = importlib.util.find_spec("tvm_ffi")  # Does not import it.
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        version = importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers is None or not (0, 1, 6) <= tuple(map(int, numbers.groups())) < (0, 2):
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "lib" / "libtvm_ffi.so"
    return path if path.is_file() else None


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Locks the cache for this process; another build waits, then finds this one's result."""
    with (cache / "build.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another build in {cache}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def shown(progress: bool | None) -> Iterator[Callable[[Event], None]]:
    """Shows the worker's events on stderr: as a bar on a terminal, otherwise as lines."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    show = console.is_terminal if progress is None else progress
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not (show and console.is_terminal)
    ) as bars:
        bar = bars.add_task("starting", total=None)

        def tell(event: Event) -> None:
            if "stage" in event:
                text = event["stage"]
                bars.update(bar, description=text, completed=0, total=None)
            elif "done" in event:
                bars.update(bar, completed=event["done"], total=event["of"])
                text = f"[{event['done']}/{event['of']}] after {bars.tasks[0].elapsed or 0:.0f} s"
            else:
                return
            if show and not console.is_terminal:
                console.print(text)

        yield tell
