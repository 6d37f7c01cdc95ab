"""Expert and data parallelism over a `jax.sharding.Mesh`.

One mesh axis splits the experts, a contiguous share for each device; another may split the tokens.
Each device computes its own experts' rows for all tokens of its data shard, and the rows are summed
over the expert axis. Each row is zero on all devices but one, so the sum is exact: the result has
the bits of the unsplit layer, however the experts are split.

    mesh = jax.make_mesh((2, 4), ("data", "expert"))
    experts = parallel.place(experts, mesh)
    y = parallel.nvfp4_moe(x, logits, experts, routing, mesh=mesh, data_axis="data")
"""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_nvfp4_moe import moe
from jax_nvfp4_moe.call_options import ExpertOptions, check_options
from jax_nvfp4_moe.experts import ExpertWeights, check_experts
from jax_nvfp4_moe.routing import Routing

_OPTIONS = ExpertOptions.__optional_keys__ | {"mesh", "expert_axis", "data_axis"}


def partition_specs(experts: ExpertWeights, expert_axis: str = "expert") -> ExpertWeights:
    """Returns a `PartitionSpec` for each array: split over experts; for a scalar, replicated.

    Args:
        experts: with arrays or `jax.ShapeDtypeStruct`s.
        expert_axis: the mesh axis that splits the experts.

    Returns:
        The same pytree with specs for leaves, as `jax.shard_map` and `jax.jit` take them.
    """
    return jax.tree.map(lambda leaf: P(expert_axis) if leaf.ndim else P(), experts)


def place(experts: ExpertWeights, mesh: Mesh, *, expert_axis: str = "expert") -> ExpertWeights:
    """Returns the experts with each device's share placed on it.

    Args:
        experts: all experts of the layer, in any layout.
        mesh: the devices.
        expert_axis: the mesh axis that splits the experts; the other axes replicate them.

    Raises:
        ValueError: the mesh has no such axis, or its size does not divide the number of experts.
    """
    check_experts(experts)
    check_split(mesh, expert_axis, "expert_axis", "experts", experts.num_experts)
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
    **options: Unpack[ExpertOptions],
) -> Float[Array, "T H"]:
    """Returns what `jax_nvfp4_moe.nvfp4_moe` does, computed over a mesh.

    Args:
        x: all tokens [T, H].
        logits: the router's output for all tokens, [T, E].
        experts: all experts of the layer, best placed by `place`.
        routing: how to route.
        mesh: the devices.
        selection_bias: [E], or None.
        expert_axis: the mesh axis that splits the experts.
        data_axis: the mesh axis that splits the tokens, or None.
        **options: see `ExpertOptions`.

    Returns:
        [T, H], split over `data_axis`.

    Raises:
        TypeError: an option has an unknown name.
        ValueError: the mesh lacks an axis, or its size does not divide the experts or the tokens.
        TypeError, ValueError, NotImplementedError: as `jax_nvfp4_moe.nvfp4_moe`; messages show the
            shapes on one device.
    """
    check_options("parallel.nvfp4_moe", options, _OPTIONS | {"selection_bias"})

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
    **options: Unpack[ExpertOptions],
) -> Float[Array, "T H"]:
    """Returns what `jax_nvfp4_moe.nvfp4_moe_routed` does, computed over a mesh.

    Args:
        x: all tokens [T, H].
        topk_ids: each token's experts [T, K].
        topk_weights: their weights [T, K].
        experts: all experts of the layer, best placed by `place`.
        mesh: as in `nvfp4_moe` above, as are the arguments below.
        expert_axis: the mesh axis that splits the experts.
        data_axis: the mesh axis that splits the tokens, or None.
        **options: see `ExpertOptions`.

    Returns:
        [T, H], split over `data_axis`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `nvfp4_moe`.
    """
    check_options("parallel.nvfp4_moe_routed", options, _OPTIONS)
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
    check_split(mesh, expert_axis, "expert_axis", "experts", experts.num_experts)
    if data_axis is not None:
        check_split(mesh, data_axis, "data_axis", "tokens", x.shape[0])
    specs = (*token_specs, partition_specs(experts, expert_axis))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(data_axis))

    def call(*arguments: Any) -> Array:
        # A mesh of explicit axes, jax.make_mesh's default, expects its inputs to be placed already.
        *tokens, experts = arguments
        placed = jax.device_put(
            tuple(tokens), tuple(NamedSharding(mesh, spec) for spec in token_specs)
        )
        return mapped(*placed, experts)

    return call


def check_axis(mesh: Mesh, axis: str, argument: str) -> None:
    """Refuses an axis, the value of `argument`, that the mesh does not have."""
    if axis not in mesh.shape:
        raise ValueError(f"{argument} is {axis!r}, but the mesh has axes {tuple(mesh.shape)}")


def check_split(mesh: Mesh, axis: str, argument: str, what: str, count: int) -> None:
    """Refuses an axis that the mesh does not have, or that does not divide `count`."""
    check_axis(mesh, axis, argument)
    if count % mesh.shape[axis]:
        raise ValueError(
            f"{argument} {axis!r} has {mesh.shape[axis]} devices, which do not divide "
            f"{count} {what}"
        )
