"""Loading: what configurations may say, and the errors of bad ones."""

import json
import re

import jax.numpy as jnp
import pytest

from jax_nvfp4_moe.checkpoint import (
    ConfigError,
    TensorError,
    UnsupportedCheckpointError,
    load_experts,
)
from jax_nvfp4_moe.checkpoint.families import FAMILIES
from tests.core.test_experts import same
from tests.support.checkpoints import made
from tests.support.loading import (
    SIZES,
    UP,
    assert_loads,
    load,
    refused,
    spoil_config,
    spoil_group,
    spoil_scheme,
    spoil_tensors,
    unquantise,
    weight_only,
)


def hf_quant_config(path, **settings):
    settings = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"], **settings}
    text = json.dumps({"producer": {"name": "modelopt"}, "quantization": settings})
    (path / "hf_quant_config.json").write_text(text)


@pytest.mark.parametrize("where", ["beside", "inside", "both"])
def test_where_modelopt_says_so(where, tmp_path, rng):
    written = made(rng)
    if where == "beside":
        del written.config["quantization_config"]
    written.write(tmp_path)
    if where != "inside":
        hf_quant_config(tmp_path)
    assert_loads(tmp_path, written)


def test_files_that_disagree(tmp_path, rng):
    made(rng).write(tmp_path)
    hf_quant_config(tmp_path, quant_algo="W4A16_NVFP4")
    message = (
        "config.json has quant_algo 'NVFP4', hf_quant_config.json has 'W4A16_NVFP4': "
        "expected the same"
    )
    refused(ConfigError, message, tmp_path)


def test_what_a_converter_left_behind(tmp_path, rng):
    """compressed-tensors' converter copies ModelOpt's file; config.json decides."""
    written = made(rng, encode=True)
    written.write(tmp_path)
    hf_quant_config(tmp_path)
    assert_loads(tmp_path, written)


@pytest.mark.parametrize(
    ("encode", "how"), [(False, "algorithm"), (False, "groups"), (True, "compressed-tensors")]
)
@pytest.mark.parametrize("scales", [False, True], ids=["without-scales", "with-scales"])
def test_weight_only(encode, how, scales, tmp_path, rng):
    """Activation scales stay unused where the configuration has none."""
    written = made(rng, encode=encode, static=scales)
    weight_only(written.config["quantization_config"], how)
    checkpoint = load(written.write(tmp_path))
    for layer, wanted in enumerate(written.experts):
        loaded = checkpoint.layers[layer].experts
        assert loaded.activation_scheme == "none"
        assert (loaded.w13_input_scale, loaded.w2_input_scale) == (None, None)
        assert same((loaded.w13, loaded.w2), (wanted.w13, wanted.w2))


def test_dynamic_activations(tmp_path, rng):
    written = made(rng, encode=True, static=False)
    group = written.config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"]["dynamic"] = True
    loaded = load_experts(written.write(tmp_path), layer=0)
    assert loaded.activation_scheme == "per_token"


IGNORED = [
    (False, "model.layers.1.mlp*"),
    (False, "*.1.mlp.experts*"),
    (False, "model.layers.1"),  # excluding a module excludes all modules in it
    (False, "model.layers.[1]*"),
    (False, "*"),
    (True, "re:.*layers.1.*"),
    (True, "re:model\\.layers\\.1\\.mlp\\.experts"),  # from the beginning, not to the end
    (True, f"model.layers.1.mlp.experts.{0}.up_proj"),
]


@pytest.mark.parametrize(("encode", "pattern"), IGNORED, ids=[pattern for _, pattern in IGNORED])
def test_ignored_layer(encode, pattern, tmp_path, rng):
    written = made(rng, encode=encode)
    plain = unquantise(written, 1)
    written.config["quantization_config"]["ignore"].append(pattern)
    if pattern == "*":
        message = (
            "no layer of DIR has experts in NVFP4: `python -m jax_nvfp4_moe quantize` makes a "
            "checkpoint with experts in NVFP4"
        )
        unquantise(written, 0)
        refused(UnsupportedCheckpointError, message, written.write(tmp_path))
        return
    checkpoint = load(written.write(tmp_path))
    assert list(checkpoint.layers) == [0]
    assert same(checkpoint.layers[0].experts, written.experts[0])
    assert plain < set(checkpoint.tensors)
    message = (
        "model.layers.1.mlp has experts that are not quantised: `python -m jax_nvfp4_moe quantize` "
        "makes a checkpoint with experts in NVFP4"
    )
    refused(UnsupportedCheckpointError, message, tmp_path, run=load_experts, layer=1)


@pytest.mark.parametrize(
    ("encode", "pattern"),
    [
        (False, "model.layers.1.mlp.expert"),  # a pattern matches whole names
        (False, "layers.1.mlp*"),
        (False, "model.layers.?1*"),
        (True, "re:layers.1"),
        (True, "model.layers.1"),
        (True, "model.layers.1.*"),
    ],
)
def test_pattern_that_does_not_match(encode, pattern, tmp_path, rng):
    written = made(rng, encode=encode)
    written.config["quantization_config"]["ignore"].append(pattern)
    assert_loads(written.write(tmp_path), written)


def test_targets(tmp_path, rng):
    written = made(rng, encode=True)
    group = written.config["quantization_config"]["config_groups"]["group_0"]
    group["targets"] = ["re:.*mlp.experts.*"]
    group["format"] = written.config["quantization_config"].pop("format")
    assert_loads(written.write(tmp_path), written)


def test_mixed_precision(tmp_path, rng):
    written = made(rng)
    written.config["quantization_config"] |= {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
            "model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
            "model.layers.1.mlp.experts*": {"quant_algo": "W4A16_NVFP4"},
        },
    }
    layers = load(written.write(tmp_path)).layers
    assert same(layers[0].experts, written.experts[0])
    assert layers[1].experts.activation_scheme == "none"


def test_mixed_precision_with_experts_in_fp8(tmp_path, rng):
    written = made(rng)
    written.config["quantization_config"] |= {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "model.layers.0.mlp.experts": {"quant_algo": "NVFP4"},
            "model.layers.1.mlp.experts": {"quant_algo": "FP8"},
        },
    }
    message = "model.layers.1.mlp.experts.0.up_proj is in FP8 by its configuration, expected NVFP4"
    refused(UnsupportedCheckpointError, message, written.write(tmp_path))


FP8 = "config.json: quant_algo is 'FP8', expected one of NVFP4, W4A16_NVFP4, or MIXED_PRECISION "
KNOWN = "config.json: model_type is {!r}, expected one of " + ", ".join(
    model_type for family in FAMILIES for model_type in family.model_types
)
TENSORS = 2 * 4 * 12 + 7
BAD_CONFIG = {
    "fp8": (
        False, spoil_scheme(quant_algo="FP8"),
        UnsupportedCheckpointError, FP8 + "with one of them",
    ),
    "method": (
        False, spoil_scheme(quant_method="gptq"),
        UnsupportedCheckpointError,
        "config.json: quant_method is 'gptq', expected 'modelopt' or 'compressed-tensors'",
    ),
    "mxfp4": (
        True, spoil_scheme(format="mxfp4-pack-quantized"),
        UnsupportedCheckpointError,
        "config.json: format is 'mxfp4-pack-quantized', expected 'nvfp4-pack-quantized' with 4-bit "
        "floats",
    ),
    "group-size": (
        False, spoil_scheme(group_size=32),
        ConfigError, "config.json: group_size is 32, expected 16 for NVFP4",
    ),
    "expression": (
        True, spoil_scheme(ignore=["re:("]),
        ConfigError,
        "config.json: 're:(' is not a regular expression: missing ), unterminated subpattern at "
        "position 0",
    ),
    "half-an-expression": (
        True, spoil_scheme(ignore=["re:a)|(b"]),
        ConfigError,
        "config.json: 're:a)|(b' is not a regular expression: unbalanced parenthesis at position 1",
    ),
    "targets": (
        True, spoil_group(targets="Linear"),
        ConfigError, "config.json: targets is 'Linear', expected a list",
    ),
    "algorithm": (
        False, spoil_scheme(quant_algo=None),
        ConfigError, "config.json: quant_algo is None, expected a string",
    ),
    "model-type": (
        False, spoil_config(model_type="qwen3_mow", architectures=[]),
        ConfigError, KNOWN.format("qwen3_mow") + ": did you mean 'qwen3_moe'?",
    ),
    "model-type-far": (
        False, spoil_config(model_type="bert", architectures=["BertModel"]),
        ConfigError, KNOWN.format("bert"),
    ),
    "few-experts": (
        False, spoil_config(num_experts=2),
        TensorError,
        "model.layers.0.mlp.experts.2.up_proj.weight_scale exists, but config.json says there "
        "are 2 experts",
    ),
    "many-experts": (
        False, spoil_config(num_experts=5),
        TensorError,
        "model.layers.0.mlp.experts.4.gate_proj.weight is missing: an expert's weights",
    ),
    "twice-the-experts": (
        False, spoil_config(num_experts=8),
        TensorError,
        "model.layers.0.mlp.experts.4.gate_proj.weight, "
        "model.layers.0.mlp.experts.5.gate_proj.weight, "
        "model.layers.0.mlp.experts.6.gate_proj.weight and 1 more are missing: an expert's weights",
    ),
    "a-billion-experts": (
        False, spoil_config(num_experts=10**9),
        TensorError,
        "model.layers.0.mlp has 1000000000 experts by config.json, but the checkpoint has only "
        f"{TENSORS} tensors",
    ),
    "hidden-size": (
        False, spoil_config(hidden_size=128),
        TensorError,
        "model.layers.0.mlp.experts.0.gate_proj.weight has dtype U8 and shape (32, 32), expected "
        "U8 and (32, 64) for E=4, H=128, I=32",
    ),
    "hidden-size-odd": (
        False, spoil_config(hidden_size=72),
        TensorError,
        "model.layers.0.mlp has experts with hidden_size 72 by config.json, expected a multiple "
        "of 16",
    ),
    "intermediate-size": (
        False, spoil_config(moe_intermediate_size=16),
        TensorError,
        "model.layers.0.mlp.experts.0.gate_proj.weight has dtype U8 and shape (32, 32), expected "
        "U8 and (16, 32) for E=4, H=64, I=16",
    ),
    "many-layers": (
        False, spoil_config(num_hidden_layers=3),
        ConfigError, "config.json has 3 layers, but DIR has no tensor of layer 2",
    ),
    "a-billion-layers": (
        False, spoil_config(num_hidden_layers=10**9),
        ConfigError, "config.json has 1000000000 layers, but DIR has no tensor of layer 2",
    ),
    "no-layers": (
        False, spoil_config(num_hidden_layers=0),
        ConfigError, "config.json gives num_layers 0, expected at least 1",
    ),
    "top-k": (
        False, spoil_config(num_experts_per_tok=5),
        ConfigError,
        "config.json of DIR: routing.top_k is 5, but config.json has 4 experts: expected at most 4",
    ),
    "activation": (
        False, spoil_config(hidden_act="relu2"),
        ConfigError,
        "config.json has the activation 'relu2', but the experts of model.layers.0.mlp have gates",
    ),
    "ignored-but-packed": (
        False, spoil_scheme(ignore=["*.experts.*"]),
        ConfigError,
        "the tensors of model.layers.0.mlp.experts.0.up_proj are in NVFP4, but config.json says "
        "that they are not",
    ),
    "unquantised-but-packed": (
        True, lambda written: written.config.pop("quantization_config"),
        ConfigError,
        "the tensors of model.layers.0.mlp.experts.0.up_proj are in NVFP4, but the "
        "configuration has no quantisation",
    ),
    "quantised-but-plain": (
        False, lambda written: unquantise(written, 0),
        ConfigError,
        "the tensors of model.layers.0.mlp.experts.0.up_proj are not in NVFP4, but config.json "
        "says that they are",
    ),
    "one-expert-plain": (
        False, spoil_tensors("weight", lambda t: t.astype(jnp.bfloat16)),
        TensorError,
        UP + ".weight has dtype BF16 and shape (32, 32), expected U8 and (32, 32) " + SIZES,
    ),
    "type": (
        False, spoil_config(num_experts="4"),
        ConfigError, "config.json: num_experts is '4', expected int",
    ),
    "missing": (
        False, lambda written: written.config.pop("hidden_size"),
        ConfigError, "config.json has no hidden_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_config(case, tmp_path, rng):
    encode, spoil, error, message = BAD_CONFIG[case]
    written = made(rng, encode=encode)
    spoil(written)
    refused(error, message, written.write(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing"),
        ("", "is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "holds a JSON list, expected an object"),
        ("null", "holds a JSON NoneType, expected an object"),
        ('{"a": 1, "a": 2}', "is not JSON: the name 'a' is repeated"),
        ("\xff", "is not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start"),
        ("[" * 10**5, "is not JSON: maximum recursion depth exceeded"),
    ],
    ids=["missing", "empty", "list", "null", "twice", "not-utf8", "deep"],
)
@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
def test_config_that_is_none(name, text, message, tmp_path, rng):
    made(rng).write(tmp_path)
    file = tmp_path / name
    file.unlink(missing_ok=True)
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    if text is None and name != "config.json":
        load(tmp_path)
        return
    with pytest.raises(ConfigError, match=re.escape(f"{file} {message}")):
        load(tmp_path)


def test_config_that_is_huge(tmp_path, rng):
    with (made(rng).write(tmp_path) / "config.json").open("r+b") as file:
        file.truncate(10**9)
    message = "DIR/config.json has 1000000000 bytes, expected at most 268435456"
    refused(ConfigError, message, tmp_path)


def test_bfloat16_checkpoint(tmp_path, rng):
    written = made(rng)
    del written.config["quantization_config"]
    unquantise(written, 0)
    unquantise(written, 1)
    message = (
        "no layer of DIR has experts in NVFP4: `python -m jax_nvfp4_moe quantize` makes a "
        "checkpoint with experts in NVFP4"
    )
    refused(UnsupportedCheckpointError, message, written.write(tmp_path))
