"""FlashInfer's TRTLLM-Gen module: `python -m jax_nvfp4_moe build trtllm`."""

import os
import sys
from pathlib import Path

from jax_nvfp4_moe.bridge import build, flashinfer, manifest

ARCHS = ("10.0a", "10.0f", "10.3a")
_WORKER = Path(__file__).with_name("_flashinfer_build.py")


def build_trtllm(
    archs: tuple[str, ...],
    *,
    python: Path | None = None,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: bool | None = None,
) -> build.Build:
    """Finds or compiles FlashInfer's TRTLLM-Gen MoE module, and writes it into the manifest.

    What was compiled when it was interrupted is not compiled again the next time.

    Args:
        archs: what to compile for, of `ARCHS`.
        python: the interpreter of an environment that has FlashInfer, by default this one.
        jobs: how many compilers may run at a time, by default as many as there are processors.
        cache: where everything goes, `manifest.default_cache()` if not given.
        progress: show it on stderr; None means where that is a terminal.

    Raises:
        BuildError: FlashInfer or a compiler is not there, not the expected one, or fails.
        OSError: a file cannot be read or written, or the interpreter cannot be run.
        ValueError: the manifest is malformed.
    """
    cache = (cache or manifest.default_cache()).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    manifest.read(cache)  # Malformed is better known now than after half an hour.
    python = (python or Path(sys.executable)).absolute()
    command = [
        *(str(python), str(_WORKER)),
        *("--known", ",".join(flashinfer.PARAMETERS["trtllm_fp4_block_scale_moe"])),
        *("--archs", ",".join(archs)),
        *("--workspace", str(cache / "flashinfer")),
        *("--jobs", str(jobs or os.cpu_count() or 1)),
    ]
    with build.locked(cache), build.shown(progress) as show:
        result = build.run(command, cache / "build-trtllm.log", show)
        library = Path(result["library"])
        version = result["versions"]["flashinfer-python"]
        path, sha256 = build.keep(library, cache, f"trtllm-{version}")
        module = manifest.Module(
            kind="trtllm",
            version=version,
            archs=tuple(result["archs"]),
            path=path,
            sha256=sha256,
            tvm_ffi=build.tvm_ffi() or Path(result["tvm_ffi"]),
            cubins=Path(result["cubins"]),
            versions=result["versions"],
        )
        manifest.add(module, cache)
    return build.Build(module, None if result["built"] else library, round(result["seconds"], 1))
