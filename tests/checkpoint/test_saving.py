"""Round trips of saving and converting; failures leave no files."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.checkpoint import (
    CheckpointError,
    ConfigError,
    convert_checkpoint,
    save_checkpoint,
)
from jax_nvfp4_moe.checkpoint.files import TensorFiles
from jax_nvfp4_moe.checkpoint.writing import write_tensors
from tests.conftest import GOLDENS
from tests.support.checkpoints import LAYERS, E, made

FAMILIES = sorted(path for path in (GOLDENS / "families").iterdir() if path.is_dir())
# Made by ModelOpt, and from its output by compressed-tensors' converter.
MODELS = Path(__file__).parents[2] / "examples" / "models"
BY_TOOLS = {
    "modelopt": MODELS / "qwen3-moe-tiny-nvfp4",
    "compressed-tensors": MODELS / "qwen3-moe-tiny-nvfp4-ct",
}


def same_tensors(one, other):
    """Asserts that two directories have the same tensors, bit for bit."""
    one, other = TensorFiles(one), TensorFiles(other)
    assert set(one) == set(other)
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert one.view(name).tobytes() == other.view(name).tobytes(), name


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def same_but_for_reciprocals(one, other):
    """Asserts the same tensors, with global scales equal within one unit in the last place.

    Their shapes may be [] or [1], since tools differ. Returns how many scales are not equal.
    """
    one, other = TensorFiles(one), TensorFiles(other)
    assert set(one) == set(other)
    differing = 0
    for name in one:
        a, b = one.view(name), other.view(name)
        assert a.dtype == b.dtype, name
        if a.dtype == np.float32 and a.size == 1:
            np.testing.assert_array_max_ulp(a.reshape(1), b.reshape(1), 1)
            differing += int(a.item() != b.item())
        else:
            assert a.shape == b.shape, name
            assert a.tobytes() == b.tobytes(), name
    return differing


@pytest.mark.parametrize(
    "directory", [*FAMILIES, BY_TOOLS["modelopt"]], ids=lambda directory: directory.name
)
def test_save_in_the_same_format(directory, tmp_path):
    checkpoint = nvm.load_checkpoint(directory, input_scale="per_expert")
    method = checkpoint.config["quantization_config"]["quant_method"]
    save_checkpoint(checkpoint, tmp_path / "saved", format=method)
    same_tensors(directory, tmp_path / "saved")
    for name in ("config.json", "hf_quant_config.json"):
        if (directory / name).exists():
            read = [
                json.loads((path / name).read_text()) for path in (directory, tmp_path / "saved")
            ]
            assert read[0] == read[1]


@pytest.mark.parametrize("directory", FAMILIES, ids=lambda directory: directory.name)
def test_convert_there_and_back(directory, tmp_path):
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    formats = ["modelopt", "compressed-tensors"]
    if config["quant_method"] == "modelopt":
        formats.reverse()
    there, back = tmp_path / "there", tmp_path / "back"
    convert_checkpoint(directory, there, format=formats[0])
    convert_checkpoint(there, back, format=formats[1])
    one, other, third = (
        nvm.load_checkpoint(path, input_scale="per_expert") for path in (directory, there, back)
    )
    for number in one.layers:
        for layer in (other.layers[number], third.layers[number]):
            first = one.layers[number].experts
            assert layer.experts.activation_scheme == first.activation_scheme
            same(layer.router, one.layers[number].router)
            for name in ("w13", "w2"):
                a, b = getattr(first, name), getattr(layer.experts, name)
                same((a.data, a.scale), (b.data, b.scale))
                np.testing.assert_array_max_ulp(a.global_scale, b.global_scale, 1)
            if first.activation_scheme == "static":
                np.testing.assert_array_max_ulp(
                    first.w13_input_scale, layer.experts.w13_input_scale, 1
                )
                np.testing.assert_array_max_ulp(
                    first.w2_input_scale, layer.experts.w2_input_scale, 1
                )
    assert set(one.tensors) == set(other.tensors) == set(third.tensors)


@pytest.mark.parametrize("format", BY_TOOLS)
def test_convert_as_the_tools_do(format, tmp_path):
    theirs = BY_TOOLS[format]
    (original,) = set(BY_TOOLS.values()) - {theirs}
    convert_checkpoint(original, tmp_path / "ours", format=format)
    differing = same_but_for_reciprocals(tmp_path / "ours", theirs)
    if format == "compressed-tensors":
        assert differing == 0  # both converters start from the same numbers
    else:
        assert differing > 0  # a reciprocal's reciprocal may differ by rounding


def test_save_compressed_tensors(tmp_path):
    """Scales are decoded on loading: only the first round trip may change them, by one unit."""
    original, once, twice = BY_TOOLS["compressed-tensors"], tmp_path / "once", tmp_path / "twice"
    for source, target in ((original, once), (once, twice)):
        checkpoint = nvm.load_checkpoint(source, input_scale="per_expert")
        save_checkpoint(checkpoint, target, format="compressed-tensors")
    same_but_for_reciprocals(original, once)
    same_tensors(once, twice)


def test_control_two_units_are_seen(tmp_path):
    source, target = BY_TOOLS["modelopt"], tmp_path / "changed"
    target.mkdir()
    tensors = {name: np.array(TensorFiles(source).view(name)) for name in TensorFiles(source)}
    name = next(name for name in tensors if name.endswith("input_scale"))
    off = np.nextafter(np.nextafter(tensors[name], np.float32(9)), np.float32(9))
    write_tensors(target, (tensors | {name: off}).items(), 1 << 30)
    with pytest.raises(AssertionError, match="not almost equal up to 1 ULP"):
        same_but_for_reciprocals(source, target)


@pytest.fixture
def checkpoint(rng, tmp_path):
    directory = made(rng).write(tmp_path / "original", shards=2)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_text("weights in another form")
    return nvm.load_checkpoint(directory, input_scale="per_expert")


def with_experts(checkpoint, change):
    """The checkpoint with changed experts in all layers."""
    layers = {
        number: dataclasses.replace(layer, experts=change(layer.experts))
        for number, layer in checkpoint.layers.items()
    }
    return dataclasses.replace(checkpoint, layers=layers)


@pytest.mark.parametrize("encode", [False, True], ids=["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("different", [0, 1, 4])
def test_scales_of_gate_and_up(different, encode, rng, tmp_path):
    """Equal pairs load as [E, 1], one different pair as [E, 2]; both save as the same bits."""
    written = made(rng, encode=encode)
    part = "weight_global_scale" if encode else "weight_scale_2"
    for layer in range(LAYERS):
        for expert in range(different, E):
            module = f"model.layers.{layer}.mlp.experts.{expert}"
            gate = written.tensors[f"{module}.gate_proj.{part}"]
            written.tensors[f"{module}.up_proj.{part}"] = gate.copy()
    directory = written.write(tmp_path / "original")
    checkpoint = nvm.load_checkpoint(directory, input_scale="per_expert")
    for layer in checkpoint.layers.values():
        experts = layer.experts
        assert experts.w13.global_scale.shape == (E, 2 if different else 1)
        assert experts.separate_scales is bool(different)
        pairs = np.broadcast_to(experts.w13.global_scale, (E, 2))
        assert (pairs[:, 0] != pairs[:, 1]).sum() == different
    format = "compressed-tensors" if encode else "modelopt"
    save_checkpoint(checkpoint, tmp_path / "saved", format=format)
    if encode:
        same_but_for_reciprocals(directory, tmp_path / "saved")
    else:
        same_tensors(directory, tmp_path / "saved")


@pytest.mark.parametrize("implementation", ["trtllm", "cute_dsl"])
def test_prepared_experts_are_saved_as_they_were(checkpoint, tmp_path, implementation):
    prepared = with_experts(checkpoint, lambda experts: nvm.prepare(experts, implementation))
    save_checkpoint(prepared, tmp_path / "saved")
    same_tensors(checkpoint.directory, tmp_path / "saved")


def test_shards_and_files_beside(checkpoint, tmp_path):
    save_checkpoint(checkpoint, tmp_path / "saved", shard_bytes=20_000)
    same_tensors(checkpoint.directory, tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert "pytorch_model.bin" not in names
    shards = [path for path in (tmp_path / "saved").iterdir() if path.suffix == ".safetensors"]
    assert len(shards) > 2
    assert all(path.stat().st_size < 30_000 for path in shards)


def test_global_max_is_what_every_expert_gets(checkpoint, tmp_path):
    largest = nvm.load_checkpoint(checkpoint.directory)
    save_checkpoint(largest, tmp_path / "saved")
    saved = nvm.load_checkpoint(tmp_path / "saved", input_scale="per_expert")
    for number, layer in saved.layers.items():
        for name in ("w13_input_scale", "w2_input_scale"):
            scale = getattr(layer.experts, name)
            assert (scale == getattr(checkpoint.layers[number].experts, name).max()).all()


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_weights_alone(checkpoint, tmp_path, format):
    weights = nvm.load_checkpoint(checkpoint.directory, activation_scheme="none")
    save_checkpoint(weights, tmp_path / "saved", format=format)
    saved = nvm.load_checkpoint(tmp_path / "saved")
    for number, layer in saved.layers.items():
        assert layer.experts.activation_scheme == "none"
        np.testing.assert_array_equal(
            layer.experts.w13.data, checkpoint.layers[number].experts.w13.data
        )


def test_per_token(checkpoint, tmp_path):
    """compressed-tensors' format can express "per_token", ModelOpt's cannot."""
    each = nvm.load_checkpoint(checkpoint.directory, activation_scheme="per_token")
    save_checkpoint(each, tmp_path / "saved", format="compressed-tensors")
    saved = nvm.load_checkpoint(tmp_path / "saved")
    assert saved.layers[0].experts.activation_scheme == "per_token"
    with pytest.raises(ConfigError, match="'per_token', which ModelOpt's format cannot express"):
        save_checkpoint(each, tmp_path / "other")
    with pytest.raises(ConfigError, match="'per_token', which ModelOpt's format cannot express"):
        convert_checkpoint(tmp_path / "saved", tmp_path / "other", format="modelopt")
    assert not (tmp_path / "other").exists()


def test_a_kv_cache_in_fp8_is_kept(rng, tmp_path):
    written = made(rng)
    written.config["quantization_config"]["kv_cache_scheme"] = {
        "dynamic": False, "num_bits": 8, "type": "float"
    }  # fmt: skip
    name = "model.layers.0.self_attn.k_proj.k_scale"
    written.tensors[name] = np.float32(0.5).reshape(())[None]
    convert_checkpoint(written.write(tmp_path / "a"), tmp_path / "b", format="compressed-tensors")
    convert_checkpoint(tmp_path / "b", tmp_path / "c", format="modelopt")
    for path in ("b", "c"):
        config = json.loads((tmp_path / path / "config.json").read_text())["quantization_config"]
        assert config["kv_cache_scheme"]["num_bits"] == 8
        assert TensorFiles(tmp_path / path).view(name) == 0.5
    separate = json.loads((tmp_path / "c" / "hf_quant_config.json").read_text())
    assert separate["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_something_is_there_already(checkpoint, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty directory: nothing was written"):
        save_checkpoint(checkpoint, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["notes.txt"]
    (tmp_path / "saved" / "notes.txt").unlink()
    save_checkpoint(checkpoint, tmp_path / "saved")


def test_a_failure_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(checkpoint, tmp_path / "saved")
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(checkpoint.directory, tmp_path / "saved", format="compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_layers_with_different_schemes(checkpoint, tmp_path):
    other = nvm.load_checkpoint(checkpoint.directory, activation_scheme="none")
    mixed = dataclasses.replace(checkpoint, layers={0: checkpoint.layers[0], 1: other.layers[1]})
    with pytest.raises(CheckpointError, match="activation schemes none, static; expected one"):
        save_checkpoint(mixed, tmp_path / "saved")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "gguf"}, ValueError, "format is 'gguf', expected one of 'modelopt', 'compr"),
        ({"format": "compressed_tensors"}, ValueError, "did you mean 'compressed-tensors'"),
        ({"shard_bytes": 0}, ValueError, "shard_bytes is 0, expected 1 or more"),
        ({"shard_bytes": "5GB"}, TypeError, "shard_bytes is '5GB', expected an int"),
    ],
)
def test_bad_arguments(checkpoint, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        save_checkpoint(checkpoint, tmp_path / "saved", **options)
    with pytest.raises(error, match=message):
        options = {"format": "modelopt", **options}
        convert_checkpoint(checkpoint.directory, tmp_path / "saved", **options)
    assert not (tmp_path / "saved").exists()


def test_not_a_checkpoint(checkpoint, tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint is a MoeLayer, expected a Checkpoint from"):
        save_checkpoint(checkpoint.layers[0], tmp_path / "saved")


def test_control_a_flipped_bit_is_seen(checkpoint, tmp_path):
    def flipped(experts):
        data = experts.w2.data.at[0, 0, 0].set(experts.w2.data[0, 0, 0] ^ 1)
        return dataclasses.replace(experts, w2=dataclasses.replace(experts.w2, data=data))

    save_checkpoint(with_experts(checkpoint, flipped), tmp_path / "saved")
    with pytest.raises(AssertionError, match=r"experts\.0\.down_proj\.weight"):
        same_tensors(checkpoint.directory, tmp_path / "saved")
