"""Measures the time and the peak memory of loading one MoE layer of a checkpoint from disk.

    python -m benchmarks loading --layer deepseek-v3 --output results.jsonl
    python -m benchmarks loading --layer qwen3-30b --directory /mnt/disk --runs 5

It writes a temporary checkpoint of random codes and valid scales in ModelOpt's format, and loads
its layer in a new process each time, cold (its files dropped from the page cache) and warm.
`stack` is the usual recipe instead of `load_experts`: read all tensors as NumPy arrays, stack
them, put them on the device. Each figure is the median over processes, with the smallest and the
largest.

Memory: `peak` is the process's highest resident size (VmHWM) minus its resident size just before
loading, as a multiple of the loaded bytes; the limit for `load_experts` is 1.2. `read_gb` is what
was read from the disk rather than the page cache.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import jax_nvfp4_moe as nvm
from benchmarks import machine, results
from benchmarks.layers import LAYERS
from benchmarks.memory import status
from jax_nvfp4_moe.checkpoint.files import TensorFiles
from jax_nvfp4_moe.checkpoint.writing import write_json, write_tensors

LAYER = 3  # as in DeepSeek-V3, whose first three are dense
BLOCK = f"model.layers.{LAYER}.mlp.experts"
ROLES = ("gate", "up", "down")
LIMIT = 1.2
SHARDS = 12


# ------------------------------------------------------------------------------------- writing


def random_tensors(sizes, seed=0):
    """Expert by expert, as exporters order them."""
    hidden, intermediate = sizes.hidden, sizes.intermediate
    rng = np.random.default_rng(seed)

    def random_bytes(rows, columns):
        return np.frombuffer(rng.bytes(rows * columns), np.uint8).reshape(rows, columns)

    for expert in range(sizes.experts):
        for role in ROLES:
            shape = (hidden, intermediate) if role == "down" else (intermediate, hidden)
            name = f"{BLOCK}.{expert}.{role}_proj"
            scale = random_bytes(shape[0], shape[1] // 16) & 15 | 0x60
            yield f"{name}.weight", random_bytes(shape[0], shape[1] // 2)
            yield f"{name}.weight_scale", scale.view(jax.numpy.float8_e4m3fn)
            yield f"{name}.weight_scale_2", np.float32(rng.uniform(1e-4, 2e-4))
            yield f"{name}.input_scale", np.float32(rng.uniform(1e-3, 2e-3))


def write(directory, sizes):
    write_tensors(directory, random_tensors(sizes), packed_bytes(sizes) // SHARDS)
    config = {
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "moe_intermediate_size": sizes.intermediate,
        "n_group": 8,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": sizes.top_k,
        "num_hidden_layers": 61,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    }
    write_json(directory / "config.json", config)
    for file in directory.iterdir():  # only what is on the disk can be dropped from the cache
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def packed_bytes(sizes):
    return sizes.experts * 3 * (sizes.hidden * sizes.intermediate * 9 // 16 + 8)


# ------------------------------------------------------------------------------------- contenders


def load_experts(directory):
    return nvm.load_experts(directory, layer=LAYER, progress=True)


def stack(directory):
    """Everything, then one array after another."""
    # Not safetensors' own loaders for NumPy and Flax, which fail at float8 (0.8.0).
    files = TensorFiles(directory)
    tensors = {name: files.array(name) for name in files}
    count = len(tensors) // 12

    def stacked(part, *roles):
        matrices = [[tensors[f"{BLOCK}.{e}.{r}_proj.{part}"] for r in roles] for e in range(count)]
        array = np.stack([np.concatenate(rows) for rows in matrices])
        return jax.block_until_ready(jax.device_put(array))

    def matrix(*roles):
        global_scale = np.stack(
            [[tensors[f"{BLOCK}.{e}.{r}_proj.weight_scale_2"] for r in roles] for e in range(count)]
        )
        return nvm.Nvfp4Array(
            stacked("weight", *roles), stacked("weight_scale", *roles), jax.device_put(global_scale)
        )

    return matrix("gate", "up"), matrix("down")


CONTENDERS = {"load_experts": load_experts, "stack": stack}


def disk_bytes():
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])


def child(contender, directory):
    """One load in this process; a line of figures on stdout."""
    jax.block_until_ready(jax.device_put(0))
    resident, read = status("VmRSS"), disk_bytes()
    begin = time.perf_counter()
    experts = jax.block_until_ready(CONTENDERS[contender](directory))
    seconds = time.perf_counter() - begin
    figures = {"s": seconds, "peak": status("VmHWM") - resident, "read": disk_bytes() - read}
    first = experts.w13 if contender == "load_experts" else experts[0]
    check(np.asarray(first.data[-1]), directory)
    print(json.dumps(figures))


def check(rows, directory):
    """The last expert's gate and up are those on the disk."""
    files = TensorFiles(directory)
    last = max(int(name.split(".")[5]) for name in files)
    for role, found in zip(ROLES, np.split(rows, 2), strict=False):
        assert np.array_equal(files.array(f"{BLOCK}.{last}.{role}_proj.weight"), found)


# ------------------------------------------------------------------------------------- measuring


def drop_from_cache(directory):
    for file in directory.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(contender, cache, directory, runs):
    found = []
    for _ in range(runs):
        if cache == "cold":
            drop_from_cache(directory)
        command = [sys.executable, "-m", "benchmarks", "loading", "--child", contender]
        done = subprocess.run(
            [*command, "--directory", str(directory)],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        found.append(json.loads(done.stdout))
    return found


def main(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks loading", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--layer", choices=LAYERS, default="deepseek-v3")
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary one")
    parser.add_argument("--runs", type=int, default=3, help="processes for each figure")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--output", type=Path, help="also append the lines to this file")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child, args.directory)
        return

    sizes = LAYERS[args.layer]
    size = packed_bytes(sizes)
    lines = [{"command": results.command_line("loading", arguments), **machine.describe()}]
    print(json.dumps(lines[0]))
    directory = Path(tempfile.mkdtemp(prefix="loading-", dir=args.directory))
    try:
        free = shutil.disk_usage(directory).free
        if free < 2 * size:
            parser.error(f"{directory} has {free / 1e9:.1f} GB free, expected {2 * size / 1e9:.1f}")
        begin = time.perf_counter()
        write(directory, sizes)
        print(f"  wrote {size / 1e9:.2f} GB: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
        for contender in args.contenders:
            for cache in ("cold", "warm"):
                found = measure(contender, cache, directory, args.runs)
                seconds, peaks = sorted(f["s"] for f in found), [f["peak"] / size for f in found]
                median = float(np.median(seconds))
                lines.append(
                    {
                        "layer": args.layer,
                        "contender": contender,
                        "cache": cache,
                        "packed_gb": round(size / 1e9, 3),
                        "median_s": round(median, 2),
                        "min_s": round(seconds[0], 2),
                        "max_s": round(seconds[-1], 2),
                        "runs": args.runs,
                        "packed_gb_s": round(size / median / 1e9, 2),
                        "read_gb": round(max(f["read"] for f in found) / 1e9, 2),
                        "peak": round(max(peaks), 3),
                        "peak_min": round(min(peaks), 3),
                    }
                )
                print(json.dumps(lines[-1]), flush=True)
    finally:
        shutil.rmtree(directory)
    if args.output:
        with args.output.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    ours = [line["peak"] for line in lines[1:] if line["contender"] == "load_experts"]
    if ours and max(ours) > LIMIT:
        sys.exit(f"peak {max(ours)} is over {LIMIT}")
