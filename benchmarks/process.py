"""Runs each contender in its own process, with its own threads, allocator and memory.

A process keeps its weights and computes on request. So contenders can take turns, and no one's idle
threads or heap affect another.
"""

import contextlib
import multiprocessing
import time
import traceback

import numpy as np

from benchmarks import contenders, layers, machine, measuring, memory
from benchmarks.contenders.base import Unavailable


class Remote:
    """A proxy of an object in another process.

    The constructor does not wait for the object: the first answer has its `traits()`.
    """

    def __init__(self, name, make, *arguments):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, make, *arguments)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self):
        return self._process.pid

    def ask(self, method, *arguments, seconds=None):
        """What the method returns, if it does so in time."""
        self.begin(method, *arguments)
        return self.answer(seconds)

    def begin(self, method, *arguments):
        with contextlib.suppress(OSError):  # it died: the answer says so
            self._connection.send((method, arguments))

    def answer(self, seconds=None):
        """What was asked for last; without limit if `seconds` is None.

        Raises:
            Unavailable: it cannot, or its process ended, or was ended as it took too long.
            Failed: anything else that it raised.
        """
        try:
            if not self._connection.poll(seconds):
                self.close()
                raise Unavailable(f"not done after {seconds:.0f} s")
            kind, answer = self._connection.recv()
        except (EOFError, OSError):  # the latter where it was closed
            self._process.join()
            code = self._process.exitcode
            raise Unavailable(f"its process ended with {code}, out of memory?") from None
        if kind == "unavailable":
            raise Unavailable(answer)
        if kind == "failed":
            raise Failed(f"{self.name} failed:\n{answer}")
        return answer

    def close(self):
        self._connection.close()
        self._process.kill()
        self._process.join()


class Failed(RuntimeError):
    """An error in another process; the message ends with its traceback."""


class Timed(Remote):
    """An object that takes turns in calling what is measured."""

    def __init__(self, name, make, *arguments):
        super().__init__(name, make, *arguments)
        try:
            self.traits = self.answer()
        except Unavailable:
            self.close()
            raise

    def burst(self, seconds):
        """The seconds of each call in a row of them."""
        return self.ask("burst", seconds)


class Contender(Timed):
    """A contender in its process."""

    def __init__(self, name, layer, copies, scheme):
        super().__init__(name, Server, name, layer, copies, scheme)

    def prepare(self, tokens, cache):
        """Facts about what was compiled for so many tokens."""
        return self.ask("prepare", tokens, cache)

    def first(self):
        """The first call: its seconds, and its result."""
        return self.ask("first")

    def peak(self):
        """The bytes that the first call takes beyond the weights."""
        return self.ask("peak")

    def expected(self, reference):
        """The emulation's result for the first batch."""
        return self.ask("expected", reference)


# ------------------------------------------------------------------------------------- inside


def _serve(connection, method, *arguments):
    """Makes the object, which is asked for first, and answers what is asked of it."""
    server = None
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
        each = copies * kind.bytes_per_parameter() + kind.temporary_bytes_per_parameter()
        needed = layer.experts * layer.parameters * each
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
        return measuring.burst(self.call, seconds)

    def call(self):
        """The next batch on the next copy of the layer."""
        copy, batch = self.calls % self.contender.copies, self.calls % self.batches
        self.calls += 1
        begin = time.perf_counter()
        self.contender.run(copy, batch)
        return time.perf_counter() - begin
