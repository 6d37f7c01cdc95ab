"""Finds the fastest tactics of "cute_dsl": `python -m jax_nvfp4_moe tune cute_dsl`."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_nvfp4_moe import devices
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.bridge.cute_dsl import TACTICS, Tactic
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights
from jax_nvfp4_moe.implementations.base import Call, Problem, Routed, shapes_of
from jax_nvfp4_moe.implementations.cute_dsl.implementation import CuteDsl, CuteDslPlan, tuned_layer
from jax_nvfp4_moe.tuning import Measured, measuring
from jax_nvfp4_moe.tuning.table import add


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
    """Measures the tactics of "cute_dsl" for a layer, and writes the fastest into the table.

    Weights and tokens are random, and routing is uniform. Programs that were traced earlier keep
    their tactics.

    Args:
        num_experts: the number of experts on this device.
        top_k: K.
        hidden_size: H.
        intermediate_size: I.
        tokens: the numbers of tokens T for which to find the fastest tactic.
        activation: the activation's name.
        activation_scheme: "static" or "per_token"; "none" has only one tactic.
        deterministic: as in `CuteDsl`.
        cache: the folder of the table; None means `bridge.manifest.default_cache()`.
        progress: whether to show progress on stderr; None means only if that is a terminal.

    Returns:
        The fastest tactics, in the order of `tokens`.

    Raises:
        ValueError: a size does not fit.
        NotImplementedError: the kernels cannot serve the layer here, no module is built, or there
            is only one tactic; the message gives the reason.
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
    from tqdm import tqdm  # noqa: PLC0415  Of an extra; importing the package does not need it.

    kind = Activation(activation)
    experts = measuring.random_experts(
        num_experts,
        hidden_size,
        intermediate_size,
        gated=kind.gated,
        activation_scheme=activation_scheme,
        layout=CuteDsl.layout,
    )
    call = Call(kind, jnp.dtype(jnp.bfloat16), None, False)
    problem = Problem(call, shapes_of(experts), max(tokens), top_k, devices.current_kind())
    default = _plan(TACTICS["default"][0], deterministic, problem)
    layer = tuned_layer(problem, default.module.version, deterministic=deterministic)
    candidates = _candidates(problem, deterministic)
    measured = []
    # disable=None: tqdm shows nothing if stderr is not a terminal.
    hidden = None if progress is None else not progress
    with tqdm(total=len(tokens) * len(candidates), unit="tactic", disable=hidden) as bar:
        for count in tokens:
            arguments = measuring.random_tokens(count, num_experts, top_k, hidden_size)
            taken = {}
            for candidate in candidates:
                taken[candidate] = measuring.seconds_of(_runner(candidate), *arguments, experts)
                bar.update()
            best = min(taken, key=lambda each: taken[each])
            tactic = best.functions.tactic
            measured.append(Measured(layer, count, tactic, round(1e6 * taken[best], 2)))
            add(measured[-1:], cache)
    return tuple(measured)


def _candidates(problem: Problem, deterministic: bool) -> list[CuteDslPlan]:
    """Returns the plans of all tactics that can serve the problem."""
    plans = []
    for tactic in TACTICS["all"]:
        try:
            plans.append(_plan(tactic, deterministic, problem))
        except NotImplementedError:
            continue
    return plans


def _plan(tactic: Tactic, deterministic: bool, problem: Problem) -> CuteDslPlan:
    plan = CuteDsl(tactic, deterministic).plan(problem)
    assert isinstance(plan, CuteDslPlan)
    return plan


def _runner(plan: CuteDslPlan) -> "jax.stages.Wrapped":
    def run(x: Array, ids: Array, weights: Array, experts: ExpertWeights) -> Array:
        return plan.run(x, Routed(ids, weights), experts)

    return jax.jit(run)
