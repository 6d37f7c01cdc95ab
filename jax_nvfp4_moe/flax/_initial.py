"""Layers of random weights, quantised: what `Nvfp4MoE` starts with where it is given none."""

import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_nvfp4_moe._messages import check_dtype, check_name, described
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ActivationScheme
from jax_nvfp4_moe.format import BLOCK_SIZE
from jax_nvfp4_moe.layer import Mlp, MoeLayer, Router
from jax_nvfp4_moe.layouts import round_up
from jax_nvfp4_moe.quantization import quantize_experts
from jax_nvfp4_moe.routing import Routing, check_fits

# Rows are outputs, as everywhere here; each expert is a matrix of its own.
_kernel_init = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
_expert_init = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=0)


def initial_layer(
    key: Array,
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
) -> MoeLayer:
    """A layer of random weights, the experts quantised; the arguments are those of `Nvfp4MoE`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    activation = Activation.of(activation)
    param_dtype = check_dtype("param_dtype", param_dtype)
    check_name("activation_scheme", activation_scheme, get_args(ActivationScheme))
    _check_multiple("hidden_size", hidden_size, BLOCK_SIZE)
    _check_multiple("intermediate_size", intermediate_size, BLOCK_SIZE)
    _check_multiple("num_experts", num_experts, 1)
    if shared_intermediate_size is not None:
        _check_multiple("shared_intermediate_size", shared_intermediate_size, 1)
    elif shared_gate:
        raise ValueError(
            "shared_gate is True, but shared_intermediate_size is None: there is no shared expert"
        )
    if not isinstance(routing, Routing):
        raise TypeError(f"routing is {described(routing)}, expected Routing(method, top_k, ...)")
    check_fits(routing, num_experts, "the layer")

    router_key, experts_key, shared_key, gate_key = jax.random.split(key, 4)
    one = jnp.ones((), jnp.float32) if activation_scheme == "static" else None
    per_expert = (num_experts, intermediate_size, hidden_size)
    experts = quantize_experts(
        *_matrices(experts_key, per_expert, activation, _expert_init, param_dtype),
        w13_input_scale=one,
        w2_input_scale=one,
        activation_scheme=activation_scheme,
    )
    shared = None
    if shared_intermediate_size is not None:
        size = (shared_intermediate_size, hidden_size)
        shared = Mlp(*_matrices(shared_key, size, activation, _kernel_init, param_dtype))
    zeros = jnp.zeros((num_experts,), jnp.float32)
    return MoeLayer(
        router=Router(
            weight=_kernel_init(router_key, (num_experts, hidden_size), param_dtype),
            routing=routing,
            bias=zeros.astype(param_dtype) if router_bias else None,
            selection_bias=zeros if selection_bias else None,
        ),
        experts=experts,
        activation=activation,
        shared=shared,
        shared_gate=_kernel_init(gate_key, (1, hidden_size), param_dtype) if shared_gate else None,
        router_weight_on_input=router_weight_on_input,
    )


@functools.lru_cache
def abstract_layer(**arguments: Any) -> MoeLayer:
    """What `initial_layer` would return, with `jax.ShapeDtypeStruct`s for arrays."""
    layer = jax.eval_shape(functools.partial(initial_layer, **arguments), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), layer)


def _matrices(
    key: Array,
    up: tuple[int, ...],
    activation: Activation,
    init: Callable[..., Array],
    dtype: Any,
) -> tuple[Array | None, Array, Array]:
    keys = jax.random.split(key, 3)
    *batch, rows, columns = up
    gate = init(keys[0], up, dtype) if activation.gated else None
    return gate, init(keys[1], up, dtype), init(keys[2], (*batch, columns, rows), dtype)


def _check_multiple(name: str, size: object, multiple: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} is {described(size)}, expected an int")
    if size < 1 or size % multiple:
        wanted = f"a positive multiple of {multiple}" if multiple > 1 else "at least 1"
        near = round_up(max(size, 1), multiple)
        raise ValueError(f"{name} is {size}, expected {wanted}, such as {near}")
