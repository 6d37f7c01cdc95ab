"""The sizes of a run on a GPU, and of a dry run on a CPU."""

import dataclasses
import math

from benchmarks import layers


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        layers: that can be measured.
        tokens: numbers of them, if no others are asked for.
        cache: bytes of the device's last level.
        calls: of one program, at least and at most.
        copies_nbytes: of a layer's copies together, packed, unless one alone has more.
        copied, multiplied: bytes, and rows of a square matrix, by which the device is measured.
        turns, burst: how often a contender is called, and for how many seconds at a time.
        seconds: after so many, a contender has no more turns.
    """

    layers: dict
    tokens: tuple
    cache: int
    calls: tuple
    copies_nbytes: float
    copied: int
    multiplied: int
    turns: int
    burst: float
    seconds: float

    def calls_of(self, layer, tokens):
        """How many layers a program has: enough to read four times what the cache holds."""
        hits = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** tokens)
        fewest, most = self.calls
        return min(most, max(fewest, math.ceil(4 * self.cache / (hits * layer.expert_bytes))))

    def copies_of(self, layer):
        """How many layers have weights of their own."""
        return min(self.calls_of(layer, 1), max(1, int(self.copies_nbytes / layer.nbytes)))


TINY = layers.Layer("tiny", 8, 2, 128, 64)
FULL = Scale(
    layers=layers.LAYERS,
    tokens=(1, 16, 128, 1024, 4096),
    cache=64 << 20,  # an H200 has 60 MB, an H100 50
    calls=(4, 16),
    copies_nbytes=8e9,
    copied=2 << 30,
    multiplied=8192,
    turns=10,
    burst=0.1,
    seconds=3,
)
DRY = Scale(
    layers={TINY.name: TINY},
    tokens=(1, 16),
    cache=2 * TINY.expert_bytes,
    calls=(2, 3),
    copies_nbytes=2 * TINY.nbytes,
    copied=1 << 20,
    multiplied=64,
    turns=2,
    burst=0.02,
    seconds=1,
)
