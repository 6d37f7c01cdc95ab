"""Times the emulation on one MoE layer, beside the recipes it replaces, in one run.

    python -m benchmarks.emulation --layer qwen3-30b --tokens 1 16 256 --output results.jsonl
    python -m benchmarks.emulation --layer qwen3-30b --tokens 1 --peers torch-all jax-bf16
    python -m benchmarks.emulation --layer deepseek-v3 --tokens 4

Weights are arguments of the jitted call. Each figure is the median over repeated calls, the
contenders taking turns, with the fastest and the slowest beside it. A peer is named by --peers:

* `torch-all`: what vLLM's emulation first did (vllm@0.20.0), in torch: quantise and dequantise the
  activations, dequantise every expert to bfloat16, then multiply the hit ones. Needs torch.
* `jax-bf16`: the layer with bfloat16 weights that never were quantised, one matrix product after
  another for each hit expert: 3.6 times the bytes.

Memory: `temp` is what XLA plans beyond arguments and results, `peak` the process's highest resident
size (all contenders together; run without peers to have the emulation's own).
"""

import argparse
import functools
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_nvfp4_moe as nvm

LAYERS = {  # experts, top k, hidden size, intermediate size
    "qwen3-30b": (128, 8, 2048, 768),
    "deepseek-v3": (256, 8, 7168, 2048),
    "small": (16, 4, 512, 256),
}
PEERS = ("torch-all", "jax-bf16")


def random_layer(sizes, scheme, seed=0):
    """Experts of random codes, and scales at which a token keeps its magnitude."""
    num_experts, _, hidden, intermediate = sizes
    key = jax.random.key(seed, impl="rbg")

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def random_bytes(key, shape, low, high):
        """Expert by expert, so that making them takes no more memory than they do."""

        def one(key):
            return jax.random.randint(key, shape, low, high, jnp.int32).astype(jnp.uint8)

        return jax.lax.map(one, jax.random.split(key, num_experts))

    def matrix(rows, columns, gain, groups):
        codes = random_bytes(jax.random.fold_in(key, rows), (rows, columns // 2), 0, 256)
        scale = random_bytes(jax.random.fold_in(key, rows + 1), (rows, columns // 16), 0x60, 0x70)
        std = 3.2 * 40 * columns**0.5  # of a code, of a scale, of their sum
        return nvm.Nvfp4Array(
            codes,
            jax.lax.bitcast_convert_type(scale, jnp.float8_e4m3fn),
            jnp.full(groups, gain / std, jnp.float32),
        )

    static = scheme == "static"
    return nvm.ExpertWeights(
        w13=matrix(2 * intermediate, hidden, 2.0, (num_experts, 2)),
        w2=matrix(hidden, intermediate, 1.0, (num_experts,)),
        input_scale=jnp.float32(6 / 2688) if static else None,
        hidden_scale=jnp.float32(40 / 2688) if static else None,
        w13_bias=None,
        w2_bias=None,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation_scheme=scheme,
        layout="linear",
    )


def random_tokens(sizes, tokens, seed=1):
    num_experts, top_k, hidden, _ = sizes
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.dirichlet(np.ones(top_k), tokens).astype(np.float32)
    x = rng.normal(size=(tokens, hidden)).astype(np.float32)
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(ids), jnp.asarray(weights)


# ------------------------------------------------------------------------------------- contenders


def ours(experts, numerics, tokens):
    run = jax.jit(lambda *args: nvm.nvfp4_moe_routed(*args, numerics=numerics))
    begin = time.perf_counter()
    compiled = run.lower(*tokens, experts).compile()
    facts = {
        "compile_s": round(time.perf_counter() - begin, 2),
        "temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
    }
    return lambda: np.asarray(compiled(*tokens, experts)), facts


def hit_experts(x, ids, weights, w13, w2, intermediate):
    """The layer on the bits of bfloat16 matrices: a product for each (token, slot)."""

    def take(bits, expert):
        return jax.lax.bitcast_convert_type(bits[expert], jnp.bfloat16)

    def pair(token, expert):
        gate, up = jnp.split(take(w13, expert) @ x[token], [intermediate])
        return (take(w2, expert) @ (jax.nn.silu(gate) * up)).astype(jnp.float32)

    def one(token):
        return jax.lax.map(lambda expert: pair(token, expert), ids[token])

    rows = jax.lax.map(one, jnp.arange(len(x)))
    return jnp.einsum("tk,tkh->th", weights, rows).astype(x.dtype)


def jax_bf16(experts, tokens):
    # As integers: to slice bfloat16, XLA:CPU would widen every expert in every call.
    w13, w2 = (
        jax.lax.bitcast_convert_type(nvm.dequantize(w), jnp.uint16)
        for w in (experts.w13, experts.w2)
    )

    @jax.jit
    def run(x, ids, weights, w13, w2):
        return hit_experts(x, ids, weights, w13, w2, experts.intermediate_size)

    return lambda: np.asarray(run(*tokens, w13, w2)), {}


def torch_all(experts, tokens):
    import torch

    def tensor(array):
        return torch.from_numpy(np.array(array))

    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    matrices = [
        (
            tensor(w.data),
            tensor(np.asarray(w.scale).view(np.uint8)).view(torch.float8_e4m3fn),
            tensor(np.asarray(w.global_scale).reshape(w.shape[0], -1)[:, 0]),
        )
        for w in (experts.w13, experts.w2)
    ]
    x = tensor(np.asarray(tokens[0]).astype(np.float32)).bfloat16()
    ids, weights = tensor(tokens[1]).long(), tensor(tokens[2])
    scales = [1 / float(s) for s in (experts.input_scale, experts.hidden_scale)]

    def dequantise(data, scale, gain):
        codes = torch.stack([data & 15, data >> 4], -1).reshape(*data.shape[:2], -1)
        blocks = table[codes.int()].reshape(*scale.shape, 16)
        values = blocks * (scale.float() * gain[:, None, None])[..., None]
        return values.reshape(codes.shape).bfloat16()

    def quantise_dequantise(x, gain):
        blocks = x.float().reshape(len(x), -1, 16)
        scale = (blocks.abs().amax(-1) / 6 * gain).clamp(max=448).to(torch.float8_e4m3fn).float()
        scaled = (blocks * torch.where(scale == 0, 0, gain / scale)[..., None]).clamp(-6, 6)
        bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
        codes = table[torch.bucketize(scaled.abs(), bounds)] * scaled.sign()
        return (codes * (scale / gain)[..., None]).reshape(x.shape).bfloat16()

    @torch.inference_mode()
    def run():
        w13, w2 = (dequantise(*matrix) for matrix in matrices)
        xq = quantise_dequantise(x, scales[0])
        out = torch.zeros(x.shape)
        for expert in ids.unique():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, up = (xq[token] @ w13[expert].T).chunk(2, -1)
            hidden = quantise_dequantise(torch.nn.functional.silu(gate) * up, scales[1])
            rows = (hidden @ w2[expert].T).float() * weights[token, slot][:, None]
            out.index_add_(0, token, rows)
        return out.bfloat16().float().numpy()

    return run, {}


# ------------------------------------------------------------------------------------- measuring


def measure(contenders, calls, seconds):
    """Calls in turn; the times of each in seconds."""
    times = {name: [] for name in contenders}
    for name, run in contenders.items():
        begin = time.perf_counter()
        run()
        if time.perf_counter() - begin > seconds:
            print(f"  {name}: {time.perf_counter() - begin:.1f} s to warm up", file=sys.stderr)
    begin = time.perf_counter()
    for _ in range(calls):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - begin > seconds and len(times[name]) >= 3:
            break
    return times


def read_bandwidth():
    """GB/s at which a sum reads memory: the limit of a call that reads every weight once."""
    array = jnp.ones((1 << 26,), jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        total(array).block_until_ready()
        times.append(time.perf_counter() - begin)
    return array.nbytes / min(times) / 1e9


def machine():
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jax_nvfp4_moe": nvm.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layer", choices=LAYERS, default="qwen3-30b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--scheme", choices=["static", "per_token", "none"], default="static")
    parser.add_argument("--numerics", choices=["kernel", "vllm"], default="kernel")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[])
    parser.add_argument("--calls", type=int, default=11, help="counted calls of each contender")
    parser.add_argument("--seconds", type=float, default=60, help="about how long a batch may take")
    parser.add_argument("--output", type=Path, help="also write the lines to this file")
    args = parser.parse_args()
    if args.peers and args.scheme != "static":
        parser.error("the peers know static activation scales only")

    sizes = LAYERS[args.layer]
    command = "python -m benchmarks.emulation " + " ".join(sys.argv[1:])
    lines = [{"command": command, **machine(), "read_gb_s": round(read_bandwidth(), 1)}]
    print(json.dumps(lines[0]))
    experts = random_layer(sizes, args.scheme)
    for count in args.tokens:
        tokens = random_tokens(sizes, count)
        builders = {
            "emulation": lambda tokens=tokens: ours(experts, args.numerics, tokens),
            "torch-all": lambda tokens=tokens: torch_all(experts, tokens),
            "jax-bf16": lambda tokens=tokens: jax_bf16(experts, tokens),
        }
        built = {name: builders[name]() for name in ("emulation", *args.peers)}
        times = measure({name: run for name, (run, _) in built.items()}, args.calls, args.seconds)
        hits = len(np.unique(np.asarray(tokens[1])))
        packed = hits * experts.nbytes / sizes[0]
        flops = 2 * count * sizes[1] * 3 * sizes[2] * sizes[3]
        want = np.asarray(built["emulation"][0]()).astype(np.float64)
        for name, (run, facts) in built.items():
            got = np.asarray(run()).astype(np.float64)
            median = float(np.median(times[name]))
            lines.append(
                {
                    "layer": args.layer,
                    "scheme": args.scheme,
                    "numerics": args.numerics,
                    "tokens": count,
                    "contender": name,
                    "median_ms": round(1e3 * median, 2),
                    "min_ms": round(1e3 * min(times[name]), 2),
                    "max_ms": round(1e3 * max(times[name]), 2),
                    "calls": len(times[name]),
                    "packed_mb": round(packed / 1e6, 1),
                    "packed_gb_s": round(packed / median / 1e9, 2),
                    "gflop_s": round(flops / median / 1e9, 1),
                    "difference": float(f"{np.linalg.norm(got - want) / np.linalg.norm(want):.1e}"),
                    **facts,
                    "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
                }
            )
            print(json.dumps(lines[-1]), flush=True)
    if args.output:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with tempfile.NamedTemporaryFile("w", dir=args.output.parent, delete=False) as file:
            file.write(text)
        Path(file.name).replace(args.output)


if __name__ == "__main__":
    main()
