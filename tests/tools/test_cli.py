"""The command line: what it prints, what it writes, and with what code it exits."""

import json
import os
import re
import subprocess
import sys

import click.testing
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.checkpoint.inspection import ERROR_EDGES, inspect_checkpoint
from jax_nvfp4_moe.cli import main
from tests.conftest import GOLDENS
from tests.support.checkpoints import CONFIG, LAYERS, E, H, I, made


def run(*arguments):
    """The exit code, stdout and stderr of a command."""
    done = click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def sound(rng, tmp_path):
    return made(rng).write(tmp_path / "sound")


@pytest.fixture
def spoiled(rng, tmp_path):
    """Three problems: a NaN among scales, a missing tensor, no activation scale."""
    written = made(rng)
    written.tensors["model.layers.0.mlp.experts.1.up_proj.weight_scale_2"].fill(np.nan)
    del written.tensors["model.layers.1.mlp.experts.2.down_proj.weight"]
    del written.tensors["model.layers.0.mlp.experts.3.gate_proj.input_scale"]
    return written.write(tmp_path / "spoiled")


def test_inspect(sound):
    code, out, err = run("inspect", sound)
    assert (code, err) == (0, "")
    assert "qwen3_moe, modelopt" in out
    assert "Routing(method='renormalize_naive', top_k=2" in out
    rows = re.findall(rf"^ +(\d)  {E} x {H} x {I}  static .* ok$", out, re.MULTILINE)
    assert rows == ["0", "1"]
    assert "layers 0, 1: 4 experts have different global scales for gate and up" in out


def test_inspect_shows_problems(spoiled):
    code, out, _ = run("inspect", spoiled)
    assert code == 0  # to look is not to judge
    assert "layer 0: model.layers.0.mlp.experts.1.up_proj.weight_scale_2 is nan" in out
    assert "layer 0: model.layers.0.mlp.experts.3.gate_proj.input_scale is missing" in out
    assert "layer 1: model.layers.1.mlp.experts.2.down_proj.weight is missing" in out


def test_inspect_json(sound):
    report = json.loads(run("inspect", sound, "--json")[1])
    assert report["sound"] is True
    assert (report["family"], report["format"]) == ("qwen3_moe", "modelopt")
    experts = nvm.load_experts(sound, layer=1, input_scale="per_expert")
    layer = report["layers"][1]
    low, high = layer["global_scale"]
    scales = np.concatenate([np.ravel(experts.w13.global_scale), experts.w2.global_scale])
    assert (low, high) == (scales.min(), scales.max())
    assert layer["w2_input_scale"] == [experts.w2_input_scale.min(), experts.w2_input_scale.max()]
    bits = [np.asarray(q.scale).view(np.uint8).reshape(-1) for q in (experts.w13, experts.w2)]
    np.testing.assert_array_equal(
        layer["block_scales"], np.bincount(np.concatenate(bits), minlength=256)
    )


def test_headers_alone(sound):
    report = json.loads(run("inspect", sound, "--json", "--headers")[1])
    assert report["layers"][0]["block_scales"] is None
    code, _, err = run("inspect", sound, "--headers", "--plot", "out.png")
    assert code == 2
    assert "--headers reads no values" in err


@pytest.mark.parametrize("directory", sorted((GOLDENS / "families").glob("*/")))
def test_every_family_is_sound(directory):
    report = inspect_checkpoint(directory)
    assert report.sound, report
    assert report.layers


def test_validate(sound, spoiled, tmp_path):
    assert run("validate", sound) == (0, f"{sound}: sound\n", "")
    code, out, _ = run("validate", spoiled)
    assert code == 1
    assert len(out.splitlines()) == 4
    assert out.endswith(f"{spoiled}: not sound\n")
    code, out, _ = run("validate", spoiled, "--json")
    assert code == 1
    assert len(json.loads(out)["problems"]) == 3
    code, out, err = run("validate", tmp_path / "nothing")
    assert (code, out) == (3, "")
    assert re.fullmatch(r"error: path is .*nothing': no such file or directory\n", err)


def test_validate_sees_encode_scales(rng, tmp_path):
    """The most likely mistake of whoever writes a checkpoint: scales of the other convention."""
    written = made(rng)
    for name, tensor in written.tensors.items():
        if name.endswith("weight_scale_2"):
            written.tensors[name] = np.asarray(np.float32(1) / tensor)
    code, out, _ = run("validate", written.write(tmp_path / "inverse"))
    assert code == 1
    assert "is it stored as the inverse (encode) scale?" in out


def original(rng, path):
    """A bfloat16 checkpoint of one layer."""
    block = "model.layers.0.mlp"
    tensors = {f"{block}.gate.weight": rng.normal(size=(E, H)).astype(jnp.bfloat16)}
    for expert in range(E):
        for name, shape in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
            matrix = rng.normal(size=shape).astype(jnp.bfloat16)
            tensors[f"{block}.experts.{expert}.{name}_proj.weight"] = matrix
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 1}))
    save_file(tensors, path / "model.safetensors")
    return path


def test_quantize_inspect_convert(rng, tmp_path):
    bf16, nvfp4, other = original(rng, tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    samples = tmp_path / "samples.safetensors"
    save_file({"0": rng.normal(size=(50, H)).astype(np.float32)}, samples)
    code, out, err = run("quantize", bf16, nvfp4, "--calibration", samples)
    assert (code, err) == (0, "")
    assert out.startswith(f"{nvfp4}: modelopt, 3 files")
    assert nvm.load_experts(nvfp4, layer=0).activation_scheme == "static"

    picture = tmp_path / "out.png"
    code, out, _ = run("inspect", nvfp4, "--json", "--original", bf16, "--plot", picture)
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    errors = np.array(json.loads(out)["layers"][0]["errors"])
    assert errors.sum() == 3 * E * I * H // 16
    # Normal values: a tenth of their size is what four bits and a scale for 16 leave.
    centres = (ERROR_EDGES[1:] + ERROR_EDGES[:-1]) / 2
    assert 0.08 < (errors * centres).sum() / errors.sum() < 0.11

    code, out, _ = run("convert", nvfp4, other, "--format", "compressed-tensors", "--json")
    assert code == 0
    written = json.loads(out)
    assert written["files"] == ["config.json", "model.safetensors"]
    assert written["bytes"] == sum(path.stat().st_size for path in other.iterdir())
    assert run("validate", other)[0] == 0


def test_errors_of_another_original_are_large(rng, tmp_path):
    """Control: errors depend on what they are measured against."""
    bf16, another = original(rng, tmp_path / "a"), original(rng, tmp_path / "other")
    run("quantize", bf16, tmp_path / "b")
    report = inspect_checkpoint(tmp_path / "b", original=another)
    assert report.layers[0].errors[-1] == report.layers[0].errors.sum()


def test_nothing_is_overwritten(sound, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("notes")
    code, out, err = run("convert", sound, tmp_path / "mine")
    assert (code, out) == (3, "")
    assert "is not an empty directory: nothing was written" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x"], "has a tensor 'x', expected a layer's number"),
        (["0.output"], "has a tensor '0.output', expected a layer's number"),
        (["7"], "calibration has no samples for layer 0"),
        (["0", "0.router"], "calibration[0] is a tuple, expected tokens [T, H]"),
    ],
)
def test_bad_calibration(rng, tmp_path, names, message):
    bf16, samples = original(rng, tmp_path / "a"), tmp_path / "samples.safetensors"
    save_file({name: np.ones((2, H), np.float32) for name in names}, samples)
    code, _, err = run("quantize", bf16, tmp_path / "b", "--calibration", samples)
    assert code == 1
    assert message in err
    assert not (tmp_path / "b").exists()


def test_a_picture_of_no_known_kind(sound, tmp_path):
    code, _, err = run("inspect", sound, "--plot", tmp_path / "out.txt")
    assert code == 1
    assert err.startswith("error: Format 'txt' is not supported")
    assert not (tmp_path / "out.txt").exists()


def test_usage():
    assert run("inspect")[0] == 2
    assert run("convert", "a", "b", "--format", "gguf")[0] == 2
    code, out, _ = run("--help")
    assert code == 0
    assert "Exit codes: 0 success, 1 bad checkpoint or failed build, 2 usage, 3 files." in out
    for command in ("inspect", "validate", "convert", "quantize", "build"):
        assert command in out


def test_as_a_module(sound):
    """In a process of its own; with a progress bar, as asked for, on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "jax_nvfp4_moe", "validate", str(sound), "--progress"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{sound}: sound\n")
    assert "Reading: 100%" in done.stderr


def test_layers_are_all_there(sound):
    assert [layer.layer for layer in inspect_checkpoint(sound).layers] == list(range(LAYERS))
