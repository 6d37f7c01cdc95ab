"""An opened checkpoint directory: its config, family, quantisation, and tensors by layer."""

import dataclasses
import functools
import os
import re
from typing import Any

from jax_nvfp4_moe.checkpoint import compressed_tensors, modelopt
from jax_nvfp4_moe.checkpoint.errors import (
    CheckpointError,
    ConfigError,
    TensorError,
    UnsupportedCheckpointError,
    first_names,
)
from jax_nvfp4_moe.checkpoint.families import family_of
from jax_nvfp4_moe.checkpoint.family import Family, ModelSizes, text_config
from jax_nvfp4_moe.checkpoint.files import TensorFiles, read_json
from jax_nvfp4_moe.checkpoint.matrices import ExpertTensors
from jax_nvfp4_moe.checkpoint.names import BlockNames
from jax_nvfp4_moe.checkpoint.scheme import PARTS, Scheme, check_type
from jax_nvfp4_moe.routing import check_fits


@dataclasses.dataclass(frozen=True)
class LayerTensors:
    """The mixture-of-experts block of one decoder layer: names and headers, no values.

    `Source.layer` resolves it once; loading, inspecting, converting and quantising take it.

    Attributes:
        number: the decoder layer, counted from 0.
        names: the names of the block and of its routed experts.
        experts: the matrices of the routed experts, and their activation scheme.
        shared: the same of the shared expert; None if the model has none.
    """

    number: int
    names: BlockNames
    experts: ExpertTensors
    shared: ExpertTensors | None


class Source:
    """An opened checkpoint: its JSON files and the headers of its tensors, no values.

    Attributes:
        files: the tensors.
        config: config.json.
        hf_quant_config: hf_quant_config.json, or None.
        family: the model's family.
        sizes: the model's dimensions.
        routing: the router's configuration.
        activation: the experts' activation.
        norm_eps: the epsilon of the router's norm, or None.
        scheme: the quantisation, or None.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the JSON files and all headers.

        Raises:
            FileNotFoundError: there is no such path.
            CheckpointError: `TensorFiles` raises it, a JSON file is missing or malformed, or the
                family or the quantisation is unknown.
        """
        self.files = TensorFiles(path)
        self._found: dict[int, LayerTensors | None] = {}
        self.config = read_json(self.files.directory / "config.json")
        separate = self.files.directory / "hf_quant_config.json"
        self.hf_quant_config = read_json(separate) if separate.is_file() else None
        try:
            self.scheme = scheme_of(self.config, self.hf_quant_config)
            self.family: Family = family_of(self.config)
            self.sizes = _positive(self.family.sizes(self.config))
            self.routing = self.family.routing(self.config)
            self.activation = self.family.activation(self.config)
            self.norm_eps = self.family.norm_eps(self.config)
            check_fits(self.routing, self.sizes.num_experts, "config.json")
        except CheckpointError:
            raise
        # From Routing and Activation, or from a value of an unexpected type.
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"config.json of {self.files.directory}: {error}") from None

    @functools.cached_property
    def _present(self) -> list[int]:
        """The decoder layers that have tensors; layers that predict further tokens come later."""
        found = (re.search(r"\.layers\.([0-9]{1,9})\.", name) for name in self.files)
        present = {int(match[1]) for match in found if match}
        return sorted(layer for layer in present if layer < self.sizes.num_layers)

    @functools.cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that have experts.

        Raises:
            ConfigError: the config has more layers than the tensors.
        """
        if len(self._present) < self.sizes.num_layers:
            gaps = (n for n, layer in enumerate(self._present) if n != layer)
            raise ConfigError(
                f"config.json has {self.sizes.num_layers} layers, but {self.files.directory} has "
                f"no tensor of layer {next(gaps, len(self._present))}"
            )
        return self._with_experts

    @functools.cached_property
    def _with_experts(self) -> tuple[int, ...]:
        return tuple(layer for layer in self._present if self._find(layer) is not None)

    def layer(self, number: int) -> LayerTensors:
        """The block of a decoder layer, resolved on the first call.

        Raises:
            ConfigError: the experts have gates and the activation takes none, or vice versa.
            TensorError: the layer has no experts.
        """
        found = self._find(number)
        if found is None:
            having = [str(n) for n in self._with_experts]
            raise TensorError(
                f"layer {number} of {self.files.directory} has no experts of {self.family.name}, "
                f"expected one of layers {first_names(having) if having else '(none)'}"
            )
        gated = found.names.experts.gated
        if self.activation.gated != gated:
            raise ConfigError(
                f"config.json has the activation {self.activation.name!r}, but the experts of "
                f"{found.names.block} have {'' if gated else 'no '}gates"
            )
        return found

    def _find(self, number: int) -> LayerTensors | None:
        if number not in self._found:
            self._found[number] = self._resolve(number)
        return self._found[number]

    def _resolve(self, number: int) -> LayerTensors | None:
        names = self._names(number)
        if names is None:
            return None
        sizes, shared = self.sizes, None
        if self.family.shared is not None and sizes.shared_intermediate_size:
            shared = ExpertTensors(
                self.files,
                BlockNames(names.block, self.family.shared),
                self.scheme,
                num_experts=1,
                hidden_size=sizes.hidden_size,
                intermediate_size=sizes.shared_intermediate_size,
            )
        experts = ExpertTensors(
            self.files,
            names,
            self.scheme,
            num_experts=sizes.num_experts,
            hidden_size=sizes.expert_hidden_size,
            intermediate_size=sizes.intermediate_size,
        )
        return LayerTensors(number, names, experts, shared)

    def _names(self, number: int) -> BlockNames | None:
        """The names by which a layer's first matrix is found in the files."""
        for block in self.family.block_candidates(number):
            for experts in self.family.experts:
                names = BlockNames(block, experts)
                first = {names.tensor("up", parts.data) for parts in PARTS.values()}
                if any(name in self.files for name in first):
                    return names
        return None


def scheme_of(config: dict[str, Any], hf_quant_config: dict[str, Any] | None) -> Scheme | None:
    """The quantisation that either file states; None if neither does.

    Raises:
        ConfigError: a file is malformed, or the two disagree.
        UnsupportedCheckpointError: the quantisation is not NVFP4.
    """
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    where, second = "config.json", "hf_quant_config.json"
    separate = None
    if hf_quant_config is not None:
        separate = check_type(hf_quant_config.get("quantization"), dict, "quantization", second)
    if found is None:
        return None if separate is None else modelopt.scheme(separate, second)
    settings = check_type(found, dict, "quantization_config", where)
    method = settings.get("quant_method")
    if method not in ("compressed-tensors", "modelopt", "modelopt_fp4", None):
        raise UnsupportedCheckpointError(
            f"{where}: quant_method is {method!r}, expected 'modelopt' or 'compressed-tensors'"
        )
    if method == "compressed-tensors":
        # compressed-tensors 0.20.0 (entrypoints/convert) copies ModelOpt's hf_quant_config.json,
        # which does not describe the converted tensors.
        return compressed_tensors.scheme(settings, where)
    if separate is not None and separate.get("quant_algo") != settings.get("quant_algo"):
        raise ConfigError(
            f"{where} has quant_algo {settings.get('quant_algo')!r}, {second} has "
            f"{separate.get('quant_algo')!r}: expected the same"
        )
    return modelopt.scheme(settings, where)


def _positive(sizes: ModelSizes) -> ModelSizes:
    for name, value in vars(sizes).items():
        least = 0 if name == "shared_intermediate_size" else 1
        if value < least:
            raise ConfigError(f"config.json gives {name} {value}, expected at least {least}")
    return sizes
