"""The implementation "trtllm": FlashInfer's `trtllm_fp4_block_scale_moe` on SM100 and SM103.

This module decides which problems the kernel can serve. `call` makes its arguments: `routing` makes
the routing arguments, `weights` the arguments for the experts. `checks` checks that arguments fit
each other, and `sizes` computes the workspace.
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from jax_nvfp4_moe._call_checks import check_flag
from jax_nvfp4_moe.bridge import flashinfer
from jax_nvfp4_moe.bridge.manifest import Module
from jax_nvfp4_moe.experts import ExpertWeights, padded_sizes
from jax_nvfp4_moe.implementations.base import (
    Implementation,
    Plan,
    Problem,
    Routed,
    Unrouted,
    first_reason,
)
from jax_nvfp4_moe.implementations.common.modules import describe_module, find, make_ready
from jax_nvfp4_moe.implementations.common.reports import rearranged
from jax_nvfp4_moe.implementations.trtllm.call import FUNCTION, Function, run_routed, run_unrouted
from jax_nvfp4_moe.implementations.trtllm.routing import (
    MAX_EXPERTS,
    MAX_TOP_K,
    no_router,
    padded_experts,
)
from jax_nvfp4_moe.implementations.trtllm.sizes import Sizes, max_tokens, workspace_bytes
from jax_nvfp4_moe.implementations.trtllm.weights import ACT_TYPES, finite_limit
from jax_nvfp4_moe.layouts import Layout

# The activations for which there are kernels with per-token scales.
_PER_TOKEN = ("silu", "swiglu_oai")
# The versions of flashinfer-python whose arguments are known, the newest last.
_VERSIONS = tuple(flashinfer.PARAMETERS[FUNCTION])
# The rung of the evidence ladder: docs/evidence.md has the five.
_EVIDENCE = "evidence 3 of 5: its launches were recorded, it has never run on a GPU"


@dataclasses.dataclass(frozen=True)
class Trtllm(Implementation):
    """The implementation "trtllm": FlashInfer's TRTLLM-Gen kernel on SM100 and SM103.

    Attributes:
        route_in_kernel: whether the kernel routes the tokens of `nvfp4_moe`, with one launch less.
            It ranks and weights as `route` does, in float32, but with its own sigmoid and softmax,
            so nearly equal scores may be ranked differently. It has routers for some methods and
            sizes only.

    Raises:
        TypeError: `route_in_kernel` is not a bool.
    """

    route_in_kernel: bool = False

    name: ClassVar[str] = "trtllm"
    needs: ClassVar[str] = "an SM100 or SM103 GPU"
    device_words: ClassVar[tuple[str, ...]] = ("b200", "b300")  # GB200 and GB300 too
    layout: ClassVar[Layout] = "trtllm"

    def __post_init__(self) -> None:
        check_flag("route_in_kernel", self.route_in_kernel)

    @property
    def routes(self) -> bool:
        """Whether the kernel routes."""
        return self.route_in_kernel

    def _plan(self, problem: Problem) -> "TrtllmPlan":
        _check_computed(problem)
        if self.route_in_kernel:
            _check_routed(problem)
        return TrtllmPlan(self, problem, find(self.name, _VERSIONS, problem.device_kind))


@dataclasses.dataclass(frozen=True)
class TrtllmPlan(Plan):
    """Computes the layer with one call of the module's function.

    Attributes:
        module: the module that contains the function.
    """

    implementation: Trtllm
    module: Module

    @property
    def platform(self) -> str:
        """The platform of the custom call."""
        return "cuda"

    def describe(self) -> str:
        """Returns the module, the packed bytes it reads, its workspace, and the evidence for it."""
        problem = self.problem
        workspace = []
        if problem.tokens:
            nbytes = workspace_bytes(self.module.version, _sizes(problem))
            workspace = [f"workspace {nbytes / 1e6:.1f} MB"]
        details = *workspace, *rearranged(problem.experts, "trtllm"), _EVIDENCE
        return describe_module(self.module, problem, *details)

    def run(
        self, x: Float[Array, "T H"], routed: Routed, experts: ExpertWeights
    ) -> Float[Array, "T H"]:
        """Returns the layer's output."""
        return run_routed(self._function(), self.problem.call, x, *routed, experts)

    def run_unrouted(
        self, x: Float[Array, "T H"], unrouted: Unrouted, experts: ExpertWeights
    ) -> Float[Array, "T H"]:
        """Returns the layer's output, routed by the kernel."""
        routing = self.problem.routing
        assert routing is not None  # of a plan for `Unrouted` tokens
        return run_unrouted(self._function(), self.problem.call, routing, x, *unrouted, experts)

    def _function(self) -> Function:
        make_ready(self.module)
        return Function(self.module.name, self.module.version)


def _check_computed(problem: Problem) -> None:
    call, experts, activation = problem.call, problem.experts, problem.call.activation.name
    scheme = experts.activation_scheme
    activations = [each for each in ACT_TYPES if scheme != "per_token" or each in _PER_TOKEN]
    first_reason(
        (scheme == "none", "activation_scheme='none': it multiplies quantised activations only"),
        (
            activation not in activations,
            f"activation {activation!r} with activation_scheme={scheme!r}: it has "
            f"{', '.join(activations)}",
        ),
        (
            problem.top_k > MAX_TOP_K,
            f"K is {problem.top_k}: it takes at most {MAX_TOP_K} experts a token",
        ),
        (
            padded_experts(experts.num_experts) > MAX_EXPERTS,
            f"a device has {experts.num_experts} experts: it takes fewer than {MAX_EXPERTS}",
        ),
        (
            finite_limit(call.activation) is not None and experts.separate_scales,
            "gate and up have separate global scales, w13.global_scale [E, 2], and one limit "
            "clamps both: share_scales(experts) makes it [E, 1]",
        ),
    )


def _check_routed(problem: Problem) -> None:
    routing, call = problem.routing, problem.call
    if routing is None:
        raise NotImplementedError(
            "route_in_kernel=True, but the tokens are routed already: call nvfp4_moe, or leave it "
            "False"
        )
    # The kernel takes the first expert's index as a static number, the same on all devices.
    reason = "it cannot tell which experts are a device's (axis_name)" if call.axis_name else None
    if call.router_weight_on_input:
        reason = reason or "router_weight_on_input needs the weights before it runs"
    reason = reason or no_router(routing, problem.experts.num_experts)
    if reason is not None:
        raise NotImplementedError(f"route_in_kernel=True: {reason}; leave it False")


def _sizes(problem: Problem) -> Sizes:
    """Returns the sizes of the largest call of the function that the problem needs."""
    experts, per_token = problem.experts, problem.experts.activation_scheme == "per_token"
    num_experts = padded_experts(experts.num_experts)
    hidden_size, intermediate_size = padded_sizes(experts, "trtllm")
    return Sizes(
        min(problem.tokens, max_tokens(problem.top_k, num_experts)),
        problem.top_k,
        num_experts,
        experts.num_experts,
        hidden_size,
        intermediate_size,
        per_token,
    )
