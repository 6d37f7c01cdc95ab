"""What the build made and where it lies."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
CACHE_VARIABLE = "JAX_NVFP4_MOE_RECORDING_CUDA"
BUILD = "python -m tests.recording_cuda.build"
FLASHINFER = "0.6.13"


def default_cache(version: str = FLASHINFER) -> Path:
    """Where the build of a FlashInfer is kept.

    $JAX_NVFP4_MOE_RECORDING_CUDA, or below the home directory; of other versions than FLASHINFER in
    a directory of its own there.
    """
    given = os.environ.get(CACHE_VARIABLE)
    cache = Path(given) if given else Path.home() / ".cache" / "jax_nvfp4_moe" / "recording_cuda"
    return cache if version == FLASHINFER else cache / version


@dataclass(frozen=True)
class CuteDsl:
    """FlashInfer's CuTe-DSL kernels.

    Attributes:
        module: the library that has them.
        runtime: CuTe-DSL's, on the stand-in.
        functions: what the module exports.
    """

    module: Path
    runtime: Path
    functions: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """One build.

    Attributes:
        module: FlashInfer's MoE module.
        spy: the same for callers that are to be observed (spy.cpp).
        runtime: the stand-in for libcudart.so.13 and libcuda.so.1.
        tvm_ffi: libtvm_ffi.so, of the environment that the module was built in.
        cubin_directory: what the paths of prebuilt kernels are relative to.
        arch: what the module was compiled for, "10.0a".
        versions: the versions of the distributions that the build read.
        cute_dsl: the CuTe-DSL kernels, or None where they were not built.
    """

    module: Path
    spy: Path
    runtime: Path
    tvm_ffi: Path
    cubin_directory: Path
    arch: str
    versions: dict[str, str]
    cute_dsl: CuteDsl | None

    @property
    def flashinfer(self) -> str:
        """The version of flashinfer-python."""
        return self.versions["flashinfer-python"]


def read_manifest(cache: Path | None = None) -> Manifest:
    """Returns the manifest, after checking that the files have not changed since they were built.

    Raises:
        FileNotFoundError: nothing was built, or a built file is missing.
        ValueError: a file is not the one that was built.
    """
    path = (cache or default_cache()) / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `{BUILD}`, in an environment with FlashInfer")
    content = json.loads(path.read_text())

    def file(entry: dict[str, str]) -> Path:
        found = Path(entry["path"])
        if not found.exists():
            raise FileNotFoundError(f"{path} names {found}, which is gone: run `{BUILD}`")
        if hashlib.sha256(found.read_bytes()).hexdigest() != entry["sha256"]:
            raise ValueError(f"{found} is not what {path} was written for: run `{BUILD}`")
        return found

    cubins = Path(content["cubin_directory"])
    if not cubins.is_dir():
        raise FileNotFoundError(f"{path} names {cubins}, which is gone: run `{BUILD}`")
    cute_dsl = content.get("cute_dsl")  # An earlier build has none.
    return Manifest(
        **{name: file(content[name]) for name in ("module", "spy", "runtime", "tvm_ffi")},
        cubin_directory=cubins,
        arch=content["arch"],
        versions=content["versions"],
        cute_dsl=cute_dsl
        and CuteDsl(
            file(cute_dsl["module"]), file(cute_dsl["runtime"]), tuple(cute_dsl["functions"])
        ),
    )
