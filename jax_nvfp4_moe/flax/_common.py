"""What the NNX and the Linen layer share: constructors, names of variables, checks, the call.

Both keep a `MoeLayer`. Its arrays are variables, named by their path in it, such as
("experts", "w13", "data"); everything else is static configuration.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar, TypedDict, Unpack

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float, Float32

from jax_nvfp4_moe import parallel
from jax_nvfp4_moe._messages import as_array
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.call_options import LayerOptions, check_options
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights
from jax_nvfp4_moe.implementations.base import Implementation
from jax_nvfp4_moe.layer import Mlp, MoeLayer
from jax_nvfp4_moe.quantization import quantize_experts
from jax_nvfp4_moe.router import Router

LeafPath = tuple[str, ...]


class ModuleOptions(TypedDict, total=False):
    """The options of every constructor, which the attributes of `Nvfp4MoE` describe."""

    implementation: str | Implementation | None
    mesh: Mesh | None
    expert_axis: str | None
    data_axis: str | None
    name: str | None  # Linen only


class LayerFields(TypedDict, total=False):
    """The optional fields of a `MoeLayer`, which describes them."""

    shared: Mlp | ExpertWeights | None
    shared_gate: Float[Array, "1 H"] | None
    to_latent: Float[Array, "L H"] | None
    from_latent: Float[Array, "H L"] | None
    router_weight_on_input: bool


class QuantizeOptions(TypedDict, total=False):
    """The options of `quantize_experts`, which describes them."""

    w13_input_scale: Float32[ArrayLike, "..."] | float | None
    w2_input_scale: Float32[ArrayLike, "..."] | float | None
    activation_scheme: ActivationScheme | None
    gate_bias: Float[ArrayLike, "E I"] | None
    up_bias: Float[ArrayLike, "E I"] | None
    down_bias: Float[ArrayLike, "E H"] | None
    separate_scales: bool


class FromExpertsOptions(LayerFields, ModuleOptions, total=False):
    """The options of `from_experts`."""


class FromBf16Options(QuantizeOptions, FromExpertsOptions, total=False):
    """The options of `from_bf16`."""


class Nvfp4MoEBase:
    """Constructors, checks and the call of both layers."""

    implementation: str | Implementation | None
    mesh: Mesh | None
    expert_axis: str | None
    data_axis: str | None

    _module_options: ClassVar[frozenset[str]]  # of a subclass's constructors

    @classmethod
    def from_layer(cls, layer: MoeLayer, **options: Unpack[ModuleOptions]) -> Any:
        """Takes a whole layer; a subclass defines it."""
        raise NotImplementedError

    @classmethod
    def from_experts(
        cls,
        experts: ExpertWeights,
        router: Router,
        *,
        activation: str | Activation = "silu",
        **options: Unpack[FromExpertsOptions],
    ) -> Any:
        """Returns what `from_layer` does, for the parts of a `MoeLayer`.

        Args:
            experts: the routed experts, in any layout.
            router: its weights and its routing method.
            activation: of the routed experts and of the shared one.
            **options: the other fields of `MoeLayer`, such as `shared` and `shared_gate`, and the
                options of `from_layer`.

        Raises:
            TypeError, ValueError: as `from_layer`.
        """
        expected = LayerFields.__optional_keys__ | cls._module_options
        check_options(f"{cls.__name__}.from_experts", options, {"activation", *expected})
        fields = _take(options, LayerFields.__optional_keys__)
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
        activation: str | Activation = "silu",
        **options: Unpack[FromBf16Options],
    ) -> Any:
        """Quantises experts and returns what `from_experts` does.

        Works under `jax.jit` and `jax.eval_shape` too.

        Args:
            gate: [E, I, H], or None for experts that are not gated, as in `quantize_experts`.
            up: [E, I, H].
            down: [E, H, I].
            router: its weights and its routing method.
            activation: of the routed experts and of the shared one.
            **options: those of `quantize_experts`, such as `activation_scheme`, and of
                `from_experts`.

        Raises:
            TypeError, ValueError: as `quantize_experts` and `from_layer`.
        """
        quantize_options = QuantizeOptions.__optional_keys__
        expected = quantize_options | LayerFields.__optional_keys__ | cls._module_options
        check_options(f"{cls.__name__}.from_bf16", options, {"activation", *expected})
        experts = quantize_experts(gate, up, down, **_take(options, quantize_options))
        return cls.from_experts(experts, router, activation=activation, **options)  # type: ignore[misc]

    def _check_mesh(self, num_experts: int) -> None:
        """Checks that the mesh can split the experts.

        Raises:
            ValueError: the mesh lacks an axis, or does not divide the experts.
        """
        if self.mesh is None:
            if self.data_axis is not None:
                raise ValueError(
                    f"data_axis is {self.data_axis!r}, but mesh is None: expected both"
                )
            return
        if self.expert_axis is None:
            raise ValueError("expert_axis is None, but mesh was given: name the axis to split over")
        if self.data_axis is not None:
            parallel.check_axis(self.mesh, self.data_axis, "data_axis")
        parallel.check_split(self.mesh, self.expert_axis, "expert_axis", "experts", num_experts)

    def _run(
        self,
        layer: MoeLayer,
        x: Float[Array, "*batch H"],
        router_input: Float[Array, "*batch H"] | None,
        options: LayerOptions,
    ) -> Float[Array, "*batch H"]:
        """Returns `layer(x)`, computed over the mesh if there is one.

        Raises:
            TypeError, ValueError: as `MoeLayer`; or there are both a mesh and an axis name, or the
                mesh does not divide x.
        """
        name = f"{type(self).__name__}.__call__"
        check_options(name, options, {"router_input", *LayerOptions.__optional_keys__})
        options.setdefault("implementation", self.implementation)
        mesh, data_axis = self.mesh, self.data_axis
        if mesh is None:
            return layer(x, router_input=router_input, **options)
        axis_name = options.get("axis_name")
        if axis_name is not None:
            raise ValueError(f"axis_name is {axis_name!r}, but the layer has a mesh: expected one")
        options["axis_name"] = self.expert_axis
        x = as_array("x", x)
        if data_axis is not None and (x.ndim < 2 or x.shape[0] % mesh.shape[data_axis]):
            raise ValueError(
                f"x has shape {x.shape}, but its first axis is split over data_axis "
                f"{data_axis!r}: expected a multiple of {mesh.shape[data_axis]}"
            )

        def run(layer: MoeLayer, x: Array, router_input: Array | None) -> Array:
            return layer(x, router_input=router_input, **options)

        specs = dataclasses.replace(
            jax.tree.map(lambda _: P(), layer),
            experts=parallel.partition_specs(layer.experts, str(self.expert_axis)),
        )
        tokens = P(data_axis)
        # Meshes of explicit axes expect their inputs to be placed already.
        x, router_input = jax.device_put((x, router_input), NamedSharding(mesh, tokens))
        mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs, tokens, tokens), out_specs=tokens)
        return mapped(layer, x, router_input)


def _take(options: Any, names: Collection[str]) -> dict[str, Any]:
    """Removes the options with these names and returns them."""
    return {name: options.pop(name) for name in names if name in options}


def path_of(keys: Any) -> LeafPath:
    """Returns a leaf's path in a `MoeLayer`, as names."""
    return tuple(key.name for key in keys)


def is_frozen(layer: MoeLayer, path: LeafPath) -> bool:
    """Returns whether an optimiser must leave a leaf alone.

    That is everything in NVFP4, and the selection bias, which gets no gradient but would be changed
    by weight decay.
    """
    quantised = isinstance(getattr(layer, path[0]), ExpertWeights)
    return quantised or path[-1] == "selection_bias"


def axis_names(path: LeafPath, leaf: Any, expert_axis: str | None) -> tuple[str | None, ...] | None:
    """Returns the names of a leaf's axes in sharding metadata; None if it is not to be split."""
    if expert_axis is None or path[0] != "experts" or not leaf.ndim:
        return None
    return (expert_axis, *[None] * (leaf.ndim - 1))


def put(leaf: Any, mesh: Mesh | None, names: tuple[str | None, ...]) -> Any:
    """Returns a leaf placed on the mesh; without a mesh, and for a bare shape, the leaf itself."""
    if mesh is None or isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jax.device_put(leaf, NamedSharding(mesh, P(*names)))
