"""One MoE layer of Qwen3-30B-A3B's size in NVFP4, quantised and run under jit on this machine.

    python examples/qwen3_layer.py [--tokens 1 16]

It makes random bfloat16 experts (1.2 GB), quantises them, runs the layer, and prints the error
against float64 and bfloat16, the time of a call, and the bytes of weights that it reads. It needs
only the core dependencies, and about 5 GB of memory.
"""

import argparse
import dataclasses
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

import jax_nvfp4_moe as nvm

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
ROUTING = nvm.Routing("renormalize_naive", top_k=TOP_K)


@contextmanager
def step(what):
    """Prints a step and its time."""
    print(f"{what:<58}", end="", flush=True)
    begin = time.perf_counter()
    yield
    print(f"{time.perf_counter() - begin:6.1f} s")


@jax.jit
def random_experts(key):
    """Returns random bfloat16 gate, up and down matrices that preserve a token's magnitude."""

    def matrix(key, rows, columns, std):
        return std * jax.random.normal(key, (NUM_EXPERTS, rows, columns), jnp.bfloat16)

    gate, up, down = jax.random.split(key, 3)
    return (
        matrix(gate, INTERMEDIATE, HIDDEN, 2 * HIDDEN**-0.5),
        matrix(up, INTERMEDIATE, HIDDEN, 2 * HIDDEN**-0.5),
        matrix(down, HIDDEN, INTERMEDIATE, INTERMEDIATE**-0.5),
    )


def float64_layer(x, ids, weights, experts_of):
    """Returns the layer's output in float64; `experts_of(e)` is an expert's gate, up and down."""
    out = np.zeros(x.shape)
    for token, slot in np.ndindex(*ids.shape):
        gate, up, down = (np.asarray(w).astype(np.float64) for w in experts_of(ids[token, slot]))
        g, u = gate @ x[token], up @ x[token]
        out[token] += weights[token, slot] * (down @ (g / (1 + np.exp(-g)) * u))
    return out


@jax.jit
def bfloat16_layer(x, ids, weights, gate, up, down):
    """Returns the layer's output in bfloat16, rounded after every step."""

    def pair(token, expert):
        hidden = jax.nn.silu(gate[expert] @ x[token]) * (up[expert] @ x[token])
        return down[expert] @ hidden

    tokens = jnp.arange(len(x))
    rows = jax.lax.map(lambda t: jax.lax.map(lambda e: pair(t, e), ids[t]), tokens)
    return jnp.einsum("tk,tkh->th", weights, rows.astype(jnp.float32)).astype(jnp.bfloat16)


def dequantised(experts, index):
    """Returns one expert's dequantised gate, up and down in float32."""
    one = jax.tree.map(lambda leaf: leaf[index], (experts.w13, experts.w2))
    w13, w2 = (nvm.dequantize(matrix, jnp.float32) for matrix in one)
    return w13[:INTERMEDIATE], w13[INTERMEDIATE:], w2


def error(got, want):
    """Returns the relative L2 error."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def median_time(run, *args):
    """Returns the median, the fastest and the slowest of nine calls, in seconds."""
    run(*args).block_until_ready()
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        run(*args).block_until_ready()
        times.append(time.perf_counter() - begin)
    return np.median(times), min(times), max(times)


def main():
    """Quantises the experts, runs the layer, compares and times it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16], help="batch sizes to run")
    tokens = parser.parse_args().tokens

    key = jax.random.key(0, impl="rbg")  # the default takes twice the memory
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; one layer of Qwen3-30B-A3B:")
    print(f"  {NUM_EXPERTS} experts, top {TOP_K}, hidden {HIDDEN}, intermediate {INTERMEDIATE}\n")
    with step("random bfloat16 experts"):
        gate, up, down = jax.block_until_ready(random_experts(key))
    with step("quantise to NVFP4"):
        experts = jax.block_until_ready(nvm.quantize_experts(gate, up, down))
        nvm.validate(experts)
    dense = sum(w.nbytes for w in (gate, up, down))
    print(f"  {dense / 1e6:.0f} MB -> {experts.nbytes / 1e6:.0f} MB\n")
    print(nvm.explain(experts, ROUTING, tokens=tokens[0]), "\n")

    weights_only = dataclasses.replace(experts, activation_scheme="none")
    layer = jax.jit(lambda x, logits, experts: nvm.nvfp4_moe(x, logits, experts, ROUTING))
    for count in tokens:
        x_key, logits_key = jax.random.split(jax.random.fold_in(key, count))
        x = jax.random.normal(x_key, (count, HIDDEN)).astype(jnp.bfloat16)
        logits = 2 * jax.random.normal(logits_key, (count, NUM_EXPERTS))
        ids, weights = nvm.route(logits, ROUTING)
        some = slice(0, 4)  # float64 is slow
        args = np.asarray(x[some]).astype(np.float64), np.asarray(ids[some]), np.asarray(weights)
        exact = float64_layer(*args, lambda e: (gate[e], up[e], down[e]))
        same_weights = float64_layer(*args, lambda e: dequantised(experts, e))
        plain = bfloat16_layer(x[some], ids[some], weights[some], gate, up, down)
        w4a4 = layer(x, logits, experts)[some]
        w4a16 = layer(x.astype(jnp.float32), logits, weights_only)[some]
        median, fastest, slowest = median_time(layer, x, logits, experts)
        hits = len(np.unique(np.asarray(ids)))
        read = hits * experts.nbytes / NUM_EXPERTS

        print(f"{count} token{'s' * (count > 1)}, relative L2 error")
        print(f"  W4A16 to float64 on the same NVFP4 weights   {error(w4a16, same_weights):.1e}")
        print(f"  W4A4 to float64 on the bfloat16 weights      {error(w4a4, exact):.1e}")
        print(f"  W4A4 to a bfloat16 layer                     {error(w4a4, plain):.1e}")
        print(f"  that bfloat16 layer to float64               {error(plain, exact):.1e}")
        print(
            f"  {median * 1e3:.1f} ms a call ({fastest * 1e3:.1f} to {slowest * 1e3:.1f}); "
            f"{hits} experts hit, {read / 1e6:.1f} MB of packed weights "
            f"({read * 16 / 4.5 / 1e6:.0f} MB in bfloat16)\n"
        )


if __name__ == "__main__":
    main()
