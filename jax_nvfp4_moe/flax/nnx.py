"""The layer for Flax NNX."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ActivationScheme
from jax_nvfp4_moe.flax import _common
from jax_nvfp4_moe.flax._initial import initial_layer
from jax_nvfp4_moe.implementations.base import Implementation
from jax_nvfp4_moe.layer import MoeLayer, check_layer
from jax_nvfp4_moe.routing import Routing

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "jax_nvfp4_moe.flax.nnx needs Flax: pip install 'jax_nvfp4_moe[flax]'"
    ) from error


class Frozen(nnx.Variable):
    """What `nnx.Param` is not: NVFP4 weights with their scales, and the selection bias."""


class Nvfp4MoE(_common.FromWeights, nnx.Module):
    """A mixture-of-experts block with NVFP4 experts.

    The residual is the caller's: ``x = x + moe(norm(x))``. The output has the shape and dtype of x.

    The attributes are those of a `MoeLayer`, with variables for arrays: `router.weight`,
    `experts.w13.data` and so on. Router and unquantised shared expert are `nnx.Param`; what is in
    NVFP4 is `Frozen`, which `nnx.grad` and optimisers that ask for `nnx.Param` leave alone.

    With `expert_axis`, the arrays of the experts carry it as sharding metadata, which
    `nnx.get_partition_spec` and `nnx.get_named_sharding` read. With `mesh`, they are placed when
    the layer is made, and calls run on every device's own experts (see `parallel`).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        routing: Routing,
        *,
        activation: str | Activation = "silu",
        activation_scheme: ActivationScheme = "per_token",
        shared_intermediate_size: int | None = None,
        shared_gate: bool = False,
        router_bias: bool = False,
        selection_bias: bool = False,
        router_weight_on_input: bool = False,
        param_dtype: Any = jnp.bfloat16,
        implementation: str | Implementation | None = None,
        mesh: Mesh | None = None,
        expert_axis: str | None = None,
        data_axis: str | None = None,
        rngs: nnx.Rngs | None = None,
        layer: MoeLayer | None = None,
    ) -> None:
        """Random weights, quantised; `from_layer`, `from_experts` and `from_bf16` take others.

        Args:
            hidden_size: H, a multiple of 16.
            intermediate_size: I of each expert, likewise.
            num_experts: E.
            routing: how logits become experts and weights.
            activation: as in `nvfp4_moe`. One that is not gated makes experts without gates.
            activation_scheme: how activations are quantised. "static" starts with scales of 1.
            shared_intermediate_size: I of the shared expert, which is not quantised; None for none.
            shared_gate: whether the shared expert is weighed, by the sigmoid of a projection.
            router_bias: whether the router's logits have a bias.
            selection_bias: whether there is a bias for the selection alone (DeepSeek-V3).
            router_weight_on_input: as in `nvfp4_moe`.
            param_dtype: of router and shared expert, and of the experts before they are quantised.
            implementation: as in `nvfp4_moe`; an attribute that may be set later.
            mesh: the devices to split experts over.
            expert_axis: the axis to split them over: of the mesh, or without one any name that
                Flax's axis rules know.
            data_axis: the mesh axis that the first axis of x is split over, or None.
            rngs: for the random weights, stream `params`.
            layer: weights to take instead; `from_layer` is the way to pass them.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, or does not fit the others.
        """
        _common.check_mesh(mesh, expert_axis, data_axis, num_experts)
        if layer is None:
            if rngs is None:
                raise ValueError("rngs is None, expected nnx.Rngs for the random weights")
            layer = initial_layer(
                rngs.params(),
                hidden_size,
                intermediate_size,
                num_experts,
                routing,
                activation=activation,
                activation_scheme=activation_scheme,
                shared_intermediate_size=shared_intermediate_size,
                shared_gate=shared_gate,
                router_bias=router_bias,
                selection_bias=selection_bias,
                router_weight_on_input=router_weight_on_input,
                param_dtype=param_dtype,
            )
        self.implementation = implementation
        self.mesh, self.expert_axis, self.data_axis = mesh, expert_axis, data_axis
        variables = jax.tree.map_with_path(
            lambda keys, leaf: self._variable(layer, _common.path_of(keys), leaf), layer
        )
        for name, part in vars(variables).items():
            arrays = all(map(_is_variable, jax.tree.leaves(part, is_leaf=_is_variable)))
            setattr(self, name, nnx.data(part) if arrays else part)

    @classmethod
    def from_layer(cls, layer: MoeLayer, **options: Any) -> Self:
        """A layer with these weights, such as one of a checkpoint's.

        Args:
            layer: with arrays, or with `jax.ShapeDtypeStruct`s to restore a checkpoint into.
            **options: `implementation`, `mesh`, `expert_axis`, `data_axis`.

        Returns:
            The NNX layer.

        Raises:
            TypeError, ValueError: the parts of the layer do not fit each other or the mesh.
        """
        check_layer(layer)
        sizes = layer.experts.hidden_size, layer.experts.intermediate_size
        routing = layer.router.routing
        return cls(*sizes, layer.experts.num_experts, routing, layer=layer, **options)

    @property
    def layer(self) -> MoeLayer:
        """The weights as a pytree of arrays, as the core's functions take them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(MoeLayer)}
        return jax.tree.map(nnx.Variable.get_value, MoeLayer(**fields), is_leaf=_is_variable)

    def __call__(
        self,
        x: Float[Array, "*batch H"],
        router_input: Float[Array, "*batch H"] | None = None,
        *,
        output_dtype: Any = None,
        axis_name: str | None = None,
    ) -> Float[Array, "*batch H"]:
        """The block's output, without a residual.

        Differentiable with respect to x and the `nnx.Param`s.

        Args:
            x: tokens: bfloat16, float16 or float32.
            router_input: what the router sees, if not x.
            output_dtype: None means x's.
            axis_name: as in `nvfp4_moe_routed`: for calls inside a `jax.shard_map` of the caller's.

        Returns:
            The shape of x, of `output_dtype`.

        Raises:
            TypeError, ValueError, NotImplementedError: as `nvfp4_moe_routed`.
        """
        return _common.call(
            self.layer,
            x,
            router_input,
            mesh=self.mesh,
            expert_axis=self.expert_axis,
            data_axis=self.data_axis,
            axis_name=axis_name,
            implementation=self.implementation,
            output_dtype=output_dtype,
        )

    def _variable(self, layer: MoeLayer, path: _common.Path, leaf: Any) -> nnx.Variable:
        names = _common.axis_names(path, leaf, self.expert_axis)
        if names is None:
            return Frozen(leaf) if _common.is_frozen(layer, path) else nnx.Param(leaf)
        metadata = {"out_sharding": names, "mesh": self.mesh}
        # Flax's own placing wants a mesh in scope, and arrays that are on it already.
        leaf = _common.placed(leaf, self.mesh, names)
        return Frozen(leaf, eager_sharding=False, **metadata)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
