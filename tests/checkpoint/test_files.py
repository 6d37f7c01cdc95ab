"""Loading: every layout of files, and the errors of bad ones."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.checkpoint import (
    ConfigError,
    ShardError,
    TensorError,
    load_checkpoint,
    load_experts,
)
from tests.core.test_experts import same
from tests.support.checkpoints import made
from tests.support.loading import (
    assert_loads,
    both_formats,
    load,
    refused,
)


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
    """Neither a stray tensor in a shard is loaded nor a file that the index does not name."""
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
    message = "lm_head.weight is in both DIR/again.safetensors and DIR/model.safetensors"
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


NOT_NAMES = "INDEX: weight_map is malformed, expected a file name for each tensor"
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
        "INDEX is not JSON: the name 'a' is repeated",
    ),
    "elsewhere": (
        put("model-00002-of-00003.safetensors"),
        TensorError,
        "INDEX places 1 tensors in files that lack them, the first is lm_head.weight in "
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
    # The rest is the safetensors library's own message.
    message = f"{file} ({len(raw)} bytes) is truncated or malformed: "
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) > len(message) + 10
