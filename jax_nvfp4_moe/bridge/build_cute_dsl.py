"""FlashInfer's CuTe-DSL kernels: `python -m jax_nvfp4_moe build cute_dsl`."""

import json
import sys
from pathlib import Path

from jax_nvfp4_moe.bridge import build, cute_dsl, manifest

_WORKER = Path(__file__).with_name("_cute_dsl_build.py")


def build_cute_dsl(
    archs: tuple[str, ...],
    *,
    tactics: str = "all",
    python: Path | None = None,
    cache: Path | None = None,
    progress: bool | None = None,
) -> build.Build:
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
    cache = (cache or manifest.default_cache()).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    manifest.read(cache)  # Malformed is better known before than after.
    python = (python or Path(sys.executable)).absolute()
    functions = {each: cute_dsl.functions(each, tactics, archs) for each in cute_dsl.VERSIONS}
    command = [
        *(str(python), str(_WORKER)),
        *("--functions", json.dumps(functions)),
        *("--workspace", str(cache / "cute_dsl")),
    ]
    with build.locked(cache), build.shown(progress) as show:
        result = build.run(command, cache / "build-cute_dsl.log", show)
        library = Path(result["library"])
        version = result["versions"]["flashinfer-python"]
        path, sha256 = build.keep(library, cache, f"cute_dsl-{version}")
        module = manifest.Module(
            kind="cute_dsl",
            version=version,
            archs=archs,
            path=path,
            sha256=sha256,
            tvm_ffi=build.tvm_ffi() or Path(result["tvm_ffi"]),
            cubins=None,
            versions=result["versions"],
            needs=(Path(result["runtime"]),),
            functions=tuple(result["functions"]),
        )
        manifest.add(module, cache)
    return build.Build(module, None if result["built"] else library, round(result["seconds"], 1))
