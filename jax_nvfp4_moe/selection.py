"""Which implementation serves a call, and why the others do not."""

import dataclasses
from types import MappingProxyType

import jax
import numpy as np

from jax_nvfp4_moe import devices
from jax_nvfp4_moe._call_checks import check_flag, check_options
from jax_nvfp4_moe._messages import check_name, described
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ExpertWeights, check_experts
from jax_nvfp4_moe.implementations.base import Call, Implementation, Numerics, Problem
from jax_nvfp4_moe.implementations.cpu.implementation import Cpu
from jax_nvfp4_moe.implementations.cute_dsl.implementation import CuteDsl
from jax_nvfp4_moe.implementations.emulation import implementation as emulation
from jax_nvfp4_moe.implementations.triton.implementation import Triton
from jax_nvfp4_moe.implementations.trtllm import implementation as trtllm
from jax_nvfp4_moe.routing import Routing, check_fits

# In order of preference.
IMPLEMENTATIONS: MappingProxyType[str, Implementation] = MappingProxyType(
    {
        "trtllm": trtllm,
        "cute_dsl": CuteDsl(),
        "triton": Triton(),
        "cpu": Cpu(),
        "emulation": emulation,
    }
)

# Devices that an implementation needs, by what their device_kind contains, lower case.
_NEEDS = MappingProxyType(
    {
        "trtllm": ("an SM100 or SM103 GPU", ("b200", "b300")),  # GB200 and GB300 too
        "cute_dsl": ("an SM100 or SM103 GPU", ("b200", "b300")),
        "triton": ("an NVIDIA GPU", ("nvidia", "tesla", "quadro")),
        "cpu": ("a CPU", ("cpu",)),
        "emulation": ("any device", ("",)),
    }
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One line of a report.

    Attributes:
        name: the implementation.
        used: whether the call would run on it.
        reason: how it would serve the call, or why it does not.
    """

    name: str
    used: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `explain` found; prints as a table.

    Attributes:
        device_kind: the device it is about.
        choices: every implementation, in order of preference.
    """

    device_kind: str
    choices: tuple[Choice, ...]

    @property
    def used(self) -> str:
        """The name of the implementation that would run."""
        return next(choice.name for choice in self.choices if choice.used)

    def __str__(self) -> str:
        lines = [f"NVFP4 MoE on {self.device_kind}:"]
        for choice in self.choices:
            mark = "used" if choice.used else "  no"
            lines.append(f"  {mark}  {choice.name:<10} {choice.reason}")
        return "\n".join(lines)


def select(implementation: str | Cpu | CuteDsl | Triton | None, problem: Problem) -> Implementation:
    """The implementation of a call.

    Args:
        implementation: a name, one with options, or None for the first that can serve the problem.
        problem: what is asked. Whether the implementation is to route by itself does not decide
            which is chosen: one that would be far slower may be able to.

    Raises:
        ValueError: no implementation has that name, or no implementation can serve the problem.
        NotImplementedError: the one that was named cannot, or the one that was chosen cannot route
            this by itself; the message says why.
    """
    hint = "None chooses one that can"
    if implementation is None:
        implementation, hint = _first(dataclasses.replace(problem, routing=None)), ""
    if isinstance(implementation, Cpu | CuteDsl | Triton):
        name, module = implementation.name, implementation
    else:
        check_name("implementation", implementation, IMPLEMENTATIONS, "None or ")
        name, module = implementation, IMPLEMENTATIONS[implementation]
    reason = _refusal(name, module, problem)
    if reason is not None:
        explained = f"implementation {implementation!r}: {reason}"
        raise NotImplementedError("; ".join(filter(None, (explained, hint))))
    return module


def _first(problem: Problem) -> str:
    refusals = {name: _refusal(name, each, problem) for name, each in IMPLEMENTATIONS.items()}
    for name, refusal in refusals.items():
        if refusal is None:
            return name
    raise ValueError(refusals["emulation"])


def _refusal(name: str, module: Implementation, problem: Problem) -> str | None:
    what, kinds = _NEEDS[name]
    anywhere = isinstance(module, Triton) and module.interpret
    if not anywhere and not any(kind in problem.device_kind.lower() for kind in kinds):
        return f"it needs {what}, and this is {problem.device_kind}"
    return module.unsupported(problem)


def explain(
    experts: ExpertWeights,
    routing: Routing,
    *,
    tokens: int,
    activation: str | Activation | None = None,
    numerics: Numerics = "kernel",
    route_in_kernel: bool = False,
    device_kind: str | None = None,
) -> Report:
    """Says which implementation a call would run on, and why not on the others.

    Args:
        experts: the layer; arrays, or `jax.ShapeDtypeStruct`s as from `jax.eval_shape`.
        routing: how tokens are routed.
        tokens: T.
        activation: of the layer; None means "silu", or "relu2" for experts that are not gated.
        numerics: as in `nvfp4_moe`.
        route_in_kernel: as in `nvfp4_moe`.
        device_kind: for example "NVIDIA B200"; None means the device that would be traced for.

    Returns:
        A report; `print` it, or read its fields.

    Raises:
        TypeError: `experts` or `routing` is not of its type.
        ValueError: `tokens` is negative, `activation` or `routing` does not fit the experts,
            or no implementation can serve the call.
        NotImplementedError: the implementation that would run cannot route by itself.
    """
    check_experts(experts)
    if not isinstance(routing, Routing):
        raise TypeError(
            f"routing is {described(routing)}, expected Routing, as in "
            "Routing('renormalize', top_k=8)"
        )
    if isinstance(tokens, bool) or not isinstance(tokens, (int, np.integer)):
        raise TypeError(f"tokens is {described(tokens)}, expected an int: how many tokens, T")
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}, expected 0 or more")
    check_fits(routing, experts.num_experts, "the layer")
    fitting = Activation.of(activation or ("silu" if experts.gated else "relu2"))
    check_options(fitting, experts, numerics, False, routing.top_k)
    call = Call(
        activation=fitting,
        numerics=numerics,
        output_dtype=jax.numpy.dtype("bfloat16"),
        axis_name=None,
        router_weight_on_input=False,
    )
    if device_kind is not None and not isinstance(device_kind, str):
        raise TypeError(
            f"device_kind is {described(device_kind)}, expected a str such as 'NVIDIA B200'"
        )
    kind = device_kind or devices.current_kind()
    check_flag("route_in_kernel", route_in_kernel)
    to_route = routing if route_in_kernel else None
    problem = Problem(call, experts, tokens, routing.top_k, kind, to_route)
    chosen = select(None, problem)
    choices = []
    for name, module in IMPLEMENTATIONS.items():
        refusal = _refusal(name, module, problem)
        if module is chosen:
            choices.append(Choice(name, True, module.describe(problem)))
        else:
            choices.append(Choice(name, False, refusal or "an earlier one serves the call"))
    return Report(kind, tuple(choices))
