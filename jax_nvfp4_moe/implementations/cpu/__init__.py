"""The implementation "cpu": C++ kernels for x86-64 and aarch64."""

from jax_nvfp4_moe.implementations.cpu.implementation import LEVELS as LEVELS
from jax_nvfp4_moe.implementations.cpu.implementation import Cpu as Cpu
