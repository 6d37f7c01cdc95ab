"""`python -m jax_nvfp4_moe build trtllm`: what it finds, compiles, refuses, writes down."""

import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path

import pytest

from jax_nvfp4_moe.bridge import manifest
from jax_nvfp4_moe.build import building
from jax_nvfp4_moe.build import trtllm as build_trtllm
from jax_nvfp4_moe.build import trtllm_worker as _flashinfer_build
from tests.support import commands
from tests.support.fake_flashinfer import IMAGES, NAME, Environment, compile_ahead, write

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler, g++")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    environment = Environment(tmp_path)
    for name in list(os.environ):
        if name.startswith(("FLASHINFER_", "CUDA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_HOME", str(environment.toolkit))
    monkeypatch.setenv("HOME", str(environment.home))
    monkeypatch.setenv("FAKE_JOURNAL", str(environment.journal))
    monkeypatch.setenv(manifest.CACHE_VARIABLE, str(environment.cache))
    return environment


run = partial(commands.run, "build", "trtllm")


# ------------------------------------------------------------------------------------- compiling


def test_builds(fake):
    code, out, err = run("--python", fake.python, "--arch", "10.3a, 10.0a", "--jobs", 3)
    assert (code, err) == (0, "")
    (module,) = manifest.read()
    assert (module.name, module.archs) == ("trtllm-0.6.13", ("10.0a", "10.3a"))
    image = module.path.read_bytes()
    assert module.sha256 == hashlib.sha256(image).hexdigest()
    assert module.path == fake.cache / f"trtllm-0.6.13-{module.sha256[:16]}" / f"{NAME}.so"
    assert module.cubins == fake.cubins.parents[1]
    assert module.versions == {
        "flashinfer-python": "0.6.13",
        "flashinfer-cubin": "0.6.13",
        "apache-tvm-ffi": "0.1.9",
        "torch": "2.13.0",
        "nvcc": "13.4.92",
        "libcudart": "13",
    }
    # The linker found the driver and the runtime by the names that FlashInfer gives it.
    for needed in (b"libcuda.so.1\0", b"libcudart.so.13\0"):
        assert needed in image
    (asked,) = fake.asked()
    assert asked["FLASHINFER_CUDA_ARCH_LIST"] == "10.0a 10.3a"
    assert (asked["CUDA_HOME"], asked["MAX_JOBS"]) == (str(fake.toolkit), "3")
    assert asked["PATH"].startswith(f"{fake.python.parent}:")  # where ninja is
    # FlashInfer's own cache has nothing new.
    assert not fake.home.exists()
    assert re.match(r"trtllm-0\.6\.13 for 10\.0a, 10\.3a: compiled, \d+ s\n", out)
    assert f"{module.path}\n" in out
    assert "torch 2.13.0, nvcc 13.4.92, libcudart 13\n" in out
    assert not list(fake.cache.glob("**/*.new"))


def test_again_compiles_nothing(fake):
    run("--python", fake.python)
    before = manifest.read()
    code, out, _ = run("--python", fake.python)
    assert code == 0
    assert "trtllm-0.6.13 for 10.0a, 10.3a: found as " in out
    assert manifest.read() == before


def test_json(fake):
    code, out, err = run("--python", fake.python, "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    (module,) = manifest.read()
    assert printed["path"] == str(module.path)
    assert printed["archs"] == list(module.archs) == ["10.0a", "10.3a"]
    assert (printed["name"], printed["built"], printed["found"]) == (module.name, True, None)
    assert printed["seconds"] > 0
    assert json.loads(run("--python", fake.python, "--json")[1])["built"] is False


def test_progress(fake):
    """As asked for, also where stderr is no terminal; by default nothing there (test_builds)."""
    code, _, err = run("--python", fake.python, "--progress")
    assert code == 0
    lines = err.splitlines()
    assert lines[0] == "importing FlashInfer"
    assert re.fullmatch(
        r"\[3/3\] after \d+ s", lines[lines.index("checking the kernels' images") + 1]
    )
    compiling = lines[lines.index("compiling") :]
    assert [line.split(" after")[0] for line in compiling] == ["compiling", "[1/2]", "[2/2]"]


def test_progress_on_a_terminal(fake, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    err = run("--python", fake.python)[2]
    assert "2/2" in err
    assert re.search(r"compiling.*0:00:0\d", err)
    assert run("--python", fake.python, "--no-progress")[2] == ""


@pytest.mark.parametrize("spelling", ["toolkit", "path", "wheels"])
def test_toolkits(fake, monkeypatch, spelling):
    """In $CUDA_HOME, by nvcc in the path, or of PyPI's wheels."""
    monkeypatch.delenv("CUDA_HOME")
    if spelling == "wheels" and (other := _flashinfer_build.find_toolkit()[0]) is not None:
        pytest.skip(f"another toolkit comes first: {other}")
    meant = fake.toolkit
    if spelling == "toolkit":
        monkeypatch.setenv("CUDA_PATH", str(meant))
    elif spelling == "path":
        monkeypatch.setenv("PATH", f"{meant / 'bin'}:{os.environ['PATH']}")
    else:
        meant = fake.site / "nvidia" / "cu13"
        meant.parent.mkdir()
        fake.toolkit.rename(meant)
    code, _, err = run("--python", fake.python)
    assert (code, err) == (0, "")
    assert fake.asked()[0]["CUDA_HOME"] == str(meant)


def test_an_incomplete_toolkit_is_passed_by(fake, monkeypatch):
    incomplete = fake.root / "other"
    write(incomplete / "bin" / "nvcc", "", 0o755)
    monkeypatch.setenv("CUDA_HOME", str(incomplete))
    monkeypatch.setenv("CUDA_PATH", str(fake.toolkit))
    assert run("--python", fake.python)[0] == 0
    assert fake.asked()[0]["CUDA_HOME"] == str(fake.toolkit)


def test_no_complete_toolkit(fake):
    (fake.toolkit / "include" / "curand.h").unlink()
    if (other := _flashinfer_build.find_toolkit()[0]) is not None:
        pytest.skip(f"there is another toolkit: {other}")
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert f"no CUDA toolkit to compile with: {fake.toolkit} has no include/curand.h" in err
    assert "nvidia-curand==" in err
    assert (fake.asked(), manifest.read()) == ([], ())


def test_the_linker_is_not_there(fake, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert err.startswith("error: no-such-compiler cannot link a library")
    assert fake.asked() == []


# -------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize("arch", ["9.0a", "10.0", "10.0a 10.3a", "sm_100a", "", "10.0a,", "12.0f"])
def test_archs(fake, arch):
    code, out, err = run("--python", fake.python, "--arch", arch)
    assert (code, out) == (2, "")
    assert (
        f"'{arch}' is not a list of architectures, expected some of 10.0a, 10.0f, 10.3a"
        in " ".join(err.split())
    )
    assert not fake.cache.exists()


def test_no_such_interpreter(fake):
    code, _, err = run("--python", fake.root / "nothing")
    assert code == 3
    assert re.match(r"error: .*No such file or directory: '.*/nothing'", err)


def test_a_cache_that_cannot_be_written(fake, monkeypatch):
    (fake.root / "file").touch()
    monkeypatch.setenv(manifest.CACHE_VARIABLE, str(fake.root / "file" / "cache"))
    code, _, err = run("--python", fake.python)
    assert code == 3
    assert "Not a directory" in err


def test_a_malformed_manifest(fake):
    """Is known before anything is compiled."""
    write(fake.cache / "modules.json", "{")
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert "modules.json is no manifest of modules" in err
    assert fake.asked() == []


@pytest.mark.parametrize("lack", ["flashinfer-python", "torch", "apache-tvm-ffi"])
def test_flashinfer_is_not_there(fake, lack):
    fake.remove(lack, "none")
    code, out, err = run("--python", fake.python)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {fake.python} has no {lack}. Install: pip install torch==")
    places = [line.index(name) for name in ("torch==", "flashinfer-python==", "nvidia-cuda-nvcc")]
    assert places == sorted(places)
    assert (fake.asked(), manifest.read()) == ([], ())


def test_unknown_versions(fake):
    for package in ("flashinfer-python", "flashinfer-cubin"):
        fake.install(package, "0.6.14")
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert "has flashinfer-python 0.6.14, expected one of 0.6.13, 0.7.2.post1: the arguments" in err
    assert (fake.asked(), manifest.read()) == ([], ())


@pytest.mark.parametrize(
    ("version", "cubin", "said"),
    [
        (
            "0.6.13",
            "0.6.12",
            "flashinfer-cubin 0.6.12, expected 0.6.13, .*: pip install .*==0.6.13",
        ),
        (
            "0.6.13",
            None,
            "no flashinfer-cubin, expected 0.6.13, .*: pip install .*==0.6.13",
        ),
        ("0.7.2.post1", "0.6.13", "-cubin 0.6.13, expected 0.7.2.post1, .* downloads .*: pip unin"),
    ],
)
def test_images_of_another_version(fake, version, cubin, said):
    fake.install("flashinfer-python", version)
    fake.remove("flashinfer-cubin", "flashinfer_cubin")
    if cubin is not None:
        fake.install_cubins(cubin)
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert re.search(f"has .*{said}", err), err
    assert (fake.asked(), manifest.read()) == ([], ())


def test_images_that_flashinfer_downloads(fake, monkeypatch):
    fake.install("flashinfer-python", "0.7.2.post1")
    fake.remove("flashinfer-cubin", "flashinfer_cubin")
    monkeypatch.setenv("FAKE", "offline")
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert "abc/bmm/checksums.txt with the SHA-256" in err
    assert "could not be downloaded" in err
    assert fake.asked() == []
    monkeypatch.delenv("FAKE")
    assert run("--python", fake.python)[0] == 0
    (module,) = manifest.read()
    assert module.name == "trtllm-0.7.2.post1"
    assert module.cubins == fake.home / ".cache" / "flashinfer" / "cubins"  # FlashInfer's own
    assert sorted(each.name for each in module.cubins.glob("abc/bmm/*.cubin")) == IMAGES


@pytest.mark.parametrize("how", ["lost", "spoiled"])
def test_images_are_checked(fake, how):
    image = fake.cubins / IMAGES[1]
    if how == "lost":
        image.unlink()
    else:
        image.write_text("imagf")
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert f"abc/bmm/{IMAGES[1]}" in err
    assert (fake.asked(), manifest.read()) == ([], ())


# --------------------------------------------------------------------------------------- finding


@pytest.fixture
def prebuilt(fake):
    """Where flashinfer-jit-cache's modules are looked for, with one there."""
    path = fake.site / "flashinfer" / "data" / "aot" / NAME / f"{NAME}.so"
    compile_ahead(path)
    return path


def cuobjdump(fake, *archs):
    lines = "\\n".join(f"ELF file    {i}: x.{i}.sm_{arch}.cubin" for i, arch in enumerate(archs))
    write(fake.toolkit / "bin" / "cuobjdump", f"#!/bin/sh\nprintf '{lines}\\n'\n", 0o755)


def test_a_prebuilt_module_is_copied(fake, prebuilt):
    cuobjdump(fake, "100a", "90a", "103a")
    code, out, err = run("--python", fake.python, "--arch", "10.0a")
    assert (code, err) == (0, "")
    assert f"trtllm-0.6.13 for 10.0a, 10.3a: found as {prebuilt}" in out
    (module,) = manifest.read()
    assert module.path.read_bytes() == prebuilt.read_bytes()
    assert "nvcc" not in module.versions
    assert fake.asked() == []


def test_no_toolkit_is_needed_for_it(fake, prebuilt, monkeypatch):
    cuobjdump(fake, "100a", "103a")
    monkeypatch.setenv("PATH", f"{fake.toolkit / 'bin'}:{os.environ['PATH']}")
    (fake.toolkit / "include" / "curand.h").unlink()
    assert run("--python", fake.python)[0] == 0
    assert fake.asked() == []


def test_a_prebuilt_module_for_others_is_not(fake, prebuilt):
    cuobjdump(fake, "100a", "90a")
    code, out, _ = run("--python", fake.python)
    assert code == 0
    assert ": compiled, " in out
    assert f"{prebuilt} is compiled for 10.0a, 9.0a\n" in log(fake)


def test_a_prebuilt_module_for_who_knows_what_is_not(fake, prebuilt):
    if shutil.which("cuobjdump"):
        pytest.skip("there is a cuobjdump")
    assert ": compiled, " in run("--python", fake.python)[1]
    assert f"{prebuilt}: its architectures are unknown without cuobjdump" in log(fake)


@pytest.mark.parametrize(
    "lack", ["__tvm_ffi_trtllm_fp4_block_scale_moe", "FlashInferSetCubinCallback", "libcuda.so.1"]
)
def test_a_prebuilt_module_must_have_what_the_bridge_wants(fake, prebuilt, lack):
    cuobjdump(fake, "100a", "103a")
    compile_ahead(prebuilt, without=lack)
    assert ": compiled, " in run("--python", fake.python)[1]
    assert f"{prebuilt} lacks {lack}\n" in log(fake)


def test_prebuilt_modules_that_say_what_they_are_for(fake):
    """As those of 0.7.2.post1 do."""
    fake.install("flashinfer-python", "0.7.2.post1")
    fake.install_cubins("0.7.2.post1")
    known, other = fake.root / "known.so", fake.root / "other.so"
    for path in (known, other):
        compile_ahead(path)
    fused_moe = fake.site / "flashinfer" / "jit" / "fused_moe.py"
    more = f"""
    from types import SimpleNamespace as _N
    Spec.aot_artifacts = (
        _N(path=Path({str(other)!r}), cuda_architectures=frozenset({{"sm100a", "sm90a"}})),
        _N(path=Path({str(known)!r}), cuda_architectures=frozenset({{"sm103a", "sm100a"}})),
    )
    """
    fused_moe.write_text(fused_moe.read_text() + textwrap.dedent(more))
    assert f"10.0a, 10.3a: found as {known}" in run("--python", fake.python)[1]
    assert f"10.0a: found as {other}" in run("--python", fake.python, "--arch", "10.0a")[1]


@pytest.fixture
def cached(fake):
    """Where FlashInfer's own cache has a module, with one there that ninja would leave as it is."""
    path = fake.home / ".cache/flashinfer/1/100a_103a/cached_ops" / NAME / f"{NAME}.so"
    compile_ahead(path)
    flags = "".join(f"-gencode=arch=compute_{x},code=sm_{x} $\n    " for x in ("100a", "103a"))
    write(path.with_name("build.ninja"), f"cuda_home = {fake.toolkit}\ncuda_cflags = {flags}\n")
    ninja = """
        #!/bin/sh
        test "$1 $2 $4" = "-n -C -f" || exit 1
        echo "ninja: $(cat $3/state)"
    """
    write(fake.python.parent / "ninja", textwrap.dedent(ninja).lstrip(), 0o755)
    write(path.with_name("state"), "no work to do.")
    return path


@pytest.mark.parametrize("base", [False, True])
def test_what_flashinfer_compiled_is_copied(fake, cached, monkeypatch, base):
    """From its default cache, and from one that FLASHINFER_WORKSPACE_BASE names."""
    if base:
        moved = fake.home.rename(fake.root / "base")
        monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(moved))
        cached = moved / cached.relative_to(fake.home)
    code, out, _ = run("--python", fake.python, "--arch", "10.3a")
    assert code == 0
    assert f"for 10.0a, 10.3a: found as {cached}" in out
    assert fake.asked() == []


@pytest.mark.parametrize("why", ["arch", "stale", "toolkit", "no build.ninja"])
def test_what_flashinfer_compiled_otherwise_is_not(fake, cached, why):
    ninja = cached.with_name("build.ninja")
    if why == "arch":
        ninja.write_text(ninja.read_text().replace("103a", "90a"))
    elif why == "stale":
        cached.with_name("state").write_text("would compile")
    elif why == "toolkit":
        ninja.write_text(ninja.read_text().replace(str(fake.toolkit), "/usr/local/cuda-12"))
    else:
        ninja.unlink()
    code, out, _ = run("--python", fake.python)
    assert code == 0
    assert ": compiled, " in out


def log(fake):
    return (fake.cache / "build-trtllm.log").read_text()


# --------------------------------------------------------------------------------------- failing


def test_a_failed_build(fake, monkeypatch):
    run("--python", fake.python, "--arch", "10.0a")
    before = (fake.cache / "modules.json").read_bytes()
    monkeypatch.setenv("FAKE", "fail")
    code, out, err = run("--python", fake.python, "--arch", "10.3a")
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[0] == "error: FlashInfer could not compile its module: Ninja build failed."
    assert lines[1:3] == ["FAILED: source.o", "source.cpp:1:1: error: no such thing"]
    assert lines[-1] == f"The whole output is in {fake.cache / 'build-trtllm.log'}"
    assert max(map(len, lines)) <= 250
    assert "x" * 1000 in log(fake)
    assert (fake.cache / "modules.json").read_bytes() == before


def test_a_build_that_is_killed(fake, monkeypatch):
    """As by the kernel, when memory runs out."""
    monkeypatch.setenv("FAKE", "die")
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert err.startswith(f"error: {fake.python} ended with -9\n")
    assert manifest.read() == ()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build(fake, monkeypatch, end):
    """Nothing runs on and nothing half written stays; the next build is as any."""
    monkeypatch.setenv("FAKE", "hang")
    folder = fake.cache / f"flashinfer/.cache/flashinfer/1/100a/cached_ops/{NAME}"
    arguments = ["build", "trtllm", "--python", str(fake.python), "--arch", "10.0a"]
    # Python heeds Ctrl-C unless it was ignored before, as it is for what a shell runs behind a "&".
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = f"{heed}; from jax_nvfp4_moe.cli import main; main({arguments})"
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        commands.wait_until((folder / "pids").exists)
        pids = [int(pid) for pid in (folder / "pids").read_text().split()]
        assert all(map(alive, pids))
        assert (folder / f"{NAME}.so").read_bytes() == b"half"
        process.send_signal(end)
        try:
            _, err = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    if end == signal.SIGINT:
        assert process.returncode == 1
        assert b"Abort" in err
    else:
        commands.wait_until(lambda: not any(map(alive, pids)))
    assert not any(map(alive, pids))
    assert not (folder / f"{NAME}.so").exists()
    assert not list(fake.cache.glob("trtllm-*"))
    assert manifest.read() == ()
    monkeypatch.delenv("FAKE")
    assert run("--python", fake.python, "--arch", "10.0a")[0] == 0


def test_another_build_is_waited_for(fake, capfd):
    fake.cache.mkdir()
    waited = []

    def second():
        waited.append(build_trtllm.build_trtllm(("10.0a",), python=fake.python))

    with building.locked(fake.cache):
        thread = threading.Thread(target=second)
        thread.start()
        commands.wait_until(lambda: "Waiting for another build in" in capfd.readouterr().err)
        thread.join(timeout=2)  # longer than a build takes
        assert (fake.asked(), waited) == ([], [])
    thread.join()
    assert [each.module for each in waited] == list(manifest.read())


# --------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("version", "here"),
    [
        ("0.1.6", True),
        ("0.1.15.post2", True),
        ("0.1.5", False),
        ("0.2.0", False),
        ("1.0", False),
        (None, False),
    ],
)
def test_whose_tvm_ffi(fake, monkeypatch, version, here):
    """This environment's if FlashInfer can call it, so that a process has one; else its own."""
    own = fake.root / "own"
    if version is not None:
        write(own / "tvm_ffi" / "__init__.py", "raise ImportError('imported')")
        write(own / "tvm_ffi" / "lib" / "libtvm_ffi.so", "")
    spec = building.importlib.util.spec_from_file_location(
        "tvm_ffi",
        own / "tvm_ffi" / "__init__.py",
        submodule_search_locations=[str(own / "tvm_ffi")],
    )
    monkeypatch.setattr(building.importlib.util, "find_spec", lambda _: spec if version else None)
    monkeypatch.setattr(building.importlib.metadata, "version", lambda _: version)
    module = build_trtllm.build_trtllm(("10.0a",), python=fake.python).module
    assert module.tvm_ffi == (own if here else fake.site) / "tvm_ffi" / "lib" / "libtvm_ffi.so"


def test_register_what_was_built(fake, monkeypatch):
    calls = []
    monkeypatch.setattr(manifest.library, "register_module", lambda *a, **_: calls.append(a))
    run("--python", fake.python)
    (module,) = manifest.read()
    module.register()
    assert calls == [("trtllm-0.6.13", module.path)]


def test_modules_can_be_read_by_others(fake):
    """Built by one user, as in an image of a container, and used by another."""
    run("--python", fake.python)
    (module,) = manifest.read()
    for path in (module.path, module.path.parent, fake.cache / "modules.json"):
        assert path.stat().st_mode & stat.S_IROTH


def test_help():
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"--{name}" in out for name in ("arch", "python", "jobs", "progress", "json"))
