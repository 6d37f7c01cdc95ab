"""The model families that this package loads, as a table.

A new family is an entry of `FAMILIES`; docs/checkpoints.md says how to add one.

Names are those on disk, not in memory: transformers fuses experts as it loads
(transformers@5.23.0:conversion_mapping.py), ModelOpt's export splits them and restores the names
(nvidia-modelopt@0.47.0:modelopt/torch/export/moe_utils.py, quant_aware_conversion.py), and
llm-compressor splits them for good. Only Llama 4 and gpt-oss remain fused and transposed in
ModelOpt's files (hf_export_handlers.py), with one `weight_scale_2` and one `input_scale`, both [],
for all experts. Formulas are those of transformers' modeling files.
"""

import difflib
from dataclasses import replace

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.checkpoint.errors import ConfigError
from jax_nvfp4_moe.checkpoint.family import Config, Family, text_config
from jax_nvfp4_moe.checkpoint.names import ExpertNames


def _projections(module: str) -> ExpertNames:
    return ExpertNames(f"{module}.up_proj", f"{module}.down_proj", gate=f"{module}.gate_proj")


_SPLIT = _projections("experts.{expert}")
# Mixtral's own names.
_NUMBERED = ExpertNames("experts.{expert}.w3", "experts.{expert}.w2", gate="experts.{expert}.w1")
# Qwen3-VL as ModelOpt wrote it with transformers before 5 (vllm-project/vllm#40885).
_EXPERT_LAST = ExpertNames(
    "experts.up_proj.{expert}", "experts.down_proj.{expert}", gate="experts.gate_proj.{expert}"
)
# As in memory: no known exporter writes it in NVFP4, but vLLM loads it.
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
        # llm-compressor writes the second, with separate gate and up only since its #3100.
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


def family_of(config: Config) -> Family:
    """The family of a model, by `model_type`, else by `architectures`.

    Raises:
        ConfigError: no family has it.
    """
    known = {model_type: family for family in FAMILIES for model_type in family.model_types}
    given = [text_config(config).get("model_type"), config.get("model_type")]
    for name in given:
        if not isinstance(name, str | None):
            raise ConfigError(f"config.json: model_type is {described(name)}, expected a string")
    # The class Qwen3MoeForCausalLM means the type qwen3_moe.
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
