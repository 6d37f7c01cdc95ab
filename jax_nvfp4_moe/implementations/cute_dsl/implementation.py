"""The implementation "cute_dsl": FlashInfer's `cute_dsl_fused_moe_nvfp4` on SM100 and SM103.

This module decides which problems the two kernels can serve, and with which tactic. `call` makes
their arguments, `sort` the order of their rows.
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from jax_nvfp4_moe import devices
from jax_nvfp4_moe._call_checks import check_flag
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.bridge import cute_dsl
from jax_nvfp4_moe.bridge.cute_dsl import ACTIVATIONS, TACTICS, W4A16_EXPERTS, Tactic, Variant
from jax_nvfp4_moe.bridge.manifest import Module
from jax_nvfp4_moe.experts import ExpertWeights, padded_sizes
from jax_nvfp4_moe.implementations.base import (
    Call,
    Implementation,
    Plan,
    Problem,
    Routed,
    first_reason,
)
from jax_nvfp4_moe.implementations.common.modules import describe_module, find, make_ready
from jax_nvfp4_moe.implementations.common.reports import rearranged
from jax_nvfp4_moe.implementations.cute_dsl.call import Functions, run_routed
from jax_nvfp4_moe.layouts import Layout
from jax_nvfp4_moe.tuning import TunedLayer, look_up

# Each version's rung of the evidence ladder: docs/evidence.md has the five.
_EVIDENCE = {
    "0.6.13": "evidence 3 of 5: its launches were recorded, it has never run on a GPU",
    "0.7.2.post1": "evidence 2 of 5: its kernels compile, it has never run on a GPU",
}


@dataclasses.dataclass(frozen=True)
class CuteDsl(Implementation):
    """The implementation "cute_dsl": FlashInfer's CuTe-DSL kernels on SM100 and SM103.

    Attributes:
        tactic: the kernels' tile sizes; None means the tactic that was tuned for the layer, or
            FlashInfer's default if none was.
        deterministic: whether JAX accumulates each token's rows in slot order and in float32, so
            that a call always gives the same bits. This needs T * K * H * 2 bytes, and kernels that
            FlashInfer has since 0.7.2. Otherwise the kernel accumulates rows in bfloat16, in the
            order in which they finish; W4A16 always accumulates in slot order.

    Raises:
        TypeError, ValueError: an option has the wrong type, or there are no kernels for the tactic.
    """

    tactic: Tactic | None = None
    deterministic: bool = False

    name: ClassVar[str] = "cute_dsl"
    needs: ClassVar[str] = "an SM100 or SM103 GPU"
    device_words: ClassVar[tuple[str, ...]] = ("b200", "b300")  # GB200 and GB300 too
    layout: ClassVar[Layout] = "cute_dsl"

    def __post_init__(self) -> None:
        if self.tactic is not None and self.tactic not in TACTICS["all"]:
            raise ValueError(
                f"tactic is {self.tactic!r}, expected None or Tactic(tile, gemm1_n, gemm2_n, "
                "gemm2_cluster_n): the first three 128 or 256, the last 1 or 2"
            )
        check_flag("deterministic", self.deterministic)

    def _plan(self, problem: Problem) -> "CuteDslPlan":
        _check_computed(problem.call, problem.experts)
        call, experts, device_kind = problem.call, problem.experts, problem.device_kind
        scheme = experts.activation_scheme
        finalize = not self.deterministic and scheme != "none"
        variant = Variant(call.activation.name, scheme, finalize)
        versions = [each for each, has in cute_dsl.VERSIONS.items() if variant in has]
        try:
            module = find(self.name, versions, device_kind)
        except NotImplementedError as error:
            raise NotImplementedError(f"{error}, with FlashInfer {' or '.join(versions)}") from None
        arch, reason = f"{devices.capability(device_kind)}a", None
        for tactic in self._tactics(problem, module.version):
            functions = Functions(module.name, arch, variant, tactic)
            if (reason := _not_there(functions, module, experts)) is None:
                return CuteDslPlan(self, problem, module, functions)
        raise NotImplementedError(reason)

    def _tactics(self, problem: Problem, version: str) -> tuple[Tactic, ...]:
        """Returns the tactics to try, in order."""
        if self.tactic is not None:
            return (self.tactic,)
        try:
            tuned = look_up(
                tuned_layer(problem, version, deterministic=self.deterministic), problem.tokens
            )
        except (OSError, ValueError) as error:
            raise NotImplementedError(str(error)) from error
        default = TACTICS["default"][0]
        # The tuned tactic may be missing from the module that is built now.
        return (default,) if tuned is None else (tuned, default)


@dataclasses.dataclass(frozen=True)
class CuteDslPlan(Plan):
    """The layer as two calls of the module's functions.

    Attributes:
        module: the module that contains the functions.
        functions: the functions to call.
    """

    implementation: CuteDsl
    module: Module
    functions: Functions

    @property
    def platform(self) -> str:
        """The platform of the custom calls."""
        return "cuda"

    def describe(self) -> str:
        """Returns the module, the packed bytes it reads, the tactic, and the evidence for it."""
        tactic = [] if self.functions.variant.scheme == "none" else [str(self.functions.tactic)]
        moved = rearranged(self.problem.experts, "cute_dsl")
        details = *tactic, *moved, _EVIDENCE[self.module.version]
        return describe_module(self.module, self.problem, *details)

    def run(
        self, x: Float[Array, "T H"], routed: Routed, experts: ExpertWeights
    ) -> Float[Array, "T H"]:
        """Returns the layer's output."""
        make_ready(self.module)
        return run_routed(self.functions, self.problem.call, x, *routed, experts)


def tuned_layer(problem: Problem, version: str, *, deterministic: bool) -> TunedLayer:
    """Returns the problem's key in the table of tuned tactics.

    Args:
        problem: the call.
        version: the FlashInfer version of the module that serves it.
        deterministic: as in `CuteDsl`.
    """
    experts = problem.experts
    return TunedLayer(
        device_kind=problem.device_kind,
        version=version,
        activation=problem.call.activation.name,
        activation_scheme=experts.activation_scheme,
        deterministic=deterministic,
        num_experts=experts.num_experts,
        top_k=problem.top_k,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
    )


def _not_there(functions: Functions, module: Module, experts: ExpertWeights) -> str | None:
    """Returns the reason why functions cannot be called for experts, or None if they can."""
    known = cute_dsl.tactics_of(functions.variant, "all")
    if functions.tactic not in known:
        scheme = f"activation_scheme={experts.activation_scheme!r}"
        return f"{functions.tactic}: for {scheme} its kernels are compiled for {known[0]} alone"
    hidden_size, intermediate_size = padded_sizes(experts, "cute_dsl")
    if not functions.tactic.fits(hidden_size, intermediate_size, gated=experts.gated):
        return (
            f"{functions.tactic} does not divide H {hidden_size} and I {intermediate_size}, padded"
        )
    if absent := [name for name in functions.names if name not in module.functions]:
        return (
            f"{module.name} was built without {', '.join(absent)}: run `python -m "
            "jax_nvfp4_moe build cute_dsl --tactics all`"
        )
    return None


def _check_computed(call: Call, experts: ExpertWeights) -> None:
    scheme, activation = experts.activation_scheme, call.activation
    biased = experts.w13_bias is not None or experts.w2_bias is not None
    first_reason(
        (
            scheme == "none" and experts.num_experts > W4A16_EXPERTS,
            f"activation_scheme='none' and {experts.num_experts} experts: it is compiled for "
            f"{W4A16_EXPERTS} at most",
        ),
        (biased, "the experts have biases, and it adds none"),
        (
            activation.name not in ACTIVATIONS,
            f"activation {activation.name!r}: it has {', '.join(ACTIVATIONS)}",
        ),
        (
            activation != Activation(activation.name),
            f"{activation}: it is compiled for {Activation(activation.name)}",
        ),
        (
            experts.separate_scales,
            "gate and up have separate global scales, w13.global_scale [E, 2], and it takes one "
            "for both: share_scales(experts) makes it [E, 1]",
        ),
    )
