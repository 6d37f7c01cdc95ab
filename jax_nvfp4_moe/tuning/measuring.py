"""Measures tactics on the device that is here: `python -m jax_nvfp4_moe tune`."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from jax_nvfp4_moe import devices
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.bridge.cute_dsl import TACTICS
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights
from jax_nvfp4_moe.implementations.base import Call, Problem
from jax_nvfp4_moe.implementations.cute_dsl.implementation import CuteDsl, layer_of
from jax_nvfp4_moe.moe import nvfp4_moe_routed
from jax_nvfp4_moe.quantization import quantize_experts
from jax_nvfp4_moe.relayout import prepare
from jax_nvfp4_moe.selection import select
from jax_nvfp4_moe.tuning.table import Measured, add

_BATCHES, _CALLS = 7, 20


def tune(
    *,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    tokens: Sequence[int],
    activation: str = "silu",
    activation_scheme: ActivationScheme = "static",
    deterministic: bool = False,
    cache: Path | None = None,
    progress: bool | None = None,
) -> tuple[Measured, ...]:
    """Measures "cute_dsl"'s tactics for a layer, and writes the fastest into the table.

    Of weights and tokens of no meaning, routed at random and evenly. Programs that were traced
    before keep the tactics that they have.

    Args:
        num_experts: on this device.
        top_k: K.
        hidden_size: H.
        intermediate_size: I.
        tokens: of each of these T the fastest is found.
        activation: its name.
        activation_scheme: "static" or "per_token"; for "none" there is one tactic.
        deterministic: as in `CuteDsl`.
        cache: where the table is, `bridge.manifest.default_cache()` if not given.
        progress: show it on stderr; None means where that is a terminal.

    Returns:
        The fastest, in the order of `tokens`.

    Raises:
        ValueError: a size does not fit.
        NotImplementedError: the kernels cannot serve the layer here, none is built, or there is
            one tactic; the message says why.
        OSError: the table cannot be read or written.
    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens is {list(tokens)}, expected one number or more, each 1 or more")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to {num_experts}, num_experts")
    if activation_scheme == "none":
        raise NotImplementedError(
            "activation_scheme is 'none', for which cute_dsl has one tactic: there is nothing to "
            "measure"
        )
    kind = Activation(activation)
    experts = _random_experts(
        num_experts, hidden_size, intermediate_size, activation_scheme, kind.gated
    )
    call = Call(kind, "kernel", jnp.dtype(jnp.bfloat16), None, False)
    problem = Problem(call, experts, max(tokens), top_k, devices.current_kind())
    default = CuteDsl(TACTICS["default"][0], deterministic)
    select(default, problem)  # raises, with the reason, if even that cannot be
    found = default.find(problem)
    assert not isinstance(found, str)  # select
    layer = layer_of(problem, found[0].version, deterministic=deterministic)
    every = [CuteDsl(tactic, deterministic) for tactic in TACTICS["all"]]
    candidates = [each for each in every if not isinstance(each.find(problem), str)]
    measured = []
    # disable=None: tqdm is silent where stderr is no terminal.
    hidden = None if progress is None else not progress
    with tqdm(total=len(tokens) * len(candidates), unit="tactic", disable=hidden) as bar:
        for count in tokens:
            arguments = _random_tokens(count, num_experts, top_k, hidden_size)
            taken = {}
            for candidate in candidates:
                run = partial(nvfp4_moe_routed, activation=kind, implementation=candidate)
                taken[candidate] = seconds_of(jax.jit(run), *arguments, experts)
                bar.update()
            best = min(taken, key=lambda each: taken[each])
            assert best.tactic is not None
            measured.append(Measured(layer, count, best.tactic, round(1e6 * taken[best], 2)))
            add(measured[-1:], cache)
    return tuple(measured)


def seconds_of(function: Callable[..., Array], *arguments: Any) -> float:
    """What a call takes: the median of some batches, none of which is waited for in between."""
    jax.block_until_ready(function(*arguments))  # Compiles, and loads kernels.
    taken = []
    for _ in range(_BATCHES):
        begun = time.perf_counter()
        results = [function(*arguments) for _ in range(_CALLS)]
        jax.block_until_ready(results)
        taken.append((time.perf_counter() - begun) / _CALLS)
    return statistics.median(taken)


def _random_tokens(
    tokens: int, num_experts: int, top_k: int, hidden_size: int
) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, hidden_size), np.float32)
    ids = rng.random((tokens, num_experts), np.float32).argpartition(top_k - 1)[:, :top_k]
    weights = jnp.full((tokens, top_k), 1 / top_k, jnp.float32)
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(ids, jnp.int32), weights


def _random_experts(
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    scheme: ActivationScheme,
    gated: bool,
) -> ExpertWeights:
    """Prepared experts of random codes and equal scales, none of it ever unpacked."""
    up = jax.ShapeDtypeStruct((num_experts, intermediate_size, hidden_size), jnp.bfloat16)
    down = jax.ShapeDtypeStruct((num_experts, hidden_size, intermediate_size), jnp.bfloat16)
    scales = (jnp.float32(1e-3), jnp.float32(1e-3)) if scheme == "static" else ()

    def make(gate: Any, up: Any, down: Any) -> ExpertWeights:
        made = quantize_experts(gate, up, down, *scales, activation_scheme=scheme)
        return prepare(made, "cute_dsl")

    def fill(leaf: Any) -> Array:
        if leaf.dtype == jnp.uint8:
            return jax.random.bits(jax.random.key(0), leaf.shape, jnp.uint8)
        value = 1e-3 if leaf.dtype == jnp.float32 else 1
        return jnp.full(leaf.shape, value, leaf.dtype)

    return jax.tree.map(fill, jax.eval_shape(make, up if gated else None, up, down))
