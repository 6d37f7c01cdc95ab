"""FlashInfer's TRTLLM-Gen kernel, `trtllm_fp4_block_scale_moe`, on SM100 and SM103.

What it serves, and the calls as the other implementations have them. `_trtllm_call` says what the
function is given, `_trtllm_routing` what of that is about routing, `_trtllm_sizes` how much memory
it takes.
"""

from functools import partial

from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe import devices
from jax_nvfp4_moe.bridge import flashinfer
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
from jax_nvfp4_moe.implementations.emulation import implementation as emulation
from jax_nvfp4_moe.implementations.trtllm.call import (
    FUNCTION,
    Callee,
    run_from_logits_on,
    run_on,
)
from jax_nvfp4_moe.implementations.trtllm.routing import (
    MAX_EXPERTS,
    MAX_TOP_K,
    no_router,
    padded_experts,
)
from jax_nvfp4_moe.implementations.trtllm.sizes import (
    Sizes,
    max_tokens,
    workspace_bytes,
)
from jax_nvfp4_moe.implementations.trtllm.weights import ACT_TYPES, finite_limit
from jax_nvfp4_moe.routing import Routing

name = "trtllm"

# There are kernels for tokens with scales of their own for these alone.
_PER_TOKEN = ("silu", "swiglu_oai")

# Those whose arguments are known, the newest last.
_VERSIONS = tuple(flashinfer.PARAMETERS[FUNCTION])
# How far it is believed: docs/bridge.md has the five steps.
_EVIDENCE = "evidence 3 of 5: its launches were recorded, it has never run on a GPU"


# ----------------------------------------------------------------------------------- what it serves


def unsupported(problem: Problem) -> str | None:
    """Why the kernel cannot serve the problem, or None if it can."""
    reason = _not_computed(problem) or _not_routed(problem)
    if reason is not None:
        return reason
    module = find(name, _VERSIONS, problem.device_kind)
    return module if isinstance(module, str) else None


def _not_computed(problem: Problem) -> str | None:
    call, experts, activation = problem.call, problem.experts, problem.call.activation.name
    scheme = experts.activation_scheme
    activations = [each for each in ACT_TYPES if scheme != "per_token" or each in _PER_TOKEN]
    return first_that_holds(
        (call.numerics != "kernel", f"numerics={call.numerics!r} is the emulation's alone"),
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
            finite_limit(call.activation) is not None and not in_one_unit(experts),
            "an expert's gate and up have different global scales, and one limit clamps both: "
            "quantize_experts(..., shared_scale=True)",
        ),
    )


def _not_routed(problem: Problem) -> str | None:
    routing, call = problem.routing, problem.call
    if routing is None:
        return None
    reason = first_that_holds(
        # One number, in a program that all devices run.
        (call.axis_name is not None, "it cannot tell which experts are a device's (axis_name)"),
        (call.router_weight_on_input, "router_weight_on_input needs the weights before it runs"),
    ) or no_router(routing, problem.experts.num_experts)
    return None if reason is None else f"route_in_kernel=True: {reason}; leave it False"


def describe(problem: Problem) -> str:
    """The module, the packed bytes it reads, its workspace, and how far it was ever run."""
    module = find(name, _VERSIONS, problem.device_kind)
    assert not isinstance(module, str)  # unsupported
    workspace = []
    if problem.tokens:
        nbytes = workspace_bytes(module.version, _sizes(problem))
        workspace = [f"workspace {nbytes / 1e6:.1f} MB"]
    details = *workspace, *rearranged(problem.experts, name), _EVIDENCE
    return described(module, problem, *details)


def _sizes(problem: Problem) -> Sizes:
    """Of the largest call that serves the problem."""
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


# ----------------------------------------------------------------------------------------- the call


def run(
    call: Call,
    x: Float[Array, "T H"],
    topk_ids: Int32[Array, "T K"],
    topk_weights: Float32[Array, "T K"],
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """The layer's output."""
    return lax.platform_dependent(
        x,
        topk_ids,
        topk_weights,
        experts,
        cuda=partial(run_on, _callee(), call),
        default=partial(emulation.run, call),
    )


def run_from_logits(
    call: Call,
    routing: Routing,
    x: Float[Array, "T H"],
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"] | None,
    experts: ExpertWeights,
) -> Float[Array, "T H"]:
    """The layer's output, routed by the kernel."""
    return lax.platform_dependent(
        x,
        logits,
        bias,
        experts,
        cuda=partial(run_from_logits_on, _callee(), call, routing),
        default=partial(emulation.run_from_logits, call, routing),
    )


def _callee() -> Callee:
    """FlashInfer's function for the device that is being traced for."""
    module = find(name, _VERSIONS, devices.current_kind())
    assert not isinstance(module, str)  # unsupported
    make_ready(module)
    return Callee(module.name, module.version)
