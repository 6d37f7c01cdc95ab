"""Each contender in a process of its own: its threads, its allocator and its memory are its alone.

A process has its weights all along and computes when it is told to, so that contenders take turns
without one's idle threads or its leftovers in the heap being charged to another.
"""

import contextlib
import multiprocessing
import time
import traceback

import numpy as np

from benchmarks import contenders, layers, machine, memory
from benchmarks.contenders.base import Unavailable


class Contender:
    """A contender in its process, seen from outside."""

    def __init__(self, name, layer, copies, scheme):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, name, layer, copies, scheme)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.traits = self._answer()
        except Unavailable:
            self.close()
            raise

    @property
    def pid(self):
        return self._process.pid

    def prepare(self, tokens, cache):
        """Facts about what was compiled for so many tokens."""
        return self._ask("prepare", tokens, cache)

    def first(self):
        """The first call: its seconds, and its result."""
        return self._ask("first")

    def peak(self):
        """The bytes that the first call takes beyond the weights."""
        return self._ask("peak")

    def expected(self, reference):
        """The emulation's result for the first batch."""
        return self._ask("expected", reference)

    def burst(self, seconds):
        """The seconds of each call in a row of them."""
        return self._ask("burst", seconds)

    def close(self):
        self._connection.close()
        self._process.kill()
        self._process.join()

    def _ask(self, method, *arguments):
        with contextlib.suppress(OSError):  # it died: the answer says so
            self._connection.send((method, arguments))
        return self._answer()

    def _answer(self):
        try:
            kind, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            raise Unavailable(f"its process ended with {code}, out of memory?") from None
        if kind == "unavailable":
            raise Unavailable(answer)
        if kind == "failed":
            raise RuntimeError(f"{self.name} failed:\n{answer}")
        return answer


# ------------------------------------------------------------------------------------- inside


def _serve(connection, *arguments):
    server = None
    method = Server
    while True:
        try:
            answer = method(*arguments)
            if server is None:
                server, answer = answer, answer.traits()
            connection.send(("done", answer))
        except (Unavailable, NotImplementedError) as error:
            connection.send(("unavailable", " ".join(str(error).split())))
        except ModuleNotFoundError as error:
            connection.send(("unavailable", f"{error.name} is not installed"))
        except Exception:
            connection.send(("failed", traceback.format_exc()))
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        method = getattr(server, name)


class Server:
    """A contender, and what is asked of it."""

    def __init__(self, name, layer, copies, scheme):
        kind = contenders.load(name)
        needed = copies * layer.experts * layer.parameters * kind.bytes_per_parameter()
        if needed > (available := machine.meminfo("MemAvailable")):
            raise Unavailable(f"needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free")
        self.layer = layer
        self.contender = kind(layer, copies, scheme)
        self.calls = 0

    def traits(self):
        return {
            "reference": self.contender.reference,
            "bound": self.contender.bound,
            "weights_nbytes": self.contender.weights_nbytes,
        }

    def prepare(self, tokens, cache):
        self.batches = layers.batch_count(self.layer, tokens)
        batches = layers.token_batches(self.layer, tokens, self.batches, cache)
        self.calls = 0
        return self.contender.prepare(batches)

    def first(self):
        begin = time.perf_counter()
        result = self.contender.run(0, 0)
        return time.perf_counter() - begin, np.asarray(result, np.float32)

    def peak(self):
        return memory.peak_of(lambda: self.contender.run(0, 0))

    def expected(self, reference):
        return np.asarray(self.contender.expected(reference), np.float32)

    def burst(self, seconds):
        """Calls until the time is over, one at least.

        One before them is not counted, unless it alone takes so long that what it finds cold does
        not matter.
        """
        times = [self.call()]
        if times[0] < seconds:
            begin, times = time.perf_counter(), []
            while not times or time.perf_counter() - begin < seconds:
                times.append(self.call())
        return times

    def call(self):
        """The next batch on the next copy of the layer."""
        copy, batch = self.calls % self.contender.copies, self.calls % self.batches
        self.calls += 1
        begin = time.perf_counter()
        self.contender.run(copy, batch)
        return time.perf_counter() - begin
