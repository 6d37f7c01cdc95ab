"""The measured layers: sizes, random weights and random tokens.

All data is drawn from fixed seeds, so that every contender's process makes the same data.
"""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

ROLES = ("w13", "w2")
STD_OF_CODE, STD_OF_SCALE = 3.2, 40.0  # of random codes, and of the scales drawn here


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of a gated layer: E experts, k of them for each token, H hidden, I intermediate."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    def shape(self, role):
        """Rows and columns of an expert's matrix."""
        if role == "w13":
            return 2 * self.intermediate, self.hidden
        return self.hidden, self.intermediate

    def gain(self, role):
        """The global scale with which a matrix keeps the magnitude of its operand."""
        wanted = 2.0 if role == "w13" else 1.0
        return wanted / (STD_OF_CODE * STD_OF_SCALE * self.shape(role)[1] ** 0.5)

    @property
    def parameters(self):
        """Of one expert."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self):
        """Codes, block scales and three global scales."""
        return self.parameters * 9 // 16 + 12

    @property
    def nbytes(self):
        return self.experts * self.expert_bytes

    def describe(self):
        return {
            "layer": self.name,
            "experts": self.experts,
            "top_k": self.top_k,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "layer_mb": round(self.nbytes / 1e6, 1),
        }

    def flops(self, tokens):
        return 2 * tokens * self.top_k * self.parameters

    def copies(self, cache):
        """How many layers calls have to take turns with, lest one is found in the cache."""
        return min(64, math.ceil(4 * cache / self.nbytes))


# Of the models' own configurations; gpt-oss's and Mixtral's experts with silu, without biases.
LAYERS = {
    layer.name: layer
    for layer in (
        Layer("qwen3-30b", 128, 8, 2048, 768),
        Layer("qwen3-235b", 128, 8, 4096, 1536),
        Layer("qwen3-next", 512, 10, 2048, 512),
        Layer("deepseek-v3", 256, 8, 7168, 2048),
        Layer("glm-4.5-air", 128, 8, 4096, 1408),
        Layer("gpt-oss-20b", 32, 4, 2880, 2880),
        Layer("mixtral-8x7b", 8, 2, 4096, 14336),
        Layer("small", 16, 4, 512, 256),
    )
}


# ------------------------------------------------------------------------------------- weights


def expert_matrix(layer, role, expert):
    """Packed codes [rows, columns / 2] and e4m3 block scales [rows, columns / 16], as bytes."""
    rows, columns = layer.shape(role)
    rng = np.random.default_rng([ROLES.index(role), expert])
    codes = np.frombuffer(rng.bytes(rows * columns // 2), np.uint8)
    scale = np.frombuffer(rng.bytes(rows * columns // 16), np.uint8)
    return codes.reshape(rows, -1), (scale & 15 | 0x60).reshape(rows, -1)


def matrices(layer, role):
    """All experts' codes and scales, stacked."""
    rows, columns = layer.shape(role)
    codes = np.empty((layer.experts, rows, columns // 2), np.uint8)
    scale = np.empty((layer.experts, rows, columns // 16), np.uint8)

    def make(expert):
        codes[expert], scale[expert] = expert_matrix(layer, role, expert)

    with ThreadPoolExecutor() as pool:  # numpy draws without the interpreter's lock
        list(pool.map(make, range(layer.experts)))
    return codes, scale


# Static scales of the activations, for these magnitudes. They are no round numbers: bfloat16 tokens
# would often lie between two codes, and a last bit, in which arithmetics differ, would decide.
INPUT_SCALE, HIDDEN_SCALE = np.float32(5.9 / 2688), np.float32(41 / 2688)


# ------------------------------------------------------------------------------------- tokens


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call's tokens: x [T, H] bfloat16, ids [T, k] int32, weights [T, k] float32."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray

    @property
    def hits(self):
        return len(np.unique(self.ids))


def token_batches(layer, tokens, count, cache, seed=1):
    """Returns the batches that calls cycle through, each routed at random.

    Few tokens hit few experts, whose weights would still be in the cache when a later call hits
    them again. A batch therefore avoids an expert until the cache has been filled twice since its
    last use. If that leaves less than three quarters of all experts, no expert is avoided: batches
    are then so large that one of them fills the cache.
    """
    rng = np.random.default_rng([seed, tokens])
    made = []
    for _ in range(count):
        recent = _recently_hit(layer, made, 2 * cache)
        allowed = np.setdiff1d(np.arange(layer.experts), recent)
        if len(allowed) < max(layer.top_k, 0.75 * layer.experts):
            allowed = np.arange(layer.experts)
        order = np.argsort(rng.random((tokens, len(allowed))), axis=1)[:, : layer.top_k]
        made.append(
            Batch(
                x=rng.normal(size=(tokens, layer.hidden)).astype(ml_dtypes.bfloat16),
                ids=allowed[order].astype(np.int32),
                weights=rng.dirichlet(np.ones(layer.top_k), tokens).astype(np.float32),
            )
        )
    return made


def _recently_hit(layer, batches, nbytes):
    """The experts of the last batches that together read so much."""
    hit = np.array([], np.int32)
    for batch in reversed(batches):
        if nbytes <= 0:
            break
        hit = np.union1d(hit, batch.ids)
        nbytes -= batch.hits * layer.expert_bytes
    return hit


def batch_count(layer, tokens):
    """Enough that a few tokens go round all experts, and not gigabytes of tokens."""
    return min(32, max(4, 2 * layer.experts // (tokens * layer.top_k)))
