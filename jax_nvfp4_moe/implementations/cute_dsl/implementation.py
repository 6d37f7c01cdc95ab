"""FlashInfer's CuTe-DSL kernels, as behind `cute_dsl_fused_moe_nvfp4`, on SM100 and SM103.

What they serve, and the calls as the other implementations have them. `_cute_dsl_call` says what
the two kernels are given, `_cute_dsl_sort` in which order.
"""

import dataclasses
from functools import partial

from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe import devices
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.bridge import cute_dsl
from jax_nvfp4_moe.bridge.cute_dsl import TACTICS, W4A16_EXPERTS, Tactic, Variant
from jax_nvfp4_moe.bridge.manifest import Module
from jax_nvfp4_moe.experts import ExpertWeights, padded_sizes
from jax_nvfp4_moe.implementations.base import Call, Problem
from jax_nvfp4_moe.implementations.common.modules import (
    described,
    find,
    first_that_holds,
    make_ready,
    rearranged,
)
from jax_nvfp4_moe.implementations.common.native import in_one_unit
from jax_nvfp4_moe.implementations.cute_dsl.call import Callee, run_on
from jax_nvfp4_moe.implementations.emulation import implementation as emulation
from jax_nvfp4_moe.routing import Routing, route
from jax_nvfp4_moe.tuning import Layer, look_up

# How far each version is believed: docs/bridge.md has the five steps.
_EVIDENCE = {
    "0.6.13": "evidence 3 of 5: its launches were recorded, it has never run on a GPU",
    "0.7.2.post1": "evidence 2 of 5: its kernels compile, it has never run on a GPU",
}


@dataclasses.dataclass(frozen=True)
class CuteDsl:
    """The implementation "cute_dsl" with options: `implementation` takes one instead of the name.

    Attributes:
        tactic: how the kernels divide their work; None means as `tuning` has it for the layer, or
            else as FlashInfer does where nothing was tuned.
        deterministic: add each token's rows in the order of its slots, in float32 and by JAX, so
            that a call always has the same result. It takes T * K * H * 2 bytes, and kernels that
            FlashInfer has from 0.7.2 on. The others add in bfloat16, whichever row comes first,
            but for W4A16, where this is how it is done either way.

    Raises:
        TypeError, ValueError: an option is of the wrong type, or no such tactic is compiled.
    """

    tactic: Tactic | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.tactic is not None and self.tactic not in TACTICS["all"]:
            raise ValueError(
                f"tactic is {self.tactic!r}, expected None or Tactic(tile, gemm1_n, gemm2_n, "
                "gemm2_cluster_n): the first three 128 or 256, the last 1 or 2"
            )
        if not isinstance(self.deterministic, bool):
            raise TypeError(f"deterministic is {self.deterministic!r}, expected True or False")

    @property
    def name(self) -> str:
        """What `implementation` calls it."""
        return "cute_dsl"

    def unsupported(self, problem: Problem) -> str | None:
        """Why the kernels cannot serve the problem, or None if they can."""
        if (reason := _not_computed(problem.call, problem.experts)) is not None:
            return reason
        found = self.find(problem)
        return found if isinstance(found, str) else None

    def describe(self, problem: Problem) -> str:
        """The module, the packed bytes it reads, the tactic, and how far it was ever run."""
        found = self.find(problem)
        assert not isinstance(found, str)  # unsupported
        module, callee = found
        tactic = [] if callee.variant.scheme == "none" else [str(callee.tactic)]
        details = *tactic, *rearranged(problem.experts, self.name), _EVIDENCE[module.version]
        return described(module, problem, *details)

    def find(self, problem: Problem) -> tuple[Module, Callee] | str:
        """The functions that serve a call, and the module that has them; or why there are none."""
        call, experts, device_kind = problem.call, problem.experts, problem.device_kind
        scheme = experts.activation_scheme
        finalize = not self.deterministic and scheme != "none"
        variant = Variant(call.activation.name, scheme, finalize)
        versions = [each for each, has in cute_dsl.VERSIONS.items() if variant in has]
        module = find(self.name, versions, device_kind)
        if isinstance(module, str):
            return f"{module}, with FlashInfer {' or '.join(versions)}"
        try:
            tactics = self._tactics(problem, module.version)
        except (OSError, ValueError) as error:
            return str(error)
        arch, reason = f"{devices.capability(device_kind)}a", None
        for tactic in tactics:
            callee = Callee(module.name, arch, variant, tactic)
            if (reason := _not_there(callee, module, experts)) is None:
                return module, callee
        assert reason is not None  # There is one tactic at least.
        return reason

    def _tactics(self, problem: Problem, version: str) -> tuple[Tactic, ...]:
        """Those to take, the first one that can be called."""
        if self.tactic is not None:
            return (self.tactic,)
        tuned = look_up(
            layer_of(problem, version, deterministic=self.deterministic), problem.tokens
        )
        default = TACTICS["default"][0]
        # What was measured then may not be built now.
        return (default,) if tuned is None else (tuned, default)

    def run(
        self,
        call: Call,
        x: Float[Array, "T H"],
        topk_ids: Int32[Array, "T K"],
        topk_weights: Float32[Array, "T K"],
        experts: ExpertWeights,
    ) -> Float[Array, "T H"]:
        """The layer's output."""
        tokens, top_k = topk_ids.shape
        found = self.find(Problem(call, experts, tokens, top_k, devices.current_kind()))
        assert not isinstance(found, str)  # unsupported
        module, callee = found
        make_ready(module)
        return lax.platform_dependent(
            x,
            topk_ids,
            topk_weights,
            experts,
            cuda=partial(run_on, callee, call),
            default=partial(emulation.run, call),
        )

    def run_from_logits(
        self,
        call: Call,
        routing: Routing,
        x: Float[Array, "T H"],
        logits: Float[Array, "T E"],
        bias: Float[Array, " E"] | None,
        experts: ExpertWeights,
    ) -> Float[Array, "T H"]:
        """The layer's output, routed by JAX: the kernels have no router."""
        return self.run(call, x, *route(logits, routing, bias=bias), experts)


def layer_of(problem: Problem, version: str, *, deterministic: bool) -> Layer:
    """What a tactic for the problem is kept by in the table of `tuning`.

    Args:
        problem: what is asked.
        version: of the module that serves it.
        deterministic: as in `CuteDsl`.
    """
    experts = problem.experts
    return Layer(
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


def _not_there(callee: Callee, module: Module, experts: ExpertWeights) -> str | None:
    """Why functions cannot be called for experts, or None if they can."""
    known = cute_dsl.tactics_of(callee.variant, "all")
    if callee.tactic not in known:
        scheme = f"activation_scheme={experts.activation_scheme!r}"
        return f"{callee.tactic}: for {scheme} its kernels are compiled for {known[0]} alone"
    hidden_size, intermediate_size = padded_sizes(experts, "cute_dsl")
    if not callee.tactic.fits(hidden_size, intermediate_size, gated=experts.gated):
        return f"{callee.tactic} does not divide H {hidden_size} and I {intermediate_size}, padded"
    if absent := [name for name in callee.functions if name not in module.functions]:
        return (
            f"{module.name} was built without {', '.join(absent)}: run `python -m "
            "jax_nvfp4_moe build cute_dsl --tactics all`"
        )
    return None


def _not_computed(call: Call, experts: ExpertWeights) -> str | None:
    scheme, activation = experts.activation_scheme, call.activation
    biased = experts.w13_bias is not None or experts.w2_bias is not None
    return first_that_holds(
        (call.numerics != "kernel", f"numerics={call.numerics!r} is the emulation's alone"),
        (
            scheme == "none" and experts.num_experts > W4A16_EXPERTS,
            f"activation_scheme='none' and {experts.num_experts} experts: it is compiled for "
            f"{W4A16_EXPERTS} at most",
        ),
        (biased, "the experts have biases, and it adds none"),
        (activation.name == "gelu", "activation 'gelu': it has silu, gelu_tanh, swiglu_oai, relu2"),
        (
            activation != Activation(activation.name),
            f"{activation}: it is compiled for {Activation(activation.name)}",
        ),
        (
            not in_one_unit(experts),
            "an expert's gate and up have different global scales, and it takes one for both: "
            "quantize_experts(..., shared_scale=True)",
        ),
    )
