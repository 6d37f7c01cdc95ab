"""Reads checkpoints with NumPy alone, to check what was loaded."""

import json

import ml_dtypes
import numpy as np

from tests.support.checkpoints import E, H, I
from tests.support.fuzz.cases import name_of
from tests.support.fuzz.files import INDEX, ITEMSIZE, PARTS, unpacked


def stored(path):
    """All tensors of a directory: names to (dtype, shape, bytes)."""
    if not (path / INDEX).exists():
        return {
            name: tensor
            for file in path.glob("*.safetensors")
            for name, tensor in unpacked(file.read_bytes()).items()
        }
    places = json.loads((path / INDEX).read_text())["weight_map"]
    shards = {name: unpacked((path / name).read_bytes()) for name in set(places.values())}
    return {name: shards[file][name] for name, file in places.items()}


def bits(tensors, name, *shape):
    return np.frombuffer(tensors[name][2], np.uint8).reshape(shape)


def scale(tensors, name, encode):
    """A decode scale from the file."""
    value = np.frombuffer(tensors[name][2], np.float32)[0]
    with np.errstate(all="ignore"):
        return np.float32(1) / value if encode else value


def modules():
    return [
        (layer, expert, role, (H, I) if role == "down" else (I, H))
        for layer in range(2)
        for expert in range(E)
        for role in ("gate", "up", "down")
    ]


def sound(path, kind):
    """Whether all values obey the formats' rules."""
    tensors = stored(path)
    data, blocks, global_scale, input_scale = PARTS[kind]
    tiny = np.finfo(np.float32).tiny
    for layer, expert, role, (rows, columns) in modules():
        for part in (global_scale, input_scale):
            name = name_of(layer, expert, role, part)
            for value in (scale(tensors, name, False), scale(tensors, name, kind == "encode")):
                if not tiny <= value <= np.finfo(np.float32).max:
                    return False
        found = bits(tensors, name_of(layer, expert, role, blocks), rows, columns // 16)
        codes = bits(tensors, name_of(layer, expert, role, data), rows, columns // 16, 8)
        lost = (found & 0x7F == 0) & ((codes & 0x77) != 0).any(axis=-1)
        if ((found & 0x7F) == 0x7F).any() or (found > 0x80).any() or lost.any():
            return False
    routers = (f"model.layers.{layer}.mlp.gate.weight" for layer in range(2))
    values = (np.frombuffer(tensors[name][2], ml_dtypes.bfloat16) for name in routers)
    return all(np.isfinite(value.astype(np.float32)).all() for value in values)


def raw(array):
    return np.asarray(array).tobytes()


def assert_as_stored(checkpoint, path, kind):
    """Asserts that the loaded arrays have the files' bits, and that none is missing."""
    tensors = stored(path)
    config = json.loads((path / "config.json").read_text())
    assert dict(checkpoint.config) == config
    while "text_config" in config:
        config = config["text_config"]
    assert list(checkpoint.layers) == list(range(config["num_hidden_layers"]))
    taken = set()
    data, blocks, *scalars = PARTS[kind]
    for layer, expert, role, (rows, _) in modules():
        loaded = checkpoint.layers[layer].experts
        assert (loaded.hidden_size, loaded.intermediate_size) == (H, I)
        assert loaded.activation_scheme == "static"
        at = {"gate": np.s_[expert, :rows], "up": np.s_[expert, rows:], "down": np.s_[expert]}[role]
        one = {"gate": np.s_[expert, 0], "up": np.s_[expert, 1], "down": np.s_[expert]}[role]
        matrix = loaded.w2 if role == "down" else loaded.w13
        inputs = loaded.w2_input_scale if role == "down" else loaded.w13_input_scale
        for part, array in ((data, matrix.data), (blocks, matrix.scale)):
            name = name_of(layer, expert, role, part)
            assert raw(array[at]) == tensors[name][2]
            taken.add(name)
        for part, array in zip(scalars, (matrix.global_scale, inputs), strict=True):
            name = name_of(layer, expert, role, part)
            assert raw(array[one]) == scale(tensors, name, kind == "encode").tobytes()
            taken.add(name)
    for number, layer in checkpoint.layers.items():
        name = f"model.layers.{number}.mlp.gate.weight"
        assert raw(layer.router.weight) == tensors[name][2]
        assert layer.router.routing.top_k == config["num_experts_per_tok"]
        taken.add(name)
    assert set(checkpoint.tensors) == set(tensors) - taken
    for name, array in checkpoint.tensors.items():
        dtype, shape, content = tensors[name]
        assert (array.shape, raw(array)) == (shape, content)
        assert array.dtype.itemsize == ITEMSIZE[dtype]
