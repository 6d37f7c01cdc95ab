"""Cases of bad configurations: the model's and its quantisation's."""

import json
import math

from jax_nvfp4_moe.checkpoint import (
    ConfigError,
    TensorError,
    UnsupportedCheckpointError,
)
from tests.support.fuzz.cases import EITHER, case, replaced
from tests.support.fuzz.files import BASES, Special


def on_config(change):
    def spoil(files):
        config = json.loads(files["config.json"])
        change(config)
        files["config.json"] = json.dumps(config).encode()

    return spoil


def on_scheme(change):
    return on_config(lambda config: change(config["quantization_config"]))


def nested(depth):
    """Nests the language model's config `depth` levels deep."""

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
    # The key is unused, and Python 3.13's parser accepts deeper nesting than older ones.
    deep = good[:-1] + b', "a": ' + b"[" * 2000 + b"]" * 2000 + b"}"
    case("config-deep-in-config", replaced("config.json", deep), EITHER)
