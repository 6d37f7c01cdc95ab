"""Loading checkpoints: both formats, every way to lay out files, and what is refused, in full."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import parallel
from jax_nvfp4_moe.checkpoint import (
    CheckpointError,
    ConfigError,
    MissingInputScaleError,
    ScaleError,
    ShardError,
    TensorError,
    UnsupportedCheckpointError,
    load_checkpoint,
    load_experts,
)
from jax_nvfp4_moe.checkpoint.families import FAMILIES
from jax_nvfp4_moe.checkpoint.files import TensorFiles
from tests.core.test_experts import same
from tests.support.checkpoints import LAYERS, E, H, I, add_shared, made

FORMATS = {"modelopt": False, "compressed-tensors": True}
both_formats = pytest.mark.parametrize("encode", FORMATS.values(), ids=FORMATS)
UP = "model.layers.1.mlp.experts.2.up_proj"  # the module that tests spoil


def names(encode):
    """The four parts of a quantised matrix."""
    if encode:
        return "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"
    return "weight", "weight_scale", "weight_scale_2", "input_scale"


def load(path, **options):
    """The checkpoint, as it is stored."""
    return load_checkpoint(path, input_scale="per_expert", progress=False, **options)


def assert_loads(path, written, **options):
    """What is loaded is what was written, bit for bit, and nothing is left out."""
    checkpoint = load(path, **options)
    assert checkpoint.config == written.config
    assert checkpoint.directory == (path.parent if path.is_file() else path)
    assert list(checkpoint.layers) == list(range(LAYERS))
    for layer, wanted in enumerate(written.experts):
        assert same(checkpoint.layers[layer].experts, wanted)
        router = written.tensors[f"model.layers.{layer}.mlp.gate.weight"]
        assert same(checkpoint.layers[layer].router.weight, jnp.asarray(router))
    others = {n: t for n, t in written.tensors.items() if ".mlp." not in n}
    assert same(dict(checkpoint.tensors), {n: jnp.asarray(t) for n, t in others.items()})
    return checkpoint


def refused(error, message, path, *, run=load, **options):
    """A call raises just this error, with this message; "DIR" in it stands for the directory."""
    with pytest.raises(CheckpointError) as caught:
        run(path, **options)
    assert (type(caught.value), str(caught.value)) == (error, message.replace("DIR", str(path)))


# ------------------------------------------------------------------------------------- files


@both_formats
@pytest.mark.parametrize("layout", ["one", "path", "shards", "no index"])
def test_files(encode, layout, tmp_path, rng):
    written = made(rng, encode=encode)
    written.write(
        tmp_path, shards=3 if layout in ("shards", "no index") else 1, index=layout != "no index"
    )
    path = tmp_path / "model.safetensors" if layout == "path" else tmp_path
    assert_loads(path, written)
    for layer, wanted in enumerate(written.experts):
        loaded = load_experts(path, layer=layer, input_scale="per_expert", progress=False)
        assert same(loaded, wanted)
        nvm.validate(loaded)


def test_path_as_a_string(tmp_path, rng):
    written = made(rng)
    loaded = load_experts(str(written.write(tmp_path)), layer=0, input_scale="per_expert")
    assert same(loaded, written.experts[0])


def test_index_decides_between_shards(tmp_path, rng):
    """A stray in a shard is not loaded, and neither is a file that the index does not name."""
    written = made(rng)
    written.write(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    (tmp_path / "model-00003-of-00002.safetensors").write_bytes(b"not one at all")
    del written.tensors["lm_head.weight"]
    assert_loads(tmp_path, written)


def test_same_tensor_in_two_files(tmp_path, rng):
    written = made(rng)
    written.write(tmp_path)
    save_file({"lm_head.weight": written.tensors["lm_head.weight"]}, tmp_path / "again.safetensors")
    message = "lm_head.weight is both in DIR/again.safetensors and in DIR/model.safetensors"
    refused(ShardError, message, tmp_path)


def test_symbolic_links_as_in_a_cache(tmp_path, rng):
    written = made(rng)
    written.write(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    assert_loads(snapshot, written)


def test_no_such_path(tmp_path):
    for run in (load_checkpoint, functools.partial(load_experts, layer=0)):
        with pytest.raises(FileNotFoundError) as caught:
            run(tmp_path / "none")
        assert str(caught.value) == f"path is '{tmp_path}/none': no such file or directory"


def test_directory_without_tensors(tmp_path):
    message = "DIR has neither model.safetensors.index.json nor a .safetensors file"
    refused(ShardError, message, tmp_path)


def spoil_index(change):
    def run(path):
        index = json.loads(path.read_text())
        path.write_text(json.dumps(change(index) or index))

    return run


def put(name):
    return spoil_index(lambda index: index["weight_map"].update({"lm_head.weight": name}))


def outside(name):
    return (
        f"INDEX names the file {name!r}, expected a plain .safetensors file name: a checkpoint may "
        "not point outside its directory"
    )


NOT_NAMES = "INDEX: weight_map is not an object of file names, one per tensor"
BAD_INDEX = {
    "missing": (put("x.safetensors"), ShardError, "DIR/x.safetensors is missing, or is not a file"),
    "parent": (put("../x.safetensors"), ShardError, outside("../x.safetensors")),
    "absolute": (put("/x.safetensors"), ShardError, outside("/x.safetensors")),
    "folder": (put("a/x.safetensors"), ShardError, outside("a/x.safetensors")),
    "backslash": (put("..\\x.safetensors"), ShardError, outside("..\\x.safetensors")),
    "not-tensors": (put("config.json"), ShardError, outside("config.json")),
    "number": (put(5), ConfigError, NOT_NAMES),
    "null": (put(None), ConfigError, NOT_NAMES),
    "no-map": (spoil_index(lambda index: {"metadata": {}}), ConfigError, NOT_NAMES),
    "list": (
        spoil_index(lambda index: [index]),
        ConfigError,
        "INDEX holds a JSON list, expected an object",
    ),
    "not-json": (
        lambda path: path.write_text("{"),
        ConfigError,
        "INDEX is not JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    ),
    "twice": (
        lambda path: path.write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        ConfigError,
        "INDEX is not JSON: 'a' is there twice",
    ),
    "elsewhere": (
        put("model-00002-of-00003.safetensors"),
        TensorError,
        "INDEX places 1 tensors in files that do not have them, the first is lm_head.weight in "
        "model-00002-of-00003.safetensors",
    ),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_bad_index(case, tmp_path):
    spoil, error, message = BAD_INDEX[case]
    written = made(np.random.default_rng(0))
    written.write(tmp_path, shards=3)
    path = tmp_path / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    assert places["lm_head.weight"] == "model-00001-of-00003.safetensors"
    spoil(path)
    refused(error, message.replace("INDEX", str(path)), tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: raw[:1000],
        lambda raw: raw[:7],
        lambda raw: b"",
        lambda raw: raw[:8] + b"garbage " + raw[16:],
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: b"a text",
    ],
    ids=["end", "surplus", "header", "length", "empty", "garbage", "length-lies", "text"],
)
def test_truncated_or_garbage(spoil, tmp_path, rng):
    file = made(rng).write(tmp_path) / "model.safetensors"
    raw = spoil(file.read_bytes())
    file.write_bytes(raw)
    with pytest.raises(ShardError) as caught:
        load(tmp_path)
    # What follows are the words of the safetensors library.
    message = f"{file} ({len(raw)} bytes) is truncated or malformed: "
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) > len(message) + 10


# ------------------------------------------------------------------------------------- configs


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
    """compressed-tensors' converter copies ModelOpt's file; config.json is what counts."""
    written = made(rng, encode=True)
    written.write(tmp_path)
    hf_quant_config(tmp_path)
    assert_loads(tmp_path, written)


def weight_only(config, how):
    if how == "algorithm":
        config["quant_algo"] = "W4A16_NVFP4"
    elif how == "groups":
        config["config_groups"] = {"group_0": {"weights": {}, "input_activations": None}}
    else:
        config["config_groups"]["group_0"]["input_activations"] = None


@pytest.mark.parametrize(
    ("encode", "how"), [(False, "algorithm"), (False, "groups"), (True, "compressed-tensors")]
)
@pytest.mark.parametrize("scales", [False, True], ids=["without-scales", "with-scales"])
def test_weight_only(encode, how, scales, tmp_path, rng):
    """Activation scales that are there all the same stay unused."""
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


def unquantise(written, layer):
    """A layer's experts as bfloat16."""
    wanted = re.compile(rf"model\.layers\.{layer}\.mlp\.experts\..*(gate|up|down)_proj")
    modules = {found[0] for name in written.tensors if (found := wanted.match(name))}
    written.tensors = {n: t for n, t in written.tensors.items() if not wanted.match(n)}
    for module in modules:
        shape = (H, I) if "down" in module else (I, H)
        written.tensors[f"{module}.weight"] = np.ones(shape, jnp.bfloat16)
    return {f"{module}.weight" for module in modules}


IGNORED = [
    (False, "model.layers.1.mlp*"),
    (False, "*.1.mlp.experts*"),
    (False, "model.layers.1"),  # what excludes a module excludes what is in it
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
            "no layer of DIR has experts in NVFP4: `python -m jax_nvfp4_moe quantize` makes such a "
            "checkpoint"
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
        "makes a checkpoint whose experts are"
    )
    refused(UnsupportedCheckpointError, message, tmp_path, run=load_experts, layer=1)


@pytest.mark.parametrize(
    ("encode", "pattern"),
    [
        (False, "model.layers.1.mlp.expert"),  # names end where they end
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
    message = "model.layers.1.mlp.experts.0.up_proj is in FP8, by its configuration; expected NVFP4"
    refused(UnsupportedCheckpointError, message, written.write(tmp_path))


def spoil_config(**changes):
    def run(written):
        written.config |= changes

    return run


def spoil_scheme(**changes):
    def run(written):
        written.config["quantization_config"] |= changes

    return run


def spoil_group(**changes):
    def run(written):
        written.config["quantization_config"]["config_groups"]["group_0"] |= changes

    return run


def spoil_tensors(part, change, module=UP):
    """Changes one tensor; None takes it away."""

    def run(written):
        name = f"{module}.{part}".strip(".")
        found = change(written.tensors.pop(name))
        if found is not None:
            written.tensors[name] = np.asarray(found)

    return run


FP8 = "config.json: quant_algo is 'FP8', expected one of NVFP4, W4A16_NVFP4, or MIXED_PRECISION "
KNOWN = "config.json: model_type is {!r}, expected one of " + ", ".join(
    model_type for family in FAMILIES for model_type in family.model_types
)
TENSORS = 2 * 4 * 12 + 7
SIZES = "of 4 experts, hidden size 64 and intermediate size 32"
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
        "config.json: format is 'mxfp4-pack-quantized', expected 'nvfp4-pack-quantized', of 4-bit "
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
        "model.layers.0.mlp.experts.2.up_proj.weight_scale is there, but config.json says there "
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
        "model.layers.0.mlp has 1000000000 experts by config.json, but there are only "
        f"{TENSORS} tensors in all",
    ),
    "hidden-size": (
        False, spoil_config(hidden_size=128),
        TensorError,
        "model.layers.0.mlp.experts.0.gate_proj.weight has dtype U8 and shape (32, 32), expected "
        "U8 and (32, 64), of 4 experts, hidden size 128 and intermediate size 32",
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
        "U8 and (16, 32), of 4 experts, hidden size 64 and intermediate size 16",
    ),
    "many-layers": (
        False, spoil_config(num_hidden_layers=3),
        ConfigError, "config.json has 3 layers, but no tensor of DIR is of layer 2",
    ),
    "a-billion-layers": (
        False, spoil_config(num_hidden_layers=10**9),
        ConfigError, "config.json has 1000000000 layers, but no tensor of DIR is of layer 2",
    ),
    "no-layers": (
        False, spoil_config(num_hidden_layers=0),
        ConfigError, "config.json makes num_layers 0, expected at least 1",
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
        "the tensors of model.layers.0.mlp.experts.0.up_proj are in NVFP4, but there is no "
        "quantisation in the configuration",
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
        UP + ".weight has dtype BF16 and shape (32, 32), expected U8 and (32, 32), " + SIZES,
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
        ('{"a": 1, "a": 2}', "is not JSON: 'a' is there twice"),
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
    message = "DIR/config.json has 1000000000 bytes, too many for what it is"
    refused(ConfigError, message, tmp_path)


def test_bfloat16_checkpoint(tmp_path, rng):
    written = made(rng)
    del written.config["quantization_config"]
    unquantise(written, 0)
    unquantise(written, 1)
    message = (
        "no layer of DIR has experts in NVFP4: `python -m jax_nvfp4_moe quantize` makes such a "
        "checkpoint"
    )
    refused(UnsupportedCheckpointError, message, written.write(tmp_path))


# ------------------------------------------------------------------------------------- tensors


def add(name, array):
    return lambda written: written.tensors.update({name: array})


def shaped(array, *shape):
    return np.zeros(shape, array.dtype)


ROUTER = "model.layers.0.mlp.gate.weight"
BAD_TENSORS = {
    "data-missing": (
        spoil_tensors("weight", lambda t: None),
        f"{UP}.weight is missing: an expert's weights",
    ),
    "scale-missing": (
        spoil_tensors("weight_scale", lambda t: None),
        f"{UP}.weight_scale is missing: an expert's weights",
    ),
    "global-scale-missing": (
        spoil_tensors("weight_scale_2", lambda t: None),
        f"{UP}.weight_scale_2 is missing: a scale",
    ),
    "data-dtype": (
        spoil_tensors("weight", lambda t: t.view(np.int8)),
        f"{UP}.weight has dtype I8 and shape (32, 32), expected U8 and (32, 32), {SIZES}",
    ),
    "scale-dtype": (
        spoil_tensors("weight_scale", lambda t: t.view(np.uint8)),
        f"{UP}.weight_scale has dtype U8 and shape (32, 4), expected F8_E4M3 and (32, 4), {SIZES}",
    ),
    "global-scale-dtype": (
        spoil_tensors("weight_scale_2", lambda t: t.astype(jnp.bfloat16)),
        f"{UP}.weight_scale_2 has dtype BF16 and shape (), expected F32 and () or (1,)",
    ),
    "input-scale-dtype": (
        spoil_tensors("input_scale", lambda t: t.astype(np.float16)),
        f"{UP}.input_scale has dtype F16 and shape (), expected F32 and () or (1,)",
    ),
    "data-shape": (
        spoil_tensors("weight", lambda t: shaped(t, 32, 31)),
        f"{UP}.weight has dtype U8 and shape (32, 31), expected U8 and (32, 32), {SIZES}",
    ),
    "scale-shape": (
        spoil_tensors("weight_scale", lambda t: np.ascontiguousarray(t.T)),
        f"{UP}.weight_scale has dtype F8_E4M3 and shape (4, 32), expected F8_E4M3 and (32, 4), "
        f"{SIZES}",
    ),
    "scale-swizzled": (
        spoil_tensors("weight_scale", lambda t: shaped(t, 128, 4)),
        f"{UP}.weight_scale has dtype F8_E4M3 and shape (128, 4), expected F8_E4M3 and (32, 4): "
        "this is the size of scales swizzled for a kernel, expected linear ones",
    ),
    "global-scale-shape": (
        spoil_tensors("weight_scale_2", lambda t: np.full(2, t)),
        f"{UP}.weight_scale_2 has dtype F32 and shape (2,), expected F32 and () or (1,)",
    ),
    "input-scale-shape": (
        spoil_tensors("input_scale", lambda t: np.full((1, 1), t)),
        f"{UP}.input_scale has dtype F32 and shape (1, 1), expected F32 and () or (1,)",
    ),
    "router-missing": (
        spoil_tensors("", lambda t: None, ROUTER),
        f"{ROUTER} is missing: router",
    ),
    "router-shape": (
        spoil_tensors("", lambda t: np.ascontiguousarray(t.T), ROUTER),
        f"{ROUTER} has dtype BF16 and shape (64, 4), expected BF16 or F16 or F32 and (4, 64)",
    ),
    "router-dtype": (
        spoil_tensors("", lambda t: t.astype(np.int32), ROUTER),
        f"{ROUTER} has dtype I32 and shape (4, 64), expected BF16 or F16 or F32 and (4, 64)",
    ),
    "router-nan": (
        spoil_tensors("", lambda t: t * np.nan, ROUTER),
        f"{ROUTER} has NaN or infinite values",
    ),
    "one-bias": (
        add("model.layers.1.mlp.experts.0.gate_proj.bias", np.zeros(I, np.float32)),
        "model.layers.1.mlp.experts.1.gate_proj.bias, model.layers.1.mlp.experts.2.gate_proj.bias, "
        "model.layers.1.mlp.experts.3.gate_proj.bias and 4 more are missing: a bias",
    ),
    "one-bias-of-up": (
        add(f"{UP}.bias", np.zeros(I, np.float32)),
        "model.layers.1.mlp.experts.0.gate_proj.bias, model.layers.1.mlp.experts.1.gate_proj.bias, "
        "model.layers.1.mlp.experts.2.gate_proj.bias and 4 more are missing: a bias",
    ),
    "wide": (
        add("counts", np.zeros(3, np.int64)),
        "counts has dtype I64, which JAX holds only with 64-bit types: "
        "jax.config.update('jax_enable_x64', True)",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensor(case, tmp_path, rng):
    spoil, message = BAD_TENSORS[case]
    written = made(rng)
    spoil(written)
    refused(TensorError, message, written.write(tmp_path))


def test_wide_types_where_jax_has_them(tmp_path, rng):
    written = made(rng)
    written.tensors["counts"] = np.array([2**40])
    with jax.enable_x64(True):
        assert_loads(written.write(tmp_path), written)


@pytest.mark.parametrize("name", ["pre_quant_scale", "svdquant_lora_a", "input_amax"])
def test_leftovers_beside_the_experts(name, tmp_path, rng):
    written = made(rng)
    written.tensors[f"{UP}.{name}"] = np.ones(H, np.float32)
    message = f"{UP}.{name} is beside the experts' matrices: this is not plain NVFP4"
    refused(UnsupportedCheckpointError, message, written.write(tmp_path))


def test_layer_without_experts(tmp_path, rng):
    written = made(rng)
    written.tensors = {n: t for n, t in written.tensors.items() if ".0.mlp." not in n}
    written.write(tmp_path)
    assert list(load(tmp_path).layers) == [1]
    for layer in (0, 2, -1):
        message = f"layer {layer} of DIR has no experts of qwen3_moe: there are some in layers 1"
        refused(TensorError, message, tmp_path, run=load_experts, layer=layer)


# ------------------------------------------------------------------------------------- scales

# What must not be a scale; infinity is 1 / 0 to compressed-tensors.
NOT_SCALES = [0.0, -0.0, -0.01, np.nan, np.inf, -np.inf, 1e-40]


@both_formats
@pytest.mark.parametrize("which", [2, 3], ids=["weight", "input"])
@pytest.mark.parametrize("value", NOT_SCALES)
def test_bad_global_scale(encode, which, value, tmp_path, rng):
    written = made(rng, encode=encode)
    part = names(encode)[which]
    spoil_tensors(part, lambda t: np.full_like(t, value))(written)
    message = f"{UP}.{part} is {value}, expected a finite scale above 0; 1 of 8 like it are not"
    refused(ScaleError, message, written.write(tmp_path))


def test_encode_scale_whose_inverse_is_lost(tmp_path, rng):
    written = made(rng, encode=True)
    spoil_tensors("weight_global_scale", lambda t: np.full_like(t, 3e38))(written)
    message = (
        f"{UP}.weight_global_scale is 3e+38, expected a finite scale above 0; 1 of 8 like it are "
        "not"
    )
    refused(ScaleError, message, written.write(tmp_path))


def with_byte(row, block, byte):
    def change(scales):
        scales = scales.copy()
        scales.view(np.uint8)[row, block] = byte
        return scales

    return change


@both_formats
@pytest.mark.parametrize(
    ("byte", "what"),
    [
        (0x7F, "NaN"),
        (0xFF, "NaN"),
        (0xB8, "negative"),
        (0x81, "negative"),
        (0x00, "zero for a block that is not"),
        (0x80, "zero for a block that is not"),
    ],
)
def test_bad_block_scale(encode, byte, what, tmp_path, rng):
    written = made(rng, encode=encode)
    spoil_tensors("weight_scale", with_byte(5, 3, byte))(written)
    message = (
        f"{UP}.weight_scale has 1 of 128 scales that are {what}, the first of expert 2's up at "
        "[5][3]"
    )
    refused(ScaleError, message, written.write(tmp_path))


@both_formats
@pytest.mark.parametrize("byte", [0x00, 0x80])
def test_zero_scale_of_a_zero_block(encode, byte, tmp_path, rng):
    written = made(rng, encode=encode)
    spoil_tensors("weight_scale", with_byte(5, 3, byte))(written)
    codes = written.tensors[f"{UP}.{names(encode)[0]}"]
    codes[5, 24:32] = 0x80  # -0 and 0
    loaded = load(written.write(tmp_path)).layers[1].experts
    assert np.asarray(loaded.w13.scale).view(np.uint8)[2, I + 5, 3] == byte
    assert (np.asarray(loaded.w13.data)[2, I + 5, 24:32] == 0x80).all()
    wanted = nvm.dequantize(loaded.w13, jnp.float32)
    assert (wanted[2, I + 5, 48:64] == 0).all()


@both_formats
@pytest.mark.parametrize("some", [True, False], ids=["one", "all"])
def test_missing_input_scales(encode, some, tmp_path, rng):
    written = made(rng, encode=encode)
    part = names(encode)[3]
    gone = [f"{UP}.{part}"] if some else [n for n in written.tensors if n.endswith(part)]
    for name in gone:
        del written.tensors[name]
    written.write(tmp_path)
    which = f"{gone[0]} is"
    if not some:
        which = ", ".join(f"model.layers.0.mlp.experts.{n}.gate_proj.{part}" for n in range(3))
        which += " and 9 more are"
    message = (
        f"{which} missing, without which activations have no calibrated scale: "
        "on_missing_input_scale='per_token' takes each token's own instead, 'none' does not "
        "quantise activations (W4A16)"
    )
    refused(MissingInputScaleError, message, tmp_path)
    for scheme in ("per_token", "none"):
        layers = load(tmp_path, on_missing_input_scale=scheme).layers
        assert layers[1].experts.activation_scheme == scheme
        assert layers[0].experts.activation_scheme == ("static" if some else scheme)
        asked = load(tmp_path, activation_scheme=scheme).layers
        assert {layer.experts.activation_scheme for layer in asked.values()} == {scheme}
        assert same(asked[1].experts.w13, written.experts[1].w13)


def test_static_where_the_checkpoint_says_none(tmp_path, rng):
    """The other way round, and only where the scales are there."""
    written = made(rng)
    weight_only(written.config["quantization_config"], "algorithm")
    written.write(tmp_path)
    assert same(load(tmp_path, activation_scheme="static").layers[0].experts, written.experts[0])


# ------------------------------------------------------------------------------------- meaning


run_routed = jax.jit(nvm.nvfp4_moe_routed)


def some_tokens():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6, H)).astype(np.float32)
    ids = rng.permuted(np.tile(np.arange(E, dtype=np.int32), (6, 1)), axis=1)[:, :2]
    weights = rng.dirichlet(np.ones(2), 6).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights)


def outputs(experts):
    return np.asarray(run_routed(*some_tokens(), experts))


def apart(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_gate_and_up_have_scales_of_their_own(tmp_path, rng):
    written = made(rng)
    right = outputs(load_experts(written.write(tmp_path / "right"), layer=0))
    for name in list(written.tensors):
        if name.endswith("up_proj.weight_scale_2"):
            gate = name.replace("up_proj", "gate_proj")
            written.tensors[name] = written.tensors[gate]
    wrong = outputs(load_experts(written.write(tmp_path / "equal"), layer=0))
    assert apart(wrong, right) > 0.5
    first = written.experts[0]
    largest = {
        "w13_input_scale": first.w13_input_scale.max(),
        "w2_input_scale": first.w2_input_scale.max(),
    }
    assert np.array_equal(right, outputs(dataclasses.replace(first, **largest)))


def test_formats_decode_alike(tmp_path, rng):
    """compressed-tensors stores 1 / scale; taken for scales, the result is another one."""
    written = made(rng)
    right = load(written.write(tmp_path / "modelopt")).layers[0].experts
    encoded = made(rng, encode=True)
    encoded.tensors = {}
    for name, tensor in written.tensors.items():
        renamed = name
        if ".experts." in name:
            for old, new in zip(names(False), names(True), strict=True):
                renamed = re.sub(rf"\.{old}$", f".{new}", renamed)
        scale = renamed.endswith("global_scale")
        encoded.tensors[renamed] = np.float32(1) / tensor.reshape(1) if scale else tensor
    path = encoded.write(tmp_path / "encoded")
    loaded = load(path).layers[0].experts
    assert same((loaded.w13.data, loaded.w13.scale), (right.w13.data, right.w13.scale))
    for got, wanted in [
        (loaded.w13.global_scale, right.w13.global_scale),
        (loaded.w13_input_scale, right.w13_input_scale),
        (loaded.w2_input_scale, right.w2_input_scale),
    ]:
        np.testing.assert_array_max_ulp(np.asarray(got), np.asarray(wanted), 1)
    right = outputs(load_experts(tmp_path / "modelopt", layer=0))
    assert apart(outputs(load_experts(path, layer=0)), right) < 1e-2
    for name in encoded.tensors:
        if name.endswith("global_scale"):
            encoded.tensors[name] = np.float32(1) / encoded.tensors[name]
    wrong = load_experts(encoded.write(tmp_path / "wrong"), layer=0)
    assert apart(outputs(wrong), right) > 0.9


# ------------------------------------------------------------------------------------- shared


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantised"])
@both_formats
def test_shared_expert(family, quantized, encode, tmp_path, rng):
    written = made(rng, encode=encode)
    shared = add_shared(written, rng, family, quantized=quantized, encode=encode)
    checkpoint = assert_loads(written.write(tmp_path), written)
    for number, layer in checkpoint.layers.items():
        if quantized:
            assert same(layer.shared, shared[number])
        else:
            gate, up, down = (jnp.asarray(written.tensors[name]) for name in shared[number])
            assert same((layer.shared.gate, layer.shared.up, layer.shared.down), (gate, up, down))
        block = f"model.layers.{number}.mlp"
        if family == "deepseek_v3":
            assert layer.shared_gate is None
            bias = written.tensors[f"{block}.gate.e_score_correction_bias"]
            assert same(layer.router.selection_bias, jnp.asarray(bias))
        else:
            gate = written.tensors[f"{block}.shared_expert_gate.weight"]
            assert same(layer.shared_gate, jnp.asarray(gate))


SHARED = "model.layers.1.mlp.shared_experts.up_proj"
BAD_SHARED = {
    "missing": (
        False, "weight", lambda t: None, TensorError,
        f"{SHARED}.weight is missing: an expert's weights",
    ),
    "shape": (
        False, "weight", lambda t: shaped(t, I, 2 * H), TensorError,
        f"{SHARED}.weight has dtype BF16 and shape (32, 128), expected BF16 or F16 or F32 and "
        "(32, 64), of 1 experts, hidden size 64 and intermediate size 32",
    ),
    "infinite": (
        False, "weight", lambda t: t / 0, TensorError,
        f"{SHARED}.weight has NaN or infinite values",
    ),
    "packed": (
        False, "weight", lambda t: shaped(np.zeros(1, np.uint8), I, H // 2), ConfigError,
        f"the tensors of {SHARED} are in NVFP4, but config.json says that they are not",
    ),
    "scale": (
        True, "weight_scale_2", lambda t: -t, ScaleError,
        f"{SHARED}.weight_scale_2 is SCALE, expected a finite scale above 0; 1 of 2 like it are "
        "not",
    ),
    "no-input-scale": (
        True, "input_scale", lambda t: None, MissingInputScaleError,
        f"{SHARED}.input_scale is missing, without which activations have no calibrated scale: "
        "on_missing_input_scale='per_token' takes each token's own instead, 'none' does not "
        "quantise activations (W4A16)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SHARED)
def test_bad_shared_expert(case, tmp_path, rng):
    quantized, part, change, error, message = BAD_SHARED[case]
    written = made(rng)
    add_shared(written, rng, "deepseek_v3", quantized=quantized)
    with np.errstate(divide="ignore"):
        spoil_tensors(part, change, SHARED)(written)
    scale = written.tensors.get(f"{SHARED}.{part}")
    refused(error, message.replace("SCALE", str(scale)), written.write(tmp_path))


# ------------------------------------------------------------------------------------- devices


def mesh():
    return jax.make_mesh((4,), ("expert",), (jax.sharding.AxisType.Auto,))


@both_formats
@pytest.mark.parametrize("input_scale", ["global_max", "per_expert"])
def test_split_over_devices(encode, input_scale, tmp_path, rng):
    written = made(rng, encode=encode)
    add_shared(written, rng, "deepseek_v3", encode=encode)
    written.write(tmp_path)
    options = {"input_scale": input_scale, "progress": False}
    whole = load_checkpoint(tmp_path, **options).layers[1]
    split = load_checkpoint(tmp_path, mesh=mesh(), **options).layers[1]
    assert same(whole, split)
    for leaf in jax.tree.leaves(split.experts):
        assert len(leaf.sharding.device_set) == 4
        assert leaf.is_fully_replicated == (leaf.ndim == 0)
    for leaf in jax.tree.leaves((split.router, split.shared)):
        assert len(leaf.sharding.device_set) == 4
        assert leaf.is_fully_replicated
    wanted = written.experts[1]
    if input_scale == "per_expert":
        assert same(split.experts, wanted)
    else:
        # Over all experts, wherever the largest one is.
        assert np.asarray(split.experts.w13_input_scale) == np.asarray(wanted.w13_input_scale).max()
        assert np.asarray(split.experts.w2_input_scale) == np.asarray(wanted.w2_input_scale).max()


def test_outputs_depend_neither_on_devices_nor_on_kept_scales(tmp_path, rng):
    made(rng).write(tmp_path)
    tokens = some_tokens()
    wanted = outputs(load_experts(tmp_path, layer=0))
    assert np.isfinite(wanted).all()
    assert (wanted != 0).all()
    for how in ("global_max", "per_expert"):
        assert np.array_equal(outputs(load_experts(tmp_path, layer=0, input_scale=how)), wanted)
        split = load_experts(tmp_path, layer=0, input_scale=how, mesh=mesh())
        got = parallel.nvfp4_moe_routed(*tokens, split, mesh=mesh())
        assert np.array_equal(np.asarray(got), wanted)


def test_each_device_reads_its_own_share(tmp_path, rng, monkeypatch):
    made(rng).write(tmp_path, shards=2)
    read = []
    view = TensorFiles.view
    monkeypatch.setattr(
        TensorFiles, "view", lambda self, name, *at: read.append(name) or view(self, name, *at)
    )
    shares = {}
    callback = jax.make_array_from_callback

    def by_device(shape, sharding, data, **options):
        def share(index):
            before = len(read)
            found = data(index)
            if found.ndim == 3:
                # The first look is at a matrix's shape, and not into it.
                experts = {
                    int(re.search(r"experts\.(\d+)", name)[1]) for name in read[before + 1 :]
                }
                shares.setdefault(index[0].indices(E)[:2], set()).update(experts)
            return found

        return callback(shape, sharding, share, **options)

    monkeypatch.setattr(jax, "make_array_from_callback", by_device)
    load_experts(tmp_path, layer=1, mesh=mesh())
    assert shares == {(n, n + 1): {n} for n in range(E)}
    assert all(name.startswith("model.layers.1.mlp.experts.") for name in read)


def test_split_over_one_axis_of_two(tmp_path, rng):
    written = made(rng)
    axes = jax.make_mesh((2, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    loaded = load_experts(
        written.write(tmp_path), layer=0, mesh=axes, expert_axis="model", input_scale="per_expert"
    )
    assert same(loaded, written.experts[0])
    assert loaded.w13.data.sharding.shard_shape(loaded.w13.data.shape) == (2, 2 * I, H // 2)


# ------------------------------------------------------------------------------------- arguments


BAD_ARGUMENTS = {
    "layer-none": (
        {"layer": None}, TypeError, "layer is None, expected an int: a decoder layer, from 0",
    ),
    "layer-bool": (
        {"layer": True}, TypeError, "layer is True, expected an int: a decoder layer, from 0",
    ),
    "layer-name": (
        {"layer": "0"}, TypeError, "layer is '0', expected an int: a decoder layer, from 0",
    ),
    "layer-range": (
        {"layer": 2}, TensorError,
        "layer 2 of DIR has no experts of qwen3_moe: there are some in layers 0, 1",
    ),
    "input-scale": (
        {"input_scale": "global_min"}, ValueError,
        "input_scale is 'global_min', expected one of 'global_max', 'per_expert': did you mean "
        "'global_max'?",
    ),
    "activation-scheme": (
        {"activation_scheme": "dynamic"}, ValueError,
        "activation_scheme is 'dynamic', expected None or one of 'static', 'per_token', 'none'",
    ),
    "on-missing": (
        {"on_missing_input_scale": "per-token"}, ValueError,
        "on_missing_input_scale is 'per-token', expected one of 'error', 'per_token', 'none': did "
        "you mean 'per_token'?",
    ),
    "mesh": (
        {"mesh": 4}, TypeError, "mesh is 4, expected a jax.sharding.Mesh or None",
    ),
    "axis": (
        {"mesh": mesh, "expert_axis": "experts"}, ValueError,
        "expert_axis is 'experts', but the mesh has axes ('expert',)",
    ),
    "split": (
        {"mesh": lambda: jax.make_mesh((3,), ("expert",), (jax.sharding.AxisType.Auto,),
                                       devices=jax.devices()[:3])}, ValueError,
        "expert_axis 'expert' has 3 devices, which do not divide 4 experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument(case, tmp_path, rng):
    options, error, message = BAD_ARGUMENTS[case]
    made(rng).write(tmp_path)
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(error) as caught:
        load_experts(tmp_path, **{"layer": 0, **options})
    assert str(caught.value) == message.replace("DIR", str(tmp_path))


def test_layer_may_be_numpys(tmp_path, rng):
    written = made(rng)
    loaded = load_experts(written.write(tmp_path), layer=np.int64(1), input_scale="per_expert")
    assert same(loaded, written.experts[1])


# ------------------------------------------------------------------------------------- progress


def test_progress(tmp_path, rng, capsys):
    written = made(rng)
    written.write(tmp_path)
    for show in (False, None):  # None: pytest's stderr is no terminal
        load_checkpoint(tmp_path, progress=show)
        assert capsys.readouterr() == ("", "")
    load_checkpoint(tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("\rLoading:   0%|")
    load_experts(tmp_path, layer=0, progress=True)
    assert "Loading: 100%|" in capsys.readouterr().err
