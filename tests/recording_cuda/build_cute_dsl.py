"""Builds FlashInfer's CuTe-DSL kernels, as the package does, and what they are to run on.

The library that the package makes is linked to libcute_dsl_runtime.so of nvidia-cutlass-dsl, which
has a CUDA runtime in itself, and that one examines the driver: a stand-in would have to forge
the result (README.md). Beside it lies an archive of the same functions that takes its CUDA runtime
from outside. Made into a library of the same name, and loaded before, it gets the stand-in's.
"""

import tempfile
from pathlib import Path
from typing import Any

from .building import FLAGS, HERE, digest, file_entry, run

SOURCE = HERE / "cute_dsl_runtime.cpp"
ARCHIVE = "libcuda_dialect_runtime_static.a"


def build_runtime(cache: Path, archive: Path, runtime: Path) -> Path:
    """CuTe-DSL's runtime on the stand-in. A second."""
    key = digest(SOURCE.read_bytes(), archive.read_bytes(), *FLAGS, str(runtime))
    target = cache / f"cute_dsl_runtime-{key}" / "libcute_dsl_runtime.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / target.name
        whole = ["-Wl,--whole-archive", str(archive), "-Wl,--no-whole-archive"]
        # Complete, or what lacks would be known by the first call only.
        link = ["-shared", f"-Wl,-soname,{target.name}", *whole, f"-L{runtime.parent}", "-lcudart"]
        run(["g++", *FLAGS, str(SOURCE), "-o", str(made), *link, "-Wl,-z,defs"])
        made.replace(target)
    return target


def build_cute_dsl(cache: Path, arch: str, runtime: Path) -> dict[str, Any]:
    """What the manifest has of it. Half a minute on two cores, once."""
    from jax_nvfp4_moe.build.cute_dsl import build_cute_dsl

    built = build_cute_dsl((arch,), tactics="all", cache=cache / "cute_dsl")
    module = built.module
    print(f"{module.path.name}: {built.seconds:.0f} s", flush=True)
    archive = module.needs[0].with_name(ARCHIVE)
    return {
        "module": file_entry(module.path),
        "runtime": file_entry(build_runtime(cache, archive, runtime)),
        "functions": module.functions,
        "versions": module.versions,
    }
