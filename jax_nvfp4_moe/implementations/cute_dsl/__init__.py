"""The implementation "cute_dsl": FlashInfer's CuTe-DSL kernels on Blackwell."""

from jax_nvfp4_moe.implementations.cute_dsl.implementation import CuteDsl as CuteDsl
from jax_nvfp4_moe.implementations.cute_dsl.tuner import tune as tune
