"""Quantising a checkpoint's experts, with and without calibration."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.checkpoint import CheckpointError, quantize_checkpoint
from jax_nvfp4_moe.router import Router
from tests.conftest import GOLDENS
from tests.support.checkpoints import CONFIG, E, H, I, K

BLOCK = "model.layers.0.mlp"


def original(rng, path, model_type="qwen3_moe", **more):
    """Writes a bfloat16 checkpoint of one layer; returns gate, up, down, router and biases."""
    gate, up = (rng.normal(size=(2, E, I, H)) * [[[[1]]], [[[4]]]]).astype(jnp.bfloat16)
    down = rng.normal(size=(E, H, I)).astype(jnp.bfloat16)
    router = rng.normal(size=(E, H)).astype(jnp.bfloat16)
    tensors = {"model.norm.weight": np.ones(H, jnp.bfloat16)}
    biases = None
    if model_type == "gpt_oss":
        # Alternating rows of gate and up, transposed matrices, biases.
        both = np.stack([gate, up], 2).reshape(E, 2 * I, H)
        w13_bias = rng.normal(size=(E, 2 * I)).astype(jnp.bfloat16)
        w2_bias = rng.normal(size=(E, H)).astype(jnp.bfloat16)
        tensors |= {
            f"{BLOCK}.experts.gate_up_proj": np.ascontiguousarray(both.swapaxes(1, 2)),
            f"{BLOCK}.experts.gate_up_proj_bias": w13_bias,
            f"{BLOCK}.experts.down_proj": np.ascontiguousarray(down.swapaxes(1, 2)),
            f"{BLOCK}.experts.down_proj_bias": w2_bias,
            f"{BLOCK}.router.weight": router,
            f"{BLOCK}.router.bias": np.zeros(E, jnp.bfloat16),
        }
        biases = (w13_bias[:, 0::2], w13_bias[:, 1::2], w2_bias)
    else:
        tensors[f"{BLOCK}.gate.weight"] = router
        for expert in range(E):
            at = f"{BLOCK}.experts.{expert}"
            tensors |= {
                f"{at}.gate_proj.weight": gate[expert],
                f"{at}.up_proj.weight": up[expert],
                f"{at}.down_proj.weight": down[expert],
            }
    config = {**CONFIG, "model_type": model_type, "num_hidden_layers": 1, **more}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    save_file(tensors, path / "model.safetensors")
    return gate, up, down, router, biases


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_weights_alone(rng, tmp_path, format):
    gate, up, down, _, _ = original(rng, tmp_path / "bf16")
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "nvfp4", format=format)
    loaded = nvm.load_experts(tmp_path / "nvfp4", layer=0)
    wanted = nvm.quantize_experts(gate, up, down, activation_scheme="none", separate_scales=True)
    if format == "modelopt":
        assert_same(loaded, wanted)
    assert_same((loaded.w13.data, loaded.w2.scale), (wanted.w13.data, wanted.w2.scale))
    assert (tmp_path / "nvfp4" / "tokenizer.json").read_text() == "{}"
    checkpoint = nvm.load_checkpoint(tmp_path / "nvfp4")
    assert set(checkpoint.tensors) == {"model.norm.weight"}


def test_stacked(rng, tmp_path):
    """gpt-oss's transposed tensors of all experts become one tensor for each expert."""
    more = {"num_local_experts": E, "intermediate_size": I}
    gate, up, down, _, biases = original(rng, tmp_path / "bf16", "gpt_oss", **more)
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "nvfp4")
    names = ("gate_bias", "up_bias", "down_bias")
    given = {name: bias.astype(np.float32) for name, bias in zip(names, biases, strict=True)}
    wanted = nvm.quantize_experts(
        gate, up, down, activation_scheme="none", separate_scales=True, **given
    )
    assert_same(nvm.load_experts(tmp_path / "nvfp4", layer=0), wanted)


def test_calibration(rng, tmp_path):
    gate, up, down, router, _ = original(rng, tmp_path / "bf16")
    x = rng.normal(size=(40, H)).astype(np.float32)
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "nvfp4", calibration={0: x})
    loaded = nvm.load_experts(tmp_path / "nvfp4", layer=0, input_scale="per_expert")
    assert loaded.activation_scheme == "static"
    ids, _ = Router(router, nvm.Routing("renormalize_naive", top_k=K))(x)
    gate, up, down = (matrix.astype(np.float64) for matrix in (gate, up, down))
    for expert in range(E):
        rows = x[(np.asarray(ids) == expert).any(1)].astype(np.float64)
        a, b = rows @ gate[expert].T, rows @ up[expert].T
        hidden = a / (1 + np.exp(-a)) * b
        np.testing.assert_allclose(
            loaded.w13_input_scale[expert], abs(rows).max() / 2688, rtol=1e-6
        )
        np.testing.assert_allclose(
            loaded.w2_input_scale[expert], abs(hidden).max() / 2688, rtol=1e-4
        )
    # Control: each expert has its own scale.
    assert np.unique(np.asarray(loaded.w2_input_scale)).size == E


def test_experts_without_samples_have_the_largest(rng, tmp_path):
    original(rng, tmp_path / "bf16")
    x = rng.normal(size=(1, H)).astype(np.float32)  # reaches K = 2 of E = 4 experts
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "nvfp4", calibration={0: x})
    loaded = nvm.load_experts(tmp_path / "nvfp4", layer=0, input_scale="per_expert")
    hidden = np.sort(np.asarray(loaded.w2_input_scale))
    assert (hidden[1:] == hidden[-1]).all()
    assert hidden[0] < hidden[-1]


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([1], TypeError, "calibration is a list, expected a mapping from layers to tokens"),
        ({}, ValueError, "calibration has no samples for layer 0"),
        ({0: np.ones((3, 5))}, ValueError, r"calibration\[0\] has shape \(3, 5\), expected \[T, H"),
        ({0: np.ones((0, H))}, ValueError, r"calibration\[0\] has shape \(0, 64\), expected"),
        ({0: np.full((3, H), np.nan)}, ValueError, r"calibration\[0\] has NaN or infinite values"),
        ({0: np.zeros((3, H))}, ValueError, r"calibration\[0\] is zero for all experts"),
        ({0: (np.ones((3, H)),) * 2}, TypeError, r"calibration\[0\] is a tuple, expected tokens"),
    ],
)
def test_bad_samples(rng, tmp_path, calibration, error, message):
    original(rng, tmp_path / "bf16")
    with pytest.raises(error, match=message):
        quantize_checkpoint(tmp_path / "bf16", tmp_path / "nvfp4", calibration=calibration)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16"]


def test_quantized_already(tmp_path):
    with pytest.raises(CheckpointError, match=r"layer 0 of .* is already quantised"):
        quantize_checkpoint(GOLDENS / "families" / "mixtral", tmp_path / "nvfp4")


def test_weights_that_are_not_finite(rng, tmp_path):
    gate, *_ = original(rng, tmp_path / "bf16")
    data = (tmp_path / "bf16" / "model.safetensors").read_bytes()
    spoiled = gate[1].copy()
    spoiled[3, 5] = np.inf
    data = data.replace(gate[1].tobytes(), spoiled.tobytes())
    (tmp_path / "bf16" / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"experts\.1\.gate_proj\.weight has NaN or infinite"):
        quantize_checkpoint(tmp_path / "bf16", tmp_path / "nvfp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16"]
