"""NVIDIA ModelOpt's quantisation configuration, read and written.

It stands under "quantization" in ``hf_quant_config.json`` or under "quantization_config" in
``config.json``, in two spellings (nvidia-modelopt@0.47.0:modelopt/torch/export/
convert_hf_config.py). Patterns of excluded modules are those of `fnmatch`; a pattern that
excludes a module excludes all modules in it.
"""

import fnmatch
import re
from typing import Any

from jax_nvfp4_moe.checkpoint.errors import ConfigError, UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.scheme import Rule, Scheme, check_group_size, check_type
from jax_nvfp4_moe.experts import ActivationScheme
from jax_nvfp4_moe.format import BLOCK_SIZE

_ALGORITHMS: dict[str, ActivationScheme] = {"NVFP4": "static", "W4A16_NVFP4": "none"}


def scheme(settings: dict[str, Any], source: str) -> Scheme:
    """Returns the scheme that a configuration states.

    Args:
        settings: the object under "quantization" or "quantization_config".
        source: the file's name, for messages.

    Raises:
        ConfigError: the configuration is malformed.
        UnsupportedCheckpointError: no module is in NVFP4.
    """
    algorithm = check_type(settings.get("quant_algo"), str, "quant_algo", source)
    excluded = settings.get("exclude_modules", settings.get("ignore")) or []
    excluded = check_type(excluded, list, "the list of excluded modules", source)
    rules = [
        Rule(_pattern(check_type(name, str, "an excluded module", source)), None, None)
        for name in excluded
    ]
    if algorithm == "MIXED_PRECISION":
        layers = check_type(settings.get("quantized_layers"), dict, "quantized_layers", source)
        for name, value in layers.items():
            layer = check_type(value, dict, f"quantized_layers[{name!r}]", source)
            rules.append(_rule(_pattern(name), layer, layer.get("quant_algo"), source))
    else:
        rules.append(_rule(re.compile(".*"), settings, algorithm, source))
    if not any(rule.activation_scheme for rule in rules):
        raise UnsupportedCheckpointError(
            f"{source}: quant_algo is {algorithm!r}, expected one of {', '.join(_ALGORITHMS)}, or "
            "MIXED_PRECISION with one of them"
        )
    return Scheme("modelopt", tuple(rules), source, settings)


def _rule(pattern: re.Pattern[str], settings: dict[str, Any], algorithm: Any, source: str) -> Rule:
    found = _ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None
    if found is None:
        return Rule(pattern, None, str(algorithm))
    groups = check_type(settings.get("config_groups", {}), dict, "config_groups", source)
    groups = [check_type(group, dict, "a group", source) for group in groups.values()]
    weights = [check_type(group.get("weights", {}), dict, "weights", source) for group in groups]
    for holder in (settings, *weights):
        check_group_size(holder.get("group_size", BLOCK_SIZE), source)
    # As vLLM reads it (vllm@0.33.0:vllm/model_executor/layers/quantization/modelopt.py:797-811).
    if groups and all(group.get("input_activations") is None for group in groups):
        found = "none"
    return Rule(pattern, found, str(algorithm))


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(f"(?:{fnmatch.translate(name)})|(?:{fnmatch.translate(name + '.*')})")


def kv_cache(settings: dict[str, Any]) -> str | None:
    """Returns the KV cache's quantisation in either spelling, or None; it is only passed on."""
    scheme = settings.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        return "FP8" if (scheme.get("num_bits"), scheme.get("type")) == (8, "float") else "other"
    return settings.get("kv_cache_quant_algo") or scheme


def settings(
    activation_scheme: ActivationScheme, excluded: list[str], kv_cache: str | None
) -> dict[str, Any]:
    """Returns the object under "quantization": the inverse of `scheme` for one algorithm.

    Args:
        activation_scheme: "static" or "none"; the format cannot express "per_token".
        excluded: patterns of the modules that are not in NVFP4.
        kv_cache: None or "FP8".

    Raises:
        ConfigError: the activation scheme is "per_token".
    """
    names = {scheme: name for name, scheme in _ALGORITHMS.items()}
    if activation_scheme not in names:
        raise ConfigError(
            f"activation_scheme is {activation_scheme!r}, which ModelOpt's format cannot "
            "express: write 'static' with calibrated scales, or 'none', and load with "
            "activation_scheme='per_token'"
        )
    return {
        "quant_algo": names[activation_scheme],
        "kv_cache_quant_algo": kv_cache,
        "group_size": BLOCK_SIZE,
        "exclude_modules": excluded,
    }


def config_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns `settings` in the spelling of ``config.json``'s "quantization_config"."""
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
    group: dict[str, Any] = {"weights": numbers, "targets": ["Linear"]}
    if settings["quant_algo"] == "NVFP4":
        group = {"input_activations": numbers, **group}
    written = {
        "config_groups": {"group_0": group},
        "ignore": settings["exclude_modules"],
        "quant_algo": settings["quant_algo"],
        "quant_method": "modelopt",
    }
    if settings["kv_cache_quant_algo"] is not None:
        written["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return written
