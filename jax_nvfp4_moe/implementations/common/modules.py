"""Finds the compiled module that serves a device, among the modules built on this machine."""

from collections.abc import Sequence

from jax_nvfp4_moe import devices
from jax_nvfp4_moe.bridge import library, manifest
from jax_nvfp4_moe.implementations.base import Problem
from jax_nvfp4_moe.implementations.common.grouping import expected_hits


def find(kind: str, versions: Sequence[str], device_kind: str) -> manifest.Module:
    """Returns the newest module of a kind that was compiled for a device.

    Args:
        kind: the module's kind, which is also its name for `build`.
        versions: the versions that can be called, the newest last.
        device_kind: the kind of device.

    Raises:
        NotImplementedError: there is no such module; the message says why, and gives the command
            that builds one.
    """
    if (reason := library.unavailable()) is not None:
        raise NotImplementedError(reason)
    command = f"run `python -m jax_nvfp4_moe build {kind}`"
    try:
        built = _built(kind, versions)
    except (OSError, ValueError) as error:
        raise NotImplementedError(str(error)) from error
    if not built:
        raise NotImplementedError(f"FlashInfer's module is not built: {command}")
    wanted = devices.capability(device_kind)
    fitting = [each for each in built if any(_runs_on(arch, wanted) for arch in each.archs)]
    if not fitting:
        archs = ", ".join(dict.fromkeys(arch for module in built for arch in module.archs))
        raise NotImplementedError(
            f"FlashInfer's module is built for {archs}, not for {wanted}: {command}"
        )
    return fitting[-1]


def describe_module(module: manifest.Module, problem: Problem, *details: str) -> str:
    """Returns a description of how a module serves a problem: the bytes it reads, and `details`."""
    experts = problem.experts
    hits = expected_hits(problem.tokens, problem.top_k, experts.num_experts)
    read = hits * experts.nbytes / experts.num_experts / 1e6
    return "; ".join(
        [f"FlashInfer {module.version}; reads about {read:.1f} MB of packed weights", *details]
    )


def make_ready(module: manifest.Module) -> None:
    """Registers a module and the bridge's CUDA targets, so that CUDA programs can call it.

    Raises:
        OSError, ValueError: as `Module.register`.
    """
    module.register()
    library.register_targets("cuda")


def _built(kind: str, versions: Sequence[str]) -> list[manifest.Module]:
    """Returns the modules of a kind and of known versions, the newest last."""
    known = list(versions)
    built = [each for each in manifest.read() if each.kind == kind and each.version in known]
    return sorted(built, key=lambda module: known.index(module.version))


def _runs_on(arch: str, capability: str | None) -> bool:
    """Returns whether code for an architecture, such as "10.0a", runs on GPUs of a capability."""
    if capability is None:
        return False
    number, suffix = arch[:-1], arch[-1]
    if suffix == "f":  # for a family: the same major number, and no lower minor one
        return number.split(".")[0] == capability.split(".")[0] and number <= capability
    return number == capability
