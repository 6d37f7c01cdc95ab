"""The unchecked core of the layer: choose a plan, run it, transform it.

`moe` and `layer` call `compute` with arguments that they checked. jit, vmap and grad are defined
here, once for all implementations.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from jax_nvfp4_moe import devices, selection
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.implementations.base import (
    Call,
    Implementation,
    Plan,
    Problem,
    Routed,
    Unrouted,
    shapes_of,
)
from jax_nvfp4_moe.implementations.common import gradient
from jax_nvfp4_moe.routing import Routing, select_experts


def compute(
    x: Float[Array, "T H"],
    routed: Routed | Unrouted,
    experts: ExpertWeights,
    call: Call,
    implementation: str | Implementation | None,
    *,
    routing: Routing | None = None,
) -> Float[Array, "T H"]:
    """Returns the layer's output, without checking the arguments.

    Args:
        x: tokens.
        routed: their experts and weights, or `Unrouted` for an implementation that routes itself.
        experts: the layer's experts.
        call: the static arguments.
        implementation: as in `nvfp4_moe_routed`.
        routing: the routing of `Unrouted` tokens.

    Raises:
        ValueError: no implementation has that name.
        NotImplementedError: the implementation that was named cannot serve the call.
    """
    if isinstance(routed, Routed):
        top_k = routed.topk_ids.shape[1]
    else:
        assert routing is not None
        top_k = routing.top_k
    kind = devices.current_kind()
    problem = Problem(call, shapes_of(experts), len(x), top_k, kind, routing)
    return _moe(selection.choose(implementation, problem), x, routed, experts)


@functools.partial(jax.jit, static_argnums=0)
def _moe(plan: Plan, x: Array, routed: Routed | Unrouted, experts: ExpertWeights) -> Array:
    return _straight_through(plan, x, routed, experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(
    plan: Plan, x: Array, routed: Routed | Unrouted, experts: ExpertWeights
) -> Array:
    if isinstance(routed, Routed):

        def run(tokens: tuple[Array, Routed], experts: ExpertWeights) -> Array:
            return _run(plan, *tokens, experts)

        return _folding_vmap(run)((x, routed), experts)

    # The selection bias has no token axis, so vmap treats it like the experts.
    def run_unrouted(tokens: tuple[Array, Array], layer: tuple[Array, ExpertWeights]) -> Array:
        x, logits = tokens
        bias, experts = layer
        return _run(plan, x, Unrouted(logits, bias), experts)

    return _folding_vmap(run_unrouted)((x, routed.logits), (routed.selection_bias, experts))


def _run(plan: Plan, x: Array, routed: Routed | Unrouted, experts: ExpertWeights) -> Array:
    """Runs a plan; on platforms that it cannot be lowered for, runs the fallback."""
    if len(x) == 0:
        return jnp.zeros(x.shape, plan.problem.call.output_dtype)
    if len(x) != plan.problem.tokens:  # vmap folded its axis into T
        plan = plan.implementation.plan(dataclasses.replace(plan.problem, tokens=len(x)))

    def here(x: Array, routed: Routed | Unrouted, experts: ExpertWeights) -> Array:
        if isinstance(routed, Routed):
            return plan.run(x, routed, experts)
        return plan.run_unrouted(x, routed, experts)

    def elsewhere(x: Array, routed: Routed | Unrouted, experts: ExpertWeights) -> Array:
        if isinstance(routed, Unrouted):
            routed = _route(plan, routed.logits, routed.selection_bias)
        return selection.fallback(plan.problem).run(x, routed, experts)

    if plan.platform is None:
        return here(x, routed, experts)
    platforms = {plan.platform: here}
    return lax.platform_dependent(x, routed, experts, default=elsewhere, **platforms)


def _route(plan: Plan, logits: Array, selection_bias: Array | None) -> Routed:
    assert plan.problem.routing is not None  # of a plan for `Unrouted` tokens
    return Routed(*select_experts(logits, plan.problem.routing, selection_bias))


# ------------------------------------------------------------------------------------- transforms


def _forward(plan: Plan, *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _straight_through(plan, *arguments), arguments


def _backward(plan: Plan, residuals: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    x, routed, experts = residuals
    frozen = jax.tree.map(_zero_cotangent, experts)
    if isinstance(routed, Routed):
        dx, dw = _backward_routed(plan, x, routed, experts, cotangent)
        return dx, Routed(_zero_cotangent(routed.topk_ids), dw), frozen

    def weigh(logits: Array) -> tuple[Array, Array]:
        routed_here = _route(plan, logits, routed.selection_bias)
        return routed_here.topk_weights, routed_here.topk_ids

    weights, pull, ids = jax.vjp(weigh, routed.logits, has_aux=True)
    dx, dw = _backward_routed(plan, x, Routed(ids, weights), experts, cotangent)
    (d_logits,) = pull(dw)
    d_bias = jax.tree.map(_zero_cotangent, routed.selection_bias)
    return dx, Unrouted(d_logits, d_bias), frozen


def _backward_routed(
    plan: Plan, x: Array, routed: Routed, experts: ExpertWeights, cotangent: Array
) -> tuple[Array, Array]:
    def run(tokens: tuple[Array, Routed, Array], experts: ExpertWeights) -> tuple[Array, Array]:
        x, routed, g = tokens
        return gradient.backward(plan.problem.call, plan.numerics, x, *routed, experts, g)

    return _folding_vmap(run)((x, routed, cotangent), experts)


_straight_through.defvjp(_forward, _backward)


def _zero_cotangent(array: Array) -> Any:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


def _folding_vmap(run: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Returns `run(tokens, layer)` with a vmap rule that makes it one call with more tokens.

    Every array of `tokens`, and every result, has the token axis first. If arrays of `layer` are
    batched too, the calls of the batch run one after another.
    """

    @custom_vmap
    def call(tokens: Any, layer: Any) -> Any:
        return run(tokens, layer)

    @call.def_vmap
    def rule(axis_size: int, batched: Any, tokens: Any, layer: Any) -> tuple[Any, Any]:
        tokens_batched, layer_batched = batched
        tokens = jax.tree.map(
            lambda array, is_batched: (
                array if is_batched else jnp.broadcast_to(array[None], (axis_size, *array.shape))
            ),
            tokens,
            tokens_batched,
        )
        if any(jax.tree.leaves(layer_batched)):
            leaves, treedef = jax.tree.flatten(layer)
            flags = jax.tree.leaves(layer_batched)

            def one(index: Array) -> Any:
                own = [
                    leaf[index] if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)
                ]
                mine = jax.tree.map(lambda array: array[index], tokens)
                return call(mine, jax.tree.unflatten(treedef, own))

            results = lax.map(one, jnp.arange(axis_size, dtype=jnp.int32))
        else:
            num_tokens = jax.tree.leaves(tokens)[0].shape[1]
            folded = jax.tree.map(lambda a: a.reshape(axis_size * num_tokens, *a.shape[2:]), tokens)
            results = jax.tree.map(
                lambda a: a.reshape(axis_size, num_tokens, *a.shape[1:]), call(folded, layer)
            )
        return results, jax.tree.map(lambda _: True, results)

    return call
