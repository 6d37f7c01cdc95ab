"""One whole mixture-of-experts block: router, experts and shared expert as a pytree.

Checkpoints load into it, and the Flax layers compute it. The routed experts run as in `nvfp4_moe`;
the rest is ordinary JAX.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jax_nvfp4_moe._call_checks import (
    axis_size,
    check_activation,
    check_output_dtype,
    check_weight_on_input,
)
from jax_nvfp4_moe._messages import as_array, described
from jax_nvfp4_moe.activations import Activation, activate
from jax_nvfp4_moe.computing import compute
from jax_nvfp4_moe.experts import ExpertWeights, check_experts
from jax_nvfp4_moe.implementations.base import Call, Implementation, Routed
from jax_nvfp4_moe.router import (
    Router,
    check_router,
    check_router_input,
    check_shape,
    matmul_float32,
    route_tokens,
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("gate", "up", "down"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Mlp:
    """An unquantised shared expert.

    Attributes:
        gate: [I, H], or None if not gated.
        up: [I, H].
        down: [H, I].
    """

    gate: Float[Array, "I H"] | None
    up: Float[Array, "I H"]
    down: Float[Array, "H I"]

    def __call__(self, x: Float[Array, "T H"], activation: Activation) -> Float32[Array, "T H"]:
        """Returns the output for x: operands in x's dtype, sums and activation in float32."""
        halves = [self.up] if self.gate is None else [self.gate, self.up]
        c1 = jnp.concatenate(
            [matmul_float32(x, half.T.astype(x.dtype)) for half in halves], axis=-1
        )
        hidden = activate(c1, activation).astype(x.dtype)
        return matmul_float32(hidden, self.down.T.astype(x.dtype))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("router", "experts", "shared", "shared_gate", "to_latent", "from_latent"),
    meta_fields=("activation", "router_weight_on_input"),
)
@dataclasses.dataclass(frozen=True)
class MoeLayer:
    """A mixture-of-experts block, called with tokens: ``y = layer(x)``.

    Attributes:
        router: selects and weighs experts.
        experts: the routed experts, in any layout.
        activation: of the routed experts and of the shared one. Static.
        shared: the expert that every token goes to: an `Mlp`, or `ExpertWeights` with E = 1 where
            it is in NVFP4. None: there is none.
        shared_gate: [1, H]: the sigmoid of its product with a token weighs the shared expert
            (Qwen3-Next). None means weight 1.
        to_latent, from_latent: [L, H] and [H, L], the projections into and out of a latent space
            where the routed experts work, so that their hidden size is L (Nemotron 3 Super); both
            or neither.
        router_weight_on_input: as in `nvfp4_moe_routed` (Llama 4). Static.
    """

    router: Router
    experts: ExpertWeights
    activation: Activation
    shared: Mlp | ExpertWeights | None = None
    shared_gate: Float[Array, "1 H"] | None = None
    to_latent: Float[Array, "L H"] | None = None
    from_latent: Float[Array, "H L"] | None = None
    router_weight_on_input: bool = False

    def __call__(
        self,
        x: Float[Array, "*batch H"],
        *,
        router_input: Float[Array, "*batch H"] | None = None,
        implementation: str | Implementation | None = None,
        output_dtype: Any = None,
        axis_name: str | None = None,
    ) -> Float[Array, "*batch H"]:
        """Returns the block's output, without a residual.

        Differentiable with respect to everything but NVFP4 weights, see `nvfp4_moe_routed`.

        Args:
            x: tokens, in bfloat16, float16 or float32; leading axes are folded.
            router_input: the router's input, if not x (Gemma 4 normalises the two separately).
            implementation: as in `nvfp4_moe_routed`, as are the arguments below.
            output_dtype: of the result; the routed and the shared part are summed in float32 and
                rounded to it once.
            axis_name: the mesh axis over which the routed experts are split; every device computes
                the router and the shared expert.

        Returns:
            An array of x's shape and of `output_dtype`.

        Raises:
            TypeError, ValueError: the layer's parts do not fit each other, or the arguments do not
                fit the layer.
            NotImplementedError: the implementation that was named cannot serve the call.
        """
        check_layer(self, devices=axis_size(axis_name))
        x = as_array("x", x)
        check_router_input("x", x, self.router)
        output_dtype = check_output_dtype(x, output_dtype)
        tokens = seen = x.reshape(-1, x.shape[-1])
        if router_input is not None:
            seen = as_array("router_input", router_input)
            check_router_input("router_input", seen, self.router)
            seen = seen.reshape(-1, x.shape[-1])
            if seen.shape != tokens.shape:
                raise ValueError(
                    f"router_input has shape {router_input.shape}, expected that of x, {x.shape}"
                )
        call = Call(self.activation, jnp.dtype(jnp.float32), axis_name, self.router_weight_on_input)
        inner = _project(tokens, self.to_latent).astype(x.dtype)
        y = compute(inner, route_tokens(self.router, seen), self.experts, call, implementation)
        y = _project(y, self.from_latent)
        if self.shared is not None:
            y = y + self._shared_weight(tokens) * self._shared_output(tokens, implementation)
        return y.reshape(x.shape).astype(output_dtype)

    def _shared_output(
        self, x: Float[Array, "T H"], implementation: str | Implementation | None
    ) -> Float32[Array, "T H"]:
        if isinstance(self.shared, Mlp):
            return self.shared(x, self.activation)
        assert self.shared is not None
        # A layer of one expert that every token goes to.
        routed = Routed(jnp.zeros((len(x), 1), jnp.int32), jnp.ones((len(x), 1), jnp.float32))
        call = Call(self.activation, jnp.dtype(jnp.float32), None, False)
        return compute(x, routed, self.shared, call, implementation)

    def _shared_weight(self, x: Float[Array, "T H"]) -> Float32[Array, "T 1"]:
        if self.shared_gate is None:
            return jnp.ones((x.shape[0], 1), jnp.float32)
        gate = self.shared_gate.astype(jnp.float32)
        return jax.nn.sigmoid(matmul_float32(x.astype(jnp.float32), gate.T))


def _project(x: Float[Array, "T H"], weight: Float[Array, "L H"] | None) -> Array:
    return x if weight is None else matmul_float32(x, weight.T.astype(x.dtype))


# ------------------------------------------------------------------------------------- checks


def check_layer(layer: MoeLayer, *, devices: int = 1) -> None:
    """Checks that the parts of a layer fit each other.

    Args:
        layer: the whole layer or one device's share of it, with arrays or
            `jax.ShapeDtypeStruct`s.
        devices: the number of devices that its routed experts are split over.

    Raises:
        TypeError: `layer` is not a `MoeLayer`, or a part of it has the wrong type or dtype.
        ValueError: a shape or a static field does not fit the others.
    """
    if not isinstance(layer, MoeLayer):
        raise TypeError(f"layer is {described(layer)}, expected MoeLayer(router, experts, ...)")
    check_experts(layer.experts)
    if not isinstance(layer.router, Router):
        raise TypeError(f"router is {described(layer.router)}, expected Router(weight, routing)")
    if not isinstance(layer.activation, Activation):
        raise TypeError(f"activation is {described(layer.activation)}, expected Activation(name)")
    check_activation(layer.activation, layer.experts)
    num_experts = layer.experts.num_experts * devices
    hidden = _check_latent(layer)
    check_router(layer.router, num_experts, hidden)
    check_weight_on_input(layer.router_weight_on_input, layer.router.routing.top_k)
    _check_shared(layer, hidden)


def _check_latent(layer: MoeLayer) -> int:
    """Returns the tokens' hidden size: that of the experts, unless there are projections."""
    inner = layer.experts.hidden_size
    if layer.to_latent is None and layer.from_latent is None:
        return inner
    for name in ("to_latent", "from_latent"):
        if getattr(layer, name) is None:
            raise ValueError(f"{name} is None, expected to_latent and from_latent or neither")
    hidden = layer.router.weight.shape[-1]
    check_shape("to_latent", layer.to_latent, (inner, hidden))
    check_shape("from_latent", layer.from_latent, (hidden, inner))
    return hidden


def _check_shared(layer: MoeLayer, hidden: int) -> None:
    if layer.shared_gate is not None:
        if layer.shared is None:
            raise ValueError("shared_gate was given, but shared is None: expected both")
        check_shape("shared_gate", layer.shared_gate, (1, hidden))
    if layer.shared is None:
        return
    if isinstance(layer.shared, ExpertWeights):
        check_experts(layer.shared)
        got = (layer.shared.num_experts, layer.shared.hidden_size)
        if got != (1, hidden):
            raise ValueError(
                f"shared has {got[0]} experts of hidden_size {got[1]}, expected 1 of {hidden}"
            )
        check_activation(layer.activation, layer.shared)
        return
    if not isinstance(layer.shared, Mlp):
        raise TypeError(f"shared is {described(layer.shared)}, expected Mlp or ExpertWeights")
    if (layer.shared.gate is not None) != layer.activation.gated:
        wanted = "an array" if layer.activation.gated else "None"
        raise ValueError(
            f"shared.gate is {described(layer.shared.gate)}, expected {wanted}: activation "
            f"{layer.activation.name!r} is {'' if layer.activation.gated else 'not '}gated"
        )
    up = getattr(layer.shared.up, "shape", ())
    size = up[0] if len(up) == 2 else "I"
    check_shape("shared.up", layer.shared.up, (size, hidden))
    check_shape("shared.down", layer.shared.down, (hidden, size))
    if layer.shared.gate is not None:
        check_shape("shared.gate", layer.shared.gate, (size, hidden))
