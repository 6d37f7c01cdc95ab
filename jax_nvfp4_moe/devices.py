"""Which device a trace is for."""

import re

import jax

# NVIDIA's compute capabilities of the GPUs that a native path serves, by what their names contain,
# lower case: GB200 and GB300 too (developer.nvidia.com/cuda-gpus).
_CAPABILITIES = {"b100": "10.0", "b200": "10.0", "b300": "10.3"}

# Words in the names of older NVIDIA GPUs that JAX still runs on, of compute capability 5.0 to 7.5,
# the first whose tensor cores have bfloat16 being 8.0.
_BEFORE_SM80 = set(
    "gtx titan quadro v100 p100 m40 m60 p4 p40 t4 t1000 2060 2070 2080".split()  # noqa: SIM905
)
_HOPPER = {"h100", "h200", "h800", "h20", "gh200"}


def current_kind() -> str:
    """The kind of the device that is being traced for, such as "NVIDIA B200".

    That of the mesh in force, of devices or abstract, so that a program can be made for a GPU that
    is not there; then that of `jax.default_device`; then of this process's first device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.device_kind
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return (default or jax.devices()[0]).device_kind


def capability(kind: str) -> str | None:
    """The compute capability of a Blackwell datacenter GPU, "10.0" or "10.3"; else None."""
    found = (number for name, number in _CAPABILITIES.items() if name in kind.lower())
    return next(found, None)


def predates_sm80(kind: str) -> bool:
    """Whether an NVIDIA GPU is one of those known to be older than compute capability 8.0."""
    return not _BEFORE_SM80.isdisjoint(_words(kind))


def is_hopper(kind: str) -> bool:
    """Whether a GPU is of compute capability 9.0."""
    return not _HOPPER.isdisjoint(_words(kind))


def _words(kind: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", kind.lower())
