"""Times a layer on the CPU, beside other implementations.

    python -m benchmarks layer --layer qwen3-30b --tokens 1 16 256 --output results.jsonl
    python -m benchmarks layer --layer deepseek-v3 --tokens 1 512 --contenders cpu emulation ggml

Contenders run one at a time on the cores that this process may use (`taskset` limits them), each
in its own process. Weights are larger than the cache, and calls cycle through them. Before timing,
a contender's result is compared with the emulation's; the run ends if they differ by more than the
arithmetic explains. A product of bfloat16 matrices (torch's, if it is installed) takes turns too:
`product_gflop_s` is its median rate, and `of_product` a contender's rate divided by it.

Memory: `peak_mb` is the amount by which the first call raised the resident size of a separate
process that already had weights, tokens and compiled programs; `temp_mb` is the memory that XLA
plans.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import layers, machine, measuring, memory, results, tables
from benchmarks.contenders import CONTENDERS
from benchmarks.contenders.base import Unavailable
from benchmarks.process import Contender, Timed

TOKENS = (1, 2, 4, 16, 64, 256, 1024, 4096)
TOLERATED = 0.05  # of the cores, used by others while times are taken


def main(arguments):
    if not sys.platform.startswith("linux"):
        raise SystemExit(f"memory and load are read from /proc, which {sys.platform} does not have")
    args = _parser().parse_args(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that are to come
    run = Run(layers.LAYERS[args.layer], args.scheme, args.turns, args.burst, args.seconds)
    header = {
        "command": results.command_line("layer", arguments),
        **machine.describe(),
        **run.describe(),
        "load": round(os.getloadavg()[0], 2),
        "limits": {},
        "limits_each": [],
    }
    console, lines = Console(stderr=True), []
    try:
        _measure_machine(header, console)
        peaks = run.peaks(args.contenders, args.tokens, console)
        run.start(args.contenders, console)
        for tokens in args.tokens:
            lines += run.measure(tokens, peaks, console)
            _measure_machine(header, console)
            for line in lines:
                line.update(measuring.rates(run.layer, line, header["limits"]))
            tables.show([line for line in lines if line["tokens"] == tokens], run.layer.name)
            if args.output:
                results.write(args.output, [header, *lines])
    finally:
        run.close()


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks layer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--layer",
        choices=layers.LAYERS,
        default="qwen3-30b",
        metavar="NAME",
        help=f"one of {', '.join(layers.LAYERS)} (default: qwen3-30b)",
    )
    parser.add_argument(
        "--tokens",
        type=_positive,
        nargs="+",
        default=TOKENS,
        metavar="T",
        help=f"default: {' '.join(map(str, TOKENS))}",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=[*CONTENDERS],
        metavar="NAME",
        help=f"default: all, which are {', '.join(CONTENDERS)}",
    )
    parser.add_argument(
        "--scheme",
        choices=["static", "per_token", "none"],
        default="static",
        help="how this package's contenders quantise activations (default: static)",
    )
    parser.add_argument("--turns", type=_positive, default=10, help="default: 10")
    parser.add_argument(
        "--burst",
        type=float,
        default=0.3,
        help="how long a contender calls in its turn; one call at least (default: 0.3)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=40,
        help="after so many of calls for one T, a contender gets no more turns (default: 40)",
    )
    results.add_output(parser)
    return parser


def _measure_machine(header, console):
    """Its limits, once more: what it can is the best that was seen, as neighbours come and go."""
    with console.status("measuring the machine"):
        found = _in_a_process(machine.limits)
    header["limits_each"].append(found)
    for name, rate in found.items():
        header["limits"][name] = max(rate, header["limits"].get(name, rate))


class Run:
    """The contenders of one run, and what is the same for all of them."""

    def __init__(self, layer, scheme, turns, burst, seconds):
        self.layer, self.scheme = layer, scheme
        self.turns, self.burst, self.seconds = turns, burst, seconds
        self.cache = machine.cache_bytes()
        self.copies = layer.copies(self.cache)
        self.contenders, self.refused = [], {}
        self.emulation = None  # what the others are compared with
        self.product = None

    def describe(self):
        return {**self.layer.describe(), "copies": self.copies, "scheme": self.scheme}

    def peaks(self, names, tokens, console):
        """Bytes, by contender and number of tokens, of processes that only measure their memory."""
        found = {}
        for name in names:
            with (
                contextlib.suppress(Unavailable),
                memory.returned_at_once(),
                contextlib.closing(self._contender(name)) as contender,
            ):
                for count in tokens:
                    with console.status(f"{name}, T = {count}: its memory"):
                        contender.prepare(count, self.cache)
                        found[name, count] = contender.peak()
        return found

    def start(self, names, console):
        """Makes the weights, one contender after another."""
        self.product = Timed("product", machine.MatrixProduct)
        for name in dict.fromkeys(["emulation", *names]):
            with console.status(f"{name}: making its weights"):
                try:
                    contender = self._contender(name)
                except Unavailable as error:
                    if name == "emulation":
                        raise SystemExit(f"no emulation: {error}") from None
                    self._refuse(name, error, console)
                    continue
            if name == "emulation":
                self.emulation = contender
            if name in names:
                self.contenders.append(contender)

    def measure(self, tokens, peaks, console):
        """Returns a line for each contender, with the reason if it cannot take part."""
        refused, ready, expected = dict(self.refused), {}, {}
        self.emulation.prepare(tokens, self.cache)
        for contender in self.contenders:
            with console.status(f"T = {tokens}: {contender.name}, first call"):
                try:
                    facts = contender.prepare(tokens, self.cache)
                    seconds, result = contender.first()
                except Unavailable as error:
                    refused[contender.name] = self._refuse(contender.name, error, console)
                    continue
                reference = contender.traits["reference"]
                if reference not in expected:
                    expected[reference] = self.emulation.expected(reference)
            facts |= self._check(contender, result, expected[reference])
            facts |= {"first_call_ms": round(seconds * 1e3, 2)}
            if (peak := peaks.get((contender.name, tokens))) is not None:
                facts |= {"peak_mb": round(peak / 1e6, 1)}
            ready[contender] = facts
        takes_turns = [*ready, self.product]
        neighbours = machine.Neighbours([contender.pid for contender in takes_turns])
        times = self._times(tokens, takes_turns, console)
        share = neighbours.share()
        product = float(np.median(times.pop(self.product.name)))
        product = {"product_gflop_s": round(self.product.traits["flops"] / product / 1e9, 1)}
        if share > TOLERATED:
            console.print(f"[red]Others had {share:.0%} of the cores: these times are too long.")
        hits = self._hits(tokens)
        lines = [
            {
                "contender": contender.name,
                "tokens": tokens,
                "hit_experts": hits,
                **measuring.spread(times[contender.name]),
                "calls": len(times[contender.name]),
                "others_share": round(share, 3),
                **product,
                **facts,
                "weights_mb": round(contender.traits["weights_nbytes"] / 1e6, 1),
            }
            for contender, facts in ready.items()
        ]
        return lines + [
            {"contender": name, "tokens": tokens, "unavailable": reason}
            for name, reason in refused.items()
        ]

    def close(self):
        for contender in {self.emulation, self.product, *self.contenders} - {None}:
            contender.close()

    def _contender(self, name):
        return Contender(name, self.layer, self.copies, self.scheme)

    def _times(self, tokens, contenders, console):
        columns = (TextColumn(f"T = {tokens}"), BarColumn(), TextColumn("{task.description}"))
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            task = progress.add_task("", total=self.turns * len(contenders))

            def advance(description):
                progress.update(task, advance=1, description=description)

            return measuring.turns(contenders, self.turns, self.burst, self.seconds, advance)

    def _hits(self, tokens):
        """Experts that a call hits, on average."""
        count = layers.batch_count(self.layer, tokens)
        batches = layers.token_batches(self.layer, tokens, count, self.cache)
        return round(float(np.mean([batch.hits for batch in batches])), 2)

    def _check(self, contender, result, wanted):
        difference = measuring.difference(result, wanted)
        reference, bound = contender.traits["reference"], contender.traits["bound"]
        if not difference <= bound:
            raise SystemExit(
                f"{contender.name} is wrong: it differs by {difference} (relative L2) from the "
                f"emulation ({reference}), expected at most {bound}"
            )
        return {"difference": difference, "reference": reference, "bound": bound}

    def _refuse(self, name, error, console):
        """Says why, and drops it for good if it is its weights that it cannot have."""
        console.print(f"{name}: {error}", markup=False, soft_wrap=True)
        if all(contender.name != name for contender in self.contenders):
            self.refused[name] = str(error)
        return str(error)


def _positive(text):
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _in_a_process(function):
    """In a process that ends, and takes its threads and its memory along."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)
