"""What a call asks of an implementation, and the one interface they all serve."""

import dataclasses
from typing import Literal, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.routing import Routing

Numerics = Literal["kernel", "vllm"]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call: what is computed, whoever computes it. Hashable.

    Attributes:
        activation: between the two GEMMs.
        numerics: where values are rounded (design: the "kernel" and "vllm" presets).
        output_dtype: of the result.
        axis_name: the mesh axis over which experts are split, or None.
        router_weight_on_input: the weight scales the token on its way in, not the expert's output.
    """

    activation: Activation
    numerics: Numerics
    output_dtype: jnp.dtype
    axis_name: str | None
    router_weight_on_input: bool


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes and the device that a choice of implementation depends on.

    Attributes:
        call: what is computed.
        experts: those of this device.
        tokens: T.
        top_k: K.
        device_kind: of what it runs on.
        routing: what the implementation is to route by itself, or None if that is done before.
    """

    call: Call
    experts: ExpertWeights
    tokens: int
    top_k: int
    device_kind: str
    routing: Routing | None = None


class Implementation(Protocol):
    """One way to compute a call. Modules of this package provide one each."""

    @property
    def name(self) -> str:
        """What `implementation` calls it."""
        ...

    def unsupported(self, problem: Problem) -> str | None:
        """Why this implementation cannot serve the problem, or None if it can."""
        ...

    def describe(self, problem: Problem) -> str:
        """How it would serve the problem: formulation, bytes read."""
        ...

    def run(
        self,
        call: Call,
        x: Float[Array, "T H"],
        topk_ids: Int32[Array, "T K"],
        topk_weights: Float32[Array, "T K"],
        experts: ExpertWeights,
    ) -> Float[Array, "T H"]:
        """The layer's output, of `call.output_dtype`. Arguments are checked already."""
        ...

    def run_from_logits(
        self,
        call: Call,
        routing: Routing,
        x: Float[Array, "T H"],
        logits: Float[Array, "T E"],
        bias: Float[Array, " E"] | None,
        experts: ExpertWeights,
    ) -> Float[Array, "T H"]:
        """The same, and the implementation routes, as `route` does."""
        ...
