"""What computes a layer: by name, each in a module of its own that is imported when it is used."""

import importlib

CONTENDERS = {
    "cpu": "ours:Cpu",
    "emulation": "ours:Emulation",
    "ggml": "ggml:Ggml",
    "torch-all": "torch_recipes:TorchAll",
    "torch-hit": "torch_recipes:TorchHit",
    "ragged-dot": "bfloat16:RaggedDot",
    "jax-bf16": "bfloat16:HitExperts",
}


def load(name):
    """The contender's class; ModuleNotFoundError if it needs what is not installed."""
    module, attribute = CONTENDERS[name].split(":")
    return getattr(importlib.import_module(f"benchmarks.contenders.{module}"), attribute)
