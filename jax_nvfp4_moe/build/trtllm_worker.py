"""Finds or compiles FlashInfer's TRTLLM-Gen MoE module: a script for a Python that has FlashInfer.

`build_trtllm` runs it in a separate process since FlashInfer's Python imports torch. It needs only
the standard library and FlashInfer. `worker` documents what it prints.
"""

import argparse
import concurrent.futures
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # The package may not be there.
    from worker import Failure, Tell, package, run
    from worker import versions as installed
else:
    from jax_nvfp4_moe.build.worker import Failure, Tell, package, run
    from jax_nvfp4_moe.build.worker import versions as installed

FUNCTION = "trtllm_fp4_block_scale_moe"
# Strings in every module that the bridge can call (ffi/modules.cc), each followed by a NUL.
WANTED = (
    f"__tvm_ffi_{FUNCTION}",
    "FlashInferSetCubinCallback",
    "FlashInferSetCurrentCubin",
    "libcuda.so.1",  # The module must link to it, as JAX opens the driver privately.
)
# The versions whose kernel images are on PyPI; FlashInfer downloads those of others itself.
CUBINS_ON_PYPI = ("0.6.13",)
DISTRIBUTIONS = (
    "flashinfer-python",
    "flashinfer-cubin",
    "flashinfer-jit-cache",
    "apache-tvm-ffi",
    "torch",
)
# A toolkit with these files is taken to be complete; FlashInfer brings the rest.
TOOLKIT = (
    "bin/nvcc",
    "include/cuda_runtime.h",
    "include/nvrtc.h",
    "include/cublas_v2.h",
    "include/curand.h",
)


def main() -> None:
    """Runs the command that `build_trtllm` gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--known", required=True, help="versions of flashinfer-python")
    parser.add_argument("--archs", required=True, help="as in 10.0a,10.3a")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    args = parser.parse_args()
    known, archs = args.known.split(","), args.archs.split(",")
    run(lambda tell: make(known, archs, args.workspace, args.jobs, tell))


def make(known: list[str], archs: list[str], workspace: Path, jobs: int, tell: Tell) -> dict:
    """Finds or compiles the module; returns the facts for the manifest."""
    begun = time.monotonic()
    versions = check_versions(known)
    toolkit, lacks = find_toolkit()
    own_base = os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home()
    set_environment(archs, workspace, jobs, toolkit, Path(own_base))
    tell(stage="importing FlashInfer")
    env = importlib.import_module("flashinfer.jit.env")
    fused_moe = importlib.import_module("flashinfer.jit.fused_moe")
    check_images(tell)
    spec = fused_moe.gen_trtllm_gen_fused_moe_sm100_module()
    tell(stage="looking for a compiled module")
    found = find(spec, env, archs, Path(own_base), toolkit)
    library, compiled = found or (spec.jit_library_path, archs)
    steps = 0
    if found is None:
        if toolkit is None:
            raise Failure(f"no CUDA toolkit to compile with: {lacks}", "install")
        versions["nvcc"] = nvcc_version(toolkit)
        add_fallback_libraries(toolkit, workspace / "lib")
        tell(stage="compiling")
        steps = compile_module(spec, tell)
        if absent := lacking(library):
            raise Failure(f"{library} was compiled without {', '.join(absent)}", "log")
    return {
        "library": library,
        "built": steps > 0,
        "archs": compiled,
        "versions": {**versions, **cudart(library)},
        "tvm_ffi": package("tvm_ffi") / "lib" / "libtvm_ffi.so",
        "cubins": env.FLASHINFER_CUBIN_DIR,
        "seconds": time.monotonic() - begun,
    }


# --------------------------------------------------------------------------------- environment


def check_versions(known: list[str]) -> dict[str, str]:
    """Returns the versions of the installed distributions.

    Raises:
        Failure: they do not fit each other, or are unknown.
    """
    found = installed(DISTRIBUTIONS, required=("flashinfer-python", "torch", "apache-tvm-ffi"))
    version, cubin = found["flashinfer-python"], found.get("flashinfer-cubin")
    if version not in known:
        raise Failure(
            f"{sys.executable} has flashinfer-python {version}, expected one of "
            f"{', '.join(known)}: the arguments of {FUNCTION} differ between versions"
        )
    if cubin not in (version, None) or (cubin is None and version in CUBINS_ON_PYPI):
        has = f"flashinfer-cubin {cubin}" if cubin else "no flashinfer-cubin"
        source = (
            f"pip install flashinfer-cubin=={version}"
            if version in CUBINS_ON_PYPI
            else "that version is not on PyPI; without the package FlashInfer downloads its files: "
            "pip uninstall flashinfer-cubin"
        )
        raise Failure(
            f"{sys.executable} has {has}, expected {version}, the version of flashinfer-python: "
            f"{source}"
        )
    return found


def find_toolkit() -> tuple[Path | None, str]:
    """Returns a complete CUDA toolkit, or None and what the incomplete ones lack."""
    nvcc = shutil.which("nvcc")
    wheels = importlib.util.find_spec("nvidia")
    candidates = [
        *(os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")),
        nvcc and Path(nvcc).resolve().parents[1],
        "/usr/local/cuda",
        *(Path(each) / "cu13" for each in (wheels and wheels.submodule_search_locations) or ()),
    ]
    lacks = {}
    for candidate in candidates:
        if candidate and Path(candidate).is_dir():
            root = Path(candidate)
            absent = [name for name in TOOLKIT if not (root / name).exists()]
            if not absent:
                return root, ""
            lacks[str(root)] = f"{root} has no {', '.join(absent)}"
    return None, "; ".join(lacks.values()) or "none was found"


def set_environment(
    archs: list[str], workspace: Path, jobs: int, toolkit: Path | None, own_base: Path
) -> None:
    """Sets the variables that FlashInfer, ninja and the compilers read."""
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = " ".join(archs)
    # Our own workspace: the modules in FlashInfer's cache are linked with FlashInfer's flags.
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(workspace)
    os.environ["MAX_JOBS"] = str(jobs)
    os.environ["NINJA_STATUS"] = "[%f/%t] "
    os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "warning")
    # So that ninja is found in an environment that was not activated.
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)
    if importlib.util.find_spec("flashinfer_cubin") is not None:
        os.environ["FLASHINFER_NO_DOWNLOAD"] = "1"
    else:  # Images do not depend on the flags, so they stay where FlashInfer puts them.
        cubins = own_base / ".cache" / "flashinfer" / "cubins"
        os.environ.setdefault("FLASHINFER_CUBIN_DIR", str(cubins))


def check_images(tell: Tell) -> None:
    """Checks that all kernel images are present and intact; FlashInfer downloads them if allowed.

    Raises:
        Failure: one is missing or damaged.
    """
    artifacts = importlib.import_module("flashinfer.artifacts")
    loader = importlib.import_module("flashinfer.jit.cubin_loader")
    directory = artifacts.ArtifactPath.TRTLLM_GEN_BMM

    def get(name: str, sha256: str) -> bytes:
        try:
            data = loader.get_artifact(f"{directory}/{name}", sha256)
        except RuntimeError as error:  # It is missing, and downloads are forbidden.
            raise Failure(str(error)) from None
        if not data:
            raise Failure(
                f"the kernel image {directory}/{name} with the SHA-256 {sha256} is missing, and "
                "could not be downloaded",
                "log",
            )
        return data

    tell(stage="checking the kernels' images")
    lines = get("checksums.txt", artifacts.CheckSumHash.TRTLLM_GEN_BMM).decode().splitlines()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(get, *reversed(line.split())) for line in lines if line.strip()]
        try:
            for count, done in enumerate(concurrent.futures.as_completed(running), 1):
                done.result()
                if count % 500 == 0 or count == len(running):
                    tell(done=count, of=len(running))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# -------------------------------------------------------------------------------------- finding


def find(
    spec: Any, env: Any, archs: list[str], own_base: Path, toolkit: Path | None
) -> tuple[Path, list[str]] | None:
    """Returns an existing module that has all architectures, and its architectures, or None."""
    for library, compiled in candidates(spec, env, own_base, toolkit):
        if compiled is None:
            print(f"{library}: its architectures are unknown without cuobjdump")
        elif not compiled.issuperset(archs):
            print(f"{library} is compiled for {', '.join(sorted(compiled))}")
        elif absent := lacking(library):
            print(f"{library} lacks {', '.join(absent)}")
        else:
            return library, sorted(arch for arch in compiled if arch.startswith("10."))
    return None


def candidates(
    spec: Any, env: Any, own_base: Path, toolkit: Path | None
) -> Iterator[tuple[Path, set[str] | None]]:
    """Yields compiled modules with their architectures, or None if they are unknown."""
    # flashinfer-jit-cache, or the package itself: flashinfer-python@0.6.13:jit/core.py:255-261,
    # @0.7.2.post1:jit/core.py:491-501. Only the latter names architectures, and not always.
    if hasattr(spec, "aot_artifacts"):
        prebuilt = [(each.path, each.cuda_architectures) for each in spec.aot_artifacts]
    else:
        prebuilt = [(spec.aot_path, None)] if spec.is_aot else []
    for library, named in prebuilt:
        yield library, listed_images(library, toolkit) if named is None else spelled(named)
    # Modules that FlashInfer compiled at run time. ninja itself checks our own workspace.
    place = spec.jit_library_path.relative_to(env.FLASHINFER_WORKSPACE_DIR)
    versions = env.FLASHINFER_WORKSPACE_DIR.relative_to(env.FLASHINFER_BASE_DIR).parent
    for library in sorted((own_base / versions).glob(f"*/{place}")):
        if up_to_date(library.parent, toolkit):
            ninja = (library.parent / "build.ninja").read_text()
            yield library, spelled(re.findall(r"-gencode=arch=\w+,code=(sm_\w+)", ninja))


def listed_images(library: Path, toolkit: Path | None) -> set[str] | None:
    """Returns a library's architectures by cuobjdump, or None if there is no cuobjdump."""
    beside = toolkit / "bin" / "cuobjdump" if toolkit is not None else None
    command = str(beside) if beside and beside.exists() else shutil.which("cuobjdump")
    if command is None:
        return None
    done = subprocess.run(
        [command, "--list-elf", str(library)], capture_output=True, text=True, check=False
    )
    return spelled(re.findall(r"\.(sm_\d+[af]?)\.cubin", done.stdout))


def spelled(names: Any) -> set[str]:
    """Returns FLASHINFER_CUDA_ARCH_LIST's spelling: "10.0a" for "sm_100a" and "sm100a"."""
    found = [re.fullmatch(r"sm_?(\d+)(\d[af]?)", name) for name in names]
    return {f"{match[1]}.{match[2]}" for match in found if match}


def up_to_date(directory: Path, toolkit: Path | None) -> bool:
    """Whether ninja has nothing to do in a directory of FlashInfer's, with the same toolkit."""
    file = directory / "build.ninja"
    if not file.exists():
        return False
    home = re.search(r"^cuda_home = (.*)$", file.read_text(), re.MULTILINE)
    if toolkit is not None and (home is None or Path(home[1]).resolve() != toolkit.resolve()):
        return False
    command = ["ninja", "-n", "-C", str(directory), "-f", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and "no work to do" in done.stdout


def lacking(library: Path) -> list[str]:
    """Returns the strings that the bridge needs and the library lacks."""
    image = library.read_bytes()
    if not image.startswith(b"\x7fELF"):
        return ["an ELF header"]
    return [name for name in WANTED if name.encode() + b"\0" not in image]


def cudart(library: Path) -> dict[str, str]:
    """Returns the CUDA runtime that a library is linked to; JAX's must be the same."""
    name = re.search(rb"(libcudart\.so\.(\d+))\0", library.read_bytes())
    return {"libcudart": name[2].decode()} if name else {}


# ------------------------------------------------------------------------------------ compiling


def nvcc_version(toolkit: Path) -> str:
    """Returns nvcc's version."""
    done = subprocess.run(
        [str(toolkit / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True
    )
    version = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    return version[1] if version else done.stdout.strip()


def add_fallback_libraries(toolkit: Path, directory: Path) -> None:
    """Provides libcudart.so and libcuda.so for the linker where a toolkit has no such names.

    FlashInfer looks in lib64 and lib64/stubs (jit/cpp_ext.py), which PyPI's wheels lack. No wheel
    has libcuda.so, which comes with the driver. FlashInfer's directories come first if they exist.

    Raises:
        Failure: there is no libcudart, or no C++ compiler.
    """
    directory.mkdir(parents=True, exist_ok=True)
    folders = ("lib64", "lib", "targets/*/lib")
    found = [each for folder in folders for each in toolkit.glob(f"{folder}/libcudart.so*")]
    if not found:
        raise Failure(f"{toolkit} has no libcudart.so in lib64 or lib", "install")
    link = directory / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(min(found, key=lambda path: len(path.name)).resolve())
    stub = directory / "libcuda.so"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-shared", "-x", "c++", os.devnull, "-Wl,-soname,libcuda.so.1"]
    try:
        subprocess.run([*command, "-o", str(stub)], check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise Failure(f"{compiler} cannot link a library: {error}", "log") from None
    # Some compilers link only to used libraries by default, and would leave the stub out.
    flags = [os.environ.get("FLASHINFER_EXTRA_LDFLAGS", ""), shlex.quote(f"-L{directory}")]
    os.environ["FLASHINFER_EXTRA_LDFLAGS"] = " ".join([*flags, "-Wl,--no-as-needed", "-lcuda"])


def compile_module(spec: Any, tell: Tell) -> int:
    """Compiles FlashInfer's module as far as needed; returns the number of ninja's steps."""
    read, write = os.pipe()
    steps: list[str] = []
    follower = threading.Thread(target=follow, args=(read, steps, tell))
    follower.start()
    os.dup2(write, 1)  # ninja inherits it.
    os.close(write)
    # On SIGTERM to the group, ninja ends the compilers and removes partial files: wait for it.
    default = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        spec.build(verbose=True, need_lock=True)
    except RuntimeError as error:
        traceback.print_exc()
        raise Failure(f"FlashInfer could not compile its module: {error}", "log") from None
    finally:
        signal.signal(signal.SIGTERM, default)
        os.dup2(2, 1)
        follower.join()
    return len(steps)


def follow(read: int, steps: list[str], tell: Tell) -> None:
    """Copies ninja's output to stderr, and reports its progress."""
    with os.fdopen(read, errors="replace") as lines:
        for line in lines:
            print(line, end="", file=sys.stderr, flush=True)
            if match := re.match(r"\[(\d+)/(\d+)\] ", line):
                steps.append(line)
                tell(done=int(match[1]), of=int(match[2]))


if __name__ == "__main__":
    main()
