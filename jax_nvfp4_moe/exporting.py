"""The safety checks of `jax.export` that programs with this package's kernels have to disable.

    jax.export.export(jax.jit(layer), disabled_checks=nvm.EXPORT_CHECKS)

JAX refuses to export custom calls that it does not know, because it cannot guarantee that their
meaning stays the same. The names of this package's calls contain a version, and a call whose
meaning changes gets a new name. The call of the Triton kernels is JAX's own: run programs with it
on the JAX version that exported them.
"""

from jax.export import DisabledSafetyCheck

from jax_nvfp4_moe.bridge import library

# The custom call that XLA's Triton backend makes of a Pallas kernel; its name is JAX's.
_PALLAS_TRITON = "__gpu$xla.gpu.triton"

EXPORT_CHECKS = tuple(
    DisabledSafetyCheck.custom_call(target)
    for target in (library.TARGET, library.CPU_LAYER, library.CPU_COMBINE, _PALLAS_TRITON)
)
