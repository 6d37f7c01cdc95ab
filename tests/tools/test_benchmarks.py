"""The benchmarks: what they time computes a layer, and what they write of made-up times."""

import functools
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from benchmarks import (
    decode,
    gpu,
    gpu_rates,
    gpu_tests,
    layers,
    machine,
    measuring,
    memory,
    plot,
    results,
)
from benchmarks.contenders import ggml_blocks, load
from benchmarks.contenders.base import Unavailable
from benchmarks.gpu_scale import FULL
from benchmarks.process import Contender, Failed, Remote
from tests.support.compile_flags import QUICK

TINY = layers.Layer("tiny", 8, 2, 128, 64)
CACHE = 2 * TINY.expert_bytes
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


# ------------------------------------------------------------------------------------- data


def test_a_token_goes_to_different_experts():
    for batch in layers.token_batches(TINY, 5, 3, CACHE):
        assert batch.ids.shape == (5, 2) and (batch.ids[:, 0] != batch.ids[:, 1]).all()
        assert batch.ids.min() >= 0 and batch.ids.max() < TINY.experts


def test_experts_are_used_again_after_the_cache_was_filled():
    layer = layers.LAYERS["qwen3-30b"]
    cache = 32 << 20
    batches = layers.token_batches(layer, 1, 32, cache)
    between = int(2 * cache // (8 * layer.expert_bytes)) + 1  # calls that fill the cache twice
    for i, batch in enumerate(batches):
        recent = [b.ids for b in batches[max(0, i - between) : i]]
        assert not np.isin(batch.ids, recent).any()


def test_small_layers_are_there_several_times():
    assert layers.LAYERS["deepseek-v3"].copies(32 << 20) == 1
    small = layers.LAYERS["small"]
    assert small.copies(32 << 20) * small.nbytes >= 4 * (32 << 20)


# ------------------------------------------------------------------------------------- contenders


def unblocked(blocks):
    """ggml's NVFP4, as its format is described, with its halved scales and its doubled codes."""
    scale, data = blocks[..., :4], blocks[..., 4:].reshape(*blocks.shape[:-1], 4, 8)
    codes = np.concatenate([data & 15, data >> 4], axis=-1)
    halved = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float64) / 2
    return (2 * E2M1[codes] * halved[..., None]).reshape(len(blocks), -1)


def test_ggml_blocks_hold_the_same_values():
    codes, scale = layers.expert_matrix(TINY, "w13", 3)
    elements = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    block_scale = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    want = E2M1[elements] * block_scale.repeat(16, axis=-1)
    blocks = ggml_blocks.blocks(codes, scale)
    assert blocks.shape == (128, 2, 36) and blocks.dtype == np.uint8
    np.testing.assert_array_equal(unblocked(blocks), want)
    unpermuted = np.concatenate([scale.reshape(128, 2, 4), codes.reshape(128, 2, 32)], axis=-1)
    assert (unblocked(unpermuted) != want).mean() > 0.5


@pytest.fixture(scope="module")
def expected():
    """The emulation's result for a reference, each computed once."""
    contender = load("emulation")(TINY, 1, "static")
    contender.prepare(layers.token_batches(TINY, 5, 1, CACHE))
    return functools.cache(lambda name: np.asarray(contender.expected(name), np.float32))


ON_CPU = ("ggml", "torch-all", "torch-hit", "ragged-dot", "jax-bf16")
GROUPED = ("torch-bf16-grouped", "torch-all-grouped")


@pytest.mark.parametrize("name", [*ON_CPU, *GROUPED])
def test_contenders_compute_the_layer(name, expected):
    if name.startswith("torch") and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    try:
        contender = load(name)(TINY, 2, "static")
    except Unavailable as error:
        pytest.skip(str(error))
    contender.prepare(layers.token_batches(TINY, 5, 1, CACHE))
    want = expected(contender.reference)
    for copy in range(2):
        got = np.asarray(contender.run(copy, 0), np.float32)
        assert measuring.difference(got, want) <= contender.bound
    assert measuring.difference(got[::-1], want) > contender.bound


def test_no_contender_would_pass_for_unquantised_activations(expected):
    assert measuring.difference(expected("layer"), expected("w4a16")) > 0.05


def test_a_contender_in_its_process():
    contender = Contender("emulation", TINY, 2, "static")
    try:
        facts = contender.prepare(3, CACHE)
        assert facts["compile_s"] > 0
        _, result = contender.first()
        np.testing.assert_array_equal(result, contender.expected("layer"))
        assert result.shape == (3, TINY.hidden)
        assert contender.peak() < 1 << 30
        assert len(contender.burst(0.01)) > 1
        assert len(contender.burst(0)) == 1
        contender._process.kill()  # as the system does when memory runs out
        with pytest.raises(Unavailable, match="its process ended with -9"):
            contender.burst(0)
    finally:
        contender.close()


def test_a_contender_that_is_unavailable_says_why():
    huge = layers.Layer("huge", 1 << 20, 8, 1 << 14, 1 << 14)
    with pytest.raises(Unavailable, match=r"needs \d+.\d GB"):
        Contender("emulation", huge, 1, "static")


class Slow:
    def traits(self):
        return "slow"

    def wait(self, seconds):
        time.sleep(seconds)
        return seconds

    def fail(self):
        raise ValueError("no reason")


def test_what_takes_too_long_is_ended():
    remote = Remote("slow", Slow)
    try:
        assert remote.answer() == "slow"
        assert remote.ask("wait", 0.0, seconds=60) == 0
        with pytest.raises(Failed, match="no reason"):
            remote.ask("fail")
        with pytest.raises(Unavailable, match="not done after 0 s"):
            remote.ask("wait", 60, seconds=0.01)
        with pytest.raises(Unavailable, match="its process ended with -9"):
            remote.ask("wait", 0.0)
    finally:
        remote.close()


def test_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "LAYER", TINY)
    output = tmp_path / "decode.jsonl"
    options = ["--layers", "1", "--tokens", "2", "--turns", "1", "--texts", "3"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        decode.main([*options, "--output", str(output)])
    header, *lines = results.read(output)
    assert header["vocabulary"] == decode.VOCABULARY // 48
    assert [line["implementation"] for line in lines] == ["cpu", "emulation", "none"]
    assert all(line["texts"] == 3 and line["steps"] == 2 for line in lines)


def test_decoding_with_a_checkpoint(tmp_path):
    model = Path(decode.__file__).parents[1] / "examples/models/qwen3-moe-tiny-nvfp4"
    output = tmp_path / "decode.jsonl"
    options = ["--model", str(model), "--dtype", "float32", "--tokens", "2", "--turns", "1"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        decode.main([*options, "--texts", "1", "--output", str(output)])
    header, *lines = results.read(output)
    assert (header["layers"], header["vocabulary"], header["dtype"]) == (3, 1024, "float32")
    assert len(lines) == 3


# ------------------------------------------------------------------------------------- on a GPU


def test_a_dry_run_for_a_gpu(tmp_path, monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")  # set by the command, and put back
    monkeypatch.setenv("XLA_FLAGS", " ".join(QUICK))
    gpu.main(["--dry-run", "--tokens", "2", "--output", str(tmp_path)])
    header, *lines = results.read(tmp_path / "gpu-tiny.jsonl")
    assert header["limits"].keys() == {"copy_gb_s", "bfloat16_gflop_s"}
    found = {line["contender"]: line for line in lines}
    unavailable = {"ragged-dot-mgpu": "its kernel is for compute capability 9.0, and this is cpu"}
    if importlib.util.find_spec("torch") is None:
        unavailable |= dict.fromkeys(GROUPED, "torch is not installed")
    assert {n: x["unavailable"] for n, x in found.items() if "unavailable" in x} == unavailable
    for name in found.keys() - unavailable.keys():
        assert found[name]["difference"] <= found[name]["bound"]
        assert 0 < found[name]["min_ms"] <= found[name]["median_ms"]
    assert found["triton"]["difference"] < 1e-4


def test_wrong_results_are_refused():
    traits = {"reference": "layer", "bound": 0.01, "layer_nbytes": 1e6}
    right = [np.eye(3), np.ones((3, 3))]
    assert gpu.compared(traits, right, {"layer": right})["difference"] == 0
    with pytest.raises(Unavailable, match="wrong: it differs by"):
        gpu.compared(traits, right[::-1], {"layer": right})
    with pytest.raises(Unavailable, match="wrong: it differs by nan"):
        gpu.compared(traits, [np.full((3, 3), np.nan)] * 2, {"layer": right})
    with pytest.raises(Unavailable, match="nothing to compare with: out of memory"):
        gpu.compared(traits, right, {"layer": Failed("out of memory")})


@pytest.mark.parametrize("name", ["qwen3-30b", "deepseek-v3"])
@pytest.mark.parametrize("tokens", FULL.tokens[:3])  # more tokens read as much
def test_a_program_reads_more_than_the_cache_holds(name, tokens):
    layer = layers.LAYERS[name]
    calls, copies = FULL.calls_of(layer, tokens), FULL.copies_of(layer)
    batches = layers.token_batches(layer, tokens, calls, FULL.cache)
    read = {(i % copies, expert) for i, batch in enumerate(batches) for expert in batch.ids.flat}
    assert len(read) * layer.expert_bytes > 2.5 * FULL.cache


def test_rates_on_a_gpu():
    limits = {"copy_gb_s": 10.0, "bfloat16_gflop_s": 100.0}
    packed = 8 * TINY.expert_bytes + 4 * 4 * 128
    line = {"tokens": 4, "hit_experts": 8, "median_ms": 1.0, "layer_mb": TINY.nbytes / 1e6}
    found = gpu_rates.rates(TINY, line, limits)
    assert found["mb"] == pytest.approx(packed / 1e6, abs=1e-3)
    assert found["of_copy"] == pytest.approx(packed / 10e9 * 1e3, abs=1e-4)
    assert found["of_bfloat16"] == pytest.approx(TINY.flops(4) / 100e9 * 1e3, abs=1e-4)
    assert found["of_limit"] == max(found["of_copy"], found["of_bfloat16"])
    wider = gpu_rates.rates(TINY, line | {"layer_mb": 2 * TINY.nbytes / 1e6}, limits)
    assert wider["of_copy"] > found["of_copy"] and wider["limit_ms"] == found["limit_ms"]


SUITE = """
import pytest
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("implementation", ["triton", "emulation"])]
def test_good(implementation): pass
def test_bad(implementation): assert implementation != "triton"
def test_absent(implementation): pytest.skip("no reason")
"""


def test_the_suite_is_counted(tmp_path, monkeypatch):
    path = tmp_path / "test_suite.py"
    path.write_text(SUITE)
    monkeypatch.setattr(gpu_tests, "SUITE", str(path))
    monkeypatch.setenv("PYTEST_ADDOPTS", "")  # of the run that this is a part of
    found = gpu_tests.run("triton", 300)
    assert found["passed"] == found["skipped"] == 1 and not found["stopped"]
    assert found["failed"] == ["test_bad[triton]"]


# ------------------------------------------------------------------------------------- measuring


class Fake:
    def __init__(self, name, seconds):
        self.name, self.seconds, self.bursts = name, seconds, 0

    def burst(self, _):
        self.bursts += 1
        return [self.seconds]


def test_turns_leave_out_who_had_its_time():
    fast, slow = Fake("fast", 0.1), Fake("slow", 10)
    times = measuring.turns([fast, slow], 6, 0.1, 15, lambda _: None)
    assert times == {"fast": [0.1] * 6, "slow": [10] * 2}


def test_rates():
    limits = {"read_gb_s": 10.0, "float32_gflop_s": 100.0, "bfloat16_gflop_s": 50.0}
    line = {"tokens": 4, "hit_experts": 8, "median_ms": 1.0, "product_gflop_s": 25.0}
    found = measuring.rates(TINY, line, limits)
    flops, packed = 2 * 4 * 2 * 3 * 128 * 64, 8 * (3 * 128 * 64 * 9 // 16 + 12)
    assert found["gflop_s"] == pytest.approx(flops / 1e6, abs=0.01)
    assert found["packed_gb_s"] == pytest.approx(packed / 1e6, abs=1e-3)
    assert found["limit_ms"] == pytest.approx(packed / 10e9 * 1e3, rel=1e-3)
    assert found["of_limit"] == found["of_read"]
    assert found["of_bfloat16"] == pytest.approx(2 * found["of_float32"], abs=2e-4)
    assert found["of_product"] == pytest.approx(2 * found["of_bfloat16"], abs=2e-4)
    assert measuring.rates(TINY, {"unavailable": "no"}, limits) == {}


def test_the_product_takes_turns(monkeypatch):
    monkeypatch.setattr(machine, "SIZES", (64, 128))
    product = machine.MatrixProduct()
    assert product.traits() == {"flops": 2 * 128**3}
    times = product.burst(0.5)
    assert len(times) > 1 and min(times) > 0


def test_the_peak_is_that_of_the_call():
    def touch():
        return np.ones(1 << 25, np.uint8).sum()

    # The system counts pages in each thread first, and all together only now and then.
    assert 0.9 * (1 << 25) < memory.peak_of(touch) < 1 << 26
    assert memory.peak_of(lambda: None) < 1 << 24


def test_neighbours_are_others():
    spin = "import time\nwhile time.process_time() < 0.4: pass\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", spin])
    try:
        ours, others = machine.Neighbours([child.pid]), machine.Neighbours([])
        time.sleep(0.6)
        found = ours.share(), others.share()
    finally:
        child.kill()
        child.wait()
    assert 0 <= found[0] < found[1]
    assert found[1] > 0.1 / machine.cores()


# ------------------------------------------------------------------------------------- files


def made_up_lines():
    limits = {"read_gb_s": 30.0, "float32_gflop_s": 160.0, "bfloat16_gflop_s": 20.0}
    sizes = {"experts": 8, "top_k": 2, "hidden": 128, "intermediate": 64}
    header = {"layer": "tiny", **sizes, "cpu": "a CPU", "cores": 2, "limits": limits}
    lines = [header, {"contender": "cpu", "tokens": 1, "unavailable": "no reason"}]
    for tokens in (1, 16):
        for name, slower in (("emulation", 4), ("ggml", 1)):
            middle = tokens * slower
            line = {"contender": name, "tokens": tokens, "hit_experts": min(8, 2 * tokens)}
            line |= {"q1_ms": 0.9 * middle, "median_ms": middle, "q3_ms": 1.2 * middle}
            line |= {"product_gflop_s": 15.0}
            lines.append(line | measuring.rates(TINY, line, limits))
    return lines


def test_plots_are_written(tmp_path):
    path = tmp_path / "lines.jsonl"
    results.write(path, made_up_lines())
    assert results.read(path) == made_up_lines()
    plot.main([str(path), "--output", str(tmp_path / "plots")])
    for kind in ("latency", "roofline"):
        text = (tmp_path / f"plots/{kind}-tiny.svg").read_text()
        assert text.startswith("<?xml") and len(text) > 10_000


def test_what_cannot_be_plotted_is_refused(tmp_path):
    path = tmp_path / "lines.jsonl"
    arguments = [str(path), "--output", str(tmp_path)]
    path.write_text("{}\n{")
    with pytest.raises(SystemExit, match=r"lines.jsonl:2 is not JSON"):
        plot.main(arguments)
    path.write_text(json.dumps({"command": "python -m benchmarks bridge"}))
    with pytest.raises(SystemExit, match="has no times of a layer"):
        plot.main(arguments)
    results.write(path, made_up_lines())
    with pytest.raises(SystemExit, match="a second run of tiny"):
        plot.main([str(path), *arguments])
