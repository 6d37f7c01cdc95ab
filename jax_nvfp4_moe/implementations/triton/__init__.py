"""The implementation "triton": kernels for NVIDIA GPUs from SM80 on."""

from jax_nvfp4_moe.implementations.triton.implementation import Triton as Triton
