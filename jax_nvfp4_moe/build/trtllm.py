"""FlashInfer's TRTLLM-Gen module: `python -m jax_nvfp4_moe build trtllm`."""

import os
from pathlib import Path

from jax_nvfp4_moe.bridge import flashinfer
from jax_nvfp4_moe.build import building

ARCHS = ("10.0a", "10.0f", "10.3a")


def build_trtllm(
    archs: tuple[str, ...],
    *,
    python: Path | None = None,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: bool | None = None,
) -> building.Build:
    """Finds or compiles FlashInfer's TRTLLM-Gen MoE module, and adds it to the manifest.

    After an interruption it continues with the files that are not compiled yet.

    Args:
        archs: the architectures, some of `ARCHS`.
        python: the interpreter of an environment that has FlashInfer; None means this one.
        jobs: the number of compilers that run at a time; None means the number of processors.
        cache: the directory for everything; None means `manifest.default_cache()`.
        progress: whether to show progress on stderr; None means if stderr is a terminal.

    Raises:
        BuildError: FlashInfer or a compiler is missing, has an unexpected version, or fails.
        OSError: a file cannot be read or written, or the interpreter cannot be run.
        ValueError: the manifest is malformed.
    """
    arguments = [
        *("--known", ",".join(flashinfer.PARAMETERS["trtllm_fp4_block_scale_moe"])),
        *("--archs", ",".join(archs)),
        *("--jobs", str(jobs or os.cpu_count() or 1)),
    ]
    return building.make(
        "trtllm",
        "trtllm_worker.py",
        arguments,
        "flashinfer",
        lambda result: {"archs": tuple(result["archs"]), "cubins": Path(result["cubins"])},
        python=python,
        cache=cache,
        progress=progress,
    )
