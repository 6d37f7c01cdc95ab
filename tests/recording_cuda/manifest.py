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
    """

    module: Path
    spy: Path
    runtime: Path
    tvm_ffi: Path
    cubin_directory: Path
    arch: str
    versions: dict[str, str]

    @property
    def flashinfer(self) -> str:
        """The version of flashinfer-python."""
        return self.versions["flashinfer-python"]


def read_manifest(cache: Path | None = None) -> Manifest:
    """Reads the manifest and checks that the files are those that were built.

    Raises:
        FileNotFoundError: nothing was built, or a file of it is gone.
        ValueError: a file is not the one that was built.
    """
    path = (cache or default_cache()) / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `{BUILD}`, in an environment with FlashInfer")
    content = json.loads(path.read_text())
    files = {}
    for name in ("module", "spy", "runtime", "tvm_ffi"):
        files[name] = Path(content[name]["path"])
        if not files[name].exists():
            raise FileNotFoundError(f"{path} names {files[name]}, which is gone: run `{BUILD}`")
        if hashlib.sha256(files[name].read_bytes()).hexdigest() != content[name]["sha256"]:
            raise ValueError(f"{files[name]} is not what {path} was written for: run `{BUILD}`")
    cubins = Path(content["cubin_directory"])
    if not cubins.is_dir():
        raise FileNotFoundError(f"{path} names {cubins}, which is gone: run `{BUILD}`")
    return Manifest(
        **files, cubin_directory=cubins, arch=content["arch"], versions=content["versions"]
    )
