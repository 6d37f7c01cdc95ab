"""Times decoding with the language model of examples/, for each implementation of its experts.

    python -m benchmarks decode --layers 4 --output benchmarks/results/decode-qwen3-30b.jsonl
    python -m benchmarks decode --model examples/models/qwen3-moe-tiny-nvfp4

Without --model it uses --layers of Qwen3-30B-A3B's 48 layers, with random weights and the same
fraction of its vocabulary, so that a step costs that fraction of the whole model's. (In the
example's tiny model the experts, 0.2 MB a layer, take little of the time.)

All models share their weights. They take turns of --tokens tokens, decoded greedily one at a time,
as in the example. "none" has no experts: its time is the lower bound for the others.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

import jax_nvfp4_moe as nvm
from benchmarks import machine, measuring, results
from benchmarks.contenders.ours import random_experts
from benchmarks.layers import LAYERS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import generate
import qwen3_moe

LAYER = LAYERS["qwen3-30b"]
IMPLEMENTATIONS = "cpu", "emulation", "none"
# Of Qwen3-30B-A3B's config.json.
NUM_LAYERS, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 48, 151_936, 32, 4, 128
PROMPT = 16  # tokens


def random_tensors(num_layers, dtype):
    """All that is not an expert, by the names of a checkpoint, at which x keeps its magnitude."""
    keys = iter(jax.random.split(jax.random.key(0), 5 * num_layers + 1))
    hidden = LAYER.hidden

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def matrix(key, rows, columns):
        return jax.random.normal(key, (rows, columns), dtype) / columns**0.5

    vocabulary = VOCABULARY * num_layers // NUM_LAYERS
    yield "model.embed_tokens.weight", matrix(next(keys), vocabulary, hidden) * hidden**0.5
    yield "model.norm.weight", jnp.ones(hidden, dtype)
    for index in range(num_layers):
        prefix = f"model.layers.{index}"
        for name, rows, columns in (
            ("q", HEADS * HEAD_DIM, hidden),
            ("k", KV_HEADS * HEAD_DIM, hidden),
            ("v", KV_HEADS * HEAD_DIM, hidden),
            ("o", hidden, HEADS * HEAD_DIM),
        ):
            yield f"{prefix}.self_attn.{name}_proj.weight", matrix(next(keys), rows, columns)
        for name, size in (
            ("self_attn.q_norm", HEAD_DIM),
            ("self_attn.k_norm", HEAD_DIM),
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
        ):
            yield f"{prefix}.{name}.weight", jnp.ones(size, dtype)


def random_model(num_layers, dtype):
    """The example's model."""
    routing = nvm.Routing("renormalize_naive", top_k=LAYER.top_k)
    experts = random_experts(LAYER, "static")
    layers = {}
    for index in range(num_layers):
        router = jax.random.normal(jax.random.key(index), (LAYER.experts, LAYER.hidden), dtype)
        layers[index] = nvm.MoeLayer(
            nvm.Router(router / LAYER.hidden**0.5, routing),
            jax.tree.map(jnp.copy, experts),
            nvm.Activation("silu"),
        )
    config = qwen3_moe.Config(num_layers, KV_HEADS, HEAD_DIM, 1e6, 1e-6, routing)
    return qwen3_moe.Qwen3Moe(config, dict(random_tensors(num_layers, dtype)), layers, dtype)


class NoExperts(nnx.Module):
    """A block that adds nothing."""

    def __call__(self, x):
        return jnp.zeros_like(x)


def with_experts(model, implementation):
    """The model, with the same weights, and its experts computed so, or left out."""
    model = nnx.clone(model)
    for layer in model.layers:
        if implementation == "none":
            layer.moe = NoExperts()
        else:
            layer.moe.implementation = implementation
    return model


class Decoder:
    """A model with one implementation of its experts, as `measuring.turns` wants contenders."""

    def __init__(self, name, model, texts, tokens):
        self.name, self.model = name, with_experts(model, name)
        self.texts, self.tokens = texts, tokens

    def burst(self, seconds):
        """Seconds of each step but the first, which reads the prompts."""
        tokens = jax.random.randint(jax.random.key(1), (self.texts, PROMPT), 0, 1000)
        state = tokens, self.model.empty_cache(self.texts, PROMPT + self.tokens), jnp.int32(0)
        times = []
        for _ in range(1 + self.tokens):
            begin = time.perf_counter()
            state = generate.step(self.model, *state, jax.random.key(0), 0.0, 1)
            state[0].block_until_ready()
            times.append(time.perf_counter() - begin)
        return times[1:]


def measured(model, texts, args, console):
    """A line for each implementation."""
    decoders = [Decoder(name, model, texts, args.tokens) for name in IMPLEMENTATIONS]
    with console.status(f"{texts} texts: compiling"):
        for decoder in decoders:
            decoder.burst(0)
    neighbours = machine.Neighbours([])
    with console.status(f"{texts} texts: decoding") as status:
        times = measuring.turns(decoders, args.turns, 0, float("inf"), status.update)
    lines = [
        {
            "implementation": name,
            "texts": texts,
            "steps": len(times[name]),
            **measuring.spread(times[name]),
            "others_share": round(neighbours.share(), 3),
        }
        for name in IMPLEMENTATIONS
    ]
    fastest = lines[0]["median_ms"]
    return [{**line, "times_as_long": round(line["median_ms"] / fastest, 2)} for line in lines]


def main(arguments):
    args = _parser().parse_args(arguments)
    console = Console(stderr=True)
    dtype = jnp.dtype(args.dtype)
    with console.status("making the model"):
        if args.model is None:
            model = random_model(args.layers, dtype)
        else:
            model = qwen3_moe.load(args.model, dtype=dtype)
    header = {
        "command": results.command_line("decode", arguments),
        **machine.describe(),
        "layers": len(model.layers),
        "vocabulary": len(model.embed[...]),
        "dtype": dtype.name,
    }
    lines = [header]
    for texts in args.texts:
        lines += measured(model, texts, args, console)
        for line in lines[-len(IMPLEMENTATIONS) :]:
            print(json.dumps(line), flush=True)
    if args.output:
        results.write(args.output, lines)


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=4, help="of 48 (default: 4)")
    parser.add_argument("--model", type=Path, help="a folder with a checkpoint, instead")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of all but the experts (default: bfloat16, as in Qwen3-30B-A3B's checkpoint)",
    )
    parser.add_argument("--tokens", type=int, default=16, help="of a turn (default: 16)")
    parser.add_argument("--turns", type=int, default=6, help="default: 6")
    parser.add_argument(
        "--texts", type=int, nargs="+", default=[1, 16], help="written at once (default: 1 16)"
    )
    results.add_output(parser)
    return parser
