"""Compiles FlashInfer's CuTe-DSL kernels: a script for a Python that has FlashInfer and CuTe-DSL.

`build_cute_dsl` runs it in a separate process since CuTe-DSL imports torch. It needs no GPU, driver
or CUDA toolkit. `worker` documents what it prints.
"""

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":  # The package may not be there.
    from worker import Failure, Tell, package, run, versions
else:
    from jax_nvfp4_moe.build.worker import Failure, Tell, package, run, versions

REQUIRED = ("flashinfer-python", "nvidia-cutlass-dsl", "apache-tvm-ffi")
KERNELS = Path(__file__).resolve().with_name("cute_dsl_kernels.py")
W4A16 = KERNELS.with_name("cute_dsl_w4a16.py")
LIBRARY = "cute_dsl_moe.so"
CLASSES = "flashinfer.fused_moe.cute_dsl.blackwell"
# Packages whose __init__.py is not run.
UNOPENED = (
    "flashinfer",
    "flashinfer.fused_moe",
    "flashinfer.fused_moe.cute_dsl",
    "flashinfer.cute_dsl",
    "flashinfer.jit",
    "flashinfer.quantization",
)
# The names that `bridge.cute_dsl` makes.
NAME = re.compile(
    r"gemm([12])_(\w+)_(static|per_token|none)_t(\d+)(?:_n(\d+))?(?:_c(\d+))?_sm(\d+a)"
)


def main() -> None:
    """Runs the command that `build_cute_dsl` gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--functions", required=True, help="JSON: the functions' names for each version"
    )
    parser.add_argument("--workspace", type=Path, required=True)
    args = parser.parse_args()
    run(lambda tell: make(json.loads(args.functions), args.workspace, tell))


def make(functions: dict[str, list[str]], workspace: Path, tell: Tell) -> dict[str, Any]:
    """Compiles and links the library; returns the facts for the manifest."""
    begun = time.monotonic()
    found = versions((*REQUIRED, "torch"), required=REQUIRED)
    check_version(found["flashinfer-python"], list(functions))
    names = functions[found["flashinfer-python"]]
    objects = workspace / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    kept = {name: objects / f"{name}-{key(name, found)}.o" for name in names}
    missing = {name: path for name, path in kept.items() if not path.exists()}
    if missing:
        tell(stage="importing CuTe-DSL and FlashInfer's kernels")
        kernels, classes = import_kernels(workspace)
        tell(stage="compiling")
        for done, (name, path) in enumerate(missing.items(), 1):
            compile_one(kernels, classes, found["flashinfer-python"], name, path)
            tell(done=done, of=len(missing))
    runtime = find_runtime()
    tell(stage="linking")
    tvm_ffi = package("tvm_ffi") / "lib" / "libtvm_ffi.so"
    cudart = re.search(r"/cu(\d+)/", str(runtime))
    found["libcudart"] = cudart[1] if cudart else "13"
    library = workspace / LIBRARY
    link(list(kept.values()), runtime, tvm_ffi, found["libcudart"], library)
    return {
        "library": library,
        "functions": names,
        "built": bool(missing),
        "versions": found,
        "tvm_ffi": tvm_ffi,
        "runtime": runtime,
        "seconds": time.monotonic() - begun,
    }


def check_version(version: str, known: list[str]) -> None:
    """Checks that the version is one whose classes have known signatures.

    Raises:
        Failure: it is not.
    """
    if version not in known:
        raise Failure(
            f"{sys.executable} has flashinfer-python {version}, expected {' or '.join(known)}: the "
            "CuTe-DSL kernels' signatures differ between versions"
        )


def key(name: str, found: dict[str, str]) -> str:
    """Returns the key of a stored object, which depends on everything that it is made from."""
    parts = [name, found["flashinfer-python"], found["nvidia-cutlass-dsl"], host()]
    parts += [Path(file).read_text("utf-8") for file in (__file__, KERNELS, W4A16)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def host() -> str:
    """Returns this processor's instruction sets: CuTe-DSL compiles the launching code for them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def import_kernels(workspace: Path) -> tuple[ModuleType, ModuleType]:
    """Returns `cute_dsl_kernels`, and FlashInfer's package of kernel classes.

    The packages above and beside the latter are not run, since they import much that is not needed
    here, such as triton. 0.7.2's classes import enumerations and helpers from them, which write
    into FlashInfer's workspace.
    """
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(workspace)
    root = package("flashinfer")
    for name in UNOPENED:
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    file = root.joinpath(*CLASSES.split(".")[1:], "__init__.py")
    if not file.is_file():
        raise Failure(f"{file}, FlashInfer's CuTe-DSL kernels, is missing", "install")
    classes = importlib.import_module(CLASSES)
    return load(KERNELS), classes


def load(file: Path) -> ModuleType:
    """Loads a module from its path, so that other modules can import it by its bare name."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, file
    sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def scratch(workspace: Path) -> Iterator[Path]:
    """Yields an empty directory, emptied if a killed build left files; one build runs at a time."""
    directory = workspace / "new"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def compile_one(kernels: Any, classes: ModuleType, version: str, name: str, path: Path) -> None:
    """Compiles one function, and stores its object and, for inspection, its PTX."""
    match = NAME.fullmatch(name)
    assert match is not None, name
    gemm, what, scheme, tile, n, cluster_n, arch = match.groups()
    begun = time.monotonic()
    with scratch(path.parents[1]) as new:
        options = f"--gpu-arch sm_{arch} --keep-ptx --dump-dir={new}"
        if scheme == "none":
            # The package does not import this class.
            file = importlib.import_module(f"{CLASSES}.moe_w4a16_kernel")
            own = load(W4A16)
            compiled = own.gemm1(file, what, options) if gemm == "1" else own.gemm2(file, options)
        elif gemm == "1":
            compiled = kernels.gemm1(classes, version, what, scheme, int(tile), int(n), options)
        else:
            tiling = int(tile), int(n), int(cluster_n)
            compiled = kernels.gemm2(classes, version, what, scheme, *tiling, options)
        compiled.export_to_c(str(new / path.name), name)
        for ptx in new.glob("*.ptx"):
            ptx.replace(path.with_suffix(".ptx"))
        (new / path.name).replace(path)
    print(f"{name}: {time.monotonic() - begun:.1f} s, {path.stat().st_size} bytes", flush=True)


def find_runtime() -> Path:
    """Returns the path of libcute_dsl_runtime.so, which the objects call.

    Raises:
        Failure: CuTe-DSL does not find it.
    """
    runtime = importlib.import_module("cutlass.runtime")
    for each in runtime.find_runtime_libraries(enable_tvm_ffi=False):
        if Path(each).name == "libcute_dsl_runtime.so" and Path(each).is_file():
            return Path(each).resolve()
    raise Failure(f"{sys.executable} has no libcute_dsl_runtime.so", "install")


def link(objects: list[Path], runtime: Path, tvm_ffi: Path, cudart: str, library: Path) -> None:
    """Links the objects with the libraries that they call, by their present paths.

    The library also names libcudart, not for the objects (libcute_dsl_runtime.so contains its own)
    but for the bridge, which sets the device and loads kernels through the CUDA runtime that a
    module is linked to (ffi/modules.h). An empty stand-in suffices for linking: at run time the
    process has JAX's.

    Raises:
        Failure: the linker is missing or fails.
    """
    compiler = os.environ.get("CXX", "c++")
    name = f"libcudart.so.{cudart}"
    wheels = importlib.util.find_spec("nvidia")
    roots = [Path(each) for each in (wheels and wheels.submodule_search_locations) or ()]
    beside = [each.parent for root in roots for each in sorted(root.glob(f"*/lib/{name}"))]
    paths = [f"-Wl,-rpath,{each}" for each in (runtime.parent, tvm_ffi.parent, *beside)]
    with scratch(library.parent) as new:
        stub, linked = new / name, new / library.name
        empty = [compiler, "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{name}"]
        command = [compiler, "-shared", "-Wl,--no-as-needed", *map(str, objects)]
        command += [str(runtime), str(tvm_ffi), str(stub), "-Wl,--no-undefined", *paths]
        try:
            subprocess.run([*empty, "-o", str(stub)], check=True)
            subprocess.run([*command, "-o", str(linked)], check=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise Failure(f"{compiler} cannot link a library: {error}", "log") from None
        linked.replace(library)


if __name__ == "__main__":
    main()
