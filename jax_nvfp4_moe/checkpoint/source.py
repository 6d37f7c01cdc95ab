"""A checkpoint directory as one thing: its config, family, quantisation and tensors."""

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
)
from jax_nvfp4_moe.checkpoint.families import ExpertNames, Family, Sizes, family_of, text_config
from jax_nvfp4_moe.checkpoint.files import TensorFiles, read_json
from jax_nvfp4_moe.checkpoint.matrices import ExpertTensors, listed
from jax_nvfp4_moe.checkpoint.scheme import MODELOPT, PARTS, Scheme, expected
from jax_nvfp4_moe.experts import ActivationScheme
from jax_nvfp4_moe.routing import check_fits


class Source:
    """An opened checkpoint: what its JSON files say and what its headers show, no values.

    Attributes:
        files: its tensors.
        config: its config.json.
        hf_quant_config: its hf_quant_config.json, or None.
        family: that of its model.
        sizes: the model's dimensions.
        routing: the router's configuration.
        activation: that of its experts.
        scheme: its quantisation, or None.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the JSON files and all headers.

        Raises:
            FileNotFoundError: there is no such path.
            CheckpointError: as `TensorFiles`; or a JSON file is missing or malformed, or the
                family or the quantisation is unknown.
        """
        self.files = TensorFiles(path)
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
        # Of Routing and Activation, or of a value of no type that it can have.
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"config.json of {self.files.directory}: {error}") from None

    @functools.cached_property
    def _present(self) -> list[int]:
        """The layers that have tensors, without what predicts further tokens after the last one."""
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
                f"config.json has {self.sizes.num_layers} layers, but no tensor of "
                f"{self.files.directory} is of layer {next(gaps, len(self._present))}"
            )
        return tuple(layer for layer in self._present if self._place(layer))

    def experts(self, layer: int) -> ExpertTensors:
        """The matrices of a layer's routed experts.

        Raises:
            ConfigError: they have gates and the activation takes none, or the other way round.
            TensorError: the layer has none.
        """
        block, names = self.place(layer)
        if self.activation.gated != names.gated:
            raise ConfigError(
                f"config.json has the activation {self.activation.name!r}, but the experts of "
                f"{block} have {'' if names.gated else 'no '}gates"
            )
        sizes = self.sizes
        return self._tensors(
            block, names, sizes.num_experts, sizes.expert_hidden_size, sizes.intermediate_size
        )

    def place(self, layer: int) -> tuple[str, ExpertNames]:
        """The name of the block that a layer's experts are in, and how they are named there.

        Raises:
            TensorError: the layer has none.
        """
        place = self._place(layer)
        if place is None:
            having = [str(n) for n in range(self.sizes.num_layers) if self._place(n)]
            raise TensorError(
                f"layer {layer} of {self.files.directory} has no experts of {self.family.name}: "
                f"there are some in layers {listed(having) if having else '(none)'}"
            )
        return place

    def shared(self, layer: int) -> ExpertTensors | None:
        """The matrices of a layer's shared expert, as one expert; None if the family has none."""
        if self.family.shared is None or not self.sizes.shared_intermediate_size:
            return None
        block = self.experts(layer).block
        return self._tensors(
            block, self.family.shared, 1, self.sizes.hidden_size,
            self.sizes.shared_intermediate_size,
        )  # fmt: skip

    def activation_scheme(self, tensors: ExpertTensors) -> ActivationScheme | None:
        """What the configuration says of the activations of some experts; None: not quantised.

        Raises:
            ConfigError: the configuration says one thing and the tensors are another.
            UnsupportedCheckpointError: they are quantised in another way than NVFP4.
        """
        module = tensors.module("up")
        rule = None if self.scheme is None else self.scheme.rule_for(module)
        said = None if rule is None else rule.activation_scheme
        if rule is not None and said is None and rule.algorithm is not None:
            raise UnsupportedCheckpointError(
                f"{module} is in {rule.algorithm}, by its configuration; expected NVFP4"
            )
        if tensors.quantized != (said is not None):
            where = "there is no quantisation in the configuration"
            if self.scheme is not None:
                where = f"{self.scheme.source} says that they {'are' if said else 'are not'}"
            raise ConfigError(
                f"the tensors of {module} are {'in NVFP4' if tensors.quantized else 'not in NVFP4'}"
                f", but {where}"
            )
        return said

    def _tensors(self, block: str, names: ExpertNames, *sizes: int) -> ExpertTensors:
        parts = MODELOPT if self.scheme is None else self.scheme.parts
        return ExpertTensors(self.files, block, names, parts, *sizes)

    def _place(self, layer: int) -> tuple[str, ExpertNames] | None:
        for block in self.family.block_names(layer):
            for names in self.family.experts:
                tensors = self._tensors(block, names, 1, 1, 1)
                wanted = {tensors.tensor("up", parts.data) for parts in PARTS.values()}
                if any(name in self.files for name in wanted):
                    return block, names
        return None


def scheme_of(config: dict[str, Any], hf_quant_config: dict[str, Any] | None) -> Scheme | None:
    """The quantisation, from where either format keeps it; None if there is none.

    Raises:
        ConfigError: what is there is malformed, or the two files disagree.
        UnsupportedCheckpointError: it is another quantisation.
    """
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    where, beside = "config.json", "hf_quant_config.json"
    separate = None
    if hf_quant_config is not None:
        separate = expected(hf_quant_config.get("quantization"), dict, "quantization", beside)
    if found is None:
        return None if separate is None else modelopt.scheme(separate, beside)
    settings = expected(found, dict, "quantization_config", where)
    method = settings.get("quant_method")
    if method not in ("compressed-tensors", "modelopt", "modelopt_fp4", None):
        raise UnsupportedCheckpointError(
            f"{where}: quant_method is {method!r}, expected 'modelopt' or 'compressed-tensors'"
        )
    if method == "compressed-tensors":
        # compressed-tensors 0.20.0 (entrypoints/convert) leaves ModelOpt's hf_quant_config.json in
        # what it converts: it says nothing of these tensors.
        return compressed_tensors.scheme(settings, where)
    if separate is not None and separate.get("quant_algo") != settings.get("quant_algo"):
        raise ConfigError(
            f"{where} has quant_algo {settings.get('quant_algo')!r}, {beside} has "
            f"{separate.get('quant_algo')!r}: expected the same"
        )
    return modelopt.scheme(settings, where)


def _positive(sizes: Sizes) -> Sizes:
    for name, value in vars(sizes).items():
        least = 0 if name == "shared_intermediate_size" else 1
        if value < least:
            raise ConfigError(f"config.json makes {name} {value}, expected at least {least}")
    return sizes
