"""Generates text with a Qwen3-MoE model in NVFP4, and compares its perplexity with the original's.

    python examples/generate.py [DIRECTORY] [--prompt TEXT] [--tokens 64] [--temperature 0.5] ...

The default is a tiny model from the repository, trained on Python's documentation.
Needs the extra `examples`.
"""

import argparse
import functools
import itertools
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import qwen3_moe
from jax import lax
from tokenizers import Tokenizer

from jax_nvfp4_moe.flax.nnx import Nvfp4MoE

MODELS = Path(__file__).parent / "models"
WINDOW = 256  # tokens; perplexity is measured over windows of this length, each by itself
SEPARATOR = "\n<|endoftext|>\n"  # between the texts of a held-out file


@functools.partial(jax.jit, static_argnames=("temperature", "top_k"), donate_argnames="cache")
def step(model, tokens, cache, start, key, temperature, top_k):
    """Returns the next tokens [B, 1] after tokens [B, T], which follow `start` cached ones."""
    logits, cache = model(tokens, cache, start)
    best, ids = lax.top_k(logits[:, -1], top_k or logits.shape[-1])
    if temperature:
        choice = jax.random.categorical(key, best / temperature)[:, None]
        ids = jnp.take_along_axis(ids, choice, axis=1)
    return ids[:, :1], cache, start + tokens.shape[1]


def generate(model, prompt, count, *, temperature=0.5, top_k=40, seed=0):
    """Yields `count` tokens that follow the prompt, each as soon as it is known."""
    tokens, start = jnp.asarray([prompt]), jnp.int32(0)
    cache = model.empty_cache(1, len(prompt) + count)
    for key in jax.random.split(jax.random.key(seed), count):
        tokens, cache, start = step(model, tokens, cache, start, key, temperature, top_k)
        yield int(tokens[0, 0])


def stream(tokens, tokenizer):
    """Prints tokens as they arrive; returns their number, and the rate after the first one."""
    begin, shown, ids = 0.0, "", []
    for token in tokens:
        ids.append(token)
        begin = begin or time.perf_counter()
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # otherwise a character is incomplete
            print(text.removeprefix(shown), end="", flush=True)
            shown = text
    return len(ids), (len(ids) - 1) / max(time.perf_counter() - begin, 1e-9)


@jax.jit
def log_likelihood(model, windows):
    """Returns the log likelihood of windows [N, T], summed over all tokens but each first one."""

    def one(window):
        logits, _ = model(window[None])
        followed = jax.nn.log_softmax(logits[0, :-1])
        return jnp.take_along_axis(followed, window[1:, None], axis=1).sum()

    return lax.map(one, windows).sum()


def perplexity(model, tokenizer, text, start):
    """Returns the perplexity over windows of 256 tokens, and their number.

    `start` holds the tokens that precede each text.
    """
    texts = text.removesuffix("\n").split(SEPARATOR)
    ids = [token for part in texts for token in (*start, *tokenizer.encode(part).ids)]
    windows = np.array(ids[: len(ids) // WINDOW * WINDOW], np.int32).reshape(-1, WINDOW)
    total = float(log_likelihood(model, jnp.asarray(windows)))
    return math.exp(-total / windows[:, 1:].size), len(windows)


def described(model, directory):
    """Returns one line that describes a model."""
    moe = model.layers[0].moe
    if isinstance(moe, Nvfp4MoE):
        num_experts = moe.experts.num_experts
        kind = f"NVFP4 experts, activation scheme {moe.experts.activation_scheme}"
    else:
        num_experts, kind = len(moe.gate[...]), "not quantised"
    sizes = f"{len(model.layers)} layers of {num_experts} experts, top {model.config.routing.top_k}"
    return f"{directory.name}: {sizes}, {kind}"


def arguments():
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("directory", type=Path, nargs="?", default=MODELS / "qwen3-moe-tiny-nvfp4")
    add("--prompt", default="If the file does not exist,")
    add("--tokens", type=int, default=64, help="number of tokens to generate")
    add("--temperature", type=float, default=0.5, help="0: the most likely token")
    add("--top-k", type=int, default=40, help="sample from this many tokens; 0: all")
    add("--seed", type=int, default=1)
    add("--original", type=Path, help="the unquantised model, to compare the perplexity")
    add("--held-out", type=Path, help="text to measure the perplexity on")
    add(
        "--activations",
        choices=("static", "per_token", "none"),
        help="activation scheme; default: the files'",
    )
    add("--implementation", choices=("cpu", "emulation"), help="of the experts; default: automatic")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of everything but the experts",
    )
    args = parser.parse_args()
    if args.directory.parent == MODELS:
        args.original = args.original or MODELS / "qwen3-moe-tiny-bf16"
        args.held_out = args.held_out or MODELS / "held_out.txt"
    return args


def main():
    """Generates text, and measures the rate and the perplexity."""
    args = arguments()
    load = functools.partial(qwen3_moe.load, dtype=jnp.dtype(args.dtype))
    model = load(args.directory, activation_scheme=args.activations)
    for block in model.layers:
        if isinstance(block.moe, Nvfp4MoE):
            block.moe.implementation = args.implementation
    tokenizer = Tokenizer.from_file(str(args.directory / "tokenizer.json"))
    begin = json.loads((args.directory / "config.json").read_text("utf-8")).get("bos_token_id")
    begin = [] if begin is None else [begin]
    print(f"{described(model, args.directory)}; {args.dtype} elsewhere, on {jax.devices()[0]}\n")

    prompt = [*begin, *tokenizer.encode(args.prompt).ids]
    options = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    tokens = functools.partial(generate, model, prompt, args.tokens, **options)
    list(itertools.islice(tokens(), 2))  # compiles for the prompt, and for single tokens
    print(args.prompt, end="", flush=True)
    count, rate = stream(tokens(), tokenizer)
    print(f"\n\n{count} tokens, {rate:.0f} a second (without compiling and the prompt)")

    if args.held_out is None:
        return
    text = args.held_out.read_text("utf-8")
    print(f"\nPerplexity of {args.held_out.name}, in windows of {WINDOW} tokens")
    models = {args.directory: model}
    if args.original is not None:
        models[args.original] = load(args.original)
    for directory, each in models.items():
        value, windows = perplexity(each, tokenizer, text, begin)
        print(f"  {directory.name:<24} {value:7.3f}  ({windows} windows)")


if __name__ == "__main__":
    main()
