"""Hundreds of spoilt checkpoints: each is refused in time, or loads as just what its files say.

A case spoils the files of a good checkpoint and says which error loading must raise. Where a
flipped bit cannot be noticed, what is loaded is compared with the files, read by NumPy alone.
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jax_nvfp4_moe.checkpoint import (
    CheckpointError,
    ConfigError,
    MissingInputScaleError,
    ScaleError,
    ShardError,
    TensorError,
    UnsupportedCheckpointError,
    load_checkpoint,
)
from tests.support.checkpoints import E, H, I, made

SECONDS = 2  # that a load may take; about 0.03 is usual
ROOM = 1 << 30  # bytes of addresses that hostile sizes may take, beyond what is there already
EITHER = None  # the outcome of a case in which files are right or wrong by chance

INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
PARTS = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "encode": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}
PARTS["shards"] = PARTS["modelopt"]
PROJECTION = "model.layers.1.mlp.experts.3.{}_proj"  # whose tensors are spoilt
UP = PROJECTION.format("up")
ROUTER = "model.layers.0.mlp.gate.weight"
ITEMSIZE = {
    **dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("BF16", "F16", "I16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "C64"), 8),
}
DTYPES = {
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
    "bfloat16": "BF16",
    "float32": "F32",
}  # those of the checkpoints that are spoilt


# ------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class Special:
    """What is in a file's place: a "link" to a name, a "folder", a "fifo", zeros to "size"."""

    kind: str
    value: object = None


def header_bytes(entries):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return raw + b" " * (-len(raw) % 8)


def with_header(entries, data, length=None):
    """A safetensors file of any header, with its length or another one."""
    raw = header_bytes(entries)
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def split(raw):
    """A file's header, as JSON has it, and its data."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def unpacked(raw):
    """Names to (dtype, shape, bytes)."""
    entries, data = split(raw)
    entries.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in entries.items()
    }


def packed(tensors):
    """The inverse of `unpacked`."""
    entries, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += raw
    return with_header(entries, data)


def base(kind):
    """The files of a good checkpoint: "modelopt", "encode", or "shards", which has an index."""
    written = made(np.random.default_rng(7), encode=kind == "encode")
    tensors = {
        name: (DTYPES[tensor.dtype.name], tensor.shape, tensor.tobytes())
        for name, tensor in sorted(written.tensors.items())
    }
    files = {"config.json": json.dumps(written.config).encode()}
    if kind != "shards":
        return {**files, ONE: packed(tensors)}
    shards = {f"model-{n + 1:05d}-of-00003.safetensors": list(tensors)[n::3] for n in range(3)}
    for file, names in shards.items():
        files[file] = packed({name: tensors[name] for name in names})
    places = {name: file for file, names in shards.items() for name in names}
    return {**files, INDEX: json.dumps({"weight_map": places}).encode()}


BASES = {kind: base(kind) for kind in ("modelopt", "encode", "shards")}


def put(path, files):
    path.mkdir()
    for name, content in files.items():
        file = path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content.kind == "link":
            file.symlink_to(content.value)
        elif content.kind == "folder":
            file.mkdir()
        elif content.kind == "fifo":
            os.mkfifo(file)
        else:
            file.touch()
            os.truncate(file, content.value)


# ------------------------------------------------------------------------------------- the reader


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


def name_of(layer, expert, role, part):
    return f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.{part}"


def sound(path, kind):
    """Whether all values are possible ones, by the formats' rules."""
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
    """Everything that was loaded has the bits that are in the files, and nothing is missing."""
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


# ------------------------------------------------------------------------------------- cases


@dataclasses.dataclass(frozen=True)
class Case:
    """One spoilt checkpoint.

    Attributes:
        title: what is wrong with it.
        kind: of the checkpoint that is spoilt.
        spoil: changes its files.
        outcome: the error that loading must raise; EITHER: one, or it loads.
    """

    title: str
    kind: str
    spoil: Callable
    outcome: type | None

    def files(self):
        files = dict(BASES[self.kind])
        self.spoil(files)
        return files


CASES = []


def case(title, spoil, outcome, kind="modelopt"):
    CASES.append(Case(f"{kind}-{title}", kind, spoil, outcome))


def on_tensors(change):
    """Changes (dtype, shape, bytes) of tensors by name."""

    def spoil(files):
        tensors = unpacked(files[ONE])
        change(tensors)
        files[ONE] = packed(tensors)

    return spoil


def on_tensor(name, change):
    def spoil(tensors):
        tensors[name] = change(*tensors[name])

    return on_tensors(spoil)


def with_dtype(dtype):
    def change(_, shape, content):
        size = math.prod(shape) * ITEMSIZE[dtype]
        return dtype, shape, (content * 8)[:size]

    return change


def with_shape(of):
    def change(dtype, shape, content):
        shape = of(shape)
        size = math.prod(shape) * ITEMSIZE[dtype]
        return dtype, shape, (content * (1 + size // len(content)))[:size]

    return change


def with_float(value):
    return lambda dtype, shape, _: (dtype, shape, np.float32(value).tobytes())


def with_byte(byte):
    return lambda dtype, shape, content: (dtype, shape, content[:9] + bytes([byte]) + content[10:])


def with_extra(name, dtype, *shape):
    content = bytes(math.prod(shape) * ITEMSIZE[dtype])
    return on_tensors(lambda tensors: tensors.update({name: (dtype, shape, content)}))


MATRIX_SHAPES = {
    "a-row-less": lambda s: (s[0] - 1, s[1]),
    "a-column-less": lambda s: (s[0], s[1] - 1),
    "thrice-the-rows": lambda s: (3 * s[0], s[1]),
    "transposed": lambda s: s[::-1],
    "flat": lambda s: (s[0] * s[1],),
    "axis-before": lambda s: (1, *s),
    "axis-after": lambda s: (*s, 1),
    "no-rows": lambda s: (0, s[1]),
    "scalar": lambda s: (),
    "padded-to-128": lambda s: (128, -(-s[1] // 4) * 4),
}
SCALAR_SHAPES = {"two": (2,), "none": (0,), "matrix": (1, 1), "cube": (1, 1, 1), "experts": (E,)}
NOT_SCALES = [0.0, -0.0, -0.02, math.nan, math.inf, -math.inf, 1e-40]


def tensor_cases(kind):
    data, blocks, *scalars = PARTS[kind]
    for role in ("gate", "up", "down"):
        for part in PARTS[kind]:
            name = f"{PROJECTION.format(role)}.{part}"
            error = MissingInputScaleError if part == scalars[1] else TensorError
            case(
                f"without-{role}-{part}",
                on_tensors(lambda tensors, name=name: tensors.pop(name)),
                error,
                kind,
            )
    for part, name in ((data, f"{PROJECTION.format('down')}.{data}"), (blocks, f"{UP}.{blocks}")):
        for title, shape in MATRIX_SHAPES.items():
            case(f"{part}-{title}", on_tensor(name, with_shape(shape)), TensorError, kind)
    for part in scalars:
        for title, shape in SCALAR_SHAPES.items():
            change = with_shape(lambda _, shape=shape: shape)
            case(f"{part}-{title}", on_tensor(f"{UP}.{part}", change), TensorError, kind)
        for value in NOT_SCALES:
            case(f"{part}-{value}", on_tensor(f"{UP}.{part}", with_float(value)), ScaleError, kind)
    one_byte = ("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F16", "F32")
    four_bytes = ("I32", "U32", "F64", "BF16", "F16", "F8_E4M3")
    for part, own, dtypes in [
        (data, "U8", one_byte),
        (blocks, "F8_E4M3", one_byte),
        (scalars[0], "F32", four_bytes),
        (scalars[1], "F32", four_bytes),
    ]:
        for dtype in dtypes:
            if dtype != own:
                spoil = on_tensor(f"{UP}.{part}", with_dtype(dtype))
                case(f"{part}-as-{dtype}", spoil, TensorError, kind)
    for byte in (0x7F, 0xFF, 0xB8, 0x81, 0xFE, 0x00, 0x80):
        case(
            f"block-scale-{byte:#x}", on_tensor(f"{UP}.{blocks}", with_byte(byte)), ScaleError, kind
        )
    extra = f"{UP}.pre_quant_scale", "F32", H
    case("leftover", with_extra(*extra), UnsupportedCheckpointError, kind)


def router_cases():
    for value in (math.nan, math.inf, -math.inf):
        content = np.full((E, H), value, ml_dtypes.bfloat16).tobytes()
        spoil = on_tensor(ROUTER, lambda dtype, shape, _, content=content: (dtype, shape, content))
        case(f"router-{value}", spoil, TensorError)
    for dtype in ("I16", "F64", "U8"):
        case(f"router-as-{dtype}", on_tensor(ROUTER, with_dtype(dtype)), TensorError)
    for title, shape in MATRIX_SHAPES.items():
        case(f"router-{title}", on_tensor(ROUTER, with_shape(shape)), TensorError)
    case("router-missing", on_tensors(lambda tensors: tensors.pop(ROUTER)), TensorError)


def other_tensor_cases():
    for name, dtype, outcome in [
        ("counts", "I64", TensorError),
        ("sums", "F64", TensorError),
        ("waves", "C64", TensorError),
        (name_of(0, 0, "up", "bias"), "F32", TensorError),
        (name_of(0, E, "up", "weight_scale"), "F8_E4M3", TensorError),
        (name_of(0, E, "up", "weight"), "U8", UnsupportedCheckpointError),
        (name_of(0, 0, "up", "weight\u0441scale"), "U8", UnsupportedCheckpointError),
        (name_of(0, 0, "up", ""), "U8", UnsupportedCheckpointError),
        ("model.layers." + "9" * 5000 + ".x", "U8", EITHER),
        ("model.layers.\u0662.x", "U8", EITHER),
        ("\u0000\u2028\U0001f600", "U8", EITHER),
        ("", "U8", EITHER),
    ]:
        case(f"extra-{ascii(name)[:60]}-{dtype}", with_extra(name, dtype, 4), outcome)
    for layer in range(2):

        def drop(tensors, start=f"model.layers.{layer}."):
            for name in [name for name in tensors if name.startswith(start)]:
                del tensors[name]

        case(f"without-layer-{layer}", on_tensors(drop), ConfigError)
    case("no-tensors", on_tensors(dict.clear), ConfigError)


def on_config(change):
    def spoil(files):
        config = json.loads(files["config.json"])
        change(config)
        files["config.json"] = json.dumps(config).encode()

    return spoil


def on_scheme(change):
    return on_config(lambda config: change(config["quantization_config"]))


def nested(depth):
    """A config whose language model's config is that deep inside."""

    def change(config):
        inner = dict(config)
        for _ in range(depth):
            inner = {"text_config": inner}
        config.clear()
        config.update(inner)

    return change


def config_cases():
    wrong = [None, "4", [4], {}, 1e30, 4.5, math.nan, True, -1, 0]
    huge = {
        "num_experts": TensorError,
        "num_experts_per_tok": ConfigError,
        "hidden_size": TensorError,
        "moe_intermediate_size": TensorError,
        "num_hidden_layers": ConfigError,
    }
    for key, error in huge.items():
        for value in [*wrong, 10**9, 10**30, 2**63]:
            outcome = error if isinstance(value, int) and value > 4 else ConfigError
            case(f"{key}-{value}", on_config(lambda c, k=key, v=value: c.update({k: v})), outcome)
        case(f"without-{key}", on_config(lambda c, k=key: c.pop(k)), ConfigError)
    for key, value in [
        ("hidden_act", None), ("hidden_act", 5), ("hidden_act", "swish"), ("hidden_act", ["silu"]),
        ("hidden_act", "relu2"),
        ("norm_topk_prob", "yes"), ("norm_topk_prob", 1), ("norm_topk_prob", []),
        ("model_type", 5), ("model_type", ["qwen3_moe"]), ("model_type", {"a": 1}),
        ("model_type", "x" * 10**5),
        ("architectures", 5), ("architectures", True),
        ("quantization_config", None), ("quantization_config", {}), ("quantization_config", []),
        ("quantization_config", [5]), ("quantization_config", "NVFP4"),
        ("quantization_config", 5), ("quantization_config", True),
    ]:  # fmt: skip

        def change(config, key=key, value=value):
            config["architectures"] = []
            config["model_type"] = "qwen3_moe" if key != "architectures" else "unknown"
            config[key] = value

        case(f"{key}-{value!r:.40}", on_config(change), ConfigError)
    for depth in (300, 450, 900):
        case(f"nested-{depth}", on_config(nested(depth)), EITHER)
    case("too-few-experts", on_config(lambda c: c.update(num_experts=2)), TensorError)
    case("too-many-experts", on_config(lambda c: c.update(num_experts=6)), TensorError)
    case("half-the-hidden-size", on_config(lambda c: c.update(hidden_size=32)), TensorError)
    case("odd-hidden-size", on_config(lambda c: c.update(hidden_size=72)), TensorError)


def scheme_cases():
    for key, value, outcome in [
        ("quant_algo", None, ConfigError),
        ("quant_algo", 5, ConfigError),
        ("quant_algo", ["NVFP4"], ConfigError),
        ("quant_algo", "FP8", UnsupportedCheckpointError),
        ("quant_algo", "nvfp4", UnsupportedCheckpointError),
        ("quant_algo", "MIXED_PRECISION", ConfigError),
        ("quant_method", "awq", UnsupportedCheckpointError),
        ("quant_method", {"a": 5}, UnsupportedCheckpointError),
        ("quant_method", "compressed-tensors", ConfigError),
        ("group_size", 32, ConfigError),
        ("group_size", "16", ConfigError),
        ("group_size", None, ConfigError),
        ("group_size", math.nan, ConfigError),
        ("ignore", "lm_head", ConfigError),
        ("ignore", [5], ConfigError),
        ("ignore", [None], ConfigError),
        ("ignore", ["*"], ConfigError),
        ("ignore", ["*.experts*"], ConfigError),
        ("ignore", {"a": "*"}, ConfigError),
        ("config_groups", [], ConfigError),
        ("config_groups", {"g": 5}, ConfigError),
        ("config_groups", {"g": {"weights": 5}}, ConfigError),
        ("config_groups", {"g": {"weights": {"group_size": 32}}}, ConfigError),
    ]:
        change = on_scheme(lambda s, key=key, value=value: s.update({key: value}))
        case(f"scheme-{key}-{value!r:.40}", change, outcome)
    for layers in (None, [], {}, {"a": 5}, {"*": {"quant_algo": "FP8"}}, {"*": {}}, {"x": {
        "quant_algo": "NVFP4"}}):  # fmt: skip
        change = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        outcome = UnsupportedCheckpointError if layers in ({}, {"*": {}}) else ConfigError
        if layers == {"*": {"quant_algo": "FP8"}}:
            outcome = UnsupportedCheckpointError
        spoil = on_scheme(lambda s, change=change: s.update(change))
        case(f"mixed-{layers!r:.40}", spoil, outcome)
    for key, value, outcome in [
        ("config_groups", None, ConfigError),
        ("config_groups", [], ConfigError),
        ("config_groups", {}, UnsupportedCheckpointError),
        ("config_groups", {"g": None}, ConfigError),
        ("config_groups", {"g": {}}, ConfigError),
        ("format", None, UnsupportedCheckpointError),
        ("format", ["nvfp4-pack-quantized"], UnsupportedCheckpointError),
        ("format", "int-quantized", UnsupportedCheckpointError),
        ("ignore", "lm_head", ConfigError),
        ("ignore", [5], ConfigError),
        ("ignore", ["re:("], ConfigError),
        ("ignore", ["re:*"], ConfigError),
        ("ignore", ["re:a)|(b"], ConfigError),
        ("ignore", ["re:a{99999999999}"], ConfigError),
        ("ignore", ["re:" + "(" * 10**4], ConfigError),
        ("ignore", ["re:"], ConfigError),  # everything
        ("ignore", ["Linear"], ConfigError),
    ]:
        change = on_scheme(lambda s, key=key, value=value: s.update({key: value}))
        case(f"scheme-{key}-{value!r:.40}", change, outcome, "encode")
    for key, value, outcome in [
        ("targets", None, ConfigError),
        ("targets", "Linear", ConfigError),
        ("targets", [5], ConfigError),
        ("targets", [], UnsupportedCheckpointError),
        ("targets", ["re:nothing"], ConfigError),
        ("weights", None, ConfigError),
        ("weights", {"num_bits": 8, "type": "float"}, UnsupportedCheckpointError),
        ("weights", {"num_bits": 4, "type": "int"}, UnsupportedCheckpointError),
        ("weights", {"num_bits": 4, "type": "float"}, ConfigError),
        ("weights", {"num_bits": 4, "type": "float", "group_size": 32}, ConfigError),
        ("input_activations", 5, ConfigError),
        ("input_activations", [], ConfigError),
        ("input_activations", {"num_bits": 8, "type": "float"}, UnsupportedCheckpointError),
        ("input_activations", {"num_bits": 4, "type": "float"}, ConfigError),
    ]:
        change = on_scheme(
            lambda s, key=key, value=value: s["config_groups"]["group_0"].update({key: value})
        )
        case(f"group-{key}-{value!r:.40}", change, outcome, "encode")
    for title, content, outcome in [
        ("garbage", b"\x00\x01", ConfigError),
        ("list", b"[]", ConfigError),
        ("empty", b"{}", ConfigError),
        ("string", b'{"quantization": "NVFP4"}', ConfigError),
        ("other", b'{"quantization": {"quant_algo": "FP8"}}', ConfigError),
        ("link-to-itself", Special("link", "hf_quant_config.json"), EITHER),
    ]:

        def add(files, content=content):
            files["hf_quant_config.json"] = content

        case(f"hf_quant_config-{title}", add, outcome)


def replaced(name, content):
    def spoil(files):
        if content is None:
            del files[name]
        else:
            files[name] = content

    return spoil


def json_cases():
    good = BASES["modelopt"]["config.json"]
    for title, content in {
        "missing": None,
        "empty": b"",
        "blank": b" \n ",
        "garbage": bytes(range(256)),
        "cut": good[:-1],
        "surplus": good + b"}",
        "list": b"[" + good + b"]",
        "number": b"5",
        "huge-number": b"9" * 5000,
        "null": b"null",
        "utf-16": good.decode().encode("utf-16"),
        "byte-order-mark": b"\xef\xbb\xbf" + good,
        "not-utf-8": good.replace(b"silu", b"\xff\xfe\xfd\xfc"),
        "nul": good.replace(b"silu", b"\x00\x00\x00\x00"),
        "deep-lists": b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        "deep-objects": b'{"text_config": ' * 10**5 + b"1" + b"}" * 10**5,
        "twice": good[:-1] + b', "num_experts": 2}',
        "folder": Special("folder"),
        "link-to-itself": Special("link", "config.json"),
        "link-to-nothing": Special("link", "nothing"),
        "fifo": Special("fifo"),
        "huge": Special("size", 1 << 33),
    }.items():
        case(f"config-{title}", replaced("config.json", content), ConfigError)
    # Nobody reads it, and Python 3.13's parser goes deeper than the ones before it.
    deep = good[:-1] + b', "a": ' + b"[" * 2000 + b"]" * 2000 + b"}"
    case("config-deep-in-config", replaced("config.json", deep), EITHER)


def on_index(change):
    def spoil(files):
        index = json.loads(files[INDEX])
        found = change(index["weight_map"])
        files[INDEX] = json.dumps(index if found is None else found).encode()

    return spoil


def index_cases():
    first, second, _ = (name for name in BASES["shards"] if name.endswith("safetensors"))
    for name, outcome in {
        "../x.safetensors": ShardError,
        "../../../../../etc/passwd": ShardError,
        "/etc/passwd": ShardError,
        "/x.safetensors": ShardError,
        "a/x.safetensors": ShardError,
        "./x.safetensors": ShardError,
        "..\\x.safetensors": ShardError,
        "C:\\x.safetensors": ShardError,
        "~/x.safetensors": ShardError,
        "": ShardError,
        ".": ShardError,
        "..": ShardError,
        "config.json": ShardError,
        INDEX: ShardError,
        "x.safetensors": ShardError,
        "x.safetensors ": ShardError,
        "\u202e.safetensors": ShardError,
        "\x00.safetensors": ShardError,
        "\ud800.safetensors": ShardError,
        "x" * 300 + ".safetensors": ShardError,
        "x" * 5000 + ".safetensors": ShardError,
        second: TensorError,
    }.items():
        spoil = on_index(lambda places, name=name: places.update({"lm_head.weight": name}))
        case(f"index-{ascii(name)[:60]}-{len(name)}", spoil, outcome, "shards")
    for value in (None, 5, 1.5, True, [first], {"file": first}):
        spoil = on_index(lambda places, value=value: places.update({"lm_head.weight": value}))
        case(f"index-value-{value}", spoil, ConfigError, "shards")
    for title, found in {
        "list": [],
        "no-map": {},
        "null-map": {"weight_map": None},
        "list-map": {"weight_map": [first]},
        "string-map": {"weight_map": first},
        "number": 5,
    }.items():
        case(f"index-{title}", on_index(lambda _, found=found: found), ConfigError, "shards")
    good = BASES["shards"][INDEX]
    for title, content in {
        "empty": b"",
        "garbage": bytes(range(256)),
        "cut": good[:-2],
        "nan": b"NaN",
        "deep": b'{"weight_map": ' + b"[" * 10**5,
        "deep-in-map": b'{"weight_map": ' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}",
        "twice": good.replace(b'"weight_map": {', b'"weight_map": {"lm_head.weight": "x", '),
        "two-maps": good[:-1] + b', "weight_map": {}}',
        "folder": Special("folder"),
        "huge": Special("size", 1 << 33),
    }.items():
        case(f"index-{title}", replaced(INDEX, content), ConfigError, "shards")
    case("index-empty-map", on_index(dict.clear), ConfigError, "shards")
    expert = name_of(1, 3, "up", "weight")
    case(
        "index-without-a-matrix", on_index(lambda p: p.pop(expert) and None), TensorError, "shards"
    )
    case("index-without-a-norm", on_index(lambda p: p.pop("model.norm.weight") and None), EITHER,
         "shards")  # fmt: skip
    case("index-with-a-ghost", on_index(lambda p: p.update(ghost=first)), TensorError, "shards")
    for title, content in {
        "missing": None,
        "empty": b"",
        "folder": Special("folder"),
        "link-to-itself": Special("link", first),
        "link-to-nothing": Special("link", "nothing"),
        "link-to-config": Special("link", "config.json"),
        "fifo": Special("fifo"),
        "zeros": Special("size", 1 << 20),
        "many-zeros": Special("size", 1 << 40),
    }.items():
        case(f"shard-{title}", replaced(first, content), ShardError, "shards")
    case("shard-link-to-another", replaced(first, Special("link", second)), TensorError, "shards")
    case("shard-is-another", replaced(first, BASES["shards"][second]), TensorError, "shards")
    case("index-link-to-itself", replaced(INDEX, Special("link", INDEX)), EITHER, "shards")

    case("no-files", replaced(ONE, None), ShardError)
    for title, content in {
        "copy": BASES["modelopt"][ONE],
        "empty": b"",
        "folder": Special("folder"),
        "link-to-nothing": Special("link", "nothing"),
    }.items():
        case(f"second-file-{title}", replaced("other.safetensors", content), ShardError)


def on_header(change):
    """Changes a header as JSON, and neither its order nor the data."""

    def spoil(files):
        entries, data = split(files[ONE])
        found = change(entries)
        files[ONE] = with_header(entries if found is None else found, data)

    return spoil


def on_entry(**changes):
    return on_header(lambda entries: entries["model.embed_tokens.weight"].update(changes))


def header_cases():
    raw_file = BASES["modelopt"][ONE]
    length = int.from_bytes(raw_file[:8], "little")
    for value in (0, 1, 2, 7, length - 8, length - 1, length + 1, length + 8, len(raw_file) - 8,
                  len(raw_file), 99_999_999, 10**8 + 1, 2**31, 2**32 + length, 2**62, 2**63,
                  2**64 - 8, 2**64 - 1):  # fmt: skip
        changed = value.to_bytes(8, "little") + raw_file[8:]
        case(f"header-length-{value}", replaced(ONE, changed), ShardError)
    begin, end = split(raw_file)[0]["model.embed_tokens.weight"]["data_offsets"]
    for title, changes in {
        "negative-shape": {"shape": [-32, -H]},
        "other-shape": {"shape": [32, H + 1]},
        "huge-shape": {"shape": [2**40, H]},
        "overflowing-shape": {"shape": [2**33, 2**33]},
        "overflow-to-right-size": {"shape": [2**60 + 32, H]},
        "float-shape": {"shape": [32.0, H]},
        "text-shape": {"shape": "32"},
        "null-shape": {"shape": None},
        "bool-shape": {"shape": [True, H]},
        "nested-shape": {"shape": [[32], H]},
        "too-big-int": {"shape": [2**64 + 32, H]},
        "reversed-offsets": {"data_offsets": [end, begin]},
        "overlap": {"data_offsets": [begin - 8, end - 8]},
        "overlap-first": {"data_offsets": [0, end - begin]},
        "gap": {"data_offsets": [begin + 8, end + 8]},
        "beyond": {"data_offsets": [begin + len(raw_file), end + len(raw_file)]},
        "far-beyond": {"data_offsets": [2**62, 2**62 + end - begin]},
        "wrapping": {"data_offsets": [2**64 - 8, 2**64 - 8 + end - begin]},
        "negative-offsets": {"data_offsets": [-8, end - begin - 8]},
        "three-offsets": {"data_offsets": [begin, end, end]},
        "one-offset": {"data_offsets": [begin]},
        "null-offsets": {"data_offsets": None},
        "float-offsets": {"data_offsets": [float(begin), float(end)]},
        "nan-offsets": {"data_offsets": [math.nan, end]},
        "unknown-dtype": {"dtype": "F33"},
        "lower-case-dtype": {"dtype": "bf16"},
        "null-dtype": {"dtype": None},
        "number-dtype": {"dtype": 16},
        "wider-dtype": {"dtype": "F32"},
        "narrower-dtype": {"dtype": "U8"},
        "four-bits-too-few": {"dtype": "F4"},
    }.items():
        case(f"header-{title}", on_entry(**changes), ShardError)
    for title, (dtype, shape), outcome in [
        ("four-bits", ("F4", [32, 4 * H]), TensorError),
        ("complex", ("C64", [32, H // 4]), TensorError),
        ("wide", ("I64", [32, H // 4]), TensorError),
        ("rank-20", ("BF16", [1] * 18 + [32, H]), EITHER),
        ("rank-64", ("BF16", [1] * 62 + [32, H]), EITHER),
        ("rank-65", ("BF16", [1] * 63 + [32, H]), TensorError),
        ("rank-1000", ("BF16", [1] * 998 + [32, H]), TensorError),
    ]:
        case(f"header-{title}", on_entry(dtype=dtype, shape=shape), outcome)
    for title, shape, outcome in [
        ("nothing", [0], EITHER),
        ("long-nothing", [0, 2**40], EITHER),
        ("very-long-nothing", [0, 2**62], TensorError),
        ("endless-nothing", [2**63, 0, 2**63], TensorError),
    ]:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        case(f"header-{title}", on_header(lambda e, entry=entry: {"nothing": entry, **e}), outcome)
    for key in ("dtype", "shape", "data_offsets"):
        case(
            f"header-without-{key}",
            on_header(lambda e, key=key: e["model.embed_tokens.weight"].pop(key) and None),
            ShardError,
        )
    for title, value in {
        "null": None,
        "number": 5,
        "string": "BF16",
        "list": ["BF16", [32, H], [begin, end]],
        "empty": {},
        "empty-list": [],
    }.items():
        change = on_header(lambda e, value=value: e.update({"model.embed_tokens.weight": value}))
        case(f"header-entry-{title}", change, ShardError)
    for value in (5, [], "pt", {"format": 5}, {"format": None}, {"format": {}}):
        change = on_header(lambda e, value=value: e.update(__metadata__=value))
        case(f"header-metadata-{value}", change, ShardError)
    data = split(raw_file)[1]
    text = raw_file[8 : 8 + length].rstrip()
    start = text.index(b'"model.embed_tokens.weight"')
    entry = text[start : text.index(b"}", start) + 1]
    for title, header in {
        "empty": b"",
        "object": b"{}",
        "list": b"[]",
        "null": b"null",
        "garbage": bytes(range(256)),
        "byte-order-mark": b"\xef\xbb\xbf" + text,
        "utf-16": text.decode().encode("utf-16"),
        "nul-after": text + b"\x00" * 8,
        "text-after": text + b"{}",
        "comma-after": text[:-1] + b",}",
        "deep": b'{"a":' * 10**4 + b"1" + b"}" * 10**4,
        "twice": b"{" + entry + b"," + text[1:],
        "twice-other": b"{" + entry.replace(b"BF16", b"F16") + b"," + text[1:],
        "escaped-twice": b"{"
        + entry.replace(b"model.embed_", b"\\u006dodel.embed_")
        + b","
        + text[1:],
        "key-twice": text.replace(entry, entry[:-1] + b', "dtype": "BF16"}'),
        "lone-surrogate": text.replace(b"embed_tokens", b"\\ud800_"),
        "control-character": text.replace(b"embed_tokens", b"embed\x01tokens"),
        "infinity": text.replace(str(begin).encode() + b", ", b"Infinity, "),
    }.items():
        case(f"header-{title}", replaced(ONE, with_header(header, data)), ShardError)
    for surplus in (1, 8, 10**6):
        case(f"surplus-{surplus}", replaced(ONE, raw_file + bytes(surplus)), ShardError)
    case("hollow", replaced(ONE, raw_file[:8] + bytes(100)), ShardError)


def random_cases():
    rng = np.random.default_rng(11)
    for kind in ("modelopt", "encode"):
        raw_file = BASES[kind][ONE]
        start = 8 + int.from_bytes(raw_file[:8], "little")
        for size in sorted({*rng.integers(0, len(raw_file), 12).tolist(), 8, start}):
            case(f"truncated-{size}", replaced(ONE, raw_file[:size]), ShardError, kind)
        for where, low, high, count in (("header", 8, start, 40), ("data", start, None, 40)):
            for position in rng.choice(np.arange(low, high or len(raw_file)), count, replace=False):
                changed = bytearray(raw_file)
                changed[position] ^= 1 << int(rng.integers(8))
                spoil = replaced(ONE, bytes(changed))
                case(f"flip-in-{where}-{position}", spoil, EITHER, kind)
        for number in range(6):
            changed = bytearray(raw_file)
            begin = int(rng.integers(start, len(raw_file) - 512))
            changed[begin : begin + 512] = rng.bytes(512)
            case(f"noise-{number}", replaced(ONE, bytes(changed)), EITHER, kind)


for each in ("modelopt", "encode"):
    tensor_cases(each)
router_cases()
other_tensor_cases()
config_cases()
scheme_cases()
json_cases()
index_cases()
header_cases()
random_cases()


# ------------------------------------------------------------------------------------- tests


def load(path):
    return load_checkpoint(path, input_scale="per_expert", progress=False)


def attempt(path):
    """What came of loading: the checkpoint or the error, in time."""
    begin = time.perf_counter()
    try:
        outcome = load(path)
    except CheckpointError as error:
        outcome = error
    assert time.perf_counter() - begin < SECONDS
    return outcome


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Loads what is not spoilt, so that no case pays for starting JAX; control of the reader."""
    for kind, files in BASES.items():
        path = tmp_path_factory.mktemp("good") / kind
        put(path, files)
        assert sound(path, kind)
        assert_as_stored(load(path), path, kind)


@pytest.mark.parametrize("spoilt", CASES, ids=lambda spoilt: spoilt.title)
def test_spoilt(spoilt, tmp_path, record_property):
    path = tmp_path / "spoilt"
    put(path, spoilt.files())
    outcome = attempt(path)
    record_property("outcome", type(outcome).__name__)
    if spoilt.outcome is not EITHER:
        assert type(outcome) is spoilt.outcome
    if not isinstance(outcome, CheckpointError):
        assert sound(path, spoilt.kind)
        assert_as_stored(outcome, path, spoilt.kind)
    elif "-flip-in-data-" in spoilt.title or "-noise-" in spoilt.title:
        assert not sound(path, spoilt.kind)
        assert type(outcome) in (ScaleError, TensorError)
    if isinstance(outcome, CheckpointError):
        assert str(outcome)


def digest(files):
    listed = sorted((name, repr(content)) for name, content in files.items())
    return hashlib.sha256(repr(listed).encode()).digest()


def test_number_of_cases(record_property):
    """No two are alike, and none is a good checkpoint."""
    digests = collections.defaultdict(list)
    for spoilt in CASES:
        digests[digest(spoilt.files())].append(spoilt.title)
    assert [titles for titles in digests.values() if len(titles) > 1] == []
    assert not set(digests) & {digest(files) for files in BASES.values()}
    assert len({spoilt.title for spoilt in CASES}) == len(CASES) >= 200
    record_property("cases", len(CASES))
    names = (getattr(spoilt.outcome, "__name__", "either") for spoilt in CASES)
    for name, count in collections.Counter(names).items():
        record_property(name, count)


# Sizes that files claim and do not have, and what must not be made of them.
CLAIMS = """
import resource, sys
from pathlib import Path
from tests.checkpoint import test_fuzz as fuzz

root = Path(sys.argv[1])
fuzz.put(root / "good", fuzz.BASES["modelopt"])
fuzz.load(root / "good")
status = Path("/proc/self/status").read_text()
used = int(status.split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + fuzz.ROOM,) * 2)
try:
    bytearray(2 * fuzz.ROOM)
except MemoryError:
    print("limited")
for number, case in enumerate(fuzz.claims()):
    fuzz.put(root / str(number), case.files())
    error = fuzz.attempt(root / str(number))
    assert isinstance(error, fuzz.CheckpointError), case.title
    print(case.title)
"""


def claims():
    """The cases with sizes that would not fit into memory."""
    words = ("length-", "huge", "shape", "beyond", "10000000", "9223372036854775808", "zeros")
    known = [spoilt for spoilt in CASES if spoilt.outcome is not EITHER]
    return [spoilt for spoilt in known if any(word in spoilt.title for word in words)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the addresses of a process")
def test_sizes_that_are_claimed_take_no_memory(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", CLAIMS, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    titles = [spoilt.title for spoilt in claims()]
    assert len(titles) > 40
    assert found.stdout.split("\n") == ["limited", *titles, ""]
