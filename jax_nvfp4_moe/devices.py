"""Finds the kind of device that a trace is for, and what that GPU can do."""

import re

import jax

# Compute capabilities of the GPUs that FlashInfer's kernels serve, by a lower-case part of their
# names; GB200 and GB300 match too (developer.nvidia.com/cuda-gpus).
_CAPABILITIES = {"b100": "10.0", "b200": "10.0", "b300": "10.3"}

# Words in the names of NVIDIA GPUs of compute capability 5.0 to 7.5, on which JAX still runs.
# Tensor cores multiply bfloat16 from 8.0 on.
_BEFORE_SM80 = set(
    "gtx titan quadro v100 p100 m40 m60 p4 p40 t4 t1000 2060 2070 2080".split()  # noqa: SIM905
)
_HOPPER = {"h100", "h200", "h800", "h20", "gh200"}


def current_kind() -> str:
    """Returns the kind of device that is being traced for, such as "NVIDIA B200".

    The first of these that is set decides: the current mesh, whose device may be abstract, so that
    a program can be traced for a GPU that this machine does not have; `jax.default_device`; this
    process's first device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.device_kind
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return (default or jax.devices()[0]).device_kind


def capability(kind: str) -> str | None:
    """Returns a Blackwell datacenter GPU's compute capability, "10.0" or "10.3"; else None."""
    found = (number for name, number in _CAPABILITIES.items() if name in kind.lower())
    return next(found, None)


def predates_sm80(kind: str) -> bool:
    """Returns whether an NVIDIA GPU is known to have a compute capability below 8.0."""
    return not _BEFORE_SM80.isdisjoint(_words(kind))


def is_hopper(kind: str) -> bool:
    """Returns whether a GPU has compute capability 9.0."""
    return not _HOPPER.isdisjoint(_words(kind))


def _words(kind: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", kind.lower())
