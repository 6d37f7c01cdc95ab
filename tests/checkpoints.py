"""Tiny checkpoints for tests: written by themselves, not by the package, to the formats' letter."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import jax_nvfp4_moe as nvm

LAYERS, E, H, I, K = 2, 4, 64, 32, 2

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
    """A checkpoint as it is to be written; tests spoil it first.

    Attributes:
        config: config.json, with `quantization_config`.
        tensors: all of them.
        experts: for each layer, what should be loaded with input_scale="per_expert".
    """

    config: dict
    tensors: dict
    experts: list

    def write(self, path, *, shards=1):
        """Writes the directory; with an index if there are several shards. Returns `path`."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        if shards == 1:
            save_file(self.tensors, path / "model.safetensors")
            return path
        places = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            # In turns, so that the matrices of one expert lie in different files.
            names = sorted(self.tensors)[number::shards]
            save_file({name: self.tensors[name] for name in names}, path / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path


def made(rng, *, encode=False, static=True):
    """A Qwen3-MoE of two layers; `encode`: in compressed-tensors' format instead of ModelOpt's."""
    data, global_name = ("weight_packed", "weight_global_scale") if encode else (
        "weight", "weight_scale_2")  # fmt: skip
    input_name = "input_global_scale" if encode else "input_scale"

    def stored(scale):
        scale = np.float32(scale)
        return np.reshape(np.float32(1) / scale, [1]) if encode else np.asarray(scale)

    bfloat16 = jnp.bfloat16
    tensors = {
        "lm_head.weight": rng.normal(size=(32, H)).astype(bfloat16),
        "model.embed_tokens.weight": rng.normal(size=(32, H)).astype(bfloat16),
        "model.norm.weight": np.ones(H, bfloat16),
    }
    experts = []
    for layer in range(LAYERS):
        # Gate and up differ by a factor of 4, as real ones do.
        gate, up = rng.normal(size=(E, I, H)), 4 * rng.normal(size=(E, I, H))
        down = rng.normal(size=(E, H, I))
        scales = rng.uniform(0.002, 0.004, size=(2, E)).astype(np.float32)
        calibrated = {
            "input_scale": np.stack([scales[0], scales[0]], 1),
            "hidden_scale": scales[1] * 20,
        }
        quantized = nvm.quantize_experts(
            *(jnp.asarray(m, jnp.float32) for m in (gate, up, down)),
            **(calibrated if static else {"activation_scheme": "none"}),
        )
        experts.append(quantized)
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = rng.normal(size=(E, H)).astype(bfloat16)
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = np.ones((H, H), bfloat16)
        w13, w2 = quantized.w13, quantized.w2
        for expert in range(E):
            halves = {"gate_proj": slice(0, I), "up_proj": slice(I, 2 * I), "down_proj": ...}
            for number, (name, rows) in enumerate(halves.items()):
                matrix = w2 if name == "down_proj" else w13
                at = f"{block}.experts.{expert}.{name}"
                tensors[f"{at}.{data}"] = np.array(matrix.data[expert][rows])
                tensors[f"{at}.weight_scale"] = np.array(matrix.scale[expert][rows])
                one = matrix.global_scale[expert]
                one = one if name == "down_proj" else one[number]
                tensors[f"{at}.{global_name}"] = stored(one)
                if static:
                    which = "hidden_scale" if name == "down_proj" else "input_scale"
                    tensors[f"{at}.{input_name}"] = stored(calibrated[which][expert].flat[0])
    config = {**CONFIG, "quantization_config": COMPRESSED_TENSORS if encode else MODELOPT}
    return Written(json.loads(json.dumps(config)), tensors, experts)
