"""What computes a layer: by name, each in a module of its own that is imported when it is used."""

import importlib

CONTENDERS = {  # on a CPU
    "cpu": "ours:Cpu",
    "emulation": "ours:Emulation",
    "ggml": "ggml:Ggml",
    "torch-all": "torch_recipes:TorchAll",
    "torch-hit": "torch_recipes:TorchHit",
    "ragged-dot": "bfloat16:RaggedDot",
    "jax-bf16": "bfloat16:HitExperts",
}

GPU_CONTENDERS = {
    "triton": "ours:Triton",
    "emulation": "ours:Emulation",
    "torch-bf16-grouped": "torch_grouped:Bfloat16",
    "torch-all-grouped": "torch_grouped:DequantiseAll",
    "ragged-dot-mgpu": "bfloat16:RaggedDotMgpu",
}


def load(name):
    """The contender's class; ModuleNotFoundError if it needs what is not installed."""
    module, attribute = (CONTENDERS | GPU_CONTENDERS)[name].split(":")
    return getattr(importlib.import_module(f"benchmarks.contenders.{module}"), attribute)
