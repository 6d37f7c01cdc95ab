"""Expert and data parallelism over a `jax.sharding.Mesh`.

Experts are split over one mesh axis, each device holding a contiguous share of them, and tokens may
be split over another. Every device computes its own experts' rows for all tokens of its data shard;
the rows are summed over the expert axis. Each row is zero on all devices but one, so the sum is
exact and the result has the bits of the unsplit layer, however the experts are split.

    mesh = jax.make_mesh((2, 4), ("data", "expert"))
    experts = parallel.place(experts, mesh)
    y = parallel.nvfp4_moe(x, logits, experts, routing, mesh=mesh, data_axis="data")
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_nvfp4_moe import moe
from jax_nvfp4_moe.experts import ExpertWeights, check_experts
from jax_nvfp4_moe.routing import Routing


def partition_specs(experts: ExpertWeights, expert_axis: str = "expert") -> ExpertWeights:
    """A `PartitionSpec` for each array: split over experts, layer-wide scalars replicated.

    Args:
        experts: arrays or `jax.ShapeDtypeStruct`s.
        expert_axis: the mesh axis that experts are split over.

    Returns:
        The same pytree with specs for leaves, as `jax.shard_map` and `jax.jit` take them.
    """
    return jax.tree.map(lambda leaf: P(expert_axis) if leaf.ndim else P(), experts)


def place(experts: ExpertWeights, mesh: Mesh, *, expert_axis: str = "expert") -> ExpertWeights:
    """Puts each device's share of the experts on it.

    Args:
        experts: the whole layer, in any layout.
        mesh: the devices.
        expert_axis: the mesh axis to split experts over; replicated over the others.

    Returns:
        The same experts, sharded.

    Raises:
        ValueError: the mesh has no such axis, or its size does not divide the number of experts.
    """
    check_experts(experts)
    _check_split(mesh, expert_axis, "expert_axis", "experts", experts.num_experts)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        partition_specs(experts, expert_axis),
        is_leaf=lambda node: isinstance(node, P),
    )
    return jax.device_put(experts, shardings)


def nvfp4_moe(
    x: Float[Array, "T H"],
    logits: Float[Array, "T E"],
    experts: ExpertWeights,
    routing: Routing,
    *,
    mesh: Mesh,
    selection_bias: Float[Array, " E"] | None = None,
    expert_axis: str = "expert",
    data_axis: str | None = None,
    **options: Any,
) -> Float[Array, "T H"]:
    """`jax_nvfp4_moe.nvfp4_moe` over a mesh.

    Args:
        x: all tokens [T, H].
        logits: [T, E].
        experts: the whole layer, best placed by `place`.
        routing: how to route.
        mesh: the devices.
        selection_bias: [E], or None.
        expert_axis: the mesh axis that experts are split over.
        data_axis: the mesh axis that tokens are split over, or None.
        **options: those of `jax_nvfp4_moe.nvfp4_moe`, without `axis_name`.

    Returns:
        [T, H], split over `data_axis`.

    Raises:
        ValueError: a mesh axis is missing or does not divide what is split over it; or as
            `jax_nvfp4_moe.nvfp4_moe`, with the shapes that one device sees.
    """

    def run(x: Array, logits: Array, bias: Array | None, experts: ExpertWeights) -> Array:
        return moe.nvfp4_moe(
            x, logits, experts, routing, selection_bias=bias, axis_name=expert_axis, **options
        )

    tokens = P(data_axis)
    run = _mapped(run, x, experts, mesh, expert_axis, data_axis, (tokens, tokens, P()))
    return run(x, logits, selection_bias, experts)


def nvfp4_moe_routed(
    x: Float[Array, "T H"],
    topk_ids: Int[Array, "T K"],
    topk_weights: Float[Array, "T K"],
    experts: ExpertWeights,
    *,
    mesh: Mesh,
    expert_axis: str = "expert",
    data_axis: str | None = None,
    **options: Any,
) -> Float[Array, "T H"]:
    """`jax_nvfp4_moe.nvfp4_moe_routed` over a mesh; the arguments are as in `nvfp4_moe` here.

    Returns:
        [T, H], split over `data_axis`.

    Raises:
        ValueError: as `nvfp4_moe`.
    """
    run = functools.partial(moe.nvfp4_moe_routed, axis_name=expert_axis, **options)
    tokens = P(data_axis)
    run = _mapped(run, x, experts, mesh, expert_axis, data_axis, (tokens, tokens, tokens))
    return run(x, topk_ids, topk_weights, experts)


def _mapped(
    run: Callable[..., Array],
    x: Array,
    experts: ExpertWeights,
    mesh: Mesh,
    expert_axis: str,
    data_axis: str | None,
    token_specs: tuple[P, ...],
) -> Callable[..., Array]:
    check_experts(experts)
    _check_split(mesh, expert_axis, "expert_axis", "experts", experts.num_experts)
    if data_axis is not None:
        _check_split(mesh, data_axis, "data_axis", "tokens", x.shape[0])
    specs = (*token_specs, partition_specs(experts, expert_axis))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(data_axis))

    def call(*arguments: Any) -> Array:
        # A mesh of explicit axes, jax.make_mesh's default, wants its inputs to be there already.
        *tokens, experts = arguments
        placed = jax.device_put(
            tuple(tokens), tuple(NamedSharding(mesh, spec) for spec in token_specs)
        )
        return mapped(*placed, experts)

    return call


def _check_split(mesh: Mesh, axis: str, argument: str, what: str, count: int) -> None:
    if axis not in mesh.shape:
        raise ValueError(f"{argument} is {axis!r}, but the mesh has axes {tuple(mesh.shape)}")
    if count % mesh.shape[axis]:
        raise ValueError(
            f"{argument} {axis!r} has {mesh.shape[axis]} devices, which do not divide "
            f"{count} {what}"
        )
