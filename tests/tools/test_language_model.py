"""The example's language model against transformers and ModelOpt, and what the example prints.

examples/models/reference.* hold what the two computed, by tools/tiny_model/reference.py, whose
definitions are in reference.json.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = EXAMPLES / "models"
NVFP4, BF16 = MODELS / "qwen3-moe-tiny-nvfp4", MODELS / "qwen3-moe-tiny-bf16"
QUANTISED = [NVFP4, MODELS / "qwen3-moe-tiny-nvfp4-ct"]

sys.path.insert(0, str(EXAMPLES))
import generate  # noqa: E402
import qwen3_moe  # noqa: E402


@pytest.fixture(scope="module")
def reference():
    """The arrays and the numbers."""
    with np.load(MODELS / "reference.npz") as arrays:
        return dict(arrays) | json.loads((MODELS / "reference.json").read_text())


@pytest.fixture(autouse=True)
def usual_promotion():
    """The example is written for JAX as users have it, not for the tests' strictness."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def logits_of(model, reference):
    logits, _ = jax.jit(lambda model, tokens: model(tokens))(model, reference["prompt"][None])
    return np.asarray(logits[0])[reference["positions"]]


def greedy(model, reference):
    prompt = reference["greedy_prompt"].tolist()
    return list(generate.generate(model, prompt, 64, temperature=0.0, top_k=1))


@pytest.mark.parametrize("directory", QUANTISED, ids=lambda directory: directory.name)
def test_against_transformers(directory, reference, record_property):
    """Logits, and 64 greedy tokens with a cache; activations are not quantised."""
    model = qwen3_moe.load(directory, activation_scheme="none")
    error = float(np.abs(logits_of(model, reference) - reference["logits_w4a16"]).max())
    record_property("max_abs_difference", error)
    assert error <= 1e-3  # the contract is 2e-2; sums in another order leave about 1e-5
    assert greedy(model, reference) == reference["greedy_w4a16"].tolist()
    assert reference["greedy_gap_w4a16"] > 2 * error


@pytest.mark.slow
def test_the_original_against_transformers(reference):
    model = qwen3_moe.load(BF16)
    error = np.abs(logits_of(model, reference) - reference["logits_bf16"]).max()
    assert error <= 1e-3
    assert greedy(model, reference) == reference["greedy_bf16"].tolist()


def test_control_the_original_is_not_the_quantised_model(reference):
    model = qwen3_moe.load(BF16)
    assert np.abs(logits_of(model, reference) - reference["logits_w4a16"]).max() > 2e-2


def swapped(state):
    """Gate and up swapped in all experts: what a wrong order of rows would do."""
    for layer in state.layers:
        w13 = layer.moe.experts.w13
        for variable in (w13.data, w13.scale):
            variable.set_value(jnp.roll(variable[...], variable.shape[1] // 2, axis=1))


def test_control_gate_and_up_swapped(reference):
    model = qwen3_moe.load(NVFP4, activation_scheme="none")
    swapped(model)
    assert np.abs(logits_of(model, reference) - reference["logits_w4a16"]).max() > 2e-2


def perplexity(model):
    tokenizer = Tokenizer.from_file(str(NVFP4 / "tokenizer.json"))
    text = (MODELS / "held_out.txt").read_text("utf-8")
    return generate.perplexity(model, tokenizer, text, [0])[0]


@pytest.mark.parametrize(
    ("directory", "scheme", "name", "within"),
    [
        (NVFP4, None, "w4a4", 0.03),  # against ModelOpt's own fake-quantised model
        pytest.param(QUANTISED[1], None, "w4a4", 0.03, marks=pytest.mark.slow),
        pytest.param(NVFP4, "none", "w4a16", 1e-4, marks=pytest.mark.slow),
        (BF16, None, "bf16", 1e-4),
    ],
    ids=["modelopt W4A4", "compressed-tensors W4A4", "W4A16", "bf16"],
)
def test_perplexity(directory, scheme, name, within, reference, record_property):
    model = qwen3_moe.load(directory, activation_scheme=scheme)
    ours, theirs = perplexity(model), reference["perplexity"][name]
    record_property("perplexity", ours)
    record_property("reference", theirs)
    assert abs(ours / theirs - 1) <= within


def test_control_wrong_activation_scales(reference):
    """Hidden scales 100 times too small saturate, and the perplexity shows it."""
    model = qwen3_moe.load(NVFP4)
    for layer in model.layers:
        scale = layer.moe.experts.w2_input_scale
        scale.set_value(scale[...] / 100)
    assert perplexity(model) > 1.03 * reference["perplexity"]["w4a4"]


def test_what_the_example_prints(capsys, monkeypatch, reference):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--tokens", "12", "--temperature", "0"])
    generate.main()
    out = capsys.readouterr().out
    assert "3 layers of 16 experts, top 4, NVFP4 experts, activation scheme static" in out
    assert reference["greedy_prompt_text"] in out
    assert re.search(r"12 tokens, \d+ a second", out)
    found = dict(re.findall(r"(qwen3-moe-tiny-\S+) +(\d+\.\d+)", out))
    assert set(found) == {"qwen3-moe-tiny-nvfp4", "qwen3-moe-tiny-bf16"}
    assert float(found["qwen3-moe-tiny-nvfp4"]) > float(found["qwen3-moe-tiny-bf16"])


def test_a_config_the_example_does_not_do(tmp_path):
    config = json.loads((BF16 / "config.json").read_text()) | {"use_sliding_window": True}
    with pytest.raises(NotImplementedError, match="use_sliding_window is True, expected False"):
        qwen3_moe.Config.of(config)


def test_the_models_are_small():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 6e6
