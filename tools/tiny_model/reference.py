"""Writes what transformers and ModelOpt compute with the tiny model, for tests to compare with.

    python reference.py CORPUS MODELS

MODELS has the folders and held_out.txt; reference.npz and reference.json are written there.
"""

import json
import math
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from quantize_modelopt import CALIBRATION, load, quantised
from safetensors.torch import load_file
from transformers import AutoTokenizer

SEPARATOR = "\n<|endoftext|>\n"
WINDOW = 256
PROMPT_TOKENS, STEP = 48, 4  # every fourth position's logits are kept, for the file's size
GREEDY_TOKENS = 64
GREEDY_PROMPT = "If the file does not exist,"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
DEFINITIONS = {
    "dtype": "float32 everywhere, eager attention and experts; the weights are the bfloat16 ones",
    "bf16": "qwen3-moe-tiny-bf16",
    "w4a16": "qwen3-moe-tiny-nvfp4, experts dequantised: e2m1 * weight_scale * weight_scale_2",
    "w4a4": "ModelOpt's fake-quantised model, in the state that qwen3-moe-tiny-nvfp4 was exported "
    "from, converted to float32: weights and the inputs of all expert matrices quantised, by "
    "ModelOpt's NVFP4QTensor, because its fake quantisation kernels need a GPU",
    "perplexity": "exp of the mean negative log-likelihood. held_out.txt without its last newline "
    "is split at '\\n<|endoftext|>\\n'; each part is encoded and preceded by token 0; the "
    "concatenation is cut into windows of 256 tokens, the rest dropped; in each window the last "
    "255 tokens are predicted from the ones before them in the window",
    "logits_*": "[12, 1024], of prompt [48] at `positions`; prompt is the held-out text's start",
    "greedy_*": "64 tokens, with a cache, after greedy_prompt; greedy_gap_* is the smallest "
    "difference between the best and the second logit on the way",
}


def dequantised(folder: Path) -> torch.nn.Module:
    """The quantised checkpoint in transformers' class, activations not quantised."""
    tensors = load_file(folder / "model.safetensors")
    model = load(folder.parent / "qwen3-moe-tiny-bf16", torch.float32)

    def expert(name: str) -> torch.Tensor:
        packed = tensors.pop(f"{name}.weight")
        values = E2M1[torch.stack([packed & 15, packed >> 4], -1).int()].view(packed.shape[0], -1)
        scales = tensors.pop(f"{name}.weight_scale").float() * tensors.pop(f"{name}.weight_scale_2")
        tensors.pop(f"{name}.input_scale")
        return values * scales.repeat_interleave(16, 1)

    state = {}
    for i in range(model.config.num_hidden_layers):
        root = f"model.layers.{i}.mlp.experts"
        experts = [f"{root}.{e}" for e in range(model.config.num_experts)]
        gate_up = [torch.cat([expert(f"{e}.gate_proj"), expert(f"{e}.up_proj")]) for e in experts]
        state[f"{root}.gate_up_proj"] = torch.stack(gate_up)
        state[f"{root}.down_proj"] = torch.stack([expert(f"{e}.down_proj") for e in experts])
    state |= tensors
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def fake_quantise(inputs: torch.Tensor, quantiser: TensorQuantizer) -> torch.Tensor:
    """What ModelOpt's kernel does on a GPU, by its tensor class: see check_fake_quantisation.py."""
    if not inputs.numel():  # an expert without tokens
        return inputs
    scale = quantiser.amax.float() / (6 * 448)
    packed, scales, scale = NVFP4QTensor.quantize(inputs, 16, weights_scaling_factor_2=scale)
    return packed.dequantize(
        inputs.dtype, scale=scales, double_scale=scale, block_sizes=quantiser.block_sizes
    )


def fake_quantised(corpus: Path, source: Path) -> torch.nn.Module:
    """ModelOpt's own model, in float32."""
    register_quant_backend("nvfp4_on_cpu", fake_quantise)
    model = quantised(corpus, source).float()
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.backend = "nvfp4_on_cpu"
    return model


def differing_weights(fake: torch.nn.Module, exported: torch.nn.Module) -> int:
    """How many weights are not the same in the fake-quantised model and in its export."""
    count = 0
    for ours, theirs in zip(exported.model.layers, fake.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(theirs.mlp.experts, name)
            quantisers = getattr(theirs.mlp.experts, f"{name}_weight_quantizers")
            pairs = zip(weights, quantisers, getattr(ours.mlp.experts, name), strict=True)
            count += sum(int((quantiser(w) != d).sum()) for w, quantiser, d in pairs)
    return count


def check_same_calibration(fake: torch.nn.Module, folder: Path) -> None:
    """Fails unless the exported input scales are those of `fake`."""
    tensors = load_file(folder / "model.safetensors")
    for i, layer in enumerate(fake.model.layers):
        experts = layer.mlp.experts
        for name, quantiser in (
            ("gate_proj", experts.gate_up_proj_input_quantizer),
            ("up_proj", experts.gate_up_proj_input_quantizer),
            ("down_proj", experts.down_proj_input_quantizer),
        ):
            for e in range(experts.num_experts):
                scale = tensors[f"model.layers.{i}.mlp.experts.{e}.{name}.input_scale"]
                assert scale == quantiser.amax.float() / (6 * 448), (i, e, name)


def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """As DEFINITIONS has it."""
    total = 0.0
    for ids in windows.split(8):
        logits = model(ids).logits[:, :-1].double()
        target = ids[:, 1:, None]
        total -= logits.log_softmax(-1).gather(-1, target).sum().item()
    return math.exp(total / windows[:, 1:].numel())


def generate(
    model: torch.nn.Module, prompt: list[int], count: int, seed: int | None = None
) -> tuple[list[int], float]:
    """(tokens, smallest gap between the two best logits): greedy, or sampled with a seed."""
    rng = torch.Generator().manual_seed(seed or 0)
    cache, ids, out, gap = None, torch.tensor([prompt]), [], math.inf
    for _ in range(count):
        result = model(ids, past_key_values=cache, use_cache=True)
        cache, logits = result.past_key_values, result.logits[0, -1]
        best, tokens = logits.topk(40)
        gap = min(gap, (best[0] - best[1]).item())
        choice = 0
        if seed is not None:
            choice = int(torch.multinomial((best / 0.7).softmax(-1), 1, generator=rng))
        out.append(int(tokens[choice]))
        ids = tokens[choice].view(1, 1)
    return out, gap


@torch.no_grad()
def main() -> None:
    """Writes both files, and prints samples."""
    corpus, models = map(Path, sys.argv[1:])
    torch.set_num_threads(2)
    source, nvfp4 = models / "qwen3-moe-tiny-bf16", models / "qwen3-moe-tiny-nvfp4"
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = (models / "held_out.txt").read_text("utf8")[:-1].split(SEPARATOR)
    stream = [t for row in tokenizer(texts)["input_ids"] for t in (0, *row)]
    windows = torch.tensor(stream[: len(stream) // WINDOW * WINDOW]).view(-1, WINDOW)

    variants = {
        "bf16": load(source, torch.float32),
        "w4a16": dequantised(nvfp4),
        "w4a4": fake_quantised(corpus, source),
    }
    check_same_calibration(variants["w4a4"], nvfp4)
    positions = np.arange(STEP - 1, PROMPT_TOKENS, STEP)
    prompt = [0, *tokenizer(GREEDY_PROMPT)["input_ids"]]
    arrays = {
        "prompt": np.array(stream[:PROMPT_TOKENS], np.int32),
        "positions": positions.astype(np.int32),
        "greedy_prompt": np.array(prompt, np.int32),
    }
    numbers = {"perplexity": {}, "predicted_tokens": windows[:, 1:].numel()}
    numbers["weights_differing_fake_exported"] = differing_weights(
        variants["w4a4"], variants["w4a16"]
    )
    for name, model in variants.items():
        numbers["perplexity"][name] = perplexity(model, windows)
        logits = model(torch.tensor([stream[:PROMPT_TOKENS]])).logits[0]
        arrays[f"logits_{name}"] = logits[positions].numpy()
        if name == "w4a4":
            continue
        tokens, gap = generate(model, prompt, GREEDY_TOKENS)
        arrays[f"greedy_{name}"] = np.array(tokens, np.int32)
        numbers[f"greedy_gap_{name}"] = gap
        numbers[f"greedy_text_{name}"] = tokenizer.decode(tokens)
        for seed in range(3):
            sample, _ = generate(model, prompt, 160, seed)
            print(f"--- {name}, seed {seed}: {GREEDY_PROMPT}{tokenizer.decode(sample)}\n")
    packages = ("torch", "transformers", "nvidia-modelopt", "compressed-tensors", "tokenizers")
    numbers |= {
        "definitions": DEFINITIONS,
        "greedy_prompt_text": GREEDY_PROMPT,
        "calibration": f"{CALIBRATION[0]} windows of {CALIBRATION[1]} tokens of training text",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
    np.savez_compressed(models / "reference.npz", **arrays)
    (models / "reference.json").write_text(json.dumps(numbers, indent=1) + "\n", "utf8")
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
