"""Tiny checkpoints for tests, written from the formats' definitions without the package."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import jax_nvfp4_moe as nvm

LAYERS, E, H, I, K = 2, 4, 64, 32, 2  # noqa: E741

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": H,
    "moe_intermediate_size": I,
    "norm_topk_prob": True,
    "num_experts": E,
    "num_experts_per_tok": K,
    "num_hidden_layers": LAYERS,
    "vocab_size": 32,
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "float", "group_size": 16},
            "input_activations": {
                "num_bits": 4,
                "type": "float",
                "group_size": 16,
                "dynamic": "local",
            },
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
}


@dataclasses.dataclass
class Written:
    """A checkpoint to write, which tests may spoil first.

    Attributes:
        config: config.json, with `quantization_config`.
        tensors: names to arrays.
        experts: for each layer, the `ExpertWeights` to expect with input_scale="per_expert".
    """

    config: dict
    tensors: dict
    experts: list

    def write(self, path, *, shards=1, index=True):
        """Writes the directory, with an index for several shards, and returns `path`."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        if shards == 1:
            save_file(self.tensors, path / "model.safetensors")
            return path
        places = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            # Alternating, so that the matrices of one expert lie in different files.
            names = sorted(self.tensors)[number::shards]
            save_file({name: self.tensors[name] for name in names}, path / file)
            places |= dict.fromkeys(names, file)
        if index:
            index = {"metadata": {}, "weight_map": places}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path


def made(rng, *, encode=False, static=True):
    """A Qwen3-MoE of two layers in ModelOpt's format; `encode`: in compressed-tensors'."""
    config = {**CONFIG, "quantization_config": COMPRESSED_TENSORS if encode else MODELOPT}
    written = Written(json.loads(json.dumps(config)), {}, [])
    written.tensors |= {
        "lm_head.weight": bfloat16(rng, 32, H),
        "model.embed_tokens.weight": bfloat16(rng, 32, H),
        "model.norm.weight": np.ones(H, jnp.bfloat16),
    }
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp"
        written.tensors[f"{block}.gate.weight"] = bfloat16(rng, E, H)
        written.tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = bfloat16(rng, H, H)
        names = [f"{block}.experts.{expert}" for expert in range(E)]
        written.experts.append(_experts(written.tensors, rng, names, encode, static))
    return written


def add_shared(written, rng, family, *, quantized=False, encode=False):
    """Makes the model a "deepseek_v3" or a "qwen3_next", which have a shared expert.

    Returns the shared experts to expect if quantised, else their tensors' names.
    """
    config, tensors = written.config, written.tensors
    config |= {"model_type": family, "architectures": []}
    config |= {"n_shared_experts": 1, "shared_expert_intermediate_size": I}
    config |= {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5}
    name = "shared_experts" if family == "deepseek_v3" else "shared_expert"
    found = []
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp"
        if family == "deepseek_v3":
            bias = rng.normal(size=E).astype(np.float32)
            tensors[f"{block}.gate.e_score_correction_bias"] = bias
        else:
            tensors[f"{block}.shared_expert_gate.weight"] = bfloat16(rng, 1, H)
        if quantized:
            found.append(_experts(tensors, rng, [f"{block}.{name}"], encode, True))
            continue
        shapes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
        matrices = {f"{block}.{name}.{m}.weight": bfloat16(rng, *shapes[m]) for m in shapes}
        tensors |= matrices
        found.append(list(matrices))
    if not quantized:
        ignored = f"re:.*{name}.*" if encode else f"*.{name}*"
        config["quantization_config"]["ignore"].append(ignored)
    return found


def bfloat16(rng, *shape):
    return rng.normal(size=shape).astype(jnp.bfloat16)


def _experts(tensors, rng, names, encode, static):
    """Adds random experts, one for each name, to `tensors`; returns them as they should load."""
    data, global_name = ("weight_packed", "weight_global_scale") if encode else (
        "weight", "weight_scale_2")  # fmt: skip
    input_name = "input_global_scale" if encode else "input_scale"
    loaded = {}

    def scales(low, high):
        """Random scales, as stored and as decoded."""
        stored = rng.uniform(low, high, len(names)).astype(np.float32)
        if not encode:
            return list(stored), stored
        stored = np.float32(1) / stored
        return list(stored.reshape(-1, 1)), np.float32(1) / stored

    # Scales of gate and up differ by a factor of 4, as in real checkpoints.
    for role, gain, shape in [("gate", 1, (I, H)), ("up", 4, (I, H)), ("down", 1, (H, I))]:
        rows, columns = shape
        codes = rng.integers(0, 256, (len(names), rows, columns // 2)).astype(np.uint8)
        blocks = rng.integers(0x30, 0x48, (len(names), rows, columns // 16)).astype(np.uint8)
        blocks = blocks.view(jnp.float8_e4m3fn)
        stored, decoded = scales(0.01 * gain, 0.02 * gain)
        stored_input, decoded_input = scales(0.002, 0.004)
        if role == "down":
            stored_input, decoded_input = scales(0.02, 0.1)
        loaded[role] = codes, blocks, decoded, decoded_input
        for expert, name in enumerate(names):
            at = f"{name}.{role}_proj"
            tensors[f"{at}.{data}"] = codes[expert]
            tensors[f"{at}.weight_scale"] = blocks[expert]
            tensors[f"{at}.{global_name}"] = np.asarray(stored[expert])
            if static:
                tensors[f"{at}.{input_name}"] = np.asarray(stored_input[expert])

    def both(field, join):
        return jnp.asarray(join([loaded["gate"][field], loaded["up"][field]], axis=1))

    return nvm.ExpertWeights(
        w13=nvm.Nvfp4Array(both(0, np.concatenate), both(1, np.concatenate), both(2, np.stack)),
        w2=nvm.Nvfp4Array(*map(jnp.asarray, loaded["down"][:3])),
        w13_input_scale=both(3, np.stack) if static else None,
        w2_input_scale=jnp.asarray(loaded["down"][3]) if static else None,
        w13_bias=None,
        w2_bias=None,
        hidden_size=H,
        intermediate_size=I,
        activation_scheme="static" if static else "none",
        layout="linear",
    )
