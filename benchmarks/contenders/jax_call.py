"""What the contenders in JAX share: compiling, and calling what is compiled."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders.base import Contender, Unavailable
from benchmarks.machine import meminfo


class JaxContender(Contender):
    """Jits `function(x, ids, weights, *weights of the layer)`."""

    weights: list  # of the copies, each a tuple of arguments

    def function(self, *arguments):
        raise NotImplementedError

    def prepare(self, batches):
        self.batches = [tuple(map(jnp.asarray, (b.x, b.ids, b.weights))) for b in batches]
        self.compiled, facts = self.compile(self.function, (*self.batches[0], *self.weights[0]))
        return facts

    def compile(self, function, arguments):
        begin = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        seconds = time.perf_counter() - begin
        analysis = compiled.memory_analysis()
        temporary = analysis.temp_size_in_bytes if analysis else 0
        if temporary > 0.9 * (available := meminfo("MemAvailable")):
            raise Unavailable(
                f"XLA plans {temporary / 1e9:.1f} GB beside the weights, "
                f"of which {available / 1e9:.1f} GB are free"
            )
        return compiled, {"compile_s": round(seconds, 2), "temp_mb": round(temporary / 1e6, 1)}

    def run(self, copy, batch):
        return np.asarray(self.compiled(*self.batches[batch], *self.weights[copy]))
