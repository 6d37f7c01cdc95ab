"""Model families as a table: how files name their experts, and what config.json says of them.

A new family is an entry of `FAMILIES`, not code. Nothing here reads a file.

Names are those on disk, not in memory: transformers fuses experts as it loads
(transformers@5.23.0:conversion_mapping.py), ModelOpt's export splits them and restores the names
(nvidia-modelopt@0.47.0:modelopt/torch/export/moe_utils.py, quant_aware_conversion.py), and
llm-compressor splits them for good. Only Llama 4 and gpt-oss remain fused and transposed in
ModelOpt's files (hf_export_handlers.py), with one `weight_scale_2` and one `input_scale`, both [],
for all experts. Formulas are those of transformers' modeling files.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.checkpoint.errors import ConfigError
from jax_nvfp4_moe.routing import Routing

Config = Mapping[str, Any]
Key = str | tuple[str, ...]  # of config.json; several are its names in different versions

# What precedes a block's name: a language model alone, or inside a multimodal one.
_LAYERS = (
    "model.layers.{layer}",
    "model.language_model.layers.{layer}",
    "language_model.model.layers.{layer}",
    "backbone.layers.{layer}",  # Nemotron-H
    "language_model.backbone.layers.{layer}",
    "thinker.model.layers.{layer}",  # Qwen3-Omni
)
# Where a multimodal model's config.json has that of its language model.
_NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
    "swiglu_oai": "swiglu_oai",
}


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """How expert matrices are named, relative to the block.

    Attributes:
        up: such as "experts.{expert}.up_proj".
        down: likewise.
        gate: likewise; None where there is no gate, or `up` holds it too.
        stacked: one tensor holds all experts, who come first in its shape; the names of its scales
            and of its bias begin with its own name and "_".
        fused: `up` holds the gate's rows, then those of up.
        interleaved: these rows alternate, the gate's first.
        transposed: matrices are [in, out]: stacked [E, in/2, out], with scales [E, in/16, out].
    """

    up: str
    down: str
    gate: str | None = None
    stacked: bool = False
    fused: bool = False
    interleaved: bool = False
    transposed: bool = False

    @property
    def gated(self) -> bool:
        """Whether there are gates."""
        return self.fused or self.gate is not None

    def tensor(self, matrix: str, part: str, expert: int = 0) -> str:
        """The name of a tensor of a matrix (`up`, `down`, `gate`): its "weight", "bias", ..."""
        if self.stacked:
            return matrix if part == "weight" else f"{matrix}_{part}"
        return f"{matrix.format(expert=expert)}.{part}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model's dimensions; `expert_hidden_size` differs where experts work in a latent space."""

    num_experts: int
    hidden_size: int
    expert_hidden_size: int
    intermediate_size: int
    shared_intermediate_size: int  # 0: no shared expert
    top_k: int
    num_layers: int  # of all kinds


@dataclasses.dataclass(frozen=True)
class Family:
    """One family: names of tensors relative to the block, and keys of config.json.

    Attributes:
        name: the family's.
        model_types: `model_type` in config.json, of the language model or of the whole.
        experts: the first whose tensors are there is used.
        method: of `Routing`; `unnormalized_method` where the key `normalize` is false.
        block: alternatives within a decoder layer; "" is the layer itself.
        router: [E, H].
        router_bias: [E], added to the logits.
        selection_bias: [E], DeepSeek's `e_score_correction_bias`.
        router_scale: [H]. Where there is one, the router divides its input by its root mean square,
            with the epsilon `router_eps`, multiplies it by this, and divides it by sqrt(H). The
            experts' input has another norm, outside of the block, so that the two inputs differ.
        expert_scale: [E], multiplies the weights of the selected experts.
        shared: the shared expert, with the activation of the routed ones.
        shared_gate: [1, H]; the sigmoid of its product with a token weighs the shared expert.
        latent: projections into the experts' latent space and out of it, where `latent_size` is
            given. The router and the shared expert are outside of that space.
        router_weight_on_input: as in `nvfp4_moe_routed`.
        top_k, n_group, topk_group, scaling_factor: keys of `Routing`'s arguments.
        act, act_alpha, act_limit: keys of `Activation`'s.
        num_experts, hidden_size, intermediate_size, latent_size: keys of E, H, I and the latent H.
        num_layers: key of a number, or of something with that length.
        shared_size, shared_count: keys; their product is the shared expert's I.
        defaults: values of keys that are absent or null.
        required: values that keys must have where they are present.
        fixed: values whatever config.json says.
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
        """Of `experts`, the first by which every expert has tensors of its own."""
        return next(names for names in self.experts if not names.stacked)

    def block_names(self, layer: int) -> tuple[str, ...]:
        """All that a layer's block may be called."""
        layers = [prefix.format(layer=layer) for prefix in _LAYERS]
        return tuple(f"{at}.{block}".rstrip(".") for block in self.block for at in layers)

    def sizes(self, config: Config) -> Sizes:
        """The dimensions. Raises ConfigError naming the key that is missing or does not fit."""
        hidden = self._read(config, self.hidden_size, int)
        # Of some, by one name, a list of layers or a letter for each.
        counted = (int, list, str) if isinstance(self.num_layers, tuple) else int
        layers = self._read(config, self.num_layers, counted)
        shared = self._read(config, self.shared_size, int, 0)
        return Sizes(
            num_experts=self._read(config, self.num_experts, int),
            hidden_size=hidden,
            expert_hidden_size=self._read(config, self.latent_size, int, hidden) or hidden,
            intermediate_size=self._read(config, self.intermediate_size, int),
            shared_intermediate_size=shared * self._read(config, self.shared_count, int, 1),
            top_k=self._read(config, self.top_k, int),
            num_layers=layers if isinstance(layers, int) else len(layers),
        )

    def routing(self, config: Config) -> Routing:
        """The routing; raises as `sizes`."""
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
        """The activation; raises as `sizes`."""
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
        """The epsilon of the router's own norm, or None; raises as `sizes`."""
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


# ------------------------------------------------------------------------------------- the table


def _projections(module: str) -> ExpertNames:
    return ExpertNames(f"{module}.up_proj", f"{module}.down_proj", gate=f"{module}.gate_proj")


_SPLIT = _projections("experts.{expert}")
# Mixtral's own names.
_NUMBERED = ExpertNames("experts.{expert}.w3", "experts.{expert}.w2", gate="experts.{expert}.w1")
# Qwen3-VL as ModelOpt wrote it with transformers before 5 (vllm-project/vllm#40885).
_EXPERT_LAST = ExpertNames(
    "experts.up_proj.{expert}", "experts.down_proj.{expert}", gate="experts.gate_proj.{expert}"
)
# As in memory: no exporter known writes it in NVFP4, but vLLM loads it.
_FUSED = ExpertNames("experts.gate_up_proj", "experts.down_proj", stacked=True, fused=True)
_TRANSPOSED = replace(_FUSED, transposed=True)

_QWEN3 = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text"),
    experts=(_SPLIT, _EXPERT_LAST, _FUSED),
    method="renormalize_naive",
    unnormalized_method="default",
    normalize="norm_topk_prob",
)
_QWEN3_NEXT = replace(
    _QWEN3,
    name="qwen3_next",
    model_types=("qwen3_next",),
    shared=_projections("shared_expert"),
    shared_gate="shared_expert_gate.weight",
    shared_size="shared_expert_intermediate_size",
)
_DEEPSEEK = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25"),
    experts=(_SPLIT, _FUSED),
    method="deepseek_v3",
    normalize="norm_topk_prob",
    n_group="n_group",
    topk_group="topk_group",
    scaling_factor="routed_scaling_factor",
    selection_bias="gate.e_score_correction_bias",
    shared=_projections("shared_experts"),
    shared_size="moe_intermediate_size",
    shared_count="n_shared_experts",
    defaults=(("n_group", 1), ("topk_group", 1)),
    required=(("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")),
)
_MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    block=("block_sparse_moe", "mlp"),
    experts=(_NUMBERED, _SPLIT, _FUSED),
    method="renormalize_naive",
    intermediate_size="intermediate_size",
)
FAMILIES: tuple[Family, ...] = (
    _QWEN3,
    _QWEN3_NEXT,
    replace(
        _QWEN3_NEXT,
        name="qwen3_5_moe",
        model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
        normalize=None,
    ),
    _DEEPSEEK,
    replace(
        _DEEPSEEK,
        name="glm4_moe",
        model_types=("glm4_moe", "glm4v_moe", "glm4v_moe_text", "glm4_moe_lite", "glm_moe_dsa"),
    ),
    replace(
        _DEEPSEEK,
        name="nemotron_h",
        model_types=("nemotron_h",),
        block=("mixer",),
        experts=(replace(_SPLIT, gate=None),),
        act="mlp_hidden_act",
        num_layers=("num_hidden_layers", "layers_block_type", "hybrid_override_pattern"),
        shared=replace(_projections("shared_experts"), gate=None),
        shared_size="moe_shared_expert_intermediate_size",
        shared_count=None,
        latent=("fc1_latent_proj.weight", "fc2_latent_proj.weight"),
        latent_size="moe_latent_size",
        defaults=(*_DEEPSEEK.defaults, ("moe_latent_size", 0)),
    ),
    _MIXTRAL,
    replace(
        _MIXTRAL,
        name="minimax_m2",
        model_types=("minimax_m2",),
        method="minimax2",
        selection_bias="e_score_correction_bias",
        required=(("scoring_func", "sigmoid"),),
    ),
    Family(
        name="llama4",
        model_types=("llama4", "llama4_text"),
        block=("feed_forward",),
        experts=(_TRANSPOSED, _SPLIT),
        method="llama4",
        router="router.weight",
        shared=_projections("shared_expert"),
        shared_size="intermediate_size",
        router_weight_on_input=True,
        intermediate_size="intermediate_size",
    ),
    Family(
        name="gemma4",
        model_types=("gemma4", "gemma4_text"),
        block=("",),
        # "moe" held the experts until transformers moved them (vllm-project/vllm#41206).
        experts=(_SPLIT, _projections("moe.experts.{expert}"), _FUSED),
        method="renormalize_naive",
        router="router.proj.weight",
        router_scale="router.scale",
        router_eps="rms_norm_eps",
        expert_scale="router.per_expert_scale",
        top_k="top_k_experts",
        act="hidden_activation",
        required=(("enable_moe_block", True),),
    ),
    Family(
        name="gpt_oss",
        model_types=("gpt_oss",),
        # llm-compressor writes the second, in which rows are gate's or up's since its #3100 only.
        experts=(replace(_TRANSPOSED, interleaved=True), _SPLIT),
        method="renormalize",
        router="router.weight",
        router_bias="router.bias",
        act_alpha="swiglu_alpha",
        act_limit="swiglu_limit",
        intermediate_size="intermediate_size",
        defaults=(("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)),
        fixed=(("hidden_act", "swiglu_oai"),),
    ),
)


def text_config(config: Config) -> Config:
    """The language model's part of a config.json, which may be all of it."""
    nested = (config[name] for name in _NESTED if isinstance(config.get(name), Mapping))
    inner = next(nested, None)
    return config if inner is None else text_config(inner)


def family_of(config: Config) -> Family:
    """A model's family, by `model_type`, then by `architectures`; ConfigError if none has it."""
    known = {model_type: family for family in FAMILIES for model_type in family.model_types}
    given = [text_config(config).get("model_type"), config.get("model_type")]
    for name in given:
        if not isinstance(name, str | None):
            raise ConfigError(f"config.json: model_type is {described(name)}, expected a string")
    # Qwen3MoeForCausalLM is of the type qwen3_moe.
    classes = [str(name).lower() for name in config.get("architectures") or ()]
    by_length = sorted(known, key=len, reverse=True)
    given += [t for t in by_length for name in classes if name.startswith(t.replace("_", ""))]
    found = next((known[model_type] for model_type in given if model_type in known), None)
    if found is None:
        near = difflib.get_close_matches(str(given[0]), known, n=1)
        raise ConfigError(
            f"config.json: model_type is {given[0]!r}, expected one of {', '.join(known)}"
            + (f": did you mean {near[0]!r}?" if near else "")
        )
    return found
