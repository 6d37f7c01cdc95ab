"""What a model family is: names of tensors, and keys of config.json with what they mean.

The families themselves are entries of `families.FAMILIES`. Nothing here reads a file.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.checkpoint.errors import ConfigError
from jax_nvfp4_moe.checkpoint.names import ExpertNames
from jax_nvfp4_moe.routing import Routing

Config = Mapping[str, Any]
Key = str | tuple[str, ...]  # of config.json; a tuple has its names in different versions

# The decoder layers' names: of a language model alone, or inside a multimodal one.
_LAYERS = (
    "model.layers.{layer}",
    "model.language_model.layers.{layer}",
    "language_model.model.layers.{layer}",
    "backbone.layers.{layer}",  # Nemotron-H
    "language_model.backbone.layers.{layer}",
    "thinker.model.layers.{layer}",  # Qwen3-Omni
)
# Keys under which a multimodal model's config.json has its language model's config.
_NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
    "swiglu_oai": "swiglu_oai",
}


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """A model's dimensions.

    `expert_hidden_size` is another than `hidden_size` where experts work in a latent space.
    """

    num_experts: int
    hidden_size: int
    expert_hidden_size: int
    intermediate_size: int
    shared_intermediate_size: int  # 0: no shared expert
    top_k: int
    num_layers: int  # of all kinds


@dataclasses.dataclass(frozen=True)
class Family:
    """One family. Names of tensors are relative to the block; keys are those of config.json.

    Attributes:
        name: the family's name.
        model_types: values of `model_type`, in the language model's config or the whole model's.
        experts: alternative names of the experts; the first whose tensors exist holds.
        method: the routing method. `unnormalized_method` replaces it where the key `normalize` is
            false.
        block: alternative names of the block within a decoder layer; "" is the layer itself.
        router: the router's weight [E, H].
        router_bias: [E], added to the logits.
        selection_bias: [E], DeepSeek's `e_score_correction_bias`.
        router_scale: [H]. A router that has it divides its input by its root mean square, with the
            epsilon `router_eps`, multiplies it by this scale and divides it by sqrt(H). Another
            norm, outside the block, makes the experts' input, so that the two inputs differ.
        expert_scale: [E], multiplies the weights of the selected experts.
        shared: the shared expert, which has the routed experts' activation.
        shared_gate: [1, H]; the sigmoid of its product with a token weights the shared expert.
        latent: projections into the experts' latent space and out of it, used where `latent_size`
            is given. The router and the shared expert work outside that space.
        router_weight_on_input: as in `nvfp4_moe_routed`.
        top_k, n_group, topk_group, scaling_factor: keys of `Routing`'s arguments.
        act, act_alpha, act_limit: keys of `Activation`'s arguments.
        num_experts, hidden_size, intermediate_size, latent_size: keys of E, H, I and the latent H.
        num_layers: key of the number of layers, or of a list or string with that length.
        shared_size, shared_count: keys; their product is the shared expert's I.
        defaults: values of keys that are absent or null.
        required: values that keys must have where they are present.
        fixed: values that override config.json.
    """

    name: str
    model_types: tuple[str, ...]
    experts: tuple[ExpertNames, ...]
    method: str
    unnormalized_method: str | None = None
    block: tuple[str, ...] = ("mlp",)
    router: str = "gate.weight"
    router_bias: str | None = None
    selection_bias: str | None = None
    router_scale: str | None = None
    expert_scale: str | None = None
    shared: ExpertNames | None = None
    shared_gate: str | None = None
    latent: tuple[str, str] | None = None
    router_weight_on_input: bool = False
    normalize: Key | None = None
    top_k: Key = "num_experts_per_tok"
    n_group: Key | None = None
    topk_group: Key | None = None
    scaling_factor: Key | None = None
    router_eps: Key | None = None
    act: Key = "hidden_act"
    act_alpha: Key | None = None
    act_limit: Key | None = None
    num_experts: Key = ("num_experts", "num_local_experts", "n_routed_experts")
    hidden_size: Key = "hidden_size"
    intermediate_size: Key = "moe_intermediate_size"
    latent_size: Key | None = None
    num_layers: Key = "num_hidden_layers"
    shared_size: Key | None = None
    shared_count: Key | None = None
    defaults: tuple[tuple[str, Any], ...] = ()
    required: tuple[tuple[str, Any], ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()

    @property
    def split_names(self) -> ExpertNames:
        """The first of `experts` that gives every expert its own tensors."""
        return next(names for names in self.experts if not names.stacked)

    def block_candidates(self, layer: int) -> tuple[str, ...]:
        """All names that a layer's block may have."""
        layers = [prefix.format(layer=layer) for prefix in _LAYERS]
        return tuple(f"{at}.{block}".rstrip(".") for block in self.block for at in layers)

    def sizes(self, config: Config) -> ModelSizes:
        """The model's dimensions.

        Raises:
            ConfigError: a key is missing, or its value has the wrong type.
        """
        hidden = self._read(config, self.hidden_size, int)
        # Some configs have a list of layers, or a string with a letter for each layer.
        counted = (int, list, str) if isinstance(self.num_layers, tuple) else int
        layers = self._read(config, self.num_layers, counted)
        shared = self._read(config, self.shared_size, int, 0)
        return ModelSizes(
            num_experts=self._read(config, self.num_experts, int),
            hidden_size=hidden,
            expert_hidden_size=self._read(config, self.latent_size, int, hidden) or hidden,
            intermediate_size=self._read(config, self.intermediate_size, int),
            shared_intermediate_size=shared * self._read(config, self.shared_count, int, 1),
            top_k=self._read(config, self.top_k, int),
            num_layers=layers if isinstance(layers, int) else len(layers),
        )

    def routing(self, config: Config) -> Routing:
        """The router's configuration; raises as `sizes`."""
        method: str | None = self.method
        if not self._read(config, self.normalize, bool, True):
            method = self.unnormalized_method
        if method is None:
            raise ConfigError(
                f"config.json: {self.normalize} is false, expected true for {self.name}"
            )
        return Routing(
            method,
            top_k=self._read(config, self.top_k, int),
            n_group=self._read(config, self.n_group, int, 1),
            topk_group=self._read(config, self.topk_group, int, 1),
            scaling_factor=self._read(config, self.scaling_factor, float, 1.0),
        )

    def activation(self, config: Config) -> Activation:
        """The experts' activation; raises as `sizes`."""
        name = self._read(config, self.act, str)
        if name not in _ACTIVATIONS:
            raise ConfigError(
                f"config.json: {self.act} is {name!r}, expected one of {', '.join(_ACTIVATIONS)}"
            )
        alpha = self._read(config, self.act_alpha, float)
        return Activation(
            _ACTIVATIONS[name], alpha=alpha, limit=self._read(config, self.act_limit, float)
        )

    def norm_eps(self, config: Config) -> float | None:
        """The epsilon of the router's norm, or None without one; raises as `sizes`."""
        return self._read(config, self.router_eps, float)

    def _read(self, config: Config, key: Key | None, kind: Any, without_key: Any = None) -> Any:
        if key is None:
            return without_key
        given = {name: value for name, value in text_config(config).items() if value is not None}
        for name, wanted in self.required:
            if given.get(name, wanted) != wanted:
                raise ConfigError(
                    f"config.json: {name} is {given[name]!r}, expected {wanted!r} for {self.name}"
                )
        values = {**dict(self.defaults), **given, **dict(self.fixed)}
        names = (key,) if isinstance(key, str) else key
        name = next((name for name in names if name in values), None)
        if name is None:
            raise ConfigError(f"config.json has no {' or '.join(names)}")
        value, kinds = values[name], (int, float) if kind is float else kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            wanted = getattr(kind, "__name__", "int or list")
            raise ConfigError(f"config.json: {name} is {described(value)}, expected {wanted}")
        return value


def text_config(config: Config) -> Config:
    """The language model's part of a config.json: all of it, unless the model is multimodal."""
    nested = (config[name] for name in _NESTED if isinstance(config.get(name), Mapping))
    inner = next(nested, None)
    return config if inner is None else text_config(inner)
