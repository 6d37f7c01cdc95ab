"""The safety checks of `jax.export` that programs with this package's kernels have to disable.

    jax.export.export(jax.jit(layer), disabled_checks=nvm.EXPORT_CHECKS)

JAX refuses to export custom calls that it does not know, as it cannot promise that they keep their
meaning. These keep it: their targets carry a version, and a changed meaning gets a new one.
"""

from jax.export import DisabledSafetyCheck

from jax_nvfp4_moe.bridge import library

# The custom call that XLA's Triton backend makes of a Pallas kernel; its name is JAX's.
_PALLAS_TRITON = "__gpu$xla.gpu.triton"

EXPORT_CHECKS = tuple(
    DisabledSafetyCheck.custom_call(target)
    for target in (library.TARGET, library.CPU_LAYER, library.CPU_COMBINE, _PALLAS_TRITON)
)
