"""The interface of every implementation: a problem comes in, a plan that runs comes out.

A new implementation is a folder with a subclass of `Implementation` and one of `Plan`, and one line
in the registry, `implementations/__init__.py`.
"""

import abc
import dataclasses
from typing import ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.layouts import Layout
from jax_nvfp4_moe.routing import Routing

Numerics = Literal["kernel", "vllm"]
Weights = TypeVar("Weights")  # a pytree of arrays, such as ExpertWeights


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call: the same for every implementation. Hashable.

    Attributes:
        activation: between the two GEMMs.
        output_dtype: of the result.
        axis_name: the mesh axis over which experts are split, or None.
        router_weight_on_input: the weight scales the token before the experts, not their output.
    """

    activation: Activation
    output_dtype: jnp.dtype
    axis_name: str | None
    router_weight_on_input: bool


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything that a choice of implementation may depend on; no values. Hashable.

    Attributes:
        call: the static part of the call.
        experts: this device's experts, with `jax.ShapeDtypeStruct`s for arrays.
        tokens: T.
        top_k: K.
        device_kind: of the device that the program is traced for.
        routing: how the implementation is to route the tokens, or None if they are routed already.
    """

    call: Call
    experts: ExpertWeights
    tokens: int
    top_k: int
    device_kind: str
    routing: Routing | None = None


def shapes_of(weights: Weights) -> Weights:
    """Returns the pytree with a `jax.ShapeDtypeStruct` in place of each array."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)


class Routed(NamedTuple):
    """Tokens with their experts.

    Attributes:
        topk_ids: each token's experts; ids of no expert of the layer contribute nothing.
        topk_weights: their weights.
    """

    topk_ids: Int32[Array, "T K"]
    topk_weights: Float32[Array, "T K"]


class Unrouted(NamedTuple):
    """Tokens that the implementation routes.

    Attributes:
        logits: the router's output.
        selection_bias: added to the scores for the selection only, or None.
    """

    logits: Float[Array, "T E"]
    selection_bias: Float32[Array, " E"] | None


@dataclasses.dataclass(frozen=True)
class Implementation(abc.ABC):
    """One way to compute the layer; its fields are its options.

    `implementation` arguments take an instance, or the `name` of the default one.

    Attributes:
        name: the implementation's name.
        needs: the devices it needs, for messages.
        device_words: it runs on devices whose kind, in lower case, contains one of these.
        layout: the weight layout that it reads without rearranging; `prepare` makes it.
        routes: whether it routes the tokens of `nvfp4_moe` itself.
    """

    name: ClassVar[str]
    needs: ClassVar[str]
    device_words: ClassVar[tuple[str, ...]]
    layout: ClassVar[Layout] = "linear"

    @property
    def routes(self) -> bool:
        """Whether it routes the tokens of `nvfp4_moe` itself."""
        return False

    def runs_on(self, device_kind: str) -> bool:
        """Returns whether it runs on devices of a kind such as "NVIDIA B200"."""
        return any(word in device_kind.lower() for word in self.device_words)

    def plan(self, problem: Problem) -> "Plan":
        """Returns the way to serve a problem.

        Raises:
            NotImplementedError: it cannot serve the problem; the message is the reason.
        """
        if not self.runs_on(problem.device_kind):
            raise NotImplementedError(f"it needs {self.needs}, and this is {problem.device_kind}")
        if problem.routing is not None and not self.routes:
            raise NotImplementedError("it has no router of its own")
        return self._plan(problem)

    @abc.abstractmethod
    def _plan(self, problem: Problem) -> "Plan":
        """`plan` for a device that fits."""


@dataclasses.dataclass(frozen=True)
class Plan(abc.ABC):
    """How an implementation serves a problem. Hashable: a static argument under jit.

    Attributes:
        implementation: the implementation that made the plan.
        problem: the problem that it serves.
    """

    implementation: Implementation
    problem: Problem

    @property
    def numerics(self) -> Numerics:
        """Which preset's roundings the result has."""
        return "kernel"

    @property
    def platform(self) -> str | None:
        """The XLA platform that `run` can be lowered for, or None for all of them."""
        return None

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns how the problem would be served: formulation, module, bytes read, evidence."""

    @abc.abstractmethod
    def run(
        self, x: Float[Array, "T H"], routed: Routed, experts: ExpertWeights
    ) -> Float[Array, "T H"]:
        """Returns the layer's output, of `call.output_dtype`.

        Args:
            x: tokens; T is 1 or more.
            routed: their experts.
            experts: this device's experts, checked.
        """

    def run_unrouted(
        self, x: Float[Array, "T H"], unrouted: Unrouted, experts: ExpertWeights
    ) -> Float[Array, "T H"]:
        """Returns what `run` returns, for tokens that the implementation routes by itself.

        Called only if `problem.routing` is not None.

        Args:
            x: tokens; T is 1 or more.
            unrouted: the router's output for them.
            experts: all of the layer's, checked.
        """
        raise NotImplementedError(f"{self.implementation.name} has no router of its own")


def first_reason(*reasons: tuple[bool, str]) -> None:
    """Raises NotImplementedError with the first reason whose condition holds, if any does."""
    for holds, reason in reasons:
        if holds:
            raise NotImplementedError(reason)
