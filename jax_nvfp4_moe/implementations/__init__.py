"""The registry of implementations, in order of preference.

An implementation is a folder of this package and one line here. Implementations do not import each
other; what they share is in `common`, and their interface in `base`.
"""

from jax_nvfp4_moe.implementations.base import Implementation
from jax_nvfp4_moe.implementations.cpu import Cpu
from jax_nvfp4_moe.implementations.cute_dsl import CuteDsl
from jax_nvfp4_moe.implementations.emulation import Emulation
from jax_nvfp4_moe.implementations.triton import Triton
from jax_nvfp4_moe.implementations.trtllm import Trtllm

IMPLEMENTATIONS: dict[str, Implementation] = {
    each.name: each
    for each in (
        Trtllm(),
        CuteDsl(),
        Triton(),
        Cpu(),
        Emulation(),
    )
}

# Serves every problem on every device: programs lowered for another platform run this.
FALLBACK = Emulation()
