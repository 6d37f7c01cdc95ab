"""The layer for Flax Linen."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ActivationScheme
from jax_nvfp4_moe.flax import _common
from jax_nvfp4_moe.flax._initial import abstract_layer, initial_layer
from jax_nvfp4_moe.implementations.base import Implementation
from jax_nvfp4_moe.layer import MoeLayer, check_layer
from jax_nvfp4_moe.routing import Routing

try:
    from flax import linen as nn
    from flax.traverse_util import flatten_dict, unflatten_dict
except ImportError as error:
    raise ImportError(
        "jax_nvfp4_moe.flax.linen needs Flax: pip install 'jax_nvfp4_moe[flax]'"
    ) from error

# Collections to variables' names to arrays, or to dictionaries of them.
Variables = dict[str, dict[str, Any]]


class Nvfp4MoE(_common.FromWeights, nn.Module):
    """A mixture-of-experts block with NVFP4 experts.

    The residual is the caller's: ``x = x + moe(norm(x))``. The output has the shape and dtype of x.

    Variables are named as in `MoeLayer`: `router`, `shared` and `shared_gate` in the collection
    "params"; `experts`, as everything in NVFP4, and the selection bias in "frozen", which is not
    for optimisers. `init` makes random weights and quantises them; `from_layer`,
    `from_experts` and `from_bf16` make a module and its variables from given ones.

    With `expert_axis`, the arrays of the experts are boxed as `nn.with_logical_partitioning` does,
    for `nn.get_partition_spec`. With `mesh`, calls run on every device's own experts (see
    `parallel`).

    Attributes:
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
        implementation: as in `nvfp4_moe`.
        mesh: the devices to split experts over.
        expert_axis: the axis to split them over: of the mesh, or without one any name that
            Flax's axis rules know.
        data_axis: the mesh axis that the first axis of x is split over, or None.
        structure: the layer with `jax.ShapeDtypeStruct`s for arrays. Set by the methods that take
            weights: it then counts instead of the arguments up to `param_dtype`, and `init`, which
            knows no values, makes ones.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    routing: Routing
    activation: str | Activation = "silu"
    activation_scheme: ActivationScheme = "per_token"
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    router_weight_on_input: bool = False
    param_dtype: Any = jnp.bfloat16
    implementation: str | Implementation | None = None
    mesh: Mesh | None = None
    expert_axis: str | None = None
    data_axis: str | None = None
    structure: MoeLayer | None = None

    @classmethod
    def from_layer(cls, layer: MoeLayer, **options: Any) -> tuple[Self, Variables]:
        """A module and variables with these weights, such as a checkpoint's.

        Args:
            layer: with arrays, or with `jax.ShapeDtypeStruct`s to restore a checkpoint into.
            **options: `implementation`, `mesh`, `expert_axis`, `data_axis`, and `name`.

        Returns:
            (module, variables), for ``module.apply(variables, x)``.

        Raises:
            TypeError, ValueError: the parts of the layer do not fit each other or the mesh.
        """
        check_layer(layer)
        module = cls(
            hidden_size=layer.experts.hidden_size,
            intermediate_size=layer.experts.intermediate_size,
            num_experts=layer.experts.num_experts,
            routing=layer.router.routing,
            structure=jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), layer
            ),
            **options,
        )
        module._check()
        return module, module._variables_of(layer)

    def layer_of(self, variables: Mapping[str, Any]) -> MoeLayer:
        """The weights as a pytree of arrays, as the core's functions take them.

        Args:
            variables: this module's, boxed or not.

        Returns:
            The layer.

        Raises:
            ValueError: an array is missing or does not have the shape that the module's has.
        """
        return self._layer_of(nn.unbox(variables), check=True)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch H"],
        router_input: Float[Array, "*batch H"] | None = None,
        *,
        output_dtype: Any = None,
        axis_name: str | None = None,
    ) -> Float[Array, "*batch H"]:
        """The block's output, without a residual.

        Differentiable with respect to x and the collection "params".

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
        self._check()
        initial = functools.cache(lambda: self._variables_of(self._initial_layer()))

        def variable(collection: str, name: str) -> Any:
            return self.variable(collection, name, lambda: initial()[collection][name]).value

        layer = self._structure()
        places = {_place(layer, keys)[:2] for keys, _ in jax.tree.leaves_with_path(layer)}
        variables = {"params": {}, "frozen": {}}
        for collection, name in sorted(places):
            variables[collection][name] = variable(collection, name)
        return _common.call(
            # Where the caller splits the experts, a device's share has a shape of its own.
            self._layer_of(variables, check=axis_name is None),
            x,
            router_input,
            mesh=self.mesh,
            expert_axis=self.expert_axis,
            data_axis=self.data_axis,
            axis_name=axis_name,
            implementation=self.implementation,
            output_dtype=output_dtype,
        )

    def _check(self) -> None:
        _common.check_mesh(self.mesh, self.expert_axis, self.data_axis, self.num_experts)

    def _arguments(self) -> dict[str, Any]:
        names = inspect.signature(initial_layer).parameters
        return {name: getattr(self, name) for name in names if name != "key"}

    def _structure(self) -> MoeLayer:
        return self.structure or abstract_layer(**self._arguments())

    def _initial_layer(self) -> MoeLayer:
        if self.structure is None:
            return initial_layer(self.make_rng("params"), **self._arguments())
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), self.structure)

    def _variables_of(self, layer: MoeLayer) -> Variables:
        leaves = jax.tree.leaves_with_path(layer)
        return unflatten_dict(
            {_place(layer, keys): self._boxed(keys, leaf) for keys, leaf in leaves}
        )

    def _boxed(self, keys: Any, leaf: Any) -> Any:
        names = _common.axis_names(_common.path_of(keys), leaf, self.expert_axis)
        if names is None:
            return leaf
        return nn.LogicallyPartitioned(_common.placed(leaf, self.mesh, names), names)

    def _layer_of(self, variables: Mapping[str, Any], *, check: bool) -> MoeLayer:
        layer = self._structure()
        flat: dict[Any, Any] = flatten_dict(variables)

        def find(keys: Any, leaf: jax.ShapeDtypeStruct) -> Any:
            place = _place(layer, keys)
            found = flat.get(place)
            if found is None or (check and jnp.shape(found) != leaf.shape):
                raise ValueError(
                    f"variables{[*place]} is {described(found)}, expected an array of shape "
                    f"{leaf.shape}"
                )
            return found

        return jax.tree.map_with_path(find, layer)


def _place(layer: MoeLayer, keys: Any) -> _common.Path:
    """Where a leaf is kept: the collection, then its path in the layer."""
    path = _common.path_of(keys)
    return ("frozen" if _common.is_frozen(layer, path) else "params", *path)
