"""The processes of `python -m benchmarks gpu`: contenders, and one that measures the device."""

import functools
import math
import time

import numpy as np

from benchmarks import contenders, layers
from benchmarks.contenders.base import Unavailable

BATCH = 0.01  # seconds between two synchronisations, at least: these cost some microseconds
SETTLING = 0.2  # seconds of calls before any counts: XLA records command buffers in the first


class Server:
    """A contender, and what is asked of it.

    It runs programs of several layers. They are launched one after another without waiting, so that
    the device always has the next one while it computes; what is timed is a batch of programs.
    """

    def __init__(self, name, layer, copies):
        self.layer = layer
        self.contender = contenders.load(name)(layer, copies, "static")
        self.program, self.calls, self.batch = None, 0, 1

    def traits(self):
        return {
            "reference": self.contender.reference,
            "bound": self.contender.bound,
            "layer_nbytes": self.contender.weights_nbytes / self.contender.copies,
        }

    def prepare(self, tokens, calls, cache):
        """Compiles a program of so many calls; returns facts, and samples of its results."""
        self.program = None  # first its memory is freed
        self.calls = calls
        batches = _batches(self.layer, tokens, calls, cache)
        self.program = self.contender.chain(batches)
        self.program.enqueue()
        self.program.wait()
        hits = round(float(np.mean([batch.hits for batch in batches])), 2)
        facts = {"layers": calls, "hit_experts": hits, **self.program.facts}
        return facts, self.program.samples()

    def expected(self, reference, tokens, calls, cache):
        """What the samples of a contender with this reference should be."""
        from benchmarks.contenders.jax_call import one_by_one

        function, weights = self.contender.computing(reference)
        return one_by_one(function, weights, _batches(self.layer, tokens, calls, cache))

    def settle(self):
        """Calls until everything is as it will be; returns milliseconds that a launch takes."""
        launches, begin = [], time.perf_counter()
        while len(launches) < 2 or time.perf_counter() - begin < SETTLING:
            start = time.perf_counter()
            self.program.enqueue()
            launches.append(time.perf_counter() - start)
            self.program.wait()
            seconds = time.perf_counter() - start
        self.batch = math.ceil(BATCH / seconds)
        return float(f"{np.median(launches) / self.calls * 1e3:.3g}")

    def burst(self, seconds):
        """Seconds per layer of some batches, one at least; the program before them is not timed."""
        self.program.enqueue()
        self.program.wait()
        times, begin = [], time.perf_counter()
        while not times or time.perf_counter() - begin < seconds:
            times.append(timed(self.program.enqueue, self.program.wait, self.batch) / self.calls)
        return times


@functools.lru_cache(maxsize=1)
def _batches(layer, tokens, calls, cache):
    return layers.token_batches(layer, tokens, calls, cache)


class Device:
    """The device that JAX has, and the fastest that it can copy and multiply."""

    def __init__(self, nbytes, size):
        self.nbytes, self.size = nbytes, size

    def traits(self):
        import jax

        try:
            device = jax.devices()[0]
        except (RuntimeError, AssertionError) as error:  # the latter where only the GPU is missing
            raise Unavailable("JAX finds no CUDA GPU") from error
        version = " ".join(device.client.platform_version.split())
        return {"device": device.device_kind, "platform_version": version}

    def limits(self):
        """GB/s of a copy, read and written bytes both, and GFLOP/s of a bfloat16 product."""
        import jax
        import jax.numpy as jnp

        copy, multiply = jax.jit(jnp.copy), jax.jit(jnp.matmul)
        array = jnp.ones(self.nbytes // 4, jnp.float32)
        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.random.normal(key, (self.size, self.size), jnp.bfloat16) for key in keys)
        return {
            "copy_gb_s": round(2e-9 * self.nbytes / _best(lambda: copy(array)), 3),
            "bfloat16_gflop_s": round(2e-9 * self.size**3 / _best(lambda: multiply(a, b)), 3),
        }


def timed(enqueue, wait, count):
    """Seconds for each of so many launches, of which only the last is waited for."""
    begin = time.perf_counter()
    for _ in range(count):
        enqueue()
    wait()
    return (time.perf_counter() - begin) / count


def _best(function, times=6, count=10):
    results = [function()]

    def enqueue():
        results[0] = function()

    def wait():
        results[0].block_until_ready()

    return min(timed(enqueue, wait, count) for _ in range(times))
