"""The layer for Flax NNX."""

import dataclasses
from typing import Any, Self, Unpack

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.call_options import LayerOptions, check_options
from jax_nvfp4_moe.config import MoeConfig
from jax_nvfp4_moe.flax import _common
from jax_nvfp4_moe.implementations.base import Implementation
from jax_nvfp4_moe.layer import MoeLayer, check_layer

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "jax_nvfp4_moe.flax.nnx needs Flax: pip install 'jax_nvfp4_moe[flax]'"
    ) from error


class Frozen(nnx.Variable):
    """A variable that optimisers leave alone: NVFP4 weights, their scales, the selection bias."""


class Nvfp4MoE(_common.Nvfp4MoEBase, nnx.Module):
    """A mixture-of-experts block with NVFP4 experts.

    It adds no residual: ``x = x + moe(norm(x))``. Its output has the shape and dtype of x.

    The attributes are those of a `MoeLayer`, with variables for arrays: `router.weight`,
    `experts.w13.data` and so on. The router and an unquantised shared expert are `nnx.Param`.
    Everything in NVFP4 is `Frozen`, as is the selection bias, so that `nnx.grad` and optimisers
    that ask for `nnx.Param` leave it alone.

    With `expert_axis`, the arrays of the experts carry sharding metadata, which
    `nnx.get_partition_spec` and `nnx.get_named_sharding` read. With `mesh` too, the constructor
    places them, and each device computes its own experts, as in `parallel`.
    """

    _module_options = _common.ModuleOptions.__optional_keys__ - {"name"}

    def __init__(
        self,
        config: MoeConfig | None = None,
        *,
        implementation: str | Implementation | None = None,
        mesh: Mesh | None = None,
        expert_axis: str | None = None,
        data_axis: str | None = None,
        rngs: nnx.Rngs | None = None,
        layer: MoeLayer | None = None,
    ) -> None:
        """Makes a layer with random weights; `from_layer` and its like make one from weights.

        Args:
            config: sizes and options. The layer does not keep it.
            implementation: as in `nvfp4_moe_routed`; an attribute that may be set later.
            mesh: the devices to split experts over.
            expert_axis: the mesh axis to split experts over; without a mesh, any name that Flax's
                axis rules know.
            data_axis: the mesh axis that the first axis of x is split over, or None.
            rngs: for the random weights, stream `params`.
            layer: weights instead of `config` and `rngs`, for `from_layer`, which checks them.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, or does not fit the others.
        """
        self.implementation = implementation
        self.mesh, self.expert_axis, self.data_axis = mesh, expert_axis, data_axis
        if layer is not None:
            if config is not None or rngs is not None:
                raise ValueError("layer was given, expected config and rngs to be None")
            self._check_mesh(layer.experts.num_experts)
        else:
            if not isinstance(config, MoeConfig):
                raise TypeError(
                    f"config is {described(config)}, expected "
                    "MoeConfig(hidden_size, intermediate_size, num_experts, routing)"
                )
            self._check_mesh(config.num_experts)
            if rngs is None:
                raise ValueError("rngs is None, expected nnx.Rngs for the random weights")
            layer = config.init(rngs.params())
        variables = jax.tree.map_with_path(
            lambda keys, leaf: self._variable(layer, _common.path_of(keys), leaf), layer
        )
        for name, part in vars(variables).items():
            arrays = all(map(_is_variable, jax.tree.leaves(part, is_leaf=_is_variable)))
            setattr(self, name, nnx.data(part) if arrays else part)

    @classmethod
    def from_layer(cls, layer: MoeLayer, **options: Unpack[_common.ModuleOptions]) -> Self:
        """Returns a layer with these weights, such as one of a checkpoint's.

        Args:
            layer: with arrays, or with `jax.ShapeDtypeStruct`s to restore a checkpoint into.
            **options: `implementation`, `mesh`, `expert_axis`, `data_axis`.

        Raises:
            TypeError, ValueError: the parts of the layer do not fit each other or the mesh.
        """
        check_options(f"{cls.__name__}.from_layer", options, cls._module_options)
        check_layer(layer)
        return cls(layer=layer, **options)  # type: ignore[misc]

    @property
    def layer(self) -> MoeLayer:
        """The weights as a pytree of arrays, as the core's functions take them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(MoeLayer)}
        return jax.tree.map(nnx.Variable.get_value, MoeLayer(**fields), is_leaf=_is_variable)

    def __call__(
        self,
        x: Float[Array, "*batch H"],
        router_input: Float[Array, "*batch H"] | None = None,
        **options: Unpack[LayerOptions],
    ) -> Float[Array, "*batch H"]:
        """Returns the block's output, without a residual.

        Differentiable with respect to x and the `nnx.Param`s.

        Args:
            x: tokens: bfloat16, float16 or float32.
            router_input: the router's input, if not x.
            **options: see `LayerOptions`; `implementation` replaces that of the layer.

        Returns:
            An array of x's shape, and of x's dtype unless `output_dtype` is given.

        Raises:
            TypeError, ValueError, NotImplementedError: as `MoeLayer.__call__`.
        """
        return self._run(self.layer, x, router_input, options)

    def _variable(self, layer: MoeLayer, path: _common.LeafPath, leaf: Any) -> nnx.Variable:
        names = _common.axis_names(path, leaf, self.expert_axis)
        if names is None:
            return Frozen(leaf) if _common.is_frozen(layer, path) else nnx.Param(leaf)
        metadata = {"out_sharding": names, "mesh": self.mesh}
        # Flax places an array only if a mesh is in scope and the array is on it already.
        leaf = _common.put(leaf, self.mesh, names)
        return Frozen(leaf, eager_sharding=False, **metadata)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
