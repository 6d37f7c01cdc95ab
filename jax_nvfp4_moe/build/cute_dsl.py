"""FlashInfer's CuTe-DSL kernels: `python -m jax_nvfp4_moe build cute_dsl`."""

import json
from pathlib import Path
from typing import Any

from jax_nvfp4_moe.bridge import cute_dsl
from jax_nvfp4_moe.build import building


def build_cute_dsl(
    archs: tuple[str, ...],
    *,
    tactics: str = "all",
    python: Path | None = None,
    cache: Path | None = None,
    progress: bool | None = None,
) -> building.Build:
    """Compiles FlashInfer's CuTe-DSL kernels, and adds their library to the manifest.

    After an interruption it continues with the kernels that are not compiled yet.

    Args:
        archs: the architectures, some of `cute_dsl.ARCHS`.
        tactics: the kernels to compile, a key of `cute_dsl.TACTICS`.
        python: the interpreter of an environment that has FlashInfer and nvidia-cutlass-dsl; None
            means this one.
        cache: the directory for everything; None means `manifest.default_cache()`.
        progress: whether to show progress on stderr; None means if stderr is a terminal.

    Raises:
        BuildError: a package or the linker is missing, has an unexpected version, or fails.
        OSError: a file cannot be read or written, or the interpreter cannot be run.
        ValueError: the manifest is malformed.
    """
    functions = {each: cute_dsl.functions(each, tactics, archs) for each in cute_dsl.VERSIONS}

    def fields(result: building.Event) -> dict[str, Any]:
        return {
            "archs": archs,
            "cubins": None,
            "needs": (Path(result["runtime"]),),
            "functions": tuple(result["functions"]),
        }

    return building.make(
        "cute_dsl",
        "cute_dsl_worker.py",
        ["--functions", json.dumps(functions)],
        "cute_dsl",
        fields,
        python=python,
        cache=cache,
        progress=progress,
    )
