"""What the NNX and the Linen layer share: constructors, names of variables, checks, the call.

Both keep a `MoeLayer`: its arrays as variables of theirs, named by their path in it, such as
("experts", "w13", "data"), and everything else as static configuration.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float

from jax_nvfp4_moe import parallel
from jax_nvfp4_moe._messages import as_array
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights
from jax_nvfp4_moe.layer import MoeLayer, Router
from jax_nvfp4_moe.quantization import quantize_experts

Path = tuple[str, ...]


def path_of(keys: Any) -> Path:
    """A leaf's path in a `MoeLayer` as names."""
    return tuple(key.name for key in keys)


def is_frozen(layer: MoeLayer, path: Path) -> bool:
    """Whether an optimiser must leave a leaf alone.

    What is in NVFP4, and the selection bias: no gradient reaches it, but weight decay would.
    """
    quantised = isinstance(getattr(layer, path[0]), ExpertWeights)
    return quantised or path[-1] == "selection_bias"


def axis_names(path: Path, leaf: Any, expert_axis: str | None) -> tuple[str | None, ...] | None:
    """The names of a leaf's axes in sharding metadata; None if it has none to split."""
    if expert_axis is None or path[0] != "experts" or not leaf.ndim:
        return None
    return (expert_axis, *[None] * (leaf.ndim - 1))


def placed(leaf: Any, mesh: Mesh | None, names: tuple[str | None, ...]) -> Any:
    """A leaf where its names say; the leaf itself without a mesh, or if it is only a shape."""
    if mesh is None or isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jax.device_put(leaf, NamedSharding(mesh, P(*names)))


def call(
    layer: MoeLayer,
    x: Float[Array, "*batch H"],
    router_input: Float[Array, "*batch H"] | None,
    *,
    mesh: Mesh | None,
    expert_axis: str | None,
    data_axis: str | None,
    axis_name: str | None,
    **options: Any,
) -> Float[Array, "*batch H"]:
    """`layer(x)`, over the mesh if there is one.

    Raises:
        TypeError, ValueError: as `MoeLayer`; or both a mesh and an axis name were given, or the
            mesh does not divide x.
    """
    x = as_array("x", x)
    if mesh is None:
        return layer(x, router_input=router_input, axis_name=axis_name, **options)
    if axis_name is not None:
        raise ValueError(f"axis_name is {axis_name!r}, but the layer has a mesh: expected one")
    if data_axis is not None and (x.ndim < 2 or x.shape[0] % mesh.shape[data_axis]):
        raise ValueError(
            f"x has shape {x.shape}, but its first axis is split over data_axis {data_axis!r}: "
            f"expected a multiple of {mesh.shape[data_axis]}"
        )

    def run(layer: MoeLayer, x: Array, router_input: Array | None) -> Array:
        return layer(x, router_input=router_input, axis_name=expert_axis, **options)

    specs = dataclasses.replace(
        jax.tree.map(lambda _: P(), layer),
        experts=parallel.partition_specs(layer.experts, str(expert_axis)),
    )
    tokens = P(data_axis)
    # Meshes of explicit axes want inputs to be there already.
    x, router_input = jax.device_put((x, router_input), NamedSharding(mesh, tokens))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs, tokens, tokens), out_specs=tokens)
    return mapped(layer, x, router_input)


class FromWeights:
    """The constructors that both layers have beside `from_layer`."""

    @classmethod
    def from_layer(cls, layer: MoeLayer, **options: Any) -> Any:
        """Takes a whole layer: what a subclass has to define."""
        raise NotImplementedError

    @classmethod
    def from_experts(
        cls,
        experts: ExpertWeights,
        router: Router,
        *,
        activation: str | Activation = "silu",
        **options: Any,
    ) -> Any:
        """Takes the parts of a `MoeLayer`.

        Args:
            experts: in any layout.
            router: its weights, and how to route.
            activation: of the routed experts and of the shared one.
            **options: the other fields of `MoeLayer`, such as `shared` and `shared_gate`, and
                those of `from_layer`.

        Returns:
            What `from_layer` does.

        Raises:
            TypeError, ValueError: as `from_layer`.
        """
        names = {field.name for field in dataclasses.fields(MoeLayer)} & set(options)
        fields = {name: options.pop(name) for name in names}
        layer = MoeLayer(router, experts, Activation.of(activation), **fields)
        return cls.from_layer(layer, **options)

    @classmethod
    def from_bf16(
        cls,
        gate: Float[ArrayLike, "E I H"] | None,
        up: Float[ArrayLike, "E I H"],
        down: Float[ArrayLike, "E H I"],
        router: Router,
        *,
        activation_scheme: ActivationScheme | None = None,
        w13_input_scale: Float[ArrayLike, "..."] | float | None = None,
        w2_input_scale: Float[ArrayLike, "..."] | float | None = None,
        **options: Any,
    ) -> Any:
        """Quantises experts and takes them; works under `jax.jit` and `jax.eval_shape` too.

        Args:
            gate: as in `quantize_experts`, as are the others up to `w2_input_scale`.
            up: [E, I, H].
            down: [E, H, I].
            router: its weights, and how to route.
            activation_scheme: how activations are quantised.
            w13_input_scale: calibrated scale of the layer's input.
            w2_input_scale: calibrated scale of the activation's output.
            **options: those of `from_experts`.

        Returns:
            What `from_layer` does.

        Raises:
            TypeError, ValueError: as `quantize_experts` and `from_layer`.
        """
        experts = quantize_experts(
            gate, up, down, w13_input_scale, w2_input_scale, activation_scheme=activation_scheme
        )
        return cls.from_experts(experts, router, **options)


def check_mesh(
    mesh: Mesh | None, expert_axis: str | None, data_axis: str | None, size: int
) -> None:
    """Checks where experts are to be split; `size` is how many there are.

    Raises:
        ValueError: the mesh lacks an axis, or does not divide the experts.
    """
    if mesh is None:
        if data_axis is not None:
            raise ValueError(f"data_axis is {data_axis!r}, but mesh is None: expected both")
        return
    if expert_axis is None:
        raise ValueError("expert_axis is None, but mesh was given: name the axis to split over")
    for name, axis in (("expert_axis", expert_axis), ("data_axis", data_axis)):
        if axis is not None and axis not in mesh.shape:
            raise ValueError(f"{name} is {axis!r}, but the mesh has axes {tuple(mesh.shape)}")
    if size % mesh.shape[expert_axis]:
        raise ValueError(
            f"expert_axis {expert_axis!r} has {mesh.shape[expert_axis]} devices, which do not "
            f"divide {size} experts"
        )
