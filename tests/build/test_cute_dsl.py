"""`python -m jax_nvfp4_moe build cute_dsl`: what it compiles, keeps, refuses, writes down."""

import ctypes.util
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.bridge import cute_dsl, library, manifest
from jax_nvfp4_moe.build import building
from jax_nvfp4_moe.build import cute_dsl as build_cute_dsl
from tests.recording_cuda import manifest as recorded
from tests.support import commands
from tests.support.device_tensors import call_on_no_device
from tests.support.fake_cute_dsl import Environment
from tests.support.fake_flashinfer import write

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler, g++")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    environment = Environment(tmp_path)
    monkeypatch.setenv("FAKE_JOURNAL", str(environment.journal))
    monkeypatch.setenv(manifest.CACHE_VARIABLE, str(environment.cache))
    return environment


run = partial(commands.run, "build", "cute_dsl")


def compiled(fake):
    return [each["name"] for each in fake.asked()]


def functions(arch, tactics="all", version="0.6.13"):
    return list(cute_dsl.functions(version, tactics, (arch,)))


def test_names():
    assert functions("10.3a", "default") == [
        "gemm1_silu_static_t128_n128_sm103a",
        "gemm2_finalize_static_t128_n128_c1_sm103a",
    ]
    names = functions("10.0a")
    assert len(set(names)) == len(names) == 12
    assert names[3] == "gemm1_silu_static_t256_n256_sm100a"
    assert names[-1] == "gemm2_finalize_static_t256_n256_c2_sm100a"
    assert functions("10.3a", "default", "0.7.2.post1") == [
        *(
            f"gemm1_{activation}_{scheme}_sm103a"
            for activation in ("silu", "swiglu_oai", "gelu_tanh", "relu2")
            for scheme in ("static_t128_n128", "per_token_t128_n128", "none_t128")
        ),
        *(
            f"gemm2_{what}_{scheme}_t128_n128_c1_sm103a"
            for scheme in ("static", "per_token")
            for what in ("finalize", "rows")
        ),
        "gemm2_rows_none_t128_sm103a",
    ]
    names = functions("10.0a", version="0.7.2.post1")
    assert len(set(names)) == len(names) == 69
    assert len([name for name in names if "_none_" in name]) == 5


def test_builds(fake):
    code, out, err = run("--python", fake.python)
    assert (code, err) == (0, "")
    expected = functions("10.0a") + functions("10.3a")
    assert compiled(fake) == expected
    (module,) = manifest.read()
    assert (module.name, module.archs) == ("cute_dsl-0.6.13", ("10.0a", "10.3a"))
    assert module.functions == tuple(expected)
    image = module.path.read_bytes()
    assert module.sha256 == hashlib.sha256(image).hexdigest()
    assert module.path == fake.cache / f"cute_dsl-0.6.13-{module.sha256[:16]}" / "cute_dsl_moe.so"
    assert (module.cubins, module.needs) == (None, (fake.runtime,))
    assert module.versions == {
        "flashinfer-python": "0.6.13",
        "nvidia-cutlass-dsl": "4.8.1",
        "apache-tvm-ffi": "0.1.9",
        "torch": "2.13.0",
        "libcudart": "13",
    }
    for needed in (b"libcute_dsl_runtime.so\0", b"libtvm_ffi.so\0", b"libcudart.so.13\0"):
        assert needed in image
    assert str(fake.runtime.parent).encode() in image  # where it is found
    assert re.match(r"cute_dsl-0\.6\.13 for 10\.0a, 10\.3a: compiled, \d+ s\n", out)
    assert f"{module.path}\ncalls {module.tvm_ffi}\ncalls {fake.runtime}\nexports gemm1_" in out
    kept = {each.suffix for each in (fake.cache / "cute_dsl" / "objects").iterdir()}
    assert kept == {".o", ".ptx"}
    assert not (fake.cache / "cute_dsl" / "new").exists()


def compiled_by_name(fake, version, *arguments):
    fake.install_flashinfer(version)
    code, _, err = run("--python", fake.python, "--arch", "100a", *arguments)
    assert code == 0, err
    return {each["name"]: each for each in fake.asked()}


def test_what_is_compiled(fake):
    """Tilings, clusters and the sizes that the generated checks hold calls to."""
    by_name = compiled_by_name(fake, "0.6.13")
    gemm1 = by_name["gemm1_silu_static_t256_n128_sm100a"]
    assert (gemm1["mma_tiler_mn"], gemm1["cluster_shape_mn"]) == ([256, 128], [2, 1])
    assert (gemm1["topk"], gemm1["sf_vec_size"], gemm1["enable_pdl"]) == (1, 16, False)
    assert gemm1["options"].startswith("--enable-tvm-ffi --gpu-arch sm_100a --keep-ptx")
    assert gemm1["arguments"][1] == ["uint8", ["E/1", "2I/128", "H/2/128"], 32]
    assert gemm1["arguments"][2] == ["e4m3", ["T/1", "H/16/16"], 16]
    gemm2 = by_name["gemm2_finalize_static_t128_n256_c2_sm100a"]
    assert (gemm2["mma_tiler_mn"], gemm2["cluster_shape_mn"]) == ([128, 256], [1, 2])
    assert (gemm2["use_blkred"], gemm2["enable_pdl"]) == (True, False)
    assert gemm2["arguments"][1] == ["uint8", ["E/1", "H/512", "I/2/32"], 32]


def quantized(version):
    """Without those of W4A16."""
    return [each for each in cute_dsl.VERSIONS[version] if each.scheme != "none"]


def test_what_is_compiled_of_later_versions(fake):
    """Beside tilings: activations, in numbers of FlashInfer's, scales and what is written."""
    by_name = compiled_by_name(fake, "0.7.2.post1", "--tactics", "default")
    types = {"silu": 3, "swiglu_oai": 3, "gelu_tanh": 8, "relu2": 6}
    for variant in quantized("0.7.2.post1"):
        gemm1 = by_name[cute_dsl.gemm1(variant, cute_dsl.Tactic(), "10.0a")]
        activation = Activation(variant.activation)
        assert gemm1["activation_type"] == types[variant.activation]
        assert gemm1["gated"] == activation.gated
        assert gemm1["use_a_per_token_scale"] == (variant.scheme == "per_token")
        if activation.name == "swiglu_oai":
            constants = activation.alpha, activation.beta, activation.limit
        else:
            constants = 1.0, 0.0, 3e38
        names = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
        assert tuple(gemm1[name] for name in names) == constants
        gemm2 = by_name[cute_dsl.gemm2(variant, cute_dsl.Tactic(), "10.0a")]
        assert gemm2["use_a_per_token_scale"] == (variant.scheme == "per_token")
        assert gemm2["use_fused_finalize"] == variant.finalize
    gemm1 = by_name["gemm1_relu2_per_token_t128_n128_sm100a"]
    assert gemm1["arguments"][1] == ["uint8", ["E/1", "I/128", "H/2/128"], 32]
    assert gemm1["arguments"][9:11] == [
        ["float32", ["T/1"], None],
        ["bfloat16", ["M/128", "I/128"], 32],
    ]
    gemm2 = by_name["gemm2_rows_per_token_t128_n128_c1_sm100a"]
    assert gemm2["arguments"][10:12] == [
        ["float32", ["M/128"], None],
        ["bfloat16", ["T/1", "K/1", "H/128"], 32],
    ]


def test_what_is_compiled_for_bfloat16_rows(fake):
    """One tiling, for as many experts as are ever asked for; nothing that depends on top_k."""
    by_name = compiled_by_name(fake, "0.7.2.post1", "--tactics", "default")
    gemm2 = by_name["gemm2_rows_none_t128_sm100a"]
    for activation, number, constants in (
        ("silu", 3, (1.0, 0.0, 3e38)),
        ("swiglu_oai", 3, (1.702, 1.0, 7.0)),
        ("gelu_tanh", 8, (1.0, 0.0, 3e38)),
        ("relu2", 6, (1.0, 0.0, 3e38)),
    ):
        gemm1 = by_name[f"gemm1_{activation}_none_t128_sm100a"]
        names = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
        assert tuple(gemm1[name] for name in names) == constants
        assert gemm1["activation_type"] == number
        for gemm in (gemm1, gemm2):
            assert (gemm["mma_tiler_mnk"], gemm["cluster_shape_mn"]) == ([256, 128, 256], [2, 1])
            assert gemm["use_2cta_instrs"]
            assert gemm["group_count"] == cute_dsl.W4A16_EXPERTS
            assert not (gemm["use_fused_finalize"] or gemm["enable_pdl"])
            assert gemm["options"].startswith("--enable-tvm-ffi --gpu-arch sm_100a --keep-ptx")
        # Rows of w1 may end within a cluster of tiles, those of w2 do not.
        assert not gemm1["m_cluster_aligned"]
        rows, inner = ("I/128", "I/128") if activation == "relu2" else ("2I/128", "I/64")
        assert gemm1["arguments"][0] == ["bfloat16", ["M/128", "H/256"], 32]
        assert gemm1["arguments"][1] == ["uint8", ["E/1", rows, "H/2/128"], 32]
        assert gemm1["arguments"][7] == ["bfloat16", ["M/128", inner], 32]
    assert (gemm2["activation_type"], gemm2["m_cluster_aligned"]) == (None, True)
    assert gemm2["arguments"][1] == ["uint8", ["E/1", "H/256", "I/2/32"], 32]
    assert gemm2["arguments"][7] == ["bfloat16", ["M/128", "H/256"], 32]


@pytest.mark.parametrize("version", cute_dsl.VERSIONS)
def test_parameters(fake, version):
    """In the order that calls have them; and then the stream."""
    by_name = compiled_by_name(fake, version, "--tactics", "default")
    for variant in cute_dsl.VERSIONS[version]:
        for gemm, parameters in (
            (cute_dsl.gemm1, cute_dsl.gemm1_parameters(variant)),
            (cute_dsl.gemm2, cute_dsl.gemm2_parameters(variant)),
        ):
            function = by_name[gemm(variant, cute_dsl.Tactic(), "10.0a")]
            assert function["parameters"] == [*parameters, "stream"]
            assert len(function["arguments"]) == len(parameters) + 1


def test_two_versions(fake):
    """Each has objects of its own under one name, and a module."""
    arguments = ("--tactics", "default", "--arch", "10.0a")
    run("--python", fake.python, *arguments)
    fake.install_flashinfer("0.7.2.post1")
    run("--python", fake.python, *arguments)
    names = functions("10.0a", "default", "0.7.2.post1")
    assert compiled(fake) == [*functions("10.0a", "default"), *names]
    assert [each.name for each in manifest.read()] == ["cute_dsl-0.6.13", "cute_dsl-0.7.2.post1"]


def test_again_compiles_nothing(fake):
    run("--python", fake.python, "--tactics", "default", "--arch", "10.0a")
    (before,) = manifest.read()
    code, out, _ = run("--python", fake.python, "--tactics", "default", "--arch", "100a")
    assert code == 0
    assert "cute_dsl-0.6.13 for 10.0a: found as " in out
    assert manifest.read() == (before,)
    assert compiled(fake) == functions("10.0a", "default")
    run("--python", fake.python, "--arch", "10.0a")  # All: the others.
    assert sorted(compiled(fake)) == sorted(functions("10.0a"))
    fake.install("nvidia-cutlass-dsl", "4.8.2")  # Another compiler: all again.
    run("--python", fake.python, "--tactics", "default", "--arch", "10.0a")
    assert compiled(fake)[12:] == functions("10.0a", "default")


def test_json_and_progress(fake):
    arguments = ("--tactics", "default", "--arch", "10.3a", "--json", "--progress")
    code, out, err = run("--python", fake.python, *arguments)
    assert code == 0
    printed = json.loads(out)
    assert (printed["name"], printed["built"]) == ("cute_dsl-0.6.13", True)
    assert printed["functions"] == functions("10.3a", "default")
    lines = [line.split(" after")[0] for line in err.splitlines()]
    stages = ["importing CuTe-DSL and FlashInfer's kernels", "compiling", "[1/2]", "[2/2]"]
    assert lines == [*stages, "linking"]


def test_beside_the_other_module(fake):
    other = manifest.Module("trtllm", "0.6.13", (), fake.root, "", fake.root, None)
    manifest.add(other)
    run("--python", fake.python, "--tactics", "default", "--arch", "10.0a")
    assert [each.name for each in manifest.read()] == ["trtllm-0.6.13", "cute_dsl-0.6.13"]


# -------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize("arch", ["9.0a", "10.0f", "sm_100a", ""])
def test_archs(fake, arch):
    code, out, err = run("--python", fake.python, "--arch", arch)
    assert (code, out) == (2, "")
    assert f"'{arch}' is not a list of architectures, expected some of 10.0a, 10.3a" in " ".join(
        err.split()
    )
    assert not fake.cache.exists()


@pytest.mark.parametrize("lack", ["flashinfer-python", "nvidia-cutlass-dsl", "apache-tvm-ffi"])
def test_a_package_is_not_there(fake, lack):
    fake.remove(lack, "none")
    code, out, err = run("--python", fake.python)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {fake.python} has no {lack}. Install: pip install torch==")
    assert (fake.asked(), manifest.read()) == ([], ())


def test_unknown_versions(fake):
    fake.install("flashinfer-python", "0.7.3")
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert "has flashinfer-python 0.7.3, expected 0.6.13 or 0.7.2.post1: the" in err
    assert (fake.asked(), manifest.read()) == ([], ())


def test_the_linker_is_not_there(fake, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, _, err = run("--python", fake.python, "--tactics", "default", "--arch", "10.0a")
    assert code == 1
    assert err.startswith("error: no-such-compiler cannot link a library")
    assert manifest.read() == ()


@pytest.mark.parametrize(
    ("how", "said"), [("fail", "RuntimeError: no such arch"), ("die", "{} ended with -9")]
)
def test_a_failed_build(fake, monkeypatch, how, said):
    """What was compiled until then is kept."""
    monkeypatch.setenv("FAKE", how)
    code, out, err = run("--python", fake.python, "--arch", "10.0a")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {said.format(fake.python)}\n")
    assert f"The whole output is in {fake.cache / 'build-cute_dsl.log'}" in err
    assert manifest.read() == ()
    monkeypatch.delenv("FAKE")
    assert run("--python", fake.python, "--arch", "10.0a")[0] == 0
    assert compiled(fake) == functions("10.0a")  # each once


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build(fake, monkeypatch, end):
    """Nothing runs on; what is half written is not taken for whole."""
    monkeypatch.setenv("FAKE", "hang")
    arguments = ["build", "cute_dsl", "--python", str(fake.python), "--arch", "10.0a"]
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = f"{heed}; from jax_nvfp4_moe.cli import main; main({arguments})"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen([sys.executable, "-c", command], env=environment) as process:
        pid = fake.root / "pid"
        worker = int(commands.wait_until(lambda: pid.exists() and pid.read_text()))
        process.send_signal(end)
        process.wait(30)

    def gone():
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return True
        return False

    commands.wait_until(gone)
    assert manifest.read() == ()
    monkeypatch.delenv("FAKE")
    assert run("--python", fake.python, "--arch", "10.0a")[0] == 0
    assert compiled(fake) == functions("10.0a")
    assert not (fake.cache / "cute_dsl" / "new").exists()


def test_another_build_is_waited_for(fake):
    """And what it compiled is taken."""
    done = []

    def one():
        done.append(build_cute_dsl.build_cute_dsl(("10.0a",), python=fake.python))

    threads = [threading.Thread(target=one) for _ in range(2)]
    fake.cache.mkdir()
    with building.locked(fake.cache):
        for thread in threads:
            thread.start()
        time.sleep(1)
        assert fake.asked() == []
    for thread in threads:
        thread.join()
    assert compiled(fake) == functions("10.0a")
    assert sorted(each.found is None for each in done) == [False, True]
    assert done[0].module == done[1].module == manifest.read()[0]


def test_the_runtime_is_gone(fake, monkeypatch):
    monkeypatch.setattr(library, "register_module", lambda *_, **__: None)
    run("--python", fake.python, "--tactics", "default", "--arch", "10.0a")
    (module,) = manifest.read()
    module.register()
    fake.runtime.unlink()
    again = "run `python -m jax_nvfp4_moe build cute_dsl` again"
    with pytest.raises(FileNotFoundError, match=f"{fake.runtime}, which .* is gone: {again}"):
        module.register()


def test_kernels_that_are_not_where_they_were(fake):
    write(fake.site / "flashinfer/fused_moe/cute_dsl/blackwell/__init__.py", "")
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert "has no attribute 'BlockScaledContiguousGatherGroupedGemmKernel'" in err
    shutil.rmtree(fake.site / "flashinfer/fused_moe")
    code, _, err = run("--python", fake.python)
    assert code == 1
    assert "blackwell/__init__.py, FlashInfer's CuTe-DSL kernels, is missing. Install" in err


# ------------------------------------------------------------------------------ the real packages


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """All kernels for SM100, and those of FlashInfer's default tactic for SM103."""
    for name in ("flashinfer", "nvidia_cutlass_dsl", "tvm_ffi"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    if importlib.metadata.version("flashinfer-python") not in cute_dsl.VERSIONS:
        pytest.skip(f"needs flashinfer-python {' or '.join(cute_dsl.VERSIONS)}")
    cache = tmp_path_factory.mktemp("cache")
    # What the stand-in's build compiled of these very sources is found, not compiled again.
    known = recorded.default_cache() / "cute_dsl" / "cute_dsl"
    if known.is_dir():
        shutil.copytree(known, cache / "cute_dsl")
    built = build_cute_dsl.build_cute_dsl(("10.3a",), tactics="default", cache=cache)
    print(f"default, for 10.3a: {built.seconds} s")
    return build_cute_dsl.build_cute_dsl(("10.0a",), cache=cache), cache


@pytest.mark.flashinfer
def test_all_kernels_compile(real):
    built, cache = real
    for arch, tactics in (("10.0a", "all"), ("10.3a", "default")):
        for name in functions(arch, tactics, built.module.version):
            # Those of earlier sources may lie beside it.
            found = (cache / "cute_dsl" / "objects").glob(f"{name}-*.ptx")
            text = max(found, key=lambda file: file.stat().st_mtime).read_text()
            assert f".target sm_{arch.replace('.', '')}" in text
            group = 2 if "_t256_" in name or "_none_" in name else 1
            # W4A16's weights are decoded before they are multiplied.
            kind = "f16" if "_none_" in name else "mxf4nvf4.block_scale.block16"
            assert f"tcgen05.mma.cta_group::{group}.kind::{kind}" in text, name
            assert ("mxf4nvf4" in text) == ("_none_" not in name), name
            adds = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16" in text
            assert adds == ("_finalize_" in name), name
    print(f"all, for 10.0a: {built.seconds} s")


@pytest.mark.flashinfer
def test_the_library_opens(real):
    """Without a driver, and without CuTe-DSL's, FlashInfer's or torch's Python."""
    built, _ = real
    module = built.module
    program = (
        "import ctypes, sys; "
        f"ctypes.CDLL({str(module.tvm_ffi)!r}); one = ctypes.CDLL({str(module.path)!r}); "
        f"[getattr(one, '__tvm_ffi_' + name) for name in {module.functions!r}]; "
        "one.cudaStreamBeginCapture; "  # what the bridge finds beside them
        "assert not {'cutlass', 'torch', 'flashinfer', 'tvm_ffi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


T, H, I, E, K, TILES = 5, 512, 256, 3, 2, 4  # noqa: E741
M = TILES * 128


def gemm1_of(rows, *own):
    """Types and sizes for a first GEMM with these rows of w1."""
    return [
        ("uint8", T, H // 2), ("uint8", E, rows, H // 2), ("e4m3", T, H // 16),
        ("e4m3", E, rows, H // 16), ("float32", E), ("int32", TILES), ("int32", TILES),
        ("int32", M), ("int32", 1), *own,
    ]  # fmt: skip


def gemm2_of(*own):
    return [
        ("uint8", M, I // 2), ("uint8", E, H, I // 2), ("e4m3", M, I // 16),
        ("e4m3", E, H, I // 16), ("float32", E), ("int32", TILES), ("int32", TILES), ("int32", M),
        ("int32", 1), ("float32", T, K), *own,
    ]  # fmt: skip


def w4a16_of(k, columns, written):
    return [
        ("bfloat16", M, k), ("uint8", E, columns, k // 2), ("e4m3", E, columns, k // 16),
        ("float32", E), ("int32", TILES), ("int32", TILES), ("int32", 1), ("bfloat16", M, written),
    ]  # fmt: skip


FP4 = ("float32", 1), ("uint8", M, I // 2), ("e4m3", M, I // 16)
BF16 = ("float32", T), ("bfloat16", M, I)
SUM, ROWS = ("bfloat16", T, H), ("bfloat16", T, K, H)
SILU, RELU2 = "gemm1_silu_static_t128_n128_sm100a", "gemm1_relu2_static_t128_n128_sm100a"
OWN, RELU2_OWN = SILU.replace("static", "per_token"), RELU2.replace("static", "per_token")
FINALIZE = "gemm2_finalize_static_t128_n128_c1_sm100a"
SLOTS, SLOTS_OWN = (f"gemm2_rows_{each}_t128_n128_c1_sm100a" for each in ("static", "per_token"))
W4A16, W4A16_RELU2, W4A16_ROWS = (
    f"{each}_none_t128_sm100a" for each in ("gemm1_silu", "gemm1_relu2", "gemm2_rows")
)
FUNCTIONS = {
    SILU: gemm1_of(2 * I, *FP4),
    FINALIZE: gemm2_of(SUM),
    RELU2: gemm1_of(I, *FP4),
    OWN: gemm1_of(2 * I, *BF16),
    RELU2_OWN: gemm1_of(I, *BF16),
    SLOTS: gemm2_of(ROWS),
    SLOTS_OWN: gemm2_of(("float32", M), ROWS),
    W4A16: w4a16_of(H, 2 * I, I),
    W4A16_RELU2: w4a16_of(H, I, I),
    W4A16_ROWS: w4a16_of(I, H, H),
}


def has(real, name):
    if name not in real[0].module.functions:
        pytest.skip(f"needs a later version of FlashInfer, for {name}")


@pytest.mark.flashinfer
@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls_that_fit_reach_the_driver(real, name):
    """Which is not there: the error of the control for what the checks below refuse."""
    has(real, name)
    if ctypes.util.find_library("cuda"):
        pytest.skip("there is a driver")
    kind, text = call_on_no_device(real[0].module, name, FUNCTIONS[name])
    assert kind == "RuntimeError"
    assert "cuda" in text.lower()
    assert "Mismatched" not in text


@pytest.mark.flashinfer
@pytest.mark.parametrize(
    ("name", "index", "tensor", "said"),
    [
        (SILU, 2, ("uint8", T, H // 16), "float8_e4m3fn"),
        (SILU, 4, ("float32", E + 1), "alpha"),
        (SILU, 1, ("uint8", E, 2 * I + 64, H // 2), "w1"),
        (SILU, 7, ("int32", M - 64), "token_ids"),
        (SILU, 6, ("int32", TILES + 1), "tile_idx_to_mn_limit"),
        (SILU, 8, ("int32", 2), "num_non_exiting_tiles"),
        (SILU, 0, ("uint8", T, H // 2 - 64), "hidden_states"),
        (OWN, 9, ("float32", T + 1), "per_token_scales"),
        (OWN, 10, ("bfloat16", M, I + 32), "out"),
        (OWN, 10, ("uint8", M, I), "bfloat16"),
        (RELU2_OWN, 10, ("bfloat16", M, I + 128), "out"),
        (FINALIZE, 10, ("float32", T, H), "output"),
        (FINALIZE, 10, ("bfloat16", T + 1, H), "output"),
        (FINALIZE, 1, ("uint8", E, H + 64, I // 2), "w2"),
        (FINALIZE, 9, ("float32", T * K), "token_final_scales"),
        (SLOTS, 10, ("bfloat16", T, K + 1, H), "output"),
        (SLOTS, 10, ("bfloat16", T * K, H), "output"),
        (SLOTS_OWN, 10, ("float32", M + 1), "per_row_scales"),
        (W4A16, 0, ("uint8", M, H), "bfloat16"),
        (W4A16, 0, ("bfloat16", M - 64, H), "hidden_states"),
        (W4A16, 1, ("uint8", E, 2 * I + 64, H // 2), "w1"),
        (W4A16, 2, ("e4m3", E + 1, 2 * I, H // 16), "w1_scale"),
        (W4A16, 3, ("float32", E + 1), "alpha"),
        (W4A16, 5, ("int32", TILES + 1), "tile_idx_to_mn_limit"),
        (W4A16, 7, ("bfloat16", M, I + 32), "out"),
        (W4A16_RELU2, 7, ("bfloat16", M, I + 128), "out"),
        (W4A16_ROWS, 1, ("uint8", E, H + 128, I // 2), "w2"),
        (W4A16_ROWS, 7, ("bfloat16", M + 128, H), "output"),
    ],
)
def test_calls_that_do_not_fit(real, name, index, tensor, said):
    has(real, name)
    tensors = list(FUNCTIONS[name])
    tensors[index] = tensor
    kind, text = call_on_no_device(real[0].module, name, tensors)
    assert kind in ("ValueError", "TypeError")
    assert said in text


@pytest.mark.flashinfer
def test_too_few_arguments(real):
    for name in set(FUNCTIONS) & set(real[0].module.functions):
        kind, text = call_on_no_device(real[0].module, name, FUNCTIONS[name][:-1])
        assert (kind, f"Expects {len(FUNCTIONS[name])} parameters" in text) == ("TypeError", True)


@pytest.mark.flashinfer
def test_alignment(real):
    for offset, passes in ((16, False), (32, True)):
        kind, text = call_on_no_device(real[0].module, SILU, FUNCTIONS[SILU], offset)
        assert ("align" not in text) == passes, (kind, text)
