"""Round trips: what is saved, and converted, loads back; what fails leaves nothing behind."""

import json

import jax
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.checkpoint import convert_checkpoint, save_checkpoint
from jax_nvfp4_moe.checkpoint.files import TensorFiles
from tests.checkpoints import made
from tests.conftest import GOLDENS

FAMILIES = sorted(path for path in (GOLDENS / "families").iterdir() if path.is_dir())


def same_tensors(one, other):
    """Whether two directories have the same tensors, to the bit."""
    one, other = TensorFiles(one), TensorFiles(other)
    assert set(one) == set(other)
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert one.view(name).tobytes() == other.view(name).tobytes(), name


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("directory", FAMILIES, ids=lambda directory: directory.name)
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
                np.testing.assert_array_max_ulp(first.input_scale, layer.experts.input_scale, 1)
                np.testing.assert_array_max_ulp(first.hidden_scale, layer.experts.hidden_scale, 1)
    assert set(one.tensors) == set(other.tensors) == set(third.tensors)
