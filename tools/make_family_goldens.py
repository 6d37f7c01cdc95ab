"""Writes tests/goldens/families: a tiny checkpoint of every model family, with its outputs.

Every checkpoint has the names and layouts that the family's files have. Its dequantised matrices
are loaded into transformers' own block in float32, and what that computes is stored beside it.
Needs torch, transformers, safetensors and numpy, but not this package, whose table of families it
must not share a mistake with:

    python tools/make_family_goldens.py tests/goldens/families [family ...]
"""

import dataclasses
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

SEED = 20
TOKENS, HIDDEN, INTERMEDIATE = 24, 64, 48
BLOCK = 16
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Attention and vocabulary, which nothing here computes with.
COMMON = {
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT_ATTENTION = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}


# ------------------------------------------------------------------------------------- NVFP4


@dataclasses.dataclass
class Quantized:
    """A matrix [..., out, in]: packed codes, E4M3 scales, decode scale, and what they mean."""

    data: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor
    values: torch.Tensor


def quantize(matrix: torch.Tensor, encode: bool = False) -> Quantized:
    """With one global scale for all of `matrix`, rounded as its inverse if that is stored."""
    global_scale = matrix.abs().max() / 2688
    if encode:
        global_scale = 1 / (1 / global_scale)
    blocks = matrix.reshape(*matrix.shape[:-1], -1, BLOCK)
    scale = (blocks.abs().amax(-1) / (6 * global_scale)).clamp(2**-9, 448)
    scale = scale.to(torch.float8_e4m3fn)
    steps = scale.float()[..., None] * global_scale
    magnitudes = (blocks / steps).abs()
    codes = (magnitudes[..., None] - E2M1).abs().argmin(-1)
    values = torch.sign(blocks) * E2M1[codes] * steps
    codes = (codes + 8 * (blocks < 0)).to(torch.uint8).reshape(matrix.shape)
    data = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return Quantized(data, scale, global_scale, values.reshape(matrix.shape))


# ------------------------------------------------------------------------------------- how stored


@dataclasses.dataclass(frozen=True)
class Split:
    """Tensors for each expert and matrix."""

    gate: str | None = "experts.{}.gate_proj"
    up: str = "experts.{}.up_proj"
    down: str = "experts.{}.down_proj"
    compressed: bool = False  # compressed-tensors' parts instead of ModelOpt's
    activations: bool = True

    def store(self, matrices: dict[str, torch.Tensor], draw: "Draw") -> tuple[dict, dict]:
        """Tensors by name, and the dequantised matrices."""
        tensors, values = {}, {}
        biases = {name[:-5]: matrices[name] for name in matrices if name.endswith("_bias")}
        for role in ("gate", "up", "down"):
            if role not in matrices:
                continue
            parts = []
            for expert, matrix in enumerate(matrices[role]):
                name = getattr(self, role).format(expert)
                part = quantize(matrix, self.compressed)
                parts.append(part.values)
                tensors |= self.parts(name, part, draw)
                if role in biases:
                    tensors[f"{name}.bias"] = biases[role][expert].bfloat16()
            values[role] = torch.stack(parts)
        return tensors, values

    def parts(self, name: str, part: Quantized, draw: "Draw") -> dict[str, torch.Tensor]:
        """One matrix's tensors."""
        input_scale = draw.input_scale()
        if not self.compressed:
            return {
                f"{name}.weight": part.data,
                f"{name}.weight_scale": part.scale,
                f"{name}.weight_scale_2": part.global_scale,
            } | ({f"{name}.input_scale": input_scale} if self.activations else {})
        return {
            f"{name}.weight_packed": part.data,
            f"{name}.weight_scale": part.scale,
            f"{name}.weight_global_scale": (1 / part.global_scale)[None],
        } | ({f"{name}.input_global_scale": (1 / input_scale)[None]} if self.activations else {})


@dataclasses.dataclass(frozen=True)
class Stacked:
    """One tensor for all experts, and another for all of their down projections."""

    transposed: bool
    interleaved: bool = False
    per_expert: bool = False  # global scales [E] instead of []

    def store(self, matrices: dict[str, torch.Tensor], draw: "Draw") -> tuple[dict, dict]:
        """Tensors by name, and the dequantised matrices."""
        tensors, values = {}, {}
        both = {"gate_up_proj": self.fuse(matrices["gate"], matrices["up"])}
        both["down_proj"] = matrices["down"]
        for name, matrix in both.items():
            full = f"experts.{name}"
            experts = [quantize(one) for one in matrix] if self.per_expert else [quantize(matrix)]
            data, scale, global_scale, value = (
                torch.stack([getattr(one, field.name) for one in experts])
                if self.per_expert
                else getattr(experts[0], field.name)
                for field in dataclasses.fields(Quantized)
            )
            values[name] = value
            if self.transposed:
                data, scale = data.transpose(-1, -2), scale.transpose(-1, -2)
            inputs = [draw.input_scale() for _ in experts]
            tensors |= {
                full: data,
                f"{full}_weight_scale": scale,
                f"{full}_weight_scale_2": global_scale,
                f"{full}_input_scale": torch.stack(inputs) if self.per_expert else inputs[0],
            }
        if "gate_bias" in matrices:
            bias = self.fuse(matrices["gate_bias"][..., None], matrices["up_bias"][..., None])
            tensors["experts.gate_up_proj_bias"] = bias[..., 0].bfloat16()
            tensors["experts.down_proj_bias"] = matrices["down_bias"].bfloat16()
        gate, up = self.unfuse(values["gate_up_proj"])
        return tensors, {"gate": gate, "up": up, "down": values["down_proj"]}

    def fuse(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Gate and up rows as one matrix."""
        if not self.interleaved:
            return torch.cat([gate, up], dim=1)
        return torch.stack([gate, up], dim=2).flatten(1, 2)

    def unfuse(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse."""
        return (both[:, 0::2], both[:, 1::2]) if self.interleaved else both.chunk(2, dim=1)


# ------------------------------------------------------------------------------------- random


class Draw:
    """Random tensors, scaled so that nothing that a family does goes unnoticed."""

    def __init__(self, name: str) -> None:
        self.numpy = np.random.default_rng([SEED, *name.encode()])

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        """float32."""
        return torch.from_numpy(self.numpy.normal(mean, std, shape).astype(np.float32))

    def stored(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        """float32 that bfloat16 can hold."""
        return self.normal(*shape, std=std, mean=mean).bfloat16().float()

    def input_scale(self) -> torch.Tensor:
        """A decode scale of activations."""
        return torch.tensor(0.004 * self.numpy.uniform(0.5, 2), dtype=torch.float32)

    def experts(self, e: int, h: int, i: int, gated: bool, bias: bool) -> dict[str, torch.Tensor]:
        """Expert matrices whose magnitudes differ, and biases."""
        roles = {"gate": (i, h), "up": (i, h), "down": (h, i)}
        if not gated:
            del roles["gate"]
        matrices = {}
        for role, (rows, columns) in roles.items():
            gain = torch.from_numpy(self.numpy.uniform(0.5, 2, (e, 1, 1)).astype(np.float32))
            matrices[role] = self.normal(e, rows, columns, std=0.25) * gain
            if bias:
                matrices[f"{role}_bias"] = self.stored(e, rows, std=0.5)
        return matrices


# ------------------------------------------------------------------------------------- families


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        config: the configuration's class and its arguments; `text` are those of a nested one.
        module: of transformers' modeling files.
        reference: the block's class there.
        prefix: of a decoder layer's names in files.
        block: within a layer.
        store: how experts are stored.
        layers: those with experts.
        edit: changes config.json to what the model's publisher wrote.
        shards: files.
        note: for meta.json.
    """

    config: str
    module: str
    reference: str
    prefix: str
    block: str
    store: Split | Stacked
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: dict[str, Any] | None = None
    layers: tuple[int, ...] = (0,)
    experts: int = 6
    edit: Callable[[dict[str, Any]], None] | None = None
    shards: int = 1
    note: str = ""


def qwen3(**more: Any) -> dict[str, Any]:
    """The arguments of Qwen3's configurations."""
    return {
        **COMMON,
        "head_dim": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 80,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        **more,
    }


def deepseek(**more: Any) -> dict[str, Any]:
    """The arguments of DeepSeek's configurations."""
    return {
        **COMMON,
        **LATENT_ATTENTION,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "intermediate_size": 80,
        "moe_intermediate_size": INTERMEDIATE,
        "n_shared_experts": 1,
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        **more,
    }


def mixtral(**more: Any) -> dict[str, Any]:
    """The arguments of Mixtral's configurations."""
    return {
        **COMMON,
        "num_hidden_layers": 1,
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        **more,
    }


def nemotron(**more: Any) -> dict[str, Any]:
    """The arguments of Nemotron-H's configuration."""
    return {
        **COMMON,
        "layers_block_type": ["linear_attention", "moe"],
        "moe_intermediate_size": INTERMEDIATE,
        "moe_shared_expert_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
        **more,
    }


def as_published(config: dict[str, Any], **changes: Any) -> None:
    """Sets keys of the language model's config, and removes those set to None."""
    config = config.get("text_config", config)
    config |= changes
    for name, value in changes.items():
        if value is None:
            del config[name]


W123 = Split("experts.{}.w1", "experts.{}.w3", "experts.{}.w2")
PLAIN, MULTIMODAL = "model.layers.", "model.language_model.layers."
OUTER = "language_model.model.layers."
QWEN3 = Case(
    "Qwen3MoeConfig", "qwen3_moe", "Qwen3MoeSparseMoeBlock", PLAIN, "mlp", Split(),
    arguments=qwen3(num_hidden_layers=2, norm_topk_prob=True), layers=(0, 1), shards=2,
)  # fmt: skip
GPT_OSS = Case(
    "GptOssConfig", "gpt_oss", "GptOssMLP", PLAIN, "mlp",
    Stacked(transposed=True, interleaved=True), arguments=mixtral(head_dim=32),
    edit=lambda c: as_published(c, swiglu_alpha=None),
    note="swiglu_alpha is left out of config.json, as its publisher does.",
)  # fmt: skip
NEMOTRON = Case(
    "NemotronHConfig", "nemotron_h", "NemotronHMoE", "backbone.layers.", "mixer",
    Split(gate=None), arguments=nemotron(), layers=(1,), experts=8,
    edit=lambda c: as_published(
        c, layers_block_type=None, hybrid_override_pattern="ME", num_hidden_layers=2
    ),
)  # fmt: skip
QWEN3_5_TEXT = qwen3(shared_expert_intermediate_size=32, layer_types=["full_attention"])
del QWEN3_5_TEXT["intermediate_size"]
QWEN3_5 = Case(
    "Qwen3_5MoeConfig", "qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", MULTIMODAL, "mlp", Split(),
    text=QWEN3_5_TEXT,
)  # fmt: skip
CASES = {
    "qwen3_moe": QWEN3,
    "qwen3_moe_compressed_tensors": dataclasses.replace(
        QWEN3, store=Split(compressed=True), layers=(0,), shards=1,
        arguments=qwen3(norm_topk_prob=False),
        note="norm_topk_prob is false.",
    ),
    "qwen3_vl_moe": Case(
        "Qwen3VLMoeConfig", "qwen3_vl_moe", "Qwen3VLMoeTextSparseMoeBlock", MULTIMODAL, "mlp",
        Split("experts.gate_proj.{}", "experts.up_proj.{}", "experts.down_proj.{}"), text=qwen3(),
        edit=lambda c: as_published(c, norm_topk_prob=True),
        note="Names as ModelOpt wrote them with transformers before 5.",
    ),
    "qwen3_next": Case(
        "Qwen3NextConfig", "qwen3_next", "Qwen3NextSparseMoeBlock", PLAIN, "mlp", Split(),
        arguments=qwen3(shared_expert_intermediate_size=32, norm_topk_prob=True),
    ),
    "qwen3_5_moe": QWEN3_5,
    "qwen3_5_moe_fused": dataclasses.replace(
        QWEN3_5, store=Stacked(transposed=False, per_expert=True),
        note="No exporter is known to write this; global scales [E] are an assumption.",
    ),
    "deepseek_v3": Case(
        "DeepseekV3Config", "deepseek_v3", "DeepseekV3MoE", PLAIN, "mlp", Split(),
        arguments=deepseek(), layers=(1,), experts=12,
        edit=lambda c: as_published(c, scoring_func="sigmoid", topk_method="noaux_tc"),
    ),
    "kimi_k25": Case(
        "Kimi_K25Config", "deepseek_v3", "DeepseekV3MoE", OUTER, "mlp", Split(),
        text={"model_type": "deepseek_v3"} | deepseek(n_group=1, topk_group=1, n_routed_experts=8),
        layers=(1,), experts=8,
        edit=lambda c: as_published(c, model_type="kimi_k2", scoring_func="sigmoid"),
        note="The text model is DeepSeek-V3's with one group.",
    ),
    "glm4_moe": Case(
        "Glm4MoeConfig", "glm4_moe", "Glm4MoeMoE", PLAIN, "mlp", Split(),
        arguments=deepseek(n_group=1, topk_group=1, n_routed_experts=8, head_dim=32), layers=(1,),
        experts=8,
    ),
    "minimax_m2": Case(
        "MiniMaxM2Config", "minimax_m2", "MiniMaxM2SparseMoeBlock", PLAIN, "block_sparse_moe",
        W123, arguments=mixtral(head_dim=32),
        edit=lambda c: as_published(c, scoring_func="sigmoid"),
    ),
    "mixtral": Case(
        "MixtralConfig", "mixtral", "MixtralSparseMoeBlock", PLAIN, "block_sparse_moe", W123,
        arguments=mixtral(),
    ),
    "llama4": Case(
        "Llama4Config", "llama4", "Llama4TextMoe", OUTER, "feed_forward", Stacked(transposed=True),
        text=mixtral(head_dim=32, intermediate_size_mlp=80, num_experts_per_tok=1),
    ),
    "nemotron_h": NEMOTRON,
    "nemotron_h_latent": dataclasses.replace(
        NEMOTRON, arguments=nemotron(moe_latent_size=32),
        note="y_experts is in the latent space, y is not.",
    ),
    "gemma4": Case(
        "Gemma4Config", "gemma4", "Gemma4TextRouter, Gemma4TextExperts", MULTIMODAL, "", Split(),
        text={
            **qwen3(top_k_experts=2, layer_types=["full_attention"], global_head_dim=32),
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 32,
        },
        note="x is what the experts see, router_input what the router sees; y is y_experts.",
    ),
    "gpt_oss": GPT_OSS,
    "gpt_oss_compressed_tensors": dataclasses.replace(
        GPT_OSS, store=Split(compressed=True, activations=False), edit=None, note="W4A16."
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------- one layer


class Both(torch.nn.Module):
    """Gemma 4's router and experts, which are in no block of their own."""

    def __init__(self, modeling: Any, config: Any) -> None:
        super().__init__()
        self.router = modeling.Gemma4TextRouter(config)
        self.experts = modeling.Gemma4TextExperts(config)


def layer(case: Case, config: Any, draw: Draw) -> tuple[dict, dict[str, np.ndarray]]:
    """A layer's tensors, by their names in the block, and the golden arrays."""
    modeling = importlib.import_module(f"transformers.models.{case.module}.modeling_{case.module}")
    build = getattr(modeling, case.reference, None) or (lambda c: Both(modeling, c))
    block = build(config).float().eval()
    gated = hasattr(block.experts, "gate_up_proj")
    bias = hasattr(block.experts, "down_proj_bias")
    width = getattr(config, "moe_latent_size", None) or HIDDEN
    matrices = draw.experts(case.experts, width, INTERMEDIATE, gated, bias)
    tensors, values = case.store.store(matrices, draw)
    assert matrices["up"].shape[0] == block.experts.down_proj.shape[0]

    # The experts, in the form that this version of transformers has in memory.
    transposed = case.module in ("llama4", "gpt_oss")
    order = (lambda m: m.transpose(1, 2)) if transposed else (lambda m: m)
    fuse = Stacked(transposed, interleaved=case.module == "gpt_oss").fuse
    loaded = {"down_proj": order(values["down"])}
    if gated:
        loaded["gate_up_proj"] = order(fuse(values["gate"], values["up"]))
    else:
        loaded["up_proj"] = values["up"]
    if bias:
        both = fuse(matrices["gate_bias"][..., None], matrices["up_bias"][..., None])
        loaded |= {"gate_up_proj_bias": both[..., 0], "down_proj_bias": matrices["down_bias"]}
    state = {f"experts.{name}": value for name, value in loaded.items()}

    # All the rest keeps its names.
    for name, value in block.state_dict().items():
        if name in state:
            continue
        if name.endswith("e_score_correction_bias"):
            state[name] = draw.normal(*value.shape, std=0.3)
            tensors[name] = state[name]
            continue
        plain = name.endswith(("router.scale", "per_expert_scale"))
        router = "gate.weight" in name or "router" in name
        std = 0.5 if name.endswith("router.bias") else 0.1 if router else 0.2
        state[name] = draw.stored(*value.shape, std=0.3 if plain else std, mean=float(plain))
        tensors[name] = state[name].bfloat16()
    block.load_state_dict(state)
    return tensors, outputs(case, block, draw)


@torch.no_grad()
def outputs(case: Case, block: torch.nn.Module, draw: Draw) -> dict[str, np.ndarray]:
    """What the block makes of random tokens."""
    x = draw.normal(TOKENS, HIDDEN, std=1.5)
    seen = draw.normal(TOKENS, HIDDEN, std=1.5) if isinstance(block, Both) else x
    logits, ids, weights = route(case, block, seen)
    for sign in (-1, 1):
        _, nearby, _ = route(case, block, seen * (1 + sign * 1e-4))
        assert torch.equal(nearby.sort(-1)[0], ids.sort(-1)[0]), "a choice is too close"
    if case.module == "llama4":
        scores = torch.zeros_like(logits).scatter(1, ids, weights)
        scaled = (x[None] * scores.T[..., None]).reshape(-1, HIDDEN)
        routed = block.experts(scaled).reshape(-1, TOKENS, HIDDEN).sum(0)
    else:
        inner = block.fc1_latent_proj(x) if case.module == "nemotron_h" else x
        routed = block.experts(inner, ids, weights)
    if isinstance(block, Both):
        whole = routed
    else:
        whole = block(x[None])
        whole = (whole[0] if isinstance(whole, tuple) else whole).reshape(TOKENS, HIDDEN)
    arrays = {
        "x": x,
        "router_input": seen,
        "logits": logits,
        "ids": ids.to(torch.int32),
        "weights": weights,
        "y": whole,
        "y_experts": routed,
    }
    if case.module == "nemotron_h":
        arrays["expert_input"] = inner
    return {name: array.float().numpy() if name != "ids" else array.numpy()
            for name, array in arrays.items()}  # fmt: skip


def route(case: Case, block: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits, ids and weights."""
    router = block.router if hasattr(block, "router") else block.gate
    if case.module == "llama4":
        scores, logits = router(x)
        ids = logits.topk(router.top_k, dim=1)[1]
        return logits, ids, scores.gather(1, ids)
    if case.module == "gemma4":
        caught = []
        hook = router.proj.register_forward_hook(lambda _, __, out: caught.append(out))
        _, weights, ids = router(x)
        hook.remove()
        return caught[0], ids, weights
    more = (block.e_score_correction_bias,) if case.module == "minimax_m2" else ()
    logits, weights, ids = router(x, *more)
    return logits, ids, weights


# ------------------------------------------------------------------------------------- files


def quantization_config(case: Case, ignored: list[str]) -> tuple[dict, dict | None]:
    """For config.json, and hf_quant_config.json where there is one."""
    numbers: dict[str, Any] = {"num_bits": 4, "type": "float", "group_size": BLOCK}
    if not getattr(case.store, "compressed", False):
        numbers = {"dynamic": False, **numbers}
        producer = {"name": "modelopt", "version": "0.47.0"}
        group = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
        inner = {
            "config_groups": {"group_0": group},
            "ignore": ignored,
            "quant_algo": "NVFP4",
            "producer": producer,
            "quant_method": "modelopt",
        }
        outer = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK,
            "exclude_modules": ignored,
        }
        return inner, {"producer": producer, "quantization": outer}
    numbers |= {"strategy": "tensor_group", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "dynamic": False},
        "input_activations": {**numbers, "dynamic": "local"} if case.store.activations else None,
        "format": "nvfp4-pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }, None


def write(name: str, case: Case, directory: Path) -> None:
    """Writes one checkpoint and its goldens."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    draw = Draw(name)
    nested = {} if case.text is None else {"text_config": case.text}
    config = getattr(transformers, case.config)(**case.arguments, **nested)
    text = config.get_text_config()
    text._experts_implementation = "eager"

    root = case.prefix.removesuffix("layers.")
    tensors = {f"{root}norm.weight": draw.stored(HIDDEN, mean=1.0).bfloat16()}
    ignored = ["lm_head", f"{root}embed_tokens"]
    for number in case.layers:
        found, arrays = layer(case, text, draw)
        at = f"{case.prefix}{number}" + (f".{case.block}" if case.block else "")
        tensors |= {f"{at}.{key}": value.contiguous() for key, value in found.items()}
        tensors[f"{case.prefix}{number}.input_layernorm.weight"] = draw.stored(HIDDEN).bfloat16()
        others = {key.split(".")[0] for key in found if not key.startswith("experts.")}
        ignored += [f"{at}.{module}*" for module in sorted(others)]
        np.savez_compressed(directory / f"layer{number}.npz", **arrays)
    # A layer before it without experts has little here, but it is there.
    for number in set(range(max(case.layers))) - set(case.layers):
        tensors[f"{case.prefix}{number}.input_layernorm.weight"] = draw.stored(HIDDEN).bfloat16()

    config.save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    # Not so much as a word about images and sound.
    written = {k: v for k, v in written.items() if k not in ("vision_config", "audio_config")}
    if case.edit is not None:
        case.edit(written)
    written["quantization_config"], separate = quantization_config(case, ignored)
    save_json(directory / "config.json", written)
    if separate is not None:
        save_json(directory / "hf_quant_config.json", separate)
    save_tensors(directory, tensors, case.shards)
    save_json(
        directory / "meta.json",
        {
            "seed": SEED,
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "reference": [f"{case.module}.{one}" for one in case.reference.split(", ")],
            "layers": case.layers,
            "note": case.note,
        },
    )


def save_tensors(directory: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """In one file, or in several, among which experts and even their parts are spread."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    save_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
    )


def save_json(path: Path, value: Any) -> None:
    """With a newline at its end."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """All families, or those named."""
    directory, *names = sys.argv[1:]
    for name in names or CASES:
        write(name, CASES[name], Path(directory) / name)
        print(name)


if __name__ == "__main__":
    main()
