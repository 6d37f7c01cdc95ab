"""Plots the results of `python -m benchmarks layer`: each layer's latency and roofline.

    python -m benchmarks plot benchmarks/results/layer-*.jsonl --output benchmarks/results

`latency-LAYER.svg`: median milliseconds against tokens, quartiles as a band, and the least that the
machine's read bandwidth and its matrix products allow. `roofline-LAYER.svg`: GFLOP/s against FLOP
for each packed byte that a call touches.
"""

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from benchmarks import results

# Okabe and Ito's colours, which the colour-blind can tell apart; and a marker each.
STYLES = {
    "cpu": ("#D55E00", "o", "this package, cpu"),
    "emulation": ("#E69F00", "s", "this package, emulation"),
    "ggml": ("#0072B2", "^", "ggml mul_mat_id (int8 activations)"),
    "torch-all": ("#000000", "X", "torch, all experts dequantised"),
    "torch-hit": ("#56B4E9", "v", "torch, hit experts dequantised"),
    "ragged-dot": ("#009E73", "D", "jax ragged_dot, bf16 weights"),
    "jax-bf16": ("#CC79A7", "P", "jax, hit experts, bf16 weights"),
}
LIMIT = "#666666"
RC = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.hashsalt": "benchmarks",  # the same bytes from the same lines
}


def main(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=_file, nargs="+", help="what `layer --output` wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the plots")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    for layer, (header, lines) in runs(args.results).items():
        for kind, draw in (("latency", latency), ("roofline", roofline)):
            path = args.output / f"{kind}-{layer}.{args.format}"
            with plt.rc_context(RC):
                figure = draw(header, lines)
                metadata = {"Date": None} if args.format == "svg" else None
                figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
                plt.close(figure)
            print(path)


def runs(paths):
    """Each layer's header and timed lines: of one run, as another found another machine."""
    found = {}
    for path in paths:
        header, *lines = results.read(path) or [{}]
        lines = [line for line in lines if "median_ms" in line]
        if "limits" not in header or not lines:
            raise SystemExit(f"{path} has no times of a layer")
        if header["layer"] in found:
            raise SystemExit(f"{path} is a second run of {header['layer']}, expected one of each")
        found[header["layer"]] = header, lines
    return found


# ------------------------------------------------------------------------------------- drawing


def latency(header, lines):
    figure, axes = plt.subplots(figsize=(8, 5.2))
    for name, each in _by_contender(lines):
        colour, marker, label = STYLES[name]
        tokens = [line["tokens"] for line in each]
        low, middle, high = ([line[f"{q}_ms"] for line in each] for q in ("q1", "median", "q3"))
        axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(tokens, middle, color=colour, marker=marker, label=label)
    limit = sorted({line["tokens"]: line["limit_ms"] for line in lines}.items())
    axes.plot(*zip(*limit, strict=True), color=LIMIT, linestyle="--", label="limit of the machine")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds per call")
    _plain_ticks(axes.xaxis, [count for count, _ in limit])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    _finish(axes, header, "latency of one layer, median and quartiles")
    return figure


def roofline(header, lines):
    figure, axes = plt.subplots(figsize=(8, 5.2))
    limits = header["limits"]
    rate = max(limits["float32_gflop_s"], limits["bfloat16_gflop_s"])
    ridge = rate / limits["read_gb_s"]
    at = [line["gflop"] * 1e3 / line["packed_mb"] for line in lines]
    ends = np.array([min(at) / 1.5, ridge, max(*at, ridge) * 1.5])
    roof = np.minimum(rate, ends * limits["read_gb_s"])
    roof_label = (
        f"limit of the machine: {limits['read_gb_s']:.0f} GB/s read,\n"
        f"float32 products {limits['float32_gflop_s']:,.0f} GFLOP/s,\n"
        f"bfloat16 products {limits['bfloat16_gflop_s']:,.0f} GFLOP/s"
    )
    for name, each in _by_contender(lines):
        colour, marker, label = STYLES[name]
        x = [line["gflop"] * 1e3 / line["packed_mb"] for line in each]
        y = [line["gflop"] * 1e3 / line["median_ms"] for line in each]
        axes.plot(x, y, color=colour, marker=marker, label=label)
    axes.plot(ends, roof, color=LIMIT, linestyle="--", label=roof_label)
    axes.set(xscale="log", yscale="log", ylabel="GFLOP/s")
    axes.set_xlabel("FLOP per packed byte (more tokens: further right)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    _finish(axes, header, "what the machine allows, and what is reached")
    return figure


def _by_contender(lines):
    for name in STYLES:
        each = [line for line in lines if line["contender"] == name]
        if each:
            yield name, sorted(each, key=lambda line: line["tokens"])


def _plain_ticks(axis, values):
    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _finish(axes, header, what):
    sizes = "E {experts}, k {top_k}, H {hidden}, I {intermediate}".format(**header)
    machine = "{cores} cores of {cpu}".format(**header)
    axes.set_title(f"{header['layer']}: {what}\n", loc="left", fontweight="bold")
    axes.text(0, 1.02, f"{sizes}; {machine}", transform=axes.transAxes, color=LIMIT)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _file(text):
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return Path(text)
