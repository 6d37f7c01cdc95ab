"""What the contenders in JAX share: compiling, and calling what is compiled."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders.base import RESIDUE, Contender, Unavailable, sample
from benchmarks.machine import meminfo


def compile_timed(function, arguments, **options):
    """Compiled for these arguments; how long that took, and the memory that XLA plans."""
    begin = time.perf_counter()
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    analysis = compiled.memory_analysis()
    temporary = analysis.temp_size_in_bytes if analysis else 0
    return compiled, {"compile_s": round(seconds, 2), "temp_mb": round(temporary / 1e6, 1)}


class JaxContender(Contender):
    """Jits `function(x, ids, weights, *weights of the layer)`."""

    weights: list  # of the copies, each a tuple of arguments

    def function(self, *arguments):
        raise NotImplementedError

    def prepare(self, batches):
        self.batches = _on_device(batches)
        self.compiled, facts = self.compile(self.function, (*self.batches[0], *self.weights[0]))
        return facts

    def compile(self, function, arguments):
        compiled, facts = compile_timed(function, arguments)
        if facts["temp_mb"] * 1e6 > 0.9 * (available := meminfo("MemAvailable")):
            raise Unavailable(
                f"XLA plans {facts['temp_mb'] / 1e3:.1f} GB beside the weights, "
                f"of which {available / 1e9:.1f} GB are free"
            )
        return compiled, facts

    def run(self, copy, batch):
        # Awaited, and left where the next layer of a program would find it.
        return jax.block_until_ready(self.compiled(*self.batches[batch], *self.weights[copy]))

    def chain(self, batches):
        """A layer for each batch, as one program."""
        return JaxChain(self.function, self.weights, batches)


class JaxChain:
    """Layers one after another in one jitted program, weights as its arguments."""

    def __init__(self, function, weights, batches):
        inputs, program = _on_device(batches), chained(function)
        self.arguments = inputs, weights
        self.results = [jnp.zeros_like(x) for x, *_ in inputs]
        # Results go where the last ones were: at other addresses XLA would record graphs anew.
        self.compiled, self.facts = compile_timed(
            lambda inputs, weights, _: program(inputs, weights),
            (*self.arguments, self.results),
            donate_argnums=2,
            keep_unused=True,
        )

    def enqueue(self):
        self.results = self.compiled(*self.arguments, self.results)

    def wait(self):
        jax.block_until_ready(self.results)

    def samples(self):
        return [np.asarray(sample(result), np.float32) for result in self.results]


def chained(function):
    """A function from every layer's tokens and routing, and the copies' weights, to all results."""
    layer = jax.jit(function)  # traced once

    def program(inputs, weights):
        results = []
        for index, (x, *routing) in enumerate(inputs):
            after = follow(x, results[-1]) if results else x
            results.append(layer(after, *routing, *weights[index % len(weights)]))
        return results

    return program


def follow(x, result):
    """Tokens that are there only after a result: a residual, next to nothing of it."""
    total = x.astype(jnp.float32) + RESIDUE * result.astype(jnp.float32)
    # XLA may keep a float32 where bfloat16 is asked for, and other tokens have other codes.
    return jax.lax.reduce_precision(total, 8, 7).astype(x.dtype)


def one_by_one(function, weights, batches):
    """What a chain has to compute, by a program for each layer."""
    layer, after, results, samples = jax.jit(function), jax.jit(follow), [], []
    for index, (x, *routing) in enumerate(_on_device(batches)):
        tokens = after(x, results[-1]) if results else x
        results[:] = [layer(tokens, *routing, *weights[index % len(weights)])]
        samples.append(np.asarray(sample(results[-1]), np.float32))
    return samples


def _on_device(batches):
    return [tuple(map(jnp.asarray, (b.x, b.ids, b.weights))) for b in batches]
