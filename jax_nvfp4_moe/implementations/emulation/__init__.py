"""The implementation "emulation": jax.numpy, on any device."""

from jax_nvfp4_moe.implementations.emulation.implementation import Emulation as Emulation
