"""One whole mixture-of-experts block: router, experts and shared expert as a pytree.

What a checkpoint's layer loads into, and what the Flax layers compute. `nvfp4_moe` is the part of
it that is NVFP4's business; the rest is ordinary JAX.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe._call_checks import axis_size, check_output_dtype
from jax_nvfp4_moe._messages import INPUT_DTYPES, as_array, described
from jax_nvfp4_moe.activations import Activation, activate
from jax_nvfp4_moe.computing import compute
from jax_nvfp4_moe.experts import ExpertWeights, check_experts
from jax_nvfp4_moe.implementations.base import Call, Implementation, Routed
from jax_nvfp4_moe.routing import Routing, check_fits, route

# A router's choice jumps where two scores cross: TPUs and GPUs are kept from bfloat16 and TF32.
_matmul = functools.partial(
    jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "bias", "selection_bias", "input_scale", "expert_scale"),
    meta_fields=("routing", "norm_eps"),
)
@dataclasses.dataclass(frozen=True)
class Router:
    """From tokens to experts and weights; float32 inside.

    Attributes:
        weight: [E, H].
        routing: how logits become experts and weights. Static.
        bias: [E], added to the logits (gpt-oss), or None.
        selection_bias: [E], takes part in the selection only (`e_score_correction_bias`), or None.
        norm_eps: if not None, the router's input is divided by sqrt(H) times its root mean square,
            which has this epsilon, and so has length 1 (Gemma 4). Static.
        input_scale: [H], multiplies the router's input after that, or None.
        expert_scale: [E], multiplies the weights of the selected experts, or None.
    """

    weight: Float[Array, "E H"]
    routing: Routing
    bias: Float[Array, " E"] | None = None
    selection_bias: Float[Array, " E"] | None = None
    norm_eps: float | None = None
    input_scale: Float[Array, " H"] | None = None
    expert_scale: Float[Array, " E"] | None = None

    def logits(self, x: Float[Array, "T H"]) -> Float32[Array, "T E"]:
        """The scores of all experts, before `routing`."""
        x = x.astype(jnp.float32)
        if self.norm_eps is not None:
            x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.norm_eps)
            x = x * x.shape[-1] ** -0.5
        if self.input_scale is not None:
            x = x * self.input_scale.astype(jnp.float32)[None, :]
        logits = _matmul(x, self.weight.astype(jnp.float32).T)
        return logits if self.bias is None else logits + self.bias.astype(jnp.float32)[None, :]

    def __call__(self, x: Float[Array, "T H"]) -> tuple[Int32[Array, "T K"], Float32[Array, "T K"]]:
        """Each token's experts, best first, and their weights."""
        ids, weights = route(self.logits(x), self.routing, selection_bias=self.selection_bias)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale.astype(jnp.float32)[ids]
        return ids, weights


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
        """Operands in x's type, sums and activation in float32."""
        halves = [self.up] if self.gate is None else [self.gate, self.up]
        c1 = jnp.concatenate([_matmul(x, half.T.astype(x.dtype)) for half in halves], axis=-1)
        hidden = activate(c1, activation).astype(x.dtype)
        return _matmul(hidden, self.down.T.astype(x.dtype))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("router", "experts", "shared", "shared_gate", "to_latent", "from_latent"),
    meta_fields=("activation", "router_weight_on_input"),
)
@dataclasses.dataclass(frozen=True)
class MoeLayer:
    """A mixture-of-experts block, called with tokens: ``y = layer(x)``.

    Attributes:
        router: chooses and weighs experts.
        experts: the routed experts, in any layout.
        activation: of the routed experts and of the shared one. Static.
        shared: the expert that every token goes to: an `Mlp`, or, where the checkpoint has it in
            NVFP4, `ExpertWeights` with E = 1. None if there is none.
        shared_gate: [1, H]: the sigmoid of its product with a token weighs the shared expert
            (Qwen3-Next). None means weight 1.
        to_latent, from_latent: [L, H] and [H, L], where the routed experts work in a latent space
            (Nemotron 3 Super), so that L is their hidden size; both or neither.
        router_weight_on_input: as in `nvfp4_moe` (Llama 4). Static.
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
        """The block's output, without a residual.

        Args:
            x: tokens; leading axes are folded.
            router_input: what the router sees, where that is not x (Gemma 4 normalises the two
                apart).
            implementation: as in `nvfp4_moe_routed`, as is every other argument.
            output_dtype: routed and shared parts are summed in float32 and rounded to it once.
            axis_name: the mesh axis over which the routed experts are split; the router and the
                shared expert are computed on every device.

        Returns:
            The shape of x, of `output_dtype`.

        Raises:
            TypeError, ValueError, NotImplementedError: as `check_layer` and `nvfp4_moe_routed`.
        """
        check_layer(self, devices=axis_size(axis_name))
        x = as_array("x", x)
        self._check_tokens("x", x)
        tokens = seen = x.reshape(-1, x.shape[-1])
        if router_input is not None:
            seen = as_array("router_input", router_input)
            self._check_tokens("router_input", seen)
            seen = seen.reshape(-1, x.shape[-1])
            if seen.shape != tokens.shape:
                raise ValueError(
                    f"router_input has shape {router_input.shape}, expected that of x, {x.shape}"
                )
        call = Call(self.activation, jnp.dtype(jnp.float32), axis_name, self.router_weight_on_input)
        inner = self._projected(tokens, self.to_latent).astype(x.dtype)
        routed = Routed(*self.router(seen))
        y = compute(inner, routed, self.experts, call, implementation)
        y = self._projected(y, self.from_latent)
        if isinstance(self.shared, ExpertWeights):
            call = Call(self.activation, jnp.dtype(jnp.float32), None, False)
            alone = (tokens.shape[0], 1)
            routed = Routed(jnp.zeros(alone, jnp.int32), jnp.ones(alone, jnp.float32))
            shared = compute(tokens, routed, self.shared, call, implementation)
            y = y + self._shared_weight(tokens) * shared
        elif self.shared is not None:
            y = y + self._shared_weight(tokens) * self.shared(tokens, self.activation)
        return y.reshape(x.shape).astype(check_output_dtype(x, output_dtype))

    def _check_tokens(self, name: str, x: Array) -> None:
        if x.dtype not in INPUT_DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}, expected bfloat16, float16 or float32")
        hidden_size = self.router.weight.shape[1]
        if x.ndim == 0 or x.shape[-1] != hidden_size:
            raise ValueError(
                f"{name} has shape {x.shape}, expected [..., H] with H = {hidden_size}, as the "
                f"router's weight is {self.router.weight.shape}"
            )

    @staticmethod
    def _projected(x: Float[Array, "T H"], weight: Float[Array, "L H"] | None) -> Array:
        return x if weight is None else _matmul(x, weight.T.astype(x.dtype))

    def _shared_weight(self, x: Float[Array, "T H"]) -> Float32[Array, "T 1"]:
        if self.shared_gate is None:
            return jnp.ones((x.shape[0], 1), jnp.float32)
        gate = self.shared_gate.astype(jnp.float32)
        return jax.nn.sigmoid(_matmul(x.astype(jnp.float32), gate.T))


# ------------------------------------------------------------------------------------- checks


def check_layer(layer: MoeLayer, *, devices: int = 1) -> None:
    """Checks that the parts of a layer, arrays or shapes, fit each other.

    Args:
        layer: whole, or one device's share of it.
        devices: how many devices its routed experts are split over.

    Raises:
        TypeError: not a `MoeLayer`, or a part of it is of the wrong type or dtype.
        ValueError: a shape does not fit.
    """
    if not isinstance(layer, MoeLayer):
        raise TypeError(f"layer is {described(layer)}, expected MoeLayer(router, experts, ...)")
    check_experts(layer.experts)
    if not isinstance(layer.router, Router):
        raise TypeError(f"router is {described(layer.router)}, expected Router(weight, routing)")
    if not isinstance(layer.activation, Activation):
        raise TypeError(f"activation is {described(layer.activation)}, expected Activation(name)")
    if layer.activation.gated != layer.experts.gated:
        have = "gate and up rows" if layer.experts.gated else "up rows alone"
        raise ValueError(
            f"activation is {layer.activation.name!r}, which is "
            f"{'' if layer.activation.gated else 'not '}gated, but the experts have {have}"
        )
    num_experts = layer.experts.num_experts * devices
    check_fits(layer.router.routing, num_experts, "the layer")
    hidden = _check_latent(layer)
    wanted = {
        "weight": (num_experts, hidden),
        "bias": (num_experts,),
        "selection_bias": (num_experts,),
        "input_scale": (hidden,),
        "expert_scale": (num_experts,),
    }
    for field, shape in wanted.items():
        array = getattr(layer.router, field)
        if array is not None or field == "weight":
            _check_shape(f"router.{field}", array, shape)
    _check_shared(layer, hidden)


def _check_latent(layer: MoeLayer) -> int:
    """The size of tokens, which is that of the experts unless there are projections."""
    inner = layer.experts.hidden_size
    if layer.to_latent is None and layer.from_latent is None:
        return inner
    for name in ("to_latent", "from_latent"):
        if getattr(layer, name) is None:
            raise ValueError(f"{name} is None, expected to_latent and from_latent or neither")
    hidden = layer.router.weight.shape[-1]
    _check_shape("to_latent", layer.to_latent, (inner, hidden))
    _check_shape("from_latent", layer.from_latent, (hidden, inner))
    return hidden


def _check_shared(layer: MoeLayer, hidden: int) -> None:
    if layer.shared_gate is not None:
        if layer.shared is None:
            raise ValueError("shared_gate was given, but shared is None: expected both")
        _check_shape("shared_gate", layer.shared_gate, (1, hidden))
    if layer.shared is None:
        return
    if isinstance(layer.shared, ExpertWeights):
        check_experts(layer.shared)
        got = (layer.shared.num_experts, layer.shared.hidden_size)
        if got != (1, hidden):
            raise ValueError(
                f"shared has {got[0]} experts of hidden_size {got[1]}, expected 1 of {hidden}"
            )
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
    _check_shape("shared.up", layer.shared.up, (size, hidden))
    _check_shape("shared.down", layer.shared.down, (hidden, size))
    if layer.shared.gate is not None:
        _check_shape("shared.gate", layer.shared.gate, (size, hidden))


def _check_shape(name: str, array: Any, shape: tuple[int | str, ...]) -> None:
    if getattr(array, "shape", None) != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} is {described(array)}, expected shape [{wanted}]")
