"""compressed-tensors' quantisation configuration, read and written.

It stands under "quantization_config" in ``config.json`` (compressed-tensors@0.20.0:
compressed_tensors/quantization/quant_scheme.py). Targets and exceptions are module names, classes,
or, after "re:", regular expressions that match the beginning of a name.
"""

import re
from typing import Any

from jax_nvfp4_moe.checkpoint.errors import ConfigError, UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.scheme import Rule, Scheme, check_group_size, check_type
from jax_nvfp4_moe.experts import ActivationScheme
from jax_nvfp4_moe.format import BLOCK_SIZE

_FORMAT = "nvfp4-pack-quantized"


def scheme(settings: dict[str, Any], source: str) -> Scheme:
    """Returns the scheme that a configuration states.

    Args:
        settings: the object under "quantization_config".
        source: the file's name, for messages.

    Raises:
        ConfigError: the configuration is malformed.
        UnsupportedCheckpointError: no group is in NVFP4.
    """
    groups = check_type(settings.get("config_groups"), dict, "config_groups", source)
    ignored = check_type(settings.get("ignore") or [], list, "ignore", source)
    rules = [Rule(_pattern(name, source), None, None) for name in ignored]
    for name, value in groups.items():
        group = check_type(value, dict, f"config_groups[{name!r}]", source)
        format_ = group.get("format") or settings.get("format")
        found = _activation_scheme(group, source) if format_ == _FORMAT else None
        for target in check_type(group.get("targets"), list, "targets", source):
            rules.append(Rule(_pattern(target, source), found, str(format_)))
    if not any(rule.activation_scheme for rule in rules):
        raise UnsupportedCheckpointError(
            f"{source}: format is {settings.get('format')!r}, expected {_FORMAT!r} with 4-bit "
            "floats"
        )
    return Scheme("compressed-tensors", tuple(rules), source, settings)


def _activation_scheme(group: dict[str, Any], source: str) -> ActivationScheme | None:
    weights = check_type(group.get("weights"), dict, "weights", source)
    if (weights.get("num_bits"), weights.get("type")) != (4, "float"):
        return None
    check_group_size(weights.get("group_size"), source)
    inputs = group.get("input_activations")
    if inputs is None:
        return "none"
    inputs = check_type(inputs, dict, "input_activations", source)
    if (inputs.get("num_bits"), inputs.get("type")) != (4, "float"):
        return None
    check_group_size(inputs.get("group_size"), source)
    # "local": block scales are computed from the activations, the global scale is calibrated.
    return "per_token" if inputs.get("dynamic") is True else "static"


def _pattern(name: Any, source: str) -> re.Pattern[str]:
    name = check_type(name, str, "a target or an exception", source)
    if name.startswith("re:"):
        try:
            expression = re.compile(name[3:]).pattern  # alone first: "a)|(b" is none
            return re.compile(f"(?:{expression}).*")
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{source}: {name!r} is not a regular expression: {error}") from None
    # "Linear" is a class: expert matrices are linear layers wherever this format is written.
    return re.compile(".*" if name == "Linear" else re.escape(name))


def settings(
    activation_scheme: ActivationScheme, ignored: list[str], kv_cache: str | None
) -> dict[str, Any]:
    """Returns the object under "quantization_config": the inverse of `scheme` for one group.

    Args:
        activation_scheme: "static", "per_token" or "none".
        ignored: the modules that are not in NVFP4: names, or "re:" and an expression.
        kv_cache: None or "FP8".
    """
    numbers = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": BLOCK_SIZE,
        "symmetric": True,
    }
    inputs = {**numbers, "dynamic": "local" if activation_scheme == "static" else True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "dynamic": False},
        "input_activations": None if activation_scheme == "none" else inputs,
        "format": _FORMAT,
    }
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None if kv_cache is None else {**cache, "symmetric": True},
    }
