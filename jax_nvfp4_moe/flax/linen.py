"""The layer for Flax Linen."""

import functools
from collections.abc import Mapping
from typing import Any, Self, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.call_options import LayerOptions, check_options
from jax_nvfp4_moe.config import MoeConfig
from jax_nvfp4_moe.flax import _common
from jax_nvfp4_moe.implementations.base import Implementation, shapes_of
from jax_nvfp4_moe.layer import MoeLayer, check_layer

try:
    from flax import linen as nn
    from flax.traverse_util import flatten_dict, unflatten_dict
except ImportError as error:
    raise ImportError(
        "jax_nvfp4_moe.flax.linen needs Flax: pip install 'jax_nvfp4_moe[flax]'"
    ) from error

# The variables of each collection, by name; nested like the layer.
Variables = dict[str, dict[str, Any]]


class Nvfp4MoE(_common.Nvfp4MoEBase, nn.Module):
    """A mixture-of-experts block with NVFP4 experts.

    It adds no residual: ``x = x + moe(norm(x))``. Its output has the shape and dtype of x.

    Variables are named as in `MoeLayer`. The collection "params" holds `router`, `shared` and
    `shared_gate`; "frozen", which optimisers leave alone, holds `experts`, a shared expert in
    NVFP4, and the selection bias. `init` makes random weights and quantises them; `from_layer`,
    `from_experts` and `from_bf16` return a module and its variables.

    With `expert_axis`, the arrays of the experts are boxed as by `nn.with_logical_partitioning`,
    for `nn.get_partition_spec`. With `mesh` too, each device computes its own experts, as in
    `parallel`.

    Attributes:
        config: sizes and options; None with `structure`.
        implementation: as in `nvfp4_moe_routed`.
        mesh: the devices to split experts over.
        expert_axis: the mesh axis to split experts over; without a mesh, any name that Flax's axis
            rules know.
        data_axis: the mesh axis that the first axis of x is split over, or None.
        structure: a layer with `jax.ShapeDtypeStruct`s for arrays, instead of `config`. The
            constructors that take weights set it; `init` then fills the arrays with ones.

    Raises:
        TypeError, ValueError: an attribute is of the wrong type, or does not fit the others.
    """

    config: MoeConfig | None = None
    implementation: str | Implementation | None = None
    mesh: Mesh | None = None
    expert_axis: str | None = None
    data_axis: str | None = None
    structure: MoeLayer | None = None

    _module_options = _common.ModuleOptions.__optional_keys__

    def __post_init__(self) -> None:
        if self.structure is None:
            if not isinstance(self.config, MoeConfig):
                raise TypeError(
                    f"config is {described(self.config)}, expected "
                    "MoeConfig(hidden_size, intermediate_size, num_experts, routing)"
                )
        elif self.config is not None:
            raise ValueError("config and structure were both given, expected one")
        self._check_mesh(self._structure().experts.num_experts)
        super().__post_init__()

    @classmethod
    def from_layer(
        cls, layer: MoeLayer, **options: Unpack[_common.ModuleOptions]
    ) -> tuple[Self, Variables]:
        """Returns a module and variables with these weights, such as one of a checkpoint's layers.

        Args:
            layer: with arrays, or with `jax.ShapeDtypeStruct`s to restore a checkpoint into.
            **options: `implementation`, `mesh`, `expert_axis`, `data_axis`, and the module's
                `name`.

        Returns:
            (module, variables), for ``module.apply(variables, x)``.

        Raises:
            TypeError, ValueError: the parts of the layer do not fit each other or the mesh.
        """
        check_options(f"{cls.__name__}.from_layer", options, cls._module_options)
        check_layer(layer)
        module = cls(structure=shapes_of(layer), **options)
        return module, module._variables_of(layer)

    def layer_of(self, variables: Mapping[str, Any]) -> MoeLayer:
        """Returns the weights as a pytree of arrays, as the core's functions take them.

        Args:
            variables: this module's, boxed or not.

        Raises:
            ValueError: an array is missing, or does not have the module's shape.
        """
        return self._layer_of(nn.unbox(variables), check=True)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch H"],
        router_input: Float[Array, "*batch H"] | None = None,
        **options: Unpack[LayerOptions],
    ) -> Float[Array, "*batch H"]:
        """Returns the block's output, without a residual.

        Differentiable with respect to x and the collection "params".

        Args:
            x: tokens: bfloat16, float16 or float32.
            router_input: the router's input, if not x.
            **options: see `LayerOptions`; `implementation` replaces that of the module.

        Returns:
            An array of x's shape, and of x's dtype unless `output_dtype` is given.

        Raises:
            TypeError, ValueError, NotImplementedError: as `MoeLayer.__call__`; or ValueError for an
                array that is missing or does not have the module's shape.
        """
        initial = functools.cache(lambda: self._variables_of(self._initial_layer()))

        def variable(collection: str, name: str) -> Any:
            return self.variable(collection, name, lambda: initial()[collection][name]).value

        layer = self._structure()
        paths = {_variable_path(layer, keys) for keys, _ in jax.tree.leaves_with_path(layer)}
        variables = {"params": {}, "frozen": {}}
        for collection, name in sorted({path[:2] for path in paths}):
            variables[collection][name] = variable(collection, name)
        # Where the caller splits the experts, a device's share has a shape of its own.
        check = options.get("axis_name") is None
        return self._run(self._layer_of(variables, check=check), x, router_input, options)

    def _structure(self) -> MoeLayer:
        if self.structure is not None:
            return self.structure
        assert self.config is not None
        return self.config.abstract()

    def _initial_layer(self) -> MoeLayer:
        if self.config is not None:
            return self.config.init(self.make_rng("params"))
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), self._structure())

    def _variables_of(self, layer: MoeLayer) -> Variables:
        leaves = jax.tree.leaves_with_path(layer)
        return unflatten_dict(
            {_variable_path(layer, keys): self._boxed(keys, leaf) for keys, leaf in leaves}
        )

    def _boxed(self, keys: Any, leaf: Any) -> Any:
        names = _common.axis_names(_common.path_of(keys), leaf, self.expert_axis)
        if names is None:
            return leaf
        return nn.LogicallyPartitioned(_common.put(leaf, self.mesh, names), names)

    def _layer_of(self, variables: Mapping[str, Any], *, check: bool) -> MoeLayer:
        layer = self._structure()
        flat: dict[Any, Any] = flatten_dict(variables)

        def find(keys: Any, leaf: jax.ShapeDtypeStruct) -> Any:
            path = _variable_path(layer, keys)
            found = flat.get(path)
            if found is None or (check and jnp.shape(found) != leaf.shape):
                raise ValueError(
                    f"variables{[*path]} is {described(found)}, expected an array of shape "
                    f"{leaf.shape}"
                )
            return found

        return jax.tree.map_with_path(find, layer)


def _variable_path(layer: MoeLayer, keys: Any) -> _common.LeafPath:
    """Returns the collection of a leaf's variable, then the leaf's path in the layer."""
    path = _common.path_of(keys)
    return ("frozen" if _common.is_frozen(layer, path) else "params", *path)
