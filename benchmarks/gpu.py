"""Times layers on a GPU, beside other implementations.

    python -m benchmarks gpu --tests --output benchmarks/results
    python -m benchmarks gpu --layers qwen3-30b --tokens 1 16 --contenders triton torch-bf16-grouped
    python -m benchmarks gpu --dry-run

It times a program of several layers, each with its own tokens and, as far as memory allows, its own
weights: one jitted call in JAX, one CUDA graph in torch (see README.md). Before timing, a
contender's results are compared with the emulation's. If it fails, or they differ by more than the
arithmetic explains, its line has the reason instead of times.

With --tests the conformance suite runs first, then each layer, with few tokens first. What does not
fit into --minutes is left out. Lines are written as soon as they are known.
"""

import argparse
import contextlib
import math
import os
import time

import numpy as np
from rich.console import Console

from benchmarks import gpu_rates, gpu_tests, layers, machine, measuring, results, tables
from benchmarks.contenders import GPU_CONTENDERS
from benchmarks.contenders.base import Unavailable
from benchmarks.gpu_scale import DRY, FULL
from benchmarks.gpu_server import Device, Server
from benchmarks.process import Failed, Remote

TESTS_SHARE = 0.2  # of the time, for each part of the suite
GRACE = 20  # seconds beyond its time that a contender is waited for

FAILURES = Unavailable, Failed


def main(arguments):
    args = _parser().parse_args(arguments)
    clock, console = Clock(60 * args.minutes), Console(stderr=True)
    os.environ["JAX_PLATFORMS"] = "cpu" if args.dry_run else "cuda"  # of the processes to come
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # they share the GPU's memory
    header = {"command": results.command_line("gpu", arguments), **machine.describe()}
    if args.tests:
        test(header, clock, args.output, console)
    scale, names = (DRY, list(DRY.layers)) if args.dry_run else (FULL, args.layers)
    for index, name in enumerate(names):
        share = clock.share(len(names) - index)
        run = Run(scale.layers[name], args.contenders, scale, share, console)
        try:
            run.start()
            for tokens in args.tokens or scale.tokens:
                tables.show(run.measure(tokens), name, tables.GPU_COLUMNS)
                if args.output:
                    lines = [{**header, **run.describe()}, *run.lines]
                    results.write(args.output / f"gpu-{name}.jsonl", lines)
        finally:
            run.close()


def test(header, clock, folder, console):
    """Both parts of the conformance suite, the kernels' first."""
    lines = [header]
    for part in gpu_tests.PARTS:
        lines.append(gpu_tests.run(part, TESTS_SHARE * clock.seconds))
        console.print(lines[-1], markup=False)
        if folder:
            results.write(folder / "gpu-conformance.jsonl", lines)


class Clock:
    """So many seconds, counted from when it is made."""

    def __init__(self, seconds):
        self.seconds = seconds
        self._begin = time.monotonic()

    def left(self):
        return max(0.0, self.seconds - (time.monotonic() - self._begin))

    def share(self, among):
        """A clock of what is left, for the first of several."""
        return Clock(self.left() / among)


class Contender(Remote):
    """A contender in its process, which takes turns until it fails."""

    def __init__(self, name, layer, copies):
        super().__init__(name, Server, name, layer, copies)
        self.failure = None

    def burst(self, seconds):
        """Seconds per layer; an endless one if it fails, after which it has had its time."""
        try:
            return self.ask("burst", seconds, seconds=GRACE)
        except FAILURES as error:
            self.failure = error
            return [math.inf]


class Run:
    """One layer's contenders."""

    def __init__(self, layer, names, scale, clock, console):
        self.layer, self.names, self.scale, self.clock = layer, names, scale, clock
        self.console = console
        self.remotes, self.contenders, self.refused, self.lines = [], {}, {}, []
        self.longest = 0.0  # of the numbers of tokens so far, in seconds
        self.device = Remote("the device", Device, scale.copied, scale.multiplied)
        self.limits, self.limits_each = {}, []

    def describe(self):
        return {
            **self.device.traits,
            **self.layer.describe(),
            "copies": self.scale.copies_of(self.layer),
            "scheme": "static",
            "limits": self.limits,
            "limits_each": self.limits_each,
        }

    def start(self):
        """Has all make their weights at once: it is the host that draws them, with many cores."""
        for name in dict.fromkeys(["emulation", *self.names]):
            self.remotes.append(Contender(name, self.layer, self.scale.copies_of(self.layer)))
        try:
            self.device.traits = self.device.answer(self.clock.left())
        except FAILURES as error:
            raise SystemExit(self._reason("no device", error)) from None
        for remote in self.remotes:
            with self.console.status(f"{self.layer.name}: {remote.name} makes its weights"):
                try:
                    remote.traits = remote.answer(self.clock.left())
                    self.contenders[remote.name] = remote
                except FAILURES as error:
                    remote.close()
                    self.refused[remote.name] = self._reason(remote.name, error)

    def measure(self, tokens):
        """Returns a line for each contender, with the reason if it could not take part."""
        begin = time.monotonic()
        missing = None
        if "emulation" in self.refused:
            missing = "there is no emulation to compare with"
        elif self.clock.left() < self.longest:
            missing = "no time was left for it"
        if missing is None:
            found, refused = self._found(tokens)
        else:
            self.console.print(f"{self.layer.name}, T = {tokens}: {missing}")
            found, refused = {}, dict.fromkeys(self.names, missing)
        for name in self.names:
            facts = found[name] if name in found else {"unavailable": refused[name]}
            self.lines.append({"contender": name, "tokens": tokens, **facts})
        for line in self.lines:
            line.update(gpu_rates.rates(self.layer, line, self.limits))
        self.longest = max(self.longest, time.monotonic() - begin)
        return self.lines[-len(self.names) :]

    def close(self):
        for remote in (self.device, *self.remotes):
            remote.close()

    def _found(self, tokens):
        """By contender: what was found, or why nothing was."""
        self._measure_device()
        found, refused = self._prepared(tokens)
        for name in list(found):
            with self._refusing(name, refused):
                found[name]["launch_ms"] = self._ask(name, "settle")
        ready = [self.contenders[name] for name in found if name not in refused]
        with self.console.status(f"{self.layer.name}, T = {tokens}: taking turns") as status:
            times = measuring.turns(
                ready, self.scale.turns, self.scale.burst, self.scale.seconds, status.update
            )
        self._measure_device()
        for contender in ready:
            each = times[contender.name]
            if math.inf in each:
                refused[contender.name] = self._reason(contender.name, contender.failure)
            else:
                found[contender.name] |= {**measuring.spread(each), "batches": len(each)}
        return {name: facts for name, facts in found.items() if name not in refused}, refused

    def _prepared(self, tokens):
        """Facts of those whose results are right, and why the others take no part."""
        job = tokens, self.scale.calls_of(self.layer, tokens), self.scale.cache
        found, refused, samples = {}, dict(self.refused), {}
        # The emulation first and alone: XLA tries out its matrix products on the device.
        first, *others = [self.contenders["emulation"]] + [
            contender for name, contender in self.contenders.items() if name != "emulation"
        ]
        with self.console.status(f"{self.layer.name}, T = {tokens}: compiling"):
            with self._refusing(first.name, refused):
                found[first.name], samples[first.name] = self._ask(first.name, "prepare", *job)
            for contender in others:
                contender.begin("prepare", *job)
            expected = self._expected(job)
            for contender in others:
                with self._refusing(contender.name, refused):
                    answer = contender.answer(self.clock.left() + GRACE)
                    found[contender.name], samples[contender.name] = answer
        for name, got in samples.items():
            with self._refusing(name, refused):
                found[name] |= compared(self.contenders[name].traits, got, expected)
        return {name: facts for name, facts in found.items() if name not in refused}, refused

    def _expected(self, job):
        """By reference, the emulation's results, or the error instead."""
        expected = {}
        for contender in self.contenders.values():
            reference = contender.traits["reference"]
            if reference not in expected:
                try:
                    expected[reference] = self._ask("emulation", "expected", reference, *job)
                except FAILURES as error:
                    expected[reference] = error
        return expected

    def _ask(self, name, method, *arguments):
        return self.contenders[name].ask(method, *arguments, seconds=self.clock.left() + GRACE)

    @contextlib.contextmanager
    def _refusing(self, name, refused):
        """Goes on without a contender that fails, and says why."""
        try:
            yield
        except FAILURES as error:
            refused[name] = self._reason(name, error)

    def _reason(self, name, error):
        self.console.print(f"{name}: {error}", markup=False, soft_wrap=True)
        return str(error).strip().splitlines()[-1]

    def _measure_device(self):
        """Once more: what it can is the best that was seen."""
        try:
            with self.console.status("measuring the device"):
                found = self.device.ask("limits", seconds=self.clock.left() + GRACE)
        except FAILURES as error:  # its memory may be taken by then
            if not self.limits:
                raise
            self._reason(self.device.name, error)
            return
        self.limits_each.append(found)
        for name, rate in found.items():
            self.limits[name] = max(rate, self.limits.get(name, rate))


def compared(traits, samples, expected):
    """How far results are from the emulation's.

    Args:
        traits: the contender's.
        samples: its results of each layer of a program.
        expected: the emulation's by reference, or why there are none.

    Raises:
        Unavailable: too far, or there is nothing to compare with.
    """
    reference, bound = traits["reference"], traits["bound"]
    wanted = expected[reference]
    if isinstance(wanted, Exception):
        raise Unavailable(f"nothing to compare with: {wanted}")
    difference = measuring.difference(np.stack(samples), np.stack(wanted))
    if not difference <= bound:
        raise Unavailable(
            f"wrong: it differs by {difference} (relative L2) from the emulation ({reference}), "
            f"expected at most {bound}"
        )
    facts = {"difference": difference, "reference": reference, "bound": bound}
    return facts | {"layer_mb": round(traits["layer_nbytes"] / 1e6, 1)}


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        choices=layers.LAYERS,
        default=["qwen3-30b", "deepseek-v3"],
        metavar="NAME",
        help=f"of {', '.join(layers.LAYERS)} (default: qwen3-30b deepseek-v3)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="T",
        help=f"default: {' '.join(map(str, FULL.tokens))}",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=GPU_CONTENDERS,
        default=[*GPU_CONTENDERS],
        metavar="NAME",
        help=f"default: all, which are {', '.join(GPU_CONTENDERS)}",
    )
    parser.add_argument("--minutes", type=float, default=8, help="for everything (default: 8)")
    parser.add_argument("--tests", action="store_true", help="the conformance suite too, first")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="on the CPU, a tiny layer, kernels interpreted: tries all that needs no GPU",
    )
    parser.add_argument("--output", type=results.folder, help="write lines to files in this folder")
    return parser
