"""Text from a Qwen3-MoE model in NVFP4, and its perplexity beside the original's.

    python examples/generate.py [DIRECTORY] [--prompt TEXT] [--tokens 64] [--temperature 0.5] ...

Without arguments: a tiny model that comes with the repository, trained on Python documentation.
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
WINDOW = 256  # tokens; perplexity is over such pieces, each on its own
SEPARATOR = "\n<|endoftext|>\n"  # between the texts of a held-out file


@functools.partial(jax.jit, static_argnames=("temperature", "top_k"), donate_argnames="cache")
def step(model, tokens, cache, start, key, temperature, top_k):
    """Reads tokens [B, T], of which `start` precede them, and chooses the next ones [B, 1]."""
    logits, cache = model(tokens, cache, start)
    best, ids = lax.top_k(logits[:, -1], top_k or logits.shape[-1])
    if temperature:
        choice = jax.random.categorical(key, best / temperature)[:, None]
        ids = jnp.take_along_axis(ids, choice, axis=1)
    return ids[:, :1], cache, start + tokens.shape[1]


def generate(model, prompt, count, *, temperature=0.5, top_k=40, seed=0):
    """Yields `count` tokens that follow those of the prompt, each as soon as it is there."""
    tokens, start = jnp.asarray([prompt]), jnp.int32(0)
    cache = model.empty_cache(1, len(prompt) + count)
    for key in jax.random.split(jax.random.key(seed), count):
        tokens, cache, start = step(model, tokens, cache, start, key, temperature, top_k)
        yield int(tokens[0, 0])


def stream(tokens, tokenizer):
    """Prints tokens as they come; returns how many, and how many a second after the first."""
    begin, shown, ids = 0.0, "", []
    for token in tokens:
        ids.append(token)
        begin = begin or time.perf_counter()
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # else a character has begun, whose rest is to come
            print(text.removeprefix(shown), end="", flush=True)
            shown = text
    return len(ids), (len(ids) - 1) / max(time.perf_counter() - begin, 1e-9)


@jax.jit
def log_likelihood(model, windows):
    """The sum over all tokens of windows [N, T] but the first of each."""

    def one(window):
        logits, _ = model(window[None])
        followed = jax.nn.log_softmax(logits[0, :-1])
        return jnp.take_along_axis(followed, window[1:, None], axis=1).sum()

    return lax.map(one, windows).sum()


def perplexity(model, tokenizer, text, start):
    """Of texts cut into windows of 256 tokens, and how many windows; `start` precedes each text."""
    texts = text.removesuffix("\n").split(SEPARATOR)
    ids = [token for part in texts for token in (*start, *tokenizer.encode(part).ids)]
    windows = np.array(ids[: len(ids) // WINDOW * WINDOW], np.int32).reshape(-1, WINDOW)
    total = float(log_likelihood(model, jnp.asarray(windows)))
    return math.exp(-total / windows[:, 1:].size), len(windows)


def described(model, directory):
    """One line on a model."""
    moe = model.layers[0].moe
    if isinstance(moe, Nvfp4MoE):
        num_experts = moe.experts.num_experts
        kind = f"NVFP4 experts, activation scheme {moe.experts.activation_scheme}"
    else:
        num_experts, kind = len(moe.gate[...]), "not quantised"
    sizes = f"{len(model.layers)} layers of {num_experts} experts, top {model.config.routing.top_k}"
    return f"{directory.name}: {sizes}, {kind}"


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("directory", type=Path, nargs="?", default=MODELS / "qwen3-moe-tiny-nvfp4")
    add("--prompt", default="If the file does not exist,")
    add("--tokens", type=int, default=64, help="how many to write")
    add("--temperature", type=float, default=0.5, help="0 takes the most likely token")
    add("--top-k", type=int, default=40, help="choose among so many tokens; 0 means all")
    add("--seed", type=int, default=1)
    add("--original", type=Path, help="the model before quantisation, for its perplexity")
    add("--held-out", type=Path, help="text for the perplexity")
    add("--activations", choices=("static", "per_token", "none"), help="default: as in the files")
    add("--implementation", choices=("cpu", "emulation"), help="of the experts; default: the best")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="but for experts")
    args = parser.parse_args()
    if args.directory.parent == MODELS:
        args.original = args.original or MODELS / "qwen3-moe-tiny-bf16"
        args.held_out = args.held_out or MODELS / "held_out.txt"
    return args


def main():
    """Generates, counts, compares."""
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
    list(itertools.islice(tokens(), 2))  # compiles: once for the prompt, once for single tokens
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
