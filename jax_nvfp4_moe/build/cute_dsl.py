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
    """Compiles FlashInfer's CuTe-DSL kernels, and writes their library into the manifest.

    What was compiled when it was interrupted is not compiled again the next time.

    Args:
        archs: what to compile for, of `cute_dsl.ARCHS`.
        tactics: which kernels, a key of `cute_dsl.TACTICS`.
        python: the interpreter of an environment that has FlashInfer and nvidia-cutlass-dsl, by
            default this one.
        cache: where everything goes, `manifest.default_cache()` if not given.
        progress: show it on stderr; None means where that is a terminal.

    Raises:
        BuildError: a package or the linker is not there, not the expected one, or fails.
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
