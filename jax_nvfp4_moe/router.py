"""The router of a mixture-of-experts block: its weights, and what it does with them.

`routing` has the methods by which logits become experts and weights.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe._call_checks import check_routing, check_static_tokens
from jax_nvfp4_moe._messages import INPUT_DTYPES, as_array, described
from jax_nvfp4_moe.implementations.base import Routed
from jax_nvfp4_moe.routing import Routing, check_fits, check_selection_bias, select_experts

# A small error in a score can change which experts are selected, so TPUs and GPUs must not
# multiply in bfloat16 or TF32.
matmul_float32 = functools.partial(
    jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "bias", "selection_bias", "input_scale", "expert_scale"),
    meta_fields=("routing", "norm_eps"),
)
@dataclasses.dataclass(frozen=True)
class Router:
    """Selects each token's experts and weighs them; float32 inside.

    Attributes:
        weight: [E, H].
        routing: how logits become experts and weights. Static.
        bias: [E], added to the logits (gpt-oss), or None.
        selection_bias: [E], added to the scores for the selection only
            (`e_score_correction_bias`), or None.
        norm_eps: epsilon of the root mean square by which, times sqrt(H), the router's input is
            divided, so that it has length 1 (Gemma 4); None: no normalisation. Static.
        input_scale: [H], multiplies the router's input after the normalisation, or None.
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
        """Returns the scores of all experts, before `routing`."""
        x = x.astype(jnp.float32)
        if self.norm_eps is not None:
            x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.norm_eps)
            x = x * x.shape[-1] ** -0.5
        if self.input_scale is not None:
            x = x * self.input_scale.astype(jnp.float32)[None, :]
        logits = matmul_float32(x, self.weight.astype(jnp.float32).T)
        return logits if self.bias is None else logits + self.bias.astype(jnp.float32)[None, :]

    def __call__(self, x: Float[Array, "T H"]) -> tuple[Int32[Array, "T K"], Float32[Array, "T K"]]:
        """Returns each token's experts, best first, and their weights.

        Raises:
            TypeError, ValueError: an array does not fit the others or the routing method.
        """
        if getattr(self.weight, "ndim", None) != 2:
            check_shape("router.weight", self.weight, ("E", "H"))
        check_router(self, *self.weight.shape)
        x = as_array("x", x)
        check_router_input("x", x, self)
        if x.ndim != 2:
            raise ValueError(
                f"x has shape {x.shape}, expected [T, H]: fold other axes, "
                f"x.reshape(-1, {x.shape[-1]})"
            )
        ids, weights = route_tokens(self, x)
        return ids, weights


def route_tokens(router: Router, x: Float[Array, "T H"]) -> Routed:
    """Returns what the router does, for arguments that are checked already."""
    ids, weights = select_experts(router.logits(x), router.routing, router.selection_bias)
    if router.expert_scale is not None:
        weights = weights * router.expert_scale.astype(jnp.float32)[ids]
    return Routed(ids, weights)


def check_router(router: Router, num_experts: int, hidden_size: int) -> None:
    """Checks that the parts of a router fit each other and the experts.

    Raises:
        TypeError: the routing or an array has the wrong type.
        ValueError: a shape does not fit, or the routing method takes no selection bias.
    """
    check_routing(router.routing)
    check_fits(router.routing, num_experts, "the layer")
    wanted = {
        "weight": (num_experts, hidden_size),
        "bias": (num_experts,),
        "selection_bias": (num_experts,),
        "input_scale": (hidden_size,),
        "expert_scale": (num_experts,),
    }
    for field, shape in wanted.items():
        array = getattr(router, field)
        if array is not None or field == "weight":
            check_shape(f"router.{field}", array, shape)
    if router.selection_bias is not None:
        check_selection_bias(router.selection_bias, router.routing, num_experts)


def check_router_input(name: str, x: Array, router: Router) -> None:
    """Refuses tokens, named `name`, that are not [..., H] in one of the three float types."""
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}, expected bfloat16, float16 or float32")
    hidden_size = router.weight.shape[1]
    if x.ndim == 0 or x.shape[-1] != hidden_size:
        raise ValueError(
            f"{name} has shape {x.shape}, expected [..., H] with H = {hidden_size}, as the "
            f"router's weight is {router.weight.shape}"
        )
    check_static_tokens(name, x)


def check_shape(name: str, array: Any, shape: tuple[int | str, ...]) -> None:
    """Refuses an array, named `name`, of another shape."""
    if getattr(array, "shape", None) != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} is {described(array)}, expected shape [{wanted}]")
