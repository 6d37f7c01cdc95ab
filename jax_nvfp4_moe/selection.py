"""Chooses an implementation, explains the choice, and prepares weights for one."""

import dataclasses

import jax
import numpy as np

from jax_nvfp4_moe import devices
from jax_nvfp4_moe._call_checks import check_activation, check_routing
from jax_nvfp4_moe._messages import check_name, described
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ExpertWeights, check_experts
from jax_nvfp4_moe.implementations import FALLBACK, IMPLEMENTATIONS
from jax_nvfp4_moe.implementations.base import Call, Implementation, Plan, Problem, shapes_of
from jax_nvfp4_moe.relayout import to_layout
from jax_nvfp4_moe.routing import Routing, check_fits


@dataclasses.dataclass(frozen=True)
class Choice:
    """One line of a report.

    Attributes:
        name: the implementation's name.
        used: whether the call would use it.
        reason: how it would serve the call, or why it does not.
    """

    name: str
    used: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `explain`; prints as a table.

    Attributes:
        device_kind: the kind of device that the call would run on.
        choices: one for every implementation, in order of preference.
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


def resolve(implementation: str | Implementation | None) -> Implementation | None:
    """Returns the implementation that the argument `implementation` names; None for None.

    Raises:
        ValueError: no implementation has that name.
    """
    return None if implementation is None else _named(implementation, "None or ")


def _named(implementation: object, otherwise: str = "") -> Implementation:
    if isinstance(implementation, Implementation):
        return implementation
    check_name("implementation", implementation, IMPLEMENTATIONS, otherwise)
    return IMPLEMENTATIONS[str(implementation)]


def choose(implementation: str | Implementation | None, problem: Problem) -> Plan:
    """Returns the plan for a call.

    Args:
        implementation: a name, an implementation with options, or None for the first one, in order
            of preference, that can serve the problem.
        problem: sizes, types and device. The choice does not depend on values.

    Raises:
        ValueError: no implementation has that name.
        NotImplementedError: the implementation that was named cannot serve the problem; the message
            gives the reason.
    """
    named = resolve(implementation)
    if named is None:
        return next(plan for plan in _plans(problem).values() if isinstance(plan, Plan))
    plan = _plan_or_reason(named, problem)
    if isinstance(plan, str):
        raise NotImplementedError(
            f"implementation {implementation!r}: {plan}; None chooses one that can"
        )
    return plan


def fallback(problem: Problem) -> Plan:
    """Returns the plan of the implementation that serves every problem on every device."""
    return FALLBACK.plan(dataclasses.replace(problem, routing=None))


def _plans(problem: Problem) -> dict[str, Plan | str]:
    """Returns each implementation's plan, or the reason for having none, in preference order."""
    return {name: _plan_or_reason(each, problem) for name, each in IMPLEMENTATIONS.items()}


def _plan_or_reason(implementation: Implementation, problem: Problem) -> Plan | str:
    try:
        return implementation.plan(problem)
    except NotImplementedError as error:
        return str(error)


def explain(
    experts: ExpertWeights,
    routing: Routing,
    *,
    tokens: int,
    activation: str | Activation | None = None,
    device_kind: str | None = None,
) -> Report:
    """Returns the implementation that a call would use, and why it would not use the others.

    Args:
        experts: the layer's experts; arrays, or `jax.ShapeDtypeStruct`s from `jax.eval_shape`.
        routing: the routing method and its parameters.
        tokens: T.
        activation: the layer's; None means "silu", or "relu2" for experts that are not gated.
        device_kind: for example "NVIDIA B200"; None means the device that a call would be traced
            for.

    Returns:
        A report; `print` it, or read its fields.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `tokens` is negative, or `activation` or `routing` does not fit the experts.
    """
    check_experts(experts)
    check_routing(routing)
    if isinstance(tokens, bool) or not isinstance(tokens, (int, np.integer)):
        raise TypeError(f"tokens is {described(tokens)}, expected an int: the number of tokens, T")
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}, expected 0 or more")
    check_fits(routing, experts.num_experts, "the layer")
    fitting = Activation.of(activation or ("silu" if experts.gated else "relu2"))
    check_activation(fitting, experts)
    if device_kind is not None and not isinstance(device_kind, str):
        raise TypeError(
            f"device_kind is {described(device_kind)}, expected a str such as 'NVIDIA B200'"
        )
    call = Call(
        activation=fitting,
        output_dtype=jax.numpy.dtype("bfloat16"),
        axis_name=None,
        router_weight_on_input=False,
    )
    kind = device_kind or devices.current_kind()
    plans = _plans(Problem(call, shapes_of(experts), int(tokens), routing.top_k, kind))
    used = next(name for name, plan in plans.items() if isinstance(plan, Plan))
    choices = []
    for name, plan in plans.items():
        if name == used and isinstance(plan, Plan):
            choices.append(Choice(name, True, plan.describe()))
        else:
            reason = plan if isinstance(plan, str) else "an earlier one serves the call"
            choices.append(Choice(name, False, reason))
    return Report(kind, tuple(choices))


def prepare(experts: ExpertWeights, implementation: str | Implementation) -> ExpertWeights:
    """Returns the experts in the layout that an implementation reads; an exact bijection.

    `layouts` describes the padding (zero codes and zero scales), the row order and the scale
    swizzle. Prepared experts still run everywhere: other implementations convert them in the call.

    Args:
        experts: in any layout.
        implementation: a name, such as "trtllm" or "cute_dsl" ("emulation", "cpu" and "triton" read
            the linear layout), or an implementation with options.

    Returns:
        The same experts in that layout; `experts` itself if it has that layout already.

    Raises:
        TypeError, ValueError: `experts` is not valid, or no implementation has that name.
    """
    check_experts(experts)
    return to_layout(experts, _named(implementation).layout)
