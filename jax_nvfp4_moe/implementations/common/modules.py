"""Which of the modules that were built on this machine serves a device, how, and why none does."""

from collections.abc import Sequence

from jax_nvfp4_moe import devices
from jax_nvfp4_moe.bridge import library, manifest
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.implementations.base import Problem
from jax_nvfp4_moe.implementations.common.grouping import expected_hits


def find(kind: str, versions: Sequence[str], device_kind: str) -> manifest.Module | str:
    """The newest module of a kind that was compiled for a device, or why there is none.

    Args:
        kind: what is in it, which is also what `build` calls it.
        versions: those that can be called, the newest last.
        device_kind: of the device.
    """
    if (reason := library.unavailable()) is not None:
        return reason
    command = f"run `python -m jax_nvfp4_moe build {kind}`"
    try:
        built = _built(kind, versions)
    except (OSError, ValueError) as error:
        return str(error)
    if not built:
        return f"FlashInfer's module is not built: {command}"
    wanted = devices.capability(device_kind)
    fitting = [each for each in built if any(_runs_on(arch, wanted) for arch in each.archs)]
    if not fitting:
        archs = ", ".join(dict.fromkeys(arch for module in built for arch in module.archs))
        return f"FlashInfer's module is built for {archs}, not for {wanted}: {command}"
    return fitting[-1]


def described(module: manifest.Module, problem: Problem, *details: str) -> str:
    """How a module serves a problem: the packed bytes it reads, and what else there is to say."""
    experts = problem.experts
    hits = expected_hits(problem.tokens, problem.top_k, experts.num_experts)
    read = hits * experts.nbytes / experts.num_experts / 1e6
    return "; ".join(
        [f"FlashInfer {module.version}; reads about {read:.1f} MB of packed weights", *details]
    )


def rearranged(experts: ExpertWeights, layout: str) -> list[str]:
    """What it costs that experts are in another layout, if they are."""
    if experts.layout == layout:
        return []
    return [f"rearranges all weights in each call: prepare(experts, {layout!r}) does it once"]


def make_ready(module: manifest.Module) -> None:
    """Lets programs for CUDA call a module.

    Raises:
        OSError, ValueError: as `Module.register`.
    """
    module.register()
    library.register_targets("cuda")


def first_that_holds(*reasons: tuple[bool, str]) -> str | None:
    """The first reason whose condition holds, or None."""
    return next((reason for holds, reason in reasons if holds), None)


def _built(kind: str, versions: Sequence[str]) -> list[manifest.Module]:
    """The newest last."""
    known = list(versions)
    built = [each for each in manifest.read() if each.kind == kind and each.version in known]
    return sorted(built, key=lambda module: known.index(module.version))


def _runs_on(arch: str, capability: str | None) -> bool:
    """Whether what was compiled for an architecture, as "10.0a", runs on a GPU of a capability."""
    if capability is None:
        return False
    number, suffix = arch[:-1], arch[-1]
    if suffix == "f":  # for a family: the same major number, and no lower minor one
        return number.split(".")[0] == capability.split(".")[0] and number <= capability
    return number == capability
