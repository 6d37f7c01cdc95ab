"""The configuration of a mixture-of-experts block, from which a layer with random weights is made.

config = MoeConfig(2048, 768, 128, Routing("renormalize", top_k=8))
layer = config.init(jax.random.key(0))
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jax_nvfp4_moe._call_checks import check_flag, check_routing, check_weight_on_input
from jax_nvfp4_moe._messages import check_dtype, check_name, described
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ActivationScheme
from jax_nvfp4_moe.format import BLOCK_SIZE
from jax_nvfp4_moe.implementations.base import shapes_of
from jax_nvfp4_moe.layer import Mlp, MoeLayer
from jax_nvfp4_moe.layouts import round_up
from jax_nvfp4_moe.quantization import quantize_experts
from jax_nvfp4_moe.router import Router
from jax_nvfp4_moe.routing import Routing, check_fits, check_selection_bias

# Rows are outputs, as everywhere here; each expert is a matrix of its own.
_kernel_init = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
_expert_init = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=0)


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Sizes and options of a mixture-of-experts block. Hashable: static under `jax.jit`.

    Attributes:
        hidden_size: H, a multiple of 16.
        intermediate_size: I of each routed expert, a multiple of 16.
        num_experts: E.
        routing: how logits become experts and weights.
        activation: of the routed experts and of the shared one: an `Activation`, or its name, for
            which an instance holds the `Activation`. One that is not gated makes experts without
            gates.
        activation_scheme: how the routed experts' activations are quantised: "per_token", "static"
            or "none", see `ExpertWeights`. "static" starts with scales of 1.
        shared_intermediate_size: I of the shared expert, which is not quantised; None: there is no
            shared expert.
        shared_gate: whether the sigmoid of a projection weighs the shared expert (Qwen3-Next).
        router_bias: whether the router adds a bias to its logits (gpt-oss).
        selection_bias: whether the router adds a bias for the selection only (DeepSeek-V3).
        router_weight_on_input: as in `nvfp4_moe_routed` (Llama 4).
        separate_scales: whether an expert's gate and up have a global scale each, as in
            `quantize_experts`: `w13.global_scale` is then [E, 2], not [E, 1].
        param_dtype: of the router and the shared expert, and of the routed experts before they are
            quantised: bfloat16, float16 or float32.

    Raises:
        TypeError, ValueError: a field is of the wrong type, or does not fit the others.
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
    separate_scales: bool = False
    param_dtype: Any = jnp.bfloat16

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", Activation.of(self.activation))
        object.__setattr__(self, "param_dtype", check_dtype("param_dtype", self.param_dtype))
        schemes = get_args(ActivationScheme)
        check_name("activation_scheme", self.activation_scheme, schemes)
        _check_multiple("hidden_size", self.hidden_size, BLOCK_SIZE)
        _check_multiple("intermediate_size", self.intermediate_size, BLOCK_SIZE)
        _check_multiple("num_experts", self.num_experts, 1)
        for name in ("shared_gate", "router_bias", "selection_bias", "separate_scales"):
            check_flag(name, getattr(self, name))
        if self.shared_intermediate_size is not None:
            _check_multiple("shared_intermediate_size", self.shared_intermediate_size, 1)
        elif self.shared_gate:
            raise ValueError(
                "shared_gate is True, but shared_intermediate_size is None: there is no shared "
                "expert"
            )
        check_routing(self.routing)
        check_fits(self.routing, self.num_experts, "the layer")
        check_weight_on_input(self.router_weight_on_input, self.routing.top_k)
        if self.selection_bias:
            bias: Any = jax.ShapeDtypeStruct((self.num_experts,), jnp.float32)
            check_selection_bias(bias, self.routing, self.num_experts)

    def init(self, key: PRNGKeyArray) -> MoeLayer:
        """Returns a layer of random weights with quantised experts; works under `jax.jit` too.

        Args:
            key: of `jax.random`.

        Returns:
            The layer. Matrices are drawn by LeCun's rule; biases are zeros.
        """
        router_key, experts_key, shared_key, gate_key = jax.random.split(key, 4)
        one = jnp.ones((), jnp.float32) if self.activation_scheme == "static" else None
        experts = quantize_experts(
            *self._matrices(
                experts_key,
                _expert_init,
                (self.num_experts, self.intermediate_size, self.hidden_size),
            ),
            w13_input_scale=one,
            w2_input_scale=one,
            activation_scheme=self.activation_scheme,
            separate_scales=self.separate_scales,
        )
        shared = shared_gate = None
        if self.shared_intermediate_size is not None:
            size = (self.shared_intermediate_size, self.hidden_size)
            shared = Mlp(*self._matrices(shared_key, _kernel_init, size))
        if self.shared_gate:
            shared_gate = _kernel_init(gate_key, (1, self.hidden_size), self.param_dtype)
        zeros = jnp.zeros((self.num_experts,), jnp.float32)
        weight_shape = (self.num_experts, self.hidden_size)
        return MoeLayer(
            router=Router(
                weight=_kernel_init(router_key, weight_shape, self.param_dtype),
                routing=self.routing,
                bias=zeros.astype(self.param_dtype) if self.router_bias else None,
                selection_bias=zeros if self.selection_bias else None,
            ),
            experts=experts,
            activation=Activation.of(self.activation),
            shared=shared,
            shared_gate=shared_gate,
            router_weight_on_input=self.router_weight_on_input,
        )

    def abstract(self) -> MoeLayer:
        """Returns what `init` does, with a `jax.ShapeDtypeStruct` for each array."""
        return _abstract(self)

    def _matrices(
        self, key: PRNGKeyArray, init: Callable[..., Array], up: tuple[int, ...]
    ) -> tuple[Array | None, Array, Array]:
        """Returns gate, up and down; `up` is the shape of up."""
        keys = jax.random.split(key, 3)
        *batch, rows, columns = up
        gated = Activation.of(self.activation).gated
        gate = init(keys[0], up, self.param_dtype) if gated else None
        down = init(keys[2], (*batch, columns, rows), self.param_dtype)
        return gate, init(keys[1], up, self.param_dtype), down


@functools.lru_cache
def _abstract(config: MoeConfig) -> MoeLayer:
    return shapes_of(jax.eval_shape(config.init, jax.random.key(0)))


def _check_multiple(name: str, size: object, multiple: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} is {described(size)}, expected an int")
    if size < 1 or size % multiple:
        wanted = f"a positive multiple of {multiple}" if multiple > 1 else "at least 1"
        near = round_up(max(size, 1), multiple)
        raise ValueError(f"{name} is {size}, expected {wanted}, such as {near}")
