"""Builds FlashInfer's TRTLLM-Gen MoE module against the recording CUDA runtime.

    python -m tests.recording_cuda.build [--cache DIRECTORY] [--arch 10.0a] [--jobs N]

FlashInfer's Python imports torch, so this runs in an environment and a process of its own; the
tests read only the manifest it writes. INSTALL makes that environment. No GPU, no driver and no
installed CUDA toolkit are needed, only g++.

The sources, defines and include directories are those of FlashInfer's own JIT specification. The
flags differ (`nvcc_flags`): device code stays PTX, unoptimised, since nothing here ever runs it,
and uncompressed, since the stand-in reads the kernels' parameter sizes from it.

FlashInfer 0.7.2's prebuilt kernels are on no package index, so it is built with 0.6.13's and their
headers, in which two things are changed (`SUBSTITUTIONS`): all else of it is its own.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .build_cute_dsl import build_cute_dsl
from .building import FLAGS, HERE, digest, file_entry, locked, run
from .manifest import MANIFEST, default_cache

# torch first, and its CPU build (where pip's index has others too: with the option --index-url
# https://download.pytorch.org/whl/cpu). Of nvrtc, cublas and curand only the headers are needed.
INSTALL = "pip install torch==2.13.0 && pip install '.[cli,flashinfer]'"

MODULE = "fused_moe_trtllm_sm100"
DISTRIBUTIONS = (
    "flashinfer-python",
    "flashinfer-cubin",
    "apache-tvm-ffi",
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
    "nvidia-cuda-crt",
    "nvidia-cuda-runtime",
    "nvidia-cuda-nvrtc",
    "nvidia-cublas",
    "nvidia-curand",
)
# Beside these, for CuTe-DSL's kernels, which the package builds; not of what TRTLLM-Gen is made of.
CUTE_DSL = ("jax", "rich", "nvidia-cutlass-dsl")

FFI = HERE.parents[1] / "ffi"
RUNTIME_SOURCES = (
    "runtime.cpp",
    "driver.cpp",
    "libraries.cpp",
    "refused.cpp",
    "state.cpp",
    "cubins.cpp",
    FFI / "sha256.cc",
)
RUNTIME_HEADERS = ("cuda_types.h", "images.h", "log.h", "state.h", "symbols.map", FFI / "sha256.h")
SPY_SOURCES = ("spy.cpp", "log.h")
HOST_FLAGS = ("-O0", "-w")
# What FlashInfer sets that ours replace.
REPLACED = re.compile(r"-gencode=.*|-O3|-Xfatbin=-compress-all|--?compress-mode=size")

# What 0.7.2 asserts of its kernels' headers and 0.6.13's do not have: the gated activation SiTuGlu,
# before None, which has the next number. No kernel of 0.6.13's has that activation.
SUBSTITUTIONS = (
    ("trtllmGen_bmm_export/GemmGatedActOptions.h", "\n  GeGlu,\n", "\n  GeGlu,\n  SiTuGlu,\n"),
    ("flashinferMetaInfo.h", "gemmGatedAct::ActType(2)\n", "gemmGatedAct::ActType(3)\n"),
)


@dataclass(frozen=True)
class Release:
    """What a version of FlashInfer is built with.

    Attributes:
        cubins: the version of flashinfer-cubin.
        cute_dsl: whether its CuTe-DSL kernels are built too.
        substitutions: what is changed in the headers of flashinfer-cubin: a file, what it has and
            what it gets instead.
    """

    cubins: str
    cute_dsl: bool = False
    substitutions: tuple[tuple[str, str, str], ...] = ()


RELEASES = {
    "0.6.13": Release("0.6.13", cute_dsl=True),
    "0.7.2.post1": Release("0.6.13", substitutions=SUBSTITUTIONS),
}


def nvcc_flags(arch: str) -> tuple[str, ...]:
    virtual = f"compute_{arch.replace('.', '')}"
    gencode = f"-gencode=arch={virtual},code={virtual}"
    return (gencode, "-Ofc", "max", "-O0", "-w", "--compress-mode=none")


def versions() -> dict[str, str]:
    """The versions of what the build reads. Exits, saying what to install, if anything lacks."""
    found = required(DISTRIBUTIONS)
    release = RELEASES.get(found["flashinfer-python"])
    if release is None:
        known = ", ".join(RELEASES)
        sys.exit(f"flashinfer-python is {found['flashinfer-python']}; this builds {known} only")
    if found["flashinfer-cubin"] != release.cubins:
        sys.exit(f"flashinfer-cubin is {found['flashinfer-cubin']}, not {release.cubins}")
    if release.cute_dsl:
        required(CUTE_DSL)
    return found


def required(names: tuple[str, ...]) -> dict[str, str]:
    """The versions of distributions."""
    found, lacking = {}, []
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
    if lacking:
        sys.exit(f"{sys.executable} lacks {', '.join(lacking)}. In a new environment:\n  {INSTALL}")
    return found


def package_directory(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # Does not import it.
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{sys.executable} has no package {name}. In a new environment:\n  {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def build_runtime(cache: Path) -> Path:
    """The stand-in for libcudart.so.13 and libcuda.so.1. A few seconds."""
    files = [HERE / name for name in (*RUNTIME_SOURCES, *RUNTIME_HEADERS)]
    key = digest(*(file.read_bytes() for file in files), *FLAGS)
    target = cache / f"runtime-{key}" / "libcudart.so.13"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / target.name
        sources = [f"-I{FFI}", *(str(HERE / name) for name in RUNTIME_SOURCES)]
        script = f"-Wl,--version-script={HERE / 'symbols.map'}"
        link = ["-shared", "-Wl,-soname,libcudart.so.13", script, "-Wl,-z,defs", "-ldl"]
        seconds = run(["g++", *FLAGS, *sources, "-o", str(made), *link])
        made.replace(target)
    # The names that -lcudart and -lcuda look for.
    for name in ("libcudart.so", "libcuda.so"):
        (target.parent / name).unlink(missing_ok=True)
        (target.parent / name).symlink_to(target.name)
    print(f"stand-in runtime: {seconds:.0f} s", flush=True)
    return target


def build_spy(cache: Path, module: Path, runtime: Path) -> Path:
    """What stands between a caller and the module (spy.cpp). A few seconds."""
    parts = [(HERE / name).read_bytes() for name in SPY_SOURCES]
    key = digest(*parts, *FLAGS, str(module), str(runtime))
    target = cache / f"spy-{key}" / f"{MODULE}_spy.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / target.name
        # Linked by its path, under which it is found again; nothing of it is named in the source.
        link = ["-shared", "-Wl,--no-as-needed", str(module), f"-L{runtime.parent}", "-lcudart"]
        run(["g++", *FLAGS, str(HERE / SPY_SOURCES[0]), "-o", str(made), *link, "-ldl"])
        made.replace(target)
    return target


def substitute(cache: Path, substitutions: tuple[tuple[str, str, str], ...]) -> tuple[str, str]:
    """Lets FlashInfer find flashinfer-cubin's headers with some changes, instead of its own.

    Returns:
        What FlashInfer calls the path of the kernels and the sha256 of their list of checksums.
    """
    cubins = package_directory("flashinfer_cubin") / "cubins"
    (original,) = cubins.glob("*/batched_gemm-*")
    directory = cache / "cubins" / original.relative_to(cubins)
    shutil.rmtree(cache / "cubins", ignore_errors=True)
    shutil.copytree(original / "include", directory / "include")
    for name, before, after in substitutions:
        file = directory / "include" / name
        text = file.read_text()
        if before not in text:
            raise RuntimeError(f"{original / 'include' / name} has no {before!r}")
        file.write_text(text.replace(before, after))
    sums = "".join(
        f"{file_entry(header)['sha256']}  {header.relative_to(directory)}\n"
        for header in sorted(directory.rglob("*.h"))
    )
    (directory / "checksums.txt").write_text(sums)
    os.environ["FLASHINFER_CUBIN_DIR"] = str(cache / "cubins")
    return f"{original.relative_to(cubins)}/", hashlib.sha256(sums.encode()).hexdigest()


def compile_commands(
    cache: Path, arch: str, objects: Path, release: Release
) -> dict[str, list[str]]:
    """FlashInfer's compiler calls with our flags, by the path of the object each makes."""
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = arch  # A CPU build of torch knows no GPU.
    os.environ["CUDA_HOME"] = str(package_directory("nvidia") / "cu13")
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(cache / "flashinfer")
    os.environ["FLASHINFER_NO_DOWNLOAD"] = "1"
    os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "error")
    headers = substitute(cache, release.substitutions) if release.substitutions else None
    from flashinfer.artifacts import ArtifactPath, CheckSumHash
    from flashinfer.jit.fused_moe import gen_trtllm_gen_fused_moe_sm100_module

    if headers is not None:
        ArtifactPath.TRTLLM_GEN_BMM, CheckSumHash.TRTLLM_GEN_BMM = headers
    spec = gen_trtllm_gen_fused_moe_sm100_module()
    if spec.name != MODULE:
        raise RuntimeError(f"FlashInfer calls its module {spec.name}, not {MODULE}")
    commands = {}
    for entry in spec.get_compile_commands():
        words = [word for word in shlex.split(entry["command"]) if not REPLACED.fullmatch(word)]
        target = objects / Path(words[-1]).name  # The command ends in "-o", object.
        flags = nvcc_flags(arch) if entry["file"].endswith(".cu") else HOST_FLAGS
        commands[str(target)] = [*words[:-1], str(target), *flags]
    return commands


def build_module(
    cache: Path, arch: str, key: str, runtime: Path, jobs: int, release: Release
) -> tuple[Path, float]:
    """FlashInfer's module, and how many seconds it took to build. Kept under `key`."""
    target = cache / f"{MODULE}-{key}" / f"{MODULE}.so"
    took = target.with_suffix(".seconds")
    if target.exists():
        print(f"{MODULE}: already built", flush=True)
        return target, float(took.read_text())
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        commands = compile_commands(cache, arch, Path(scratch), release)
        print(f"{MODULE}: {len(commands)} sources, {jobs} at a time", flush=True)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            # The slowest first, so that none is left over at the end.
            slow = ("routing_custom", "batched_gemm_runner", "routing_llama4", "routing_deepseek")
            order = sorted(commands, key=lambda name: not any(part in name for part in slow))
            running = {pool.submit(run, commands[name]): Path(name).name for name in order}
            try:
                for count, done in enumerate(concurrent.futures.as_completed(running), 1):
                    print(f"  {count:2}/{len(running)} {running[done]}: {done.result():.0f} s")
                    sys.stdout.flush()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        made = Path(scratch) / target.name
        libraries = [f"-L{runtime.parent}", "-lcudart", "-lcuda"]
        run(["g++", "-shared", *commands, *libraries, "-o", str(made)])
        seconds = time.monotonic() - begun
        target.parent.mkdir(exist_ok=True)
        took.write_text(f"{seconds:.1f}")
        made.replace(target)
    print(f"{MODULE}: {seconds:.0f} s", flush=True)
    return target, seconds


def build(cache: Path, arch: str, jobs: int) -> Path:
    """Builds what is not built yet, and returns the path of the manifest."""
    found = versions()
    release = RELEASES[found["flashinfer-python"]]
    flags = {"nvcc": nvcc_flags(arch), "host": HOST_FLAGS}
    inputs: list[object] = [found, flags, sys.version_info[:2]]
    if release.substitutions:
        inputs.append(release.substitutions)
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache):
        runtime = build_runtime(cache)
        key = digest(json.dumps(inputs))
        module, seconds = build_module(cache, arch, key, runtime, jobs, release)
        spy = build_spy(cache, module, runtime)
        manifest = {
            "arch": arch,
            "versions": found,
            "flags": flags,
            "substitutions": release.substitutions,
            "module_build_seconds": seconds,
            "runtime": file_entry(runtime),
            "module": file_entry(module),
            "spy": file_entry(spy),
            "cute_dsl": build_cute_dsl(cache, arch, runtime) if release.cute_dsl else None,
            "tvm_ffi": file_entry(package_directory("tvm_ffi") / "lib" / "libtvm_ffi.so"),
            "cubin_directory": str(package_directory("flashinfer_cubin") / "cubins"),
        }
        target = cache / MANIFEST
        made = target.with_suffix(f".{os.getpid()}")
        made.write_text(json.dumps(manifest, indent=2) + "\n")
        made.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--arch", default="10.0a")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    cache = args.cache or default_cache(versions()["flashinfer-python"])
    print(build(cache.expanduser().resolve(), args.arch, args.jobs))


if __name__ == "__main__":
    main()
